"""Many cases in one test, on one database: each is named in the failure that it causes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine


@contextmanager
def case(*names: object) -> Iterator[None]:
    """Say in the failure of this block which case it was."""
    try:
        yield
    except BaseException as failure:
        failure.add_note(f"the case: {', '.join(map(ascii, names))}")
        raise


@contextmanager
def undone(engine: Engine) -> Iterator[Connection]:
    """Yield a connection in a transaction that is rolled back, with all that it did to the schema, on both databases."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN")  # sqlite3 begins none before DDL
        try:
            yield connection
        finally:
            connection.rollback()
