"""The values of a host's own columns in an extended line: typed by their columns, the same from either database.

=====================  ======================================================================================
column                 in a line
=====================  ======================================================================================
Integer, Boolean       number, true or false
Float                  number; ``"nan"``, ``"inf"``, ``"-inf"``
Numeric                its digits as text
String, Enum           text; of an enum class the name of the member
DateTime, Date, Time   ISO 8601; with a zone in UTC
Interval               microseconds
Uuid                   text
LargeBinary            Base64
JSON                   JSON as text, so that JSON's null is not NULL
ARRAY                  list
another, decorated     what its decorator binds, by the decorator of the one that reads it
=====================  ======================================================================================
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from math import isfinite
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.types import TypeDecorator, TypeEngine

from mljobs.errors import InvalidValueError, shown
from mljobs.jobs import Model
from mljobs.record._host_columns import host_columns, made_by_the_database
from mljobs.types import UtcMillis

_NEUTRAL: Final = DefaultDialect()
"""The dialect that a decorator binds for, so that a line is the same from either database."""
_MICROSECOND: Final = timedelta(microseconds=1)


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Codec:
    """How the values of a column stand in a line.

    Attributes:
        form: What they are.
        to_line: From a value, never None, to JSON.
        from_line: And back.
        item: Of the items of a list.
        bind: From a decorated value to what its decorator binds, which ``decorated`` is of.
        decorated: Of what is bound.
    """

    form: str
    to_line: Callable[[Any], Any]
    from_line: Callable[[Any], Any]
    item: Codec | None = None
    bind: Callable[[Any], Any] = _same
    decorated: Codec | None = None


def codec_of(kind: TypeEngine[Any]) -> Codec:
    """Return how values of a column type stand in a line."""
    for known, make in _CODECS:
        if isinstance(kind, known):
            return make(kind)
    return Codec("text", lambda value: value if isinstance(value, _JSON) else str(value), _same)


_JSON: Final = (str, int, float, bool, list, dict)


def _float_out(value: float) -> Any:
    return value if isfinite(value) else str(value)


_FLOAT: Final = Codec("number", _float_out, float)
_DECIMAL: Final = Codec("decimal", str, Decimal)


def _datetime(*, zoned: bool) -> Codec:
    def to_line(moment: datetime) -> str:
        if not zoned:
            return moment.isoformat()
        # SQLite keeps no zone: what it gives is the UTC that was put in below.
        return (moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)).isoformat()

    def from_line(text: str) -> datetime:
        moment = datetime.fromisoformat(text)
        if not zoned:
            return moment
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)

    return Codec("zoned datetime" if zoned else "datetime", to_line, from_line)


def _enum(kind: sa.Enum) -> Codec:
    if kind.enum_class is None:
        return Codec("token", _same, _same)
    members = kind.enum_class.__members__
    return Codec("token", lambda member: member.name, lambda name: _member(members, name))


def _member(members: Mapping[str, Any], name: str) -> Any:
    if name not in members:
        raise ValueError(f"expected one of {', '.join(members)}")
    return members[name]


def _list_of(item: Codec) -> Codec:
    def walk(value: Any, convert: Callable[[Any], Any]) -> Any:
        if isinstance(value, list | tuple):
            return [walk(one, convert) for one in value]
        return None if value is None else convert(value)

    return Codec("list", lambda value: walk(value, item.to_line), lambda value: walk(value, item.from_line), item)


def _decorated(kind: TypeDecorator[Any]) -> Codec:
    inner = codec_of(kind.load_dialect_impl(_NEUTRAL))
    binds = type(kind).process_bind_param is not TypeDecorator.process_bind_param
    reads = type(kind).process_result_value is not TypeDecorator.process_result_value

    def bind(value: Any) -> Any:
        return kind.process_bind_param(value, _NEUTRAL) if binds else value

    def to_line(value: Any) -> Any:
        bound = bind(value)
        return None if bound is None else inner.to_line(bound)

    def from_line(value: Any) -> Any:
        found = inner.from_line(value)
        return kind.process_result_value(found, _NEUTRAL) if reads else found

    return Codec(inner.form, to_line, from_line, inner.item, bind, inner)


_CODECS: Final[tuple[tuple[tuple[type[TypeEngine[Any]], ...], Callable[[Any], Codec]], ...]] = (
    (
        (sa.Interval, INTERVAL),
        lambda _: Codec("interval", lambda span: span // _MICROSECOND, lambda micros: micros * _MICROSECOND),
    ),
    ((UtcMillis,), lambda _: _datetime(zoned=True)),
    ((TypeDecorator,), _decorated),
    (
        (sa.JSON,),
        lambda _: Codec("json", json.dumps, lambda text: sa.JSON.NULL if text == "null" else json.loads(text)),
    ),
    ((sa.ARRAY,), lambda kind: _list_of(codec_of(kind.item_type))),
    ((sa.Enum,), _enum),
    ((sa.Numeric, sa.Float), lambda kind: _DECIMAL if kind.asdecimal else _FLOAT),
    ((sa.DateTime,), lambda kind: _datetime(zoned=kind.timezone)),
    ((sa.Date,), lambda _: Codec("date", date.isoformat, date.fromisoformat)),
    ((sa.Time,), lambda _: Codec("time", time.isoformat, time.fromisoformat)),
    ((sa.Uuid,), lambda kind: Codec("uuid", str, UUID if kind.as_uuid else str)),
    ((sa.LargeBinary,), lambda _: Codec("bytes", lambda value: b64encode(bytes(value)).decode(), b64decode)),
    ((sa.Boolean,), lambda _: Codec("flag", _same, _same)),
    ((sa.Integer,), lambda _: Codec("integer", _same, _same)),
    ((sa.String,), lambda _: Codec("text", _same, _same)),
)
"""By type, the first that fits."""


# --------------------------------------------------------------------------------------------------- all of a class


class HostValues:
    """The own columns of a host's class, as an extended line holds them under ``columns``.

    Args:
        model: The mapped job class.
    """

    def __init__(self, model: Model) -> None:
        found = {name: column for name, column in host_columns(model).items() if not made_by_the_database(column)}
        self.names = tuple(found)
        self._columns = found
        self._codecs = {name: codec_of(column.type) for name, column in found.items()}

    def __bool__(self) -> bool:
        return bool(self.names)

    def expressions(self, dialect: sa.Dialect) -> list[sa.ColumnElement[Any]]:
        """Return what to read."""
        return [readable(column, dialect) for column in self._columns.values()]

    def to_line(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the object of a line.

        Args:
            values: What ``expressions`` gave.

        Raises:
            InvalidValueError: A value is none of its column's type.
        """
        line = {}
        for name, value in zip(self.names, values, strict=True):
            codec = self._codecs[name]
            try:
                # JSON is read as its text.
                line[name] = value if value is None or codec.form == "json" else codec.to_line(value)
            except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
                raise InvalidValueError(
                    name, value, f"its column's type cannot be written to a line: {error}"
                ) from error
        return line

    def from_line(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values by name that the object of a line holds; names that the class does not have say nothing.

        Raises:
            InvalidValueError: A value is none of its column's type.
        """
        values = {}
        for name, value in line.items():
            codec = self._codecs.get(name)
            if codec is None:
                continue
            try:
                values[name] = sa.null() if value is None else codec.from_line(value)
            except Exception as error:  # a decorator is the host's
                raise InvalidValueError(f"columns.{name}", value, f"{error}, got {shown(str(value))}") from error
        return values

    def checked(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return values for own columns, as the caller gave them.

        Raises:
            InvalidValueError: The class has no such column of its own.
        """
        for name in defaults:
            if name not in self._codecs:
                known = ", ".join(self.names) or "none"
                raise InvalidValueError("defaults", name, f"expected columns of your own; there are {known}")
        return dict(defaults)


def readable(column: sa.Column[Any], dialect: sa.Dialect) -> sa.ColumnElement[Any]:
    """Return the column as it is to be read: JSON as its text, which tells null from NULL."""
    plain = isinstance(column.type, sa.JSON) and isinstance(column.type.dialect_impl(dialect), sa.JSON)
    return sa.cast(column, sa.Text) if plain else column
