"""Rows into a table at the speed of the database's own bulk route, inside the caller's transaction.

PostgreSQL: binary COPY, through psycopg (sync or async) or asyncpg. SQLite: ``executemany`` in chunks. Either way the
rows are read one by one from any iterable, so memory stays the same at any length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from sqlalchemy import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import await_only

from mljobs.guards import translate_error
from mljobs.types import JsonText, PlainText, TokenType, UtcMillis, storable_json, storable_text

if TYPE_CHECKING:
    from sqlalchemy import Connection, Table

_CHUNK = 2000
_Check = Callable[[Any], Any]


def insert_rows(connection: Connection, table: Table, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
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
    if connection.dialect.name != "postgresql":
        return _insert_chunks(connection, table, columns, checked)
    connection.exec_driver_sql("SELECT 1")  # the driver's transaction begins with a statement that SQLAlchemy sends
    copy = _COPIES[connection.dialect.driver, connection.dialect.is_async]
    try:
        return copy(connection, table, columns, checked)
    except connection.dialect.loaded_dbapi.Error as error:
        raise _translated(connection, error) from error
    except Exception as error:
        translated = translate_error(error)
        if translated is not None:
            raise translated from error
        if type(error).__module__.startswith("asyncpg."):
            raise _translated(connection, error) from error
        raise


def qualified_name(connection: Connection, table: Table) -> str:
    """Return the table's name, quoted and in the schema that this connection's translate map gives it."""
    preparer = connection.dialect.identifier_preparer
    schemas = connection.get_execution_options().get("schema_translate_map") or {}
    schema = schemas.get(table.schema, table.schema)
    name = preparer.quote(table.name)
    return f"{preparer.quote_schema(schema)}.{name}" if schema else name


def _checked(table: Table, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
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


# -------------------------------------------------------------------------------------------------------- SQLite


def _insert_chunks(connection: Connection, table: Table, columns: Sequence[str], rows: Iterator[Sequence[Any]]) -> int:
    total = 0
    statement = insert(table)
    while chunk := [dict(zip(columns, row, strict=True)) for row in islice(rows, _CHUNK)]:
        connection.execute(statement, chunk)
        total += len(chunk)
    return total


# ---------------------------------------------------------------------------------------------------- PostgreSQL


def _copy_text(connection: Connection, table: Table, columns: Sequence[str]) -> str:
    quote = connection.dialect.identifier_preparer.quote
    names = ", ".join(quote(name) for name in columns)
    return f"COPY {qualified_name(connection, table)} ({names}) FROM STDIN (FORMAT binary)"


def _wire_types(connection: Connection, table: Table, columns: Sequence[str]) -> list[str]:
    """Return what to declare to psycopg for each column. The server reads ``json`` and ``varchar`` as it reads text."""
    types = []
    for name in columns:
        column_type = table.c[name].type
        if isinstance(column_type, TokenType | JsonText | PlainText):
            types.append("text")
        elif isinstance(column_type, UtcMillis):
            types.append("timestamptz")
        else:
            compiled = column_type.dialect_impl(connection.dialect).compile(connection.dialect)
            types.append(compiled.partition("(")[0].strip().lower())
    return types


def _copy_psycopg(connection: Connection, table: Table, columns: Sequence[str], rows: Iterator[Sequence[Any]]) -> int:
    driver: Any = connection.connection.driver_connection
    total = 0
    with driver.cursor() as cursor, cursor.copy(_copy_text(connection, table, columns)) as copy:
        copy.set_types(_wire_types(connection, table, columns))
        write = copy.write_row
        for row in rows:
            write(row)
            total += 1
    return total


def _copy_psycopg_async(
    connection: Connection, table: Table, columns: Sequence[str], rows: Iterator[Sequence[Any]]
) -> int:
    driver: Any = connection.connection.driver_connection

    async def copy_all() -> int:
        total = 0
        async with driver.cursor() as cursor, cursor.copy(_copy_text(connection, table, columns)) as copy:
            copy.set_types(_wire_types(connection, table, columns))
            for row in rows:
                await copy.write_row(row)
                total += 1
        return total

    return await_only(copy_all())


def _copy_asyncpg(connection: Connection, table: Table, columns: Sequence[str], rows: Iterator[Sequence[Any]]) -> int:
    driver: Any = connection.connection.driver_connection
    schemas = connection.get_execution_options().get("schema_translate_map") or {}
    total = 0

    def counted() -> Iterator[Sequence[Any]]:
        nonlocal total
        for row in rows:
            total += 1
            yield row

    await_only(
        driver.copy_records_to_table(
            table.name,
            records=counted(),
            columns=list(columns),
            schema_name=schemas.get(table.schema, table.schema),
        )
    )
    return total


_COPIES = {
    ("psycopg", False): _copy_psycopg,
    ("psycopg", True): _copy_psycopg_async,
    ("asyncpg", True): _copy_asyncpg,
}


def _translated(connection: Connection, error: Exception) -> Exception:
    ours = translate_error(error)
    if ours is not None:
        return ours
    dbapi = connection.dialect.loaded_dbapi
    if not isinstance(error, dbapi.Error):
        # asyncpg's own classes are not those of SQLAlchemy's DBAPI facade: wrap by SQLSTATE class.
        integrity = str(getattr(error, "sqlstate", "")).startswith("23")
        error = (dbapi.IntegrityError if integrity else dbapi.Error)(str(error))
    wrapped: Exception = DBAPIError.instance("COPY", None, error, dbapi.Error, dialect=connection.dialect)
    return wrapped
