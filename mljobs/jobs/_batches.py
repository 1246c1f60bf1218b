"""Run one batch after the other until the last."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol


class Done(Protocol):
    """What one batch did.

    Attributes:
        changed: How many records it changed.
        cursor: Where the next batch begins; None after the last one.
    """

    @property
    def changed(self) -> int: ...
    @property
    def cursor(self) -> Any: ...


def all_batches(batch: Callable[..., Done]) -> int:
    """Call ``batch(after=...)`` with the cursor of the batch before, None at first; return how many records were changed."""
    done = batch(after=None)
    total = done.changed
    while done.cursor is not None:
        done = batch(after=done.cursor)
        total += done.changed
    return total


async def all_batches_async(batch: Callable[..., Coroutine[Any, Any, Done]]) -> int:
    """Do what ``all_batches`` does, with a coroutine function."""
    done = await batch(after=None)
    total = done.changed
    while done.cursor is not None:
        done = await batch(after=done.cursor)
        total += done.changed
    return total
