"""Cancel, retry or prune many jobs by a filter, with a transaction for each batch."""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Protocol, Unpack

from mljobs.jobs import Batch, Filter, Filters, Pruned, Where
from mljobs.jobs._batches import all_batches, all_batches_async


class _Batches(Protocol):
    def cancel_batch(self, *args: Any, **kw: Any) -> Batch: ...
    def retry_batch(self, *args: Any, **kw: Any) -> Batch: ...
    def prune_batch(self, *args: Any, **kw: Any) -> Pruned: ...


class _AsyncBatches(Protocol):
    def cancel_batch(self, *args: Any, **kw: Any) -> Coroutine[Any, Any, Batch]: ...
    def retry_batch(self, *args: Any, **kw: Any) -> Coroutine[Any, Any, Batch]: ...
    def prune_batch(self, *args: Any, **kw: Any) -> Coroutine[Any, Any, Pruned]: ...


class BulkActions:
    """Bulk actions of ``JobStore``."""

    def cancel_many(
        self: _Batches,
        filter: Filter | str | None = None,  # noqa: A002 - as users say it
        *,
        where: Where | None = None,
        everything: bool = False,
        **fields: Unpack[Filters],
    ) -> int:
        """Cancel the queued and running jobs that a filter means, and return how many; see ``jobs.cancel_batch``."""
        batch = partial(self.cancel_batch, filter, where=where, everything=everything, **fields)
        return all_batches(batch)

    def retry_many(
        self: _Batches,
        filter: Filter | str | None = None,  # noqa: A002 - as users say it
        *,
        where: Where | None = None,
        everything: bool = False,
        **fields: Unpack[Filters],
    ) -> int:
        """Retry the failed and cancelled jobs that a filter means, and return how many; see ``jobs.retry_batch``."""
        batch = partial(self.retry_batch, filter, where=where, everything=everything, **fields)
        return all_batches(batch)

    def prune(
        self: _Batches,
        filter: Filter | str | None = None,  # noqa: A002 - as users say it
        *,
        where: Where | None = None,
        older_than: timedelta | datetime,
        keep_last: int = 0,
        batch: int = 1000,
        **fields: Unpack[Filters],
    ) -> int:
        """Delete finished records past their time, and return how many; see ``jobs.prune``."""
        options: dict[str, Any] = {"older_than": older_than, "keep_last": keep_last, "batch": batch, **fields}
        return all_batches(partial(self.prune_batch, filter, where=where, **options))


class AsyncBulkActions:
    """Bulk actions of ``AsyncJobStore``."""

    async def cancel_many(
        self: _AsyncBatches,
        filter: Filter | str | None = None,  # noqa: A002 - as users say it
        *,
        where: Where | None = None,
        everything: bool = False,
        **fields: Unpack[Filters],
    ) -> int:
        """Cancel the queued and running jobs that a filter means, and return how many; see ``jobs.cancel_batch``."""
        batch = partial(self.cancel_batch, filter, where=where, everything=everything, **fields)
        return await all_batches_async(batch)

    async def retry_many(
        self: _AsyncBatches,
        filter: Filter | str | None = None,  # noqa: A002 - as users say it
        *,
        where: Where | None = None,
        everything: bool = False,
        **fields: Unpack[Filters],
    ) -> int:
        """Retry the failed and cancelled jobs that a filter means, and return how many; see ``jobs.retry_batch``."""
        batch = partial(self.retry_batch, filter, where=where, everything=everything, **fields)
        return await all_batches_async(batch)

    async def prune(
        self: _AsyncBatches,
        filter: Filter | str | None = None,  # noqa: A002 - as users say it
        *,
        where: Where | None = None,
        older_than: timedelta | datetime,
        keep_last: int = 0,
        batch: int = 1000,
        **fields: Unpack[Filters],
    ) -> int:
        """Delete finished records past their time, and return how many; see ``jobs.prune``."""
        options: dict[str, Any] = {"older_than": older_than, "keep_last": keep_last, "batch": batch, **fields}
        return await all_batches_async(partial(self.prune_batch, filter, where=where, **options))
