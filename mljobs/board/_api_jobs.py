"""Jobs over the API: list, get, chain, submit, cancel, retry."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mljobs import jobs
from mljobs.board._access import Access
from mljobs.board._api_records import record, summary
from mljobs.board._api_requests import answer, filter_of, given, id_of, json_of, number_of, viewer_of

_PAGE, _PAGE_MOST = 50, 200


async def listed(request: Request) -> Response:
    """Return a page of jobs that a filter finds, the newest first."""
    site, _ = await viewer_of(request)
    model = site.backend.model
    asked, limit = filter_of(request, model), number_of(request, "limit", _PAGE, _PAGE_MOST)
    after = request.query_params.get("after")
    page = await site.backend.read(lambda bind: jobs.find(bind, asked, limit=limit, after=after, model=model))
    return answer({"jobs": [record(job) for job in page], "next": page.cursor, "complete": page.complete})


async def found(request: Request) -> Response:
    """Return a job."""
    site, _ = await viewer_of(request)
    job_id, model = id_of(request), site.backend.model
    return answer(record(await site.backend.read(lambda bind: jobs.get(bind, job_id, model=model))))


async def chain(request: Request) -> Response:
    """Return all records of the same work, oldest first."""
    site, _ = await viewer_of(request)
    job_id, model = id_of(request), site.backend.model
    line = await site.backend.read(lambda bind: jobs.chain(bind, job_id, model=model))
    if not line:
        raise HTTPException(404, "There is no job with this id.")
    return answer({"jobs": [summary(job) for job in line]})


_SUBMIT = {"kind": str, "target_name": str, "priority": int, "exclusive": bool, "unless_active": bool}


async def submitted(request: Request) -> Response:
    """Queue a job."""
    site, viewer = await viewer_of(request, Access.SUBMIT)
    body, model = await json_of(request), site.backend.model
    values = given(body, {**_SUBMIT, "spec": object})
    for name in ("kind", "target_name"):
        if name not in values:
            raise HTTPException(422, f"{name} is missing.")
    kind, target = values.pop("kind"), values.pop("target_name")
    job = await site.backend.write(lambda bind: record(jobs.submit(bind, kind, target, model=model, **values)))
    return answer(job, 201, {"Location": viewer.url(f"api/jobs/{job['id']}")})


async def cancelled(request: Request) -> Response:
    """Cancel a job; of one that had finished say so."""
    site, _ = await viewer_of(request, Access.CANCEL)
    job_id, model = id_of(request), site.backend.model
    given(await json_of(request), {})
    done = await site.backend.write(lambda bind: jobs.cancel(bind, job_id, model=model))
    job = await site.backend.read(lambda bind: jobs.get(bind, job_id, model=model))
    return answer({"cancelled": done, "job": record(job)})


async def retried(request: Request) -> Response:
    """Queue a finished job's work again."""
    site, viewer = await viewer_of(request, Access.RETRY)
    job_id, model = id_of(request), site.backend.model
    values = given(await json_of(request), {"priority": int, "unless_active": bool, "again": bool, "another": bool})
    job = await site.backend.write(lambda bind: record(jobs.retry(bind, job_id, model=model, **values)))
    return answer(job, 201, {"Location": viewer.url(f"api/jobs/{job['id']}")})
