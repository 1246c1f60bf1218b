"""Batch after batch, until a batch says that it was the last."""

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


def all_batches(batch: Callable[[Any], Done]) -> int:
    """Call ``batch`` with the cursor of the batch before, None at first; return how many records were changed."""
    done = batch(None)
    total = done.changed
    while done.cursor is not None:
        done = batch(done.cursor)
        total += done.changed
    return total


async def all_batches_async(batch: Callable[[Any], Coroutine[Any, Any, Done]]) -> int:
    """As ``all_batches``, for a coroutine function."""
    done = await batch(None)
    total = done.changed
    while done.cursor is not None:
        done = await batch(done.cursor)
        total += done.changed
    return total
