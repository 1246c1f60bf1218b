"""Finished jobs of a Core connection's transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext

from mljobs.events._delivering import deliver
from mljobs.events._pending import NAMELESS, Pending

_connections: WeakKeyDictionary[Connection, ConnectionPending] = WeakKeyDictionary()
_committing: dict[int, ConnectionPending] = {}
_listened_to: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class ConnectionPending(Pending):
    """Finished jobs of a Core connection's transaction.

    Core has no event after a commit. What was committed is delivered when the connection begins again or is given back; a
    store, which knows when its own transaction has ended, delivers at once.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = ref(connection)
        self.deliver_by: Callable[[Callable[[], None]], object] = lambda deliver: deliver()
        self._committing_id: int | None = None
        engine = connection.engine
        if engine not in _listened_to:
            _listened_to[engine] = True
            _listen_to(engine)

    def add(self, jobs: Iterable[Any]) -> None:
        """See ``Pending.add``."""
        connection = self._connection()
        savepoint: Any = None if connection is None else connection.get_nested_transaction()
        around: list[str] = []
        while savepoint is not None:  # neither is public; without them a rollback to a savepoint would forget too much
            around.append(getattr(savepoint, "_savepoint", NAMELESS))
            savepoint = getattr(savepoint, "_previous_nested", None)
        for name in reversed(around):
            self.enter(name)
        super().add(jobs)
        if not self.delivered_by_store and connection is not None and _commits_by_itself(connection):
            self.deliver()

    def before_commit(self) -> None:
        """Take note that the transaction is about to be committed."""
        connection = self._connection()
        if connection is None or self.delivered_by_store or not any(pending for _, pending in self._levels):
            return
        self._committing_id = id(connection.connection.dbapi_connection)
        _committing[self._committing_id] = self
        pool = connection.engine.pool
        if pool not in _listened_to:
            _listened_to[pool] = True
            event.listen(pool, "checkin", _on_checkin)
            event.listen(connection.engine, "handle_error", _on_error)

    def rolled_back(self) -> None:
        """Forget all that was kept, unless it is committed already: SQLAlchemy rolls back all that it gives back."""
        connection = self._connection()
        if connection is not None and _commits_by_itself(connection):
            return
        self._settle()
        self.take()

    def commit_failed(self) -> None:
        """Forget what was about to be committed."""
        if self._settle():
            self.take()

    def _settle(self) -> bool:
        committing, self._committing_id = self._committing_id, None
        return committing is not None and _committing.pop(committing, None) is not None

    def committed(self) -> None:
        """Deliver what the last transaction committed, if it did."""
        if self._settle():
            self.deliver()

    def deliver(self) -> None:
        """Deliver all that was kept."""
        jobs, origin = self.take(), self.origin
        if jobs:
            self.deliver_by(lambda: deliver(jobs, origin))


def pending_of_connection(connection: Connection) -> ConnectionPending:
    """Return what is pending beside this connection's transaction."""
    pending = _connections.get(connection)
    if pending is None:
        pending = _connections[connection] = ConnectionPending(connection)
    return pending


def _listen_to(engine: Engine) -> None:
    """Listen to how the transactions of this engine end.

    Of the engine: SQLAlchemy 2.0 takes no listener for one connection of an engine that has options.
    """

    def handler(act: Callable[..., object], *, named: bool = False) -> Callable[..., None]:
        def handle(connection: Connection, *details: Any) -> None:
            pending = _connections.get(connection)
            if pending is not None:
                act(pending, *details[: 1 if named else 0])

        return handle

    event.listen(engine, "release_savepoint", handler(ConnectionPending.release, named=True))
    event.listen(engine, "rollback_savepoint", handler(ConnectionPending.forget, named=True))
    for ending, act in (
        ("commit", ConnectionPending.before_commit),
        ("commit_twophase", ConnectionPending.before_commit),
        ("rollback", ConnectionPending.rolled_back),
        ("rollback_twophase", ConnectionPending.rolled_back),
        ("begin", ConnectionPending.committed),
        ("begin_twophase", ConnectionPending.committed),
    ):
        event.listen(engine, ending, handler(act))


def _on_checkin(driver_connection: object, _record: object) -> None:
    pending = _committing.get(id(driver_connection))
    if pending is not None:
        pending.committed()


def _on_error(context: ExceptionContext) -> None:
    """Forget what a COMMIT that failed would have committed."""
    pending = None if context.connection is None else _connections.get(context.connection)
    if pending is not None:
        pending.commit_failed()


def _commits_by_itself(connection: Connection) -> bool:
    engine_wide = getattr(connection.dialect, "_on_connect_isolation_level", None)
    return connection.get_execution_options().get("isolation_level", engine_wide) == "AUTOCOMMIT"


def deliver_by(connection: Connection, call: Callable[[Callable[[], None]], object]) -> None:
    """Deliver what finishes on a connection whose transaction somebody else commits.

    Args:
        connection: Its own commits commit nothing.
        call: Is given the function to call after the real commit.
    """
    pending_of_connection(connection).deliver_by = call
