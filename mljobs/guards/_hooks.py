"""The ORM hooks, the triggers of a new table, the retention door, and what a driver raises in our own classes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from uuid import UUID
from weakref import ref

from sqlalchemy import event, inspect, select, text, update
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Mapper, Session, attributes, object_session
from sqlalchemy.sql.elements import ClauseElement

from mljobs.errors import InvalidTransitionError, InvalidValueError, JobExistsError, MlJobsError, TerminalStateError
from mljobs.guards._companions import (
    GUARDED_COLUMNS,
    TERMINAL_CONSTRAINT,
    TERMINAL_MESSAGE,
    TRANSITION_CONSTRAINT,
    TRANSITION_MESSAGE,
    companion_ddl,
    companion_names,
    schema_of,
)
from mljobs.states import MlJobStatus

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.orm import InstanceState

__all__ = ["companion_ddl", "enforce_sqlite", "retention", "translate_error"]

_RETENTION = "mljobs_retention"
_STARTED = "_mljobs_started"
_REQUIRED = ("kind", "target_name", "spec_json")


# -------------------------------------------------------------------------------------------------- ring 2: ORM hooks


def _stored(target: object, name: str) -> Any:
    """Return the value that the database holds for an attribute, as far as this instance knows."""
    history = attributes.get_history(target, name)
    if history.deleted:
        return history.deleted[0]
    return history.unchanged[0] if history.unchanged else None


def _changes(state: InstanceState[Any]) -> dict[str, tuple[object, object]]:
    """Return the net changes of guarded columns, ``{field: (old, new)}``; an unloaded old value is ``None``."""
    changes: dict[str, tuple[object, object]] = {}
    for name in (column for column in GUARDED_COLUMNS if column in state.committed_state):
        history = state.attrs[name].history
        if history.has_changes():
            changes[name] = (
                history.deleted[0] if history.deleted else None,
                history.added[0] if history.added else None,
            )
    return changes


_GUARDED = frozenset(GUARDED_COLUMNS)


def remember_start(job: Any) -> None:
    """Let the next flush know that the job was started since the last, whatever it has become by then."""
    attributes.instance_dict(job)[_STARTED] = job.started_at


def _check_update(mapper: Mapper[Any], connection: Connection, target: Any) -> None:
    state = attributes.instance_state(target)
    if state.committed_state.keys().isdisjoint(_GUARDED):  # a host's own columns stay writable
        return
    if "status" not in state.committed_state:
        present = state.dict.get("status")
        if present is not None and not present.is_terminal:  # the frequent case, before the histories are asked
            return
    changes = _changes(state)
    if not changes:
        return
    status = _stored(target, "status")
    if status is None:  # set without ever being loaded: ring 3 decides
        return
    if status.is_terminal:
        raise _terminal(target, status, changes)
    if "status" in changes:
        _, wanted = changes["status"]
        if not isinstance(wanted, MlJobStatus) or status.can_become(wanted):
            return
        _, started = changes.get("started_at", (None, None))
        if started is not None and started is state.dict.get(_STARTED):
            _record_start(mapper, connection, target, wanted)
            return
        raise InvalidTransitionError(_stored(target, "id"), status, wanted)


def _record_start(mapper: Mapper[Any], connection: Connection, target: Any, wanted: MlJobStatus) -> None:
    """Write the step between: a job that was started and completed since the last flush was running meanwhile."""
    table: Any = mapper.columns["status"].table
    job_id = _stored(target, "id")
    step = {"status": MlJobStatus.RUNNING, **{name: getattr(target, name) for name in ("started_at", "attempts")}}
    queued = (table.c.id == job_id, table.c.status == MlJobStatus.QUEUED)
    if connection.execute(update(table).where(*queued).values(step)).rowcount != 1:
        found = connection.execute(select(table.c.status, table.c.finished_at).where(table.c.id == job_id)).first()
        if found is None:  # the flush finds no row either, and says so
            return
        if found.status.is_terminal:
            raise TerminalStateError(job_id, found.status, found.finished_at, {"status": (found.status, wanted)})
        raise InvalidTransitionError(job_id, found.status, MlJobStatus.RUNNING)


def _check_delete(_mapper: Mapper[Any], _connection: Connection, target: Any) -> None:
    session = object_session(target)
    if session is not None and session.info.get(_RETENTION):
        return
    status = _stored(target, "status")
    if status is not None and status.is_terminal:
        raise _terminal(target, status, action="be deleted")


def _check_insert(mapper: Mapper[Any], _connection: Connection, target: Any) -> None:
    for name in _REQUIRED:
        if getattr(target, name) is None:
            raise InvalidValueError(name, None, "every job has one")
    values = attributes.instance_dict(target)
    for name in _required_of_host(mapper):
        if values.get(name) is None:
            raise InvalidValueError(
                name, None, f"{mapper.class_.__name__} needs it: the column is NOT NULL without a default"
            )
    # Deleting a record and adding one with its id in a single flush is a row switch: SQLAlchemy turns the pair into an
    # UPDATE for which neither before_update nor before_delete fires.
    session = object_session(target)
    if session is None or not session.deleted:
        return
    replaced = session.identity_map.get(mapper.identity_key_from_instance(target))
    if replaced is not None and replaced in session.deleted:
        status = _stored(replaced, "status")
        if status is not None and status.is_terminal:
            raise _terminal(replaced, status, action="be replaced")


@cache
def _required_of_host(mapper: Mapper[Any]) -> tuple[str, ...]:
    """Return the attributes that a host has added and without which no row can be inserted."""
    return tuple(
        mapper.get_property_by_column(column).key
        for table in mapper.tables
        for column in table.columns
        if column.name not in _GUARDED
        and not (column.nullable or column.primary_key or column.default or column.server_default)
        and column is not mapper.polymorphic_on
        and column is not mapper.version_id_col
        and mapper.columns.contains_column(column)
    )


def _terminal(
    target: Any,
    status: MlJobStatus,
    changes: dict[str, tuple[object, object]] | None = None,
    action: str = "change",
) -> TerminalStateError:
    return TerminalStateError(_stored(target, "id"), status, _stored(target, "finished_at"), changes, action)


def install_hooks(mixin: type) -> None:
    """Guard the flushes of every class that is mapped with ``mixin``, now or later."""
    event.listen(mixin, "before_update", _check_update, propagate=True)
    event.listen(mixin, "before_delete", _check_delete, propagate=True)
    event.listen(mixin, "before_insert", _check_insert, propagate=True)


# --------------------------------------------------------------------------------------------------- ring 3: triggers


def install_triggers(table: Table) -> None:
    """Create the triggers with the table and drop them with it, where a host uses ``metadata.create_all``."""
    _job_tables.append(ref(table, _job_tables.remove))

    @event.listens_for(table, "after_create")
    def create(_table: Table, connection: Connection, **_: object) -> None:
        for statement in companion_ddl(table, connection.dialect.name):
            connection.execute(statement)

    @event.listens_for(table, "after_drop")
    def drop(_table: Table, connection: Connection, **_: object) -> None:
        # The triggers went with the table; what stands beside it did not.
        for statement in companion_ddl(table, connection.dialect.name, create=False):
            if statement.drops_by_itself:
                connection.execute(statement)


_job_tables: list[ref[Table]] = []


def _known_tables() -> list[Table]:
    # A copy first: other threads define classes meanwhile, and iterating over a WeakSet would then fail.
    return [table for known in [*_job_tables] if (table := known()) is not None]


def set_retention_door(connection: Connection, table: Table, *, opened: bool) -> None:
    """Open or close the door through which finished records of ``table`` may be deleted, in this transaction only."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SET LOCAL mljobs.retention = '{'on' if opened else 'off'}'"))
        return
    preparer = connection.dialect.identifier_preparer
    schema = schema_of(connection, table)
    door = preparer.quote(companion_names(table.name)["door"])
    qualified = f"{preparer.quote(schema)}.{door}" if schema else door
    connection.execute(
        text(f"UPDATE {qualified} SET open = :open WHERE name = 'retention'"),  # noqa: S608 - quoted identifiers
        {"open": int(opened)},
    )


@contextmanager
def retention(session: Session, model: type[Any]) -> Iterator[None]:
    """Allow this session to delete finished records, until the block ends; updates stay refused.

    The door is open in this transaction only: no other connection sees it open, and a crash closes it.

    Args:
        session: The session that deletes, through the ORM or by ``delete(model)``.
        model: The mapped job class, e.g. ``MlJob``.
    """
    table: Table = inspect(model).local_table
    session.flush()  # what was pending before the block is still guarded
    session.info[_RETENTION] = True
    set_retention_door(_connection_of(session, model), table, opened=True)
    try:
        yield
        session.flush()
    except BaseException:
        session.info.pop(_RETENTION, None)
        # The transaction may be aborted; its rollback closes the door.
        raise
    session.info.pop(_RETENTION, None)
    set_retention_door(_connection_of(session, model), table, opened=False)


def _connection_of(session: Session, model: type[Any]) -> Connection:
    """Return the session's connection to the database of ``model``: a session may have several engines."""
    return session.connection(bind_arguments={"mapper": inspect(model)})


def enforce_sqlite(engine: Engine | AsyncEngine) -> None:
    """Make ``INSERT OR REPLACE`` fire delete triggers on every connection of a SQLite engine.

    The guard needs no pragma for a record's own key. It needs this one when a host adds a UNIQUE column of its own to
    a job table: REPLACE on that column would delete another, finished, row without any trigger.

    Args:
        engine: Sync or async; an engine of another database is left as it is.
    """
    sync_engine = engine if isinstance(engine, Engine) else engine.sync_engine
    if sync_engine.dialect.name != "sqlite":
        return

    @event.listens_for(sync_engine, "connect")
    def set_pragma(dbapi_connection: Any, _record: object) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute("PRAGMA recursive_triggers = ON")
        cursor.close()


# ------------------------------------------------------------------------------------------- driver error -> our error


def translate_error(error: BaseException | None) -> MlJobsError | None:
    """Return our error for what a driver raised when ring 3 refused a write; ``None`` for any other error.

    For hosts that work on a raw DBAPI connection; engines are translated without being asked.

    Args:
        error: An exception of psycopg, asyncpg, sqlite3 or aiosqlite, or SQLAlchemy's wrapper around one.
    """
    for seen in _causes(error):
        constraint, detail = _diagnosis(seen)
        fields = dict(part.partition("=")[::2] for part in (detail or "").split())
        job_id = UUID(fields["id"]) if "id" in fields else None
        status = MlJobStatus(fields["status"]) if "status" in fields else None
        if constraint == TERMINAL_CONSTRAINT:
            return TerminalStateError(job_id, status)
        if constraint == TRANSITION_CONSTRAINT:
            wanted = fields.get("wanted")
            known = MlJobStatus(wanted) if wanted in MlJobStatus.tokens() else None
            return InvalidTransitionError(job_id, status, known)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and what SQLAlchemy or a driver's facade has wrapped in it."""
    while error is not None:
        yield error
        error = getattr(error, "orig", None) or error.__cause__


def _diagnosis(error: BaseException) -> tuple[str | None, str | None]:
    """Return the constraint that a driver's error names, and its detail."""
    source = getattr(error, "diag", error)  # psycopg keeps them on .diag, asyncpg on the error
    constraint = getattr(source, "constraint_name", None)
    if constraint in _CONSTRAINTS:
        return constraint, _detail(error)
    message = error.args[0] if error.args else None
    return (_SQLITE_MESSAGES.get(message), None) if isinstance(message, str) else (None, None)


def _detail(error: BaseException) -> str | None:
    source = getattr(error, "diag", error)
    detail: str | None = getattr(source, "message_detail", None) or getattr(source, "detail", None)
    return detail


def second_record(error: BaseException | None) -> JobExistsError | None:
    """Return our error for a record whose id is there already; ``None`` for any other error.

    Only the operations ask. Everywhere else it stays an ``IntegrityError``, which hosts and their tools know.

    Args:
        error: What SQLAlchemy or a driver raised.
    """
    for seen in _causes(error):
        if _is_second(seen):
            found = _KEY_VALUE.search(_detail(seen) or "")
            return JobExistsError(UUID(found[1]) if found else None)
    return None


def _is_second(error: BaseException) -> bool:
    """Whether an id was to be there twice in a job table, as a driver tells it."""
    if getattr(error, "sqlstate", None) == _UNIQUE_VIOLATION:
        source = getattr(error, "diag", error)
        return any(
            table.name == getattr(source, "table_name", None)
            # PostgreSQL says the value to whoever may read the table; the words are of the server's language.
            and (
                _KEY_VALUE.search(_detail(error) or "") is not None
                or getattr(source, "constraint_name", None) in {table.primary_key.name, f"{table.name}_pkey"}
            )
            for table in _known_tables()
        )
    message = error.args[0] if error.args else None
    if not isinstance(message, str) or not message.startswith(_SQLITE_UNIQUE):
        return False
    return message.removeprefix(_SQLITE_UNIQUE) in {f"{table.name}.id" for table in _known_tables()}


_UNIQUE_VIOLATION = "23505"
_KEY_VALUE = re.compile(r"\(id\)=\(([0-9a-f-]{36})\)")
_SQLITE_UNIQUE = "UNIQUE constraint failed: "
_LOST_STATEMENT = ("26000", "42P05")  # a prepared statement that is not there, or is there already
_POOLER = (
    "mljobs: is this a pooler in transaction mode? Prepared statements do not survive there: with psycopg give the engine "
    'connect_args={"prepare_threshold": None}; asyncpg needs PgBouncer 1.21 or later with max_prepared_statements. '
    "See docs/pgbouncer.md."
)
_UNDEFINED_TABLE = "42P01"
_SQLITE_UNDEFINED = "no such table: "
_NO_TABLE = "mljobs: there is no table {}: run `mljobs upgrade`, or your own migrations"
_CONSTRAINTS = frozenset({TERMINAL_CONSTRAINT, TRANSITION_CONSTRAINT})
_SQLITE_MESSAGES = {TERMINAL_MESSAGE: TERMINAL_CONSTRAINT, TRANSITION_MESSAGE: TRANSITION_CONSTRAINT}


@event.listens_for(Engine, "handle_error")
def _translate(context: ExceptionContext) -> MlJobsError | None:
    error = context.sqlalchemy_exception
    if error is not None and getattr(context.original_exception, "sqlstate", None) in _LOST_STATEMENT:
        error.add_note(_POOLER)
    if error is not None and (missing := _missing_table(context.original_exception)):
        error.add_note(_NO_TABLE.format(missing))
    return translate_error(context.original_exception)


def _missing_table(error: BaseException) -> str | None:
    """Return the job table, or the table of leases, that a driver says is not there."""
    if getattr(error, "sqlstate", None) != _UNDEFINED_TABLE and not str(error).startswith(_SQLITE_UNDEFINED):
        return None
    told = str(error).partition("\n")[0]
    names = (name for table in _known_tables() for name in _beside(table))
    return next((name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", told)), None)


def _beside(table: Table) -> tuple[str, ...]:
    leases = table.info.get("mljobs")
    return (table.name,) if leases is None else (table.name, leases.name)


def is_expression(value: object) -> bool:
    """Whether ``value`` is SQL, which only the database can judge."""
    return isinstance(value, ClauseElement) or hasattr(value, "__clause_element__")
