"""The ORM hooks, and the triggers of a new table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy import event, false, select, update
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Mapper, Session, attributes, object_session
from sqlalchemy.sql.ddl import SchemaDropper
from sqlalchemy.sql.elements import ClauseElement

from mljobs._fields import NAMES
from mljobs.errors import (
    InvalidTransitionError,
    InvalidValueError,
    JobHeldError,
    LeaseLostError,
    TerminalStateError,
)
from mljobs.guards._beside import leases_of
from mljobs.guards._companions import companion_ddl
from mljobs.guards._errors import remember_table
from mljobs.guards._retention import is_on
from mljobs.states import ACTIVE, MlJobStatus

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.orm import InstanceState

_STARTED = "_mljobs_started"
_REQUIRED = ("kind", "target_name", "spec_json")


# -------------------------------------------------------------------------------------------------- ring 2: ORM hooks


def _stored(target: object, name: str) -> Any:
    """Return the value that the database holds for an attribute, as far as this instance knows."""
    history = attributes.get_history(target, name)
    if history.deleted:
        return history.deleted[0]
    return history.unchanged[0] if history.unchanged else None


def _stored_id(target: object) -> Any:
    """Return what ``_stored`` does for the id, which hardly ever changes."""
    state = attributes.instance_state(target)
    return _stored(target, "id") if "id" in state.committed_state else state.dict.get("id") or _stored(target, "id")


def _changes(state: InstanceState[Any]) -> dict[str, tuple[object, object]]:
    """Return the net changes of guarded columns, ``{field: (old, new)}``; an unloaded old value is ``None``."""
    changes: dict[str, tuple[object, object]] = {}
    for name in (column for column in NAMES if column in state.committed_state):
        history = state.attrs[name].history
        if history.has_changes():
            changes[name] = (
                history.deleted[0] if history.deleted else None,
                history.added[0] if history.added else None,
            )
    return changes


_GUARDED = frozenset(NAMES)


def remember_start(job: Any) -> None:
    """Let the next flush know that the job was started since the last, whatever it has become by then."""
    attributes.instance_dict(job)[_STARTED] = job.started_at


def _check_update(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    """Look at each record of a flush, and closer at what is not the frequent case, for which no histories are asked."""
    committed = state.committed_state
    if _GUARDED.isdisjoint(committed):  # a host's own columns stay writable
        return
    present = state.dict
    if "status" in committed or present.get("status") not in ACTIVE:
        _check_step(mapper, connection, state.obj())
    if present.get("lease") is not None or "lease" in committed:
        _check_lease(mapper, connection, state.obj())


def _check_step(mapper: Mapper[Any], connection: Connection, target: Any) -> None:
    """Refuse a change of a finished job, and an illegal step."""
    state = attributes.instance_state(target)
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
        _, started = changes.get("started_at", (None, None))
        if not isinstance(wanted, MlJobStatus):
            return
        if status.can_become(wanted):
            if wanted.is_terminal and started is not None and _stored(target, "lease") is None:
                _check_attempt(target, wanted, changes)
            return
        if started is not None and started is state.dict.get(_STARTED):
            _record_start(mapper, connection, target, wanted)
            return
        raise InvalidTransitionError(_stored(target, "id"), status, wanted)


def _check_attempt(target: Any, wanted: MlJobStatus, changes: dict[str, tuple[object, object]]) -> None:
    """Refuse the end of an attempt that is over: ``merge`` of a record that failed after the job had been put back.

    A start that ends in the same flush counts an attempt; a record of another program (KV JSON) counts none.
    """
    attempts = attributes.instance_dict(target).get("attempts")
    before = changes["attempts"][0] if "attempts" in changes else attempts
    if isinstance(attempts, int) and isinstance(before, int) and 0 < attempts <= before:
        advice = f"what was loaded of its attempt {attempts} is out of date: read the record again"
        raise InvalidTransitionError(_stored(target, "id"), _stored(target, "status"), wanted, advice)


_OF_THE_CLAIM = ("worker", "attempts", "started_at")
_SET_BY_CLAIM = frozenset({"lease", *_OF_THE_CLAIM})


def _check_lease(mapper: Mapper[Any], connection: Connection, target: Any) -> None:
    """Refuse to write a record that names a lease, unless its row names it too, until the transaction ends.

    Raises:
        LeaseLostError: The row names another lease, or none.
        JobHeldError: What a claim sets would change under the lease of a worker.
        InvalidValueError: The lease would go, and the job stay as it is.
        TerminalStateError: The job has finished meanwhile.
    """
    state = attributes.instance_state(target)
    committed = state.committed_state
    job_id, wanted = _stored_id(target), state.dict.get("lease")
    lease = committed.get("lease", wanted)
    if isinstance(wanted, int) and wanted != lease:  # by merge; only a claim makes a lease
        raise LeaseLostError(job_id, wanted)
    if not isinstance(lease, int):  # set without ever being loaded
        return
    table: Any = mapper.columns["status"].table
    if not _SET_BY_CLAIM.isdisjoint(committed):
        changes = _changes(state)
        if any(name in changes and changes[name][1] is not None for name in _OF_THE_CLAIM):
            raise _held(connection, table, job_id, lease)
        if "lease" in changes and "status" not in changes:
            raise InvalidValueError(
                "lease", wanted, "it goes when the job finishes or is requeued: call the record's method"
            )
    found = _locked(mapper, connection, target, job_id)
    if found is None or found[1] == lease:  # where no row is there, the flush says so
        return
    if found[2].is_terminal:
        raise TerminalStateError(job_id, found[2], found[3], _changes(state))
    raise LeaseLostError(job_id, lease)


_Rows = dict[tuple[Connection, Any, Any], Any]
_LOOKED_AT: WeakKeyDictionary[Session, _Rows] = WeakKeyDictionary()
"""What the present flush of a session has locked and not yet checked, by connection, table and id."""
_AT_ONCE = 500


def _locked(mapper: Mapper[Any], connection: Connection, target: Any, job_id: Any) -> Any:
    """Return the present id, lease, status and end of a row, which nobody else changes until the commit.

    The first record of a flush has the rows of all of them locked, for a round trip each costs as much as the whole flush.
    """
    table: Any = mapper.columns["status"].table
    session = object_session(target)
    if session is None:
        return _lock(connection, table, [job_id]).get((connection, table, job_id))
    rows = _LOOKED_AT.get(session)
    if rows is None:
        rows = _LOOKED_AT[session] = {}
        event.listen(session, "after_flush", _forget)
        event.listen(session, "after_soft_rollback", _forget)
    if (connection, table, job_id) not in rows:
        ids = {job_id, *(_stored_id(job) for job in session.dirty if _is_written_under_lease(mapper, job))}
        rows |= _lock(connection, table, sorted(ids, key=attrgetter("int")))
    return rows.pop((connection, table, job_id), None)


def _is_written_under_lease(mapper: Mapper[Any], job: object) -> bool:
    state = attributes.instance_state(job)
    if state.mapper.base_mapper is not mapper.base_mapper or _GUARDED.isdisjoint(state.committed_state):
        return False
    return isinstance(state.committed_state.get("lease", state.dict.get("lease")), int)


def _forget(session: Session, _: object) -> None:
    _LOOKED_AT[session].clear()


def _lock(connection: Connection, table: Any, ids: Sequence[Any]) -> _Rows:
    if connection.dialect.name == "sqlite":  # an UPDATE of no row takes the write lock all the same
        connection.execute(update(table).where(false()).values(lease=table.c.lease))
    columns = (table.c.id, table.c.lease, table.c.status, table.c.finished_at)
    rows: _Rows = dict.fromkeys((connection, table, one) for one in ids)
    for start in range(0, len(ids), _AT_ONCE):
        some = table.c.id.in_(ids[start : start + _AT_ONCE])
        statement = select(*columns).where(some).order_by(table.c.id).with_for_update(key_share=True)
        rows |= {(connection, table, row[0]): row for row in connection.execute(statement)}
    return rows


def _held(connection: Connection, table: Any, job_id: Any, lease: int) -> JobHeldError | LeaseLostError:
    leases = leases_of(table)
    found = connection.execute(select(leases.c.worker, leases.c.expires_at).where(leases.c.token == lease)).first()
    return LeaseLostError(job_id, lease) if found is None else JobHeldError(job_id, found.worker, found.expires_at)


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
    if is_on(object_session(target)):
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
    # Called as it is: SQLAlchemy's wrapper, which hands over the record and drops a result, takes longer than the check.
    event.listen(mixin, "before_update", _check_update, propagate=True, raw=True, retval=True)
    event.listen(mixin, "before_delete", _check_delete, propagate=True)
    event.listen(mixin, "before_insert", _check_insert, propagate=True)


@event.listens_for(Session, "after_begin")
def _send_no_notifications(session: Session, _: object, connection: Connection) -> None:
    """Let a two-phase commit be one beside workers and watchers that sleep: they see its jobs when they look next."""
    if session.twophase and connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SELECT set_config('mljobs.notify', 'off', true)")


# --------------------------------------------------------------------------------------------------- ring 3: triggers


def install_triggers(table: Table) -> None:
    """Create the triggers with the table and drop them with it, where a host uses ``metadata.create_all``.

    The listeners go with a copy by ``Table.to_metadata``, so they look at the table that is created and not at this one.
    """
    remember_table(table)

    @event.listens_for(table, "after_create", propagate=True)
    def create(created: Table, connection: Connection, **_: object) -> None:
        remember_table(created)
        for statement in companion_ddl(created, connection.dialect.name):
            connection.execute(statement)

    @event.listens_for(table, "after_drop", propagate=True)
    def drop(dropped: Table, connection: Connection, _ddl_runner: object = None, **_: object) -> None:
        if not isinstance(_ddl_runner, SchemaDropper):
            return  # Alembic's: a batch has made the table anew, and gives it this name
        # The triggers went with the table; what stands beside it did not.
        for statement in companion_ddl(dropped, connection.dialect.name, create=False):
            if statement.drops_by_itself:
                connection.execute(statement)


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


def is_expression(value: object) -> bool:
    """Whether ``value`` is SQL, which only the database can judge."""
    return isinstance(value, ClauseElement) or hasattr(value, "__clause_element__")
