"""Our errors as HTTP answers in a Starlette application."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from mljobs.errors import MlJobsError
from mljobs.problems import MEDIA_TYPE, body_of, status_of


async def answer(request: Request, error: Exception) -> Response:
    """Answer one of our errors with its status and its problem details; an exception handler.

    Args:
        request: What was asked.
        error: One of ours.
    """
    if not isinstance(error, MlJobsError):
        raise error
    body = body_of(error, instance=request.url.path)
    return Response(body, status_of(error), media_type=MEDIA_TYPE)


def install(app: Starlette) -> None:
    """Answer each of our errors with its status and its problem details, in every route of this application.

    Args:
        app: A ``Starlette``. A mounted application has handlers of its own: install there too.
    """
    app.add_exception_handler(MlJobsError, answer)
