"""How long to wait for a server that says nothing: a partition, a frozen server or a stalled proxy sends no reset.

What is far too long depends on who asks: a migration may take an hour, the renewal of a lease may not take longer than the
lease. So a thread says it around a call, and connections that :func:`obey_timeouts` made obey::

    with answers_within(30):
        store.renew(claims)         # OperationalError after 30 s; the connection is closed and invalidated

TCP has timeouts of its own (see :mod:`mljobs.db._engines`). They find a host or a network that is gone, and not a peer whose
kernel still acknowledges what nobody reads.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import event

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

_T = TypeVar("_T")
_LONGEST = 30.0
_SHORTEST = 1.0
_SHORTEST_CONNECT = 2  # libpq's own least


class _Limit(threading.local):
    seconds: float | None = None


_limit = _Limit()


def answer_seconds(lease: float, left: float = math.inf) -> float:
    """Return how many seconds a holder of leases waits for an answer: half a lease, but 1 to 30.

    Args:
        lease: Seconds of each.
        left: Seconds until the first ends, after which no answer helps.
    """
    return max(_SHORTEST, min(_LONGEST, lease / 2, left))


class answers_within:  # noqa: N801 - used like a function
    """Around calls of this thread: no statement, and no attempt to connect, waits longer for the server.

    Args:
        seconds: For each; None for as long as it takes. To connect at least 2.

    Raises:
        OperationalError: The server did not answer; what became of the statement is not known.
    """

    __slots__ = ("_before", "_seconds")

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._before: float | None = None

    def __enter__(self) -> None:
        self._before, _limit.seconds = _limit.seconds, self._seconds

    def __exit__(self, *_: object) -> None:
        _limit.seconds = self._before


def limit_idle_transaction(connection: Connection, seconds: float) -> None:
    """Have PostgreSQL end this transaction if nothing more comes from us for so long.

    Behind a partition, or in a process that was stopped, its locks would last until TCP gives up: for hours.

    Args:
        connection: In the transaction.
        seconds: Between two statements.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {max(1, int(seconds * 1000))}")


def obey_timeouts(engine: Engine) -> None:
    """Have the connections of this engine obey ``answers_within``; an engine of another driver is left as it is."""
    if engine.dialect.name != "postgresql" or engine.dialect.driver != "psycopg":
        return

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: object, _record: object, arguments: Any, parameters: Any) -> Any:
        if _limit.seconds is not None:
            said = int(parameters.get("connect_timeout") or 0) or math.inf
            parameters = {**parameters, "connect_timeout": min(said, max(_SHORTEST_CONNECT, math.ceil(_limit.seconds)))}
        return _connection_class().connect(*arguments, **parameters)


@cache
def _connection_class() -> Any:
    import psycopg  # noqa: PLC0415 - SQLite needs no libpq

    class Connection(psycopg.Connection[Any]):
        """One that gives up on a silent server."""

        def wait(self, gen: Generator[Any, Any, _T], *args: Any, **kw: Any) -> _T:
            """Wait as psycopg does, but not longer than the thread has said."""
            seconds = _limit.seconds
            if seconds is None:
                return super().wait(gen, *args, **kw)
            try:
                return super().wait(_until(gen, time.monotonic() + seconds), *args, **kw)
            except TimeoutError as silence:
                self.close()
                raise psycopg.OperationalError(f"the server has not answered within {seconds:g} s") from silence

    return Connection


def _until(gen: Generator[Any, Any, _T], end: float) -> Generator[Any, Any, _T]:
    """Do what ``gen`` does, unless nothing has come when it is too late."""
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() >= end:
                raise TimeoutError
            wanted = gen.send(ready)
    except StopIteration as stop:
        result: _T = stop.value
        return result
