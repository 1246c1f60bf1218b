"""A host is told of each finished job: after the commit, once, with the record."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, inspect, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from mljobs import (
    AsyncJobStore,
    InvalidValueError,
    JobStore,
    MlJob,
    MlJobStatus,
    TerminalStateError,
    Worker,
    events,
    jobs,
    on_finished,
)
from mljobs.db._connections import ConnectionCache
from mljobs.events import _delivering as delivering
from mljobs.guards._companions import WATCHER_LOCK, WORKER_LOCK
from mljobs.jobs import Outcome
from tests.backends import Backend
from tests.host_application import GridRun, HostBase, TrainingRun

Seen = list[tuple[str, str]]


@pytest.fixture(autouse=True)
def nobody_listens_afterwards() -> Iterator[None]:
    yield
    for subscription in delivering._subscriptions:
        subscription.remove()


@pytest.fixture
def seen() -> Seen:
    """What everybody in this process was told, as target and state."""
    found: Seen = []
    on_finished(lambda job: found.append((job.target_name, job.status.value)))
    return found


def _job(target: str, *, running: bool = False) -> MlJob:
    job = MlJob(kind="train", target_name=target)
    if running:
        job.start()
    return job


# ------------------------------------------------------------------------------------------------ a session's own ways


def test_a_flush_that_finishes_jobs_calls_listeners_once_after_the_commit(backend: Backend, seen: Seen) -> None:
    def life(session: Session) -> None:
        first, second = _job("a", running=True), _job("b")
        session.add_all([first, second])
        session.flush()
        first.complete({"f1": 0.9})
        session.flush()
        second.cancel()
        session.flush()
        first.progress = 100  # no change
        session.flush()
        assert seen == []

    backend.run(life)
    assert seen == [("a", "completed"), ("b", "cancelled")]
    backend.run(lambda session: session.scalars(select(MlJob)).all())
    assert len(seen) == 2


def test_the_record_is_detached_whole_and_as_it_is_in_the_database(backend: Backend) -> None:
    seen: list[MlJob] = []
    on_finished(seen.append)

    def life(session: Session) -> None:
        session.add(_job("a", running=True))
        session.flush()
        session.expire_all()
        job = session.scalars(select(MlJob)).one()
        job.complete({"f1": 0.9})

    backend.run(life)
    (job,) = seen
    assert inspect(job).detached
    assert not inspect(job).unloaded
    assert (job.metrics, job.progress, job.is_terminal, job.duration_ms is not None) == ({"f1": 0.9}, 100, True, True)
    assert job.to_json() == backend.run(lambda session: jobs.get(session, job).to_json())


def test_a_rollback_calls_no_listener(backend: Backend, seen: Seen) -> None:
    def life(session: Session) -> None:
        session.add(_job("a", running=True))
        session.commit()
        job = session.scalars(select(MlJob)).one()
        job.complete()
        session.flush()
        session.rollback()
        job = session.scalars(select(MlJob)).one()
        job.fail("boom")

    backend.run(life)
    assert seen == [("a", "failed")]

    def fails(session: Session) -> None:
        session.add(_job("b"))
        session.flush()
        jobs.cancel(session, session.scalars(select(MlJob).filter_by(target_name="b")).one())
        raise RuntimeError("after")

    with pytest.raises(RuntimeError):
        backend.run(fails)
    assert seen == [("a", "failed")]


def test_listeners_get_what_a_savepoint_kept_and_not_what_it_rolled_back(backend: Backend, seen: Seen) -> None:
    def life(session: Session) -> None:
        for name in "abcdef":
            session.add(_job(name))
        session.flush()
        found = {job.target_name: job for job in session.scalars(select(MlJob))}
        with session.begin_nested():  # kept
            found["a"].cancel()
            with session.begin_nested():
                jobs.cancel(session, found["b"])
        outer = session.begin_nested()  # taken back, with what an inner one kept
        found["c"].cancel()
        with session.begin_nested():
            jobs.cancel(session, found["d"])
        outer.rollback()
        inner = session.begin_nested()  # taken back, then done again
        jobs.cancel(session, found["e"])
        inner.rollback()
        jobs.cancel(session, found["e"])
        outer = session.begin_nested()  # kept, but for what an inner one takes back
        with session.begin_nested() as inner:
            jobs.cancel(session, found["f"])
            inner.rollback()
        outer.commit()

    backend.run(life)
    assert sorted(seen) == [("a", "cancelled"), ("b", "cancelled"), ("e", "cancelled")]


def test_a_failed_flush_in_a_savepoint_calls_no_listener(backend: Backend, seen: Seen) -> None:
    def life(session: Session) -> None:
        session.add_all([_job("a"), _job("b")])
        session.commit()
        first, second = session.scalars(select(MlJob).order_by(MlJob.target_name))
        with pytest.raises(TerminalStateError), session.begin_nested():
            first.cancel()
            session.flush()
            session.execute(text("UPDATE ml_jobs SET progress = 7 WHERE target_name = 'a'"))
        second.cancel()

    backend.run(life)
    assert seen == [("b", "cancelled")]


def test_every_operation_in_a_session_that_finishes_a_job_calls_listeners(backend: Backend, seen: Seen) -> None:
    def life(session: Session) -> None:
        for name in ("complete", "fail", "requeue", "cancel", "lost"):
            jobs.submit(session, "train", name)
        claims = {claim.job.target_name: claim for claim in jobs.claim(session, worker="w", limit=5)}
        jobs.complete(session, claims["complete"], {"f1": 1})
        jobs.fail(session, claims["fail"], "boom")
        jobs.requeue(session, claims["requeue"])
        assert jobs.cancel(session, claims["cancel"].job_id)
        assert not jobs.cancel(session, claims["cancel"].job_id)
        session.execute(text("UPDATE ml_job_leases SET expires_at = acquired_at"))

    backend.run(life)
    assert sorted(seen) == [("cancel", "cancelled"), ("complete", "completed"), ("fail", "failed")]
    seen.clear()
    backend.run(lambda session: jobs.rescue(session, max_attempts=1))
    assert seen == [("lost", "failed")]


def test_updates_by_statement_call_listeners(backend: Backend, seen: Seen) -> None:
    finished = {"status": MlJobStatus.CANCELLED}

    def life(session: Session) -> None:
        for name in ("orm", "core", "query", "key", "many", "left", "done"):
            session.add(_job(name))
        session.add(MlJob(kind="train", target_name="history", status="failed"))
        session.flush()
        ids = {job.target_name: job.id for job in session.scalars(select(MlJob))}
        session.execute(update(MlJob).where(MlJob.target_name == "orm").values(finished))
        table: Any = MlJob.__table__
        result = session.execute(table.update().where(table.c.target_name == "core").values(finished))
        assert result.rowcount == 1
        session.query(MlJob).filter_by(target_name="query").update(finished, synchronize_session="fetch")
        session.execute(update(MlJob), [{"id": ids["key"], **finished}])
        session.execute(update(MlJob).where(MlJob.target_name == "left").values(priority=3))
        session.execute(update(MlJob).where(MlJob.target_name == "nobody").values(finished))

    backend.run(life)
    assert sorted(seen) == [(name, "cancelled") for name in ("core", "key", "orm", "query")]


def test_records_that_are_inserted_finished_call_no_listener(backend: Backend, seen: Seen) -> None:
    def life(session: Session) -> None:
        past = _job("past", running=True)
        past.complete()
        session.add(MlJob.from_json(past.to_json()))
        fresh = _job("fresh", running=True)
        session.add(fresh)
        fresh.complete()  # taken its final state since, so it has finished here

    backend.run(life)
    assert seen == [("fresh", "completed")]


def test_hosts_columns_that_change_after_the_end_call_no_listener(url: str, seen: Seen) -> None:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        HostBase.metadata.create_all(connection)
        connection.commit()
    engine = create_engine(url, poolclass=NullPool)
    with Session(engine) as session:
        run = GridRun(kind="train", target_name="a", points=9)
        session.add(run)
        session.commit()
        run.cancel()
        session.commit()
        run.note = "later"
        session.commit()
        session.execute(update(TrainingRun).values(note="again"))
        session.commit()
    assert seen == [("a", "cancelled")]


def test_a_subclass_comes_with_its_own_columns_and_a_class_can_be_listened_to(url: str) -> None:
    engine = create_engine(url, poolclass=NullPool)
    HostBase.metadata.create_all(engine)
    runs: list[Any] = []
    grids: list[Any] = []
    on_finished(runs.append, TrainingRun)
    on_finished(grids.append, GridRun)
    store = JobStore(engine, model=TrainingRun)
    with Session(engine) as session, session.begin():
        session.add_all(
            [GridRun(kind="train", target_name="grid", points=9), TrainingRun(kind="train", target_name="x")]
        )
        session.add(_job("ours"))
    with Session(engine) as session, session.begin():
        jobs.cancel(session, session.scalars(select(MlJob)).one())
    for run in store.find():
        store.cancel(run)
    assert sorted(run.target_name for run in runs) == ["grid", "x"]
    assert [(type(run), run.points) for run in grids] == [(GridRun, 9)]


def test_a_session_may_be_used_again_by_the_callback_and_after_it(url: str, seen: Seen) -> None:
    engine = create_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.1)  # the connection is back in the pool
    with Session(engine) as session:
        found: list[int] = []
        on_finished(lambda _: found.append(len(session.scalars(select(MlJob)).all())), session)
        on_finished(lambda job: JobStore(engine).submit("train", f"after-{job.target_name}"), session)
        session.add_all([_job("a"), _job("b")])
        session.commit()
        for job in session.scalars(select(MlJob)).all():
            job.cancel()
        session.commit()
        assert found[0] == 2
        assert len(found) == 2
        session.rollback()
        assert len(session.scalars(select(MlJob)).all()) >= 2
    engine.dispose()
    assert len(seen) == 2


def test_a_two_phase_commit_calls_listeners_after_the_second_phase(postgres_url: str, seen: Seen) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    asleep = engine.connect()  # as workers and watchers: a transaction that has notified them cannot be prepared
    for lock in (WORKER_LOCK, WATCHER_LOCK):
        asleep.execute(
            text(f"SELECT pg_advisory_lock_shared({lock}, ('ml_jobs'::regclass::oid::bigint & 2147483647)::int)")
        )
    with Session(engine, twophase=True) as session:
        first, second = jobs.submit(session, "train", "a"), jobs.submit(session, "train", "b")
        second_id = second.id
        first.cancel()
        session.prepare()
        assert seen == []
        session.commit()
        assert seen == [("a", "cancelled")]
        second.cancel()
        session.prepare()
        session.rollback()
    with engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.exec_driver_sql("SET LOCAL mljobs.notify = 'off'")
        jobs.cancel(connection, second_id)
        transaction.prepare()
        transaction.commit()
    assert seen == [("a", "cancelled"), ("b", "cancelled")]
    asleep.close()


def test_a_commit_that_fails_calls_no_listener(url: str, seen: Seen) -> None:
    class Own(DeclarativeBase):
        pass

    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE parent (id integer PRIMARY KEY)"))
        child = "CREATE TABLE child (id integer REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED)"
        connection.execute(text(child))

    @event.listens_for(engine, "connect")
    def foreign_keys(driver: Any, _record: object) -> None:
        if engine.dialect.name == "sqlite":
            driver.execute("PRAGMA foreign_keys = ON")

    def finish(bind: Any) -> None:
        bind.execute(text("INSERT INTO child VALUES (1)"))  # refused by the COMMIT
        job = jobs.submit(bind, "train", "a")
        jobs.cancel(bind, job)

    with pytest.raises(Exception, match=r"(?i)foreign key"), Session(engine) as session, session.begin():
        finish(session)
    with pytest.raises(Exception, match=r"(?i)foreign key"), engine.begin() as connection:
        finish(connection)
    with pytest.raises(Exception, match=r"(?i)foreign key"), JobStore(engine).connect() as connection:
        finish(connection)
    assert seen == []
    with engine.begin() as connection:
        job = jobs.submit(connection, "train", "b")
        jobs.cancel(connection, job)
    assert seen == [("b", "cancelled")]


# -------------------------------------------------------------------------------------------------- joined transactions


@pytest.mark.parametrize("mode", ["conditional_savepoint", "rollback_only", "create_savepoint", "control_fully"])
def test_a_session_that_joins_a_transaction_calls_listeners_when_that_commits(url: str, seen: Seen, mode: Any) -> None:
    engine = create_engine(url, poolclass=NullPool)

    def life(connection: Any, target: str) -> None:
        with Session(connection, join_transaction_mode=mode) as session:
            job = jobs.submit(session, "train", target)
            jobs.cancel(session, job)
            session.commit()

    with engine.connect() as connection:
        with connection.begin() as transaction:
            life(connection, "kept")
            if mode != "control_fully":  # which commits the transaction itself
                assert seen == []
            if transaction.is_active:
                transaction.commit()
        with connection.begin() as transaction:
            life(connection, "taken back")
            if transaction.is_active:
                transaction.rollback()
    expected = [("kept", "cancelled")]
    assert seen == (expected if mode != "control_fully" else [*expected, ("taken back", "cancelled")])


def test_core_connections_call_listeners_after_each_commit_and_not_after_a_rollback(url: str, seen: Seen) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        kept, gone = (jobs.submit(connection, "train", name) for name in ("kept", "gone"))
        jobs.cancel(connection, kept)
        with connection.begin_nested() as savepoint:
            jobs.cancel(connection, gone)
            savepoint.rollback()
        with connection.begin_nested():
            jobs.cancel(connection, jobs.submit(connection, "train", "nested"))
        assert seen == []
    assert seen == [("kept", "cancelled"), ("nested", "cancelled")]
    with engine.connect() as connection:
        jobs.cancel(connection, gone)
        connection.rollback()
        jobs.cancel(connection, gone)
        connection.commit()
        connection.execute(text("SELECT 1"))
        assert seen[2:] == [("gone", "cancelled")]
        jobs.cancel(connection, jobs.submit(connection, "train", "never"))
    assert len(seen) == 3
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            jobs.cancel(connection, jobs.submit(connection, "train", "at once"))
            assert seen[3:] == [("at once", "cancelled")]
    engine.dispose()


def test_the_rollback_of_a_savepoint_drops_no_event_from_before_it(url: str, seen: Seen) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        jobs.cancel(connection, jobs.submit(connection, "train", "core"))
        with connection.begin_nested() as savepoint:
            jobs.submit(connection, "train", "never")
            savepoint.rollback()
    with engine.begin() as connection, Session(connection, join_transaction_mode="create_savepoint") as session:
        jobs.cancel(session, jobs.submit(session, "train", "joined"))
        session.commit()
        jobs.submit(session, "train", "never")
        session.rollback()
    assert seen == [("core", "cancelled"), ("joined", "cancelled")]
    engine.dispose()


# ------------------------------------------------------------------------------------------------------------- stores


def test_every_operation_of_a_store_that_finishes_a_job_calls_listeners(backend: Backend, seen: Seen) -> None:
    store = backend.store()
    for name in ("complete", "fail", "many", "exchanged", "requeue", "cancel", "lost"):
        store.submit("train", name)
    claims = {claim.job.target_name: claim for claim in store.claim(worker="w", limit=7)}
    store.complete(claims["complete"])
    store.fail(claims["fail"], "boom")
    store.requeue(claims["requeue"])
    store.cancel(claims["cancel"].job)
    with pytest.raises(TerminalStateError):
        store.complete(claims["cancel"])
    assert store.cancel(claims["cancel"].job) is False
    assert store.finish_many([Outcome.completed(claims["many"])]) == [None]
    errors, _ = store.finish_and_claim(
        [Outcome.failed(claims["exchanged"], "x"), Outcome.completed(claims["many"])], worker="w", kinds=["backfill"]
    )
    assert errors[0] is None
    assert errors[1] is not None
    assert seen == [
        ("complete", "completed"),
        ("fail", "failed"),
        ("cancel", "cancelled"),
        ("many", "completed"),
        ("exchanged", "failed"),
    ]
    seen.clear()
    with backend.outside.begin() as connection:
        connection.execute(text("UPDATE ml_job_leases SET expires_at = acquired_at"))
    assert store.rescue(max_attempts=1).failed
    assert seen == [("lost", "failed")]


def test_runs_by_hand_call_listeners(backend: Backend, seen: Seen) -> None:
    store = backend.store()
    good, bad = store.submit("train", "good"), store.submit("train", "bad")

    async def run(target: AsyncJobStore) -> None:
        async with target.running(good) as work:
            work.metrics = {"f1": 1}
        with pytest.raises(ZeroDivisionError):
            async with target.running(bad):
                _ = 1 / 0

    if backend.is_async:
        backend.wait(run(store._target))
    else:
        with store.running(good) as work:
            work.metrics = {"f1": 1}
        with pytest.raises(ZeroDivisionError), store.running(bad):
            _ = 1 / 0
    assert seen == [("good", "completed"), ("bad", "failed")]


def test_a_block_of_a_store_calls_listeners_after_it_commits(url: str, seen: Seen) -> None:
    with JobStore(url) as store:
        with store.connect() as bind:
            kept, gone = (jobs.submit(bind, "train", name) for name in ("kept", "gone"))
            jobs.cancel(bind, kept)
            with bind.begin_nested() as savepoint:
                jobs.cancel(bind, gone)
                savepoint.rollback()
            assert seen == []
        assert seen == [("kept", "cancelled")]
        with pytest.raises(RuntimeError), store.connect() as bind:
            jobs.cancel(bind, gone)
            raise RuntimeError
        assert len(seen) == 1
        assert store.get(gone).status == "queued"


def test_a_worker_calls_listeners_for_all_that_it_finishes(url: str, seen: Seen) -> None:
    with JobStore(url) as store:
        own: Seen = []
        store.on_finished(lambda job: own.append((job.target_name, job.status.value)))
        store.submit_many(("train", f"good-{n}", {}) for n in range(40))
        store.submit("train", "bad", {"fail": True})
        worker = Worker(store, concurrency=4, poll=0.1)

        @worker.handles("train", retries=1, backoff=0)
        def train(run: Any) -> dict[str, int]:
            if run.spec.get("fail"):
                raise ValueError("bad data")
            return {"ok": 1}

        worker.run(until_idle=True)
    expected = sorted([*((f"good-{n}", "completed") for n in range(40)), ("bad", "failed"), ("bad", "failed")])
    assert sorted(seen) == expected
    assert sorted(own) == expected


# ---------------------------------------------------------------------------------------------- what is listened to


def test_each_target_gets_its_own_events(url: str) -> None:
    engine = create_engine(url, poolclass=NullPool)
    makers = sessionmaker(engine), sessionmaker(engine)

    class Special(Session):
        pass

    class Registry(scoped_session[Session]):
        pass

    registry = Registry(sessionmaker(engine))
    special = Special(engine)
    plain = Session(engine)
    stores = JobStore(engine), JobStore(engine), JobStore(makers[0])
    heard: dict[str, list[str]] = {}
    targets: dict[str, Any] = {
        "everything": None,
        "sessions": Session,
        "maker 0": makers[0],
        "maker 1": makers[1],
        "registry": registry,
        "special class": Special,
        "special": special,
        "plain": plain,
        "store 0": stores[0],
        "store 1": stores[1],
        "store 2": stores[2],
    }
    for name, target in targets.items():
        heard[name] = []
        on_finished(lambda job, name=name: heard[name].append(job.target_name), target)

    def by_session(session: Session, target: str) -> None:
        jobs.cancel(session, jobs.submit(session, "train", target))
        session.commit()
        session.close()

    by_session(makers[0](), "maker 0")
    by_session(makers[1](), "maker 1")
    by_session(registry(), "registry")
    by_session(special, "special")
    by_session(plain, "plain")
    for number, store in enumerate(stores):
        store.cancel(store.submit("train", f"store {number}"))
    sessions = ["maker 0", "maker 1", "registry", "special", "plain", "store 2"]
    assert heard == {
        "everything": ["maker 0", "maker 1", "registry", "special", "plain", "store 0", "store 1", "store 2"],
        "sessions": sessions,
        "maker 0": ["maker 0", "store 2"],  # the store runs in sessions of this maker
        "maker 1": ["maker 1"],
        "registry": ["registry"],
        "special class": ["special"],
        "special": ["special"],
        "plain": ["plain"],
        "store 0": ["store 0"],
        "store 1": ["store 1"],
        "store 2": ["store 2"],
    }


def test_async_targets_get_their_own_events_and_await_coroutine_functions(backend: Backend) -> None:
    if not backend.is_async:
        return _coroutine_functions_need_an_async_target()
    engine: Any = backend.engine
    maker = async_sessionmaker(engine)
    heard: list[tuple[str, str]] = []

    def hearing(name: str) -> Callable[[MlJob], Any]:
        async def callback(job: MlJob) -> None:
            await asyncio.sleep(0)
            async with AsyncSession(engine) as session:  # the connection is back, the loop runs
                found = await session.get(MlJob, job.id)
                assert found is not None
                assert found.is_terminal
            heard.append((name, job.target_name))

        return callback

    async def story() -> None:
        store = AsyncJobStore(engine)
        on_finished(hearing("maker"), maker)
        on_finished(hearing("all async"), AsyncSession)
        store.on_finished(hearing("store"))
        async with maker.begin() as session:
            job = await session.run_sync(jobs.submit, "train", "by maker")
            job.cancel()
        async with AsyncSession(engine) as session:
            on_finished(hearing("one"), session)
            job = await session.run_sync(jobs.submit, "train", "by one")
            await session.commit()
            await session.run_sync(jobs.cancel, job)
            await session.commit()
        await store.cancel(await store.submit("train", "by store"))
        job = await store.submit("train", "by run")
        async with store.running(job):
            pass

    backend.wait(story())
    assert heard == [
        ("maker", "by maker"),
        ("all async", "by maker"),
        ("all async", "by one"),
        ("one", "by one"),
        ("store", "by store"),
        ("store", "by run"),
    ]
    return None


def _coroutine_functions_need_an_async_target() -> None:
    async def callback(_job: MlJob) -> None: ...

    class Called:
        async def __call__(self, _job: MlJob) -> None: ...

    for unfit in (callback, Called()):
        for target in (None, Session, MlJob):
            with pytest.raises(InvalidValueError, match="callback"):
                on_finished(unfit, target)


@pytest.mark.parametrize("target", [3, "store", object(), int, create_engine, MlJob(kind="train", target_name="x")])
def test_a_target_without_events_is_refused(target: Any) -> None:
    with pytest.raises(InvalidValueError, match="target"):
        on_finished(print, target)
    with pytest.raises(InvalidValueError, match="callback"):
        on_finished(target if not callable(target) else None)
    assert not events.subscribed()


# ------------------------------------------------------------------------------------------------------- subscriptions


def test_a_callback_that_fails_is_logged_and_the_others_are_called(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_job: MlJob) -> None:
        raise RuntimeError("in the callback")

    on_finished(broken)
    heard: list[str] = []
    on_finished(lambda job: heard.append(job.target_name))
    store = backend.store()
    store.cancel(store.submit("train", "by store"))

    def life(session: Session) -> None:
        jobs.cancel(session, jobs.submit(session, "train", "by session"))

    backend.run(life)
    assert heard == ["by store", "by session"]
    assert len(caplog.records) == 2
    assert "broken" in caplog.text
    assert {job.status for job in store.find()} == {MlJobStatus.CANCELLED}


def test_a_subscription_ends_by_its_handle_its_block_or_with_its_target(url: str) -> None:
    heard: list[str] = []
    with JobStore(url) as store:

        def finish(target: str) -> None:
            store.cancel(store.submit("train", target))

        @on_finished
        def callback(job: MlJob) -> int:
            heard.append(job.target_name)
            return 7

        finish("a")
        callback.remove()
        callback.remove()
        finish("b")
        with on_finished(lambda job: heard.append(job.target_name)):
            finish("c")
        finish("d")
        assert heard == ["a", "c"]
        assert callback(store.find()[0]) == 7
        other = JobStore(url)
        other.on_finished(print)
        assert events.subscribed()
        other.close()
        del other
        gc.collect()
        assert not events.subscribed()


def test_what_finished_is_told_though_another_thread_has_the_connection_already(
    url: str, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    with JobStore(url) as store:
        jobs_to_end, kept = [store.submit("train", target) for target in ("a", "b")], ConnectionCache.keep

        def keep_and_use(self: ConnectionCache, used: Any) -> None:
            kept(self, used)
            if jobs_to_end:  # as another thread would, before this one goes on
                store.cancel(jobs_to_end.pop())

        monkeypatch.setattr(ConnectionCache, "keep", keep_and_use)
        store.cancel(jobs_to_end.pop())
    assert sorted(seen) == [("a", "cancelled"), ("b", "cancelled")]


def test_callbacks_run_in_the_thread_that_commits(url: str) -> None:
    threads: list[str] = []
    with JobStore(url) as store:
        on_finished(lambda _: threads.append(threading.current_thread().name), store)
        job = store.submit("train", "a")
        other = threading.Thread(target=store.cancel, args=[job], name="theirs")
        other.start()
        other.join()
    assert threads == ["theirs"]


def test_a_callback_may_finish_jobs_itself(url: str) -> None:
    heard: list[str] = []
    with JobStore(url) as store:
        children = [store.submit("train", f"child {n}") for n in range(2)]

        def cascade(job: MlJob) -> None:
            heard.append(job.target_name)
            if job.target_name == "parent":
                for child in children:
                    store.cancel(child)

        on_finished(cascade, store)
        store.cancel(store.submit("train", "parent"))
    assert heard == ["parent", "child 0", "child 1"]


def _statements(engine: Engine, act: Callable[[], object]) -> int:
    count = 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1

    event.listen(engine, "before_cursor_execute", note)
    act()
    event.remove(engine, "before_cursor_execute", note)
    return count


def test_without_listeners_no_statement_is_sent(url: str) -> None:
    engine = create_engine(url, poolclass=NullPool)
    store, deaf = JobStore(engine), JobStore(engine)
    on_finished(print, Session).remove()  # the listeners stand, and do nothing

    def finish(target: str) -> int:
        job = store.submit("train", target)
        return _statements(engine, lambda: store.cancel(job))

    def flush() -> int:
        with Session(engine) as session:
            job = jobs.submit(session, "train", "x")
            session.commit()
            job.cancel()
            return _statements(engine, session.commit)

    before = finish("before"), flush()
    subscription = deaf.on_finished(print)
    assert (finish("others"), flush()) == before
    subscription.remove()
    with store.on_finished(lambda _: None):
        assert finish("listening") == before[0] + 1
    assert (finish("after"), flush()) == before


def test_a_long_list_is_passed_complete_to_listeners(url: str) -> None:
    heard: list[str] = []
    with JobStore(url) as store:
        store.submit_many(("train", str(n), {}) for n in range(2500))
        claims = store.claim(worker="w", limit=2500)
        with store.on_finished(lambda job: heard.append(job.target_name)):
            store.complete_many((claim, None) for claim in claims)
        assert heard == [claim.job.target_name for claim in claims]
        assert store.prune(older_than=timedelta(0)) == 2500
