"""Rows in and out of a table by the database's own bulk route, inside the caller's transaction.

PostgreSQL: binary COPY, through psycopg (sync or async) or asyncpg. SQLite: ``executemany`` and a plain cursor. Rows pass
one by one, in chunks where a driver wants chunks, so memory stays the same at any length.

``insert_rows`` takes Python values. ``insert_wire`` and ``read_wire`` work on the record's columns only, in the form that
costs a driver least (see :class:`Wire`): a ``UUID`` and three ``datetime`` objects cost more than all else in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import (
    Boolean,
    Integer,
    SmallInteger,
    String,
    Text,
    Uuid,
    cast,
    event,
    func,
    insert,
    select,
    type_coerce,
)
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.types import BigInteger, Date, DateTime, Double, Float, LargeBinary, NullType, TypeEngine
from sqlalchemy.util import await_only

from mljobs.errors import InvalidValueError
from mljobs.guards._companions import qualified_name, quoted, schema_of
from mljobs.guards._hooks import translate_error
from mljobs.types import (
    EPOCH,
    JobId,
    JsonText,
    PlainText,
    TokenType,
    UtcMillis,
    from_millis,
    storable_json,
    storable_text,
    to_millis,
)

if TYPE_CHECKING:
    from sqlalchemy import Column, ColumnElement, Connection, Table

_CHUNK = 2000
_POSTGRES_EPOCH_MS = 946_684_800_000  # 2000-01-01, where PostgreSQL counts microseconds from
_Check = Callable[[Any], Any]
_Row = Sequence[Any]


# ------------------------------------------------------------------------------------------------- Python values


def insert_rows(connection: Connection, table: Table, columns: Sequence[str], rows: Iterable[_Row]) -> int:
    """Insert rows of Python values, as the table's types take them.

    Args:
        connection: The caller's; nothing is committed.
        table: Where to.
        columns: The names of the columns, in the order of the values.
        rows: Any length; read once.

    Returns:
        How many.

    Raises:
        InvalidValueError: A text or JSON that no database can hold; it names the field. Roll back; nothing stands.
        DBAPIError: What the database refused, as SQLAlchemy raises it.
    """
    checked = _checked(table, columns, rows)
    types = _copy_types(table, columns) if connection.dialect.name == "postgresql" else None
    if types is None or row_security(connection, table):
        return _insert_chunks(connection, table, columns, checked)
    return _copy_in(connection, table, columns, checked, types)


def row_security(connection: Connection, table: Table) -> bool:
    """Whether policies bind this role, under which PostgreSQL refuses COPY into the table."""
    asked = select(func.row_security_active(cast(qualified_name(connection, table), Text)))
    return bool(connection.scalar(asked))


def _checked(table: Table, columns: Sequence[str], rows: Iterable[_Row]) -> Iterator[_Row]:
    checks: list[tuple[int, _Check]] = []
    for at, name in enumerate(columns):
        check = _check_of(table.c[name].type)
        if check is not None:
            checks.append((at, check))
    for row in rows:
        for at, check in checks:
            value = row[at]
            if value is not None:
                check(value)
        yield row


def _check_of(column_type: object) -> _Check | None:
    if isinstance(column_type, JsonText):
        json_field = column_type.field
        return lambda value: storable_json(json_field, value)
    if isinstance(column_type, PlainText):
        text_field = column_type.field
        return lambda value: storable_text(text_field, value)
    return None


def _insert_chunks(connection: Connection, table: Table, columns: Sequence[str], rows: Iterator[_Row]) -> int:
    total = 0
    statement = insert(table)
    while chunk := [dict(zip(columns, row, strict=True)) for row in islice(rows, _CHUNK)]:
        connection.execute(statement, chunk)
        total += len(chunk)
    return total


_COPY_TYPES: tuple[tuple[type[TypeEngine[Any]], str], ...] = (
    # The server reads json and varchar from COPY as it reads text.
    (TokenType, "text"),
    (JsonText, "text"),
    (PlainText, "text"),
    (UtcMillis, "timestamptz"),
    (JobId, "uuid"),
)
_COPY_TYPES_OF_HOSTS: dict[type[TypeEngine[Any]], str] = {
    String: "text",
    Text: "text",
    SmallInteger: "int2",
    Integer: "int4",
    BigInteger: "int8",
    Boolean: "bool",
    Float: "float8",
    Double: "float8",
    Date: "date",
    LargeBinary: "bytea",
    Uuid: "uuid",
}


def _copy_types(table: Table, columns: Sequence[str]) -> list[str] | None:
    """Return what to declare to psycopg for each column; None if one is of a type whose values need SQLAlchemy."""
    types = []
    for name in columns:
        column_type = table.c[name].type
        found = next((declared for ours, declared in _COPY_TYPES if isinstance(column_type, ours)), None)
        if type(column_type) is DateTime:
            found = "timestamptz" if column_type.timezone else "timestamp"
        elif found is None and not (isinstance(column_type, Uuid) and not column_type.as_uuid):
            found = _COPY_TYPES_OF_HOSTS.get(type(column_type))
        if found is None:
            return None
        types.append(found)
    return types


# --------------------------------------------------------------------------------------- the record at the least cost


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


def wire_of(connection: Connection) -> Wire:
    """Return the wire form of this connection's driver."""
    dialect = connection.dialect
    return _WIRES[dialect.driver if dialect.name == "postgresql" else "sqlite"]


def insert_wire(connection: Connection, table: Table, columns: Sequence[Column[Any]], rows: Iterable[_Row]) -> int:
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
        return _copy_in(connection, table, names, iter(rows), [_wire_type(column) for column in columns])
    marks = ", ".join("?" * len(names))
    into = f"{qualified_name(connection, table)} ({', '.join(quoted(connection, name) for name in names)})"
    statement = f"INSERT INTO {into} VALUES ({marks})"  # noqa: S608 - quoted identifiers
    total, left = 0, iter(rows)
    while chunk := list(islice(left, _CHUNK)):
        connection.exec_driver_sql(statement, [tuple(row) for row in chunk])
        total += len(chunk)
    return total


def read_wire(
    connection: Connection, columns: Sequence[Column[Any]], where: Sequence[ColumnElement[bool]], chunk: int = _CHUNK
) -> Generator[list[tuple[Any, ...]], None, None]:
    """Yield rows of the record's columns in wire form, in lists of at most ``chunk``, in the order the database has them.

    The connection is busy until the last row, or until the iterator is closed (use ``contextlib.closing``).

    Args:
        connection: The caller's.
        columns: Columns of the record, of one table.
        where: Conditions, to be combined with AND.
        chunk: At most so many rows at once.
    """
    dialect = connection.dialect
    # Without their types: what the driver gives is what is wanted. But asyncpg would parse json.
    plain: list[ColumnElement[Any]] = [type_coerce(column, NullType()) for column in columns]
    if dialect.driver == "asyncpg":
        plain = [
            cast(values, Text) if isinstance(column.type, JsonText) else values
            for column, values in zip(columns, plain, strict=True)
        ]
    statement = select(*plain).where(*where)
    if dialect.name == "postgresql" and dialect.driver == "psycopg":
        compiled: Any = statement.compile(
            dialect=dialect,
            compile_kwargs={"render_postcompile": True},
            schema_translate_map=connection.get_execution_options().get("schema_translate_map") or {},
            render_schema_translate=True,
        )
        values = {name: str(value) if isinstance(value, StrEnum) else value for name, value in compiled.params.items()}
        query = compiled.string if values else compiled.string % ()
        text = f"COPY ({query}) TO STDOUT (FORMAT binary)"
        types = [_wire_type(column) for column in columns]
        connection.exec_driver_sql("SELECT 1")
        read = _copy_out_async if dialect.is_async else _copy_out
        with _busy(connection), _translating(connection):
            yield from read(connection.connection.driver_connection, text, values, types, chunk)
        return
    result = connection.execute(statement.execution_options(stream_results=True))
    try:
        with _translating(connection):  # asyncpg's cursors raise its own classes
            for part in result.partitions(chunk):
                yield [tuple(row) for row in part]
    finally:
        result.close()


@contextmanager
def _busy(connection: Connection) -> Iterator[None]:
    """Refuse statements meanwhile: psycopg would wait for ever, for a lock that the reader itself holds."""

    def refuse(*_: object) -> None:
        raise InvalidValueError("session", connection, "its connection is reading records; use another one meanwhile")

    with ExitStack() as stack:
        # SQLAlchemy 2.0 takes no listener for a connection of an engine with options, such as a store's.
        with suppress(InvalidRequestError):
            event.listen(connection, "before_cursor_execute", refuse)
            stack.callback(event.remove, connection, "before_cursor_execute", refuse)
        yield


def _wire_type(column: Column[Any]) -> str:
    if isinstance(column.type, JobId):
        return "bytea"
    if isinstance(column.type, UtcMillis):
        return "int8"
    if isinstance(column.type, SmallInteger):
        return "int2"
    return "bool" if isinstance(column.type, Boolean) else "text"


# ---------------------------------------------------------------------------------------------------------- COPY in


def _copy_in(
    connection: Connection, table: Table, columns: Sequence[str], rows: Iterator[_Row], types: Sequence[str]
) -> int:
    connection.exec_driver_sql("SELECT 1")  # the driver's transaction begins with a statement that SQLAlchemy sends
    copy = _COPIES[connection.dialect.driver, connection.dialect.is_async]
    with _translating(connection):
        return copy(connection, table, columns, rows, types)


def _copy_text(connection: Connection, table: Table, columns: Sequence[str]) -> str:
    names = ", ".join(quoted(connection, name) for name in columns)
    return f"COPY {qualified_name(connection, table)} ({names}) FROM STDIN (FORMAT binary)"


def _copy_psycopg(
    connection: Connection, table: Table, columns: Sequence[str], rows: Iterator[_Row], types: Sequence[str]
) -> int:
    driver: Any = connection.connection.driver_connection
    total = 0
    with driver.cursor() as cursor, cursor.copy(_copy_text(connection, table, columns)) as copy:
        copy.set_types(types)
        write = copy.write_row
        for row in rows:
            write(row)
            total += 1
    return total


def _copy_psycopg_async(
    connection: Connection, table: Table, columns: Sequence[str], rows: Iterator[_Row], types: Sequence[str]
) -> int:
    driver: Any = connection.connection.driver_connection

    async def copy_all() -> int:
        total = 0
        async with driver.cursor() as cursor, cursor.copy(_copy_text(connection, table, columns)) as copy:
            copy.set_types(types)
            for row in rows:
                await copy.write_row(row)
                total += 1
        return total

    return await_only(copy_all())


def _copy_asyncpg(
    connection: Connection, table: Table, columns: Sequence[str], rows: Iterator[_Row], _types: Sequence[str]
) -> int:
    driver: Any = connection.connection.driver_connection
    total = 0

    def counted() -> Iterator[_Row]:
        nonlocal total
        for row in rows:
            total += 1
            yield row

    await_only(
        driver.copy_records_to_table(
            table.name, records=counted(), columns=list(columns), schema_name=schema_of(connection, table)
        )
    )
    return total


_COPIES = {
    ("psycopg", False): _copy_psycopg,
    ("psycopg", True): _copy_psycopg_async,
    ("asyncpg", True): _copy_asyncpg,
}


# --------------------------------------------------------------------------------------------------------- COPY out


def _copy_out(
    driver: Any, text: str, values: dict[str, Any], types: Sequence[str], chunk: int
) -> Iterator[list[tuple[Any, ...]]]:
    with driver.cursor() as cursor, cursor.copy(text, values) as copy:
        copy.set_types(types)
        known = _known_inside(copy)
        while part := driver.wait(_some(driver.pgconn, copy, chunk)) if known else _few(copy.read_row, chunk):
            yield part


def _copy_out_async(
    driver: Any, text: str, values: dict[str, Any], types: Sequence[str], chunk: int
) -> Iterator[list[tuple[Any, ...]]]:
    cursor = driver.cursor()
    block = cursor.copy(text, values)
    copy = await_only(block.__aenter__())
    try:
        copy.set_types(types)
        known = _known_inside(copy)
        while part := (
            await_only(driver.wait(_some(driver.pgconn, copy, chunk)))
            if known
            else _few(lambda: await_only(copy.read_row()), chunk)
        ):
            yield part
    except BaseException as error:
        await_only(block.__aexit__(type(error), error, error.__traceback__))
        raise
    else:
        await_only(block.__aexit__(None, None, None))
    finally:
        await_only(cursor.close())


def _known_inside(copy: Any) -> bool:
    """Whether psycopg is made as ``_some`` knows it. If not, rows are read in its public way: one by one, and slowly."""
    return all(hasattr(copy, name) for name in ("_finished", "_read_gen")) and hasattr(copy.formatter, "parse_row")


def _few(read: Callable[[], Any], chunk: int) -> list[tuple[Any, ...]]:
    return list(islice(iter(read, None), chunk))


def _some(pgconn: Any, copy: Any, chunk: int) -> Generator[Any, Any, list[tuple[Any, ...]]]:
    """Read rows as ``copy.rows()`` does, for ``driver.wait``: one wait for many rows, not one (and a coroutine) for each."""
    from psycopg import errors, waiting  # noqa: PLC0415 - importing mljobs does not load a driver

    part: list[tuple[Any, ...]] = []
    get, parse = pgconn.get_copy_data, copy.formatter.parse_row
    while len(part) < chunk and not copy._finished:  # noqa: SLF001
        size, data = get(1)
        if size > 0:
            row = parse(data)
            if row is None:  # the trailer
                yield from copy._read_gen()  # noqa: SLF001 - takes the final result and marks the copy as ended
                break
            part.append(row)
        elif size == 0:
            while not (yield waiting.WAIT_R):
                pass
            pgconn.consume_input()
        else:  # an error ended it
            result = pgconn.get_result()
            while pgconn.get_result() is not None:
                pass
            raise errors.error_from_result(result)
    return part


# ------------------------------------------------------------------------------------------------- errors of drivers


@contextmanager
def _translating(connection: Connection) -> Iterator[None]:
    """Raise what SQLAlchemy would raise: COPY goes past it, and so past ``handle_error``."""
    try:
        yield
    except connection.dialect.loaded_dbapi.Error as error:
        raise _translated(connection, error) from error
    except Exception as error:
        translated = translate_error(error)
        if translated is not None:
            raise translated from error
        if type(error).__module__.startswith("asyncpg."):
            raise _translated(connection, error) from error
        raise


def _translated(connection: Connection, error: Exception) -> Exception:
    ours = translate_error(error)
    if ours is not None:
        return ours
    dbapi = connection.dialect.loaded_dbapi
    if not isinstance(error, dbapi.Error):
        # asyncpg's own classes are not those of SQLAlchemy's DBAPI facade: wrap by SQLSTATE class.
        integrity = str(getattr(error, "sqlstate", "")).startswith("23")
        facade = (dbapi.IntegrityError if integrity else dbapi.Error)(str(error))
        facade.__cause__ = error  # knows the constraint
        error = facade
    lost = connection.dialect.is_disconnect(error, connection.connection.dbapi_connection, None)
    if lost:
        connection.invalidate(error)
    wrapped: Exception = DBAPIError.instance(
        "COPY", None, error, dbapi.Error, connection_invalidated=lost, dialect=connection.dialect
    )
    return wrapped
