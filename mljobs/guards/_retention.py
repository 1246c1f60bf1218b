"""Retention: the one way to delete finished records, on for one block of one transaction.

However the block is left, retention is off after it. Its statements stand between a savepoint and its release, so an
exception takes back that it was turned on, with everything else; a commit inside the block turns it off first; where there
is no transaction to end, the block refuses to begin.

PostgreSQL: ``SET LOCAL``, which no other session sees and no transaction survives. SQLite has nothing of the kind, and what
is written there can be committed by a driver that nobody asked. So the block makes two temporary triggers, which belong to
its connection: one turns retention on before a row is deleted, the other off after it, and between two statements it is off
for everybody. A trigger's statements cannot name a schema; for a table in an attached database the block sets the row
itself. The end of the block sets it back in any case: in a transaction of its own where the driver has committed meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, event, inspect, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.orm import Mapper, Session, scoped_session

from mljobs.errors import InvalidValueError
from mljobs.guards._beside import record_table_of
from mljobs.guards._companions import companion_names, listed, schema_of, short_name
from mljobs.states import TERMINAL

_BLOCKS = "mljobs_retention"
_NO_TRANSACTION = "25P01"
_AUTOCOMMIT = (
    "its connection commits each statement by itself (AUTOCOMMIT), and retention would stay on for everybody; "
    "give one that has transactions"
)

_NO_SESSION = "expected a Session: of a connection Session(connection), of an AsyncSession by run_sync"

_TEMPORARY = (("BEFORE", 1), ("AFTER", 0))


@dataclass(slots=True)
class _Block:
    """A block in which finished records may be deleted.

    Attributes:
        connection: In whose transaction.
        table: Whose records.
        by_trigger: Whether retention is on while a row is deleted, and off between two statements.
        is_on: Whether this block has turned it on.
    """

    connection: Connection
    table: Table
    by_trigger: bool
    is_on: bool = False

    def turn_on(self) -> None:
        for statement in _statements(self, on=True):
            self.connection.execute(text(statement))
        self.is_on = True

    def turn_off(self) -> None:
        self.is_on = False
        for statement in _statements(self, on=False):
            self.connection.execute(text(statement))


def retention_triggers(table: Table) -> tuple[str, str]:
    """Return the names of the temporary triggers of SQLite that turn retention on and off."""
    return short_name(f"{table.name}_retention_on"), short_name(f"{table.name}_retention_off")


def _statements(block: _Block, *, on: bool) -> Iterator[str]:
    connection, table = block.connection, block.table
    if connection.dialect.name == "postgresql":
        yield f"SET LOCAL mljobs.retention = '{'on' if on else 'off'}'"
        return
    quote = connection.dialect.identifier_preparer.quote
    schema = schema_of(connection, table)
    guard_table = quote(companion_names(table.name)["guard"])
    by_trigger = block.by_trigger and schema in (None, "main")
    for name, (when, value) in zip(retention_triggers(table), _TEMPORARY, strict=True):
        trigger = quote(name)
        if by_trigger and on:
            yield (
                f"CREATE TEMP TRIGGER {trigger} {when} DELETE ON main.{quote(table.name)} "  # noqa: S608 - quoted
                f"WHEN OLD.status IN ({listed(TERMINAL)}) "
                f"BEGIN UPDATE {guard_table} SET open = {value} WHERE name = 'retention'; END"
            )
        elif by_trigger:
            yield f"DROP TRIGGER IF EXISTS temp.{trigger}"
    if not (by_trigger and on):  # off too: a trigger of a host may keep ours from it, by RAISE(IGNORE)
        yield _row_set(connection, table, on=on)


def _row_set(connection: Connection, table: Table, *, on: bool) -> str:
    """Return the statement that sets SQLite's row for all."""
    quote, schema = connection.dialect.identifier_preparer.quote, schema_of(connection, table)
    guard_table = (f"{quote(schema)}." if schema else "") + quote(companion_names(table.name)["guard"])
    return f"UPDATE {guard_table} SET open = {int(on)} WHERE name = 'retention'"  # noqa: S608 - quoted


def _begin(connection: Connection, table: Table) -> None:
    """Begin the transaction in which retention is to be on; turn it off where somebody has left it on, on SQLite.

    Raises:
        InvalidValueError: The connection commits each statement by itself.
    """
    if connection.dialect.name != "sqlite":
        return
    connection.execute(text(_row_set(connection, table, on=False)))
    driver: Any = connection.connection.driver_connection
    if not driver.in_transaction:
        raise InvalidValueError("session", connection, _AUTOCOMMIT)


@contextmanager
def deletable(
    connection: Connection, table: Table, session: Session | None = None, mapper: Mapper[Any] | None = None
) -> Iterator[None]:
    """Let finished records of ``table`` be deleted until the block ends; an exception takes back what it deleted.

    Args:
        connection: In whose transaction.
        table: The job table.
        session: Whose connection it is; None where only statements of ours are in the block, and nothing commits.
        mapper: Of the job class, by which the session finds its connection.

    Raises:
        InvalidValueError: The connection commits each statement by itself.
    """
    blocks: list[_Block] = connection.info.setdefault(_BLOCKS, [])
    nested = any(block.is_on and block.table is table for block in blocks)
    if not nested:
        _begin(connection, table)
    savepoint = _savepoint(connection, session, mapper)
    block = _Block(connection, table, by_trigger=session is not None)
    blocks.append(block)
    try:
        if not nested:
            block.turn_on()
        yield
        if session is not None:
            session.flush()
        if savepoint.is_active:  # else the transaction has ended in the block, and retention with it
            if block.is_on:
                block.turn_off()
            _release(block, savepoint)
    except BaseException:
        _roll_back(block, savepoint)
        raise
    finally:
        blocks.remove(block)


def _savepoint(connection: Connection, session: Session | None, mapper: Mapper[Any] | None) -> Any:
    """Begin a savepoint.

    Raises:
        InvalidValueError: The connection commits each statement by itself.
    """
    try:
        if session is None:
            return connection.begin_nested()
        savepoint = session.begin_nested()
        try:
            session.connection(bind_arguments={"mapper": mapper})  # only now is it sent
        except BaseException:
            savepoint.rollback()
            raise
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == _NO_TRANSACTION:
            raise InvalidValueError("session", connection, _AUTOCOMMIT) from error
        raise
    return savepoint


def _roll_back(block: _Block, savepoint: Any) -> None:
    """Take back that retention was turned on; where that is not possible, give up the connection with its transaction."""
    try:
        if savepoint.is_active:
            savepoint.rollback()
        elif block.is_on:
            block.turn_off()
    except BaseException:
        _give_up(block)
        raise
    finally:
        block.is_on = False


def _release(block: _Block, savepoint: Any) -> None:
    try:
        savepoint.commit()
    except DBAPIError:  # the driver has committed past it
        _give_up(block)
        raise


def _give_up(block: _Block) -> None:
    """Give the connection up, and its transaction with it."""
    if block.connection.dialect.name == "sqlite":
        _turn_off_in_a_transaction(block)
    with suppress(InvalidRequestError):
        block.connection.invalidate()


def _turn_off_in_a_transaction(block: _Block) -> None:
    """Turn retention off where the driver has committed that it is on, in a transaction that nobody takes back."""
    connection = block.connection
    dbapi: Any = connection.dialect.loaded_dbapi
    with suppress(InvalidRequestError, dbapi.Error):
        driver = connection.connection
        driver.rollback()
        cursor = driver.cursor()
        for statement in _statements(block, on=False):
            cursor.execute(statement)
        cursor.close()
        driver.commit()


def is_on(session: Session | None) -> bool:
    """Whether this session is in a block of retention."""
    return session is not None and bool(session.info.get(_BLOCKS))


@event.listens_for(Session, "before_commit")
def _turn_off_before_commit(session: Session) -> None:
    """Turn retention off before the transaction ends: what comes after in the block is guarded again."""
    connections = session.info.get(_BLOCKS)
    if connections and session.get_nested_transaction() is None:
        for connection in connections:
            for block in connection.info.get(_BLOCKS, ()):
                if block.is_on:
                    block.turn_off()
        connections.clear()


@contextmanager
def retention(session: Session, model: type[Any]) -> Iterator[None]:
    """Allow this session to delete finished records, until the block or its transaction ends; updates stay refused.

    It is so for this block only: for no other connection, and not after a crash, an exception or a commit.
    What the block has deleted before an exception is taken back.

    Args:
        session: The session that deletes, through the ORM or by ``delete(model)``.
        model: The mapped job class, e.g. ``MlJob``.

    Raises:
        InvalidValueError: It is no ``Session``; or its connection commits each statement by itself (AUTOCOMMIT).
    """
    if not isinstance(session, Session | scoped_session):
        raise InvalidValueError("session", session, _NO_SESSION)
    session.flush()  # what was pending before the block is still guarded
    connection = session.connection(bind_arguments={"mapper": inspect(model)})
    connections: list[Connection] = session.info.setdefault(_BLOCKS, [])
    with deletable(connection, record_table_of(model), session, inspect(model)):
        connections.append(connection)
        try:
            yield
            session.flush()
        finally:
            with suppress(ValueError):  # a commit in the block has turned it off everywhere
                connections.remove(connection)
