"""Sleep until jobs may have changed: a notification wakes early, the timeout always wakes.

A notification is a hint and never the truth. Whoever sleeps here looks at the table before and after, so a lost
connection, a pooler that swallows LISTEN, or SQLite, which has no notifications, cost time and nothing else.

On PostgreSQL a sleeper holds a shared advisory lock on its own connection; the trigger sends notifications only while
somebody holds it, see :mod:`mljobs.guards._companions`. Behind a pooler neither may be: in transaction mode the lock
would stay on a server process that others use, and nobody would hear the notification. So a sleeper there only polls.

That connection is taken out of the pool for good: a sleeper holds it for hours, and a small pool would have none left for
the work. So that watchers (of a page that many look at) do not take all that the server has, the tenth of an engine polls.
"""

from __future__ import annotations

import asyncio
import logging
import selectors
import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from mljobs.db._engines import pooled
from mljobs.db._patience import answers_within
from mljobs.guards._companions import WAKE_CHANNEL, WATCHER_LOCK, WORKER_LOCK, qualified_name
from mljobs.jobs import table_of

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Pool
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from mljobs.jobs import Model

logger = logging.getLogger(__name__)

_LOCK = text(
    "SELECT pg_advisory_lock_shared(:lock, (CAST(CAST(:table AS regclass) AS oid)::bigint & 2147483647)::integer)"
)
_LISTEN_SECONDS = 10.0
_LISTEN = f"LISTEN {WAKE_CHANNEL}"
_PID = text("SELECT pg_backend_pid()")
_WATCHERS_MAX = 9

_seats: WeakKeyDictionary[Pool, list[object]] = WeakKeyDictionary()
_counting = threading.RLock()  # again by a sleeper that is collected meanwhile


class _Seat:
    """The right of one sleeper to listen beside a pool."""

    def __init__(self, lock: int) -> None:
        self._lock = lock
        self._row: list[object] | None = None

    def take(self, pool: Pool) -> bool:
        """Take it, unless this is a watcher and there are enough."""
        with _counting:
            row = _seats.setdefault(pool, [])
            if len(row) >= _WATCHERS_MAX and self._lock != WORKER_LOCK:
                return False
            row.append(self)
            self._row = row  # an engine that is disposed of has another pool then
            return True

    def leave(self) -> None:
        """Give it back, if it was taken."""
        with _counting:
            if self._row is not None:
                self._row.remove(self)
                self._row = None


class Sleeper:
    """Sleep between looks at the table, from a thread.

    Args:
        engine: Of the database that is looked at.
        model: The mapped job class.
        workers: Wake for new jobs; otherwise for changed ones.
    """

    def __init__(self, engine: Engine, model: Model, *, workers: bool = False) -> None:
        self._engine = engine
        self._model = model
        self._lock = WORKER_LOCK if workers else WATCHER_LOCK
        self._seat = _Seat(self._lock)
        self._listens = engine.dialect.name == "postgresql" and engine.dialect.driver == "psycopg"
        self._connection: Connection | None = None
        self._driver: Any = None
        self._woken = threading.Event()
        self._bell: socket.socket | None = None
        self._ear: socket.socket | None = None
        if self._listens:
            self._bell, self._ear = socket.socketpair()

    def wake(self) -> None:
        """End the present sleep, or the next one; from any thread."""
        self._woken.set()
        if self._bell is not None:
            with suppress(OSError):
                self._bell.send(b"!")

    def sleep(self, seconds: float) -> None:
        """Sleep for ``seconds`` at most. The first time, and after a lost connection, only start to listen."""
        try:
            if self._ear is not None and self._connection is not None:
                self._hear(self._driver, self._ear, seconds)
                return
            if self._ear is not None and self._listens and self._seat.take(self._engine.pool):
                self._listen()
                return
        except Exception as error:  # noqa: BLE001 - whatever breaks the hint, polling goes on
            logger.debug("cannot listen for notifications, polling instead: %s", error)
            self.rest()
        self._woken.wait(seconds)
        self._woken.clear()

    def _hear(self, driver: Any, ear: socket.socket, seconds: float) -> None:
        """Wait for the server or for ``wake``, whichever speaks first."""
        if not _notified(driver):
            with selectors.DefaultSelector() as selector:
                selector.register(driver.fileno(), selectors.EVENT_READ)
                selector.register(ear, selectors.EVENT_READ)
                ready = selector.select(seconds)
            if any(key.fileobj is not ear for key, _ in ready):
                _notified(driver)
        if self._woken.is_set():
            self._woken.clear()
            ear.recv(4096)

    def _listen(self) -> None:
        try:
            with answers_within(_LISTEN_SECONDS):
                connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        except BaseException:
            self._seat.leave()
            raise
        self._connection, self._driver = connection, connection.connection.driver_connection
        connection.detach()
        with answers_within(_LISTEN_SECONDS):
            if pooled(connection.scalar(_PID), self._driver.info.backend_pid):
                self._listens = False
                self.rest()
                return
            connection.execute(_LOCK, {"lock": self._lock, "table": qualified_name(connection, table_of(self._model))})
            connection.exec_driver_sql(_LISTEN)

    def close(self) -> None:
        """Listen no more, for good."""
        self.rest()
        for end in (self._bell, self._ear):
            if end is not None:
                end.close()

    def rest(self) -> None:
        """Close the connection until the next sleep, which listens anew: the session's lock and LISTEN end with it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._seat.leave()
            self._driver.close()
            connection.invalidate()  # SQLAlchemy would reset it first, which a lost one cannot bear
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _notified(driver: Any) -> bool:
    """Read what the server has sent; whether it was a notification."""
    return any(True for _ in list(driver.notifies(timeout=0)))


class AsyncSleeper:
    """Sleep between looks at the table, from a coroutine; see ``Sleeper``."""

    def __init__(self, engine: AsyncEngine, model: Model, *, workers: bool = False) -> None:
        self._engine = engine
        self._model = model
        self._lock = WORKER_LOCK if workers else WATCHER_LOCK
        self._seat = _Seat(self._lock)
        self._name = engine.dialect.driver if engine.dialect.name == "postgresql" else ""
        self._connection: AsyncConnection | None = None
        self._driver: Any = None
        self._woken = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        """Sleep for ``seconds`` at most. The first time, and after a lost connection, only start to listen."""
        try:
            if self._connection is not None:
                await self._wait(seconds)
                return
            if self._name in ("psycopg", "psycopg_async", "asyncpg") and self._seat.take(self._engine.pool):
                await self._listen()
                return
        except (DBAPIError, OSError, RuntimeError) as error:
            logger.debug("cannot listen for notifications, polling instead: %s", error)
            await self.close()
        await asyncio.sleep(seconds)

    async def _wait(self, seconds: float) -> None:
        if self._name == "asyncpg":
            if self._driver.is_closed():
                raise RuntimeError("the connection is closed")
            try:
                await asyncio.wait_for(self._woken.wait(), seconds)
            except TimeoutError:
                return
            self._woken.clear()
            return
        try:
            async for _ in self._driver.notifies(timeout=seconds, stop_after=1):
                pass
        except Exception as error:
            raise RuntimeError(str(error)) from error

    async def _listen(self) -> None:
        try:
            connection = await self._engine.connect()
        except BaseException:
            self._seat.leave()
            raise
        self._connection = connection
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        driver: Any = (await connection.get_raw_connection()).driver_connection
        self._driver = driver
        if connection.sync_connection is not None:
            connection.sync_connection.detach()
        told = driver.get_server_pid() if self._name == "asyncpg" else driver.info.backend_pid
        if pooled(await connection.scalar(_PID), told):
            await self.close()
            self._name = ""
            return
        name = await connection.run_sync(qualified_name, table_of(self._model))
        await connection.execute(_LOCK, {"lock": self._lock, "table": name})
        if self._name == "asyncpg":
            await driver.add_listener(WAKE_CHANNEL, lambda *_: self._woken.set())
        else:
            await connection.exec_driver_sql(_LISTEN)

    async def close(self) -> None:
        """Listen no more."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._seat.leave()
            if self._name == "asyncpg":
                self._driver.terminate()
            else:
                await self._driver.close()
            await connection.invalidate()
            await connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
