"""``create_app``: the board as an ASGI application."""

from __future__ import annotations

import logging
from http import HTTPStatus
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mljobs.board import (
    _actions,
    _api,
    _api_requests,
    _compare_page,
    _job_page,
    _jobs_page,
    _now_page,
    _overview_page,
    _streams,
    _target_page,
    _targets_page,
)
from mljobs.board._access import Access, Authorize
from mljobs.board._backend import Backend, DatabaseAway, TablesMissing, TooSlow
from mljobs.board._site import ROOT, Links, Site, Viewer, path_in
from mljobs.errors import JobNotFound, MlJobsError
from mljobs.jobs import Model

logger = logging.getLogger(__name__)

STATEMENT_SECONDS = 5.0
"""How long a statement of a page may take, on PostgreSQL."""
_URL_MOST = 16_384
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".LICENSE": "text/plain"}


def create_app(
    store: Any,
    *,
    authorize: Authorize | None = None,
    title: str | None = None,
    model: Model | None = None,
    secret: str | None = None,
) -> Starlette:
    """Return the board as an ASGI application, to be served or mounted at any path.

    Args:
        store: A ``JobStore`` or an ``AsyncJobStore``; the board never closes it.
        authorize: Asked for every request what it may do, streams included; plain or ``async``, it returns an ``Access``.
            None lets everybody who reaches the board read, and nobody change anything.
        title: Which installation this is, for its title and beside its logo; None for nothing.
        model: The mapped job class; None for the store's.
        secret: What the tokens in forms are made with. Processes that serve one board need the same; None makes one.

    Example:
        ``app.mount("/jobs", create_app(store, authorize=lambda request: Access.ACT))``
    """
    site = Site(Backend(store, model, STATEMENT_SECONDS), authorize, title, secret)
    post, read = ["POST"], ["GET"]
    app = Board(
        routes=[
            Route("/", _now_page.now, methods=read),
            Route("/jobs", _jobs_page.listing, methods=read),
            Route("/jobs/{id}", _job_page.job, methods=read),
            Route("/jobs/{id}/{what:str}.json", _job_page.job_json, methods=read),
            Route("/targets", _targets_page.targets, methods=read),
            Route("/target", _target_page.target, methods=read),
            Route("/compare", _compare_page.compare, methods=read),
            Route("/overview", _overview_page.overview, methods=read),
            Route("/events", _streams.events, methods=read),
            Route("/poll", _streams.poll, methods=read),
            Route("/actions/cancel", _actions.cancel, methods=post),
            Route("/actions/retry", _actions.retry, methods=post),
            Route("/actions/rescue", _actions.rescue, methods=post),
            Route("/actions/preview", _actions.preview, methods=post),
            Route("/actions/bulk", _actions.bulk, methods=post),
            Route("/theme", _actions.theme, methods=post),
            Route("/static/{name}", static, methods=read),
            Mount("/api", routes=_api.ROUTES),
        ],
        exception_handlers={
            HTTPException: _refused,
            MlJobsError: _failed,
            DatabaseAway: _away,
            TooSlow: _away,
            Exception: _broken,
        },
    )
    app.state.site = site
    return app


class Board(Starlette):
    """Starlette with our headers on every answer, that to an error of ours included."""

    def build_middleware_stack(self) -> ASGIApp:
        """Return what answers, the headers outermost."""
        return SafeHeaders(super().build_middleware_stack())


class SafeHeaders:
    """Put the headers on every answer that keep it from being more than it is, and bound the address.

    Args:
        app: What answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *self._headers]}
            await send(message)

        outer, root, path = (scope.get(name, "") for name in ("app_root_path", "root_path", "path"))
        if not path.startswith(root) and (outer + path).startswith(
            root
        ):  # FastAPI(root_path=...) leaves it out of the path
            path = outer + path
        scope = {**scope, "path": path, ROOT: root}
        if len(scope.get("query_string", b"")) + len(scope.get("path", "")) > _URL_MOST:
            await Response("The address is too long.", 414, media_type="text/plain")(scope, receive, sending)
            return
        await self._app(scope, receive, sending)


async def static(request: Request) -> Response:
    """Send a file of ours: one of those that are there, by its name."""
    name = request.path_params["name"]
    files = {file.name: file for file in resources.files("mljobs.board").joinpath("static").iterdir()}
    kind = _TYPES.get(name[name.rfind(".") :]) if name in files else None
    if kind is None:
        raise HTTPException(404)
    site: Site = request.app.state.site
    age = "public, max-age=31536000, immutable" if request.url.query else "no-cache"
    headers = {"Cache-Control": age, "ETag": f'"{site.version}"'}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(files[name].read_bytes(), media_type=kind, headers=headers)


# ------------------------------------------------------------------------------------------------------------ errors


def _is_api(request: Request) -> bool:
    return path_in(request.scope).startswith("/api/")


async def _message(request: Request, status: int, heading: str, message: str) -> Response:
    if _is_api(request):
        return _api_requests.problem(request, status, heading, message)
    site: Site = request.app.state.site
    viewer = Viewer(Access.NONE, None, Links.of(request.scope))
    return site.page(request, viewer, "message.html", heading=heading, message=message, status=status)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    heading = HTTPStatus(error.status_code).phrase
    detail = "" if error.detail == heading else str(error.detail)
    answer = await _message(request, error.status_code, heading, detail or _WORDS.get(error.status_code, ""))
    answer.headers.update(error.headers or {})
    return answer


_WORDS = {404: "There is no such page.", 405: "This address does not take that."}


async def _failed(request: Request, error: Exception) -> Response:
    if _is_api(request):
        return _api_requests.problem_of(request, error)
    status = 404 if isinstance(error, JobNotFound) else 409
    if isinstance(error, ValueError):
        status = 422
    return await _message(request, status, HTTPStatus(status).phrase, str(error))


async def _broken(request: Request, _error: Exception) -> Response:
    """Answer what should never be; the server logs it, and the visitor is told nothing of it."""
    return await _message(request, 500, "Something went wrong", "The application's log says more.")


async def _away(request: Request, error: Exception) -> Response:
    heading = "The database does not answer"
    if isinstance(error, TooSlow):
        heading = "This took too long"
    elif isinstance(error, TablesMissing):
        heading = "The tables are not there"
    if _is_api(request):
        return _api_requests.problem(request, 503, heading, "")
    site: Site = request.app.state.site
    viewer = Viewer(Access.NONE, None, Links.of(request.scope))
    answer = site.page(
        request, viewer, "away.html", heading=heading, message=str(error), since=site.hub.away_since, status=503
    )
    answer.headers["Retry-After"] = "10"
    return answer
