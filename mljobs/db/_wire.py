"""The columns of a record in the form that a driver takes and gives at the least cost, by the database's bulk route.

A ``UUID`` and three ``datetime`` objects cost more than all else in a row; see :class:`Wire`. PostgreSQL: COPY. SQLite:
``executemany`` and a plain cursor.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import Boolean, SmallInteger, Text, cast, func, literal_column, select, type_coerce
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import NullType

from mljobs._values import EPOCH, from_millis, to_millis
from mljobs.db._copy import CHUNK, Row, copy_in, copy_out, translating
from mljobs.db._texts import is_no_utf8
from mljobs.guards._companions import qualified_name, quoted
from mljobs.types import JobId, JsonText, UtcMillis

if TYPE_CHECKING:
    from sqlalchemy import Column, ColumnElement, Connection, Select, Table

Parts = Generator[list[tuple[Any, ...]], None, None]
"""Rows, in lists."""
Reader = Callable[[dict[str, Any]], Parts]
"""Begins to read, given the values of a statement's own parameters."""

_POSTGRES_EPOCH_MS = 946_684_800_000  # 2000-01-01, where PostgreSQL counts microseconds from


@dataclass(frozen=True, slots=True)
class Wire:
    """How a driver takes and gives a record's values at the least cost.

    Texts, numbers and flags are the same everywhere. Ids and times differ:

    - psycopg: 16 bytes, and microseconds since 2000; COPY carries no types, so neither end need build an object for them;
    - asyncpg: ``UUID`` and ``datetime``;
    - SQLite: 32 hex digits, and epoch milliseconds.

    Attributes:
        name: ``psycopg``, ``asyncpg`` or ``sqlite``.
        id_in: From 32 hex digits to the driver's value.
        id_out: And back.
        origin: The driver's value of the epoch.
        unit: The driver's value of a millisecond; a time is ``origin + millis * unit``.
        time_in: From epoch milliseconds to the driver's value.
        time_out: And back.
    """

    name: str
    id_in: Callable[[str], Any]
    id_out: Callable[[Any], str]
    origin: Any
    unit: Any
    time_in: Callable[[int], Any]
    time_out: Callable[[Any], int]


def _same(value: Any) -> Any:
    return value


_WIRES = {
    "psycopg": Wire(
        "psycopg",
        bytes.fromhex,
        bytes.hex,
        -_POSTGRES_EPOCH_MS * 1000,
        1000,
        lambda millis: (millis - _POSTGRES_EPOCH_MS) * 1000,
        lambda micros: micros // 1000 + _POSTGRES_EPOCH_MS,
    ),
    "asyncpg": Wire(
        "asyncpg", UUID, lambda job_id: job_id.hex, EPOCH, timedelta(milliseconds=1), from_millis, to_millis
    ),
    "sqlite": Wire("sqlite", _same, _same, 0, 1, _same, _same),
}


def wire_of(connection: Connection, *, copied: bool = True) -> Wire:
    """Return the wire form of this connection's driver.

    Args:
        connection: The caller's.
        copied: Whether PostgreSQL's rows come by COPY, where a SELECT would give objects.
    """
    dialect = connection.dialect
    if dialect.name != "postgresql":
        return _WIRES["sqlite"]
    return _WIRES[dialect.driver if copied else "asyncpg"]


def insert_wire(connection: Connection, table: Table, columns: Sequence[Column[Any]], rows: Iterable[Row]) -> int:
    """Insert rows of the record's columns in wire form, unchecked but by the database.

    Args:
        connection: The caller's; nothing is committed.
        table: Where to.
        columns: Columns of the record, in the order of the values.
        rows: Any length; read once. Where ``row_security`` is true, use ``insert_rows``.

    Returns:
        How many.

    Raises:
        DBAPIError: What the database refused, as SQLAlchemy raises it.
    """
    names = [column.name for column in columns]
    if connection.dialect.name == "postgresql":
        return copy_in(connection, table, names, iter(rows), [_wire_type(column) for column in columns])
    marks = ", ".join("?" * len(names))
    into = f"{qualified_name(connection, table)} ({', '.join(quoted(connection, name) for name in names)})"
    statement = f"INSERT INTO {into} VALUES ({marks})"  # noqa: S608 - quoted identifiers
    total, left = 0, iter(rows)
    while chunk := list(islice(left, CHUNK)):
        connection.exec_driver_sql(statement, [tuple(row) for row in chunk])
        total += len(chunk)
    return total


def read_wire(
    connection: Connection,
    columns: Sequence[Column[Any]],
    where: Sequence[ColumnElement[bool]],
    chunk: int = CHUNK,
    *,
    beside: Sequence[ColumnElement[Any]] = (),
) -> Parts:
    """Yield rows of the record's columns in wire form, in lists of at most ``chunk``.

    The connection is busy until the last row, or until the iterator is closed (use ``contextlib.closing``).

    Args:
        connection: The caller's.
        columns: Columns of the record, of one table.
        where: Conditions, to be combined with AND.
        chunk: At most so many rows at once.
        beside: Columns of a host's own, whose values come behind the others as their types give them. With these it is no
            COPY: see ``wire_of``.
    """
    return wire_reader(connection, columns, where, chunk, beside=beside)({})


def wire_reader(
    connection: Connection,
    columns: Sequence[Column[Any]],
    where: Sequence[ColumnElement[bool]],
    chunk: int = CHUNK,
    *,
    order_by: ColumnElement[Any] | None = None,
    limit: ColumnElement[int] | None = None,
    beside: Sequence[ColumnElement[Any]] = (),
) -> Reader:
    """Return what reads as ``read_wire`` does, given the values of the statement's own parameters.

    To compile the statement takes as long as to read some hundred rows: who reads part after part compiles it once.

    Args:
        connection: The caller's.
        columns: Columns of the record, of one table.
        where: Conditions, to be combined with AND; ``bindparam("name", None)`` stands for a value that is given later.
        chunk: At most so many rows at once.
        order_by: A column; None for the order that the database has them in.
        limit: At most so many rows at all; None for all.
        beside: See ``read_wire``.
    """
    dialect = connection.dialect
    copied = dialect.driver == "psycopg" and not beside
    # Without their types: what the driver gives is what is wanted. But outside COPY drivers parse json.
    untyped: list[ColumnElement[Any]] = [type_coerce(column, NullType()) for column in columns]
    if dialect.name == "postgresql" and not copied:
        untyped = [
            cast(values, Text) if isinstance(column.type, JsonText) else values
            for column, values in zip(columns, untyped, strict=True)
        ]
    statement = select(*untyped, *beside).where(*where).order_by(order_by).limit(limit)
    if not copied:
        return _stream_of(connection, statement, chunk)
    compiled: Any = statement.compile(
        dialect=dialect,
        compile_kwargs={"render_postcompile": True},
        schema_translate_map=connection.get_execution_options().get("schema_translate_map") or {},
        render_schema_translate=True,
    )
    types = [_wire_type(column) for column in columns]

    def copy(given: dict[str, Any]) -> Parts:
        values = {name: _bound_value(compiled, name, value) for name, value in {**compiled.params, **given}.items()}
        query = compiled.string if values else compiled.string % ()
        return copy_out(connection, f"COPY ({query}) TO STDOUT (FORMAT binary)", values, types, chunk)

    return copy


def sorted_reader(
    connection: Connection,
    columns: Sequence[Column[Any]],
    where: Sequence[ColumnElement[bool]],
    order_by: Column[Any],
    chunk: int,
) -> Reader:
    """Return what reads rows in the order of a column; see ``wire_reader``.

    SQLite sorts whole rows, and slowly. So it sorts their places, and looks each row up: a LEFT JOIN goes through its left
    side in order, and a LIMIT keeps the order of what it limits.
    """
    table = columns[0].table
    if connection.dialect.name == "postgresql" or not table.dialect_options["sqlite"]["with_rowid"]:
        return wire_reader(connection, columns, where, chunk, order_by=order_by)
    place: Any = literal_column("rowid").label("place")
    places = select(place).select_from(table).where(*where).order_by(order_by).limit(literal_column("-1")).subquery()
    rows = table.alias("sorted_row")
    joined = places.outerjoin(rows, literal_column("sorted_row.rowid") == places.c.place)
    found: list[Any] = [type_coerce(rows.c[column.name], NullType()) for column in columns]
    return _stream_of(connection, select(*found).select_from(joined), chunk)


_MORE_SORT_MEMORY = """\
SELECT set_config('work_mem', '64MB', true) WHERE pg_size_bytes(current_setting('work_mem')) < pg_size_bytes('64MB')"""


@contextmanager
def more_sort_memory(connection: Connection) -> Iterator[None]:
    """Let PostgreSQL sort 64 MB in memory, in this transaction, until the block ends; by default it has 4 MB."""
    if connection.dialect.name != "postgresql":
        yield
        return
    before = connection.exec_driver_sql("SELECT current_setting('work_mem')").scalar()
    connection.exec_driver_sql(_MORE_SORT_MEMORY)
    yield
    # After an error there is nothing to set back: the transaction ends, and the setting with it.
    connection.execute(select(func.set_config("work_mem", before, True)))


def _stream_of(connection: Connection, statement: Select[Any], chunk: int) -> Reader:
    streamed = statement.execution_options(stream_results=True)
    return lambda given: _streamed(connection, streamed, given, chunk)


def _streamed(connection: Connection, statement: Select[Any], given: dict[str, Any], chunk: int) -> Parts:
    """Yield the rows of a statement; begun again, behind those that were yielded, where a text has to be read leniently."""
    number = 0
    last: tuple[Any, ...] = ()
    failure: DBAPIError | None = None
    while True:
        result = connection.execute(statement, given)
        skip = number
        try:
            with translating(connection):  # asyncpg's cursors raise its own classes
                for part in result.partitions(chunk):
                    rows = [tuple(row) for row in part]
                    if skip and len(rows) >= skip and rows[skip - 1] != last and failure is not None:
                        raise failure  # the table has changed meanwhile
                    skip, rows = max(0, skip - len(rows)), rows[skip:]
                    if rows:
                        number, last = number + len(rows), rows[-1]
                        yield rows
        except DBAPIError as error:
            if failure is not None or not is_no_utf8(error.orig):
                raise
            failure = error
        else:
            return
        finally:
            result.close()


def _wire_type(column: Column[Any]) -> str:
    if isinstance(column.type, JobId):
        return "bytea"
    if isinstance(column.type, UtcMillis):
        return "int8"
    if isinstance(column.type, SmallInteger):
        return "int2"
    return "bool" if isinstance(column.type, Boolean) else "text"


def _bound_value(compiled: Any, name: str, value: Any) -> Any:
    """Return a parameter as its type gives it to the driver."""
    bind = compiled.binds.get(name)
    process = None if bind is None else bind.type.dialect_impl(compiled.dialect).bind_processor(compiled.dialect)
    processed = value if process is None else process(value)
    return str(processed) if isinstance(processed, StrEnum) else processed
