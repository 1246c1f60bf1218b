"""The board in an application of yours."""

from __future__ import annotations

from starlette.requests import Request

from mljobs.board import Access


def authorize(request: Request) -> Access:
    """Return what this person may do. A real one looks at its session; this one at a header."""
    return Access.ACT if request.headers.get("x-team") == "ml" else Access.READ
