"""``Worker``: handlers by kind, and running them until a signal to stop."""

from __future__ import annotations

import asyncio
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import closing, contextmanager
from contextvars import copy_context
from dataclasses import replace
from enum import StrEnum
from functools import partial
from multiprocessing.reduction import ForkingPickler
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sqlalchemy import inspect

from mljobs._logging import logger_of
from mljobs._values import MAX_SMALLINT, check_count, check_lease, check_seconds, storable_text, to_member
from mljobs.db._engines import refuse_memory
from mljobs.errors import InvalidValueError, SchemaError
from mljobs.guards._companions import schema_of
from mljobs.jobs import DEFAULT_LEASE, table_of
from mljobs.jobs._base import M
from mljobs.store._base import Store
from mljobs.store._keeper import Keeper
from mljobs.store._run import Run, worker_name
from mljobs.store._store import JobStore
from mljobs.worker._finished import Tally
from mljobs.worker._handlers import Backoff, ErrorTypes, Handler, exponential, make_handler, make_policy
from mljobs.worker._prefetching import ClaimSettings
from mljobs.worker._registering import Registration
from mljobs.worker._running import RunSettings, Signal, Signals, WorkerRun

if TYPE_CHECKING:
    from mljobs.store._async_store import AsyncJobStore

logger = logger_of("mljobs.worker")

T = TypeVar("T")

_CONCURRENCY_MAX = 1000
_AHEAD_MAX = 10_000
_AHEAD = 1024
_POLL = 1.0
_POLL_MAX = 86_400.0
_DEFAULT_BACKOFF = exponential(10, 600)


class Worker(Generic[M]):
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
            dask's ``Client.get_executor()``; None for threads of the worker. Coroutine functions run on one event loop.
        lease: Seconds after which another worker may have a job if this process dies. A thread renews it, so a job may
            take any time.
        grace: Seconds that handlers may go on after the first signal to stop.
        poll: Seconds between two looks at an empty queue; on PostgreSQL a notification wakes earlier.
        ahead: How many short jobs to claim before they are needed, at most; 0 to 10,000.
        max_attempts: A job whose worker fell silent so often ends as failed.
        name: The worker's name for operators; None for host and process.

    Attributes:
        abandoned: How many handlers of the last run had not ended when its grace was over, and may still run.

    Raises:
        InvalidValueError: An argument is out of range.
    """

    def __init__(
        self,
        store: JobStore[M] | AsyncJobStore[M],
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
        self.concurrency = check_count("concurrency", concurrency, _CONCURRENCY_MAX)
        self.ahead = check_count("ahead", ahead, _AHEAD_MAX, lowest=0)
        self.max_attempts = check_count("max_attempts", max_attempts, MAX_SMALLINT)
        self.lease = check_lease(lease)
        self.grace = check_seconds("grace", grace)
        self.poll = check_seconds("poll", poll, above_zero=True, longest=_POLL_MAX)
        if executor is not None and not isinstance(executor, Executor):
            raise InvalidValueError("executor", executor, "expected a concurrent.futures.Executor")
        self.executor = executor
        self.name = worker_name() if name is None else _name(name)
        self.abandoned = 0
        self._handlers: dict[StrEnum, Handler] = {}
        self._store = _blocking_store(store)
        self._own_store = self._store is not store
        self._signals: Signals = queue.SimpleQueue()
        self._running = threading.Lock()

    def configure(self, *, concurrency: int | None = None, grace: float | None = None, name: str | None = None) -> None:
        """Change, before a run, what the command line may say too; None leaves it as it is.

        Args:
            concurrency: As of the class.
            grace: As of the class.
            name: As of the class.
        """
        if concurrency is not None:
            self.concurrency = check_count("concurrency", concurrency, _CONCURRENCY_MAX)
        if grace is not None:
            self.grace = check_seconds("grace", grace)
        if name is not None:
            self.name = _name(name)

    @property
    def handlers(self) -> dict[StrEnum, Handler]:
        """What handles each kind."""
        return dict(self._handlers)

    def handles(
        self,
        kind: str,
        *,
        retries: int = 0,
        backoff: float | Backoff = _DEFAULT_BACKOFF,
        retry_on: ErrorTypes | None = None,
        give_up_on: ErrorTypes = (),
    ) -> Callable[[Callable[[Run[M]], T]], Callable[[Run[M]], T]]:
        """Make a function the handler of a kind.

        The function takes the ``Run``; what it returns becomes the metrics, None keeps ``run.metrics``. An exception
        fails the job, with the reason.

        Args:
            kind: The kind, as a member or a token.
            retries: After a failure, submit the work again as a new record (``retry_of``), so many times at most.
            backoff: Seconds before each retry, or a function of its number, from 1: ``exponential(10, 600)``.
            retry_on: Retry only after these exceptions: a class, or several; None for all.
            give_up_on: Never retry after these. Nor after a ``GiveUp``, which a handler may raise itself.

        Raises:
            InvalidValueError: The kind is unknown or has a handler, or the function cannot be one.
        """
        member = to_member(self._store.model.__kinds__, "kind", kind)
        policy = make_policy(retry_on, give_up_on)
        if member in self._handlers:
            raise InvalidValueError("kind", str(member), f"it is handled by {self._handlers[member].name} already")

        def register(function: Callable[[Run[M]], T]) -> Callable[[Run[M]], T]:
            self._handlers[member] = make_handler(member, function, retries, backoff, policy)
            return function

        return register

    def run(self, *, until_idle: bool = False, until_empty: bool = False, kinds: Any = None) -> Tally:
        """Run jobs until ``stop``, SIGTERM or SIGINT.

        The first signal stops claiming, lets handlers finish for ``grace`` seconds, and puts back what is left; the
        second stops at once. Signals are only heard where this is called from the main thread.

        Args:
            until_idle: Return as soon as there is nothing to do. Jobs whose ``run_after`` lies ahead are not waited for.
            until_empty: Return when no job of these kinds is queued or running: what waits for its time is waited for, as
                retries do, and what other workers run.
            kinds: Only this one, or these, of the kinds that have handlers; None for all.

        Returns:
            How many jobs ended how.

        Raises:
            InvalidValueError: There are no handlers, or a kind has none; nothing was claimed.
            SchemaError: The database has no such table; nothing was claimed.
        """
        with self._only_one_run(), self._handling_signals():
            return self._run(until_idle=until_idle, until_empty=until_empty, kinds=kinds, loop=None)

    async def run_async(self, *, until_idle: bool = False, until_empty: bool = False, kinds: Any = None) -> Tally:
        """Run jobs, coroutine handlers on the present event loop; see ``run``.

        Cancelling the awaiting task stops the worker as the first signal does, cancelling it again as the second.
        Signals are the application's own.

        Args:
            until_idle: As of ``run``.
            until_empty: As of ``run``.
            kinds: As of ``run``.
        """
        loop = asyncio.get_running_loop()
        with self._only_one_run():
            run = partial(self._run, until_idle=until_idle, until_empty=until_empty, kinds=kinds, loop=loop)
            # In a thread, not a task: a loop that is shut down cancels every task, and a blocking call cannot be cancelled.
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
        self._signals.put((Signal.STOP, None))

    def _claim_settings(self, kinds: Any, *, until_idle: bool, until_empty: bool) -> ClaimSettings:
        if not self._handlers:
            raise InvalidValueError("handlers", {}, "the worker has none; use @worker.handles(kind)")
        asked = [kinds] if isinstance(kinds, str) else kinds
        chosen = list(self._handlers) if asked is None else list(dict.fromkeys(self._handled(kind) for kind in asked))
        if not chosen:
            raise InvalidValueError("kinds", kinds, "expected one at least")
        if isinstance(self.executor, ProcessPoolExecutor):
            for kind in chosen:
                _check_picklable(self._handlers[kind])
        return ClaimSettings(
            worker=self.name,
            kinds=[str(kind) for kind in chosen],
            lease=self.lease,
            slots=self.concurrency,
            ahead=self.ahead,
            poll=self.poll,
            until_idle=until_idle,
            until_empty=until_empty,
        )

    def _handled(self, kind: str) -> StrEnum:
        member: StrEnum = to_member(self._store.model.__kinds__, "kinds", kind)
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
    def _only_one_run(self) -> Iterator[None]:
        if not self._running.acquire(blocking=False):
            raise InvalidValueError("worker", self.name, "it is running already")
        self._signals = queue.SimpleQueue()  # what was sent to an earlier run is not for this one
        try:
            yield
        finally:
            self._running.release()

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
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

    def _run(self, *, until_idle: bool, until_empty: bool, kinds: Any, loop: asyncio.AbstractEventLoop | None) -> Tally:
        claims = self._claim_settings(kinds, until_idle=until_idle, until_empty=until_empty)
        self._check_database()
        seen = Registration(self._store, self.name, claims.kinds, self.concurrency, self.lease)
        seen.open()
        claims = replace(claims, worker=seen.name)
        settings = RunSettings(claims, self.handlers, self.executor, loop, self.grace, self.max_attempts, seen)
        with closing(seen), Keeper(self._store, self.lease, on_renewal=seen.renew) as keeper:
            keeper.start()
            run = WorkerRun(self._store, settings, keeper, self._signals)
            logger.info("worker %s begins: %s, %d at a time", seen.name, ", ".join(claims.kinds), self.concurrency)
            try:
                error = run.work()
            finally:
                self.abandoned = run.close()
            logger.info("worker %s ends: %s", seen.name, run.tally)
        if error is not None:
            raise error
        return run.tally

    def close(self) -> None:
        """Close the store that the worker opened beside an ``AsyncJobStore``."""
        if self._own_store:
            self._store.close()


def _blocking_store(store: Any) -> JobStore[Any]:
    if isinstance(store, JobStore):
        return store
    if not isinstance(store, Store):
        raise InvalidValueError("store", store, "expected a JobStore or an AsyncJobStore")
    return JobStore(store.sync_url, model=store.model)


def _check_picklable(handler: Handler) -> None:
    """Refuse what no process could be sent, before every job fails of it."""
    try:
        if not handler.is_async:
            ForkingPickler.dumps((handler.function, handler.policy))
    except Exception as error:
        why = f"a process pool takes functions of a module only: {error}"
        raise InvalidValueError("handler", handler.function, why) from error


def _name(name: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise InvalidValueError("name", name, "expected a name for operators to read")
    return storable_text("name", name)
