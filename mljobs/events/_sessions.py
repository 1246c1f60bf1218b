"""Finished jobs of a session's transaction, by flushes and by UPDATEs through ``session.execute``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import Any
from uuid import UUID
from weakref import ref

from sqlalchemy import Connection, Table, event, inspect, select
from sqlalchemy.orm import Mapper, ORMExecuteState, Session, SessionTransaction, attributes

from mljobs.db._binds import Bind, connection_for, resolve
from mljobs.events._connections import ConnectionPending, pending_of_connection
from mljobs.events._delivering import Origin, deliver, has_listener, subscribed
from mljobs.events._pending import Pending, finished_among
from mljobs.guards._beside import record_table_of
from mljobs.record._mixin import MlJobMixin
from mljobs.states import ACTIVE, MlJobStatus

_INFO_KEY = "mljobs.finished"


class SessionPending(Pending):
    """Finished jobs of a session's transaction.

    Attributes:
        flushed: Records of the present flush that may have finished.
        committed: Whether the outermost transaction has.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = ref(session)
        self.flushed: list[tuple[type[MlJobMixin], UUID]] = []
        self.committed = False

    @property
    def origin(self) -> Origin:
        """Through what they finished."""
        return Origin(self._session(), self.store)

    def add(self, jobs: Iterable[Any]) -> None:
        """See ``Pending.add``."""
        session = self._session()
        around: list[SessionTransaction] = []
        transaction = None if session is None else session.get_nested_transaction()
        while transaction is not None:
            if transaction.nested:
                around.append(transaction)
            transaction = transaction.parent
        for savepoint in reversed(around):
            self.enter(savepoint)
        super().add(jobs)


def pending_of_session(session: Session) -> SessionPending:
    """Return what is pending beside this session's transaction."""
    pending: SessionPending | None = session.info.get(_INFO_KEY)
    if pending is None:
        pending = session.info[_INFO_KEY] = SessionPending(session)
    return pending


@cache
def install() -> None:
    """Listen to sessions and flushes, from the first subscription on: before it, nothing costs anything."""
    event.listen(MlJobMixin, "after_update", partial(_after_write, new=False), propagate=True)
    event.listen(MlJobMixin, "after_insert", partial(_after_write, new=True), propagate=True)
    event.listen(Session, "after_flush", _after_flush)
    event.listen(Session, "after_commit", _after_commit)
    event.listen(Session, "after_transaction_end", _after_transaction_end)
    event.listen(Session, "do_orm_execute", _on_execute)


def _after_write(_mapper: Mapper[Any], _connection: Connection, job: Any, *, new: bool) -> None:
    if not subscribed():
        return
    history = attributes.instance_state(job).attrs.status.history
    # A new record that was given a final state is history; one that took it since has finished here.
    if not history.added or (new and not history.deleted):
        return
    status = history.added[0]
    if isinstance(status, MlJobStatus) and not status.is_terminal:
        return
    session = attributes.instance_state(job).session
    if session is not None:
        pending_of_session(session).flushed.append((type(job), job.id))


def _after_flush(session: Session, _context: object) -> None:
    pending: SessionPending | None = session.info.get(_INFO_KEY)
    if pending is None or not pending.flushed:
        return
    flushed, pending.flushed = pending.flushed, []
    for model in dict.fromkeys(model for model, _ in flushed):
        add_finished(session, model, [job_id for of, job_id in flushed if of is model])


def _after_commit(session: Session) -> None:
    pending: SessionPending | None = session.info.get(_INFO_KEY)
    if pending is None:
        return
    nested = session.get_nested_transaction()
    if nested is None:
        pending.committed = True
    else:
        pending.release(nested)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    pending: SessionPending | None = session.info.get(_INFO_KEY)
    if pending is None:
        return
    if transaction.nested:
        pending.flushed = []
        if pending.knows(transaction):  # not released, so rolled back
            pending.forget(transaction)
        return
    if transaction.parent is not None:
        return
    jobs, committed = pending.take(), pending.committed
    pending.flushed, pending.committed = [], False
    if not committed or not jobs:
        return
    outer = _still_open(session, jobs[0])
    if outer is None:
        deliver(jobs, pending.origin)
    else:
        pending_of_connection(outer).add(jobs)


def _still_open(session: Session, job: Any) -> Connection | None:
    """Return the connection whose transaction somebody else has yet to commit, if the session only joined it."""
    bind = session.get_bind(inspect(type(job)))
    return bind if isinstance(bind, Connection) and bind.in_transaction() else None


def _on_execute(state: ORMExecuteState) -> Any:
    """Find out which jobs an UPDATE finishes: those that it matches and that have not finished yet are locked first."""
    if not subscribed() or not state.is_update:
        return None
    model = _updated(state)
    if model is None:
        return None
    statement: Any = state.statement
    session = state.session
    if not has_listener(pending_of_session(session).origin):
        return None
    given = state.parameters
    which = select(model.id).where(model.status.in_(ACTIVE)).with_for_update(of=record_table_of(model))
    ids: list[UUID] = []
    if isinstance(given, Sequence) and statement.whereclause is None:  # by primary key
        ids.extend(session.scalars(which.where(model.id.in_([row["id"] for row in given if "id" in row]))))
    else:
        if statement.whereclause is not None:
            which = which.where(statement.whereclause)
        for parameters in given if isinstance(given, Sequence) else [given or {}]:
            ids.extend(session.scalars(which, parameters))
    if not ids:
        return None
    result = state.invoke_statement()
    add_finished(session, model, ids)
    return result


def _updated(state: ORMExecuteState) -> type[MlJobMixin] | None:
    """Return the job class that an UPDATE, by the ORM or by Core, writes to."""
    mapper = state.bind_mapper if state.is_orm_statement else None
    if mapper is not None:
        return mapper.class_ if issubclass(mapper.class_, MlJobMixin) else None
    table = getattr(state.statement, "table", None)
    model: type[MlJobMixin] | None = table.info.get("mljobs_model") if isinstance(table, Table) else None
    return model


def pending_of(bind: Bind) -> SessionPending | ConnectionPending:
    """Return what is pending beside the transaction of a session or connection."""
    resolved = resolve(bind)
    return pending_of_session(resolved) if isinstance(resolved, Session) else pending_of_connection(resolved)


def add_finished(bind: Bind, model: type[MlJobMixin], ids: Iterable[UUID]) -> None:
    """Keep what these jobs are now, if they have finished, until the transaction commits.

    Args:
        bind: Where they finished.
        model: The mapped job class.
        ids: Which.
    """
    wanted = list(ids)
    if not wanted:
        return
    pending = pending_of(bind)
    if has_listener(pending.origin):
        pending.add(finished_among(connection_for(bind, model), model, wanted))
