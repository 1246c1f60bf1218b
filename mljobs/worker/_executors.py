"""Handlers in a ``concurrent.futures.Executor``: in processes of this machine, or in a cluster."""

from __future__ import annotations

import time
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor
from typing import Any

from mljobs.errors import LeaseLostError
from mljobs.jobs import Outcome
from mljobs.store._run import Run
from mljobs.worker._calling import call_handler, outcome_of_call, requeue_or_fail
from mljobs.worker._handlers import Handler
from mljobs.worker._places import WorkerContext
from mljobs.worker._remote import RemoteCall, RemoteResult, run_remote_call


class ExecutorPlace:
    """Sends handlers to an executor.

    Args:
        context: What to work with.
        executor: Any; threads of this process are called without a second connection.
    """

    def __init__(self, context: WorkerContext, executor: Executor) -> None:
        self._context = context
        self._given = self._executor = executor
        self._in_process = isinstance(executor, ThreadPoolExecutor)
        self._futures: set[Future[Any]] = set()

    def start(self, run: Run, handler: Handler) -> None:
        """Send the handler off."""
        began = time.monotonic()
        try:
            if self._in_process:
                future: Future[Any] = self._executor.submit(call_handler, handler.function, run, handler.policy)
            else:
                call = self._call(run, handler)
                future = self._executor.submit(run_remote_call, call)
        except BaseException as error:  # noqa: BLE001 - the executor is broken, or closed
            self._broken(run, handler, error)
            return
        self._futures.add(future)
        future.add_done_callback(lambda done: self._ended(done, run, handler, began))

    def _call(self, run: Run, handler: Handler) -> RemoteCall:
        store = self._context.store
        return RemoteCall(
            handler.function, handler.policy, run.claim, store.engine.url, store.model, self._context.lease
        )

    def _ended(self, future: Future[Any], run: Run, handler: Handler, began: float) -> None:
        self._futures.discard(future)
        seconds = time.monotonic() - began
        try:
            result = future.result()
        except BrokenExecutor as error:
            self._broken(run, handler, error)
            return
        except (CancelledError, Exception) as error:  # noqa: BLE001 - it could not be sent, or its answer could not
            if _process_died(error):
                self._put_back(run, handler, error)
            else:
                self._finish(run, handler, outcome_of_call(run, handler.policy, error), seconds)
            return
        outcome = result.outcome_of(run) if isinstance(result, RemoteResult) else result
        if outcome is None and not (run.cancelled or run.lost):
            # The other process saw it first, or could not reach the database for so long that it gave the lease up. Putting
            # the job back is right for all three: a cancelled one stays so, a lost one is refused, ours is done again.
            self._put_back(run, handler, LeaseLostError(run.claim.job_id, run.claim.token))
            return
        self._finish(run, handler, outcome, seconds)

    def _finish(self, run: Run, handler: Handler, outcome: Outcome | None, seconds: float) -> None:
        self._context.finish(run, handler, outcome, seconds)
        self._context.writer.nudge()  # the thread that claims next may be asleep

    def _broken(self, run: Run, handler: Handler, error: BaseException) -> None:
        """Stop the worker: this executor takes nothing any more."""
        self._context.on_error(error)
        self._context.prefetcher.stop()  # before the job is back: claimed here again, it would lose an attempt for nothing
        self._put_back(run, handler, error)

    def _put_back(self, run: Run, handler: Handler, error: BaseException) -> None:
        """Put a job back whose process died with it, or gave it up; fail it if that has happened too often."""
        self._finish(run, handler, requeue_or_fail(run, error, self._context.max_attempts), 0.0)

    def close(self) -> None:
        """Take back what has not begun."""
        for future in list(self._futures):
            future.cancel()


_DEATHS = {
    "distributed": {"KilledWorker"},
    "ray": {"WorkerCrashedError", "NodeDiedError", "OutOfMemoryError", "ActorDiedError"},
}
"""How engines say that a process died, by the package and the name: none of them need be installed."""


def _process_died(error: BaseException) -> bool:
    """Whether the call ended without the handler's doing: its process died, or the executor dropped it."""
    names = _DEATHS.get(type(error).__module__.partition(".")[0], ())
    return isinstance(error, CancelledError) or type(error).__name__ in names
