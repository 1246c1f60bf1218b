"""``AsyncJobStore``: the same operations, awaited. Needs greenlet, which the extra ``async`` brings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

from sqlalchemy import URL
from sqlalchemy.orm import Session

try:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
    from sqlalchemy.util import greenlet_spawn
except ImportError as error:
    raise ImportError("AsyncJobStore needs the extra: pip install 'mljobs[async]'") from error

from mljobs import events, jobs, transfer
from mljobs.db._engines import async_url, engine_options, set_up_connections, sync_url, url_from_env
from mljobs.db._wake import AsyncSleeper
from mljobs.errors import InvalidValueError, MlJobsError
from mljobs.jobs import Bind, JobRef, Model
from mljobs.jobs._base import plain
from mljobs.jobs._claiming import DEFAULT_LEASE
from mljobs.record._models import MlJob
from mljobs.store._following import Look, Steps, waiting, watching
from mljobs.store._run import Keeper, Run, worker_name
from mljobs.store._store import LEASE_GIVEN_BACK, JobStore, modes, poll_seconds, record_end, refuse_memory, takes_model

P = ParamSpec("P")
R = TypeVar("R")


def new_async_engine(url: str | URL, *, autocommit: bool = False, **options: Any) -> AsyncEngine:
    """Return an async engine with the settings that jobs need; see ``engines.new_engine``."""
    parsed = async_url(url)
    engine = create_async_engine(parsed, **engine_options(parsed, options, autocommit=autocommit))
    set_up_connections(engine.sync_engine)
    return engine


def _bound_async(
    operation: Callable[Concatenate[Bind, P], R],
    *,
    atomic: bool | str = False,
    stands: tuple[type[MlJobsError], ...] = (),
) -> Callable[Concatenate[AsyncJobStore, P], Coroutine[Any, Any, R]]:
    """Bind an operation to an ``AsyncJobStore``; see ``store._bound``."""
    of_model = takes_model(operation)

    @wraps(operation)
    async def run(self: AsyncJobStore, *args: P.args, **kw: P.kwargs) -> R:
        if of_model:
            kw.setdefault("model", self.model)
        whole = bool(kw.get(atomic)) if isinstance(atomic, str) else atomic
        result, told = await self.run(partial(_told, lambda bind: operation(bind, *args, **kw), stands), atomic=whole)
        if told is not None:
            raise told
        return cast("R", result)

    return cast("Callable[Concatenate[AsyncJobStore, P], Coroutine[Any, Any, R]]", run)


def _told(
    operation: Callable[..., R], stands: tuple[type[MlJobsError], ...], bind: Bind
) -> tuple[R | None, MlJobsError | None]:
    try:
        return operation(bind), None
    except stands as error:
        return None, error


class AsyncJobStore(events.Source):
    """Jobs in a database, each operation a transaction of its own, awaited. The same names as ``JobStore``.

    Args:
        source: A URL, an ``AsyncEngine``, or an ``async_sessionmaker`` whose sessions are to be used.
        model: The mapped job class.
        keeper_url: Where ``running`` keeps leases alive from, by a thread with a connection of its own; None for the
            URL of the engine.
        **options: With a URL, passed on to ``create_async_engine``.

    Attributes:
        keeper_url: Where a blocking store on the same database connects.

    Raises:
        InvalidValueError: ``source`` is none of these.
    """

    def __init__(
        self,
        source: str | URL | AsyncEngine | async_sessionmaker[AsyncSession],
        *,
        model: Model = MlJob,
        keeper_url: str | URL | None = None,
        **options: Any,
    ) -> None:
        self.model = model
        self._sessions: async_sessionmaker[AsyncSession] | None = None
        self._owned = isinstance(source, str | URL)
        if isinstance(source, str | URL):
            engine = new_async_engine(source, autocommit=True, **options)
        elif isinstance(source, AsyncEngine):
            engine = source
        elif isinstance(source, async_sessionmaker):
            bind = source.kw.get("bind")
            if not isinstance(bind, AsyncEngine):
                raise InvalidValueError("source", source, "the async_sessionmaker has no engine in bind")
            engine = bind
            self._sessions = source
        else:
            raise InvalidValueError("source", source, "expected a URL, an AsyncEngine or an async_sessionmaker")
        single, whole = modes(engine.sync_engine, owned=self._owned)
        self._single, self._whole = AsyncEngine(single), AsyncEngine(whole)
        self.keeper_url = sync_url(keeper_url or engine.url)
        if self._sessions is None and not plain(model):
            self._sessions = async_sessionmaker(self._whole, expire_on_commit=False)

    @classmethod
    def from_env(cls, **options: Any) -> Self:
        """Return a store at ``MLJOBS_DATABASE_URL``, else at ``sqlite:///mljobs.db``."""
        return cls(url_from_env(), **options)

    @property
    def engine(self) -> AsyncEngine:
        """The engine, for statements of your own."""
        return self._whole

    async def run(self, operation: Callable[[Bind], R], *, atomic: bool = True) -> R:
        """Run a function of ``mljobs.jobs``, or one of your own, on a connection of this store.

        Args:
            operation: Takes the session or connection.
            atomic: Whether what it does stands or falls together.
        """
        if not events.subscribed():
            return await self._run(operation, atomic=atomic)
        taken: list[Callable[[], list[Any]]] = []

        def keeping(bind: Bind) -> R:
            taken.append(events.kept_by(bind, self))
            return operation(bind)

        result = await self._run(keeping, atomic=atomic)
        await events.deliver_async([job for take in taken for job in take()], events.origin_of(self))
        return result

    async def _run(self, operation: Callable[[Bind], R], *, atomic: bool) -> R:
        if self._sessions is not None:
            async with self._sessions.begin() as session:
                return await session.run_sync(partial(_detached, operation))
        if atomic:
            async with self._whole.begin() as connection:
                return await connection.run_sync(operation)
        async with self._single.connect() as connection:
            result = await connection.run_sync(operation)
            await connection.commit()
            return result

    submit = _bound_async(jobs.submit, atomic="unless_active")
    submit_many = _bound_async(jobs.submit_many, atomic=True)
    retry = _bound_async(jobs.retry, atomic="unless_active")
    get = _bound_async(jobs.get)
    find = _bound_async(jobs.find)
    history = _bound_async(jobs.history)
    lineage = _bound_async(jobs.lineage)
    counts = _bound_async(jobs.counts)
    count_up_to = _bound_async(jobs.count_up_to)
    durations = _bound_async(jobs.durations)
    failure_reasons = _bound_async(jobs.failure_reasons)
    finished_per = _bound_async(jobs.finished_per)
    held_in_queue = _bound_async(jobs.held_in_queue)
    last_failures = _bound_async(jobs.last_failures)
    next_claims = _bound_async(jobs.next_claims)
    queue_depths = _bound_async(jobs.queue_depths)
    target_jobs = _bound_async(jobs.target_jobs)
    target_names = _bound_async(jobs.target_names)
    usual_durations = _bound_async(jobs.usual_durations)
    why_read_only = _bound_async(jobs.why_read_only)
    chain = _bound_async(jobs.chain)
    chains = _bound_async(jobs.chains)
    held_after_end = _bound_async(jobs.held_after_end)
    running_jobs = _bound_async(jobs.running_jobs)
    summaries = _bound_async(jobs.summaries)
    summaries_of = _bound_async(jobs.summaries_of)
    claim = _bound_async(jobs.claim)
    claim_one = _bound_async(jobs.claim_one)
    renew = _bound_async(jobs.renew)
    look = _bound_async(jobs.look)
    release = _bound_async(jobs.release)
    set_progress = _bound_async(jobs.set_progress)
    set_progress_many = _bound_async(jobs.set_progress_many)
    complete = _bound_async(jobs.complete, stands=LEASE_GIVEN_BACK)
    complete_many = _bound_async(jobs.complete_many)
    fail = _bound_async(jobs.fail, stands=LEASE_GIVEN_BACK)
    fail_many = _bound_async(jobs.fail_many)
    requeue = _bound_async(jobs.requeue, stands=LEASE_GIVEN_BACK)
    requeue_many = _bound_async(jobs.requeue_many)
    finish_many = _bound_async(jobs.finish_many)
    finish_and_claim = _bound_async(jobs.finish_and_claim)
    cancel = _bound_async(jobs.cancel)
    rescue = _bound_async(jobs.rescue, atomic=True)

    async def prune(self, *, older_than: timedelta | datetime, keep_last: int = 0, batch: int = 1000) -> int:
        """Delete finished records past their time, a transaction for each batch; see ``jobs.prune``."""
        total = 0
        after: jobs.Cursor | None = None
        while True:
            done = await self.run(
                partial(
                    jobs.prune_batch,
                    older_than=older_than,
                    keep_last=keep_last,
                    batch=batch,
                    after=after,
                    model=self.model,
                )
            )
            total += done.deleted
            after = done.cursor
            if after is None:
                return total

    export_jobs = _bound_async(transfer.export_jobs, atomic=True)

    async def import_jobs(
        self,
        file: transfer.File,
        *,
        on_conflict: transfer.OnConflict = "skip",
        requeue_running: bool = False,
        rejects: transfer.File | None = None,
        progress: transfer.OnProgress | None = None,
    ) -> transfer.Imported:
        """Read records from NDJSON, a transaction for each batch; see ``JobStore.import_jobs``."""
        work = transfer.file_import(
            file,
            on_conflict=on_conflict,
            requeue_running=requeue_running,
            rejects=rejects,
            progress=progress,
            model=self.model,
        )
        return await self._import(work)

    dump_kv = _bound_async(transfer.dump_kv, atomic=True)

    async def load_kv(
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
        return await self._import(work)

    async def _import(self, work: transfer.Import) -> transfer.Imported:
        if work.single:
            return await self.run(work.run)
        with work:
            batches = work.batches()
            # In a greenlet too: what it reads from may be asynchronous.
            while (batch := await greenlet_spawn(next, batches, None)) is not None:
                tried = 0
                while True:
                    try:
                        done = await self.run(partial(work.write, batch=batch))
                        break
                    except Exception as error:
                        if not work.try_again(error, tried):
                            raise
                        tried += 1
                work.record(done)
        return work.result

    async def wait(self, job: JobRef, timeout: float | None = None, *, poll: float | None = None) -> MlJob:  # noqa: ASYNC109
        """Wait until the job has finished, and return it; see ``JobStore.wait``."""
        steps = waiting(job, timeout, poll_seconds(self.engine.dialect.name, poll), self.model)
        finished: list[MlJob] = []
        async for _ in self._follow(steps, finished):
            pass
        return finished[0]

    def watch(self, *, timeout: float | None = None, poll: float | None = None, **filters: Any) -> AsyncIterator[MlJob]:
        """Yield each job that is added or changes, from now on; see ``JobStore.watch``."""
        return self._follow(watching(filters, timeout, poll_seconds(self.engine.dialect.name, poll), self.model), [])

    async def _follow(self, steps: Steps, finished: list[MlJob]) -> AsyncIterator[MlJob]:
        answer: Any = None
        async with AsyncSleeper(self.engine, self.model) as sleeper:
            while True:
                try:
                    step = steps.send(answer)
                except StopIteration as stop:
                    finished.append(stop.value)
                    return
                answer = None
                if isinstance(step, Look):
                    answer = await self.run(step.read, atomic=False)
                elif isinstance(step, float | int):
                    await sleeper.sleep(step)
                else:
                    yield step

    async def to_arrow(self, **options: Any) -> Any:
        """Return jobs as an Arrow table; see ``JobStore.to_arrow``."""
        from mljobs.transfer._arrow import to_arrow  # noqa: PLC0415 - an extra

        return await self.run(partial(to_arrow, model=self.model, **options))

    @asynccontextmanager
    async def running(
        self, job: JobRef, *, worker: str | None = None, lease: float = DEFAULT_LEASE
    ) -> AsyncIterator[Run]:
        """Run a job by hand; see ``JobStore.running``. The lease lives on while the event loop is blocked.

        Raises:
            InvalidValueError: A SQLite database in memory, which the thread that keeps the lease could not see.
        """
        refuse_memory(self.keeper_url)
        run = Run(await self.claim_one(job, worker=worker or worker_name(), lease=lease))
        with JobStore(self.keeper_url, model=self.model, pool_size=1) as twin, Keeper(twin, lease) as keeper:
            keeper.add(run)
            try:
                yield run
            except BaseException as error:
                await asyncio.shield(self._record_end(twin, keeper, run, error))
                raise
            await self._record_end(twin, keeper, run, None)

    async def _record_end(self, twin: JobStore, keeper: Keeper, run: Run, error: BaseException | None) -> None:
        twin.told_later = []  # callbacks belong on this store's loop, not in that thread
        try:
            await asyncio.to_thread(record_end, twin, keeper, run, error)
        finally:
            await events.deliver_async(twin.told_later, events.origin_of(self))

    async def close(self) -> None:
        """Close the connections of a store that was made from a URL."""
        if self._owned:
            await self._whole.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _detached(operation: Callable[[Bind], R], session: Session) -> R:
    result = operation(session)
    session.flush()
    session.expunge_all()
    return result
