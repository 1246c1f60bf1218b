"""A line of NDJSON to a row for the database's bulk route, and back: no ORM object, no ``UUID``, no ``datetime``.

A row holds the columns of ``NAMES`` in wire form (see :class:`mljobs.db._wire.Wire`). The first eleven stand in the order of
the KV keys, the other six are our own, under keys that RedDB ignores.

The typed pass takes the lines that ``export_jobs`` and RedDB write. Whatever it refuses goes to ``codec.decode``, which
settles the rest of the format and finds the words for an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal
from uuid import UUID

import msgspec

from mljobs._values import MAX_MS, storable_json, storable_text, to_job_id
from mljobs.db._wire import Wire
from mljobs.errors import InvalidValueError, JobDecodeError, shown
from mljobs.jobs import Model, table_of
from mljobs.record import _kv as codec
from mljobs.states import MlJobStatus

if TYPE_CHECKING:
    from sqlalchemy import Column

Row = tuple[Any, ...]

KEYS: Final = (
    "created_at", "error", "finished_at", "id", "kind", "metrics", "progress", "spec", "started_at", "status", "target",
)  # fmt: skip
"""The KV keys, as RedDB writes them."""
OWN: Final = ("attempts", "exclusive", "priority", "retry_of", "run_after", "worker")
"""Our own columns, and the keys that hold them in an extended line."""
NAMES: Final = (
    "created_at", "error_message", "finished_at", "id", "kind", "metrics_json", "progress", "spec_json", "started_at",
    "status", "target_name", *OWN,
)  # fmt: skip
"""The columns of a row."""
ID: Final = KEYS.index("id")
PROGRESS: Final = KEYS.index("progress")
STARTED: Final = KEYS.index("started_at")
STATUS: Final = KEYS.index("status")
SHARED: Final = len(KEYS)
TIMES: Final = tuple(at for at, name in enumerate(NAMES) if name.endswith("_at") or name == "run_after")
IDS: Final = (ID, NAMES.index("retry_of"))

_EPOCH_KEY: Final = "at_epoch"
"""An extended line's list of times that are 1970-01-01 itself, where the KV format writes 0 for "not yet" as well."""
_ID_DIGITS: Final = 32
_ID_BYTES: Final = 16
_SMALLINT_MAX: Final = 32_767

_Millis = Annotated[int, msgspec.Meta(ge=0, le=MAX_MS)]
_IdText = Annotated[str, msgspec.Meta(min_length=_ID_DIGITS, max_length=_ID_DIGITS)]
_OWN_TYPES: Final[dict[str, tuple[Any, Any]]] = {
    "attempts": (Annotated[int, msgspec.Meta(ge=0, le=_SMALLINT_MAX)], 0),
    "exclusive": (bool, False),
    "priority": (Annotated[int, msgspec.Meta(ge=-_SMALLINT_MAX - 1, le=_SMALLINT_MAX)], 0),
    "retry_of": (_IdText | None, None),
    "run_after": (_Millis | None, None),
    "worker": (str | None, None),
    _EPOCH_KEY: (list[Literal["started_at", "finished_at"]] | None, None),
}

_REFUSALS = (ValueError, KeyError, RecursionError, msgspec.MsgspecError)
_check_json = msgspec.json.Decoder(msgspec.Raw).decode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class RejectedLineError(Exception):
    """A line that is no record, or one that no database can hold. Private: it ends in the rejects, not at the caller.

    Attributes:
        field: The key at fault, None where the whole line is.
        reason: What is wrong.
    """

    def __init__(self, field: str | None, reason: str) -> None:
        self.field = field
        self.reason = reason
        super().__init__(field, reason)


def columns_of(model: Model) -> list[Column[Any]]:
    """Return the columns of a row, in its order."""
    table = table_of(model)
    return [table.c[name] for name in NAMES]


# ------------------------------------------------------------------------------------------------------- line to row


@cache
def _line_decoders(kinds: type[StrEnum]) -> tuple[Callable[[bytes], Any], Callable[[bytes], Any]]:
    """Return the typed passes for these kinds: of lines with RedDB's keys alone, and of lines that may have ours too.

    The fields stand in the order in which the keys do, which msgspec then finds without a search.
    """
    fields: list[Any] = [
        ("created_at", _Millis),
        ("error", str | None, None),
        ("finished_at", _Millis),
        ("id", _IdText),
        ("kind", Literal[tuple(kind.value for kind in kinds)]),
        ("metrics", str | None, None),
        ("progress", Annotated[int, msgspec.Meta(ge=0, le=100)]),
        ("spec", str),
        ("started_at", _Millis),
        ("status", Literal[tuple(status.value for status in MlJobStatus)]),
        ("target", str),
    ]
    own = sorted([*fields, *((name, *of) for name, of in _OWN_TYPES.items())], key=lambda field: field[0])
    kv_line = msgspec.defstruct("_KvLine", fields, kw_only=True, gc=False, forbid_unknown_fields=True)
    own_line = msgspec.defstruct("_OwnLine", own, kw_only=True, gc=False)
    return msgspec.json.Decoder(kv_line).decode, msgspec.json.Decoder(own_line).decode


def _uuid_of(value: bytes) -> UUID:
    return UUID(bytes=value)


_IDS_IN: Final[dict[str, Callable[[bytes], Any] | None]] = {"psycopg": None, "asyncpg": _uuid_of, "sqlite": bytes.hex}
"""From the bytes of an id to the driver's value; None where that is the bytes."""


def row_maker(wire: Wire, kinds: type[StrEnum]) -> Callable[[bytes], Row]:
    """Return the function from one line to its row.

    It is as it is for speed: a call costs as much as three attributes, and there are half a million lines a second.

    Args:
        wire: The form that the driver takes.
        kinds: The enum of kinds whose tokens are accepted.

    Returns:
        It raises ``RejectedLineError`` for a line that is no record.
    """
    decode, decode_own = _line_decoders(kinds)
    origin, unit, id_in, fromhex, check_json = wire.origin, wire.unit, _IDS_IN[wire.name], bytes.fromhex, _check_json

    def make(line: bytes) -> Row:
        try:
            if not line.isascii():
                line.decode()  # msgspec overlooks invalid UTF-8 in what it skips
            found = decode(line)
            target, error, spec, metrics = found.target, found.error, found.spec, found.metrics
            started, finished = found.started_at, found.finished_at
            check_json(spec)
            if metrics is not None:
                check_json(metrics)
            job_id = fromhex(found.id)
            if "\x00" in target or (error is not None and "\x00" in error) or len(job_id) != _ID_BYTES:
                return _make_exactly(line, wire, kinds)  # fromhex skips spaces
            return (
                origin + found.created_at * unit,
                error,
                origin + finished * unit if finished else None,
                job_id if id_in is None else id_in(job_id),
                found.kind,
                metrics,
                found.progress,
                spec,
                origin + started * unit if started else None,
                found.status,
                target,
                0,
                False,
                0,
                None,
                None,
                None,
            )
        except _REFUSALS:
            return make_own(line)

    def make_own(line: bytes) -> Row:
        try:
            found = decode_own(line)
            if found.at_epoch is not None:
                return _make_exactly(line, wire, kinds)
            target, error, spec, metrics = found.target, found.error, found.spec, found.metrics
            started, finished, retry_of, run_after, worker = (
                found.started_at,
                found.finished_at,
                found.retry_of,
                found.run_after,
                found.worker,
            )
            line.decode()
            check_json(spec)
            check_json(metrics or "0")
            ids = [fromhex(text) for text in (found.id, retry_of) if text is not None]
            bad_text = "\x00" in target or "\x00" in (error or "") or "\x00" in (worker or "")
            if bad_text or metrics == "" or any(len(each) != _ID_BYTES for each in ids):
                return _make_exactly(line, wire, kinds)
            job_ids = ids if id_in is None else [id_in(each) for each in ids]
            return (
                origin + found.created_at * unit,
                error,
                origin + finished * unit if finished else None,
                job_ids[0],
                found.kind,
                metrics,
                found.progress,
                spec,
                origin + started * unit if started else None,
                found.status,
                target,
                found.attempts,
                found.exclusive,
                found.priority,
                None if retry_of is None else job_ids[1],
                None if run_after is None else origin + run_after * unit,
                worker,
            )
        except _REFUSALS:
            return _make_exactly(line, wire, kinds)

    return make  # a line of our own is refused at its first key, and goes on to make_own


def _make_exactly(line: bytes, wire: Wire, kinds: type[StrEnum]) -> Row:
    """Do what ``make`` does by the codec, rule by rule."""
    try:
        record = codec.decode(line, kinds)
        own = _own_values(line)
        at_epoch = own.pop(_EPOCH_KEY) or ()
        times = {
            key: wire.time_in(millis) if millis or key in at_epoch else None
            for key, millis in (("started_at", record.started_at), ("finished_at", record.finished_at))
        }
        return (
            wire.time_in(record.created_at),
            None if record.error is None else storable_text("error", record.error),
            times["finished_at"],
            wire.id_in(record.id.hex),
            record.kind.value,
            None if record.metrics is None else storable_json("metrics", record.metrics),
            record.progress,
            storable_json("spec", record.spec),
            times["started_at"],
            record.status.value,
            storable_text("target", record.target),
            own["attempts"],
            own["exclusive"],
            own["priority"],
            None if own["retry_of"] is None else wire.id_in(to_job_id(own["retry_of"], "retry_of").hex),
            None if own["run_after"] is None else wire.time_in(own["run_after"]),
            None if own["worker"] is None else storable_text("worker", own["worker"]),
        )
    except (JobDecodeError, InvalidValueError) as error:
        raise RejectedLineError(error.field, error.reason) from error


def _own_values(line: bytes) -> dict[str, Any]:
    values: dict[str, Any] = {name: default for name, (_, default) in _OWN_TYPES.items()}
    for name, raw in _decode_object(line.decode()).items():
        if name in values:
            try:
                values[name] = msgspec.json.decode(raw, type=_OWN_TYPES[name][0])
            except (ValueError, msgspec.MsgspecError) as error:
                raise JobDecodeError(name, f"{error}, got {shown(bytes(raw).decode())}") from error
    return values


def own_keys(line: bytes) -> frozenset[str]:
    """Return which of our own keys a line, known to be a record, holds."""
    return frozenset(_decode_object(line.decode()).keys() & OWN)


# ------------------------------------------------------------------------------------------------------- row to line


class _KvLine(msgspec.Struct, gc=False):
    """The keys and their order as RedDB writes them."""

    created_at: int
    error: str | None
    finished_at: int
    id: str
    kind: str
    metrics: str | None
    progress: int
    spec: str
    started_at: int
    status: str
    target: str


class _OwnLine(msgspec.Struct, gc=False, omit_defaults=True):
    """The same with our own keys among them, in alphabetical order; no default but of the last may be one they have."""

    attempts: int
    created_at: int
    error: str | None
    exclusive: bool
    finished_at: int
    id: str
    kind: str
    metrics: str | None
    priority: int
    progress: int
    retry_of: str | None
    run_after: int | None
    spec: str
    started_at: int
    status: str
    target: str
    worker: str | None
    at_epoch: list[str] | None = None


_encode_lines = msgspec.json.Encoder().encode_lines


def line_maker(wire: Wire, *, extended: bool) -> Callable[[Iterable[Sequence[Any]]], bytes]:
    """Return the function from rows to their lines, each with its line feed.

    Args:
        wire: The form that the driver gives.
        extended: Whether rows and lines hold our own columns; without them a row has eleven values.
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

    def own(rows: Iterable[Sequence[Any]]) -> bytes:
        return _encode_lines([_own_line(row, id_out, time_out) for row in rows])

    return own if extended else kv


def _own_line(row: Sequence[Any], id_out: Callable[[Any], str], time_out: Callable[[Any], int]) -> _OwnLine:
    created, error, finished, job_id, kind, metrics, progress, spec, started, status, target, *rest = row
    attempts, exclusive, priority, retry_of, run_after, worker = rest
    line = _OwnLine(
        attempts,
        time_out(created),
        error,
        bool(exclusive),  # SQLite's are 0 and 1
        0 if finished is None else time_out(finished),
        id_out(job_id),
        kind,
        metrics,
        priority,
        progress,
        None if retry_of is None else id_out(retry_of),
        None if run_after is None else time_out(run_after),
        spec,
        0 if started is None else time_out(started),
        status,
        target,
        worker,
    )
    if (started is not None and not line.started_at) or (finished is not None and not line.finished_at):
        set_ones = (("started_at", started, line.started_at), ("finished_at", finished, line.finished_at))
        line.at_epoch = [key for key, value, millis in set_ones if value is not None and not millis]
    return line


def records(lines: bytes) -> Iterator[str]:
    """Yield the records of ``line_maker``'s lines one by one."""
    return iter(lines.decode().split("\n")[:-1])
