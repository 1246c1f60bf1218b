"""``Worker``: handlers by kind, and a run that ends well."""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from enum import StrEnum
from functools import partial
from multiprocessing.reduction import ForkingPickler
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from sqlalchemy import inspect

from mljobs import jobs
from mljobs.db._engines import refuse_memory
from mljobs.db._failures import database_is_away, first_line
from mljobs.db._timeouts import answer_seconds, answers_within, limit_idle_transaction
from mljobs.errors import InvalidValueError, SchemaError
from mljobs.guards._companions import schema_of
from mljobs.jobs import DEFAULT_LEASE, table_of
from mljobs.jobs._base import check_lease, connection_of
from mljobs.store._base import Store
from mljobs.store._keeper import Keeper
from mljobs.store._run import Run, worker_name
from mljobs.store._store import JobStore
from mljobs.types import storable_text, to_member
from mljobs.worker._handlers import Backoff, Handler, exponential, make_handler
from mljobs.worker._intake import Intake, Wanted, check_number
from mljobs.worker._outbox import Outbox, Tally
from mljobs.worker._places import Desk, Elsewhere, Here, Lanes, Loop

if TYPE_CHECKING:
    from mljobs.store._async_store import AsyncJobStore

logger = logging.getLogger("mljobs.worker")

F = TypeVar("F", bound=Callable[..., Any])

_CONCURRENCY_MAX = 1000
_AHEAD_MAX = 10_000
_AHEAD = 1024
_POLL = 1.0
_POLL_MAX = 86_400.0
_ATTEMPTS_MAX = 32_767
_LAST_SECONDS = 5.0
_DEFAULT_BACKOFF = exponential(10, 600)
_STOP, _QUIET, _ERROR = "stop", "quiet", "error"


class Worker:
    """Runs the jobs of some kinds.

    ::

        worker = Worker(JobStore.from_env(), concurrency=4)

        @worker.handles(MlJobKind.TRAIN, retries=2)
        def train(run):
            for fold in run.track(range(5)):
                ...
            return {"auc": 0.97}

        worker.run()

    Args:
        store: Where the jobs are. An ``AsyncJobStore`` serves too: the worker opens a ``JobStore`` on its database.
        concurrency: How many handlers run at a time, 1 to 1,000.
        executor: Where plain functions run: any ``concurrent.futures.Executor``, such as a ``ProcessPoolExecutor`` or
            dask's ``Client.get_executor()``; None for threads of the worker. Coroutine functions run on one loop.
        lease: Seconds that a job stays ours if this process dies; kept alive by a thread, so a job may take any time.
        grace: Seconds that handlers may go on after the first signal to stop.
        poll: Seconds between two looks at an empty queue; on PostgreSQL a notification wakes earlier.
        ahead: How many short jobs to claim ahead of need at most, 0 to 10,000.
        max_attempts: A job whose worker fell silent so often ends as failed.
        name: The worker's name for operators; None for host and process.

    Attributes:
        abandoned: How many handlers of the last run had not ended when its grace was over, and may still run.

    Raises:
        InvalidValueError: An argument is out of range.
    """

    def __init__(
        self,
        store: JobStore | AsyncJobStore,
        *,
        concurrency: int = 1,
        executor: Executor | None = None,
        lease: float = DEFAULT_LEASE,
        grace: float = 30.0,
        poll: float = _POLL,
        ahead: int = _AHEAD,
        max_attempts: int = 5,
        name: str | None = None,
    ) -> None:
        self.concurrency = check_number("concurrency", concurrency, 1, _CONCURRENCY_MAX)
        self.ahead = check_number("ahead", ahead, 0, _AHEAD_MAX)
        self.max_attempts = check_number("max_attempts", max_attempts, 1, _ATTEMPTS_MAX)
        self.lease = check_lease(lease)
        self.grace = _seconds("grace", grace)
        self.poll = _seconds("poll", poll, above=0)
        if poll > _POLL_MAX:
            raise InvalidValueError("poll", poll, f"expected seconds of at most {_POLL_MAX:.0f}, a day")
        if executor is not None and not isinstance(executor, Executor):
            raise InvalidValueError("executor", executor, "expected a concurrent.futures.Executor")
        self.executor = executor
        self.name = worker_name() if name is None else _name(name)
        self.abandoned = 0
        self._handlers: dict[StrEnum, Handler] = {}
        self._store = _blocking(store)
        self._own_store = self._store is not store
        # A SimpleQueue, for a signal handler may put into it while this very thread waits in get.
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._running = threading.Lock()

    def configure(self, *, concurrency: int | None = None, grace: float | None = None, name: str | None = None) -> None:
        """Set anew, before a run, what the command line may say otherwise; None leaves it as it is.

        Args:
            concurrency: As of the class.
            grace: As of the class.
            name: As of the class.
        """
        if concurrency is not None:
            self.concurrency = check_number("concurrency", concurrency, 1, _CONCURRENCY_MAX)
        if grace is not None:
            self.grace = _seconds("grace", grace)
        if name is not None:
            self.name = _name(name)

    @property
    def handlers(self) -> dict[StrEnum, Handler]:
        """What handles each kind."""
        return dict(self._handlers)

    def handles(self, kind: str, *, retries: int = 0, backoff: float | Backoff = _DEFAULT_BACKOFF) -> Callable[[F], F]:
        """Make a function the handler of a kind.

        The function takes the ``Run``; what it returns becomes the metrics, None keeps ``run.metrics``. An exception
        fails the job, with the reason.

        Args:
            kind: The kind, as a member or a token.
            retries: After a failure, submit the work again as a new record (``retry_of``), so many times at most.
            backoff: Seconds before each retry, or a function of its number, from 1: ``exponential(10, 600)``.

        Raises:
            InvalidValueError: The kind is unknown or has a handler, or the function cannot be one.
        """
        member = to_member(self._store.model.__kinds__, "kind", kind)
        if member in self._handlers:
            raise InvalidValueError("kind", str(member), f"it is handled by {self._handlers[member].name} already")

        def register(function: F) -> F:
            self._handlers[member] = make_handler(member, function, retries, backoff)
            return function

        return register

    def run(self, *, until_idle: bool = False, kinds: Any = None) -> Tally:
        """Run jobs until told to stop by ``stop``, SIGTERM or SIGINT.

        The first signal stops claiming, lets handlers finish for ``grace`` seconds, and puts back what is left; the
        second stops at once. Signals are only heard where this is called from the main thread.

        Args:
            until_idle: Return as soon as there is nothing to do. Jobs whose ``run_after`` lies ahead are not waited for.
            kinds: Only this one, or these, of the kinds that have handlers; None for all.

        Returns:
            How many jobs ended how.

        Raises:
            InvalidValueError: There are no handlers, or a kind has none; nothing was claimed.
            SchemaError: The database has no such table; nothing was claimed.
        """
        with self._alone(), self._hearing_signals():
            return self._run(until_idle=until_idle, kinds=kinds, loop=None)

    async def run_async(self, *, until_idle: bool = False, kinds: Any = None) -> Tally:
        """Run jobs, coroutine handlers on the present event loop; see ``run``.

        Cancelling the awaiting task stops the worker as the first signal does, cancelling it again as the second.
        Signals are the application's own.

        Args:
            until_idle: As of ``run``.
            kinds: As of ``run``.
        """
        loop = asyncio.get_running_loop()
        with self._alone():
            run = partial(self._run, until_idle=until_idle, kinds=kinds, loop=loop)
            # Not a task: a loop that is shut down cancels every task it knows, and this one cannot be.
            work = loop.run_in_executor(None, copy_context().run, run)
            cancelled: asyncio.CancelledError | None = None
            while not work.done():  # cancelled again: its thread is waited for all the same
                try:
                    await asyncio.shield(work)
                except asyncio.CancelledError as error:
                    cancelled = error
                    self.stop()
            tally = await work
            if cancelled is not None:
                raise cancelled
            return tally

    def stop(self) -> None:
        """Stop as the first signal does; called again, as the second. From any thread; before a run it does nothing."""
        self._events.put((_STOP, None))

    # ------------------------------------------------------------------------------------------------- before the run

    def _wanted(self, kinds: Any, *, until_idle: bool) -> Wanted:
        if not self._handlers:
            raise InvalidValueError("handlers", {}, "the worker has none; use @worker.handles(kind)")
        asked = [kinds] if isinstance(kinds, str) else kinds
        chosen = list(self._handlers) if asked is None else list(dict.fromkeys(self._handled(kind) for kind in asked))
        if not chosen:
            raise InvalidValueError("kinds", kinds, "expected one at least")
        if isinstance(self.executor, ProcessPoolExecutor):
            for kind in chosen:
                _check_picklable(self._handlers[kind])
        return Wanted(
            worker=self.name,
            kinds=[str(kind) for kind in chosen],
            lease=self.lease,
            slots=self.concurrency,
            ahead=self.ahead,
            poll=self.poll,
            until_idle=until_idle,
        )

    def _handled(self, kind: str) -> StrEnum:
        member = to_member(self._store.model.__kinds__, "kinds", kind)
        if member not in self._handlers:
            known = ", ".join(sorted(str(kind) for kind in self._handlers))
            raise InvalidValueError("kinds", str(member), f"no handler for it; there are handlers for {known}")
        return member

    def _check_database(self) -> None:
        refuse_memory(self._store.engine.url)
        table = table_of(self._store.model)
        with self._store.engine.connect() as connection:
            if not inspect(connection).has_table(table.name, schema=schema_of(connection, table)):
                raise SchemaError(f"there is no table {table.fullname}: run `mljobs upgrade`, or your own migrations")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._running.acquire(blocking=False):
            raise InvalidValueError("worker", self.name, "it is running already")
        self._events = queue.SimpleQueue()  # what was told to an earlier run is not for this one
        try:
            yield
        finally:
            self._running.release()

    @contextmanager
    def _hearing_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def hear(_number: int, _frame: FrameType | None) -> None:
            self.stop()

        before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ------------------------------------------------------------------------------------------------------- the run

    def _run(self, *, until_idle: bool, kinds: Any, loop: asyncio.AbstractEventLoop | None) -> Tally:
        wanted = self._wanted(kinds, until_idle=until_idle)
        self._check_database()
        with Keeper(self._store, self.lease) as keeper:
            return self._supervised(wanted, keeper, loop)

    def _supervised(self, wanted: Wanted, keeper: Keeper, loop: asyncio.AbstractEventLoop | None) -> Tally:
        shift = _Shift(self, self._store, wanted, keeper=keeper, events=self._events, loop=loop)
        logger.info("worker %s begins: %s, %d at a time", self.name, ", ".join(wanted.kinds), self.concurrency)
        try:
            error = shift.work()
        finally:
            self.abandoned = shift.close()
        logger.info("worker %s ends: %s", self.name, shift.tally)
        if error is not None:
            raise error
        return shift.tally

    def close(self) -> None:
        """Close the store that the worker opened beside an ``AsyncJobStore``."""
        if self._own_store:
            self._store.close()


class _Shift:
    """One run of a worker, from its first claim to its last outcome."""

    def __init__(
        self,
        worker: Worker,
        store: JobStore,
        wanted: Wanted,
        *,
        keeper: Keeper,
        events: queue.SimpleQueue[tuple[str, Any]],
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self._worker = worker
        self._store = store
        self._wanted = wanted
        self._events = events
        self._keeper = keeper
        self._patience = answer_seconds(worker.lease)
        self._outbox = Outbox(store, keeper, self._patience)
        self._intake = Intake(
            store, wanted, keeper=keeper, outbox=self._outbox, on_quiet=lambda: events.put((_QUIET, None))
        )
        self._outbox.on_recorded = self._intake.recorded
        desk = Desk(
            store,
            worker.handlers,
            self._intake,
            self._outbox,
            keeper,
            worker.lease,
            worker.max_attempts,
            lambda error: events.put((_ERROR, error)),
        )
        handlers = [worker.handlers[kind] for kind in worker.handlers if str(kind) in wanted.kinds]
        self._here = Here(desk)
        self._loop = Loop(desk, loop) if any(handler.is_async for handler in handlers) else None
        self._elsewhere = Elsewhere(desk, worker.executor) if worker.executor is not None else None
        in_threads = self._elsewhere is None and any(not handler.is_async for handler in handlers)
        # Of handlers that run in none of our threads, one thread can begin them all.
        self._lanes = Lanes(desk, worker.concurrency if in_threads else 1, self._start())

    @property
    def tally(self) -> Tally:
        return self._outbox.tally

    def _start(self) -> Callable[[Run, Handler], None]:
        here, loop, elsewhere = self._here, self._loop, self._elsewhere
        if loop is None:
            return here.start if elsewhere is None else elsewhere.start
        plain = here.start if elsewhere is None else elsewhere.start
        return lambda run, handler: (loop.start if handler.is_async else plain)(run, handler)

    def work(self) -> BaseException | None:
        """Run until told to stop; return what went wrong, if anything did."""
        self._lanes.open()
        error = self._until_told()
        self._drain(self._wind_up())
        return error

    def _drain(self, patience: float | None) -> None:
        """Wait until the last outcomes are recorded: None for as long as it takes, or until told once more."""
        while not self._outbox.drain(_TICK if patience is None else patience) and patience is None:
            while not self._events.empty():
                if self._events.get()[0] == _STOP:
                    patience = 0.0

    def _until_told(self) -> BaseException | None:
        """Rescue now and then, until somebody says stop, or nothing is left to do."""
        next_rescue = time.monotonic() + random.uniform(0, 1)  # noqa: S311 - spread, no secret
        while True:
            try:
                event, detail = self._events.get(timeout=_TICK)
            except queue.Empty:
                self._intake.put_back_stale()
                if time.monotonic() >= next_rescue:
                    self._rescue()
                    next_rescue = time.monotonic() + self._wanted.lease * random.uniform(0.25, 0.75)  # noqa: S311
                continue
            if event == _ERROR:
                logger.error("worker %s stops: %s", self._worker.name, first_line(detail))
                error: BaseException = detail
                return error
            if event == _STOP:
                self._intake.stop()  # before it is said
                logger.info(
                    "worker %s stops claiming; jobs under way: %d", self._worker.name, len(self._intake.under_way())
                )
            return None

    def _rescue(self) -> None:
        self._keeper.catch_up()  # a process that stood still must not rescue its own jobs from itself
        try:
            with answers_within(self._patience), self._store.connect() as bind:
                limit_idle_transaction(connection_of(bind), self._patience)
                rescue = jobs.rescue(
                    bind,
                    max_attempts=self._worker.max_attempts,
                    kinds=self._wanted.kinds,
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
                _named([*rescue.requeued, *rescue.failed, *rescue.released]),
                extra={
                    "requeued": [str(job_id) for job_id in rescue.requeued],
                    "failed": [str(job_id) for job_id in rescue.failed],
                    "released": [str(job_id) for job_id in rescue.released],
                },
            )
        for job_id, refused in rescue.errors.items():
            logger.error("job %s could not be rescued: %s", job_id, first_line(refused))

    def _wind_up(self) -> float | None:
        """Let handlers end within the grace, put back what is left; return how long the last outcomes may take."""
        self._intake.stop()
        for run in self._intake.under_way():
            run.mark_stopping()
        end = time.monotonic() + self._worker.grace
        told_again = False
        while self._intake.busy and not told_again:
            left = end - time.monotonic()
            if left <= 0:
                break
            try:
                event, _ = self._events.get(timeout=min(left, _TICK))
            except queue.Empty:
                continue
            told_again = event == _STOP
        left_over = self._intake.under_way()
        if left_over:
            self._put_back(left_over)
        return _LAST_SECONDS if told_again or left_over else None

    def _put_back(self, runs: list[Run]) -> None:
        """Requeue what is still running, and tell it that it may stop: what it reports later is dropped."""
        logger.warning("worker %s puts back what has not ended in time; jobs: %d", self._worker.name, len(runs))
        self._intake.abandon(runs)
        try:
            self._outbox.requeue(runs)
        except Exception as error:  # noqa: BLE001 - their leases run out, and another worker rescues them
            logger.warning("cannot put them back, their leases will run out: %s", first_line(error))
        for run in runs:
            run.mark_lost()

    def close(self) -> int:
        """End every thread that can be ended; return how many handlers still run."""
        self._intake.stop()
        if self._loop is not None:
            self._loop.close()
        if self._elsewhere is not None:
            self._elsewhere.close()
        self._lanes.join(timeout=_LAST_SECONDS if not self._intake.abandoned else 0.1)
        self._outbox.close()
        self._intake.close()
        return self._intake.abandoned


_TICK = 1.0
_NAMED_MAX = 5


def _named(ids: Sequence[UUID]) -> str:
    """Return the first of them, for a line of log."""
    return ", ".join(str(job_id) for job_id in ids[:_NAMED_MAX]) + (" ..." if len(ids) > _NAMED_MAX else "")


def _blocking(store: Any) -> JobStore:
    if isinstance(store, JobStore):
        return store
    if not isinstance(store, Store):
        raise InvalidValueError("store", store, "expected a JobStore or an AsyncJobStore")
    return JobStore(store.sync_url, model=store.model)


def _check_picklable(handler: Handler) -> None:
    """Refuse what no process could be sent, before every job fails of it."""
    try:
        if not handler.is_async:
            ForkingPickler.dumps(handler.function)
    except Exception as error:
        why = f"a process pool takes functions of a module only: {error}"
        raise InvalidValueError("handler", handler.function, why) from error


def _name(name: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise InvalidValueError("name", name, "expected a name for operators to read")
    return storable_text("name", name)


def _seconds(field: str, value: float, *, above: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0 or value == above:
        raise InvalidValueError(
            field, value, "expected seconds" + (" above 0" if above is not None else " of at least 0")
        )
    return value
