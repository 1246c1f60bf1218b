"""Our errors as HTTP answers in a FastAPI application, and in its OpenAPI document."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from mljobs.contrib import problems, starlette


def install(app: FastAPI) -> None:
    """Answer each of our errors with its status and its problem details, in every route of this application.

    A commit belongs before the answer: give a dependency that commits after its ``yield`` the scope of the function,
    ``Depends(get_session, scope="function")``. With the default scope the answer has left when the commit fails.

    Args:
        app: A ``FastAPI``. A mounted application has handlers of its own: install there too.
    """
    starlette.install(app)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI should say of these statuses: ``@app.post(..., responses=responses(404, 409))``.

    Args:
        *statuses: The statuses that the route may answer with.
    """
    return {
        status: {
            "description": _description(status),
            "content": {problems.MEDIA_TYPE: {"schema": problems.schema()}},
        }
        for status in statuses
    }


def _description(status: int) -> str:
    titles = [meaning.title for meaning in problems.MEANINGS.values() if meaning.status == status]
    return "; ".join(titles) or HTTPStatus(status).phrase
