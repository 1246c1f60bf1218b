"""A server for the tests of the board, in a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

_PATIENCE = 60


@contextmanager
def served(app: Any, port: int = 0) -> Iterator[str]:
    """Serve an application from a thread, and end it with its open streams."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            stop: Callable[[], None] | None = (
                getattr(getattr(app.state, "site", None), "hub", None) and app.state.site.hub.stop
            )
            if stop is not None:
                stop()
            server.should_exit = True
            thread.join(_PATIENCE)
