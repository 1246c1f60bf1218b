"""In FastAPI, and in Starlette the same way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from examples.board_mounted import authorize
from mljobs import AsyncJobStore
from mljobs.board import create_app as board


def create_app(url: str = "sqlite:///mljobs.db") -> FastAPI:
    """Return the application."""
    store = AsyncJobStore(url)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await store.close()

    app = FastAPI(title="Uploads", lifespan=lifespan)

    @app.get("/")
    def home() -> dict[str, str]:
        return {"board": "/jobs/"}

    app.mount("/jobs", board(store, authorize=authorize, title="uploads"))
    return app
