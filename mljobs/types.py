"""Column types: what a field holds in Python, and how each database keeps it.

Each type refuses what its column cannot hold when the value is bound, so Core inserts and comparisons are checked
too, and names the field in the error. Migrations of hosts name these types.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import EnumType, StrEnum
from functools import partial
from operator import add, eq, ne, sub
from typing import Any, ClassVar, Self, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.operators import in_op, not_in_op
from sqlalchemy.types import TypeDecorator, TypeEngine, UserDefinedType

from mljobs._values import (
    DASHED_ID_LENGTH,
    from_millis,
    storable_json,
    storable_text,
    to_job_id,
    to_member,
    to_millis,
    to_utc,
)
from mljobs.errors import InvalidValueError
from mljobs.states import UnknownKind

_MILLISECOND = timedelta(milliseconds=1)
_T = TypeVar("_T")


class _Direct(TypeDecorator[_T]):
    """A type of which ``process_bind_param`` does all: SQLAlchemy's own processor is one more call for each value."""

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any] | None:
        return partial(self.process_bind_param, dialect=dialect)


class _OfField(_Direct[_T]):
    """A type that names the field in its errors."""

    _of_impl: ClassVar[dict[str, Any]] = {}  # arguments of ``impl``

    def __init__(self, field: str) -> None:
        self.field = field
        super().__init__(**self._of_impl)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.field!r})"


class JobId(TypeDecorator[UUID]):
    """A 128-bit id: ``uuid`` on PostgreSQL, ``CHAR(32)`` of lower-case hex digits elsewhere."""

    # For tools that ask a TypeDecorator what it decorates (admin forms): an id can be typed as text. No database sees it.
    impl = sa.CHAR
    cache_ok = True

    def __init__(self) -> None:
        super().__init__(DASHED_ID_LENGTH)

    @property
    def python_type(self) -> type[UUID]:
        return UUID

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(sa.Uuid())

    def process_bind_param(self, value: object, dialect: Dialect) -> UUID | None:  # noqa: ARG002 - SQLAlchemy's signature
        return None if value is None else to_job_id(value)

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        return _native_id if dialect.supports_native_uuid else _hex_id

    def coerce_compared_value(self, op: object, value: object) -> TypeEngine[Any]:  # noqa: ARG002
        return self

    def __repr__(self) -> str:
        return "JobId()"


def _native_id(value: object) -> UUID | None:
    return None if value is None else to_job_id(value)


def _hex_id(value: object) -> str | None:
    return None if value is None else f"{to_job_id(value).int:032x}"


class TokenType(_Direct[StrEnum]):
    """The token of a string enum, as ``VARCHAR``; a native enum would not survive its own migrations."""

    impl = sa.String
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
        member: Any = value if value is None or type(value) is self.enum else to_member(self.enum, self.field, value)
        return None if member is None else member._value_  # `value` is two calls

    def process_result_value(self, value: str | None, dialect: Dialect) -> StrEnum | None:  # noqa: ARG002
        if value is None:
            return None
        member: Any = self.enum._value2member_map_.get(value)  # a fifth of the cost of calling the enum
        known: StrEnum = self._unknown(value) if member is None else member
        return known

    def _unknown(self, token: str) -> Any:
        """Return a token that a newer release has written, where it is only read.

        Raises:
            InvalidValueError: A state, from which nobody could tell whether the job has finished.
        """
        if self.field == "status":
            raise InvalidValueError("status", token, "a newer release of mljobs has written it: upgrade this one")
        return UnknownKind(token)

    def process_literal_param(self, value: object, dialect: Dialect) -> str:
        return str(self.process_bind_param(value, dialect))

    def __repr__(self) -> str:
        return f"String(length={self.length})"

    class comparator_factory(TypeDecorator.Comparator[StrEnum], sa.String.Comparator[StrEnum]):
        """Compares with tokens as text of the statement: from ``status = ?`` SQLite cannot tell that an index serves."""

        type: TokenType

        def operate(self, op: Any, *other: Any, **kw: Any) -> sa.ColumnElement[Any]:
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
            return sa.bindparam(None, value, self.type, unique=True, expanding=many, literal_execute=True)


_TOKEN_OPERATORS = (eq, ne, in_op, not_in_op)


class Span(TypeDecorator[timedelta]):
    """What lies between two times: ``interval`` on PostgreSQL, integer milliseconds elsewhere."""

    impl = sa.Interval
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(sa.Interval() if dialect.name == "postgresql" else sa.BigInteger())

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return value if value is None or dialect.name == "postgresql" else value // _MILLISECOND

    def process_result_value(self, value: Any, dialect: Dialect) -> timedelta | None:
        return value if value is None or dialect.name == "postgresql" else timedelta(milliseconds=value)


class UtcMillis(_OfField[datetime]):
    """An aware UTC time: ``timestamptz(3)`` on PostgreSQL, integer epoch milliseconds elsewhere.

    In a query ``finished_at - started_at`` is a ``timedelta``, and ``created_at + timedelta(hours=1)`` a time, on both.
    """

    impl = sa.DateTime
    cache_ok = True
    _of_impl: ClassVar = {"timezone": True}

    @property
    def python_type(self) -> type[datetime]:
        return datetime

    class comparator_factory(TypeDecorator.Comparator[datetime], sa.DateTime.Comparator[datetime]):
        """Knows what the difference of two times is where times are integers."""

        def operate(self, op: Any, *other: Any, **kw: Any) -> sa.ColumnElement[Any]:
            result = super().operate(op, *other, **kw)
            if op not in (add, sub):
                return result
            of_span = isinstance(other[0], timedelta) or isinstance(getattr(other[0], "type", None), Span)
            return sa.type_coerce(result, self.type if of_span else Span())

    def coerce_compared_value(self, op: object, value: object) -> TypeEngine[Any]:  # noqa: ARG002
        return Span() if isinstance(value, timedelta) else self

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        # The type itself, not dialect.type_descriptor(...): that adapts it and loses the precision.
        return TIMESTAMP(timezone=True, precision=3) if dialect.name == "postgresql" else sa.BigInteger()

    def process_bind_param(self, value: object, dialect: Dialect) -> Any:
        if value is None:
            return None
        if dialect.name == "postgresql":
            return to_utc(self.field, value)  # floored here: TIMESTAMPTZ(3) would round up
        if type(value) is datetime and value.tzinfo is UTC:
            return to_millis(value)
        return to_millis(to_utc(self.field, value))

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if dialect.name == "postgresql":
            moment: datetime = value
            return moment if moment.tzinfo is UTC else moment.astimezone(UTC)
        return from_millis(value)


class PlainText(_OfField[str]):
    """Text that every database can hold: no NUL, which PostgreSQL cannot store, and no lone surrogates."""

    impl = sa.Text
    cache_ok = True

    @property
    def python_type(self) -> type[str]:
        return str

    def process_bind_param(self, value: object, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else storable_text(self.field, value)


class _PostgresJson(UserDefinedType[str]):
    """PostgreSQL's ``json``, as the text it was given: ``jsonb`` rewrites it, and drivers parse a bare ``json``."""

    cache_ok = True
    render_bind_cast = True

    def get_col_spec(self, **_: object) -> str:
        return "JSON"

    def column_expression(self, colexpr: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        return sa.cast(colexpr, sa.Text)

    def literal_processor(self, dialect: Dialect) -> Callable[[Any], str] | None:
        process: Callable[[Any], str] = sa.Text().literal_processor(dialect)  # type: ignore[no-untyped-call]
        return process


class JsonText(_OfField[str]):
    """Opaque JSON text, byte for byte: ``json`` on PostgreSQL, ``TEXT`` elsewhere."""

    impl = sa.Text
    cache_ok = True

    @property
    def python_type(self) -> type[str]:
        return str

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return _PostgresJson() if dialect.name == "postgresql" else sa.Text()

    def process_bind_param(self, value: object, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else storable_json(self.field, value)


class DialectCheck(sa.CheckConstraint):
    """A CHECK for one database only. Migrations of hosts name its two kinds."""

    dialect_name: ClassVar[str]

    def __init__(self, sqltext: str | sa.TextClause, name: str | None = None, **kw: Any) -> None:
        super().__init__(sqltext, name=name, **kw)
        self.ddl_if(dialect=self.dialect_name)

    def _copy(self, *, target_table: sa.Table | None = None, **_: Any) -> Self:
        # SQLAlchemy's own makes a plain CHECK of it, for Table.to_metadata and for Alembic.
        return type(self)(self.sqltext, self.name, table=target_table)  # type: ignore[arg-type]


class SqliteCheck(DialectCheck):
    """A CHECK for SQLite only: what PostgreSQL's types, or its triggers, check themselves."""

    dialect_name = "sqlite"


class PostgresCheck(DialectCheck):
    """A CHECK for PostgreSQL only: its times may be infinite, and reach further than Python's."""

    dialect_name = "postgresql"
