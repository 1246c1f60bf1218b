"""Our errors as HTTP answers in a Starlette application."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketState

from mljobs.contrib.problems import MEDIA_TYPE, body_of, problem, status_of
from mljobs.errors import MlJobsError

_POLICY_VIOLATION, _INTERNAL_ERROR = 1008, 1011


async def answer(request: Request | WebSocket, error: Exception) -> Response | None:
    """Answer one of our errors with its status and its problem details; an exception handler.

    A WebSocket that was accepted is closed: with 1008 and the problem's type, or 1011 where the application is at fault.

    Args:
        request: What was asked.
        error: One of ours.
    """
    if not isinstance(error, MlJobsError):
        raise error
    body = body_of(error, instance=request.url.path)
    if isinstance(request, WebSocket) and request.application_state is not WebSocketState.CONNECTING:
        if request.application_state is WebSocketState.CONNECTED:
            of_caller = status_of(error) < HTTPStatus.INTERNAL_SERVER_ERROR
            await request.close(_POLICY_VIOLATION if of_caller else _INTERNAL_ERROR, problem(error)["type"])
        return None
    return Response(body, status_of(error), media_type=MEDIA_TYPE)


def install(app: Starlette) -> None:
    """Answer each of our errors with its status and its problem details, in every route of this application.

    Args:
        app: A ``Starlette``. A mounted application has handlers of its own: install there too.
    """
    handler: Any = answer  # of both, where Starlette's types have one or the other
    app.add_exception_handler(MlJobsError, handler)
