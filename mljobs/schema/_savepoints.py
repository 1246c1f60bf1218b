"""Savepoints in which a schema is changed or compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, NestedTransaction, text
from sqlalchemy.exc import DBAPIError

from mljobs.errors import InvalidValueError


def savepoint(connection: Connection) -> NestedTransaction:
    """Begin a savepoint.

    Raises:
        InvalidValueError: The connection commits each statement by itself.
    """
    try:
        return connection.begin_nested()
    except DBAPIError as error:
        if sqlstate(error) == "25P01":  # no transaction to have a savepoint in
            raise InvalidValueError(
                "target", connection, "it is in AUTOCOMMIT, and this needs a transaction; give the engine instead"
            ) from error
        raise


@contextmanager
def as_by_default(connection: Connection) -> Iterator[None]:
    """Have PostgreSQL read and write definitions as by default in the block, whatever a database or role has set."""
    if connection.dialect.name != "postgresql":
        yield
        return
    undone = savepoint(connection)
    try:
        connection.execute(_DEFAULTS)
        yield
    finally:
        undone.rollback()


_DEFAULTS = text("""\
SELECT set_config('quote_all_identifiers', 'off', true), set_config('standard_conforming_strings', 'on', true)""")


def sqlstate(error: DBAPIError) -> str | None:
    """Return PostgreSQL's code of an error; None of SQLite's."""
    state: str | None = getattr(error.orig, "sqlstate", None)
    return state
