"""What a fork of the process does to the connections of stores.

A child leaves its parent's connections alone: it forgets them, and opens its own. That is enough on PostgreSQL.
SQLite keeps what it knows of its files, such as which connection has which lock, in the memory of the process, and
the child has a copy. A lock that was held at the fork is held there for ever, by nobody. And as long as the child has
an inherited connection it does not lock the file for itself, so that its parent, as the last one to close it, removes
the WAL file under the child, with what the child commits. So before a fork the operations under way on SQLite files
come to their end, others wait, and all connections at rest are closed.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any, Protocol
from weakref import WeakSet

_PATIENCE = 1.0
"""Seconds that a fork waits for operations to end, a transaction of the host's among them."""
_NO_PATIENCE = 10.0
"""Seconds for which forks do not wait after one that has waited in vain."""
_SWITCH = 0.006
"""Seconds, longer than a thread runs at a time: after it, one that has looked at ``under_way`` has its connection."""

under_way = False
"""Whether operations on SQLite files have to ``wait``; asked first, for it costs nothing."""


class Connections(Protocol):
    """The connections of a store."""

    @property
    def closed_at_forks(self) -> bool:
        """Whether they are to be closed before a fork."""

    def in_use(self) -> bool:
        """Whether an operation has one."""

    def close_all(self) -> None:
        """Close those at rest."""

    def leave_to_parent(self) -> None:
        """Forget them, in the child."""


_all: WeakSet[Connections] = WeakSet()
_forking = threading.Lock()
_in_vain_until = 0.0
_done = threading.Event()
_of_the_parent: list[Any] = []


def register(connections: Connections) -> None:
    """Have these take part in each fork from now on."""
    _all.add(connections)


def wait() -> None:
    """Wait until the fork is over."""
    _done.wait(2 * _PATIENCE)


def keep_from_being_collected(*inherited: Any) -> None:
    """Keep what belongs to the parent: to collect it would write to its sockets."""
    _of_the_parent.append(inherited)


def _before() -> None:
    global under_way, _in_vain_until  # noqa: PLW0603
    _forking.acquire()
    closed = [connections for connections in [*_all] if connections.closed_at_forks]
    if not closed:
        return
    _done.clear()
    under_way = True
    now = time.monotonic()
    # A session of the host's may stay open, and a pool of processes forks again at once.
    if threading.active_count() > 1 and now >= _in_vain_until and not _come_to_rest(closed, now + _PATIENCE):
        _in_vain_until = now + _PATIENCE + _NO_PATIENCE
    for connections in closed:
        connections.close_all()


def _come_to_rest(closed: list[Connections], end: float) -> bool:
    """Wait until no operation has one of these connections; return whether that was before ``end``."""
    time.sleep(_SWITCH)
    while any(connections.in_use() for connections in closed):
        if time.monotonic() >= end:
            return False
        time.sleep(0.001)
    return True


def _after_in_parent() -> None:
    global under_way  # noqa: PLW0603
    under_way = False
    _done.set()
    _forking.release()


def _after_in_child() -> None:
    global under_way, _forking, _done
    under_way, _forking, _done = False, threading.Lock(), threading.Event()
    for connections in [*_all]:
        connections.leave_to_parent()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
