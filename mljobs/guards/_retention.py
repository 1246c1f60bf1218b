"""The retention door: the one way to delete finished records, open for one block of one transaction.

However the block is left, the door is shut. Its statements stand between a savepoint and its release, so an exception takes
the opening back with everything else; a commit inside the block shuts it first; where there is no transaction to end, the
block refuses to begin.

PostgreSQL: ``SET LOCAL``, which no other session sees and no transaction survives. SQLite has nothing of the kind, and what
is written there can be committed by a driver that nobody asked. So the block makes two temporary triggers, which belong to
its connection: one opens the door before a row is deleted, the other shuts it after, and between two statements it is shut
for everybody. A trigger's statements cannot name a schema; for a table in an attached database the block opens the row
itself. The end of the block shuts the row in any case: in a transaction of its own where the driver has committed meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, event, inspect, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.orm import Mapper, Session

from mljobs._fields import NAMES
from mljobs.errors import InvalidValueError
from mljobs.guards._companions import companion_names, listed, schema_of, short_name
from mljobs.states import TERMINAL

_DOORS = "mljobs_retention"
_NO_TRANSACTION = "25P01"
_AUTOCOMMIT = (
    "its connection commits each statement by itself (AUTOCOMMIT), and the door would stay open for everybody; "
    "give one that has transactions"
)

_TEMPORARY = (("BEFORE", 1), ("AFTER", 0))


@dataclass(slots=True)
class _Door:
    """An open door.

    Attributes:
        connection: Whose transaction it is open in.
        table: Whose finished records may be deleted.
        by_trigger: Whether it is open while a row is deleted, and shut between two statements.
        is_open: Whether this block has it open.
    """

    connection: Connection
    table: Table
    by_trigger: bool
    is_open: bool = False

    def open(self) -> None:
        for statement in _statements(self, opened=True):
            self.connection.execute(text(statement))
        self.is_open = True

    def shut(self) -> None:
        self.is_open = False
        for statement in _statements(self, opened=False):
            self.connection.execute(text(statement))


def door_triggers(table: Table) -> tuple[str, str]:
    """Return the names of the temporary triggers of SQLite that open and shut the door."""
    return short_name(f"{table.name}_door_open"), short_name(f"{table.name}_door_shut")


def _statements(of: _Door, *, opened: bool) -> Iterator[str]:
    connection, table = of.connection, of.table
    if connection.dialect.name == "postgresql":
        yield f"SET LOCAL mljobs.retention = '{'on' if opened else 'off'}'"
        return
    quote = connection.dialect.identifier_preparer.quote
    schema = schema_of(connection, table)
    door = quote(companion_names(table.name)["door"])
    by_trigger = of.by_trigger and schema in (None, "main")
    for name, (when, value) in zip(door_triggers(table), _TEMPORARY, strict=True):
        trigger = quote(name)
        if by_trigger and opened:
            yield (
                f"CREATE TEMP TRIGGER {trigger} {when} DELETE ON main.{quote(table.name)} "  # noqa: S608 - quoted
                f"WHEN OLD.status IN ({listed(TERMINAL)}) "
                f"BEGIN UPDATE {door} SET open = {value} WHERE name = 'retention'; END"
            )
        elif by_trigger:
            yield f"DROP TRIGGER IF EXISTS temp.{trigger}"
    if not (by_trigger and opened):  # to shut it too: a trigger of a host may keep ours from it, by RAISE(IGNORE)
        prefix = f"{quote(schema)}." if schema else ""
        yield f"UPDATE {prefix}{door} SET open = {int(opened)} WHERE name = 'retention'"  # noqa: S608 - quoted


def record_table_of(model: type[Any]) -> Table:
    """Return the table that holds the record of a mapped class; a joined subclass has one of its own beside it."""
    return next(
        table for table in inspect(model).tables if isinstance(table, Table) and set(NAMES) <= set(table.c.keys())
    )


def _begin(connection: Connection, table: Table) -> None:
    """Begin the transaction that the door is to be open in, and shut a door that somebody has left open on SQLite.

    Raises:
        InvalidValueError: The connection commits each statement by itself.
    """
    if connection.dialect.name != "sqlite":
        return
    quote, schema = connection.dialect.identifier_preparer.quote, schema_of(connection, table)
    door = (f"{quote(schema)}." if schema else "") + quote(companion_names(table.name)["door"])
    connection.execute(text(f"UPDATE {door} SET open = 0 WHERE name = 'retention'"))  # noqa: S608 - quoted
    driver: Any = connection.connection.driver_connection
    if not driver.in_transaction:
        raise InvalidValueError("session", connection, _AUTOCOMMIT)


@contextmanager
def open_door(
    connection: Connection, table: Table, session: Session | None = None, mapper: Mapper[Any] | None = None
) -> Iterator[None]:
    """Open the door for finished records of ``table`` until the block ends; an exception takes back what it deleted.

    Args:
        connection: In whose transaction.
        table: The job table.
        session: Whose connection it is; None where only statements of ours are in the block, and nothing commits.
        mapper: Of the job class, by which the session finds its connection.

    Raises:
        InvalidValueError: The connection commits each statement by itself.
    """
    doors: list[_Door] = connection.info.setdefault(_DOORS, [])
    nested = any(door.is_open and door.table is table for door in doors)
    if not nested:
        _begin(connection, table)
    savepoint = _savepoint(connection, session, mapper)
    door = _Door(connection, table, by_trigger=session is not None)
    doors.append(door)
    try:
        if not nested:
            door.open()
        yield
        if session is not None:
            session.flush()
        if savepoint.is_active:  # else the transaction has ended in the block, and the door with it
            if door.is_open:
                door.shut()
            _release(door, savepoint)
    except BaseException:
        _shut_by_rollback(door, savepoint)
        raise
    finally:
        doors.remove(door)


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


def _shut_by_rollback(door: _Door, savepoint: Any) -> None:
    """Take back the opening; where that is not possible, give the connection up, and its transaction with it."""
    try:
        if savepoint.is_active:
            savepoint.rollback()
        elif door.is_open:
            door.shut()
    except BaseException:
        _give_up(door)
        raise
    finally:
        door.is_open = False


def _release(door: _Door, savepoint: Any) -> None:
    try:
        savepoint.commit()
    except DBAPIError:  # the driver has committed past it
        _give_up(door)
        raise


def _give_up(door: _Door) -> None:
    """Give the connection up, and its transaction with it."""
    if door.connection.dialect.name == "sqlite":
        _shut_what_was_committed(door)
    with suppress(InvalidRequestError):
        door.connection.invalidate()


def _shut_what_was_committed(door: _Door) -> None:
    """Shut a door that the driver has committed while it was open, in a transaction that nobody takes back."""
    connection = door.connection
    dbapi: Any = connection.dialect.loaded_dbapi
    with suppress(InvalidRequestError, dbapi.Error):
        driver = connection.connection
        driver.rollback()
        cursor = driver.cursor()
        for statement in _statements(door, opened=False):
            cursor.execute(statement)
        cursor.close()
        driver.commit()


def is_open(session: Session | None) -> bool:
    """Whether a block of this session has the door open."""
    return session is not None and bool(session.info.get(_DOORS))


@event.listens_for(Session, "before_commit")
def _shut_before_commit(session: Session) -> None:
    """Shut every door before the transaction ends: what comes after in the block is guarded again."""
    doors = session.info.get(_DOORS)
    if doors and session.get_nested_transaction() is None:
        for connection in doors:
            for door in connection.info.get(_DOORS, ()):
                if door.is_open:
                    door.shut()
        doors.clear()


@contextmanager
def retention(session: Session, model: type[Any]) -> Iterator[None]:
    """Allow this session to delete finished records, until the block or its transaction ends; updates stay refused.

    The door is open for this block only: no other connection sees it open, and a crash, an exception or a commit shuts it.
    What the block has deleted before an exception is taken back.

    Args:
        session: The session that deletes, through the ORM or by ``delete(model)``.
        model: The mapped job class, e.g. ``MlJob``.

    Raises:
        InvalidValueError: The session's connection commits each statement by itself (AUTOCOMMIT).
    """
    session.flush()  # what was pending before the block is still guarded
    connection = session.connection(bind_arguments={"mapper": inspect(model)})
    doors: list[Connection] = session.info.setdefault(_DOORS, [])
    with open_door(connection, record_table_of(model), session, inspect(model)):
        doors.append(connection)
        try:
            yield
            session.flush()
        finally:
            with suppress(ValueError):  # a commit in the block has shut them all
                doors.remove(connection)
