"""``JobStore``: the operations with an engine and transactions of their own.

Each operation stands here as one line that binds the function in :mod:`mljobs.jobs`; there is no second copy. Jobs come
back detached, with every column loaded.

On PostgreSQL an operation that is one statement runs without BEGIN and COMMIT around it. A store for a host's own class,
or on a host's ``sessionmaker``, runs each operation in a session, so that the host's events and columns take part.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta
from functools import wraps
from inspect import signature
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import QueuePool

from mljobs import events, jobs, transfer
from mljobs.db._engines import at_level, is_memory, new_engine, url_from_env
from mljobs.db._wake import Sleeper
from mljobs.errors import InvalidValueError, MlJobsError, TerminalStateError
from mljobs.jobs import Bind, JobRef, Model
from mljobs.jobs._base import plain
from mljobs.jobs._claiming import DEFAULT_LEASE
from mljobs.record._models import MlJob
from mljobs.store._following import Look, Steps, waiting, watching
from mljobs.store._run import Keeper, Run, outcome_of, record_outcome, worker_name

P = ParamSpec("P")
R = TypeVar("R")

_POLL = 1.0
_POLL_SQLITE = 0.1
_LEASE = DEFAULT_LEASE
_READY_OWNED = 16
_READY_SHARED = 2  # of a host's pool
_FOR_TRANSACTIONS = 2  # of any pool, as a worker's rescue and a retry need
_FRESH_SECONDS = 1.0
LEASE_GIVEN_BACK = (TerminalStateError,)
"""How a finish says that the job was cancelled meanwhile; the lease that it gave back stays given back."""


def takes_model(operation: Callable[..., Any]) -> bool:
    """Whether an operation asks for which class of jobs."""
    return "model" in signature(operation).parameters


def _bound(
    operation: Callable[Concatenate[Bind, P], R],
    *,
    atomic: bool | str = False,
    stands: tuple[type[MlJobsError], ...] = (),
) -> Callable[Concatenate[JobStore, P], R]:
    """Bind an operation to a ``JobStore``.

    Args:
        operation: From ``mljobs.jobs``.
        atomic: Whether it is several statements that stand or fall together; the name of the argument that makes it so.
        stands: Errors that tell of something done: it is committed, then the error is raised.
    """
    of_model = takes_model(operation)

    @wraps(operation)
    def run(self: JobStore, *args: P.args, **kw: P.kwargs) -> R:
        if of_model:
            kw.setdefault("model", self.model)
        whole = bool(kw.get(atomic)) if isinstance(atomic, str) else atomic
        with self.connect(atomic=whole) as bind:
            try:
                return operation(bind, *args, **kw)
            except stands as error:
                told = error
        raise told

    return cast("Callable[Concatenate[JobStore, P], R]", run)


class JobStore(events.Source):
    """Jobs in a database, each operation a transaction of its own. May be shared by threads.

    Args:
        source: A URL, an ``Engine``, or a ``sessionmaker`` whose sessions are to be used.
        model: The mapped job class.
        **options: With a URL, passed on to ``create_engine``.

    Raises:
        InvalidValueError: ``source`` is none of these.
    """

    def __init__(
        self, source: str | URL | Engine | sessionmaker[Session], *, model: Model = MlJob, **options: Any
    ) -> None:
        self.model = model
        self._sessions: sessionmaker[Session] | None = None
        self._owned = isinstance(source, str | URL)
        if isinstance(source, str | URL):
            engine = new_engine(source, autocommit=True, **options)
        elif isinstance(source, Engine):
            engine = source
        elif isinstance(source, sessionmaker):
            bind = source.kw.get("bind")
            if not isinstance(bind, Engine):
                raise InvalidValueError("source", source, "the sessionmaker has no engine in bind")
            engine = bind
            self._sessions = source
        else:
            raise InvalidValueError("source", source, "expected a URL, an Engine or a sessionmaker")
        single, self._whole = modes(engine, owned=self._owned)
        self._single = _Ready(single, _ready_at_most(engine, _READY_OWNED if self._owned else _READY_SHARED))
        if self._sessions is None and not plain(model):
            self._sessions = sessionmaker(self._whole, expire_on_commit=False)

    @classmethod
    def from_env(cls, **options: Any) -> Self:
        """Return a store at ``MLJOBS_DATABASE_URL``, else at ``sqlite:///mljobs.db``."""
        return cls(url_from_env(), **options)

    @property
    def engine(self) -> Engine:
        """The engine, for statements of your own."""
        return self._whole

    def connect(self, *, atomic: bool = True) -> AbstractContextManager[Bind]:
        """Return what an operation runs on: ``with store.connect() as connection: jobs.submit(connection, ...)``.

        Args:
            atomic: Whether what is done in the block stands or falls together.
        """
        inner = self._connect(atomic=atomic)
        return events.telling(inner, self) if events.subscribed() else inner

    def _connect(self, *, atomic: bool) -> AbstractContextManager[Bind]:
        if self._sessions is not None:
            return _detaching(self._sessions)
        if atomic or self.engine.dialect.name != "postgresql":
            return self._whole.begin()
        return self._single.use()

    submit = _bound(jobs.submit, atomic="unless_active")
    submit_many = _bound(jobs.submit_many, atomic=True)
    retry = _bound(jobs.retry, atomic="unless_active")
    get = _bound(jobs.get)
    find = _bound(jobs.find)
    history = _bound(jobs.history)
    lineage = _bound(jobs.lineage)
    counts = _bound(jobs.counts)
    count_up_to = _bound(jobs.count_up_to)
    durations = _bound(jobs.durations)
    failure_reasons = _bound(jobs.failure_reasons)
    finished_per = _bound(jobs.finished_per)
    held_in_queue = _bound(jobs.held_in_queue)
    last_failures = _bound(jobs.last_failures)
    next_claims = _bound(jobs.next_claims)
    queue_depths = _bound(jobs.queue_depths)
    target_jobs = _bound(jobs.target_jobs)
    target_names = _bound(jobs.target_names)
    usual_durations = _bound(jobs.usual_durations)
    why_read_only = _bound(jobs.why_read_only)
    chain = _bound(jobs.chain)
    chains = _bound(jobs.chains)
    held_after_end = _bound(jobs.held_after_end)
    running_jobs = _bound(jobs.running_jobs)
    summaries = _bound(jobs.summaries)
    summaries_of = _bound(jobs.summaries_of)
    claim = _bound(jobs.claim)
    claim_one = _bound(jobs.claim_one)
    renew = _bound(jobs.renew)
    look = _bound(jobs.look)
    release = _bound(jobs.release)
    set_progress = _bound(jobs.set_progress)
    set_progress_many = _bound(jobs.set_progress_many)
    complete = _bound(jobs.complete, stands=LEASE_GIVEN_BACK)
    complete_many = _bound(jobs.complete_many)
    fail = _bound(jobs.fail, stands=LEASE_GIVEN_BACK)
    fail_many = _bound(jobs.fail_many)
    requeue = _bound(jobs.requeue, stands=LEASE_GIVEN_BACK)
    requeue_many = _bound(jobs.requeue_many)
    finish_many = _bound(jobs.finish_many)
    finish_and_claim = _bound(jobs.finish_and_claim)
    cancel = _bound(jobs.cancel)
    rescue = _bound(jobs.rescue, atomic=True)

    def prune(self, *, older_than: timedelta | datetime, keep_last: int = 0, batch: int = 1000) -> int:
        """Delete finished records past their time, a transaction for each batch; see ``jobs.prune``."""
        total = 0
        after: jobs.Cursor | None = None
        while True:
            with self.connect() as bind:
                done = jobs.prune_batch(
                    bind, older_than=older_than, keep_last=keep_last, batch=batch, after=after, model=self.model
                )
            total += done.deleted
            after = done.cursor
            if after is None:
                return total

    export_jobs = _bound(transfer.export_jobs, atomic=True)

    def import_jobs(
        self,
        file: transfer.File,
        *,
        on_conflict: transfer.OnConflict = "skip",
        requeue_running: bool = False,
        rejects: transfer.File | None = None,
        progress: transfer.OnProgress | None = None,
    ) -> transfer.Imported:
        """Read records from NDJSON, a transaction for each batch; see ``transfer.import_jobs``.

        An import that was interrupted can be run again and ends the same. With ``"error"`` all is one transaction.
        """
        work = transfer.file_import(
            file,
            on_conflict=on_conflict,
            requeue_running=requeue_running,
            rejects=rejects,
            progress=progress,
            model=self.model,
        )
        return work.run_in_batches(self.connect)

    dump_kv = _bound(transfer.dump_kv, atomic=True)

    def load_kv(
        self,
        mapping: transfer.KvStore,
        prefix: str = "",
        *,
        on_conflict: transfer.OnConflict = "skip",
        requeue_running: bool = False,
        rejects: transfer.File | None = None,
        progress: transfer.OnProgress | None = None,
    ) -> transfer.Imported:
        """Read records from a key-value store, a transaction for each batch; see ``transfer.load_kv``."""
        work = transfer.kv_import(
            mapping,
            prefix,
            on_conflict=on_conflict,
            requeue_running=requeue_running,
            rejects=rejects,
            progress=progress,
            model=self.model,
        )
        return work.run_in_batches(self.connect)

    def wait(self, job: JobRef, timeout: float | None = None, *, poll: float | None = None) -> MlJob:
        """Wait until the job has finished, and return it.

        Args:
            job: The job or its id.
            timeout: Seconds; None for ever.
            poll: Look at least every so many seconds; None for 1 on PostgreSQL, where a notification wakes earlier,
                and 0.1 on SQLite.

        Raises:
            JobNotFound: No record has this id.
            WaitTimeout: It has not finished in time.
        """
        steps = waiting(job, timeout, poll_seconds(self.engine.dialect.name, poll), self.model)
        result: MlJob = _drain(self._follow(steps))
        return result

    def watch(self, *, timeout: float | None = None, poll: float | None = None, **filters: Any) -> Iterator[MlJob]:
        """Yield each job that is added or changes (state, progress, attempts), from now on.

        A job that changes twice between two looks is yielded once, as it is then.

        Args:
            timeout: Stop after so many seconds; None for never.
            poll: Look at least every so many seconds; None for 1 on PostgreSQL, where a notification wakes earlier,
                and 0.1 on SQLite.
            **filters: As of ``jobs.conditions``.
        """
        return self._follow(watching(filters, timeout, poll_seconds(self.engine.dialect.name, poll), self.model))

    def _follow(self, steps: Steps) -> Generator[MlJob, None, Any]:
        answer: Any = None
        with Sleeper(self.engine, self.model) as sleeper:
            while True:
                try:
                    step = steps.send(answer)
                except StopIteration as stop:
                    return stop.value
                answer = None
                if isinstance(step, Look):
                    with self.connect(atomic=False) as bind:
                        answer = step.read(bind)
                elif isinstance(step, float | int):
                    sleeper.sleep(step)
                else:
                    yield step

    def to_arrow(self, **options: Any) -> Any:
        """Return jobs as an Arrow table, for pandas, polars and DuckDB.

        Args:
            **options: ``columns``, ``spread``, ``ids`` and filters; see ``mljobs.transfer._arrow.to_arrow``.
        """
        from mljobs.transfer._arrow import to_arrow  # noqa: PLC0415 - an extra

        with self.connect() as bind:
            return to_arrow(bind, model=self.model, **options)

    @contextmanager
    def arrow_batches(self, **options: Any) -> Iterator[Any]:
        """Read jobs as Arrow batches, in constant memory: ``with store.arrow_batches() as reader: for batch in reader``.

        Args:
            **options: ``columns``, ``spread``, ``ids``, ``batch`` and filters; see ``mljobs.transfer._arrow.arrow_batches``.
        """
        from mljobs.transfer._arrow import reader_of  # noqa: PLC0415 - an extra

        postgresql = self.engine.dialect.name == "postgresql"
        with self.engine.connect() as connection:
            if postgresql:
                connection.execution_options(isolation_level="REPEATABLE READ")
            else:
                connection.exec_driver_sql("BEGIN")  # Python's driver begins none for reading: two reads, two states
            with reader_of(connection, model=self.model, **options) as reader:
                yield reader

    @contextmanager
    def running(self, job: JobRef, *, worker: str | None = None, lease: float = _LEASE) -> Iterator[Run]:
        """Run a job by hand: claim it, keep its lease alive from a thread, record how the block ends.

        Leaving the block completes the job with ``run.metrics``. An exception fails it, with type, message and a short
        traceback, and goes on. ``KeyboardInterrupt`` and ``SystemExit`` put it back in the queue.

        Args:
            job: The queued job or its id.
            worker: A name for operators to read; None for host and process.
            lease: Seconds that the job stays ours if this process dies.

        Raises:
            JobCancelled: The job was cancelled meanwhile.
            LeaseLostError: The lease was lost meanwhile; nothing was written.
            TerminalStateError, InvalidTransitionError, TargetLockedError, JobNotFound: See ``jobs.claim_one``.
            InvalidValueError: A SQLite database in memory, which the thread that keeps the lease could not see.
        """
        refuse_memory(self.engine.url)
        run = Run(self.claim_one(job, worker=worker or worker_name(), lease=lease))
        with Keeper(self, lease) as keeper:
            keeper.add(run)
            try:
                yield run
            except BaseException as error:
                record_end(self, keeper, run, error)
                raise
            record_end(self, keeper, run, None)

    def close(self) -> None:
        """Give back all connections; of a store that was made from a URL, close them."""
        self._single.close()
        if self._owned:
            self._whole.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ------------------------------------------------------------------------------------------------------- the details


def refuse_memory(url: URL) -> None:
    """Refuse what the thread that keeps a lease could not open.

    Raises:
        InvalidValueError: A SQLite database in memory.
    """
    if is_memory(url):
        raise InvalidValueError("url", str(url), "the thread that keeps the lease cannot open a database in memory")


def poll_seconds(dialect_name: str, poll: float | None) -> float:
    """Return how often to look: ``poll``, or what suits the database."""
    if poll is not None:
        return poll
    return _POLL if dialect_name == "postgresql" else _POLL_SQLITE


def modes(engine: Engine, *, owned: bool) -> tuple[Engine, Engine]:
    """Return the engine for single statements, and the one for transactions."""
    if engine.dialect.name != "postgresql":
        return engine, engine
    if owned:  # made with AUTOCOMMIT, so that the frequent case costs nothing at checkout
        return engine, at_level(engine, "READ COMMITTED")
    return at_level(engine, "AUTOCOMMIT"), engine


def _ready_at_most(engine: Engine, wanted: int) -> int:
    """Return how many connections may be kept ready, so that a small pool has some left for transactions.

    Where the host's pool keeps none at all, neither do we.
    """
    pool = engine.pool
    if not isinstance(pool, QueuePool):
        return 0
    overflow: int = pool._max_overflow  # noqa: SLF001 - there is no public way
    if overflow < 0 or not pool.size():  # without a limit
        return wanted
    return max(0, min(wanted, pool.size() + overflow - _FOR_TRANSACTIONS))


class _Ready:
    """Connections for single statements, kept ready between two operations: checking out costs as much as the statement.

    Args:
        engine: In AUTOCOMMIT.
        most: How many to keep.
    """

    def __init__(self, engine: Engine, most: int) -> None:
        self._engine = engine
        self._most = most
        self._ready: deque[tuple[Connection, float]] = deque()
        self._process = os.getpid()

    @contextmanager
    def use(self) -> Iterator[Bind]:
        """Lend a connection; one that failed goes back to the pool, which knows what to do with it."""
        connection = self._take()
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        if len(self._ready) < self._most:
            self._ready.append((connection, time.monotonic()))
        else:
            connection.close()

    def _take(self) -> Connection:
        if self._process != os.getpid():  # a fork: these belong to the parent
            self._ready, self._process = deque(), os.getpid()
            self._engine.dispose(close=False)
        while True:
            try:
                connection, used = self._ready.pop()
            except IndexError:
                return self._engine.connect()
            if time.monotonic() - used < _FRESH_SECONDS:
                return connection
            connection.close()  # the pool looks whether the server is still there

    def close(self) -> None:
        """Give all back to the pool."""
        while self._ready:
            self._ready.pop()[0].close()


@contextmanager
def _detaching(sessions: sessionmaker[Session]) -> Iterator[Bind]:
    with sessions.begin() as session:
        yield session
        session.flush()
        session.expunge_all()  # as it is, whatever expire_on_commit says


def _drain(steps: Generator[MlJob, None, R]) -> R:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: R = stop.value
            return result


def record_end(store: JobStore, keeper: Keeper, run: Run, error: BaseException | None) -> None:
    """Record how the work on a run ended."""
    try:
        outcome = outcome_of(run, error)
    except InvalidValueError as unfit:  # metrics that JSON cannot hold
        record_outcome(store, run, jobs.Outcome.failed(run.claim, unfit))
        raise
    try:
        if error is not None:
            keeper.write_progress(run)
        if outcome is not None:
            record_outcome(store, run, outcome)
        if run.cancelled:
            store.release([run.claim])
    except Exception as failure:
        if error is None:
            raise
        error.add_note(f"mljobs: the end of job {run.claim.job_id} was not recorded: {failure}")
        return
    finally:
        keeper.remove(run)
    if error is None:
        run.check()
