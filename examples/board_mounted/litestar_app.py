"""In Litestar."""

from __future__ import annotations

from typing import Any

from litestar import Litestar, asgi, get
from litestar.types import Receive, Scope, Send

from examples.board_mounted import authorize
from mljobs import JobStore
from mljobs.board import create_app as board


@get("/", sync_to_thread=False)
def home() -> dict[str, str]:
    """Say where it is."""
    return {"board": "/jobs/"}


def create_app(url: str = "sqlite:///mljobs.db") -> Litestar:
    """Return the application."""
    store = JobStore(url)
    inner = board(store, authorize=authorize, title="uploads")

    @asgi("/jobs", is_mount=True, copy_scope=True)
    async def jobs(scope: Scope, receive: Receive, send: Send) -> None:
        root = scope.get("root_path", "") + "/jobs"
        path = root + scope["path"].rstrip("/")  # Litestar takes the mount off, and ends what is left with a slash
        inside: Any = {**scope, "root_path": root, "path": path if path != root else f"{root}/"}
        await inner(inside, receive, send)  # type: ignore[arg-type]

    return Litestar([home, jobs], on_shutdown=[store.close])
