"""In Flask, by a2wsgi: pages, forms and the API; instead of the stream, which would hold a thread, pages poll."""

from __future__ import annotations

from typing import Any

from a2wsgi import ASGIMiddleware
from flask import Flask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from examples.board_mounted import authorize
from mljobs import JobStore
from mljobs.board import create_app as board


def create_app(url: str = "sqlite:///mljobs.db") -> Flask:
    """Return the application."""
    app = Flask(__name__)

    @app.get("/")
    def home() -> dict[str, str]:
        return {"board": "/jobs/"}

    store = app.extensions["mljobs"] = JobStore(url)
    inner = board(store, authorize=authorize, title="uploads")

    async def without_streams(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].endswith("/events"):
            await Response("This server has no streams; poll.", 503)(scope, receive, send)
        else:
            await inner(scope, receive, send)

    mounted: Any = ASGIMiddleware(without_streams)  # type: ignore[arg-type]
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/jobs": mounted})  # type: ignore[method-assign]
    return app
