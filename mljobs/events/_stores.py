"""Finished jobs of a store's own transaction, delivered after its commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from sqlalchemy import Connection

from mljobs.db._binds import Bind
from mljobs.events._connections import ConnectionPending, pending_of_connection
from mljobs.events._delivering import Origin, Store, deliver
from mljobs.events._sessions import SessionPending, pending_of


@contextmanager
def delivering(inner: AbstractContextManager[Bind], store: Store) -> Iterator[Bind]:
    """Enter a store's transaction, and deliver what has finished in it once it has ended well.

    Args:
        inner: The transaction.
        store: Whose it is.
    """
    with inner as bind:
        pending = _cleared(bind, store)
        yield bind
        # Taken before the commit: after it another thread may work on the same connection. A session delivers by itself.
        finished = pending.take() if isinstance(pending, ConnectionPending) else []
    if finished:
        deliver(finished, origin_of(store))


def collecting(bind: Bind, store: Store) -> Callable[[], list[Any]]:
    """Keep what finishes in the transaction of an async store; return what takes it, once that has ended well.

    Args:
        bind: The connection or session in which the operation is about to run.
        store: Whose it is.
    """
    pending = _cleared(bind, store)
    return pending.take if isinstance(pending, ConnectionPending) else list


def _cleared(bind: Bind, store: Store) -> SessionPending | ConnectionPending:
    """Forget what an operation that failed has left; what comes is of this store."""
    pending = pending_of(bind)
    pending.take()
    pending.store, pending.delivered_by_store = store, True
    return pending


def join(connection: Connection, store: Store) -> None:
    """Let what a store finishes on a host's connection be delivered when the host has committed.

    Args:
        connection: In whose transaction the store works.
        store: Whose callbacks are called.
    """
    pending = pending_of_connection(connection)
    pending.store, pending.delivered_by_store = store, False


def origin_of(store: Store) -> Origin:
    """Return the origin of what finishes through a store."""
    return Origin(store=store)
