"""Where handlers run: threads of the worker, one event loop, or any executor.

Each place takes runs from the intake and puts what became of them into the outbox.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mljobs.errors import LeaseLostError
from mljobs.jobs import Outcome
from mljobs.states import MlJobStatus
from mljobs.store._keeper import Keeper
from mljobs.store._run import Run
from mljobs.store._store import JobStore
from mljobs.worker._handlers import Handler
from mljobs.worker._intake import Intake
from mljobs.worker._outbox import Entry, Outbox
from mljobs.worker._performing import Ended, Errand, do, ending, perform, perform_async, putting_back


@dataclass(frozen=True, slots=True)
class Desk:
    """What every place works with.

    Attributes:
        store: Where the jobs are.
        handlers: By kind.
        intake: Gives runs.
        outbox: Takes outcomes.
        keeper: Keeps the leases.
        lease: Seconds of each lease.
        max_attempts: Of a job whose executor's process died.
        on_error: Told of what ends the worker.
    """

    store: JobStore
    handlers: Mapping[StrEnum, Handler]
    intake: Intake
    outbox: Outbox
    keeper: Keeper
    lease: float
    max_attempts: int
    on_error: Callable[[BaseException], None]

    def settle(
        self, run: Run, handler: Handler, outcome: Outcome | None, seconds: float, *, elsewhere: bool = True
    ) -> None:
        """Hand the outcome on, and the slot back."""
        if outcome is not None and outcome.status is MlJobStatus.FAILED:
            self.keeper.write_progress(run)  # how far it came
        self.outbox.put(Entry(run, outcome, handler, seconds))
        if elsewhere:
            self.outbox.nudge()  # a lane takes it along when it claims the next run; others do not come back
        self.intake.ended(run)


class Lanes:
    """Threads that each take a run, call its handler, and take the next.

    Args:
        desk: What to work with.
        number: How many.
        start: Calls or begins one run; returns before it has ended if it runs elsewhere.
    """

    def __init__(self, desk: Desk, number: int, start: Callable[[Run, Handler], None]) -> None:
        self._desk = desk
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
        start, following = self._start, self._desk.intake.next
        handlers: Mapping[str, Handler] = {str(kind): handler for kind, handler in self._desk.handlers.items()}
        try:
            while (run := following()) is not None:
                start(run, handlers[run.claim.kind])
        except BaseException as error:  # noqa: BLE001 - told to whoever called run()
            self._desk.on_error(error)

    def join(self, timeout: float) -> None:
        """Wait for those that are not in a handler that hangs."""
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))


class Here:
    """Calls a handler in the thread that took the run.

    Args:
        desk: What to work with.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def start(self, run: Run, handler: Handler) -> None:
        """Call the handler."""
        began = time.monotonic()
        outcome = perform(handler.function, run)
        self._desk.settle(run, handler, outcome, time.monotonic() - began, elsewhere=False)


class Loop:
    """Awaits handlers on one event loop.

    Args:
        desk: What to work with.
        loop: A running loop of the caller; None for one of its own, in a thread.
    """

    def __init__(self, desk: Desk, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._desk = desk
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
        task = self._loop.create_task(self._perform(run, handler))
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)

    async def _perform(self, run: Run, handler: Handler) -> None:
        began = time.monotonic()
        outcome = await perform_async(handler.function, run, self._desk.max_attempts)
        self._desk.settle(run, handler, outcome, time.monotonic() - began)

    def close(self) -> None:
        """Cancel what still runs; end the loop, if it is our own."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel)
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _cancel(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if self._thread is not None:
            asyncio.gather(*tasks, return_exceptions=True).add_done_callback(lambda _: self._loop.stop())
            if not tasks:
                self._loop.stop()


class Elsewhere:
    """Sends handlers to an executor: processes of this machine, or a cluster.

    Args:
        desk: What to work with.
        executor: Any; threads of this process are called without a second connection.
    """

    def __init__(self, desk: Desk, executor: Executor) -> None:
        self._desk = desk
        self._executor = executor
        self._here = isinstance(executor, ThreadPoolExecutor)
        self._futures: set[Future[Any]] = set()

    def start(self, run: Run, handler: Handler) -> None:
        """Send the handler off."""
        began = time.monotonic()
        try:
            if self._here:
                future: Future[Any] = self._executor.submit(perform, handler.function, run)
            else:
                store = self._desk.store
                errand = Errand(handler.function, run.claim, store.engine.url, store.model, self._desk.lease)
                future = self._executor.submit(do, errand)
        except BaseException as error:  # noqa: BLE001 - the executor is broken, or closed
            self._broken(run, handler, error)
            return
        self._futures.add(future)
        future.add_done_callback(lambda done: self._ended(done, run, handler, began))

    def _ended(self, future: Future[Any], run: Run, handler: Handler, began: float) -> None:
        self._futures.discard(future)
        seconds = time.monotonic() - began
        try:
            result = future.result()
        except BrokenExecutor as error:
            self._broken(run, handler, error)
            return
        except (CancelledError, Exception) as error:  # noqa: BLE001 - it could not be sent, or its answer could not
            if _came_to_nothing(error):
                self._put_back(run, handler, error)
            else:
                self._desk.settle(run, handler, ending(run, error), seconds)
            return
        outcome = result.outcome(run.claim) if isinstance(result, Ended) else result
        if outcome is None and not (run.cancelled or run.lost):
            # The other process saw it first, or could not reach the database for so long that it gave the lease up. Putting
            # the job back is right for all three: a cancelled one stays so, a lost one is refused, ours is done again.
            self._put_back(run, handler, LeaseLostError(run.claim.job_id, run.claim.token))
            return
        self._desk.settle(run, handler, outcome, seconds)

    def _broken(self, run: Run, handler: Handler, error: BaseException) -> None:
        """Stop the worker: this executor takes nothing any more."""
        self._desk.on_error(error)
        self._desk.intake.stop()  # before the job is back: claimed again here, it would lose an attempt to no process
        self._put_back(run, handler, error)

    def _put_back(self, run: Run, handler: Handler, error: BaseException) -> None:
        """Put a job back whose process died with it, or gave it up; fail it if that has happened too often."""
        self._desk.settle(run, handler, putting_back(run, error, self._desk.max_attempts), 0.0)

    def close(self) -> None:
        """Take back what has not begun."""
        for future in list(self._futures):
            future.cancel()


_DEATHS = {
    "distributed": {"KilledWorker"},
    "ray": {"WorkerCrashedError", "NodeDiedError", "OutOfMemoryError", "ActorDiedError"},
}
"""How engines say that a process died, by the package and the name: none of them need be installed."""


def _came_to_nothing(error: BaseException) -> bool:
    """Whether the call ended without the handler's doing: its process died, or the executor dropped it."""
    names = _DEATHS.get(type(error).__module__.partition(".")[0], ())
    return isinstance(error, CancelledError) or type(error).__name__ in names
