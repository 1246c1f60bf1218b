"""What has finished in a store's own transaction, told once that has ended well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from sqlalchemy.orm import Session

from mljobs.events.connections import OfConnection, of_connection
from mljobs.events.delivering import Origin, Store
from mljobs.events.sessions import Bind, of_session


@contextmanager
def telling(inner: AbstractContextManager[Bind], store: Store) -> Iterator[Bind]:
    """Enter a store's transaction, and tell what has finished in it once it has ended well.

    Args:
        inner: The transaction.
        store: Whose it is.
    """
    with inner as bind:
        kept = of_session(bind) if isinstance(bind, Session) else of_connection(bind)
        kept.take()
        kept.store = store
        yield bind
    if isinstance(kept, OfConnection):  # a session has told by itself
        kept.tell()


def kept_by(bind: Bind, store: Store) -> Callable[[], list[Any]]:
    """Keep what finishes in the transaction of an async store; return what takes it, once that has ended well.

    Args:
        bind: The connection or session in which the operation is about to run.
        store: Whose it is.
    """
    kept = of_session(bind) if isinstance(bind, Session) else of_connection(bind)
    kept.take()
    kept.store = store
    return kept.take if isinstance(kept, OfConnection) else list


def origin_of(store: Store) -> Origin:
    """Return the origin of what finishes through a store."""
    return Origin(store=store)
