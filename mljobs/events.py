"""Tell the host that a job has finished: after the commit, once, with the record.

A job that finishes is read in the transaction in which it does, for it never changes again, and is kept beside that
transaction until it commits. What a rollback, or the rollback to a savepoint, takes back is forgotten.

Who sees what:

- a session: flushes, ``update(...)`` through ``session.execute``, and every operation of :mod:`mljobs.jobs`
- a store and a worker: every operation
- a Core connection: every operation; told when it begins its next transaction or is given back

What goes past all of these (raw SQL, another process) is seen by ``store.watch`` and ``store.wait``.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from inspect import isawaitable, iscoroutinefunction
from typing import Any, Self
from uuid import UUID
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Connection, Engine, Table, event, inspect, select
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.orm import (
    Mapper,
    ORMExecuteState,
    Session,
    SessionTransaction,
    attributes,
    sessionmaker,
    with_polymorphic,
)
from sqlalchemy.util import await_only

from mljobs.errors import InvalidValueError
from mljobs.model import MlJobMixin
from mljobs.states import ACTIVE, TERMINAL, MlJobStatus

logger = logging.getLogger(__name__)

Bind = Session | Connection
Callback = Callable[[Any], Any]
_CHUNK = 1000
_KEPT = "mljobs.finished"
_MAKER = "mljobs.maker"
_NAMELESS = ""  # a savepoint of which SQLAlchemy does not tell the name


class Source:
    """A store: what finishes through it can be listened to.

    Attributes:
        told_later: Where finished jobs go instead of to the callbacks, for a store that works for another one.
    """

    told_later: list[Any] | None = None

    def on_finished(self, callback: Callback) -> Subscription:
        """Call ``callback(job)`` after the commit of each job that finishes through this store; see ``on_finished``.

        Args:
            callback: Takes the finished record; of an ``AsyncJobStore`` it may be a coroutine function.
        """
        return on_finished(callback, self)


# ----------------------------------------------------------------------------------------------------- subscriptions


@dataclass(frozen=True, slots=True)
class _Origin:
    """Through what a job finished."""

    session: Session | None = None
    store: Source | None = None


class Subscription:
    """A callback that is registered. Calling it calls the callback, so that ``@on_finished`` leaves a function behind.

    Attributes:
        callback: What is called.
    """

    def __init__(self, callback: Callback, target: object) -> None:
        self.callback = callback
        self._matches, takes_async = _matching(target, self)
        called = callback if iscoroutinefunction(callback) else getattr(callback, "__call__", None)  # noqa: B004
        if iscoroutinefunction(called) and not takes_async:
            raise InvalidValueError(
                "callback",
                callback,
                "a coroutine function needs something async to listen to: an AsyncJobStore, an AsyncSession or its maker",
            )

    def matches(self, job: Any, origin: _Origin) -> bool:
        """Whether this job, or any job (None), that finished through this origin is of interest."""
        return self._matches(job, origin)

    def __call__(self, job: Any) -> Any:
        """Call the callback."""
        return self.callback(job)

    def remove(self) -> None:
        """Call the callback no more. Doing so twice is no error."""
        global _subscriptions  # noqa: PLW0603 - one tuple, replaced as a whole, so that readers need no lock
        with _lock:
            _subscriptions = tuple(other for other in _subscriptions if other is not self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


_subscriptions: tuple[Subscription, ...] = ()
_lock = threading.Lock()


def on_finished(callback: Callback, target: object = None) -> Subscription:
    """Call ``callback(job)`` whenever a job has finished: after the commit, once, with the detached record.

    The callback runs in the thread that committed, before ``commit()`` returns. What it raises is logged and undoes
    nothing. A process that dies between the commit and the callback never calls it: what must not be missed belongs
    in the transaction itself, or to ``store.watch``.

    A record that is inserted already finished (an import) has not finished here, and calls nobody.

    Args:
        callback: Takes the record, every column loaded. A coroutine function is awaited where ``target`` is async.
        target: What to listen to. None for everything in this process; a ``JobStore`` or ``AsyncJobStore``; a
            ``Session``, ``AsyncSession``, ``sessionmaker``, ``async_sessionmaker``, ``scoped_session`` or a class of
            sessions; a job class, for the jobs of that class.

    Returns:
        What ``remove()`` ends; also a context manager that does so, and callable as the callback was.

    Raises:
        InvalidValueError: ``callback`` cannot be called, ``target`` cannot be listened to, or a coroutine function is
            given for a target that is not async.

    Example:
        ``on_finished(lambda job: print(job.target_name, job.status), store)``
    """
    global _subscriptions  # noqa: PLW0603
    if not callable(callback):
        raise InvalidValueError("callback", callback, "expected a function that takes the job")
    subscription = Subscription(callback, target)
    _install()
    with _lock:
        _subscriptions = (*_subscriptions, subscription)
    return subscription


def subscribed() -> bool:
    """Whether anybody listens; asked first, so that nothing is done for nobody."""
    return bool(_subscriptions)


def _matching(target: object, subscription: Subscription) -> tuple[Callable[[Any, _Origin], bool], bool]:
    """Return whether a job of an origin is what ``target`` names, and whether the callback may be awaited there."""
    if target is None:
        return lambda _job, _origin: True, False
    target = getattr(target, "session_factory", target)  # of a scoped_session
    if isinstance(target, sessionmaker):
        target = target.class_  # a class of its own for each maker
    if isinstance(target, type):
        if issubclass(target, Session):
            return lambda _job, origin: isinstance(origin.session, target), False
        if issubclass(target, MlJobMixin):
            return lambda job, _origin: job is None or isinstance(job, target), False
    elif isinstance(target, Session | Source):
        alone = ref(target, lambda _: subscription.remove())
        if isinstance(target, Session):
            return lambda _job, origin: origin.session is not None and origin.session is alone(), False
        return lambda _job, origin: origin.store is not None and origin.store is alone(), hasattr(target, "keeper_url")
    return _matching_async(target, subscription), True


def _matching_async(target: object, subscription: Subscription) -> Callable[[Any, _Origin], bool]:
    asyncio = sys.modules.get("sqlalchemy.ext.asyncio")  # else nobody can have made a target of it
    if asyncio is not None:
        of = asyncio.async_session
        if isinstance(target, asyncio.async_sessionmaker):
            # Its sessions are of no class of their own; but each takes over the maker's info.
            info = dict(target.kw.get("info") or {})
            mark = info.setdefault(_MAKER, object())
            target.configure(info=info)
            return lambda _job, origin: origin.session is not None and origin.session.info.get(_MAKER) is mark
        if isinstance(target, type) and issubclass(target, asyncio.AsyncSession):
            kind = target
            return lambda _job, origin: origin.session is not None and isinstance(of(origin.session), kind)
        if isinstance(target, asyncio.AsyncSession):
            alone = ref(target.sync_session, lambda _: subscription.remove())
            return lambda _job, origin: origin.session is not None and origin.session is alone()
    raise InvalidValueError(
        "target", target, "expected a store, a session, a sessionmaker, a class of sessions or a job class"
    )


# ---------------------------------------------------------------------------------------------------------- delivery


def deliver(jobs: Sequence[Any], origin: _Origin, *, awaiting: Callable[[Awaitable[Any]], Any] = await_only) -> None:
    """Call whoever listens, for each job in order; what a callback raises is logged.

    Args:
        jobs: Finished, and committed.
        origin: Through what.
        awaiting: Runs what a coroutine function returned to its end.
    """
    for job, callback in _calls(jobs, origin):
        with _harmless(job, callback):
            answer = callback(job)
            if isawaitable(answer):
                awaiting(answer)


async def deliver_async(jobs: Sequence[Any], origin: _Origin) -> None:
    """Call whoever listens, as ``deliver`` does, and await those that are coroutine functions.

    Args:
        jobs: Finished, and committed.
        origin: Through what.
    """
    for job, callback in _calls(jobs, origin):
        with _harmless(job, callback):
            answer = callback(job)
            if isawaitable(answer):
                await answer


def _calls(jobs: Sequence[Any], origin: _Origin) -> Iterator[tuple[Any, Callback]]:
    later = origin.store.told_later if origin.store is not None else None
    if later is not None:
        later.extend(jobs)
        return
    for job in jobs:
        for subscription in _subscriptions:
            if subscription.matches(job, origin):
                yield job, subscription.callback


@contextmanager
def _harmless(job: Any, callback: Callback) -> Iterator[None]:
    """Log what a callback raises: the commit stands."""
    try:
        yield
    except Exception:
        name = getattr(callback, "__qualname__", repr(callback))
        logger.exception("job %s has finished, but the callback %s failed", job.id, name)


# -------------------------------------------------------------------------------------------------- what has finished


def note(bind: Bind, model: type[MlJobMixin], ids: Iterable[UUID]) -> None:
    """Keep what these jobs are now, if they have finished, until the transaction commits.

    Args:
        bind: Where they finished.
        model: The mapped job class.
        ids: Which.
    """
    wanted = list(ids)
    if not wanted:
        return
    kept = _of_session(bind) if isinstance(bind, Session) else _of_connection(bind)
    if _interesting(kept.origin):
        connection = bind.connection() if isinstance(bind, Session) else bind
        kept.add(_read(connection, model, wanted))


def _interesting(origin: _Origin) -> bool:
    """Whether anybody may want to hear of jobs of this origin."""
    if origin.store is not None and origin.store.told_later is not None:
        return True
    return any(subscription.matches(None, origin) for subscription in _subscriptions)


def _read(connection: Connection, model: type[MlJobMixin], ids: Sequence[UUID]) -> list[Any]:
    """Return the jobs among these that have finished, detached, in the order of ``ids``."""
    found: dict[UUID, Any] = {}
    entity: Any = with_polymorphic(model, "*") if inspect(model).polymorphic_on is not None else model
    # A session of its own: the host's would be changed by what is loaded into it.
    with Session(connection, join_transaction_mode="rollback_only", expire_on_commit=False, autoflush=False) as session:
        for first in range(0, len(ids), _CHUNK):
            some = ids[first : first + _CHUNK]
            for job in session.scalars(select(entity).where(entity.id.in_(some), entity.status.in_(TERMINAL))):
                found[job.id] = job
        session.expunge_all()
    return [found[job_id] for job_id in ids if job_id in found]


class _Kept:
    """Finished jobs of one transaction, by the savepoint in which they finished."""

    def __init__(self) -> None:
        self.store: Source | None = None
        self._levels: list[tuple[object, dict[UUID, Any]]] = [(None, {})]

    @property
    def origin(self) -> _Origin:
        return _Origin(store=self.store)

    def enter(self, savepoint: object) -> None:
        """Keep what follows with this savepoint."""
        if self._find(savepoint) is None:
            self._levels.append((savepoint, {}))

    def add(self, jobs: Iterable[Any]) -> None:
        """Keep these with the innermost savepoint."""
        for job in jobs:
            if all(job.id not in kept for _, kept in self._levels):
                self._levels[-1][1][job.id] = job

    def release(self, savepoint: object) -> None:
        """Give what was kept with a savepoint, and those inside it, to what is around it."""
        at = self._find(savepoint)
        if at is not None:
            for _, kept in self._levels[at:]:
                self._levels[at - 1][1].update(kept)
            del self._levels[at:]

    def forget(self, savepoint: object) -> None:
        """Forget what was kept with a savepoint, and those inside it; nothing was with one that is not known."""
        at = self._find(savepoint)
        if at is not None:
            del self._levels[at:]
        elif self.knows(_NAMELESS):
            self.take()

    def knows(self, savepoint: object) -> bool:
        """Whether anything may be kept with this savepoint."""
        return self._find(savepoint) is not None

    def _find(self, savepoint: object) -> int | None:
        return next((at for at, (level, _) in enumerate(self._levels) if level == savepoint and at > 0), None)

    def take(self) -> list[Any]:
        """Return all that was kept, and keep it no more."""
        jobs = [job for _, kept in self._levels for job in kept.values()]
        self._levels = [(None, {})]
        return jobs


# ---------------------------------------------------------------------------------------------------------- sessions


class _OfSession(_Kept):
    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = ref(session)
        self.flushed: list[tuple[type[MlJobMixin], UUID]] = []
        self.committed = False

    @property
    def origin(self) -> _Origin:
        return _Origin(self._session(), self.store)

    def add(self, jobs: Iterable[Any]) -> None:
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


def _of_session(session: Session) -> _OfSession:
    kept: _OfSession | None = session.info.get(_KEPT)
    if kept is None:
        kept = session.info[_KEPT] = _OfSession(session)
    return kept


@cache
def _install() -> None:
    """Listen to sessions and flushes, from the first subscription on: before it, nothing costs anything."""
    event.listen(MlJobMixin, "after_update", partial(_after_write, new=False), propagate=True)
    event.listen(MlJobMixin, "after_insert", partial(_after_write, new=True), propagate=True)
    event.listen(Session, "after_flush", _after_flush)
    event.listen(Session, "after_commit", _after_commit)
    event.listen(Session, "after_transaction_end", _after_transaction_end)
    event.listen(Session, "do_orm_execute", _on_execute)


def _after_write(_mapper: Mapper[Any], _connection: Connection, job: Any, *, new: bool) -> None:
    if not _subscriptions:
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
        _of_session(session).flushed.append((type(job), job.id))


def _after_flush(session: Session, _context: object) -> None:
    kept: _OfSession | None = session.info.get(_KEPT)
    if kept is None or not kept.flushed:
        return
    flushed, kept.flushed = kept.flushed, []
    for model in dict.fromkeys(model for model, _ in flushed):
        note(session, model, [job_id for of, job_id in flushed if of is model])


def _after_commit(session: Session) -> None:
    kept: _OfSession | None = session.info.get(_KEPT)
    if kept is None:
        return
    nested = session.get_nested_transaction()
    if nested is None:
        kept.committed = True
    else:
        kept.release(nested)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    kept: _OfSession | None = session.info.get(_KEPT)
    if kept is None:
        return
    if transaction.nested:
        kept.flushed = []
        if kept.knows(transaction):  # not released, so rolled back
            kept.forget(transaction)
        return
    if transaction.parent is not None:
        return
    jobs, committed = kept.take(), kept.committed
    kept.flushed, kept.committed = [], False
    if not committed or not jobs:
        return
    outer = _still_open(session, jobs[0])
    if outer is None:
        deliver(jobs, kept.origin)
    else:
        _of_connection(outer).add(jobs)


def _still_open(session: Session, job: Any) -> Connection | None:
    """Return the connection whose transaction somebody else has yet to commit, if the session only joined it."""
    bind = session.get_bind(inspect(type(job)))
    return bind if isinstance(bind, Connection) and bind.in_transaction() else None


def _on_execute(state: ORMExecuteState) -> Any:
    """Find out which jobs an UPDATE finishes: those that it matches and that have not finished yet are locked first."""
    if not _subscriptions or not state.is_update:
        return None
    model = _updated(state)
    if model is None:
        return None
    statement: Any = state.statement
    session = state.session
    if not _interesting(_of_session(session).origin):
        return None
    given = state.parameters
    record = next(table for table in inspect(model).tables if "spec_json" in table.c)
    which = select(model.id).where(model.status.in_(ACTIVE)).with_for_update(of=record)
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
    note(session, model, ids)
    return result


def _updated(state: ORMExecuteState) -> type[MlJobMixin] | None:
    """Return the job class that an UPDATE, by the ORM or by Core, writes to."""
    mapper = state.bind_mapper if state.is_orm_statement else None
    if mapper is not None:
        return mapper.class_ if issubclass(mapper.class_, MlJobMixin) else None
    table = getattr(state.statement, "table", None)
    model: type[MlJobMixin] | None = table.info.get("mljobs_model") if isinstance(table, Table) else None
    return model


# ------------------------------------------------------------------------------------------------------- connections

_connections: WeakKeyDictionary[Connection, _OfConnection] = WeakKeyDictionary()
_committing: dict[int, _OfConnection] = {}
_watched: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class _OfConnection(_Kept):
    """Finished jobs of a Core connection's transaction.

    Core has no event after a commit. What is committed is told when the connection begins again or is given back; a
    store, which knows when its own transaction has ended, does not wait for that.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = ref(connection)
        self.hand: Callable[[Callable[[], None]], object] = lambda tell: tell()
        self._will: int | None = None
        engine = connection.engine
        if engine not in _watched:
            _watched[engine] = True
            _watch(engine)

    def add(self, jobs: Iterable[Any]) -> None:
        connection = self._connection()
        savepoint: Any = None if connection is None else connection.get_nested_transaction()
        around: list[str] = []
        while savepoint is not None:  # neither is public; without them a rollback to a savepoint would forget too much
            around.append(getattr(savepoint, "_savepoint", _NAMELESS))
            savepoint = getattr(savepoint, "_previous_nested", None)
        for name in reversed(around):
            self.enter(name)
        super().add(jobs)
        if self.store is None and connection is not None and _commits_by_itself(connection):
            self.tell()

    def will_commit(self) -> None:
        """Take note that the transaction is about to be committed."""
        connection = self._connection()
        if connection is None or self.store is not None or not any(kept for _, kept in self._levels):
            return
        self._will = id(connection.connection.dbapi_connection)
        _committing[self._will] = self
        pool = connection.engine.pool
        if pool not in _watched:
            _watched[pool] = True
            event.listen(pool, "checkin", _on_checkin)
            event.listen(connection.engine, "handle_error", _on_error)

    def rolled_back(self) -> None:
        """Forget all that was kept."""
        self._settle()
        self.take()

    def not_committed(self) -> None:
        """Forget what was about to be committed."""
        if self._settle():
            self.take()

    def _settle(self) -> bool:
        will, self._will = self._will, None
        return will is not None and _committing.pop(will, None) is not None

    def committed(self) -> None:
        """Tell what the last transaction committed, if it did."""
        if self._settle():
            self.tell()

    def tell(self) -> None:
        """Tell all that was kept."""
        jobs, origin = self.take(), self.origin
        if jobs:
            self.hand(lambda: deliver(jobs, origin))


def _of_connection(connection: Connection) -> _OfConnection:
    kept = _connections.get(connection)
    if kept is None:
        kept = _connections[connection] = _OfConnection(connection)
    return kept


def _watch(engine: Engine) -> None:
    """Hear how the transactions of this engine end.

    Of the engine: SQLAlchemy 2.0 takes no listener for one connection of an engine that has options.
    """

    def heard(act: Callable[..., object], *, named: bool = False) -> Callable[..., None]:
        def hear(connection: Connection, *details: Any) -> None:
            kept = _connections.get(connection)
            if kept is not None:
                act(kept, *details[: 1 if named else 0])

        return hear

    event.listen(engine, "release_savepoint", heard(_OfConnection.release, named=True))
    event.listen(engine, "rollback_savepoint", heard(_OfConnection.forget, named=True))
    for ending, act in (
        ("commit", _OfConnection.will_commit),
        ("commit_twophase", _OfConnection.will_commit),
        ("rollback", _OfConnection.rolled_back),
        ("rollback_twophase", _OfConnection.rolled_back),
        ("begin", _OfConnection.committed),
        ("begin_twophase", _OfConnection.committed),
    ):
        event.listen(engine, ending, heard(act))


def _on_checkin(driver_connection: object, _record: object) -> None:
    kept = _committing.get(id(driver_connection))
    if kept is not None:
        kept.committed()


def _on_error(context: ExceptionContext) -> None:
    """Forget what a COMMIT that failed would have committed."""
    kept = None if context.connection is None else _connections.get(context.connection)
    if kept is not None:
        kept.not_committed()


def _commits_by_itself(connection: Connection) -> bool:
    engine_wide = getattr(connection.dialect, "_on_connect_isolation_level", None)
    return connection.get_execution_options().get("isolation_level", engine_wide) == "AUTOCOMMIT"


def hand_over(connection: Connection, hand: Callable[[Callable[[], None]], object]) -> None:
    """Have somebody else, who commits this connection's transaction, tell what has finished in it.

    Args:
        connection: Whose commits are none.
        hand: Is given what to call after the real commit.
    """
    _of_connection(connection).hand = hand


# ------------------------------------------------------------------------------------------------------------ stores


@contextmanager
def telling(inner: AbstractContextManager[Bind], store: Source) -> Iterator[Bind]:
    """Enter a store's transaction, and tell what has finished in it once it has ended well.

    Args:
        inner: The transaction.
        store: Whose it is.
    """
    with inner as bind:
        kept = _of_session(bind) if isinstance(bind, Session) else _of_connection(bind)
        kept.take()
        kept.store = store
        yield bind
    if isinstance(kept, _OfConnection):  # a session has told by itself
        kept.tell()


def kept_by(bind: Bind, store: Source) -> Callable[[], list[Any]]:
    """Keep what finishes in the transaction of an async store; return what takes it, once that has ended well.

    Args:
        bind: The connection or session in which the operation is about to run.
        store: Whose it is.
    """
    kept = _of_session(bind) if isinstance(bind, Session) else _of_connection(bind)
    kept.take()
    kept.store = store
    return kept.take if isinstance(kept, _OfConnection) else list


def origin_of(store: Source) -> _Origin:
    """Return the origin of what finishes through a store."""
    return _Origin(store=store)
