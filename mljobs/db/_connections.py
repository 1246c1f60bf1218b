"""The connections of a store: one engine for single operations, one for transactions, and a cache before the pool."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from asyncio import get_running_loop
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState, QueuePool
from sqlalchemy.util import greenlet_spawn

from mljobs.db import _forks
from mljobs.db._engines import at_level
from mljobs.db._failures import is_locked
from mljobs.db._prepared import LOCK_TURNS, has_no_listeners

R = TypeVar("R")

_FOR_TRANSACTIONS = 2  # of any pool, as a worker's rescue and a retry need
_FRESH_SECONDS = 1.5  # longer than an idle worker's poll, whose every claim would ask first whether the server is there
_TURN_MILLISECONDS = 3  # SQLite looks for the lock again after 1 and 2 of them
_TURNS = 80
_LOCK_PAUSE = 0.002
_BUSY_TIMEOUT = "mljobs_busy_timeout"  # as the host has set it
_SQLITE_DRIVERS = frozenset({"pysqlite", "aiosqlite"})


def engines_of(engine: Engine, *, owned: bool) -> tuple[Engine, Engine]:
    """Return the engine for single operations, and the one for transactions.

    Transactions are READ COMMITTED, whatever the default of the engine, the role or the database is: each operation
    decides by the condition of one statement, or under a lock, and a higher level would only make it fail.
    """
    if engine.dialect.name != "postgresql":
        return engine, engine
    transactional = at_level(engine, "READ COMMITTED")
    if owned:  # made with AUTOCOMMIT, so that the frequent case costs nothing at checkout
        return engine, transactional
    return at_level(engine, "AUTOCOMMIT"), transactional


def cache_size(engine: Engine, wanted: int) -> int:
    """Return how many connections may be kept, so that a small pool has some left for transactions.

    Where the host's pool keeps none at all, neither do we.
    """
    pool = engine.pool
    if not isinstance(pool, QueuePool):
        return 0
    overflow: int = pool._max_overflow  # noqa: SLF001 - there is no public way
    if overflow < 0 or not pool.size():  # without a limit
        return wanted
    return max(0, min(wanted, pool.size() + overflow - _FOR_TRANSACTIONS))


class ConnectionCache:
    """Connections for single operations, kept checked out between them, because a checkout costs as much as a statement.

    On SQLite each operation is a transaction, which the driver begins with the first write and which is committed here. For
    SQLAlchemy, where nobody listens, one transaction goes on: to begin and commit there takes as long as a small statement.
    An operation does not wait for the file's write lock as SQLite does. SQLite tries to take the lock after 1, 2, 5 and more
    milliseconds, at last every 100: beside processes that take it again as soon as they have released it, one that has
    waited long hardly ever gets it. So a kept connection waits in many short turns. After these the operation is run again,
    until the configured timeout is over; see ``lock_pauses``.

    Args:
        engine: In AUTOCOMMIT, on PostgreSQL, where such an operation is one statement.
        size: How many to keep at most.

    Attributes:
        begins: Whether each operation is a transaction that is committed here.
    """

    def __init__(self, engine: Engine, size: int) -> None:
        self._engine = engine
        self._size = size
        self.begins = engine.dialect.name == "sqlite"
        self._busy_timeout = 0
        self._idle: deque[_Use] = deque()
        _forks.register(self)

    @property
    def keeps(self) -> bool:
        """Whether any connection is kept."""
        return self._size > 0

    def use(self) -> AbstractContextManager[Connection]:
        """Return a context manager that yields a connection for one operation: one that was kept, or a new one."""
        if _forks.under_way:
            _forks.wait()
        while True:
            try:
                kept = self._idle.pop()
            except IndexError:
                return _Use(self, self._new())
            if self.begins or time.monotonic() - kept.since < _FRESH_SECONDS:
                return kept
            kept.connection.close()  # the pool checks whether the server is still there

    def _new(self) -> Connection:
        connection = self._engine.connect()
        try:
            self._set_turns(connection)
        except BaseException:  # a task that is cancelled, say
            connection.close()
            raise
        return connection

    def _set_turns(self, connection: Connection) -> None:
        """Have a connection wait for the lock of a SQLite file in turns."""
        if not (self._size and self._engine.dialect.driver in _SQLITE_DRIVERS):  # whose errors say that it is locked
            return
        self._busy_timeout = _pragma(connection, "PRAGMA busy_timeout")
        if self._busy_timeout > _TURN_MILLISECONDS:
            if not event.contains(self._engine.pool, "reset", _restore_busy_timeout):
                event.listen(self._engine.pool, "reset", _restore_busy_timeout)
            connection.info[_BUSY_TIMEOUT] = self._busy_timeout
            _pragma(connection, f"PRAGMA busy_timeout = {_TURN_MILLISECONDS}")
            connection.info[LOCK_TURNS] = min(_TURNS, self._busy_timeout // _TURN_MILLISECONDS)

    def keep(self, used: _Use) -> None:
        """Keep a connection for the next operation, or give it back to the pool."""
        if len(self._idle) < self._size:
            self._idle.append(used)
        else:
            used.connection.close()

    def lock_pauses(self) -> Iterator[float]:
        """Yield how many seconds to wait before each new attempt of an operation that met a locked file."""
        end = time.monotonic() + self._busy_timeout / 1000
        while time.monotonic() < end:
            yield random.uniform(0, _LOCK_PAUSE)  # noqa: S311 - spread, no secret

    def close(self) -> None:
        """Give all back to the pool."""
        while True:
            try:
                kept = self._idle.pop()
            except IndexError:
                return
            kept.connection.close()

    @property
    def closed_at_forks(self) -> bool:
        """Whether they are connections to a SQLite file; see ``mljobs.db._forks``."""
        return self.begins and self.keeps

    def in_use(self) -> bool:
        """Give those at rest back to the pool, and return whether any of the pool is in use, by the host for example."""
        self.close()
        pool: Any = self._engine.pool
        return bool(pool.checkedout())

    def close_all(self) -> None:
        """Close those at rest, those in the pool included."""
        self.close()
        self._engine.dispose()

    def leave_to_parent(self) -> None:
        """Forget all, in a child of the process."""
        _forks.keep_from_being_collected(self._idle, self._engine.pool)
        self._idle = deque()
        self._engine.dispose(close=False)


class _Use:
    """One operation on a connection of a cache. After an error the connection goes back to the pool, which resets it.

    Attributes:
        connection: The connection.
        since: Since when it has been kept, by the monotonic clock; not set on SQLite.
    """

    __slots__ = ("_cache", "connection", "since")

    def __init__(self, cache: ConnectionCache, connection: Connection) -> None:
        self._cache = cache
        self.connection = connection
        self.since = 0.0

    def __enter__(self) -> Connection:
        if self._cache.begins and not self.connection.in_transaction():
            try:
                self.connection.begin()
            except BaseException:
                self.connection.close()
                raise
        return self.connection

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cache, connection = self._cache, self.connection
        try:
            if not cache.begins:
                self.since = time.monotonic()
            elif kind is None and not has_no_listeners(connection):
                connection.commit()
            elif kind is None:
                _commit(connection)
            elif is_locked(error):  # the connection is sound, and will be used again at once
                connection.rollback()
        except BaseException:
            connection.close()
            raise
        if kind is None or is_locked(error):
            cache.keep(self)
        else:
            connection.close()


def _commit(connection: Any) -> None:
    """Commit what the driver has begun; SQLAlchemy's transaction goes on."""
    try:
        connection.connection.dbapi_connection.commit()
    except BaseException as error:
        connection._handle_dbapi_exception(error, None, None, None, None)  # noqa: SLF001 - as SQLAlchemy does
        raise


def _restore_busy_timeout(driver: Any, record: ConnectionPoolEntry, state: PoolResetState) -> None:
    """Reset a connection that goes back to the pool, also one of a store that was never closed."""
    record.info.pop(LOCK_TURNS, None)
    configured = record.info.pop(_BUSY_TIMEOUT, None)
    if configured is not None and not state.terminate_only:
        cursor = driver.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {configured}")
        cursor.close()


def _pragma(connection: Connection, text: str) -> int:
    """Return what a PRAGMA says; past SQLAlchemy, whose listeners it does not concern."""
    cursor = connection.connection.cursor()
    cursor.execute(text)
    ((value,),) = cursor.fetchall()
    cursor.close()
    return int(value)


def _driver(connection: Connection) -> Any:
    return connection.connection.driver_connection


class AsyncConnectionCache(ConnectionCache):
    """The same for the tasks of an event loop, which are many: one that finds all in use waits for the next, in turn.

    A connection to PostgreSQL belongs to the loop on which it was opened. So on another loop, as ``asyncio.run`` makes one,
    all are dropped and new ones are opened.
    """

    def __init__(self, engine: Engine, size: int) -> None:
        super().__init__(engine, size)
        self._places = asyncio.Semaphore(size)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def closed_at_forks(self) -> bool:
        """They cannot be: each is closed by a loop."""
        return False

    def leave_to_parent(self) -> None:
        """Forget all, in a child of the process; nobody waits for a place there."""
        super().leave_to_parent()
        self._places = asyncio.Semaphore(self._size)

    async def run(self, operation: Callable[[Connection], R]) -> R:
        """Return what ``operation`` returns, which runs in a greenlet.

        Raises:
            TimeoutError: SQLAlchemy's; no connection became free within the pool's own timeout.
        """
        if not self._size:
            return await greenlet_spawn(self._run, operation)
        if self._loop is not get_running_loop():
            self.enter_loop()
        places = self._places
        if places.locked():
            await self._wait(places)
        else:
            await places.acquire()
        try:
            return await greenlet_spawn(self._run, operation)
        finally:
            places.release()

    def _run(self, operation: Callable[[Connection], R]) -> R:
        with self.use() as connection:
            return operation(connection)

    async def _wait(self, places: asyncio.Semaphore) -> None:
        pool: Any = self._engine.pool
        try:
            async with asyncio.timeout(pool.timeout()):
                await places.acquire()
        except TimeoutError:
            raise PoolTimeoutError(f"none of {self._size} connections became free within {pool.timeout()} s") from None

    def enter_loop(self) -> None:
        """Drop the connections of another loop than the running one."""
        loop, before = get_running_loop(), self._loop
        if loop is before:
            return
        self._loop, self._places = loop, asyncio.Semaphore(self._size)
        if before is not None and not self.begins:
            for kept in self._idle:
                kept.connection.detach()  # or the pool would close it, which its own loop alone can do
            self._idle = deque()
            self._engine.dispose(close=False)

    async def aclose(self) -> None:
        """Give all back to the pool."""
        self.enter_loop()
        await greenlet_spawn(self.close)


class JoinedConnection:
    """A connection of a host, in whose transaction a store works: each use is a savepoint, one thread at a time.

    Args:
        connection: Open; a transaction is begun if none is.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._lock = threading.RLock()

    @contextmanager
    def use(self) -> Iterator[Connection]:
        """Yield the connection within a savepoint, which is rolled back by an exception."""
        with self._lock, savepoint(self.connection):
            yield self.connection

    @contextmanager
    def session(self, sessions: sessionmaker[Session]) -> Iterator[Session]:
        """Yield a session within a savepoint, which is rolled back by an exception."""
        with self._lock:
            begin(self.connection)
            with sessions(bind=self.connection, join_transaction_mode="create_savepoint") as session, session.begin():
                yield session


@contextmanager
def savepoint(connection: Connection) -> Iterator[None]:
    """Run the block within a savepoint of the connection's transaction, which is begun if there is none."""
    begin(connection)
    with connection.begin_nested():
        yield


def begin(connection: Connection) -> None:
    """Begin the connection's transaction, if there is none, so that what follows is inside it.

    On SQLite at once: Python's driver waits for the first write, and a savepoint before it would be the transaction.
    """
    if not connection.in_transaction():
        connection.begin()
    if connection.dialect.name == "sqlite" and not _driver(connection).in_transaction:
        connection.exec_driver_sql("BEGIN")
