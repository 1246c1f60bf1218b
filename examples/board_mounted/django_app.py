"""Beside Django: one process, one port, the board at /jobs and Django everywhere else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path
from starlette.applications import Starlette
from starlette.routing import Mount

from examples.board_mounted import authorize
from mljobs import JobStore
from mljobs.board import create_app as board


def home(_request: HttpRequest) -> JsonResponse:
    """Say where it is."""
    return JsonResponse({"board": "/jobs/"})


urlpatterns = [path("", home)]


def create_app(url: str = "sqlite:///mljobs.db") -> Starlette:
    """Return the application; yours has its settings in a module, and this in its asgi.py."""
    if not settings.configured:
        settings.configure(ROOT_URLCONF=__name__, SECRET_KEY="only-an-example", ALLOWED_HOSTS=["*"])  # noqa: S106
    django, store = get_asgi_application(), JobStore(url)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        store.close()

    routes = [Mount("/jobs", board(store, authorize=authorize)), Mount("/", django)]
    return Starlette(routes=routes, lifespan=lifespan)
