"""Options that several commands share, and how arguments are read."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mljobs.cli._settings import job_class

if TYPE_CHECKING:
    from uuid import UUID

    from mljobs.jobs import Filter
    from mljobs.store._store import JobStore

_WORD = re.compile(r'([^\W\d]\w*(?:\.(?:[\w\-/@%+]+|"[^"]*"))*(?::?(?:<=|>=|<|>)|[:=]))(.*)', re.DOTALL)


# ------------------------------------------------------------------------------------------------------------ options

JsonOption = Annotated[bool, typer.Option("--json", help="JSON, an object a line.")]
FieldsOption = Annotated[
    str | None, typer.Option("--fields", help="Only these, with commas: id,status,metrics.f1.", show_default=False)
]
ScanOption = Annotated[
    bool, typer.Option("--scan", help="Look at all jobs for what no index serves, not at the latest 100,000.")
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="An id, or its unique beginning or end.")]
IdsArgument = Annotated[list[str], typer.Argument(metavar="ID...", help="Ids, or unique ends of ids.")]
FilterArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FILTER]...", help="Which jobs: words as below."),
]
IdsOrFilterArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ID|FILTER]...", help="Ids, or words of a filter."),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", "-n", help="Say what would be done, and do nothing.")]
AllOption = Annotated[bool, typer.Option("--all", help="All jobs; needed where there is no filter.")]


# ---------------------------------------------------------------------------------------------------------- arguments


def parsed(words: Sequence[str] | None) -> Filter:
    """Return the filter that the arguments say; each is a word, so that the shell's own quotation marks are enough.

    Raises:
        FilterError: A word is not understood.
    """
    from mljobs.errors import FilterError  # noqa: PLC0415 - loads SQLAlchemy
    from mljobs.jobs import Filter  # noqa: PLC0415

    model = job_class()
    chosen = Filter()
    for argument in words or ():
        try:
            chosen &= Filter.parse(argument, model)
        except FilterError:
            word = _WORD.fullmatch(argument)
            if word is None or '"' in word[2] or not re.search(r"\s", word[2]):
                raise
            chosen &= Filter.parse(f'{word[1]}"{word[2]}"', model)
    return chosen


def is_filter(argument: str) -> bool:
    """Whether an argument is a word of a filter, not an id."""
    return bool(_WORD.match(argument))


def named(arguments: Sequence[str] | None) -> list[str]:
    """Return the ids among the arguments.

    Raises:
        typer.BadParameter: Ids and words of a filter together.
    """
    names = [argument for argument in arguments or () if not is_filter(argument)]
    words = [argument for argument in arguments or () if is_filter(argument)]
    if names and words:
        raise typer.BadParameter(f"ids and filters do not go together: {names[0]} and {words[0]}")
    return names


def ids_of(store: JobStore, arguments: Sequence[str]) -> list[UUID]:
    """Return the ids that are named; ``-`` reads them from standard input, one a line.

    Raises:
        InvalidValueError: One of them names no job, or several.
    """
    found: list[Any] = []
    for argument in arguments:
        names = [line.split()[0] for line in sys.stdin if line.strip()] if argument == "-" else [argument]
        found += [store.find_id(name) for name in names]
    return list(dict.fromkeys(found))


def span_option(name: str, text: str) -> Any:
    """Return the ``timedelta`` that an option says.

    Raises:
        typer.BadParameter: It is none.
    """
    from mljobs.jobs._words import span_of  # noqa: PLC0415 - loads SQLAlchemy

    span = span_of(text)
    if span is None:
        raise typer.BadParameter(f"{name}: expected a span such as 90s, 2h, 7d or 1d12h, not {text!r}")
    return span


def time_option(name: str, text: str | None) -> Any:
    """Return the ``timedelta`` or the time that an option says; without a zone it is UTC.

    Raises:
        typer.BadParameter: It is neither.
    """
    from datetime import UTC, datetime  # noqa: PLC0415

    from mljobs.jobs._words import span_of  # noqa: PLC0415 - loads SQLAlchemy

    if text is None:
        return None
    span = span_of(text)
    if span is not None:
        return span
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(f"{name}: expected a span such as 2h, or a time such as 2026-11-01T12:30Z") from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def spec_text(spec: str | None) -> str | None:
    """Return the JSON text that an option gives: itself, a file, or standard input."""
    if spec is None:
        return None
    if spec == "-":
        return sys.stdin.read()
    return Path(spec[1:]).read_text("utf-8") if spec.startswith("@") else spec


FILTER_HELP = """\b
Words of a filter, all of which must hold (quote < and > for the shell):
  kind:train,backfill  status:failed     target:'spam*'    worker:'gpu-*'
  error:"out of memory"                  'created:<2h'     'finished:>2026-11-01'
  'spec.lr>0.01'       'metrics.f1>=0.9' 'took:>1h'        'waited:>10m'
  'progress>=50'       'attempts>1'      exclusive:true    retry_of:ID  id:PREFIX
and the columns of your own class by their names. * stands for any text."""
