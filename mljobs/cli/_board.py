"""``board``: the page where people look, served."""

from __future__ import annotations

import tempfile
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mljobs.cli._garbage import collect_as_usual
from mljobs.cli._settings import DEFAULT_URL, given, job_class, open_store, settings

if TYPE_CHECKING:
    from mljobs.store._store import JobStore

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def board(
    *,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any that is free.")] = 8642,
    title: Annotated[str | None, typer.Option(help="Which installation this is, beside the logo.")] = None,
    act: Annotated[
        bool, typer.Option("--act", help="Let everybody who reaches it cancel and retry; at a loopback address only.")
    ] = False,
    root_path: Annotated[str, typer.Option(help="The path that a proxy serves it under.")] = "",
    demo: Annotated[
        bool, typer.Option("--demo", help="A database of its own with some weeks of history, and workers that go on.")
    ] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Serve the board: what runs, waits, failed and why. Read only unless --act says otherwise.

    \b
    Example:
      $ mljobs board --demo --open
    """
    import uvicorn  # noqa: PLC0415 - an extra

    from mljobs.board import Access, create_app  # noqa: PLC0415 - loads SQLAlchemy
    from mljobs.errors import InvalidValueError  # noqa: PLC0415

    act = act or demo
    if act and host not in _LOOPBACK:
        raise InvalidValueError(
            "host", host, "--act lets everybody in who reaches it: mount create_app(authorize=...) instead"
        )
    with _demonstration() if demo else open_store() as store:
        app = create_app(
            store, authorize=(lambda _: Access.ACT) if act else None, title=title or ("demo" if demo else None)
        )
        server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, root_path=root_path, log_level="warning"))
        socket = server.config.bind_socket()
        address = f"http://{f'[{host}]' if ':' in host else host}:{socket.getsockname()[1]}{root_path}/"
        typer.echo(
            f"The board of {settings().shown} is at {address}" + ("" if act else ", read only") + ". Ctrl-C ends it."
        )
        if open_:
            webbrowser.open(address)
        collect_as_usual()
        server.run([socket])


@contextmanager
def _demonstration() -> Iterator[JobStore]:
    """Open a database with a history, in which workers go on while the block runs.

    Raises:
        InvalidValueError: The database that is named holds jobs.
    """
    from mljobs import schema  # noqa: PLC0415 - loads SQLAlchemy
    from mljobs.board._demo import fill  # noqa: PLC0415
    from mljobs.board._live import Live  # noqa: PLC0415
    from mljobs.errors import InvalidValueError  # noqa: PLC0415
    from mljobs.store._store import JobStore  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="mljobs-board-", ignore_cleanup_errors=True) as directory:
        if settings().url == DEFAULT_URL:
            given["url"] = f"sqlite:///{Path(directory) / 'demo.db'}"
        with JobStore(settings().located, model=job_class()) as store:
            schema.upgrade(store.engine)
            if store.count_up_to(1):
                raise InvalidValueError("url", settings().shown, "the demonstration wants an empty database")
            typer.echo("Writing six weeks of history ...")
            fill(store)
            live = Live(store)
            live.start()
            try:
                yield store
            finally:
                live.stop()
