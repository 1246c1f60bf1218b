"""The pages *now*, *jobs* and *job*: parse, call the store, show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mljobs import jobs
from mljobs._values import to_job_id, utc_now
from mljobs.board._access import Access
from mljobs.board._backend import DatabaseAway
from mljobs.board._charts import columns
from mljobs.board._format import duration, failure, leaves, literal, parsed, short, size, tree
from mljobs.board._html import Html
from mljobs.board._now import NowView, running_row, view
from mljobs.board._plots import gantt
from mljobs.board._query import Asked
from mljobs.board._site import Links, Site, Viewer, quoted
from mljobs.errors import InvalidValueError
from mljobs.jobs import Bind, JobSummary
from mljobs.states import MlJobStatus

_SPEC_KEYS = 4
_TEXT_WHOLE = 200_000
_ERROR_WHOLE = 20_000
_COUNTED = 10_000
_AROUND_OLDEST = 5.0

NOW_PARTS = {
    "figures": "now_figures.html",
    "attention": "now_attention.html",
    "running-jobs": "now_running.html",
    "workers": "now_workers.html",
    "minutes": "now_minutes.html",
    "queue": "now_queue.html",
    "next": "now_next.html",
    "failed-last": "now_failed.html",
}


# --------------------------------------------------------------------------------------------------------------- now


def now_parts(site: Site, shown: NowView, url: Links) -> dict[str, str]:
    """Return the parts of the page, by the id of their element."""
    label = (
        f"Jobs finished in each minute of the last hour: {shown.completed} completed, {shown.failed} failed; "
        "the hour before is on the page Overview"
    )
    svg = columns(shown.columns, height=72, every=20, shape="hm", label=label, gap=0.45, side="right")
    values = {"view": shown, "url": url, "minutes_svg": svg}
    return {name: site.render(template, values) for name, template in NOW_PARTS.items()}


async def render_now(site: Site, url: Links) -> dict[str, str]:
    """Return the parts of the page as the database has it now."""
    return now_parts(site, await site.hub.now(), url)


async def now(request: Request) -> Response:
    """Show what runs now."""
    site: Site = request.app.state.site
    viewer = await site.viewer(request)
    watched = site.hub.view(("now", viewer.url.root), partial(render_now, site, viewer.url))
    try:
        shown = await site.hub.now()
    except DatabaseAway:
        kept = site.hub.last
        if kept is None:
            raise
        return _now_away(request, site, viewer, view(kept))
    parts = {name: Html(html) for name, html in now_parts(site, shown, viewer.url).items()}
    read_only = await site.why_read_only(viewer)
    return site.page(
        request,
        viewer,
        "now.html",
        here="now",
        heading=f"{shown.running} running",
        stream=viewer.url("events", view="now"),
        last=f"{site.hub.boot}.{watched.number}",
        read_only=read_only,
        view=shown,
        parts=parts,
        may_rescue=read_only is None and viewer.access.may(Access.RESCUE),
    )


def _now_away(request: Request, site: Site, viewer: Viewer, shown: NowView) -> Response:
    parts = {name: Html(html) for name, html in now_parts(site, shown, viewer.url).items()}
    return site.page(
        request,
        viewer,
        "now_away.html",
        here="now",
        heading="The database does not answer",
        status=503,
        stream=viewer.url("events", view="now"),
        last="",
        view=shown,
        parts=parts,
        may_rescue=False,
        since=site.hub.away_since,
        message=site.hub.away_why,
    )


# -------------------------------------------------------------------------------------------------------------- jobs


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
        note = f"+ {more} keys" + (f", {size(job.spec_bytes)}" if job.spec_bytes > 1000 else "")
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
    return tuple((path.rpartition(".")[2] or path, literal(item).strip('"')) for path, item in shown), len(pairs) - len(
        shown
    )


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

    def read(bind: Bind) -> dict[str, Any]:
        page = jobs.summaries(bind, asked.filter, limit=asked.limit, after=asked.after, order=asked.order, model=model)
        found = {
            "page": page,
            "chains": jobs.chains(bind, [job.id for job in page.jobs], model=model),
            "counts": None if asked.others else jobs.counts(bind, model=model),
            "matching": None,
        }
        if asked.filter and page.jobs and page.scanned is None:  # what no index finds is not counted either
            found["matching"] = jobs.count_up_to(bind, _COUNTED + 1, asked.filter, model=model)
        return found

    found = await site.backend.read(read)
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


# --------------------------------------------------------------------------------------------------------------- job


def read_job(bind: Bind, model: Any, job_id: UUID) -> dict[str, Any] | None:
    """Return all that the page of a job shows; None where there is no such job."""
    found = jobs.summaries_of(bind, [job_id], text=_TEXT_WHOLE, error=_ERROR_WHOLE, model=model)
    if not found:
        return None
    job = found[0]
    chain = jobs.chain(bind, job_id, model=model)
    same = 0
    if job.error:
        since = utc_now() - timedelta(days=7)
        pattern = jobs.pattern_of(job.error.partition("\n")[0][:300])
        for reason in jobs.failure_reasons(bind, since=since, model=model).reasons:
            if jobs.pattern_of(reason.line) == pattern:
                same = reason.jobs
    usual = jobs.usual_durations(bind, [(str(job.kind), job.target_name)], model=model)
    return {"job": job, "chain": chain, "same": same, "usual": usual.get((str(job.kind), job.target_name))}


def job_parts(
    site: Site, url: Links, job: JobSummary, chain: Sequence[JobSummary], usual: float | None, *, unhandled: str
) -> dict[str, str]:
    """Return the parts of a job's page that change while it is not finished, by the id of their element.

    Args:
        site: The board.
        url: Its addresses.
        job: The job.
        chain: All records of the same work.
        usual: How long such a job usually takes; None where that is not known.
        unhandled: Why no worker takes jobs of its kind; empty where one does.
    """
    moment = utc_now()
    stays, begin, end = gantt(chain or [job], moment)
    row = running_row(job, usual, moment)
    at = next((number for number, stay in enumerate(stays) if stay.job.id == job.id), 0)
    values = {
        "job": job,
        "row": row,
        "usual": usual,
        "unhandled": unhandled,
        "stays": stays,
        "begin": begin,
        "end": end,
        "shape": "hm" if end - begin < timedelta(hours=20) else "mdhm",
        "url": url,
        "moment": moment,
        "before": stays[at - 1].job if at else None,
        "after": [stay.job for stay in stays if stay.job.retry_of == job.id],
        "tree": tree(parsed(job.metrics)) if isinstance(parsed(job.metrics), dict | list) else (),
        "count": _count_of(job.metrics),
        "filter_url": filter_url_of(url),
        "name": "metrics",
        "text": job.metrics,
        "bytes": job.metrics_bytes,
    }
    return {
        "state": site.render("job_state.html", values),
        "chain": site.render("job_chain.html", values),
        "timeline": site.render("job_timeline.html", values),
        "record": site.render("job_record.html", values),
        "lease": site.render("job_lease.html", values),
        "metrics-block": site.render("job_json.html", values),
    }


def filter_url_of(url: Links) -> Any:
    """Return what makes the address of the jobs that have the value of a node, too."""

    def filter_url(what: str, node: Any) -> str:
        return url("jobs", q=f"{what}.{node.path}={node.text}")

    return filter_url


async def render_job(site: Site, url: Links, job_id: UUID) -> dict[str, str]:
    """Return those parts as the database has them now."""
    model = site.backend.model

    def read(bind: Bind) -> tuple[list[JobSummary], list[JobSummary]]:
        found = jobs.summaries_of(bind, [job_id], text=_TEXT_WHOLE, model=model)
        return found, jobs.chain(bind, job_id, model=model)

    found, chain = await site.backend.read(read)
    if not found:
        return {}
    usual, unhandled = site.hub.usual_of(found[0]), await unhandled_of(site, found[0])
    return job_parts(site, url, found[0], chain, usual, unhandled=unhandled)


async def unhandled_of(site: Site, job: JobSummary) -> str:
    """Return why no worker takes jobs like this one that waits; empty where one does, or it does not wait."""
    if job.status is not MlJobStatus.QUEUED:
        return ""
    return (await site.hub.snapshot(oldest=_AROUND_OLDEST)).unhandled(utc_now()).get(str(job.kind), "")


async def job(request: Request) -> Response:
    """Show a job."""
    site: Site = request.app.state.site
    viewer = await site.viewer(request)
    job_id = id_in_path(request)
    found = await site.backend.read(lambda bind: read_job(bind, site.backend.model, job_id))
    if found is None:
        raise HTTPException(404, "There is no job with this id. It may have been pruned.")
    one: JobSummary = found["job"]
    parts = job_parts(site, viewer.url, one, found["chain"], found["usual"], unhandled=await unhandled_of(site, one))
    read_only = await site.why_read_only(viewer)
    final = one.status.is_terminal

    spec = site.render(
        "job_json.html",
        {
            "job": one,
            "url": viewer.url,
            "name": "spec",
            "tree": tree(parsed(one.spec)) if isinstance(parsed(one.spec), dict | list) else (),
            "count": _count_of(one.spec),
            "filter_url": filter_url_of(viewer.url),
            "text": one.spec,
            "bytes": one.spec_bytes,
        },
    )
    return site.page(
        request,
        viewer,
        "job.html",
        here="jobs",
        heading=f"{one.target_name[:60]}, {one.status}",
        stream="" if final and one.token is None else viewer.url("events", view="job", id=str(one.id)),
        read_only=read_only,
        job=one,
        parts={name: Html(html) for name, html in parts.items()},
        failure=failure(one.error) if one.error else None,
        error_cut=len(one.error or "") >= _ERROR_WHOLE,
        same=found["same"],
        same_url=viewer.url("jobs", q=f"status:failed error:{quoted((one.error or '').partition(chr(10))[0][:80])}"),
        spec=Html(spec),
        final=final,
        may_cancel=not final and read_only is None and viewer.access.may(Access.CANCEL),
        may_retry=final and read_only is None and viewer.access.may(Access.RETRY),
    )


def _count_of(text: str | None) -> str:
    value = parsed(text)
    if isinstance(value, dict | list):
        word = ("key" if isinstance(value, dict) else "item") + ("" if len(value) == 1 else "s")
        return f"{len(value)} {word}, {size(len(text or ''))}"
    return size(len(text)) if text else ""


def id_in_path(request: Request) -> UUID:
    """Return the id that the path names.

    Raises:
        HTTPException: It names none (404).
    """
    try:
        return to_job_id(request.path_params["id"])
    except InvalidValueError as error:
        raise HTTPException(404, "This is not the id of a job.") from error


async def job_json(request: Request) -> Response:
    """Send ``spec`` or ``metrics`` byte for byte."""
    site: Site = request.app.state.site
    await site.viewer(request)
    job_id, model = id_in_path(request), site.backend.model
    found: Any = await site.backend.read(lambda bind: jobs.get(bind, job_id, model=model))
    text = found.spec_json if request.path_params["what"] == "spec" else found.metrics_json
    if text is None:
        raise HTTPException(404, "The job has no metrics.")
    name = f'attachment; filename="{job_id}-{request.path_params["what"]}.json"'
    return Response(text.encode(), media_type="application/json", headers={"Content-Disposition": name})
