"""Column types: what a field holds in Python, and how each database keeps it.

Each type refuses what its column cannot hold when the value is bound, so Core inserts and comparisons are checked
too, and names the field in the error. The conversions are public functions, shared by the model and the codec's callers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import EnumType, StrEnum
from operator import add, eq, ne, sub
from typing import Any, Literal, Self, TypeVar
from typing import cast as cast_type
from uuid import UUID

import msgspec
from sqlalchemy import (
    CHAR,
    BigInteger,
    CheckConstraint,
    DateTime,
    Double,
    Interval,
    Table,
    Text,
    Uuid,
    bindparam,
    cast,
    literal,
    literal_column,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ColumnElement, TextClause
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.operators import in_op, not_in_op
from sqlalchemy.types import String, TypeDecorator, TypeEngine, UserDefinedType

from mljobs.errors import InvalidValueError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MAX_MS = 253_402_300_799_999
"""9999-12-31T23:59:59.999Z, the last millisecond that a ``datetime`` can hold, in epoch milliseconds."""

_E = TypeVar("_E", bound=StrEnum)
_MILLISECOND = timedelta(milliseconds=1)
_ID_DIGITS = 32
_DASHED_LENGTH = 36


# ------------------------------------------------------------------------------------------------- conversions


def to_millis(moment: datetime) -> int:
    """Return epoch milliseconds, floored. Integer arithmetic: ``timestamp() * 1000`` is wrong for many values."""
    return (moment - EPOCH) // _MILLISECOND


def from_millis(millis: int) -> datetime:
    """Return the UTC time at ``millis`` milliseconds after the epoch, exactly."""
    return EPOCH + timedelta(0, millis // 1000, millis % 1000 * 1000)  # by position: two thirds of the time


def utc_now() -> datetime:
    """Return the present time in UTC, floored to the millisecond, as every time in a record is."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def to_utc(field: str, value: object) -> datetime:
    """Return ``value`` in UTC, floored to the millisecond.

    Raises:
        InvalidValueError: Not a ``datetime``, or one without a time zone.
    """
    if not isinstance(value, datetime):
        raise InvalidValueError(field, value, "expected a datetime with a time zone")
    if value.utcoffset() is None:
        raise InvalidValueError(field, value, "it has no time zone; use datetime.now(timezone.utc)")
    try:
        moment = value if value.tzinfo is UTC else value.astimezone(UTC)
    except OverflowError as error:
        raise InvalidValueError(field, value, "in UTC it lies outside the years 1 to 9999") from error
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def to_job_id(value: object, field: str = "id") -> UUID:
    """Return the id that ``value`` stands for.

    Args:
        value: A ``UUID``, an int (0 <= n < 2**128), 32 hex digits, or the same with the dashes that psql prints.
        field: The name to report in an error.

    Raises:
        InvalidValueError: Anything else.
    """
    if type(value) is UUID:
        return value
    if isinstance(value, UUID):  # a subclass (asyncpg's): keep one type in the identity map
        return UUID(int=value.int)
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < 1 << 128:
            return UUID(int=value)
        raise InvalidValueError(field, value, "an id has 128 bits: 0 <= id < 2**128")
    if isinstance(value, str):
        digits = value
        if len(value) == _DASHED_LENGTH and all(value[at] == "-" for at in (8, 13, 18, 23)):
            digits = value.replace("-", "")
        if len(digits) == _ID_DIGITS and digits.isascii() and digits.isalnum():
            try:
                return UUID(bytes=bytes.fromhex(digits))  # int(..., 16) would take 0x too
            except ValueError:
                pass
    raise InvalidValueError(field, value, "expected a UUID, an int or 32 hex digits")


def to_member(enum: type[_E], field: str, value: object) -> _E:
    """Return the member of ``enum`` that ``value``, a member or a token, stands for.

    Raises:
        InvalidValueError: No such token.
    """
    if type(value) is enum:
        return value
    if isinstance(value, str):
        try:
            return enum(value)
        except ValueError:
            pass
    raise InvalidValueError(field, value, f"expected one of {', '.join(member.value for member in enum)}")


def to_json_text(field: str, value: object) -> str:
    """Return ``value`` as compact JSON text. NumPy scalars and arrays are written as the numbers they hold.

    Raises:
        InvalidValueError: JSON has no way to write it (NaN and infinities included).
    """
    try:
        text = _encode(value)
        if not text.isascii():
            text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValueError(field, value, f"JSON cannot hold it: {error}") from error
    return text


def from_json_text(field: str, text: str | None) -> Any:
    """Return what the JSON ``text`` holds, ``None`` for ``None``.

    Raises:
        InvalidValueError: It is not JSON. The text is opaque to mljobs, so an instance may hold anything until a flush.
    """
    if text is None:
        return None
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidValueError(field, text, f"not JSON text: {error}") from error


def _as_plain(value: object) -> object:
    tolist = getattr(value, "tolist", None)
    if callable(tolist):
        return tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_as_plain).encode


def _refuse_constant(token: str) -> object:
    raise ValueError(f"{token} is not JSON")


# ------------------------------------------------------------------------------------------------------- types


class JobId(TypeDecorator[UUID]):
    """A 128-bit id: ``uuid`` on PostgreSQL, ``CHAR(32)`` of lower-case hex digits elsewhere."""

    # For tools that ask a TypeDecorator what it decorates (admin forms): an id can be typed as text. No database sees it.
    impl = CHAR
    cache_ok = True

    def __init__(self) -> None:
        super().__init__(_DASHED_LENGTH)

    @property
    def python_type(self) -> type[UUID]:
        return UUID

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(Uuid())

    def process_bind_param(self, value: object, dialect: Dialect) -> UUID | None:  # noqa: ARG002 - SQLAlchemy's signature
        return None if value is None else to_job_id(value)

    def coerce_compared_value(self, op: object, value: object) -> TypeEngine[Any]:  # noqa: ARG002
        return self

    def __repr__(self) -> str:
        return "JobId()"


class TokenType(TypeDecorator[StrEnum]):
    """The token of a string enum, as ``VARCHAR``; a native enum would not survive its own migrations."""

    impl = String
    cache_ok = True

    def __init__(self, enum: type[StrEnum], length: int = 32, field: str = "kind") -> None:
        self.enum = enum
        self.length = length
        self.field = field
        super().__init__(length)

    @property
    def python_type(self) -> type[StrEnum]:
        return self.enum

    def process_bind_param(self, value: object, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else to_member(self.enum, self.field, value).value

    def process_result_value(self, value: str | None, dialect: Dialect) -> StrEnum | None:  # noqa: ARG002
        if value is None:
            return None
        member = self.enum._value2member_map_.get(value)  # a fifth of the cost of calling the enum
        return self.enum(value) if member is None else cast_type("StrEnum", member)

    def process_literal_param(self, value: object, dialect: Dialect) -> str:
        return str(self.process_bind_param(value, dialect))

    def __repr__(self) -> str:
        return f"String(length={self.length})"

    class comparator_factory(TypeDecorator.Comparator[StrEnum], String.Comparator[StrEnum]):
        """Compares with tokens as text of the statement: from ``status = ?`` SQLite cannot tell that an index serves."""

        type: TokenType

        def operate(self, op: Any, *other: Any, **kw: Any) -> ColumnElement[Any]:
            if op in _TOKEN_OPERATORS and other:
                other = (self._as_text(other[0], many=op in (in_op, not_in_op)), *other[1:])
            return super().operate(op, *other, **kw)

        def _as_text(self, token: Any, *, many: bool) -> Any:
            if isinstance(token, str) and not many:
                value: Any = to_member(self.type.enum, self.type.field, token)
            elif (
                many
                and isinstance(token, list | tuple | set | frozenset | EnumType)
                and all(isinstance(t, str) for t in token)
            ):
                value = [to_member(self.type.enum, self.type.field, one) for one in token]
            else:
                return token
            return bindparam(None, value, self.type, unique=True, expanding=many, literal_execute=True)


_TOKEN_OPERATORS = (eq, ne, in_op, not_in_op)


class Span(TypeDecorator[timedelta]):
    """What lies between two times: ``interval`` on PostgreSQL, integer milliseconds elsewhere."""

    impl = Interval
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(Interval() if dialect.name == "postgresql" else BigInteger())

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return value if value is None or dialect.name == "postgresql" else value // _MILLISECOND

    def process_result_value(self, value: Any, dialect: Dialect) -> timedelta | None:
        return value if value is None or dialect.name == "postgresql" else timedelta(milliseconds=value)


class UtcMillis(TypeDecorator[datetime]):
    """An aware UTC time: ``timestamptz(3)`` on PostgreSQL, integer epoch milliseconds elsewhere.

    In a query ``finished_at - started_at`` is a ``timedelta``, and ``created_at + timedelta(hours=1)`` a time, on both.
    """

    impl = DateTime
    cache_ok = True

    def __init__(self, field: str) -> None:
        self.field = field
        super().__init__(timezone=True)

    @property
    def python_type(self) -> type[datetime]:
        return datetime

    class comparator_factory(TypeDecorator.Comparator[datetime], DateTime.Comparator[datetime]):
        """Knows what the difference of two times is where times are integers."""

        def operate(self, op: Any, *other: Any, **kw: Any) -> ColumnElement[Any]:
            result = super().operate(op, *other, **kw)
            if op not in (add, sub):
                return result
            of_span = isinstance(other[0], timedelta) or isinstance(getattr(other[0], "type", None), Span)
            return type_coerce(result, self.type if of_span else Span())

    def coerce_compared_value(self, op: object, value: object) -> TypeEngine[Any]:  # noqa: ARG002
        return Span() if isinstance(value, timedelta) else self

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        # The type itself, not dialect.type_descriptor(...): that adapts it and loses the precision.
        return TIMESTAMP(timezone=True, precision=3) if dialect.name == "postgresql" else BigInteger()

    def process_bind_param(self, value: object, dialect: Dialect) -> Any:
        if value is None:
            return None
        moment = to_utc(self.field, value)  # floored here: TIMESTAMPTZ(3) would round up
        return moment if dialect.name == "postgresql" else to_millis(moment)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if dialect.name == "postgresql":
            moment: datetime = value
            return moment if moment.tzinfo is UTC else moment.astimezone(UTC)
        return from_millis(value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.field!r})"


class PlainText(TypeDecorator[str]):
    """Text that every database can hold: no NUL, which PostgreSQL cannot store, and no lone surrogates."""

    impl = Text
    cache_ok = True

    def __init__(self, field: str) -> None:
        self.field = field
        super().__init__()

    @property
    def python_type(self) -> type[str]:
        return str

    def process_bind_param(self, value: object, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else storable_text(self.field, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.field!r})"


def storable_text(field: str, value: object) -> str:
    """Return ``value`` if every database can store it as text.

    Raises:
        InvalidValueError: Not a string, or one with a NUL or a lone surrogate.
    """
    if not isinstance(value, str):
        raise InvalidValueError(field, value, "expected a string")
    if "\x00" in value:
        raise InvalidValueError(field, value, "PostgreSQL cannot store NUL (U+0000) in text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidValueError(field, value, "it holds a lone surrogate, which UTF-8 cannot encode") from error
    return value


_check_json = msgspec.json.Decoder(msgspec.Raw).decode


def storable_json(field: str, value: object) -> str:
    """Return ``value`` if it is JSON text (RFC 8259) that every database can store.

    Raises:
        InvalidValueError: Not a string, not JSON, or nested deeper than the databases allow (about 1,000 levels).
    """
    if not isinstance(value, str):
        raise InvalidValueError(field, value, "expected JSON text as a string")
    try:
        _check_json(value)
    except (ValueError, RecursionError) as error:
        raise InvalidValueError(field, value, f"not JSON text: {error}") from error
    return value


class _PostgresJson(UserDefinedType[str]):
    """PostgreSQL's ``json``, as the text it was given: ``jsonb`` rewrites it, and drivers parse a bare ``json``."""

    cache_ok = True
    render_bind_cast = True

    def get_col_spec(self, **_: object) -> str:
        return "JSON"

    def column_expression(self, colexpr: ColumnElement[Any]) -> ColumnElement[Any]:
        return cast(colexpr, Text)

    def literal_processor(self, dialect: Dialect) -> Callable[[Any], str] | None:
        process: Callable[[Any], str] = Text().literal_processor(dialect)  # type: ignore[no-untyped-call]
        return process


class JsonText(TypeDecorator[str]):
    """Opaque JSON text, byte for byte: ``json`` on PostgreSQL, ``TEXT`` elsewhere."""

    impl = Text
    cache_ok = True

    def __init__(self, field: str) -> None:
        self.field = field
        super().__init__()

    @property
    def python_type(self) -> type[str]:
        return str

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return _PostgresJson() if dialect.name == "postgresql" else Text()

    def process_bind_param(self, value: object, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else storable_json(self.field, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.field!r})"


# ------------------------------------------------------------------------------------------------ constraints


class SqliteCheck(CheckConstraint):
    """A CHECK for SQLite only: what PostgreSQL's types check themselves. Migrations of hosts name it."""

    def __init__(self, sqltext: str | TextClause, name: str | None = None, **kw: Any) -> None:
        super().__init__(sqltext, name=name, **kw)
        self.ddl_if(dialect="sqlite")

    def _copy(self, *, target_table: Table | None = None, **_: Any) -> Self:
        # SQLAlchemy's own makes a plain CHECK of it, for Table.to_metadata and for Alembic.
        return type(self)(self.sqltext, self.name, table=target_table)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ SQL expressions


class epoch_millis(FunctionElement[int]):
    """Epoch milliseconds of a ``UtcMillis`` column, as an integer, on both databases."""

    type = BigInteger()
    inherit_cache = True
    name: Literal["epoch_millis"] = "epoch_millis"


@compiles(epoch_millis)
def _millis_of_integer(element: epoch_millis, compiler: SQLCompiler, **kw: Any) -> str:
    return compiler.process(element.clauses, **kw)


@compiles(epoch_millis, "postgresql")
def _millis_of_timestamp(element: epoch_millis, compiler: SQLCompiler, **kw: Any) -> str:
    return f"CAST(EXTRACT(EPOCH FROM {compiler.process(element.clauses, **kw)}) * 1000 AS BIGINT)"


class _Bucket(FunctionElement[datetime]):
    inherit_cache = True
    name: Literal["time_bucket"] = "time_bucket"


@compiles(_Bucket)
def _bucket_of_integer(element: _Bucket, compiler: SQLCompiler, **kw: Any) -> str:
    moment, seconds = (compiler.process(part, **kw) for part in element.clauses)
    return f"({moment} - {moment} % ({seconds} * 1000))"


@compiles(_Bucket, "postgresql")
def _bucket_of_timestamp(element: _Bucket, compiler: SQLCompiler, **kw: Any) -> str:
    moment, seconds = (compiler.process(part, **kw) for part in element.clauses)
    return f"to_timestamp(floor(extract(epoch FROM {moment}) / {seconds}) * {seconds})"


def time_bucket(moment: Any, width: timedelta) -> ColumnElement[datetime]:
    """Return the expression for the beginning of the hour, day or other span that a time lies in, on both databases.

    Args:
        moment: A time of a record, e.g. ``MlJob.finished_at``.
        width: A whole number of seconds. Spans are counted from 1970-01-01 UTC, so days begin at midnight UTC.

    Raises:
        InvalidValueError: ``width`` is not a whole number of seconds above 0.

    Example:
        ``hour = time_bucket(MlJob.finished_at, timedelta(hours=1))``
    """
    if not isinstance(width, timedelta) or width < timedelta(seconds=1) or width.microseconds:
        raise InvalidValueError("width", width, "expected a timedelta of whole seconds, at least one")
    seconds = literal_column(str(width.days * 86_400 + width.seconds), BigInteger())
    bucket = _Bucket(moment, seconds)
    bucket.type = UtcMillis("time_bucket")
    return bucket


class _JsonNumber(FunctionElement[float | None]):
    type: TypeEngine[float | None] = Double()
    inherit_cache = True
    name: Literal["json_number"] = "json_number"


@compiles(_JsonNumber)
def _number_of_text(element: _JsonNumber, compiler: SQLCompiler, **kw: Any) -> str:
    column, key = (compiler.process(part, **kw) for part in element.clauses)
    # Of a key that stands there twice the last one counts, as for every JSON parser.
    return (
        f"(SELECT CAST(value AS REAL) FROM json_each({column}) WHERE key = {key}"  # noqa: S608 - compiled parts
        " AND type IN ('integer', 'real') ORDER BY id DESC LIMIT 1)"
    )


@compiles(_JsonNumber, "postgresql")
def _number_of_json(element: _JsonNumber, compiler: SQLCompiler, **kw: Any) -> str:
    column, key = (compiler.process(part, **kw) for part in element.clauses)
    number = f"CAST({column} ->> {key} AS DOUBLE PRECISION)"
    return f"CASE WHEN json_typeof({column} -> {key}) = 'number' THEN {number} END"


def json_number(column: Any, key: str) -> ColumnElement[float | None]:
    """Return the expression for the number under a key of a JSON column, NULL where there is none, on both databases.

    A text or ``null`` under the key, which a plain cast would stumble over, counts as no number.
    """
    return _JsonNumber(column, cast(literal(key, Text()), Text()))


class _FirstLine(FunctionElement[str | None]):
    type: TypeEngine[Any] = Text()
    inherit_cache = True
    name: Literal["first_line"] = "first_line"


@compiles(_FirstLine)
def _first_line_by_instr(element: _FirstLine, compiler: SQLCompiler, **kw: Any) -> str:
    column = compiler.process(element.clauses, **kw)
    end = f"coalesce(nullif(instr({column}, char(10)), 0) - 1, length({column}))"
    return f"substr({column}, 1, {end})"


@compiles(_FirstLine, "postgresql")
def _first_line_by_split(element: _FirstLine, compiler: SQLCompiler, **kw: Any) -> str:
    return f"split_part({compiler.process(element.clauses, **kw)}, chr(10), 1)"


def first_line(column: Any) -> ColumnElement[str | None]:
    """Return the expression for the first line of a text, on both databases."""
    return _FirstLine(column)
