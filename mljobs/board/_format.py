"""Values as people read them: durations, times, ids, sizes, JSON as a tree, a traceback with its library frames apart."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from mljobs._printable import span_text
from mljobs.board._html import Html

_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
_LONG_DAYS = 2
_ITEMS_SHOWN = 200
_NODES_SHOWN = 2_000
_TEXT_SHOWN = 2_000
_CUT = 60
_FIGURES = 9
_DEPTH_SHOWN = 12
_BEYOND_AXES = 1e150  # differences of such numbers are still numbers


def duration(seconds: float | timedelta | None) -> str:
    """Return a span of time to the second: ``38 m 04 s``; never below zero, for clocks are set."""
    if seconds is None:
        return ""
    left = seconds.total_seconds() if isinstance(seconds, timedelta) else seconds
    return f"{round(max(0.0, left) * 1000)} ms" if left < 1 else span_text(left, " ", days_from=_LONG_DAYS)


def short(seconds: float | timedelta | None) -> str:
    """Return a span of time roughly: ``38 m``."""
    if seconds is None:
        return ""
    if isinstance(seconds, timedelta):
        seconds = seconds.total_seconds()
    whole = int(max(0.0, seconds))
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // 60} m"
    if whole < _LONG_DAYS * _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // 60:02d} m"
    return f"{whole // _DAY} d"


def cut(text: str, most: int = _CUT) -> str:
    """Return text that is no longer than ``most``."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def iso(moment: datetime) -> str:
    """Return ISO 8601 in UTC, to the millisecond."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


_SHAPES = {
    "hm": "%H:%M",
    "hms": "%H:%M:%S",
    "hmsf": "%H:%M:%S.%f",
    "md": "%b %d",
    "mdhm": "%m-%d %H:%M",
    "mdhms": "%m-%d %H:%M:%S",
    "mdhmsf": "%m-%d %H:%M:%S.%f",
    "day": "%Y-%m-%d",
    "full": "%Y-%m-%d %H:%M:%S",
    "fullf": "%Y-%m-%d %H:%M:%S.%f",
}


def clock(moment: datetime, shape: str = "hms") -> str:
    """Return a time in UTC in one of the shapes that the page's script knows too."""
    text = moment.astimezone(UTC).strftime(_SHAPES[shape])
    return text[:-3] if shape.endswith("f") else text


def when(moment: datetime | None, shape: str = "hms", *, zone: bool = False, empty: str = "") -> Html:
    """Return a ``<time>``: UTC, which the script turns into the viewer's zone; all of it in its title.

    Args:
        moment: None for ``empty``.
        shape: See ``clock``.
        zone: Whether the zone stands behind it.
        empty: What to show instead of no time.
    """
    if moment is None:
        return Html('<span class="dim">{}</span>').format(empty) if empty else Html("")
    shown = clock(moment, shape) + (" UTC" if zone else "")
    return Html('<time datetime="{}" title="{} UTC" data-f="{}"{}>{}</time>').format(
        iso(moment), clock(moment, "fullf"), shape, Html(" data-z") if zone else "", shown
    )


def ago(moment: datetime | None, now: datetime) -> Html:
    """Return how long ago a time is, as a ``<time>``."""
    if moment is None:
        return Html("")
    seconds = (now - moment).total_seconds()
    shown = f"{short(seconds)} ago" if seconds >= 0 else f"in {short(-seconds)}"
    return Html('<time datetime="{}" title="{} UTC">{}</time>').format(iso(moment), clock(moment, "fullf"), shown)


def short_id(job_id: UUID) -> str:
    """Return an id as it stands in a table."""
    text = str(job_id)
    return f"{text[:8]}…{text[-4:]}"


def size(number: int) -> str:
    """Return a number of bytes: ``48 kB``."""
    if number < 1000:
        return f"{number} B"
    for unit in ("kB", "MB", "GB"):
        number_in = number / 1000
        number = int(number_in)
        if number_in < 1000:
            return f"{number_in:.1f} {unit}" if number_in < 10 else f"{number} {unit}"
    return f"{number} GB"


def plural(number: int, one: str, many: str = "") -> str:
    """Return a number of things: ``1 job``, ``1,204 jobs``.

    Args:
        number: How many.
        one: What one of them is called.
        many: What several are called; empty for ``one`` with an s.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def number(value: float) -> str:
    """Return a figure in at most six digits."""
    return f"{value:.6g}"


# ------------------------------------------------------------------------------------------------------------- JSON


class Numeral(str):
    """A number as it was written: none is rounded, and a big one stays exact."""

    __slots__ = ()


def parsed(text: str | None) -> Any:
    """Return parsed JSON with its numbers as they were written; None where it is none."""
    if text is None:
        return None
    try:
        return json.loads(text, parse_int=Numeral, parse_float=Numeral, parse_constant=Numeral)
    except (ValueError, RecursionError):
        return None


def numeric(value: Any) -> float | None:
    """Return the value of a parsed number; None for anything else, and for one that no axis can hold."""
    if not isinstance(value, Numeral):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if abs(found) < _BEYOND_AXES else None


def literal(value: Any) -> str:
    """Return a parsed JSON value as text."""
    match value:
        case Numeral():
            return str(value)
        case str():
            return json.dumps(value[:_TEXT_SHOWN], ensure_ascii=False) + (
                f" … {len(value):,} characters" if len(value) > _TEXT_SHOWN else ""
            )
        case None | bool():
            return json.dumps(value)
        case list():
            return f"[{', '.join(map(literal, value))}]"
        case _:
            return plural(len(value), "key")


def brief(value: Any) -> str:
    """Return a parsed JSON value for a cell of a table: a fraction of many digits as six of them, whole numbers exactly."""
    text = literal(value)
    if isinstance(value, Numeral) and len(text) > _FIGURES and not text.lstrip("-").isdigit():
        found = numeric(value)
        return text if found is None else number(found)
    return text.strip('"')


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[str, Any]]:
    """Yield each value of a JSON object with its path, joined by dots; lists are values."""
    if isinstance(value, Mapping) and len(path) < _DEPTH_SHOWN:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif path:
        yield ".".join(path), value


@dataclass(frozen=True, slots=True)
class Node:
    """A value in a tree of JSON."""

    key: str
    text: str
    keys: tuple[str, ...] = ()
    value: Any = None
    note: str = ""
    children: tuple[Node, ...] = ()
    leaf: bool = True


def tree(value: Any) -> tuple[Node, ...]:
    """Return parsed JSON as nodes: at most 200 of each level and 2,000 in all; what is left out is said."""
    return _level(value, (), [_NODES_SHOWN])


def _level(value: Any, keys: tuple[str, ...], left: list[int]) -> tuple[Node, ...]:
    pairs: list[tuple[str, Any]] = (
        list(value.items()) if isinstance(value, dict) else [(str(at), item) for at, item in enumerate(value)]
    )
    nodes = []
    for key, item in pairs[:_ITEMS_SHOWN]:
        if left[0] <= 0:
            break
        left[0] -= 1
        nodes.append(_node(item, (*keys, key), left))
    if len(pairs) > len(nodes):
        nodes.append(Node("", f"{len(pairs) - len(nodes):,} more", leaf=False))
    return tuple(nodes)


def _node(item: Any, keys: tuple[str, ...], left: list[int]) -> Node:
    key, depth = keys[-1], len(keys) - 1
    if isinstance(item, dict) and item and depth < _DEPTH_SHOWN:
        return Node(key, "", note=plural(len(item), "key"), children=_level(item, keys, left), leaf=False)
    if isinstance(item, list) and depth < _DEPTH_SHOWN:
        flat = all(not isinstance(one, dict | list) for one in item)
        text = literal(item) if flat else ""
        if flat and len(item) <= 8 and len(text) <= 80:
            return Node(key, text, leaf=False)
        head = ", ".join(literal(one) for one in item[:3]) if flat else ""
        note = plural(len(item), "item") + (f": {head[:80]} …" if head else "")
        return Node(key, "", note=note, children=_level(item, keys, left), leaf=False)
    return Node(key, literal(item), keys, item)


# -------------------------------------------------------------------------------------------------------- tracebacks


@dataclass(slots=True)
class Frame:
    """A frame of a traceback."""

    where: str
    code: str
    library: str | None


@dataclass(slots=True)
class Frames:
    """Frames that stand together: of the application, or of libraries, which are folded."""

    library: bool
    frames: list[Frame] = field(default_factory=list)
    last: bool = False

    @property
    def names(self) -> str:
        """The libraries, each once."""
        return ", ".join(dict.fromkeys(frame.library or "" for frame in self.frames))


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as the page shows it."""

    line: str
    parts: tuple[Frames, ...]
    rest: str


_FRAME = re.compile(r'^\s*File "([^"\n]+)", line (\d+)(?:, in (.+))?$')
_LIBRARIES = (
    re.compile(r"(?:site-packages|dist-packages)[\\/](([^\\/.]+).*)"),
    re.compile(r"[\\/]lib[\\/]python3\.\d+[\\/](([^\\/.]+).*)"),
)


def failure(text: str) -> Failure:
    """Return an error's first line, its frames, and what is none."""
    lines = text.split("\n")
    parts: list[Frames] = []
    rest: list[str] = []
    at = 1
    while at < len(lines):
        found = _FRAME.match(lines[at])
        if found is None:
            if lines[at].strip() and not lines[at].startswith("Traceback"):
                rest.append(lines[at])
            at += 1
            continue
        at += 1
        code = []
        while at < len(lines) and lines[at].startswith("    ") and not _FRAME.match(lines[at]):
            if lines[at].strip(" ^~"):
                code.append(lines[at].strip())
            at += 1
        path, line, function = found.groups()
        _add(parts, path, f"{line}" + (f" in {function}" if function else ""), "\n".join(code))
    own = [part for part in parts if not part.library]
    if own:
        own[-1].last = True
    return Failure(lines[0], tuple(parts), "\n".join(rest))


def _add(parts: list[Frames], path: str, line: str, code: str) -> None:
    library = next((found for pattern in _LIBRARIES if (found := pattern.search(path))), None)
    shown, name = library.groups() if library is not None else (path, None)
    frame = Frame(f"{shown}:{line}", code, name)
    if not parts or parts[-1].library != bool(name):
        parts.append(Frames(bool(name)))
    parts[-1].frames.append(frame)
