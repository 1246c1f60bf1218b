"""``work``: run a worker of the application's."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from inspect import signature
from typing import TYPE_CHECKING, Annotated

import typer

from mljobs.cli._garbage import collect_as_usual
from mljobs.cli._settings import load, settings

if TYPE_CHECKING:
    from mljobs.worker import Worker

logger = logging.getLogger("mljobs")

_VARIABLE = "MLJOBS_DATABASE_URL"


def work(
    ctx: typer.Context,
    worker: Annotated[
        str | None,
        typer.Argument(help="Where it is, e.g. app.jobs:worker; else what [tool.mljobs] says.", show_default=False),
    ] = None,
    *,
    concurrency: Annotated[int | None, typer.Option(help="How many handlers run at a time.")] = None,
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="Only this kind; may be given again.")] = None,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="Stop when there is nothing to do.")] = False,
    until_empty: Annotated[
        bool, typer.Option("--until-empty", help="Stop when nothing is queued or running; waits for retries too.")
    ] = False,
    grace: Annotated[float | None, typer.Option(help="Seconds that handlers may go on after the first signal.")] = None,
    name: Annotated[str | None, typer.Option(help="The worker's name for operators.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log only warnings and errors.")] = False,
) -> None:
    """Run a worker until SIGTERM or SIGINT: the first lets handlers finish, the second stops at once.

    \b
    Example:
      $ mljobs work app.jobs:worker --concurrency 8
    """
    place = worker or settings().worker
    if place is None:
        raise typer.BadParameter("which worker? Give its place, e.g. app.jobs:worker, or [tool.mljobs] worker")
    ctx.call_on_close(_share_database())
    found = load_worker(place)
    found.configure(concurrency=concurrency, grace=grace, name=name)
    if not logging.getLogger().handlers:  # the application has not said how
        logging.basicConfig(
            level=logging.WARNING if quiet else logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
        )
    collect_as_usual()
    try:
        tally = found.run(until_idle=until_idle, until_empty=until_empty, kinds=kinds)
    except BrokenExecutor as error:  # the worker has said why; forty lines of traceback would not say more
        typer.echo(f"mljobs: the pool of the worker is broken: {str(error).splitlines()[0]}", err=True)
        raise typer.Exit(1) from error
    if not quiet:
        typer.echo(f"{found.name}: {tally}")
    if found.abandoned:  # handlers that cannot be stopped must not keep the process from ending
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        os._exit(0)


def _share_database() -> Callable[[], None]:
    """Let ``JobStore.from_env()`` in the application find the database of this command; return what undoes it."""
    place = settings().located
    before = {key: value for key, value in os.environ.items() if key == _VARIABLE}
    os.environ[_VARIABLE] = place if isinstance(place, str) else place.render_as_string(hide_password=False)

    def undo() -> None:
        os.environ.pop(_VARIABLE)
        os.environ.update(before)

    return undo


def load_worker(place: str) -> Worker:
    """Return the worker at ``module:name``, or the one that the function there makes.

    Raises:
        InvalidValueError: There is no such module, no such name in it, or it is no worker and makes none.
    """
    from mljobs.errors import InvalidValueError  # noqa: PLC0415 - loads SQLAlchemy
    from mljobs.worker import Worker  # noqa: PLC0415

    found = load(place, "worker", "app.jobs:worker")
    if not isinstance(found, Worker) and callable(found) and not isinstance(found, type):
        try:
            signature(found).bind()
        except (TypeError, ValueError) as error:
            raise InvalidValueError("worker", place, f"it is a function, and makes no worker: {error}") from error
        found = found()
    if not isinstance(found, Worker):
        raise InvalidValueError("worker", place, f"{place.partition(':')[2]} is a {type(found).__name__}, not a Worker")
    return found
