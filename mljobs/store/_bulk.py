"""Many jobs by one filter, a transaction for each batch: what was done stays done if the rest is interrupted."""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import datetime, timedelta
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
        return all_batches(
            lambda after: self.cancel_batch(filter, where=where, everything=everything, after=after, **fields)
        )

    def retry_many(
        self: _Batches,
        filter: Filter | str | None = None,  # noqa: A002 - as users say it
        *,
        where: Where | None = None,
        everything: bool = False,
        **fields: Unpack[Filters],
    ) -> int:
        """Retry the failed and cancelled jobs that a filter means, and return how many; see ``jobs.retry_batch``."""
        return all_batches(
            lambda after: self.retry_batch(filter, where=where, everything=everything, after=after, **fields)
        )

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
        return all_batches(
            lambda after: self.prune_batch(
                filter, where=where, older_than=older_than, keep_last=keep_last, batch=batch, after=after, **fields
            )
        )


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
        return await all_batches_async(
            lambda after: self.cancel_batch(filter, where=where, everything=everything, after=after, **fields)
        )

    async def retry_many(
        self: _AsyncBatches,
        filter: Filter | str | None = None,  # noqa: A002 - as users say it
        *,
        where: Where | None = None,
        everything: bool = False,
        **fields: Unpack[Filters],
    ) -> int:
        """Retry the failed and cancelled jobs that a filter means, and return how many; see ``jobs.retry_batch``."""
        return await all_batches_async(
            lambda after: self.retry_batch(filter, where=where, everything=everything, after=after, **fields)
        )

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
        return await all_batches_async(
            lambda after: self.prune_batch(
                filter, where=where, older_than=older_than, keep_last=keep_last, batch=batch, after=after, **fields
            )
        )
