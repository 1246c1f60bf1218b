"""Wait until jobs may have changed: for a notification, or for a timeout where none comes.

A notification is a hint and never the truth. The caller reads the table before and after, so a lost connection, a
pooler that swallows LISTEN, or SQLite, which has no notifications, cost time and nothing else.

On PostgreSQL a listener holds a shared advisory lock on its own connection; the trigger sends notifications only while
somebody holds it, see :mod:`mljobs.guards._companions`. Behind a pooler neither may be: in transaction mode the lock
would stay on a server process that others use, and nobody would hear the notification. So a listener there only polls.

That connection is taken out of the pool for good: a listener holds it for hours, and a small pool would have none left for
the work. At most nine watchers of an engine listen, and further ones poll, so that a page that many people open does not
take all connections of the server.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from mljobs._logging import logger_of
from mljobs.db._engines import pooled
from mljobs.db._timeouts import answers_within
from mljobs.guards._companions import WAKE_CHANNEL, WATCHER_LOCK, WORKER_LOCK, qualified_name

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Pool, Table
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

logger = logger_of(__name__)

_LOCK = text(
    "SELECT pg_advisory_lock_shared(:lock, (CAST(CAST(:table AS regclass) AS oid)::bigint & 2147483647)::integer)"
)
_LISTEN_SECONDS = 10.0
_LISTEN = f"LISTEN {WAKE_CHANNEL}"
_PID = text("SELECT pg_backend_pid()")
_WATCHERS_MAX = 9

_slots: WeakKeyDictionary[Pool, list[object]] = WeakKeyDictionary()
_slots_lock = threading.RLock()  # taken again by a listener that is collected meanwhile
os.register_at_fork(after_in_child=lambda: globals().update(_slots_lock=threading.RLock()))


class _Slot:
    """The right of one listener to have a connection beside a pool."""

    def __init__(self, lock: int) -> None:
        self._lock = lock
        self._taken: list[object] | None = None

    def take(self, pool: Pool) -> bool:
        """Take it; return False for a watcher where the most that may listen do."""
        with _slots_lock:
            taken = _slots.setdefault(pool, [])
            if len(taken) >= _WATCHERS_MAX and self._lock != WORKER_LOCK:
                return False
            taken.append(self)
            self._taken = taken  # an engine that is disposed of has another pool then
            return True

    def release(self) -> None:
        """Give it back, if it was taken."""
        with _slots_lock:
            if self._taken is not None:
                self._taken.remove(self)
                self._taken = None


class ChangeListener:
    """Wait between reads of the table, from a thread.

    Args:
        engine: Of the database.
        table: The job table.
        workers: Wait for new jobs; otherwise for changed ones.
        polls: Take no connection, and only wait for the timeout.
    """

    def __init__(self, engine: Engine, table: Table, *, workers: bool = False, polls: bool = False) -> None:
        self._engine = engine
        self._table = table
        self._lock = WORKER_LOCK if workers else WATCHER_LOCK
        self._slot = _Slot(self._lock)
        self._listens = not polls and engine.dialect.name == "postgresql" and engine.dialect.driver == "psycopg"
        self._connection: Connection | None = None
        self._driver: Any = None
        self._selector: selectors.BaseSelector | None = None
        self._woken = threading.Event()
        self._wake_sender: socket.socket | None = None
        self._wake_receiver: socket.socket | None = None
        if self._listens:
            self._wake_sender, self._wake_receiver = socket.socketpair()

    def wake(self) -> None:
        """End the present wait, or the next one; from any thread."""
        self._woken.set()
        if self._wake_sender is not None:
            with suppress(OSError):
                self._wake_sender.send(b"!")

    def wait(self, seconds: float) -> None:
        """Wait for ``seconds`` at most. The first time, and after a lost connection, only start to listen."""
        try:
            if self._wake_receiver is not None and self._selector is not None:
                self._wait_for_notification(self._selector, self._wake_receiver, seconds)
                return
            if self._wake_receiver is not None and self._listens and self._slot.take(self._engine.pool):
                self._listen(self._wake_receiver)
                return
        except Exception as error:  # noqa: BLE001 - whatever breaks the hint, polling goes on
            logger.debug("cannot listen for notifications, polling instead: %s", error)
            self.disconnect()
        self._woken.wait(seconds)
        self._woken.clear()

    def _wait_for_notification(
        self, selector: selectors.BaseSelector, wake_receiver: socket.socket, seconds: float
    ) -> None:
        """Wait for the server or for ``wake``, whichever comes first."""
        if not _notified(self._driver):
            ready = selector.select(seconds)
            if any(key.fileobj is not wake_receiver for key, _ in ready):
                _notified(self._driver)
        if self._woken.is_set():
            self._woken.clear()
            wake_receiver.recv(4096)

    def _listen(self, wake_receiver: socket.socket) -> None:
        try:
            with answers_within(_LISTEN_SECONDS):
                connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        except BaseException:
            self._slot.release()
            raise
        self._connection, self._driver = connection, connection.connection.driver_connection
        connection.detach()
        with answers_within(_LISTEN_SECONDS):
            if pooled(connection.scalar(_PID), self._driver.info.backend_pid):
                self._listens = False
                self.disconnect()
                return
            connection.execute(_LOCK, {"lock": self._lock, "table": qualified_name(connection, self._table)})
            connection.exec_driver_sql(_LISTEN)
        self._selector = selectors.DefaultSelector()
        for readable in (self._driver.fileno(), wake_receiver):
            self._selector.register(readable, selectors.EVENT_READ)

    def close(self) -> None:
        """Stop listening for ever."""
        self.disconnect()
        for end in (self._wake_sender, self._wake_receiver):
            if end is not None:
                end.close()

    def disconnect(self) -> None:
        """Close the connection until the next wait, which listens anew: the session's lock and LISTEN end with it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._slot.release()
            if self._selector is not None:
                self._selector.close()
                self._selector = None
            self._driver.close()
            connection.invalidate()  # SQLAlchemy would reset it first, which a lost one cannot bear
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _notified(driver: Any) -> bool:
    """Read what the server has sent; whether it was a notification. ``driver.notifies`` would take ten times as long."""
    driver.pgconn.consume_input()
    notified = False
    while driver.pgconn.notifies():
        notified = True
    return notified


class AsyncChangeListener:
    """Wait between reads of the table, from a coroutine; see ``ChangeListener``."""

    def __init__(self, engine: AsyncEngine, table: Table, *, workers: bool = False, polls: bool = False) -> None:
        self._engine = engine
        self._table = table
        self._lock = WORKER_LOCK if workers else WATCHER_LOCK
        self._slot = _Slot(self._lock)
        self._name = engine.dialect.driver if engine.dialect.name == "postgresql" and not polls else ""
        self._connection: AsyncConnection | None = None
        self._driver: Any = None
        self._woken = asyncio.Event()

    async def wait(self, seconds: float) -> None:
        """Wait for ``seconds`` at most. The first time, and after a lost connection, only start to listen."""
        try:
            if self._connection is not None:
                await self._wait_for_notification(seconds)
                return
            if self._name in ("psycopg", "psycopg_async", "asyncpg") and self._slot.take(self._engine.pool):
                await self._listen()
                return
        except (DBAPIError, OSError, RuntimeError) as error:
            logger.debug("cannot listen for notifications, polling instead: %s", error)
            await self.close()
        await self._wait_until_woken(seconds)

    def wake(self) -> None:
        """End the present wait, or the next one."""
        self._woken.set()

    async def _wait_until_woken(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), seconds)
        self._woken.clear()

    async def _wait_for_notification(self, seconds: float) -> None:
        if self._name == "asyncpg":
            if self._driver.is_closed():
                raise RuntimeError("the connection is closed")
            await self._wait_until_woken(seconds)
            return
        if await self._notified():
            return
        loop, descriptor = asyncio.get_running_loop(), self._driver.fileno()
        loop.add_reader(descriptor, self._woken.set)
        try:
            await self._wait_until_woken(seconds)
        finally:
            loop.remove_reader(descriptor)
        await self._notified()

    async def _notified(self) -> bool:
        """Read what the server has sent; whether it was a notification."""
        try:
            return any([True async for _ in self._driver.notifies(timeout=0)])
        except Exception as error:
            raise RuntimeError(str(error)) from error

    async def _listen(self) -> None:
        try:
            connection = await self._engine.connect()
        except BaseException:
            self._slot.release()
            raise
        self._connection = connection
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        driver: Any = (await connection.get_raw_connection()).driver_connection
        self._driver = driver
        if connection.sync_connection is not None:
            connection.sync_connection.detach()
        client_pid = driver.get_server_pid() if self._name == "asyncpg" else driver.info.backend_pid
        if pooled(await connection.scalar(_PID), client_pid):
            await self.close()
            self._name = ""
            return
        name = await connection.run_sync(qualified_name, self._table)
        await connection.execute(_LOCK, {"lock": self._lock, "table": name})
        if self._name == "asyncpg":
            await driver.add_listener(WAKE_CHANNEL, lambda *_: self._woken.set())
        else:
            await connection.exec_driver_sql(_LISTEN)

    async def close(self) -> None:
        """Listen no more."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._slot.release()
            if self._name == "asyncpg":
                self._driver.terminate()
            else:
                await self._driver.close()
            await connection.invalidate()
            await connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
