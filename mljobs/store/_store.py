"""``JobStore``: the operations with an engine and transactions of their own.

Each operation of :mod:`mljobs.jobs` is a method here, made by one line. The jobs that it returns are detached, with every
column loaded.

On PostgreSQL an operation that is one statement runs without BEGIN and COMMIT around it. A store for a host's own class,
or on a host's ``sessionmaker``, runs each operation in a session, so that the host's events and columns take part.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any, Generic, Self, TextIO, Unpack
from weakref import WeakSet

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.orm import Session, sessionmaker

from mljobs import events, jobs
from mljobs.db import _forks
from mljobs.db._connections import ConnectionCache, JoinedConnection, cache_size, engines_of
from mljobs.db._engines import new_engine, refuse_memory, url_from_env
from mljobs.db._wake import ChangeListener
from mljobs.jobs import DEFAULT_LEASE, Bind, Filter, Filters, JobRef, Model, Where, table_of
from mljobs.jobs._base import M
from mljobs.jobs._filters import selection
from mljobs.jobs._records import is_ml_job
from mljobs.record._models import MlJob
from mljobs.store import _methods as methods
from mljobs.store._base import (
    COMMITTED_ERRORS,
    Store,
    bind_of,
    has_iterator,
    read_committed,
    source_error,
    store_method,
)
from mljobs.store._bulk import BulkActions
from mljobs.store._display import display_for
from mljobs.store._followers import Follower
from mljobs.store._following import FollowSteps, Read, closed_meanwhile, poll_seconds, wait_steps
from mljobs.store._keeper import Keeper
from mljobs.store._outcomes import Followable, Followed, followed_steps, following
from mljobs.store._recording import record_end
from mljobs.store._run import Run, worker_name
from mljobs.store._transferring import Transfers
from mljobs.store._watching import SharedReader, watch_steps

_CACHE_OWNED = 16
_CACHE_SHARED = 2  # of a host's pool


class JobStore(Transfers, BulkActions, Store, Generic[M]):
    """Jobs in a database, each operation a transaction of its own. May be shared by threads.

    Args:
        source: A URL; an ``Engine``; a ``sessionmaker`` whose sessions are to be used, on the engine to which they bind
            the model; or a ``Connection``, in whose transaction each operation is then a savepoint.
        model: The mapped job class.
        **options: With a URL, passed on to ``create_engine``.

    Raises:
        InvalidValueError: ``source`` is none of these.
    """

    def __init__(
        self,
        source: str | URL | Engine | Connection | sessionmaker[Any],
        *,
        model: type[M] = MlJob,  # type: ignore[assignment]
        **options: Any,
    ) -> None:
        self.model: type[M] = model
        self._sessions: sessionmaker[Any] | None = None
        self._joined: JoinedConnection | None = None
        self._owned = isinstance(source, str | URL)
        self._followers: WeakSet[Follower[Any]] = WeakSet()
        self._reader = SharedReader(model, threading.Lock)
        bind: object = source
        if isinstance(source, str | URL):
            bind = new_engine(source, autocommit=True, **options)
        elif isinstance(source, sessionmaker):
            self._sessions, bind = source, bind_of(source(), model)
        if isinstance(bind, Connection):
            self._joined = JoinedConnection(bind)
            bind = bind.engine
        if not isinstance(bind, Engine):
            raise source_error(source, "expected a URL, an Engine, a Connection or a sessionmaker")
        single, self._transactional = engines_of(bind, owned=self._owned)
        self._engine = self._transactional if self._owned else bind
        kept = 0 if self._joined is not None else _CACHE_OWNED if self._owned else _CACHE_SHARED
        self._single = ConnectionCache(single, cache_size(bind, kept))
        if self._sessions is None and not is_ml_job(model):
            self._sessions = sessionmaker(self._transactional, expire_on_commit=False)
        # Whether operations run on kept connections to SQLite, and again where the file was locked.
        self._repeats = self._single.begins and self._sessions is None and self._joined is None

    @classmethod
    def from_env(cls, **options: Any) -> Self:
        """Return a store at ``MLJOBS_DATABASE_URL``, else at ``sqlite:///mljobs.db``."""
        return cls(url_from_env(), **options)

    @property
    def engine(self) -> Engine:
        """The engine, for statements of your own."""
        return self._engine

    @property
    def joined(self) -> bool:
        """Whether the store works in the transaction of a host's connection."""
        return self._joined is not None

    def connect(self, *, atomic: bool = True) -> AbstractContextManager[Bind]:
        """Return what an operation runs on: ``with store.connect() as connection: jobs.submit(connection, ...)``.

        Args:
            atomic: Whether the block is one transaction.
        """
        inner = self._connect(atomic=atomic)
        return self._delivering(inner) if events.subscribed() else inner

    def operate(self, arguments: Iterable[Any], *, atomic: bool) -> AbstractContextManager[Bind]:
        """Return what one of the operations runs on.

        Args:
            arguments: Its arguments.
            atomic: Whether it has several statements.
        """
        repeats = self._repeats and not has_iterator(arguments)
        inner = self._single.use() if repeats else self._connect(atomic=atomic)
        return self._delivering(inner) if events.subscribed() else inner

    def lock_pauses(self, arguments: Iterable[Any]) -> Iterator[float]:
        """Yield how many seconds to wait before each new attempt of an operation that met a locked SQLite file."""
        return self._single.lock_pauses() if self._repeats and not has_iterator(arguments) else iter(())

    def _delivering(self, inner: AbstractContextManager[Bind]) -> AbstractContextManager[Bind]:
        """Have the jobs that finish in a transaction delivered to the subscribers."""
        if self._joined is not None:  # the host commits
            events.join(self._joined.connection, self)
            return inner
        return events.delivering(inner, self)

    def _connect(self, *, atomic: bool) -> AbstractContextManager[Bind]:
        if self._sessions is not None:
            if self._joined is not None:
                return _detaching(self._joined.session(self._sessions))
            return _detaching(self._sessions.begin(), self.model)
        if self._joined is not None:
            return self._joined.use()
        if atomic or self._single.begins:
            if _forks.under_way:
                _forks.wait()
            return self._transactional.begin()
        return self._single.use()

    def new_listener(self, *, workers: bool = False) -> ChangeListener:
        """Return a listener for changes of jobs; on a host's connection it polls.

        Args:
            workers: Whether it listens for new jobs; else for changed ones.
        """
        table, polls = table_of(self.model), self._joined is not None
        return ChangeListener(self.engine, table, workers=workers, polls=polls)

    submit = methods.job_method(jobs.submit, atomic="unless_active")
    submit_many = methods.submit_many_method(jobs.submit_many, atomic=True)
    retry = methods.job_method(jobs.retry, atomic=True)
    get = methods.job_method(jobs.get)
    find = methods.page_method(jobs.find)
    history = methods.page_method(jobs.history)
    lineage = methods.jobs_method(jobs.lineage)
    counts = store_method(jobs.counts)
    find_id = store_method(jobs.find_id)
    best = methods.page_method(jobs.best)
    stats = store_method(jobs.stats)
    holders = store_method(jobs.holders)
    affected = store_method(jobs.affected)
    cancel_batch = store_method(jobs.cancel_batch, atomic=True)
    retry_batch = store_method(jobs.retry_batch, atomic=True)
    prune_batch = store_method(jobs.prune_batch, atomic=True)
    prunable = store_method(jobs.prunable)
    count_up_to = store_method(jobs.count_up_to)
    durations = store_method(jobs.durations)
    failure_reasons = store_method(jobs.failure_reasons)
    finished_per = store_method(jobs.finished_per)
    held_in_queue = store_method(jobs.held_in_queue)
    last_failures = store_method(jobs.last_failures)
    next_claims = store_method(jobs.next_claims)
    queue_depths = store_method(jobs.queue_depths)
    target_jobs = store_method(jobs.target_jobs)
    target_names = store_method(jobs.target_names)
    usual_durations = store_method(jobs.usual_durations)
    why_read_only = store_method(jobs.why_read_only)
    chain = store_method(jobs.chain)
    chains = store_method(jobs.chains)
    held_after_end = store_method(jobs.held_after_end)
    running_jobs = store_method(jobs.running_jobs)
    summaries = store_method(jobs.summaries)
    summaries_of = store_method(jobs.summaries_of)
    claim = methods.claims_method(jobs.claim)
    claim_one = methods.claim_method(jobs.claim_one)
    renew = methods.renewal_method(jobs.renew)
    look = methods.renewal_method(jobs.look)
    release = store_method(jobs.release)
    workers = store_method(jobs.workers)
    report = store_method(jobs.report)
    report_many = store_method(jobs.report_many)
    set_progress = store_method(jobs.set_progress)
    set_progress_many = store_method(jobs.set_progress_many)
    complete = store_method(jobs.complete, committed_errors=COMMITTED_ERRORS)
    complete_many = store_method(jobs.complete_many)
    fail = store_method(jobs.fail, committed_errors=COMMITTED_ERRORS)
    fail_many = store_method(jobs.fail_many)
    requeue = store_method(jobs.requeue, committed_errors=COMMITTED_ERRORS)
    requeue_many = store_method(jobs.requeue_many)
    finish_many = store_method(jobs.finish_many)
    finish_and_claim = methods.exchange_method(jobs.finish_and_claim)
    cancel = store_method(jobs.cancel)
    rescue = store_method(jobs.rescue, atomic=True)

    def wait(self, job: JobRef, timeout: float | None = None, *, poll: float | None = None) -> M:
        """Wait until the job has finished, and return it.

        Args:
            job: The job or its id.
            timeout: Seconds; None for ever.
            poll: Look at least every so many seconds; None for 1 on PostgreSQL, where a notification wakes earlier,
                and 0.1 on SQLite.

        Raises:
            JobNotFound: No record has this id.
            WaitTimeout: It has not finished in time.
            MlJobsError: The store was closed meanwhile.
        """
        steps = wait_steps(job, timeout, poll_seconds(self.engine.dialect.name, poll), self.model)
        with self._follow(steps, timeout) as follower:
            for _ in follower:
                pass
        if follower.result is None:
            raise closed_meanwhile(job)
        finished: M = follower.result
        return finished

    def watch(
        self,
        filter: Filter | str | None = None,  # noqa: A002 - as users say it
        *,
        where: Where | None = None,
        timeout: float | None = None,
        poll: float | None = None,
        **fields: Unpack[Filters],
    ) -> Follower[M]:
        """Yield each job that is added or changes (state, progress, attempts), from this call on.

        A job that changes twice between two looks is yielded once, as it is then. One that is committed five minutes or more
        after its times were taken may be missed. A database that is away is waited for, a minute at most; then its error is
        raised, and the same watch goes on where it was when it is asked again. Leaving a ``with`` around it ends it, and so
        does its ``close``, from any thread.

        Args:
            filter: A :class:`~mljobs.Filter`, or its text; None for all jobs.
            where: SQLAlchemy expressions of one's own beside it.
            timeout: Stop after so many seconds; None for never.
            poll: Look at least every so many seconds; None for 1 on PostgreSQL, where a notification wakes earlier,
                and 0.1 on SQLite.
            **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.
        """
        chosen = selection(self.model, filter, where, fields)
        steps = watch_steps(self._reader, chosen, timeout, poll_seconds(self.engine.dialect.name, poll))
        return self._follow(steps, timeout).begin()

    def follow(
        self,
        jobs: Followable = None,
        *,
        where: Where | None = None,
        timeout: float | None = None,
        poll: float | None = None,
        file: TextIO | None = None,
        show: bool = True,
        **fields: Unpack[Filters],
    ) -> Followed[M]:
        """Follow jobs until all have finished: a progress display that ends with a table of outcomes.

        In a notebook it is the output of the cell, on a terminal some lines on standard error (more of them with
        ``rich``), elsewhere a line whenever something has changed. To interrupt it ends the display, not the jobs. Where a
        failed job is retried, by its handler's policy or by hand, the retry is followed in its place.

        Args:
            jobs: A :class:`~mljobs.Filter` or its text, for the jobs that it finds now; or jobs, or their ids. At most
                10,000.
            where: SQLAlchemy expressions of one's own beside the filter.
            timeout: Stop after so many seconds; None for never.
            poll: Look at least every so many seconds; None for 1 on PostgreSQL, where a notification wakes earlier,
                and 0.1 on SQLite.
            file: Where to show it; None for the notebook, or standard error.
            show: Whether to show anything.
            **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.

        Raises:
            InvalidValueError: Nothing says which jobs; or there are too many.
            JobNotFound: No record has one of the ids.
        """
        chosen = following(self.model, jobs, where, fields)
        steps: Any = followed_steps(chosen, timeout, poll_seconds(self.engine.dialect.name, poll))
        with closing(display_for(file, show=show)) as display, self._follow(steps, timeout) as follower:
            for snapshot in follower:
                display.show(snapshot)
            followed: Followed[M] = follower.result or Followed(complete=False)
            display.end(followed)
        return followed

    def _follow(self, steps: FollowSteps, timeout: float | None) -> Follower[Any]:
        follower: Follower[Any] = Follower(steps, self._read, self.new_listener(), timeout)
        self._followers.add(follower)
        return follower

    def _read(self, step: Read) -> Any:
        with self.connect(atomic=False) as bind:
            return step.operation(bind)

    @contextmanager
    def running(self, job: JobRef, *, worker: str | None = None, lease: float = DEFAULT_LEASE) -> Iterator[Run[M]]:
        """Run a job by hand: claim it, keep its lease alive from a thread, record how the block ends.

        The end of the block completes the job with ``run.metrics``. An exception fails it, with type, message and a short
        traceback, and is raised further. ``KeyboardInterrupt`` and ``SystemExit`` requeue the job.

        Args:
            job: The queued job or its id.
            worker: A name for operators to read; None for host and process.
            lease: Seconds after which another worker may have the job if this process dies.

        Raises:
            JobCancelled: The job was cancelled meanwhile.
            LeaseLostError: The lease was lost meanwhile; nothing was written.
            TerminalStateError, InvalidTransitionError, TargetLockedError, JobNotFound: See ``jobs.claim_one``.
            InvalidValueError: A SQLite database in memory, which the thread that keeps the lease could not see.
        """
        if self._joined is None:
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

    @property
    def sync_url(self) -> URL:
        """Where this store connects."""
        return self.engine.url

    def close(self) -> None:
        """Give back all connections, and end each ``watch``; of a store that was made from a URL, close them."""
        for follower in list(self._followers):
            follower.close()
        self._single.close()
        if self._owned:
            self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _detaching(begun: AbstractContextManager[Session], model: Model | None = None) -> Iterator[Bind]:
    with begun as session:
        if model is not None:
            read_committed(session, model)
        yield session
        session.flush()
        session.expunge_all()  # before the commit, which may expire what is in the session
