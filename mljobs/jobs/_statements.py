"""Parts of statements: constants, the clock, lists and tables as parameters.

The two databases differ in three ways. PostgreSQL takes the time from its own clock, takes a table of parameters as arrays
side by side, and runs the parts of an operation as one statement. SQLite is given the time, takes a table as JSON, and
runs the same parts in turn under its write lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

from mljobs.states import ACTIVE, MlJobStatus
from mljobs.types import JobId, UtcMillis

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.engine import Dialect
    from sqlalchemy.types import TypeEngine

_MILLISECOND = timedelta(milliseconds=1)

POSTGRES, SQLITE = "postgresql", "sqlite"


def constant(value: str | int) -> Any:
    """Return ``value`` as a literal in the text of the statement.

    For ``status = $1`` neither database can prove that a partial index serves, and PostgreSQL would plan the prepared
    statement anew each time.
    """
    if isinstance(value, int):
        return sa.literal_column(str(value), sa.Integer())
    return sa.literal_column("'" + str(value).replace("'", "''") + "'", sa.String())


def in_active_state(table: Any, status: MlJobStatus) -> list[sa.ColumnElement[bool]]:
    """Return the conditions that jobs are in one active state, so that the index of the active jobs serves.

    SQLite takes a partial index only where its own condition stands in the statement.
    """
    both = table.c.status.in_([constant(state) for state in ACTIVE])
    return [both, table.c.status == constant(status)]


# ---------------------------------------------------------------------------------------------------------- the clock


def now_of(dialect_name: str) -> sa.ColumnElement[Any]:
    """Return the expression for the present time: PostgreSQL's own clock, on SQLite the parameter ``now``."""
    if dialect_name == POSTGRES:
        # Floored to the millisecond: timestamptz(3) would round up, and a job would start in the future.
        moment = sa.func.statement_timestamp()
        return sa.func.date_trunc(constant("milliseconds"), moment, type_=sa.DateTime(timezone=True))
    return sa.bindparam("now", type_=_Moment("now"))


def expiry_of(dialect_name: str) -> sa.ColumnElement[Any]:
    """Return the expression for the end of a lease that begins now and lasts the parameter ``lease``."""
    if dialect_name == POSTGRES:
        span = sa.bindparam("lease", type_=sa.Interval())
        moment = sa.func.statement_timestamp(type_=sa.DateTime(timezone=True)) + span
        return sa.func.date_trunc(constant("milliseconds"), moment, type_=sa.DateTime(timezone=True))
    return sa.bindparam("expires", type_=_Moment("expires_at"))


class _Moment(UtcMillis):
    """A time given in epoch milliseconds, as SQLite stores it: all statements of an operation have the same time."""

    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> None:
        """Leave the value as it is."""


def moments(lease: float = 0.0) -> dict[str, Any]:
    """Return the parameters of ``now_of`` and ``expiry_of``, for a lease of ``lease`` seconds."""
    span = timedelta(seconds=lease)
    now = time.time_ns() // 1_000_000
    return {"now": now, "lease": span, "expires": now + span // _MILLISECOND}


# ------------------------------------------------------------------------------------- lists and tables as parameters


class Columns(list[Sequence[Any]]):
    """The columns of a parameter table; and their JSON text for SQLite, by the number of columns that a statement reads."""

    __slots__ = ("texts",)

    def __init__(self, columns: Iterable[Sequence[Any]]) -> None:
        super().__init__(columns)
        self.texts: dict[int, str] = {}


class Stored(tuple[Any, ...]):
    """A column of a parameter table whose values are already in the form that SQLite stores."""

    __slots__ = ()


class _Json(TypeDecorator[list[Any]]):
    """A list, or a table as its columns, as JSON text for SQLite's ``json_each``; values as their own types store them.

    Args:
        types: Of the values in a row.
        rows: Whether each item is a row; otherwise it is one value.
    """

    impl = sa.Text
    cache_ok = True

    def __init__(self, types: tuple[TypeEngine[Any], ...], *, rows: bool) -> None:
        self.types = types
        self.rows = rows
        super().__init__()

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], str]:
        processors = [of.dialect_impl(dialect).bind_processor(dialect) for of in self.types]
        processing = [
            (at, process)
            for at, process in enumerate(processors)
            if process is not None and not isinstance(self.types[at], sa.Boolean)  # JSON has its own, SQLite's 0 and 1
        ]

        def table(given: Columns) -> str:
            text = given.texts.get(len(processors))
            if text is None:
                columns = list(given[: len(processors)])  # a statement may read the first ones only
                for at, process in processing:
                    if not isinstance(columns[at], Stored):
                        columns[at] = list(map(process, columns[at]))
                text = given.texts[len(processors)] = _encode(list(zip(*columns, strict=True))).decode()
            return text

        if self.rows:
            return table
        (process,) = processors
        return lambda values: _encode([process(value) for value in values] if process else values).decode()


_encode = msgspec.json.Encoder().encode


class Array(TypeDecorator[list[Any]]):
    """An array of PostgreSQL, made into its text here for psycopg, which takes longer over each item than the server.

    Args:
        item: The type of the items.
    """

    impl = sa.ARRAY
    cache_ok = True

    def __init__(self, item: TypeEngine[Any]) -> None:
        self.item = item
        super().__init__(item)

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any] | None:
        if not dialect.driver.startswith("psycopg"):
            return super().bind_processor(dialect)
        if isinstance(self.item, JobId):
            return _ids
        if isinstance(self.item, (sa.Integer, sa.Boolean)):
            return _numbers
        process = self.item.dialect_impl(dialect).bind_processor(dialect) or str

        def texts(values: Sequence[Any]) -> str:
            written = {value: "NULL" if value is None else _quoted(process(value)) for value in set(values)}
            return f"{{{','.join(map(written.__getitem__, values))}}}"  # many columns have few values

        return texts


def _ids(values: Sequence[UUID]) -> str:
    return f"{{{','.join(['%032x'] * len(values))}}}" % tuple([value.int for value in values])


def _numbers(values: Sequence[float | None]) -> str:
    return f"{{{','.join(map(str, values)).replace('None', 'NULL')}}}"


def _quoted(value: Any) -> str:
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def any_of(column: sa.ColumnElement[Any], name: str, item: TypeEngine[Any], dialect_name: str) -> Any:
    """Return the condition that ``column`` is in the list parameter ``name``: one text for lists of any length."""
    if dialect_name == POSTGRES:
        return column == sa.any_(sa.bindparam(name, type_=Array(item)))
    items = sa.func.json_each(sa.bindparam(name, type_=_Json((item,), rows=False))).table_valued("value")
    return column.in_(sa.select(items.c.value))


def in_rows(column: sa.ColumnElement[Any], rows: sa.SelectBase, dialect_name: str) -> Any:
    """Return the condition that ``column`` is in the one column of ``rows``.

    On PostgreSQL an array, which is made before anything is joined. For an IN the server would plan one more join, by an
    estimate of how many rows there are.
    """
    if dialect_name == POSTGRES:
        return column == sa.any_(sa.func.array(rows.scalar_subquery(), type_=sa.ARRAY(column.type)))
    return column.in_(rows)


def parameter_table(name: str, dialect_name: str, **columns: TypeEngine[Any]) -> Any:
    """Return a table of parameters; see ``table_parameters`` for its values.

    On PostgreSQL each array is a subquery, so that the planner always expects ten rows. Planned for five hundred, the
    statement might read the whole job table for the join.

    Args:
        name: The table's name; on PostgreSQL each column is a parameter ``<name>_<column>``.
        dialect_name: The dialect's name.
        **columns: The type of each column.
    """
    if dialect_name == POSTGRES:
        arrays = [
            sa.select(sa.bindparam(f"{name}_{column}", type_=Array(item))).scalar_subquery()
            for column, item in columns.items()
        ]
        typed = [sa.column(column, item) for column, item in columns.items()]
        return sa.func.unnest(*arrays).table_valued(*typed).render_derived(name=name)
    rows = sa.bindparam(name, type_=_Json(tuple(columns.values()), rows=True))
    item = sa.func.json_each(rows).table_valued("value").c.value
    return sa.select(
        *(
            sa.func.json_extract(item, constant(f"$[{at}]"), type_=of).label(column)
            for at, (column, of) in enumerate(columns.items())
        )
    ).subquery(name)


def table_parameters(name: str, dialect_name: str, **columns: Sequence[Any]) -> dict[str, Any]:
    """Return the parameters of ``parameter_table``, from one list for each column."""
    if dialect_name == POSTGRES:
        return {f"{name}_{column}": _or_empty(values) for column, values in columns.items()}
    return {name: Columns(columns.values())}


def _or_empty(values: Sequence[Any]) -> list[Any]:
    """Return ``values``, or an empty list for nothing but None: ``unnest`` fills the shorter list up with NULLs."""
    return list(values) if values and (values[0] is not None or any(value is not None for value in values)) else []
