"""Insert rows of Python values by the database's bulk route: COPY, or ``executemany`` on SQLite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from sqlalchemy import Boolean, Integer, SmallInteger, String, Text, Uuid, cast, func, insert, select
from sqlalchemy.types import BigInteger, Date, DateTime, Double, Float, LargeBinary, TypeEngine

from mljobs._values import storable_json, storable_text
from mljobs.db._copy import CHUNK, Row, copy_in
from mljobs.db._wire import insert_wire
from mljobs.guards._companions import qualified_name
from mljobs.types import JobId, JsonText, PlainText, TokenType, UtcMillis

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect, Table

_Check = Callable[[Any], Any]


def insert_rows(connection: Connection, table: Table, columns: Sequence[str], rows: Iterable[Row]) -> int:
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
    if connection.dialect.name == "sqlite" and _names_all_with_defaults(table, columns):
        stored = _stored(connection.dialect, table, columns, iter(rows))
        return insert_wire(connection, table, [table.c[name] for name in columns], stored)
    checked = _checked(table, columns, rows)
    types = _copy_types(table, columns) if connection.dialect.name == "postgresql" else None
    if types is None or row_security(connection, table):
        return _insert_chunks(connection, table, columns, checked)
    return copy_in(connection, table, columns, checked, types)


def row_security(connection: Connection, table: Table) -> bool:
    """Whether policies bind this role, under which PostgreSQL refuses COPY into the table."""
    asked = select(func.row_security_active(cast(qualified_name(connection, table), Text)))
    return bool(connection.scalar(asked))


def _names_all_with_defaults(table: Table, columns: Sequence[str]) -> bool:
    """Whether no column is left out that SQLAlchemy would give a value."""
    return all(column.default is None or column.name in columns for column in table.columns)


def _stored(dialect: Dialect, table: Table, columns: Sequence[str], rows: Iterator[Row]) -> Iterator[Row]:
    """Yield rows as the columns' types store them, which check their values too: column by column, for the speed of it."""
    processes = [table.c[name].type.dialect_impl(dialect).bind_processor(dialect) for name in columns]
    while chunk := list(islice(rows, CHUNK)):
        yield from zip(
            *(
                values if process is None or values.count(None) == len(values) else map(process, values)
                for process, values in zip(processes, zip(*chunk, strict=True), strict=True)
            ),
            strict=True,
        )


def _checked(table: Table, columns: Sequence[str], rows: Iterable[Row]) -> Iterator[Row]:
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


def _insert_chunks(connection: Connection, table: Table, columns: Sequence[str], rows: Iterator[Row]) -> int:
    total = 0
    statement = insert(table)
    while chunk := [dict(zip(columns, row, strict=True)) for row in islice(rows, CHUNK)]:
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
