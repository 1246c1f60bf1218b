"""``compare`` and ``digest``: whether finished records are what they were."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mljobs.cli._settings import open_store
from mljobs.cli._transfer import FileArgument, bar, moment

if TYPE_CHECKING:
    from mljobs.transfer import DigestLine


def compare(
    file: Annotated[str, FileArgument],
    *,
    finished_before: Annotated[
        str | None, typer.Option(help="Records that finished before this time may be missing: they were pruned.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bar, and a summary only of differences.")] = False,
) -> None:
    """Compare finished records with a file that export wrote earlier; exit with 1 if any differs or is missing.

    \b
    Example:
      $ mljobs compare last-year.ndjson.zst
    """
    limit = moment("finished_before", finished_before)
    with open_store() as store, bar("comparing", quiet=quiet) as report:
        done = store.compare(file, finished_before=limit, on_difference=typer.echo, progress=report)
    if not quiet or not done.same:
        typer.echo(f"compared {done}", err=True)
    for problem in done.problems[:3]:
        typer.echo(f"  {problem}", err=True)
    if not done.same:
        raise typer.Exit(1)


def digest(
    file: Annotated[
        str | None, typer.Argument(help="Continue this file, or begin it; without one the lines go to standard output.")
    ] = None,
    *,
    check: Annotated[str | None, typer.Option(help="Compute the days of this file anew, and say which differ.")] = None,
    before: Annotated[str | None, typer.Option(help="Only days before this one, e.g. 2026-11-01; else today.")] = None,
    pruned_before: Annotated[
        str | None, typer.Option(help="Note in FILE that records which finished before this time were pruned.")
    ] = None,
    undated: Annotated[
        bool, typer.Option("--undated", help="When continuing: records without finished_at again, too.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bar and no summary.")] = False,
) -> None:
    """Write a line for each day's finished records, to keep elsewhere; or check such a file: 1 if any day differs.

    \b
    Example:
      $ mljobs digest kept.ndjson
      $ mljobs digest --check kept.ndjson
    """
    from mljobs.errors import InvalidValueError  # noqa: PLC0415 - loads SQLAlchemy
    from mljobs.transfer import pruned_note  # noqa: PLC0415

    if check is not None:
        _check(check, quiet=quiet)
        return
    lines = _lines(Path(file)) if file is not None and Path(file).exists() else []
    if pruned_before is not None:
        limit = moment("pruned_before", pruned_before)
        if file is None or limit is None:
            raise InvalidValueError("file", file, "say in which file the note is to stand")
        _append(file, pruned_note(lines, limit))
        return
    days = 0

    def write(line: DigestLine) -> None:
        nonlocal days
        days += 1
        if file is None:
            typer.echo(str(line))
        else:
            _append(file, line)

    with open_store() as store, bar("reading", quiet=quiet) as report:
        store.digest(lines, before=_day(before), undated=undated or None, on_line=write, progress=report)
    if not quiet:
        typer.echo(f"{days:,} days", err=True)


def _check(file: str, *, quiet: bool) -> None:
    with open_store() as store, bar("checking", quiet=quiet) as report:
        done = store.check_digest(_lines(Path(file)), progress=report)
    for state in ("different", "missing", "added", "pruned"):
        for day in getattr(done, state):
            typer.echo(f"{state} {day or 'without a day'}")
    if not quiet:
        typer.echo(f"checked {done}", err=True)
    if not done.same:
        raise typer.Exit(1)


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def _append(file: str, line: DigestLine) -> None:
    with Path(file).open("ab") as opened:
        opened.write(f"{line}\n".encode())
        opened.flush()
        os.fsync(opened.fileno())


def _day(text: str | None) -> date | None:
    from mljobs.errors import InvalidValueError  # noqa: PLC0415 - loads SQLAlchemy

    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError as error:
        raise InvalidValueError("before", text, "expected a day like 2026-11-01") from error
