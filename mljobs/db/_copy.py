"""Binary COPY into and out of PostgreSQL, through psycopg (sync or async) or asyncpg, in the caller's transaction.

Rows pass one by one, in chunks where a driver wants chunks, so memory stays the same at any length.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.util import await_only

from mljobs.errors import InvalidValueError
from mljobs.guards._companions import qualified_name, quoted, schema_of
from mljobs.guards._errors import translate_error

if TYPE_CHECKING:
    from sqlalchemy import Connection, Table

Row = Sequence[Any]
CHUNK = 2000
_IN_TRANSACTION = 2
"""libpq's ``PQTRANS_INTRANS``."""


def copy_in(
    connection: Connection, table: Table, columns: Sequence[str], rows: Iterator[Row], types: Sequence[str]
) -> int:
    """Insert rows by binary COPY; return how many.

    Args:
        connection: Of PostgreSQL; nothing is committed.
        table: Where to.
        columns: The names of the columns, in the order of the values.
        rows: As the driver takes them.
        types: The PostgreSQL type of each column, for psycopg.
    """
    connection.exec_driver_sql("SELECT 1")  # the driver's transaction begins with a statement that SQLAlchemy sends
    copy = _COPIES[connection.dialect.driver, connection.dialect.is_async]
    with translating(connection):
        return copy(connection, table, columns, rows, types)


def _copy_text(connection: Connection, table: Table, columns: Sequence[str]) -> str:
    names = ", ".join(quoted(connection, name) for name in columns)
    return f"COPY {qualified_name(connection, table)} ({names}) FROM STDIN (FORMAT binary)"


def _copy_psycopg(
    connection: Connection, table: Table, columns: Sequence[str], rows: Iterator[Row], types: Sequence[str]
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
    connection: Connection, table: Table, columns: Sequence[str], rows: Iterator[Row], types: Sequence[str]
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
    connection: Connection, table: Table, columns: Sequence[str], rows: Iterator[Row], _types: Sequence[str]
) -> int:
    driver: Any = connection.connection.driver_connection
    total = 0

    def counted() -> Iterator[Row]:
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


def copy_out(
    connection: Connection, text: str, values: dict[str, Any], types: Sequence[str], chunk: int
) -> Generator[list[tuple[Any, ...]], None, None]:
    """Yield the rows of a COPY by psycopg, in lists of at most ``chunk``.

    Args:
        connection: Of PostgreSQL by psycopg; no other statement runs on it meanwhile.
        text: The COPY statement.
        values: Its parameters.
        types: The PostgreSQL type of each column, for psycopg.
        chunk: At most so many rows at once.
    """
    driver: Any = connection.connection.driver_connection
    if not connection.in_transaction() or driver.pgconn.transaction_status != _IN_TRANSACTION:
        connection.exec_driver_sql("SELECT 1")
    read = _read_async if connection.dialect.is_async else _read
    with _refusing_statements(connection), translating(connection):
        yield from read(driver, text, values, types, chunk)


@contextmanager
def _refusing_statements(connection: Connection) -> Iterator[None]:
    """Refuse statements meanwhile: psycopg would wait for ever, for a lock that the reader itself holds."""

    def refuse(*_: object) -> None:
        raise InvalidValueError("session", connection, "its connection is reading records; use another one meanwhile")

    with ExitStack() as stack:
        # SQLAlchemy 2.0 takes no listener for a connection of an engine with options, such as a store's.
        with suppress(InvalidRequestError):
            event.listen(connection, "before_cursor_execute", refuse)
            stack.callback(event.remove, connection, "before_cursor_execute", refuse)
        yield


def _read(
    driver: Any, text: str, values: dict[str, Any], types: Sequence[str], chunk: int
) -> Iterator[list[tuple[Any, ...]]]:
    with driver.cursor() as cursor, cursor.copy(text, values) as copy:
        copy.set_types(types)
        known = _has_known_internals(copy)
        while (
            part := driver.wait(_next_chunk(driver.pgconn, copy, chunk)) if known else _next_rows(copy.read_row, chunk)
        ):
            yield part


def _read_async(
    driver: Any, text: str, values: dict[str, Any], types: Sequence[str], chunk: int
) -> Iterator[list[tuple[Any, ...]]]:
    cursor = driver.cursor()
    block = cursor.copy(text, values)
    copy = await_only(block.__aenter__())
    try:
        copy.set_types(types)
        known = _has_known_internals(copy)
        while part := (
            await_only(driver.wait(_next_chunk(driver.pgconn, copy, chunk)))
            if known
            else _next_rows(lambda: await_only(copy.read_row()), chunk)
        ):
            yield part
    except BaseException as error:
        await_only(block.__aexit__(type(error), error, error.__traceback__))
        raise
    else:
        await_only(block.__aexit__(None, None, None))
    finally:
        await_only(cursor.close())


def _has_known_internals(copy: Any) -> bool:
    """Whether psycopg has the internals that ``_next_chunk`` uses; if not, rows are read one by one, and slowly."""
    return all(hasattr(copy, name) for name in ("_finished", "_read_gen")) and hasattr(copy.formatter, "parse_row")


def _next_rows(read: Callable[[], Any], chunk: int) -> list[tuple[Any, ...]]:
    return list(islice(iter(read, None), chunk))


def _next_chunk(pgconn: Any, copy: Any, chunk: int) -> Generator[Any, Any, list[tuple[Any, ...]]]:
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


@contextmanager
def translating(connection: Connection) -> Iterator[None]:
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
