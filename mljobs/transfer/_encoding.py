"""Make a line of NDJSON of a row in wire form, without an ORM object, a ``UUID`` or a ``datetime``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, Final

import msgspec

from mljobs._fields import EXTENDED_FIELDS
from mljobs.db._wire import Wire
from mljobs.transfer._host_values import HostValues
from mljobs.transfer._rows import EPOCH_KEY, HOST_KEY, KEYS, NAMES, OWN

_KvLine = msgspec.defstruct("_KvLine", KEYS, gc=False)
"""The keys and their order as RedDB writes them."""

_OWN_KEYS: Final = sorted((*KEYS, *OWN))
_OwnLine: Any = msgspec.defstruct(
    "_OwnLine",
    [*_OWN_KEYS, (EPOCH_KEY, list[str] | None, None), (HOST_KEY, dict[str, Any] | None, None)],
    gc=False,
    omit_defaults=True,
)
"""The same with our own keys among them; no default but of the last may be one they have."""
_in_order_of_keys = itemgetter(*((*KEYS, *OWN).index(key) for key in _OWN_KEYS))

_encode_lines = msgspec.json.Encoder().encode_lines


def line_maker(
    wire: Wire, *, extended: bool, host: HostValues | None = None
) -> Callable[[Iterable[Sequence[Any]]], bytes]:
    """Return the function from rows to their lines, each with its line feed.

    Args:
        wire: The form that the driver gives.
        extended: Whether rows and lines hold our own columns; without them a row has eleven values.
        host: What makes an object of the values behind them, which are a host's; None where there are none.
    """
    id_out, time_out = wire.id_out, wire.time_out

    def kv(rows: Iterable[Sequence[Any]]) -> bytes:
        return _encode_lines(
            [
                _KvLine(
                    time_out(created),
                    error,
                    0 if finished is None else time_out(finished),
                    id_out(job_id),
                    kind,
                    metrics,
                    progress,
                    spec,
                    0 if started is None else time_out(started),
                    status,
                    target,
                )
                for created, error, finished, job_id, kind, metrics, progress, spec, started, status, target in rows
            ]
        )

    if not extended:
        return kv
    own_line = _own_line_maker(wire)

    def own(rows: Iterable[Sequence[Any]]) -> bytes:
        return _encode_lines([own_line(row) for row in rows])

    if host is None:
        return own

    def with_host(rows: Iterable[Sequence[Any]]) -> bytes:
        lines = []
        for row in rows:
            line = own_line(row[: len(NAMES)])
            line.columns = host.to_line(row[len(NAMES) :])
            lines.append(line)
        return _encode_lines(lines)

    return with_host


def _own_line_maker(wire: Wire) -> Callable[[Sequence[Any]], Any]:
    """Return what makes an extended line's object of a row."""
    id_out, time_out = wire.id_out, wire.time_out
    # SQLite's flags are 0 and 1.
    converters: dict[str, Callable[[Any], Any]] = {"id": id_out, "time": time_out, "flag": bool}
    converted = [(at, converters[field.form]) for at, field in enumerate(EXTENDED_FIELDS) if field.form in converters]

    def own_line(row: Sequence[Any]) -> Any:
        created, error, finished, job_id, kind, metrics, progress, spec, started, status, target, *own = row
        finished_ms = 0 if finished is None else time_out(finished)
        started_ms = 0 if started is None else time_out(started)
        for at, convert in converted:
            if own[at] is not None:
                own[at] = convert(own[at])
        values = (
            time_out(created),
            error,
            finished_ms,
            id_out(job_id),
            kind,
            metrics,
            progress,
            spec,
            started_ms,
            status,
            target,
            *own,
        )
        line = _OwnLine(*_in_order_of_keys(values))
        if (started is not None and not started_ms) or (finished is not None and not finished_ms):
            times = (("started_at", started, started_ms), ("finished_at", finished, finished_ms))
            line.at_epoch = [key for key, moment, millis in times if moment is not None and not millis]
        return line

    return own_line


def records(lines: bytes) -> Iterator[str]:
    """Yield the records of ``line_maker``'s lines one by one."""
    return iter(lines.decode().split("\n")[:-1])
