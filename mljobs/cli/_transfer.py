"""``export`` and ``import``: records to a file and back."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mljobs.cli._options import FilterArgument, parsed
from mljobs.cli._settings import open_store

if TYPE_CHECKING:
    from mljobs.transfer import OnProgress, Progress

_PATIENCE: Final = 1.0
"""Seconds before a bar is shown: what ends sooner needs none."""

FileArgument = typer.Argument(help="The file; .gz and .zst are compressed; - for the standard stream.")


def export(
    file: Annotated[str, FileArgument] = "-",
    words: FilterArgument = None,
    *,
    extended: Annotated[
        bool, typer.Option("--extended", help="Our own columns too, under keys RedDB ignores.")
    ] = False,
    kind: Annotated[list[str] | None, typer.Option(help="Only this kind; may be given again.", hidden=True)] = None,
    status: Annotated[list[str] | None, typer.Option(help="Only this state; may be given again.", hidden=True)] = None,
    target: Annotated[str | None, typer.Option(help="Only this target.", hidden=True)] = None,
    target_prefix: Annotated[str | None, typer.Option(help="Only targets that begin so.", hidden=True)] = None,
    created_after: Annotated[str | None, typer.Option(help="Created at this time or later.", hidden=True)] = None,
    created_before: Annotated[str | None, typer.Option(help="Created before this time.", hidden=True)] = None,
    finished_after: Annotated[str | None, typer.Option(help="Finished at this time or later.", hidden=True)] = None,
    finished_before: Annotated[str | None, typer.Option(help="Finished before this time.", hidden=True)] = None,
    error_contains: Annotated[str | None, typer.Option(help="Only errors that hold this text.", hidden=True)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bar and no summary.")] = False,
) -> None:
    """Write jobs to a file of NDJSON, one a line, as RedDB writes them.

    \b
    Example:
      $ mljobs export jobs.ndjson.gz status:completed 'finished:<30d'
    """
    given = {
        "kind": kind or None,
        "status": status or None,
        "target": target,
        "target_prefix": target_prefix,
        "created_after": moment("created_after", created_after),
        "created_before": moment("created_before", created_before),
        "finished_after": moment("finished_after", finished_after),
        "finished_before": moment("finished_before", finished_before),
        "error_contains": error_contains,
    }
    filters: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    chosen = parsed(words)
    with open_store() as store:
        total = None if filters or chosen else sum(store.counts().values())
        with bar("exporting", quiet=quiet, total=total) as report, _ending_at_a_broken_pipe():
            number = store.export_jobs(file, chosen, extended=extended, progress=report, **filters)
    if not quiet:
        typer.echo(f"exported {number:,} records", err=True)


def import_(
    file: Annotated[str, FileArgument] = "-",
    *,
    on_conflict: Annotated[
        str, typer.Option(help="A live record that is there: skip it, update it along a legal edge, or error.")
    ] = "skip",
    requeue_running: Annotated[bool, typer.Option("--requeue-running", help="Queue running records again.")] = False,
    rejects: Annotated[
        str | None, typer.Option(help="Where what is not imported goes; else <file>.rejects.ndjson; - for stderr.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bar, and a summary only of problems.")] = False,
) -> None:
    """Read jobs from a file of NDJSON; exit with 1 if any was refused or rejected.

    \b
    Example:
      $ mljobs import jobs.ndjson.gz --on-conflict update
    """
    choice: Any = on_conflict
    with open_store() as store, bar("importing", quiet=quiet) as report:
        done = store.import_jobs(
            file, on_conflict=choice, requeue_running=requeue_running, rejects=rejects, progress=report
        )
    if not quiet or not done.complete:
        typer.echo(f"imported {done}", err=True)
    if not done.complete:
        for problem in done.problems[:3]:
            typer.echo(f"  {problem}", err=True)
        raise typer.Exit(1)


def moment(name: str, text: str | None) -> datetime | None:
    """Return the time that an option says; without a zone it is UTC."""
    if text is None:
        return None
    from mljobs.errors import InvalidValueError  # noqa: PLC0415 - loads SQLAlchemy

    try:
        parsed = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidValueError(name, text, "expected a time like 2026-11-01 or 2026-11-01T12:30:00+01:00") from error
    return parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)


@contextmanager
def _ending_at_a_broken_pipe() -> Iterator[None]:
    """Say it here: Typer would end without a word, and Python with several when it flushes what is left."""
    from mljobs.errors import TransferError  # noqa: PLC0415 - loads SQLAlchemy

    try:
        yield
    except TransferError as error:
        if error.errno != errno.EPIPE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        typer.echo(f"mljobs: {error}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def bar(what: str, *, quiet: bool, total: int | None = None) -> Iterator[OnProgress | None]:
    """Yield the function to call with the progress; on a terminal it draws a bar after a second."""
    from rich.console import Console  # noqa: PLC0415 - takes a tenth of a second
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415
    from rich.progress import Progress as Bars  # noqa: PLC0415

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    bars = Bars(
        TextColumn(what),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[records]:,} records"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bars.add_task(what, total=total, records=0)
    begun = monotonic()

    def report(progress: Progress) -> None:
        if not bars.live.is_started:
            if monotonic() - begun < _PATIENCE:
                return
            bars.start()
        if progress.size is not None:
            bars.update(task, completed=progress.read, total=progress.size, records=progress.records)
        else:
            bars.update(task, completed=progress.records, records=progress.records)

    try:
        yield report
    finally:
        if bars.live.is_started:
            bars.stop()
        sys.stderr.flush()
