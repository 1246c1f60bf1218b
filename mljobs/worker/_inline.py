"""Run queued jobs in the calling thread, for tests: without threads it works in a transaction of the caller."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from mljobs import jobs
from mljobs.errors import TerminalStateError
from mljobs.store._run import Run
from mljobs.store._store import JobStore
from mljobs.worker._calling import await_handler, call_handler
from mljobs.worker._finished import FinishedRun
from mljobs.worker._handlers import Handler
from mljobs.worker._retrying import submit_retry
from mljobs.worker._worker import Worker


def run_jobs(store: JobStore[Any], worker: Worker[Any], *, most: int = 1000) -> dict[str, int]:
    """Run what is queued and due, one job after the other in this thread, until nothing is left.

    A failure is retried as the worker would; the retry is run too, unless it has to wait. A handler does not
    notice that its job is cancelled.

    Args:
        store: Where the jobs are. The worker's own store is not used.
        worker: Whose handlers are called.
        most: How many jobs at most.

    Returns:
        How many ended how: ``{"completed": 2, "failed": 1}``.
    """
    handlers = {str(kind): handler for kind, handler in worker.handlers.items()}
    counted: Counter[str] = Counter()
    while counted.total() < most and (claims := store.claim(worker="test", kinds=list(handlers))):
        counted[_run(store, handlers[str(claims[0].job.kind)], Run(claims[0]))] += 1
    return dict(counted)


def _run(store: JobStore[Any], handler: Handler, run: Run[Any]) -> str:
    """Run one job; return how it ended."""
    if handler.is_async:
        outcome = asyncio.run(await_handler(handler.function, run, handler.policy, max_attempts=1))
    else:
        outcome = call_handler(handler.function, run, handler.policy)
    report = run.take_report(0.0, everything=True)
    if report is not None:
        store.report_many([report])
    if outcome is None:
        store.release([run.claim])
        return "cancelled"
    entry = FinishedRun(run, outcome, handler, 0.0)
    with store.connect() as bind:
        (error,) = jobs.finish_many(bind, [outcome])
        if error is None and not entry.batchable:
            submit_retry(bind, entry)
    if error is None:
        return outcome.status.token
    return "cancelled" if isinstance(error, TerminalStateError) else "lost"
