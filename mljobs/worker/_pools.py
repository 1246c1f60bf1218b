"""Handlers in a ``ProcessPoolExecutor``: a pool is replaced when a process dies, and ends with the worker."""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from multiprocessing.connection import wait as wait_for_sentinels
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from uuid import UUID

from mljobs._logging import logger_of
from mljobs.store._run import Run
from mljobs.worker._executors import ExecutorPlace
from mljobs.worker._handlers import Handler
from mljobs.worker._places import WorkerContext
from mljobs.worker._remote import RemoteCall, end_with_parent

logger = logger_of("mljobs.worker")

REBUILDS_MAX = 10
"""A pool that breaks more often than this in ``REBUILD_SECONDS`` ends the worker."""
REBUILD_SECONDS = 60.0
_END_SECONDS = 10.0

Call = tuple[Run, Handler]


class PoolPlace(ExecutorPlace):
    """Sends handlers to the processes of a pool.

    When a process dies, Python's pool takes nothing more and fails all calls. Here the pool is made anew. The job of the
    dead process is put back, and that counts as an attempt; the others are started again under the lease that they have.

    Args:
        context: What to work with.
        executor: The pool; from now on the worker's own.
    """

    def __init__(self, context: WorkerContext, executor: ProcessPoolExecutor) -> None:
        super().__init__(context, executor)
        self._make = _maker(executor)
        self._pool = executor
        if is_broken(executor):
            self._use(self._make())
        elif not _processes(executor):  # none has begun yet
            _prepare(executor)
        self._notes = Path(tempfile.mkdtemp(prefix="mljobs-"))
        self._lock = threading.Lock()
        self._known: dict[int, BaseProcess] = {}
        self._broken_calls: list[Call] = []
        self._dead: dict[int, BaseProcess] | None = None  # None while the pool is whole
        self._last_dead: Mapping[int, BaseProcess] = {}
        self._sent: dict[UUID, ProcessPoolExecutor] = {}
        self._rebuilt: list[float] = []
        self._closing = False

    def _use(self, pool: ProcessPoolExecutor) -> None:
        self._pool = self._executor = pool

    def start(self, run: Run, handler: Handler) -> None:
        """Send the handler off; while the pool is made anew, keep it until then."""
        with self._lock:
            if self._dead is not None:
                self._broken_calls.append((run, handler))
                return
            self._sent[run.claim.job_id] = self._pool
        super().start(run, handler)
        processes = _processes(self._pool)
        with self._lock:
            begun = processes.keys() - self._known.keys()
            self._known.update(processes)
        if begun:
            _look_again(self._pool)

    def _call(self, run: Run, handler: Handler) -> RemoteCall:
        return super()._call(run, handler).with_note(str(self._notes / run.claim.job_id.hex))

    def _broken(self, run: Run, handler: Handler, error: BaseException) -> None:
        """Make the pool anew, once for all calls that it has failed."""
        if not isinstance(error, BrokenExecutor) or self._closing:
            super()._broken(run, handler, error)
            return
        with self._lock:
            late = self._dead is None and self._sent.get(run.claim.job_id) is not self._pool
            if not late:
                self._broken_calls.append((run, handler))
            if self._dead is not None:
                return
        if late:  # its pool has been replaced already
            self._again(run, handler, error, self._last_dead)
            return
        with self._lock:
            self._known.update(_processes(self._pool))
            # Now, before the pool ends the other processes too.
            ready = set(wait_for_sentinels([each.sentinel for each in self._known.values()], timeout=0))
            self._dead = {pid: each for pid, each in self._known.items() if each.sentinel in ready}
        threading.Thread(target=self._recover, args=(error,), name="mljobs-pool", daemon=True).start()

    def _recover(self, error: BaseException) -> None:
        try:
            _wait_for_end(self._pool)
            self._end_processes()
            wait_for(list(self._futures), timeout=_END_SECONDS)
            now = time.monotonic()
            self._rebuilt = [at for at in self._rebuilt if now - at < REBUILD_SECONDS] + [now]
            often = len(self._rebuilt) > REBUILDS_MAX
            pool = None if often else self._make()
        except Exception as failure:  # noqa: BLE001 - it cannot be made: the worker ends with the reason
            error, pool = failure, None
        with self._lock:
            dead, calls = self._dead or {}, self._broken_calls
            self._known, self._broken_calls, self._last_dead = {}, [], dead
            if pool is not None:
                self._use(pool)
                self._dead = None
        if pool is None:
            for run, handler in calls:
                super()._broken(run, handler, error)
            return
        logger.warning(
            "a process of the pool died (%s); the pool is made anew for %d jobs",
            ", ".join(f"pid {pid}, exit code {each.exitcode}" for pid, each in dead.items()) or "which is not known",
            len(calls),
        )
        for run, handler in calls:
            self._again(run, handler, error, dead)

    def _again(self, run: Run, handler: Handler, error: BaseException, dead: Mapping[int, BaseProcess]) -> None:
        """Put a job back whose process has died; start another one again, under the lease that it has."""
        if self._process_of(run) in dead or self._context.prefetcher.stopped:
            self._put_back(run, handler, error)
        elif run.cancelled or run.lost:
            self._finish(run, handler, None, 0.0)
        else:
            self.start(run, handler)

    def _process_of(self, run: Run) -> int | None:
        """Return the process that runs this job's handler; None where none has begun, or it has ended."""
        try:
            return int((self._notes / run.claim.job_id.hex).read_text())
        except (OSError, ValueError):
            return None

    def _end_processes(self) -> None:
        """Kill what is left of the pool: nothing may run a job twice."""
        self._known.update(_processes(self._pool))
        for process in self._known.values():
            if process.is_alive():
                process.kill()
        for process in self._known.values():
            process.join(_END_SECONDS)

    def close(self) -> None:
        """Take back what has not begun; kill the processes whose handlers have not ended in time."""
        self._closing = True
        super().close()
        if self._context.prefetcher.abandoned:
            self._end_processes()
        if self._pool is not self._given:
            self._pool.shutdown(wait=False)
        shutil.rmtree(self._notes, ignore_errors=True)


# ------------------------------------------------------------------------------------------- what a pool does not say


def is_broken(pool: ProcessPoolExecutor) -> bool:
    """Whether a process of the pool has died: it takes nothing more."""
    return bool(getattr(pool, "_broken", False))


def _processes(pool: ProcessPoolExecutor) -> dict[int, BaseProcess]:
    return dict(getattr(pool, "_processes", None) or {})


def _look_again(pool: Any) -> None:
    """Have the pool look which processes it has.

    It wakes the thread that sees a process die before it begins another, so that this one may die unseen until a call
    ends.
    """
    with pool._shutdown_lock:  # noqa: SLF001
        wakeup = pool._executor_manager_thread_wakeup  # noqa: SLF001
        if wakeup is not None:
            wakeup.wakeup()


def _wait_for_end(pool: Any) -> None:
    """Wait until a broken pool has ended its processes. Only one may read how a process ended: the other learns nothing."""
    thread = pool._executor_manager_thread  # noqa: SLF001
    if thread is not None:
        thread.join(_END_SECONDS)


def _maker(pool: ProcessPoolExecutor) -> Callable[[], ProcessPoolExecutor]:
    """Return what makes another pool like this one."""
    arguments: dict[str, Any] = {
        "max_workers": getattr(pool, "_max_workers", None),
        "mp_context": getattr(pool, "_mp_context", None),
    }
    if getattr(pool, "_max_tasks_per_child", None) is not None:
        arguments["max_tasks_per_child"] = pool._max_tasks_per_child  # type: ignore[attr-defined]  # noqa: SLF001
    initializer, initargs = getattr(pool, "_initializer", None), getattr(pool, "_initargs", ())
    if initializer is not prepare_process:
        initializer, initargs = prepare_process, (initializer, initargs)
    return lambda: ProcessPoolExecutor(**arguments, initializer=initializer, initargs=initargs)


def _prepare(pool: Any) -> None:
    """Have the processes of a pool that has begun none yet prepared as ours."""
    if getattr(pool, "_initializer", prepare_process) is not prepare_process:
        pool._initializer, pool._initargs = prepare_process, (pool._initializer, pool._initargs)  # noqa: SLF001


def prepare_process(initializer: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
    """Begin a process of a pool: it ends with its worker, and leaves Ctrl-C in a terminal to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    if initializer is not None:
        initializer(*arguments)
