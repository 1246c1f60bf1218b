"""The page *job*: one job, its chain of retries, its spec and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mljobs import jobs
from mljobs._values import to_job_id, utc_now
from mljobs.board._access import Access
from mljobs.board._format import Node, Numeral, failure, numeric, parsed, plural, size, tree
from mljobs.board._html import Html
from mljobs.board._now import running_row
from mljobs.board._plots import gantt
from mljobs.board._query import MOST_TEXT
from mljobs.board._site import Links, Site, quoted
from mljobs.errors import InvalidValueError
from mljobs.jobs import Bind, Filter, FilterTerm, JobSummary
from mljobs.jobs._words import Pattern
from mljobs.states import MlJobStatus

_TEXT_WHOLE = 200_000
_ERROR_WHOLE = 20_000
_AROUND_OLDEST = 5.0


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
    """Return what makes the address of the jobs that have the value of a node, too; empty where no filter can ask for it."""

    def filter_url(what: str, node: Any) -> str:
        term = term_of(what, node)
        return url("jobs", q=str(Filter(term))) if term is not None and len(term.text) <= MOST_TEXT else ""

    return filter_url


def term_of(what: str, node: Node) -> FilterTerm | None:
    """Return the term of a filter for the value of a node; None where there is none."""
    value: Any = node.value
    if isinstance(value, Numeral):
        if numeric(value) is None:
            return None
        value = int(value) if value.lstrip("-").isdigit() else float(value)
    elif isinstance(value, str):
        value = Pattern((value,))
    elif not (value is None or isinstance(value, bool)):
        return None
    return FilterTerm(what, ":", (value,), node.keys)


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
        return f"{plural(len(value), 'key' if isinstance(value, dict) else 'item')}, {size(len(text or ''))}"
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
    if request.path_params["what"] not in ("spec", "metrics"):
        raise HTTPException(404)
    found: Any = await site.backend.read(lambda bind: jobs.get(bind, job_id, model=model))
    text = found.spec_json if request.path_params["what"] == "spec" else found.metrics_json
    if text is None:
        raise HTTPException(404, "The job has no metrics.")
    name = f'attachment; filename="{job_id}-{request.path_params["what"]}.json"'
    return Response(text.encode(), media_type="application/json", headers={"Content-Disposition": name})
