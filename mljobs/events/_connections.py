"""What has finished in the transaction of a Core connection."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext

from mljobs.events._delivering import deliver
from mljobs.events._keeping import NAMELESS, Kept

_connections: WeakKeyDictionary[Connection, OfConnection] = WeakKeyDictionary()
_committing: dict[int, OfConnection] = {}
_watched: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class OfConnection(Kept):
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
        """See ``Kept.add``."""
        connection = self._connection()
        savepoint: Any = None if connection is None else connection.get_nested_transaction()
        around: list[str] = []
        while savepoint is not None:  # neither is public; without them a rollback to a savepoint would forget too much
            around.append(getattr(savepoint, "_savepoint", NAMELESS))
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
        """Forget all that was kept, unless it is committed already: SQLAlchemy rolls back all that it gives back."""
        connection = self._connection()
        if connection is not None and _commits_by_itself(connection):
            return
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


def of_connection(connection: Connection) -> OfConnection:
    """Return what is kept beside this connection's transaction."""
    kept = _connections.get(connection)
    if kept is None:
        kept = _connections[connection] = OfConnection(connection)
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

    event.listen(engine, "release_savepoint", heard(OfConnection.release, named=True))
    event.listen(engine, "rollback_savepoint", heard(OfConnection.forget, named=True))
    for ending, act in (
        ("commit", OfConnection.will_commit),
        ("commit_twophase", OfConnection.will_commit),
        ("rollback", OfConnection.rolled_back),
        ("rollback_twophase", OfConnection.rolled_back),
        ("begin", OfConnection.committed),
        ("begin_twophase", OfConnection.committed),
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
    of_connection(connection).hand = hand
