"""``AsyncJobStore``: the same operations, awaited. Needs greenlet, which the extra ``async`` brings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager, closing
from functools import partial
from typing import Any, Generic, Self, TextIO, TypeVar, Unpack, cast
from weakref import WeakSet

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.orm import Session

try:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, async_sessionmaker, create_async_engine
except ImportError as error:
    raise ImportError("AsyncJobStore needs the extra: pip install 'mljobs[async]'") from error

from mljobs import events, jobs
from mljobs.db._connections import AsyncConnectionCache, begin, cache_size, engines_of, savepoint
from mljobs.db._engines import async_url, engine_options, refuse_memory, set_up_connections, sync_url, url_from_env
from mljobs.db._wake import AsyncChangeListener
from mljobs.errors import InvalidValueError
from mljobs.jobs import DEFAULT_LEASE, Bind, Filter, Filters, JobRef, Where, table_of
from mljobs.jobs._base import M
from mljobs.jobs._filters import selection
from mljobs.jobs._records import is_ml_job
from mljobs.record._models import MlJob
from mljobs.store import _methods as methods
from mljobs.store._base import (
    COMMITTED_ERRORS,
    Store,
    async_store_method,
    bind_of,
    has_iterator,
    read_committed,
    source_error,
)
from mljobs.store._bulk import AsyncBulkActions
from mljobs.store._display import display_for
from mljobs.store._followers import AsyncFollower, TaskLock
from mljobs.store._following import FollowSteps, Read, closed_meanwhile, poll_seconds, wait_steps
from mljobs.store._keeper import Keeper
from mljobs.store._outcomes import Followable, Followed, followed_steps, following
from mljobs.store._recording import record_end
from mljobs.store._run import Run, worker_name
from mljobs.store._store import JobStore
from mljobs.store._transferring import AsyncTransfers
from mljobs.store._watching import SharedReader, watch_steps

R = TypeVar("R")

_CACHE = 16
_CACHE_SQLITE = 2  # more would only wait for the same lock


class AsyncJobStore(AsyncTransfers, AsyncBulkActions, Store, Generic[M]):
    """Jobs in a database, each operation a transaction of its own, awaited. The same names as ``JobStore``.

    It is for the tasks of one event loop at a time. One that was made from a URL may be used on another loop afterwards; to
    ``await store.close()`` on each closes what would be left to the garbage collector.

    Args:
        source: A URL; an ``AsyncEngine``; an ``async_sessionmaker`` whose sessions are to be used, on the engine to which
            they bind the model; or an ``AsyncConnection``, in whose transaction each operation is then a savepoint.
        model: The mapped job class.
        keeper_url: Where ``running`` keeps leases alive from, by a thread with a connection of its own; None for the
            URL of the engine.
        **options: With a URL, passed on to ``create_async_engine``.

    Raises:
        InvalidValueError: ``source`` is none of these.
    """

    awaits_callbacks = True

    def __init__(
        self,
        source: str | URL | AsyncEngine | AsyncConnection | async_sessionmaker[Any],
        *,
        model: type[M] = MlJob,  # type: ignore[assignment]
        keeper_url: str | URL | None = None,
        **options: Any,
    ) -> None:
        self.model: type[M] = model
        self._sessions: async_sessionmaker[Any] | None = None
        self._joined: AsyncConnection | None = None
        self._joined_lock = TaskLock()
        self._owned = isinstance(source, str | URL)
        self._followers: WeakSet[AsyncFollower[Any]] = WeakSet()
        self._reader = SharedReader(model, TaskLock)
        bind: object = source
        if isinstance(source, str | URL):
            url = async_url(source)
            bind = create_async_engine(url, **engine_options(url, options, autocommit=True))
            set_up_connections(bind.sync_engine)
        elif isinstance(source, async_sessionmaker):
            self._sessions, bind = source, _async(bind_of(source().sync_session, model))
        if isinstance(bind, AsyncConnection):
            self._joined = bind
            bind = bind.engine
        if not isinstance(bind, AsyncEngine):
            raise source_error(source, "expected a URL, an AsyncEngine, an AsyncConnection or an async_sessionmaker")
        single, transactional = engines_of(bind.sync_engine, owned=self._owned)
        self._transactional = AsyncEngine(transactional)
        # Of a store that is closed: a connection that is never given back is an error to SQLAlchemy's async pools.
        most = _CACHE if single.dialect.name == "postgresql" else _CACHE_SQLITE
        self._single = AsyncConnectionCache(single, cache_size(single, most) if self._owned else 0)
        self._engine = self._transactional if self._owned else bind
        self._on_postgres = bind.dialect.name == "postgresql"
        self._sync_url = sync_url(keeper_url or bind.url)
        if self._sessions is None and not is_ml_job(model):
            self._sessions = async_sessionmaker(self._transactional, expire_on_commit=False)
        # Whether an operation may run on a kept connection of SQLite, and again where the file was locked.
        self._repeats = self._single.begins and self._single.keeps and self._sessions is None

    @classmethod
    def from_env(cls, **options: Any) -> Self:
        """Return a store at ``MLJOBS_DATABASE_URL``, else at ``sqlite:///mljobs.db``."""
        return cls(url_from_env(), **options)

    @property
    def engine(self) -> AsyncEngine:
        """The engine, for statements of your own."""
        return self._engine

    async def run(self, operation: Callable[[Bind], R], *, atomic: bool = True) -> R:
        """Run a function of ``mljobs.jobs``, or one of your own, on a connection of this store.

        Args:
            operation: Takes the session or connection.
            atomic: Whether what it does stands or falls together.
        """
        return await self._deliver(operation, kept=self._on_postgres and not atomic)

    async def operate(self, operation: Callable[[Bind], R], arguments: Iterable[Any], *, atomic: bool) -> R:
        """Run one of the operations.

        Args:
            operation: Takes the session or connection.
            arguments: Its arguments.
            atomic: Whether it is several statements.
        """
        kept = not has_iterator(arguments) if self._repeats else self._on_postgres and not atomic
        return await self._deliver(operation, kept=kept)

    def lock_pauses(self, arguments: Iterable[Any]) -> Iterator[float]:
        """Yield how many seconds to wait before each new attempt of an operation that met a locked SQLite file."""
        return self._single.lock_pauses() if self._repeats and not has_iterator(arguments) else iter(())

    async def _deliver(self, operation: Callable[[Bind], R], *, kept: bool) -> R:
        """Run an operation, and have what finishes in it delivered to those who have subscribed."""
        if not events.subscribed():
            return await self._run(operation, kept=kept)
        if self._joined is not None:  # the host commits
            events.join(_sync(self._joined), self)
            return await self._run(operation, kept=kept)
        taken: list[Callable[[], list[Any]]] = []

        def keeping(bind: Bind) -> R:
            taken.append(events.collecting(bind, self))
            return operation(bind)

        result = await self._run(keeping, kept=kept)
        await events.deliver_async([job for take in taken for job in take()], events.origin_of(self))
        return result

    async def _run(self, operation: Callable[[Bind], R], *, kept: bool) -> R:
        if self._joined is not None:
            async with self._joined_lock:
                return cast("R", await self._joined.run_sync(partial(self._in_savepoint, operation)))
        if kept and self._sessions is None:
            return await self._single.run(operation)
        self._enter_loop()
        if self._sessions is not None:
            async with self._sessions.begin() as session:
                return cast("R", await session.run_sync(partial(self._in_session, operation)))
        async with self._transactional.begin() as connection:
            return await connection.run_sync(operation)

    def _enter_loop(self) -> None:
        """Leave the connections of another loop alone; those of a host's engine are the host's."""
        if self._owned:
            self._single.enter_loop()

    def _in_session(self, operation: Callable[[Bind], R], session: Session) -> R:
        read_committed(session, self.model)
        return _detached(operation, session)

    def _in_savepoint(self, operation: Callable[[Bind], R], connection: Connection) -> R:
        if self._sessions is None:
            with savepoint(connection):
                return operation(connection)
        begin(connection)
        made: Session = self._sessions(bind=connection, join_transaction_mode="create_savepoint").sync_session
        with made as session, session.begin():
            result: R = _detached(operation, session)
        return result

    submit = methods.async_job_method(jobs.submit, atomic="unless_active")
    submit_many = methods.async_submit_many_method(jobs.submit_many, atomic=True)
    retry = methods.async_job_method(jobs.retry, atomic=True)
    get = methods.async_job_method(jobs.get)
    find = methods.async_page_method(jobs.find)
    history = methods.async_page_method(jobs.history)
    lineage = methods.async_jobs_method(jobs.lineage)
    counts = async_store_method(jobs.counts)
    find_id = async_store_method(jobs.find_id)
    best = methods.async_page_method(jobs.best)
    stats = async_store_method(jobs.stats)
    holders = async_store_method(jobs.holders)
    affected = async_store_method(jobs.affected)
    cancel_batch = async_store_method(jobs.cancel_batch, atomic=True)
    retry_batch = async_store_method(jobs.retry_batch, atomic=True)
    prune_batch = async_store_method(jobs.prune_batch, atomic=True)
    prunable = async_store_method(jobs.prunable)
    count_up_to = async_store_method(jobs.count_up_to)
    durations = async_store_method(jobs.durations)
    failure_reasons = async_store_method(jobs.failure_reasons)
    finished_per = async_store_method(jobs.finished_per)
    held_in_queue = async_store_method(jobs.held_in_queue)
    last_failures = async_store_method(jobs.last_failures)
    next_claims = async_store_method(jobs.next_claims)
    queue_depths = async_store_method(jobs.queue_depths)
    target_jobs = async_store_method(jobs.target_jobs)
    target_names = async_store_method(jobs.target_names)
    usual_durations = async_store_method(jobs.usual_durations)
    why_read_only = async_store_method(jobs.why_read_only)
    chain = async_store_method(jobs.chain)
    chains = async_store_method(jobs.chains)
    held_after_end = async_store_method(jobs.held_after_end)
    running_jobs = async_store_method(jobs.running_jobs)
    summaries = async_store_method(jobs.summaries)
    summaries_of = async_store_method(jobs.summaries_of)
    claim = methods.async_claims_method(jobs.claim)
    claim_one = methods.async_claim_method(jobs.claim_one)
    renew = methods.async_renewal_method(jobs.renew)
    look = methods.async_renewal_method(jobs.look)
    release = async_store_method(jobs.release)
    workers = async_store_method(jobs.workers)
    report = async_store_method(jobs.report)
    report_many = async_store_method(jobs.report_many)
    set_progress = async_store_method(jobs.set_progress)
    set_progress_many = async_store_method(jobs.set_progress_many)
    complete = async_store_method(jobs.complete, committed_errors=COMMITTED_ERRORS)
    complete_many = async_store_method(jobs.complete_many)
    fail = async_store_method(jobs.fail, committed_errors=COMMITTED_ERRORS)
    fail_many = async_store_method(jobs.fail_many)
    requeue = async_store_method(jobs.requeue, committed_errors=COMMITTED_ERRORS)
    requeue_many = async_store_method(jobs.requeue_many)
    finish_many = async_store_method(jobs.finish_many)
    finish_and_claim = methods.async_exchange_method(jobs.finish_and_claim)
    cancel = async_store_method(jobs.cancel)
    rescue = async_store_method(jobs.rescue, atomic=True)

    async def wait(self, job: JobRef, timeout: float | None = None, *, poll: float | None = None) -> M:  # noqa: ASYNC109
        """Wait until the job has finished, and return it; see ``JobStore.wait``."""
        steps = wait_steps(job, timeout, poll_seconds(self.engine.dialect.name, poll), self.model)
        async with aclosing(self._follow(steps, timeout)) as follower:
            async for _ in follower:
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
    ) -> AsyncFollower[M]:
        """Yield each job that is added or changes; see ``JobStore.watch``.

        It begins where it is entered, ``async with store.watch() as watch``, or else with its first step.
        """
        chosen = selection(self.model, filter, where, fields)
        steps = watch_steps(self._reader, chosen, timeout, poll_seconds(self.engine.dialect.name, poll))
        return self._follow(steps, timeout)

    async def follow(
        self,
        jobs: Followable = None,
        *,
        where: Where | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as the blocking store's
        poll: float | None = None,
        file: TextIO | None = None,
        show: bool = True,
        **fields: Unpack[Filters],
    ) -> Followed[M]:
        """Follow jobs until all have finished; see ``JobStore.follow``."""
        chosen = following(self.model, jobs, where, fields)
        steps: Any = followed_steps(chosen, timeout, poll_seconds(self.engine.dialect.name, poll))
        with closing(display_for(file, show=show)) as display:
            async with aclosing(self._follow(steps, timeout)) as follower:
                async for snapshot in follower:
                    display.show(snapshot)
            followed: Followed[M] = follower.result or Followed(complete=False)
            display.end(followed)
        return followed

    def _follow(self, steps: FollowSteps, timeout: float | None) -> AsyncFollower[Any]:
        follower: AsyncFollower[Any] = AsyncFollower(steps, self._read, self._new_listener, timeout)
        self._followers.add(follower)
        return follower

    async def _read(self, step: Read) -> Any:
        return await self.run(step.operation, atomic=False)

    def _new_listener(self) -> AsyncChangeListener:
        self._enter_loop()
        return AsyncChangeListener(self.engine, table_of(self.model), polls=self._joined is not None)

    @asynccontextmanager
    async def running(
        self, job: JobRef, *, worker: str | None = None, lease: float = DEFAULT_LEASE
    ) -> AsyncIterator[Run[M]]:
        """Run a job by hand; see ``JobStore.running``. The lease lives on while the event loop is blocked.

        Raises:
            InvalidValueError: The thread that keeps the lease could not see the job: the store is on a connection of yours,
                or the database is SQLite's in memory.
        """
        if self._joined is not None:
            raise InvalidValueError("source", "AsyncConnection", "the thread that keeps the lease needs an engine")
        refuse_memory(self.sync_url)
        run = Run(await self.claim_one(job, worker=worker or worker_name(), lease=lease))
        with JobStore(self.sync_url, model=self.model, pool_size=1) as sync_store, Keeper(sync_store, lease) as keeper:
            keeper.add(run)
            try:
                yield run
            except BaseException as error:
                await asyncio.shield(self._record_end(sync_store, keeper, run, error))
                raise
            await self._record_end(sync_store, keeper, run, None)

    async def _record_end(
        self, sync_store: JobStore[Any], keeper: Keeper, run: Run[Any], error: BaseException | None
    ) -> None:
        finished = sync_store.divert_events()  # callbacks belong on this store's loop, not in that thread
        try:
            await asyncio.to_thread(record_end, sync_store, keeper, run, error)
        finally:
            await events.deliver_async(finished, events.origin_of(self))

    @property
    def sync_url(self) -> URL:
        """Where a blocking store on the same database connects."""
        return self._sync_url

    async def close(self) -> None:
        """End each ``watch``, and close the connections of a store that was made from a URL."""
        for follower in list(self._followers):
            await follower.aclose()
        if self._owned:
            await self._single.aclose()
            await self._engine.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _async(bind: object) -> object:
    """Return the async face of what a session is bound to."""
    if isinstance(bind, Engine):
        return AsyncEngine(bind)
    return AsyncConnection(AsyncEngine(bind.engine), bind) if isinstance(bind, Connection) else bind


def _sync(connection: AsyncConnection) -> Connection:
    """Return the connection that operations run on.

    Raises:
        InvalidValueError: It is not open.
    """
    if connection.sync_connection is None:
        raise InvalidValueError(
            "source", "AsyncConnection", "it has not been opened: `async with engine.connect() as ...`"
        )
    return connection.sync_connection


def _detached(operation: Callable[[Bind], R], session: Session) -> R:
    result = operation(session)
    session.flush()
    session.expunge_all()
    return result
