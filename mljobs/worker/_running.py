"""One run of a worker: start its threads, supervise them, stop them."""

from __future__ import annotations

import asyncio
import queue
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Any
from uuid import UUID

from mljobs import jobs
from mljobs._logging import logger_of
from mljobs.db._failures import database_is_away, first_line
from mljobs.db._timeouts import answer_seconds, answers_within, limit_idle_transaction
from mljobs.jobs._base import connection_of
from mljobs.jobs._workers import WorkerState
from mljobs.store._keeper import Keeper
from mljobs.store._run import Run
from mljobs.store._store import JobStore
from mljobs.worker._executors import ExecutorPlace
from mljobs.worker._finished import Tally
from mljobs.worker._handlers import Handler
from mljobs.worker._places import HandlerThreads, LoopPlace, ThreadPlace, WorkerContext
from mljobs.worker._pools import PoolPlace
from mljobs.worker._prefetching import ClaimSettings, Prefetcher
from mljobs.worker._recording import OutcomeWriter
from mljobs.worker._registering import Registration

logger = logger_of("mljobs.worker")

_LAST_SECONDS = 5.0
_TICK = 1.0
_NAMED_MAX = 5


class Signal(Enum):
    """What a run is sent while it works."""

    STOP = auto()
    IDLE = auto()
    ERROR = auto()


Signals = queue.SimpleQueue[tuple[Signal, Any]]
"""A SimpleQueue, for a signal handler may put into it while its own thread waits in get."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How one run of a worker goes.

    Attributes:
        claims: What it claims.
        handlers: What handles each kind.
        executor: Where plain functions run; None for threads of the worker.
        loop: Where coroutine functions run; None for a loop of the worker's own.
        grace: Seconds that handlers may go on after the first signal to stop.
        max_attempts: A job whose worker fell silent so often fails.
        registration: By which the worker is seen.
    """

    claims: ClaimSettings
    handlers: Mapping[StrEnum, Handler]
    executor: Executor | None
    loop: asyncio.AbstractEventLoop | None
    grace: float
    max_attempts: int
    registration: Registration


class WorkerRun:
    """One run of a worker, from its first claim to its last outcome.

    Args:
        store: Where the jobs are.
        settings: How it goes.
        keeper: Keeps the leases.
        signals: What it is sent.
    """

    def __init__(self, store: JobStore, settings: RunSettings, keeper: Keeper, signals: Signals) -> None:
        self._store = store
        self._settings = settings
        self._name = settings.claims.worker
        self._signals = signals
        self._keeper = keeper
        self._answer_seconds = answer_seconds(settings.claims.lease)
        self._writer = OutcomeWriter(store, keeper, self._answer_seconds)
        self._prefetcher = Prefetcher(
            store,
            settings.claims,
            keeper=keeper,
            writer=self._writer,
            on_idle=lambda: signals.put((Signal.IDLE, None)),
        )
        self._writer.on_recorded = self._prefetcher.recorded
        context = WorkerContext(
            store,
            settings.handlers,
            self._prefetcher,
            self._writer,
            keeper,
            settings.claims.lease,
            settings.max_attempts,
            lambda error: signals.put((Signal.ERROR, error)),
        )
        handlers = [handler for kind, handler in settings.handlers.items() if str(kind) in settings.claims.kinds]
        self._loop = LoopPlace(context, settings.loop) if any(handler.is_async for handler in handlers) else None
        self._executor = None if settings.executor is None else _place_of(context, settings.executor)
        in_threads = self._executor is None and any(not handler.is_async for handler in handlers)
        # Of handlers that run in none of these threads, one thread can start them all.
        number = settings.claims.slots if in_threads else 1
        self._threads = HandlerThreads(context, number, self._starter(ThreadPlace(context)))

    @property
    def tally(self) -> Tally:
        """What has been recorded."""
        return self._writer.tally

    def _starter(self, threads: ThreadPlace) -> Callable[[Run, Handler], None]:
        loop = self._loop
        of_functions = threads.start if self._executor is None else self._executor.start
        if loop is None:
            return of_functions
        return lambda run, handler: (loop.start if handler.is_async else of_functions)(run, handler)

    def work(self) -> BaseException | None:
        """Run until a signal to stop; return what went wrong, if anything did."""
        self._threads.open()
        error = self._supervise()
        self._drain(self._wind_up())
        self._writer.release_left_over()
        return error

    def _drain(self, seconds: float | None) -> None:
        """Wait until the last outcomes are recorded: None for as long as it takes, or until the next signal to stop."""
        while not self._writer.drain(_TICK if seconds is None else seconds) and seconds is None:
            while not self._signals.empty():
                if self._signals.get()[0] is Signal.STOP:
                    seconds = 0.0

    def _supervise(self) -> BaseException | None:
        """Call ``rescue`` from time to time, until a signal to stop or until no job is left."""
        next_rescue = time.monotonic() + random.uniform(0, 1)  # noqa: S311 - spread, no secret
        while True:
            try:
                signal, detail = self._signals.get(timeout=_TICK)
            except queue.Empty:
                self._prefetcher.put_back_stale()
                self._writer.release_left_over()
                if time.monotonic() >= next_rescue:
                    self._rescue()
                    next_rescue = time.monotonic() + self._settings.claims.lease * random.uniform(0.25, 0.75)  # noqa: S311
                continue
            if signal is Signal.ERROR:
                logger.error("worker %s stops: %s", self._name, first_line(detail))
                error: BaseException = detail
                return error
            if signal is Signal.STOP:
                self._prefetcher.stop()  # before it is logged
                under_way = len(self._prefetcher.under_way())
                logger.info("worker %s stops claiming; jobs under way: %d", self._name, under_way)
            return None

    def _rescue(self) -> None:
        self._keeper.catch_up()  # a process that stood still must not rescue its own jobs from itself
        try:
            with answers_within(self._answer_seconds), self._store.connect() as bind:
                limit_idle_transaction(connection_of(bind, self._store.model), self._answer_seconds)
                rescue = jobs.rescue(
                    bind,
                    max_attempts=self._settings.max_attempts,
                    kinds=self._settings.claims.kinds,
                    model=self._store.model,
                )
        except Exception as error:
            if not database_is_away(error):
                logger.exception("the rescue failed; it will be tried again")
            else:
                logger.warning("cannot look for lost jobs yet: %s", first_line(error))
            return
        if rescue:
            logger.warning(
                "rescued jobs whose worker fell silent: %d queued again, %d failed, %d leases ended: %s",
                len(rescue.requeued),
                len(rescue.failed),
                len(rescue.released),
                _named([*rescue.requeued, *rescue.failed]),
                extra={
                    "requeued": [str(job_id) for job_id in rescue.requeued],
                    "failed": [str(job_id) for job_id in rescue.failed],
                    "released": rescue.released,
                },
            )
        for job_id, refused in rescue.errors.items():
            logger.error("job %s could not be rescued: %s", job_id, first_line(refused))

    def _wind_up(self) -> float | None:
        """Wait for the handlers for the grace, requeue the other runs; return how long the last outcomes may take."""
        self._settings.registration.state = WorkerState.STOPPING
        self._prefetcher.stop()
        for run in self._prefetcher.under_way():
            run.mark_stopping()
        end = time.monotonic() + self._settings.grace
        stopped_again = False
        while self._prefetcher.busy and not stopped_again:
            left = end - time.monotonic()
            if left <= 0:
                break
            try:
                signal, _ = self._signals.get(timeout=min(left, _TICK))
            except queue.Empty:
                continue
            stopped_again = signal is Signal.STOP
        left_over = self._prefetcher.under_way()
        if left_over:
            self._put_back(left_over)
        return _LAST_SECONDS if stopped_again or left_over else None

    def _put_back(self, runs: list[Run]) -> None:
        """Requeue the runs that go on, and mark them as lost: what they report later is dropped."""
        logger.warning("worker %s puts back what has not ended in time; jobs: %d", self._name, len(runs))
        self._prefetcher.abandon(runs)
        try:
            self._writer.requeue(runs)
        except Exception as error:  # noqa: BLE001 - their leases run out, and another worker rescues them
            logger.warning("cannot put them back, their leases will run out: %s", first_line(error))
        for run in runs:
            run.mark_lost()

    def close(self) -> int:
        """End every thread that can be ended; return how many handlers still run."""
        self._prefetcher.stop()
        if self._loop is not None:
            self._loop.close()
        if self._executor is not None:
            self._executor.close()
        self._threads.join(timeout=_LAST_SECONDS if not self._prefetcher.abandoned else 0.1)
        self._writer.close()
        self._prefetcher.close()
        return self._prefetcher.abandoned


def _place_of(context: WorkerContext, executor: Executor) -> ExecutorPlace:
    if isinstance(executor, ProcessPoolExecutor):
        return PoolPlace(context, executor)
    return ExecutorPlace(context, executor)


def _named(ids: Sequence[UUID]) -> str:
    """Return the first ids, for a line of log."""
    return ", ".join(str(job_id) for job_id in ids[:_NAMED_MAX]) + (" ..." if len(ids) > _NAMED_MAX else "")
