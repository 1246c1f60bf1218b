"""Make a row for COPY of a line of NDJSON, without an ORM object, a ``UUID`` or a ``datetime``.

A row holds the columns of ``NAMES`` in wire form (see :class:`mljobs.db._wire.Wire`). The first eleven stand in the order of
the KV keys, the other six are our own, under keys that RedDB ignores.

The typed pass takes the lines that ``export_jobs`` and RedDB write. Whatever it refuses goes to ``codec.decode``, which
settles the rest of the format and finds the words for an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from enum import StrEnum
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal
from uuid import UUID

import msgspec
from sqlalchemy import ARRAY, Uuid, any_, cast, func, select

from mljobs._fields import BY_NAME, EXTENDED_FIELDS, KV_FIELDS, Field
from mljobs._values import ID_DIGITS, MAX_MS, MAX_PROGRESS, storable_json, storable_text, to_job_id
from mljobs.db._wire import Wire, read_wire, wire_of
from mljobs.errors import InvalidValueError, JobDecodeError, shown
from mljobs.jobs import Model, table_of
from mljobs.record import _kv as codec
from mljobs.states import MlJobStatus

if TYPE_CHECKING:
    from sqlalchemy import Column, ColumnElement, Connection


Row = tuple[Any, ...]

KEYS: Final = tuple(str(field.kv_key) for field in KV_FIELDS)
"""The KV keys, as RedDB writes them."""
OWN: Final = tuple(field.name for field in EXTENDED_FIELDS)
"""Our own columns, and the keys that hold them in an extended line."""
NAMES: Final = (*(field.name for field in KV_FIELDS), *OWN)
"""The columns of a row."""
CREATED: Final = KEYS.index("created_at")
FINISHED: Final = KEYS.index("finished_at")
ID: Final = KEYS.index("id")
PROGRESS: Final = KEYS.index("progress")
STARTED: Final = KEYS.index("started_at")
STATUS: Final = KEYS.index("status")
SHARED: Final = len(KEYS)
TIMES: Final = tuple(at for at, name in enumerate(NAMES) if BY_NAME[name].form == "time")
IDS: Final = tuple(at for at, name in enumerate(NAMES) if BY_NAME[name].form == "id")

EPOCH_KEY: Final = "at_epoch"
"""An extended line's list of times that are 1970-01-01 itself, where the KV format writes 0 for "not yet" as well."""
HOST_KEY: Final = "columns"
"""An extended line's object of a host's own columns; the last key."""
_ID_BYTES: Final = 16
_NUL: Final = r"\u0000"
"""How JSON text writes U+0000, which no key of PostgreSQL's json can be read beside."""

_Millis = Annotated[int, msgspec.Meta(ge=0, le=MAX_MS)]
_IdText = Annotated[str, msgspec.Meta(min_length=ID_DIGITS, max_length=ID_DIGITS)]
_TYPES: Final[dict[str, Any]] = {"id": _IdText, "text": str, "time": _Millis, "flag": bool}


def _type_of(field: Field) -> Any:
    """Return what a typed pass takes under the key of one of our own fields."""
    if field.limits is not None:
        return Annotated[int, msgspec.Meta(ge=field.limits[0], le=field.limits[1])]
    return _TYPES[field.form] | None if field.nullable else _TYPES[field.form]


_OWN_TYPES: Final[dict[str, tuple[Any, Any]]] = {
    **{field.name: (_type_of(field), field.default) for field in EXTENDED_FIELDS},
    EPOCH_KEY: (list[Literal["started_at", "finished_at"]] | None, None),
}
_OWN_DEFAULTS: Final = tuple(field.default for field in EXTENDED_FIELDS)
_own_of = attrgetter(*OWN)

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


def rows_by_id(connection: Connection, columns: Sequence[Column[Any]], ids: Iterable[Any]) -> dict[Any, Row]:
    """Return the rows of these ids that are there, by id.

    Args:
        connection: The caller's.
        columns: All of ``columns_of``, or the first of them.
        ids: In the driver's form.
    """
    column = columns[ID]
    joined = ",".join(map(wire_of(connection).id_out, ids))
    condition: ColumnElement[bool]
    if connection.dialect.name == "postgresql":
        # One text whatever the number; the server folds it to a constant.
        condition = column == any_(cast(func.string_to_array(joined, ","), ARRAY(Uuid())))
    else:
        listed = func.json_each('["' + joined.replace(",", '","') + '"]').table_valued("value")
        condition = column.in_(select(listed.c.value))
    with closing(read_wire(connection, columns, [condition])) as parts:
        return {row[ID]: row for part in parts for row in part}


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
        ("progress", Annotated[int, msgspec.Meta(ge=0, le=MAX_PROGRESS)]),
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


def row_maker(
    wire: Wire, kinds: type[StrEnum], on_own_keys: Callable[[], object] | None = None
) -> Callable[[bytes], Row]:
    """Return the function from one line to its row; it raises ``RejectedLineError`` for a line that is no record.

    A line with keys of our own is refused at the first of them by the pass for RedDB's keys, and goes on to the second.

    Args:
        wire: The form that the driver takes.
        kinds: The enum of kinds whose tokens are accepted.
        on_own_keys: Is called for each line that may have keys beside RedDB's.
    """
    decode, decode_own = _line_decoders(kinds)
    make_own = _own_row_maker(wire, kinds, decode_own)
    if on_own_keys is None:
        return _kv_row_maker(wire, kinds, decode, make_own)

    def make_noted(line: bytes) -> Row:
        on_own_keys()
        return make_own(line)

    return _kv_row_maker(wire, kinds, decode, make_noted)


def _kv_row_maker(
    wire: Wire, kinds: type[StrEnum], decode: Callable[[bytes], Any], make_own: Callable[[bytes], Row]
) -> Callable[[bytes], Row]:
    """Return the maker for lines with RedDB's keys alone.

    It is as it is for speed: a call costs as much as three attributes, and there are half a million lines a second.
    """
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
            if _NUL in spec or (metrics is not None and _NUL in metrics):
                return _make_exactly(line, wire, kinds)  # which tells an escaped backslash from it
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
                *_OWN_DEFAULTS,
            )
        except _REFUSALS:
            return make_own(line)

    return make


def _own_row_maker(wire: Wire, kinds: type[StrEnum], decode_own: Callable[[bytes], Any]) -> Callable[[bytes], Row]:
    """Return the maker for lines that may have keys of our own."""
    origin, unit, id_in, fromhex, check_json = wire.origin, wire.unit, _IDS_IN[wire.name], bytes.fromhex, _check_json

    def make_id(text: str) -> Any:
        job_id = fromhex(text)
        if len(job_id) != _ID_BYTES:
            raise ValueError(text)  # it holds spaces
        return job_id if id_in is None else id_in(job_id)

    def make_text(text: str) -> str:
        if "\x00" in text:
            raise ValueError(text)
        return text

    converters: dict[str, Callable[[Any], Any]] = {
        "id": make_id,
        "text": make_text,
        "time": lambda millis: origin + millis * unit,
    }
    own_converters = [converters.get(field.form) for field in EXTENDED_FIELDS]

    def make_own(line: bytes) -> Row:
        try:
            found = decode_own(line)
            if found.at_epoch is not None:
                return _make_exactly(line, wire, kinds)
            error, metrics, started, finished = found.error, found.metrics, found.started_at, found.finished_at
            line.decode()
            check_json(found.spec)
            if metrics is not None:
                check_json(metrics)
            if _NUL in found.spec or (metrics is not None and _NUL in metrics):
                return _make_exactly(line, wire, kinds)
            return (
                origin + found.created_at * unit,
                None if error is None else make_text(error),
                origin + finished * unit if finished else None,
                make_id(found.id),
                found.kind,
                metrics,
                found.progress,
                found.spec,
                origin + started * unit if started else None,
                found.status,
                make_text(found.target),
                *[
                    value if convert is None or value is None else convert(value)
                    for convert, value in zip(own_converters, _own_of(found), strict=True)
                ],
            )
        except _REFUSALS:
            return _make_exactly(line, wire, kinds)

    return make_own


def _make_exactly(line: bytes, wire: Wire, kinds: type[StrEnum]) -> Row:
    """Do what ``make`` does by the codec, rule by rule."""
    try:
        record = codec.decode(line, kinds)
        own = _own_values(line)
        at_epoch = own.pop(EPOCH_KEY) or ()
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
            *[
                None
                if own[field.name] is None
                else _EXACT.get(field.form, _unchanged)(field.name, own[field.name], wire)
                for field in EXTENDED_FIELDS
            ],
        )
    except (JobDecodeError, InvalidValueError) as error:
        raise RejectedLineError(error.field, error.reason) from error


def _unchanged(_name: str, value: Any, _wire: Wire) -> Any:
    return value


_EXACT: Final[dict[str, Callable[[str, Any, Wire], Any]]] = {
    "id": lambda name, value, wire: wire.id_in(to_job_id(value, name).hex),
    "text": lambda name, value, _wire: storable_text(name, value),
    "time": lambda _name, value, wire: wire.time_in(value),
}


def _own_values(line: bytes) -> dict[str, Any]:
    values: dict[str, Any] = {name: default for name, (_, default) in _OWN_TYPES.items()}
    for name, raw in _decode_object(line.decode()).items():
        if name in values:
            try:
                values[name] = msgspec.json.decode(raw, type=_OWN_TYPES[name][0])
            except (ValueError, msgspec.MsgspecError) as error:
                raise JobDecodeError(name, f"{error}, got {shown(bytes(raw).decode())}") from error
    return values


def host_part(line: bytes) -> dict[str, Any]:
    """Return what a line, known to be a record, says of a host's own columns."""
    if _HOST_MARK not in line:
        return {}
    return msgspec.json.decode(line, type=_HostLine).columns or {}


_HOST_MARK: Final = f',"{HOST_KEY}":'.encode()
_HostLine: Any = msgspec.defstruct("_HostLine", [(HOST_KEY, dict[str, Any] | None, None)], gc=False)


def without_host_part(line: bytes) -> bytes:
    """Return a line as an export has written it, without a host's own columns: no text holds these quotes unescaped."""
    kept, found, _ = line.partition(_HOST_MARK)
    return kept + b"}" if found else line


def own_keys(line: bytes) -> frozenset[str]:
    """Return which of our own keys a line, known to be a record, holds."""
    return frozenset(_decode_object(line.decode()).keys() & OWN)
