"""The page *jobs*: those that a filter finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mljobs import jobs
from mljobs._values import utc_now
from mljobs.board._access import Access
from mljobs.board._format import brief, duration, leaves, literal, parsed, plural, short, size
from mljobs.board._query import LOOK_SECONDS, Asked
from mljobs.board._site import Site
from mljobs.jobs import Bind, JobSummary

_SPEC_KEYS = 4
_COUNTED = 10_000


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job in the list."""

    job: JobSummary
    spec: tuple[tuple[str, str], ...]
    spec_more: str
    metrics: tuple[tuple[str, str], ...]
    took: str
    chain: Sequence[JobSummary]
    waits: str


def job_row(job: JobSummary, chain: Sequence[JobSummary], keys: Sequence[str], moment: datetime) -> JobRow:
    """Return a job as a row of the list.

    Args:
        job: The job.
        chain: All records of the same work.
        keys: Paths in the spec that come first.
        moment: The present time.
    """
    spec = parsed(job.spec)
    shown, more = _some_of(spec, keys)
    note = ""
    if job.spec is None and job.spec_bytes:
        note = size(job.spec_bytes)
    elif more:
        note = f"+ {plural(more, 'key')}" + (f", {size(job.spec_bytes)}" if job.spec_bytes > 1000 else "")
    metrics, _ = _some_of(parsed(job.metrics), ())
    ended = job.finished_at or (moment if job.started_at else None)
    took = duration(ended - job.started_at) if ended and job.started_at else ""
    ready = job.run_after or job.created_at
    waits = f"not before {short(ready - moment)}" if ready > moment else f"waits {short(moment - ready)}"
    return JobRow(job, shown, note, metrics, took, chain, waits)


def differing(rows: Sequence[JobSummary]) -> dict[str, list[str]]:
    """Return for each target which keys of its specs differ from job to job: those are what one looks for."""
    seen: dict[str, dict[str, set[str]]] = {}
    for job in rows:
        for path, item in leaves(parsed(job.spec)):
            seen.setdefault(job.target_name, {}).setdefault(path, set()).add(literal(item)[:80])
    return {target: [path for path, values in keys.items() if len(values) > 1] for target, keys in seen.items()}


def _some_of(value: Any, keys: Sequence[str]) -> tuple[tuple[tuple[str, str], ...], int]:
    pairs = {path: item for path, item in leaves(value) if not isinstance(item, list)} if value else {}
    wanted = [(path, pairs[path]) for path in dict.fromkeys(keys) if path in pairs]
    others = [pair for pair in pairs.items() if pair[0] not in keys and len(literal(pair[1])) <= 40]
    shown = (wanted + others)[:_SPEC_KEYS]
    return tuple((path.rpartition(".")[2] or path, brief(item)) for path, item in shown), len(pairs) - len(shown)


def _read(bind: Bind, asked: Asked, model: Any) -> dict[str, Any]:
    """Return the page of jobs, and what stands around it."""
    page = jobs.summaries(
        bind,
        asked.filter,
        limit=asked.limit,
        after=asked.after,
        order=asked.order,
        seconds=LOOK_SECONDS,
        model=model,
    )
    found = {
        "page": page,
        "chains": jobs.chains(bind, [job.id for job in page.jobs], model=model),
        "counts": None if asked.others else jobs.counts(bind, model=model),
        "matching": None,
    }
    if asked.filter and page.jobs and page.scanned is None:  # what no index finds is not counted either
        found["matching"] = jobs.count_up_to(bind, _COUNTED + 1, asked.filter, model=model)
    return found


async def listing(request: Request) -> Response:
    """Show a page of jobs that a filter finds."""
    site: Site = request.app.state.site
    viewer = await site.viewer(request)
    model = site.backend.model
    asked = Asked.of(request, model)
    read_only = await site.why_read_only(viewer)
    shared: dict[str, Any] = {
        "here": "jobs",
        "heading": asked.heading,
        "asked": asked,
        "read_only": read_only,
        "may_act": read_only is None and (viewer.access.may(Access.CANCEL) or viewer.access.may(Access.RETRY)),
    }
    if asked.problems:
        return site.page(request, viewer, "jobs_invalid.html", status=422, fields=jobs.Filter.fields(model), **shared)

    found = await site.backend.read(partial(_read, asked=asked, model=model))
    moment = utc_now()
    page: jobs.SummaryPage = found["page"]
    in_order = page.jobs if asked.order == asked.sort else page.jobs[::-1]
    keys = differing(in_order)
    rows = [
        job_row(job, found["chains"].get(job.id, [job]), [*asked.spec_keys, *keys.get(job.target_name, ())], moment)
        for job in in_order
    ]
    return site.page(
        request,
        viewer,
        "jobs.html",
        stream=viewer.url("events", view="jobs", q=str(asked.filter), since=_newest(in_order))
        if not asked.after and asked.sort == "newest"
        else "",
        rows=rows,
        tabs=asked.tabs(found["counts"]),
        exact=found["counts"] is None or found["counts"].exact,
        matching=found["matching"],
        counted=_COUNTED,
        newer=asked.newer(page, in_order),
        older=asked.older(page, in_order),
        complete=page.complete,
        scanned=page.scanned,
        **shared,
    )


def _newest(rows: Sequence[JobSummary]) -> str:
    return str(rows[0].id) if rows else ""
