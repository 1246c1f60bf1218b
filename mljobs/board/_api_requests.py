"""What requests to the API bring, checked, and what they are answered with."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mljobs._values import from_json_text, to_job_id
from mljobs.board._access import Access, check_api_origin
from mljobs.board._actions import body_of
from mljobs.board._query import MOST_TEXT
from mljobs.board._site import Site, Viewer
from mljobs.contrib.problems import MEDIA_TYPE, status_of
from mljobs.contrib.problems import body_of as problem_body
from mljobs.errors import InvalidValueError, MlJobsError
from mljobs.jobs import Filter

_BODY_MOST = 1_000_000
_BROKEN = 500


def problem(request: Request, status: int, title: str, detail: str) -> Response:
    """Return problem details of what is no error of ours."""
    body: dict[str, Any] = {"type": "about:blank", "title": title, "status": status, "instance": request.scope["path"]}
    if detail and detail != title:
        body["detail"] = detail
    return JSONResponse(body, status, media_type=MEDIA_TYPE)


def problem_of(request: Request, error: Exception) -> Response:
    """Return problem details of one of our errors."""
    assert isinstance(error, MlJobsError)  # noqa: S101 - what it is registered for
    status = status_of(error)
    if isinstance(error, ValueError) and status >= _BROKEN:  # what was asked for holds a value that cannot be
        return problem(request, 422, "This value cannot be", str(error))
    return Response(problem_body(error, instance=request.scope["path"]), status, media_type=MEDIA_TYPE)


async def viewer_of(request: Request, wanted: Access = Access.READ) -> tuple[Site, Viewer]:
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


async def json_of(request: Request) -> dict[str, Any]:
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


def given(body: dict[str, Any], known: dict[str, type]) -> dict[str, Any]:
    """Return the fields of a body.

    Raises:
        HTTPException: One of them is not known, or of another type (422).
    """
    for name, value in body.items():
        if name not in known:
            raise HTTPException(422, f"There is no field {name[:60]!r}.")
        wanted = known[name]
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise HTTPException(422, f"{name} is of another type.")
    return dict(body)


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(value), status, {"Cache-Control": "no-store", **(headers or {})}, "application/json"
    )


def id_of(request: Request) -> UUID:
    try:
        return to_job_id(request.path_params["id"])
    except InvalidValueError as error:
        raise HTTPException(404, "This is not the id of a job.") from error


def filter_of(request: Request, model: Any) -> Filter:
    text = request.query_params.get("q", "")
    if len(text) > MOST_TEXT:
        raise HTTPException(422, f"A filter has at most {MOST_TEXT} characters.")
    return Filter.parse(text, model)


def number_of(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= most):
        raise HTTPException(422, f"{name} is a number, 1 to {most}.")
    return int(text)
