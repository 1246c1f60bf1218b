"""Our errors as HTTP answers in a Flask application."""

from __future__ import annotations

from flask import Blueprint, Flask, Response, request

from mljobs.contrib.problems import MEDIA_TYPE, body_of, status_of
from mljobs.errors import MlJobsError


def answer(error: MlJobsError) -> Response:
    """Answer one of our errors with its status and its problem details; an error handler.

    Args:
        error: One of ours.
    """
    return Response(body_of(error, instance=request.path), status_of(error), content_type=MEDIA_TYPE)


def install(app: Flask | Blueprint) -> None:
    """Answer each of our errors with its status and its problem details.

    Commit in the view: an error in ``teardown_request`` or ``after_request`` comes too late for an answer of its own.

    Args:
        app: A ``Flask``, for every route of it, or a ``Blueprint``, for those of the blueprint.
    """
    app.register_error_handler(MlJobsError, answer)
