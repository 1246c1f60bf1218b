"""Where handlers run in the worker's own process: threads, or one event loop. For others see ``_executors``.

Each place is given runs, and hands what became of them to the :class:`OutcomeWriter`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from mljobs.jobs import Outcome
from mljobs.states import MlJobStatus
from mljobs.store._keeper import Keeper
from mljobs.store._run import Run
from mljobs.store._store import JobStore
from mljobs.worker._calling import await_handler, call_handler
from mljobs.worker._finished import FinishedRun
from mljobs.worker._handlers import Handler
from mljobs.worker._prefetching import Prefetcher
from mljobs.worker._recording import OutcomeWriter

_CLOSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What every place works with.

    Attributes:
        store: Where the jobs are.
        handlers: By kind.
        prefetcher: Gives runs.
        writer: Takes outcomes.
        keeper: Keeps the leases.
        lease: Seconds of each lease.
        max_attempts: Of a job whose executor's process died.
        on_error: Called with what ends the worker.
    """

    store: JobStore
    handlers: Mapping[StrEnum, Handler]
    prefetcher: Prefetcher
    writer: OutcomeWriter
    keeper: Keeper
    lease: float
    max_attempts: int
    on_error: Callable[[BaseException], None]

    def finish(self, run: Run, handler: Handler, outcome: Outcome | None, seconds: float) -> None:
        """Hand the outcome on, and free the slot."""
        if outcome is not None and outcome.status is MlJobStatus.FAILED:
            self.keeper.write_reports(run)  # how far it came
        self.writer.put(FinishedRun(run, outcome, handler, seconds))
        self.prefetcher.ended(run)


class HandlerThreads:
    """Threads that each take a run, start its handler, and take the next.

    Args:
        context: What to work with.
        number: How many.
        start: Starts one run; returns before it has ended if it runs in another thread or process.
    """

    def __init__(self, context: WorkerContext, number: int, start: Callable[[Run, Handler], None]) -> None:
        self._context = context
        self._start = start
        # Daemons: a handler that hangs must not keep the process from ending after its grace.
        self._threads = [
            threading.Thread(target=self._loop, name=f"mljobs-worker-{at}", daemon=True) for at in range(1, number + 1)
        ]

    def open(self) -> None:
        """Start."""
        for thread in self._threads:
            thread.start()

    def _loop(self) -> None:
        start, following = self._start, self._context.prefetcher.next
        handlers: Mapping[str, Handler] = {str(kind): handler for kind, handler in self._context.handlers.items()}
        try:
            while (run := following()) is not None:
                start(run, handlers[run.claim.kind])
        except BaseException as error:  # noqa: BLE001 - raised to whoever called run()
            self._context.on_error(error)

    def join(self, timeout: float) -> None:
        """Wait for those that are not in a handler that hangs."""
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))


class ThreadPlace:
    """Calls a handler in the thread that took the run.

    Args:
        context: What to work with.
    """

    def __init__(self, context: WorkerContext) -> None:
        self._context = context

    def start(self, run: Run, handler: Handler) -> None:
        """Call the handler. Its outcome is written with the claim of this thread's next run."""
        began = time.monotonic()
        outcome = call_handler(handler.function, run, handler.policy)
        self._context.finish(run, handler, outcome, time.monotonic() - began)


class LoopPlace:
    """Awaits handlers on one event loop.

    Args:
        context: What to work with.
        loop: A running loop of the caller; None for one of its own, in a thread.
    """

    def __init__(self, context: WorkerContext, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._context = context
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread: threading.Thread | None = None
        if loop is None:
            loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, args=(loop,), name="mljobs-loop", daemon=True)
            self._thread.start()
        self._loop = loop

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def start(self, run: Run, handler: Handler) -> None:
        """Begin to await the handler."""
        self._loop.call_soon_threadsafe(self._begin, run, handler)

    def _begin(self, run: Run, handler: Handler) -> None:
        task = self._loop.create_task(self._await(run, handler))
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)

    async def _await(self, run: Run, handler: Handler) -> None:
        began = time.monotonic()
        outcome = await await_handler(handler.function, run, handler.policy, self._context.max_attempts)
        self._context.finish(run, handler, outcome, time.monotonic() - began)
        self._context.writer.nudge()

    def close(self) -> None:
        """Cancel what still runs; end the loop, if it is our own."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel)
        if self._thread is not None:
            self._thread.join(timeout=_CLOSE_SECONDS)

    def _cancel(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if self._thread is not None:
            asyncio.gather(*tasks, return_exceptions=True).add_done_callback(lambda _: self._loop.stop())
            if not tasks:
                self._loop.stop()
