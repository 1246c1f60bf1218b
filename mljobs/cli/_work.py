"""``work``: run a worker of the application's."""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from typing import Annotated

import typer

from mljobs.errors import InvalidValueError
from mljobs.worker import Worker

logger = logging.getLogger("mljobs")


def add_to(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(work)


def work(
    worker: Annotated[str, typer.Argument(help="Where it is, e.g. app.jobs:worker.")],
    *,
    concurrency: Annotated[int | None, typer.Option(help="How many handlers run at a time.")] = None,
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="Only this kind; may be given again.")] = None,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="Stop when there is nothing to do.")] = False,
    grace: Annotated[float | None, typer.Option(help="Seconds that handlers may go on after the first signal.")] = None,
    name: Annotated[str | None, typer.Option(help="The worker's name for operators.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log only warnings and errors.")] = False,
) -> None:
    """Run a worker until SIGTERM or SIGINT: the first lets handlers finish, the second stops at once."""
    found = load(worker)
    found.configure(concurrency=concurrency, grace=grace, name=name)
    if not logging.getLogger().handlers:  # the application has not said how
        logging.basicConfig(
            level=logging.WARNING if quiet else logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
        )
    tally = found.run(until_idle=until_idle, kinds=kinds)
    if not quiet:
        typer.echo(f"{found.name}: {tally}")
    if found.abandoned:  # handlers that cannot be stopped must not keep the process from ending
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        os._exit(0)


def load(place: str) -> Worker:
    """Return the worker at ``module:name``.

    Raises:
        InvalidValueError: There is no such module, no such name in it, or it is no worker.
    """
    module_name, colon, attribute = place.partition(":")
    if not colon or not module_name or not attribute or module_name.startswith("."):
        raise InvalidValueError("worker", place, "expected module:name, e.g. app.jobs:worker")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: object = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InvalidValueError("worker", place, f"importing {module_name} failed: {error}") from error
        raise InvalidValueError("worker", place, f"there is no module {error.name!r} here or installed") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InvalidValueError("worker", place, f"{module_name} has no {attribute!r}")
        found = getattr(found, part)
    if not isinstance(found, Worker):
        raise InvalidValueError("worker", place, f"{attribute} is a {type(found).__name__}, not a Worker")
    return found
