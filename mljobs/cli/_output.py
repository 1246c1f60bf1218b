"""Print results: as JSON, with tabs where there is no terminal, or as a table that fits the terminal."""

from __future__ import annotations

import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

import typer

from mljobs._printable import printable, span_text

STATUS_COLOURS = {"queued": "", "running": "34", "completed": "32", "failed": "31", "cancelled": "33"}
_GAP = "  "


def is_terminal() -> bool:
    """Whether people look at standard output."""
    return sys.stdout.isatty()


def is_dumb() -> bool:
    """Whether the terminal can only write one line after the other."""
    return not is_terminal() or os.environ.get("TERM", "") in ("", "dumb")


def width() -> int:
    """Return how many columns there are."""
    return max(20, shutil.get_terminal_size((80, 24)).columns)


def coloured(text: str, code: str) -> str:
    """Return ``text`` in a colour, where there are colours and they are wanted."""
    if not code or is_dumb() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


escaped = printable
"""What each line that is printed says of anybody's text."""


def cells(text: str) -> int:
    """Return how many columns ``text`` takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, room: int) -> str:
    """Return ``text`` cut to so many columns."""
    if cells(text) <= room:
        return text
    kept = ""
    for character in text:
        if cells(kept + character) > room - 1:
            break
        kept += character
    return f"{kept}…"


def padded(text: str, room: int) -> str:
    """Return ``text`` with spaces up to so many columns."""
    return text + " " * (room - cells(text))


# ------------------------------------------------------------------------------------------------------------- values


def iso(moment: datetime | None) -> str | None:
    """Return a time as JSON has it, in UTC to the millisecond."""
    return None if moment is None else moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def clock(moment: datetime | None) -> str:
    """Return a time for people: to the second, in UTC; only the time of day where it is today."""
    if moment is None:
        return ""
    now = datetime.now(UTC)
    return f"{moment:%H:%M:%S}" if moment.date() == now.date() else f"{moment:%Y-%m-%d %H:%M}"


def span(seconds: float | timedelta | None) -> str:
    """Return a span for people; nothing where there is none."""
    return "" if seconds is None else span_text(seconds)


def as_json(value: Any) -> Any:
    """Return a value as JSON has it: ids and tokens as text, times in UTC, no numbers beyond a double."""
    if isinstance(value, datetime | Enum):
        return iso(value) if isinstance(value, datetime) else value.value
    if isinstance(value, Mapping):
        return {as_json(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if value - value == 0 else None
    return value if value is None or isinstance(value, int) else str(value)


def job_object(job: Any) -> dict[str, Any]:
    """Return a job with the fields of ``MlJobRead``, then the columns of the host's own class."""
    own = {name: getattr(job, name) for name in _own_columns(type(job))}
    found = {name: getattr(job, name) for name in JOB_FIELDS}
    return {name: as_json(value) for name, value in {**found, **own}.items()}


def _own_columns(model: Any) -> list[str]:
    from mljobs._fields import FIELDS  # noqa: PLC0415 - with the record

    ours = {one.name for one in FIELDS}
    return [attribute.key for attribute in model.__mapper__.column_attrs if attribute.key not in ours]


JOB_FIELDS = (
    "id", "kind", "target_name", "status", "is_terminal", "progress", "created_at", "started_at", "finished_at",
    "created_at_ms", "started_at_ms", "finished_at_ms", "duration_ms", "error_message", "spec", "metrics", "attempts",
    "priority", "run_after", "exclusive", "retry_of", "worker",
)  # fmt: skip
"""The fields of a job in JSON: those of ``MlJobRead``, in its order."""


def picked(item: Mapping[str, Any], fields: Sequence[str] | None) -> dict[str, Any]:
    """Return some fields of an object; ``metrics.f1`` is a value inside.

    Raises:
        typer.BadParameter: There is no such field.
    """
    if fields is None:
        return dict(item)
    found = {}
    for name in fields:
        if name in item:
            found[name] = item[name]
            continue
        value: Any = item
        for number, key in enumerate(name.split(".")):
            if not number and key not in item:
                raise typer.BadParameter(f"there is no field {name!r}; there are {', '.join(item)}")
            value = value.get(key) if isinstance(value, Mapping) else None
        found[name] = value
    return found


def fields_of(text: str | None) -> list[str] | None:
    """Return the names in ``--fields``.

    Raises:
        typer.BadParameter: It holds none.
    """
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    if text is not None and not names:
        raise typer.BadParameter("--fields: expected names with commas between, e.g. id,status,metrics.f1")
    return names or None


# ----------------------------------------------------------------------------------------------------------- printing


def print_json(items: Iterable[Mapping[str, Any]], fields: Sequence[str] | None = None) -> None:
    """Print an object a line."""
    for item in items:
        sys.stdout.write(json.dumps(picked(as_json(item), fields), ensure_ascii=False, separators=(",", ":")) + "\n")


def print_tabs(items: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> None:
    """Print a line each, with tabs between the fields: unpadded, uncut, control characters escaped."""
    for item in items:
        sys.stdout.write("\t".join(escaped(as_text(value)) for value in picked(item, fields).values()) + "\n")


def as_text(value: Any) -> str:
    """Return a value of an object as text; nothing for None, compact JSON for what is nested."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(as_json(value), ensure_ascii=False, separators=(",", ":"))


@dataclass
class Column:
    """A column of a table.

    Attributes:
        title: Above it.
        least: To how many columns it may be cut; None where it never is.
        rank: The highest is left out first where there is no room; 0 never is.
        right: Whether numbers stand in it.
        colours: The colour of a value.
    """

    title: str
    least: int | None = None
    rank: int = 0
    right: bool = False
    colours: Mapping[str, str] = field(default_factory=dict)


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table that fits the terminal: columns are cut, then left out, then each row becomes a block of lines."""
    texts = [[escaped(value) for value in row] for row in rows]
    sys.stdout.write("\n".join(laid_out(columns, texts, width())) + "\n")


def laid_out(columns: Sequence[Column], rows: Sequence[Sequence[str]], room: int) -> list[str]:
    """Return the lines of a table of at most so many columns."""
    kept = [at for at, column in enumerate(columns) if not rows or not column.rank or any(row[at] for row in rows)]
    while True:
        widths = {at: max([cells(columns[at].title), *(cells(row[at]) for row in rows)]) for at in kept}
        over = sum(widths.values()) + len(_GAP) * (len(kept) - 1) - room
        for at in sorted(kept, key=lambda at: -widths[at]):
            least = columns[at].least
            if over > 0 and least is not None and widths[at] > least:
                less = min(over, widths[at] - least)
                widths[at] -= less
                over -= less
        if over <= 0:
            break
        surplus = max(kept, key=lambda at: columns[at].rank)
        if not columns[surplus].rank:
            return _blocks(columns, rows, kept, room)
        kept.remove(surplus)
    head = _GAP.join(_placed(columns[at], columns[at].title, widths[at]) for at in kept)
    lines = [coloured(head.rstrip(), "1")]
    for row in rows:
        placed = (
            coloured(_placed(columns[at], row[at], widths[at]), columns[at].colours.get(row[at], "")) for at in kept
        )
        lines.append(_GAP.join(placed).rstrip())
    return lines


def _placed(column: Column, text: str, room: int) -> str:
    shown = cut(text, room)
    return " " * (room - cells(shown)) + shown if column.right else padded(shown, room)


def _blocks(columns: Sequence[Column], rows: Sequence[Sequence[str]], kept: Sequence[int], room: int) -> list[str]:
    """Return each row as a block: the first column on a line of its own, the others beneath it."""
    lines = []
    for row in rows:
        lines.append(row[kept[0]])
        lines += [f"  {cut(f'{columns[at].title.lower()} {row[at]}', room - 2)}" for at in kept[1:] if row[at]]
    return lines


def note(text: str) -> None:
    """Say something beside the output, on standard error."""
    sys.stdout.flush()
    sys.stderr.write(f"{text}\n")
