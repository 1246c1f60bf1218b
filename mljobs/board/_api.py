"""The same as JSON: list, get, submit, cancel, retry, stats, workers, compare, events; NDJSON and CSV of lists."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from mljobs import jobs
from mljobs._values import from_json_text, to_job_id, to_millis, utc_now
from mljobs.board import _streams
from mljobs.board._access import Access, check_api_origin
from mljobs.board._actions import body_of
from mljobs.board._compare_page import ids_of
from mljobs.board._compared import TEXT_READ, Compared, compared, lower_is_better
from mljobs.board._format import iso, literal, numeric
from mljobs.board._openapi import document
from mljobs.board._query import MOST_TEXT
from mljobs.board._site import Site, Viewer
from mljobs.board._workers import WorkerRow
from mljobs.contrib.problems import MEDIA_TYPE, status_of
from mljobs.contrib.problems import body_of as problem_body
from mljobs.errors import InvalidValueError, MlJobsError
from mljobs.jobs import Bind, Filter

_PAGE, _PAGE_MOST = 50, 200
_ROWS_MOST = 10_000
_BODY_MOST = 1_000_000
_TARGET_RUNS = 500
_BROKEN = 500


def problem(request: Request, status: int, title: str, detail: str) -> Response:
    """Return problem details of what is no error of ours."""
    body: dict[str, Any] = {"type": "about:blank", "title": title, "status": status, "instance": request.url.path}
    if detail and detail != title:
        body["detail"] = detail
    return JSONResponse(body, status, media_type=MEDIA_TYPE)


def problem_of(request: Request, error: Exception) -> Response:
    """Return problem details of one of our errors."""
    assert isinstance(error, MlJobsError)  # noqa: S101 - what it is registered for
    status = status_of(error)
    if isinstance(error, ValueError) and status >= _BROKEN:  # what was asked for holds a value that cannot be
        return problem(request, 422, "This value cannot be", str(error))
    return Response(problem_body(error, instance=request.url.path), status, media_type=MEDIA_TYPE)


async def _viewer(request: Request, wanted: Access = Access.READ) -> tuple[Site, Viewer]:
    """Return who asks.

    Raises:
        HTTPException: May not do it, or a page of another site asks (403).
    """
    site: Site = request.app.state.site
    viewer = await site.viewer(request)
    if wanted is not Access.READ:
        check_api_origin(request)
        if not viewer.access.may(wanted):
            raise HTTPException(403, "You may not do this.")
    return site, viewer


async def _json(request: Request) -> dict[str, Any]:
    """Return the object in the body; none where there is none.

    Raises:
        HTTPException: It is no JSON (400), of another type (415), too large (413).
    """
    body = await body_of(request, _BODY_MOST)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and (body or kind):
        raise HTTPException(415, "Send application/json.")
    if not body:
        return {}
    try:
        found = from_json_text("body", body.decode())
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "The body is no JSON.") from error
    if not isinstance(found, dict):
        raise HTTPException(422, "The body is no object.")
    return found


# ---------------------------------------------------------------------------------------------------------- records


def _moment(value: datetime | None) -> str | None:
    return iso(value) if value is not None else None


def record(job: Any) -> dict[str, Any]:
    """Return a job as JSON: what ``mljobs.contrib.pydantic.MlJobRead`` is."""
    found = {
        "id": str(job.id),
        "kind": str(job.kind),
        "target_name": job.target_name,
        "status": str(job.status),
        "is_terminal": job.is_terminal,
        "progress": job.progress,
        "created_at": _moment(job.created_at),
        "started_at": _moment(job.started_at),
        "finished_at": _moment(job.finished_at),
        "created_at_ms": job.created_at_ms,
        "started_at_ms": job.started_at_ms,
        "finished_at_ms": job.finished_at_ms,
        "duration_ms": job.duration_ms,
        "error_message": job.error_message,
        "spec": _json_of(job.spec_json),
        "metrics": _json_of(job.metrics_json),
        "attempts": job.attempts,
        "priority": job.priority,
        "run_after": _moment(job.run_after),
        "exclusive": job.exclusive,
        "retry_of": str(job.retry_of) if job.retry_of is not None else None,
    }
    if hasattr(job, "worker"):
        found["worker"] = job.worker
    return found


def _json_of(text: str | None) -> Any:
    """Return JSON text as it stands in the record: numbers stay as they were written, and no depth is too much."""
    return None if text is None else msgspec.Raw(text.encode("utf-8", "replace"))


def _answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(value), status, {"Cache-Control": "no-store", **(headers or {})}, "application/json"
    )


def _id(request: Request) -> UUID:
    try:
        return to_job_id(request.path_params["id"])
    except InvalidValueError as error:
        raise HTTPException(404, "This is not the id of a job.") from error


def _filter(request: Request, model: Any) -> Filter:
    text = request.query_params.get("q", "")
    if len(text) > MOST_TEXT:
        raise HTTPException(422, f"A filter has at most {MOST_TEXT} characters.")
    return Filter.parse(text, model)


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= most):
        raise HTTPException(422, f"{name} is a number, 1 to {most}.")
    return int(text)


async def listed(request: Request) -> Response:
    """Return a page of jobs that a filter finds, the newest first."""
    site, _ = await _viewer(request)
    model = site.backend.model
    asked, limit = _filter(request, model), _number(request, "limit", _PAGE, _PAGE_MOST)
    after = request.query_params.get("after")
    page = await site.backend.read(lambda bind: jobs.find(bind, asked, limit=limit, after=after, model=model))
    return _answer({"jobs": [record(job) for job in page], "next": page.cursor, "complete": page.complete})


async def found(request: Request) -> Response:
    """Return a job."""
    site, _ = await _viewer(request)
    job_id, model = _id(request), site.backend.model
    return _answer(record(await site.backend.read(lambda bind: jobs.get(bind, job_id, model=model))))


async def chain(request: Request) -> Response:
    """Return all records of the same work, oldest first."""
    site, _ = await _viewer(request)
    job_id, model = _id(request), site.backend.model
    line = await site.backend.read(lambda bind: jobs.chain(bind, job_id, model=model))
    if not line:
        raise HTTPException(404, "There is no job with this id.")
    return _answer({"jobs": [_summary(job) for job in line]})


def _summary(job: jobs.JobSummary) -> dict[str, Any]:
    names = ("progress", "attempts", "priority", "exclusive", "error", "worker", "token")
    times = ("created_at", "started_at", "finished_at", "run_after", "expires_at")
    known: dict[str, Any] = {
        "id": str(job.id),
        "kind": str(job.kind),
        "target_name": job.target_name,
        "status": str(job.status),
    }
    known |= {name: getattr(job, name) for name in names}
    known |= {name: _moment(getattr(job, name)) for name in times}
    return known | {"retry_of": str(job.retry_of) if job.retry_of else None}


_SUBMIT = {"kind": str, "target_name": str, "priority": int, "exclusive": bool, "unless_active": bool}


async def submitted(request: Request) -> Response:
    """Queue a job."""
    site, viewer = await _viewer(request, Access.SUBMIT)
    body, model = await _json(request), site.backend.model
    values = _given(body, {**_SUBMIT, "spec": object})
    for name in ("kind", "target_name"):
        if name not in values:
            raise HTTPException(422, f"{name} is missing.")
    kind, target = values.pop("kind"), values.pop("target_name")
    job = await site.backend.write(lambda bind: record(jobs.submit(bind, kind, target, model=model, **values)))
    return _answer(job, 201, {"Location": viewer.url(f"api/jobs/{job['id']}")})


def _given(body: dict[str, Any], known: dict[str, type]) -> dict[str, Any]:
    for name, value in body.items():
        if name not in known:
            raise HTTPException(422, f"There is no field {name[:60]!r}.")
        wanted = known[name]
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise HTTPException(422, f"{name} is of another type.")
    return dict(body)


async def cancelled(request: Request) -> Response:
    """Cancel a job; of one that had finished say so."""
    site, _ = await _viewer(request, Access.CANCEL)
    job_id, model = _id(request), site.backend.model
    _given(await _json(request), {})
    done = await site.backend.write(lambda bind: jobs.cancel(bind, job_id, model=model))
    job = await site.backend.read(lambda bind: jobs.get(bind, job_id, model=model))
    return _answer({"cancelled": done, "job": record(job)})


async def retried(request: Request) -> Response:
    """Queue a finished job's work again."""
    site, viewer = await _viewer(request, Access.RETRY)
    job_id, model = _id(request), site.backend.model
    values = _given(await _json(request), {"priority": int, "unless_active": bool, "again": bool, "another": bool})
    job = await site.backend.write(lambda bind: record(jobs.retry(bind, job_id, model=model, **values)))
    return _answer(job, 201, {"Location": viewer.url(f"api/jobs/{job['id']}")})


# ---------------------------------------------------------------------------------------------------------- figures


async def stats(request: Request) -> Response:
    """Return how many jobs there are, what waits, and how long jobs take and wait, by kind."""
    site, _ = await _viewer(request)
    model, over = site.backend.model, timedelta(hours=_number(request, "hours", 24, 720))

    def read(bind: Bind) -> tuple[jobs.Stats, jobs.Counts]:
        return jobs.stats(bind, over=over, model=model), jobs.counts(bind, model=model)

    found, counts = await site.backend.read(read)
    kinds: dict[str, dict[str, Any]] = {str(kind): {"counts": {}} for kind in model.__kinds__}
    for (kind, status), number in counts.items():
        kinds.setdefault(str(kind), {"counts": {}})["counts"][str(status)] = number
    for one in found.kinds:
        kinds.setdefault(one.kind, {"counts": {}}).update({**asdict(one), "oldest": _moment(one.oldest)})
    return _answer({"since": iso(found.since), "exact": counts.exact, "complete": found.complete, "kinds": kinds})


async def workers(request: Request) -> Response:
    """Return who works, the silent ones first, as the page shows it."""
    site, _ = await _viewer(request)
    snapshot = await site.hub.snapshot()

    def shown(row: WorkerRow) -> dict[str, Any]:
        return {
            "worker": row.name, "state": row.state, "jobs": row.held, "concurrency": row.concurrency,
            "kinds": list(row.kinds), "host": row.host, "pid": row.pid, "version": row.version,
            "started_at": _moment(row.started_at), "last_seen_at": _moment(row.last_seen_at),
            "silent_seconds": row.silent, "lease_seconds_left": row.left,
        }  # fmt: skip

    moment = utc_now()
    return _answer(
        {"workers": [shown(row) for row in snapshot.workers(moment)], "unhandled": snapshot.unhandled(moment)}
    )


async def _compared(request: Request) -> Compared:
    site, _ = await _viewer(request)
    ids, model = ids_of(request), site.backend.model
    return compared(await site.backend.read(lambda bind: jobs.summaries_of(bind, ids, text=TEXT_READ, model=model)))


async def compare(request: Request) -> Response:
    """Return runs side by side."""
    shown = await _compared(request)
    return _answer({
        "metrics": {name: {"lower_is_better": lower_is_better(name)} for name in shown.metrics},
        "differ": list(shown.varying),
        "same": dict(shown.same),
        "runs": [
            _summary(run.job)
            | {"params": {name: literal(value) for name, value in run.params.items()},
               "metrics": {name: numeric(value) for name, value in run.metrics.items()}}
            for run in shown.runs
        ],
    })  # fmt: skip


async def target(request: Request) -> Response:
    """Return the metrics of the runs of one target as columns, for a chart."""
    site, _ = await _viewer(request)
    model, name = site.backend.model, request.query_params.get("name", "")[:1000]
    asked = Filter(target=name, status="completed")
    if kind := request.query_params.get("kind"):
        asked &= Filter(kind=kind)
    page = await site.backend.read(
        lambda bind: jobs.summaries(bind, asked, limit=_TARGET_RUNS, text=TEXT_READ, model=model)
    )
    shown = compared([job for job in reversed(page.jobs) if job.finished_at])
    return _answer({
        "at": [to_millis(run.job.finished_at) for run in shown.runs if run.job.finished_at],
        "ids": [str(run.job.id) for run in shown.runs],
        "metrics": {one: [run.metric(one) for run in shown.runs] for one in shown.metrics[:12]},
    })  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- files


async def ndjson(request: Request) -> Response:
    """Return the jobs that a filter finds, one a line, at most 10,000."""
    found_jobs = await _all(request)
    lines = msgspec.json.Encoder().encode_lines(map(record, found_jobs))
    return _file(lines, "application/x-ndjson", "jobs.ndjson")


async def as_csv(request: Request) -> Response:
    """Return the jobs that a filter finds as a table, at most 10,000."""
    rows = []
    for job in await _all(request):
        row = record(job)
        rows.append({**row, "spec": job.spec_json, "metrics": job.metrics_json})
    names = list(rows[0]) if rows else ["id", "kind", "target_name", "status"]
    return _file(
        _table(names, [[row.get(name) for name in names] for row in rows]), "text/csv; charset=utf-8", "jobs.csv"
    )


async def compare_csv(request: Request) -> Response:
    """Return runs side by side as a table."""
    shown = await _compared(request)
    names = [*shown.varying, *(name for name, _ in shown.same)]
    head = ["id", "target_name", "status", "started_at", "took_seconds", *shown.metrics, *names]
    rows = [
        [
            str(run.job.id), run.job.target_name, str(run.job.status), iso(run.job.started_at) if run.job.started_at else "",
            run.took, *(run.metrics.get(name, "") for name in shown.metrics),
            *(literal(run.params[name]).strip('"') if name in run.params else "" for name in names),
        ]
        for run in shown.runs
    ]  # fmt: skip
    return _file(_table(head, rows), "text/csv; charset=utf-8", "compare.csv")


async def _all(request: Request) -> Sequence[Any]:
    site, _ = await _viewer(request)
    model = site.backend.model
    asked, limit = _filter(request, model), _number(request, "limit", 1000, _ROWS_MOST)
    return (await site.backend.read(lambda bind: jobs.find(bind, asked, limit=limit, model=model))).jobs


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([_inert(name) for name in head])
    writer.writerows([[_inert(value) for value in row] for row in rows])
    return out.getvalue().encode("utf-8", "replace")


def _inert(value: Any) -> Any:
    """Return text that no spreadsheet runs as a formula."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") and numeric_text(value) is None:
        return f"'{value}"
    return value


def numeric_text(text: str) -> float | None:
    """Return the number that text is, if it is one."""
    try:
        return float(text)
    except ValueError:
        return None


def _file(content: bytes, kind: str, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
    return Response(content, 200, headers, kind)


async def openapi(request: Request) -> Response:
    """Return what there is, as OpenAPI 3.1."""
    site, viewer = await _viewer(request)
    return _answer(document(viewer.url("api").rstrip("/"), list(site.backend.model.__kinds__)))


ROUTES: list[BaseRoute] = [
    Route("/openapi.json", openapi, methods=["GET"]),
    Route("/jobs", listed, methods=["GET"]),
    Route("/jobs", submitted, methods=["POST"]),
    Route("/jobs.ndjson", ndjson, methods=["GET"]),
    Route("/jobs.csv", as_csv, methods=["GET"]),
    Route("/jobs/{id}", found, methods=["GET"]),
    Route("/jobs/{id}/chain", chain, methods=["GET"]),
    Route("/jobs/{id}/cancel", cancelled, methods=["POST"]),
    Route("/jobs/{id}/retry", retried, methods=["POST"]),
    Route("/stats", stats, methods=["GET"]),
    Route("/workers", workers, methods=["GET"]),
    Route("/compare", compare, methods=["GET"]),
    Route("/compare.csv", compare_csv, methods=["GET"]),
    Route("/target", target, methods=["GET"]),
    Route("/events", _streams.events, methods=["GET"]),
]
"""What is under ``api/``."""
