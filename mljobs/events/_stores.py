"""What has finished in a store's own transaction, told once that has ended well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from mljobs.events._connections import OfConnection
from mljobs.events._delivering import Origin, Store
from mljobs.events._sessions import Bind, OfSession, kept_of


@contextmanager
def telling(inner: AbstractContextManager[Bind], store: Store) -> Iterator[Bind]:
    """Enter a store's transaction, and tell what has finished in it once it has ended well.

    Args:
        inner: The transaction.
        store: Whose it is.
    """
    with inner as bind:
        kept = _kept_anew(bind, store)
        yield bind
    if isinstance(kept, OfConnection):  # a session has told by itself
        kept.tell()


def kept_by(bind: Bind, store: Store) -> Callable[[], list[Any]]:
    """Keep what finishes in the transaction of an async store; return what takes it, once that has ended well.

    Args:
        bind: The connection or session in which the operation is about to run.
        store: Whose it is.
    """
    kept = _kept_anew(bind, store)
    return kept.take if isinstance(kept, OfConnection) else list


def _kept_anew(bind: Bind, store: Store) -> OfSession | OfConnection:
    """Forget what an operation that failed has left; what comes is of this store."""
    kept = kept_of(bind)
    kept.take()
    kept.store = store
    return kept


def origin_of(store: Store) -> Origin:
    """Return the origin of what finishes through a store."""
    return Origin(store=store)
