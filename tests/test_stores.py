"""What a store is made from, and that it outlives forks, lost servers and failures to record."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import threading
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import AsyncJobStore, InvalidValueError, JobStore, MlJob, MlJobStatus
from mljobs.db import _connections
from mljobs.db._engines import async_url, sync_url, url_from_env
from mljobs.db._wake import AsyncChangeListener, ChangeListener
from mljobs.jobs._base import connection_of
from tests.backends import DRIVERS
from tests.waiting import until


@pytest.mark.parametrize(
    ("given", "blocking", "awaited"),
    [
        ("postgresql://h/d", "postgresql+psycopg", "postgresql+psycopg"),
        ("postgres://h/d", "postgresql+psycopg", "postgresql+psycopg"),
        ("postgresql+asyncpg://h/d", "postgresql+psycopg", "postgresql+asyncpg"),
        ("sqlite:///x.db", "sqlite", "sqlite+aiosqlite"),
        ("sqlite+aiosqlite:///x.db", "sqlite", "sqlite+aiosqlite"),
    ],
)
def test_a_url_gets_the_driver_that_its_store_needs(given: str, blocking: str, awaited: str) -> None:
    assert (sync_url(given).drivername, async_url(given).drivername) == (blocking, awaited)


def test_a_bad_url_does_not_show_its_password() -> None:
    for url in ("mysql://u:secret@h/d", "postgresql://u:secret@h:port/d"):
        with pytest.raises(InvalidValueError) as caught:
            sync_url(url)
        assert "secret" not in str(caught.value)


def test_a_table_that_is_missing_is_told_with_the_remedy(empty_url: str) -> None:
    async def awaited(driver: str) -> None:
        async with AsyncJobStore(make_url(empty_url).set(drivername=driver).render_as_string(False)) as store:
            await store.submit("train", "spam")

    def blocking() -> None:
        with JobStore(empty_url) as store:
            store.submit("train", "spam")

    def own_session() -> None:
        engine = create_engine(make_url(sync_url(empty_url)), poolclass=NullPool)
        with Session(engine) as session:
            session.add(MlJob(kind="train", target_name="spam"))
            session.flush()

    backend = make_url(empty_url).get_backend_name()
    of_async = [driver for name, driver in DRIVERS.items() if name.startswith(f"{backend}-")]
    for act in (blocking, own_session, *(lambda driver=driver: asyncio.run(awaited(driver)) for driver in of_async)):
        with pytest.raises(DBAPIError) as caught:
            act()
        assert caught.value.__notes__ == [
            "mljobs: there is no table ml_jobs: run `mljobs upgrade`, or your own migrations"
        ]
    engine = create_engine(make_url(sync_url(empty_url)), poolclass=NullPool)
    with engine.connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.exec_driver_sql("SELECT * FROM their_ml_jobs")
    assert not hasattr(caught.value, "__notes__")


def test_the_environment_names_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLJOBS_DATABASE_URL", raising=False)
    assert url_from_env() == "sqlite:///mljobs.db"
    monkeypatch.setenv("MLJOBS_DATABASE_URL", "sqlite:///other.db")
    assert (url_from_env(), url_from_env("sqlite:///mine.db")) == ("sqlite:///other.db", "sqlite:///mine.db")
    assert AsyncJobStore.from_env().engine.url.database == "other.db"


@pytest.mark.parametrize("driver", [name for name in DRIVERS if "-" in name])
def test_an_async_store_runs_on_a_hosts_engine_and_sessionmaker(driver: str, request: pytest.FixtureRequest) -> None:
    plain: str = request.getfixturevalue("postgres_url" if driver.startswith("postgresql") else "sqlite_url")
    url = make_url(plain).set(drivername=DRIVERS[driver])

    async def life() -> None:
        engine = create_async_engine(url)
        for source in (engine, async_sessionmaker(engine)):
            async with AsyncJobStore(source) as store:
                job = await store.submit("train", "spam")
                async with store.running(job) as run:
                    run.metrics = {"n": 1}
                assert (await store.wait(job, timeout=30)).metrics == {"n": 1}
                assert await store.prune(older_than=timedelta(0)) == 1
                assert (await store.run(lambda bind: bind.execute(text("SELECT 1")).scalar())) == 1
        await engine.dispose()

    asyncio.run(life())


@pytest.mark.parametrize("source", [None, 5, async_sessionmaker()])
def test_an_async_source_that_is_none_is_refused(source: Any) -> None:
    with pytest.raises(InvalidValueError) as caught:
        AsyncJobStore(source)
    assert caught.value.field == "source"


def test_async_running_in_memory_is_refused() -> None:
    async def attempt() -> None:
        async with AsyncJobStore("sqlite+aiosqlite://") as store:
            with pytest.raises(InvalidValueError, match="memory"):
                async with store.running(1):
                    pass

    asyncio.run(attempt())


def test_a_store_outlives_a_fork(url: str) -> None:
    with JobStore(url) as store:
        store.submit("train", "parent")
        child = os.fork()
        if child == 0:
            try:
                store.submit("train", "child")
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        store.submit("train", "parent")
        assert sorted(job.target_name for job in store.find()) == ["child", "parent", "parent"]


def _drop_connections(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )


@pytest.mark.alone
def test_a_store_goes_on_after_the_server_dropped_its_connections(postgres_url: str) -> None:
    admin = create_engine(postgres_url, poolclass=NullPool)
    with JobStore(postgres_url) as store:
        store.submit("train", "before")
        _drop_connections(admin)
        with pytest.raises(OperationalError):
            store.submit("train", "lost")
        store.submit("train", "after")
        assert {job.target_name for job in store.find()} == {"before", "after"}
    admin.dispose()


def test_no_more_connections_are_kept_of_a_hosts_pool_than_it_can_spare(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    with JobStore(engine) as store:
        contexts = [store.connect(atomic=False) for _ in range(4)]
        for context in contexts:
            context.__enter__()
        for context in contexts:
            context.__exit__(None, None, None)
        assert engine.pool.checkedout() == 2  # type: ignore[attr-defined]
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    engine.dispose()


@pytest.mark.alone
def test_a_listener_whose_connection_is_lost_polls_and_listens_again(postgres_url: str) -> None:
    admin = create_engine(postgres_url, poolclass=NullPool)
    with JobStore(postgres_url) as store, ChangeListener(store.engine, MlJob.__table__) as listener:
        listener.wait(0)
        _drop_connections(admin)
        listener.wait(0.01)
        listener.wait(0)
        assert listener._connection is not None
    admin.dispose()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_small_pool_is_enough_for_every_operation(postgres_url: str, size: int) -> None:
    with JobStore(postgres_url, pool_size=size, max_overflow=0, pool_timeout=60) as store:
        job = store.submit("train", "spam")
        for thread in [threading.Thread(target=store.get, args=[job]) for _ in range(4)]:
            thread.start()
            thread.join()
        store.submit_many([("train", "eggs", {})])
        assert store.rescue().requeued == []
        with store.running(job) as run:
            run.progress(50)
        assert store.wait(job, timeout=60).status is MlJobStatus.COMPLETED


@pytest.mark.alone
def test_a_host_without_a_pool_keeps_no_connection_for_mljobs(postgres_url: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    with JobStore(engine) as store, JobStore(postgres_url) as other:
        store.submit("train", "spam")
        with other.engine.connect() as connection:
            asked = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            until(lambda: connection.exec_driver_sql(asked).scalar_one() == 0)  # a server process ends a little later
    engine.dispose()


def test_of_many_watchers_some_poll_and_all_see_the_end(postgres_url: str) -> None:
    async def main() -> None:
        store = AsyncJobStore(
            postgres_url.replace("+psycopg", "+asyncpg"), pool_size=2, max_overflow=0, pool_timeout=60
        )
        async with store:
            job = await store.submit("train", "spam")
            waits = [asyncio.create_task(store.wait(job, timeout=60, poll=0.05)) for _ in range(20)]
            listeners = 0
            while listeners < 9:
                await asyncio.sleep(0.01)
                listeners = await store.run(_listeners)
            await store.cancel(job)
            assert {done.status for done in await asyncio.gather(*waits)} == {MlJobStatus.CANCELLED}
            assert listeners == 9

    asyncio.run(main())


def _listeners(bind: Any) -> int:
    asked = (
        "SELECT count(*) FROM pg_locks JOIN pg_database ON oid = database "
        "WHERE locktype = 'advisory' AND datname = current_database()"
    )
    number: int = connection_of(bind, MlJob).exec_driver_sql(asked).scalar_one()
    return number


@pytest.mark.parametrize("driver", [DRIVERS["postgresql-psycopg-async"], DRIVERS["postgresql-asyncpg"]])
def test_an_async_listener_whose_connection_is_lost_polls_and_listens_again(postgres_url: str, driver: str) -> None:
    admin = create_engine(postgres_url, poolclass=NullPool)

    async def main() -> None:
        engine = create_async_engine(postgres_url.replace("postgresql+psycopg", driver))
        async with AsyncChangeListener(engine, MlJob.__table__) as listener:
            await listener.wait(0)
            await listener.wait(0.01)
            _drop_connections(admin)
            for _ in range(3):
                await listener.wait(0.05)
            assert listener._connection is not None
        await engine.dispose()

    asyncio.run(main())
    admin.dispose()


@pytest.mark.parametrize("driver", [DRIVERS["postgresql-psycopg-async"], DRIVERS["postgresql-asyncpg"]])
def test_more_tasks_than_connections_take_turns_and_one_that_is_cancelled_leaves_its_place(
    postgres_url: str, driver: str
) -> None:
    url = postgres_url.replace("postgresql+psycopg", driver)

    def sleep(bind: Any) -> None:
        bind.exec_driver_sql("SELECT pg_sleep(60)")

    async def main() -> None:
        async with AsyncJobStore(url, pool_size=4, max_overflow=0, pool_timeout=30) as store:
            asleep = [asyncio.create_task(store.run(sleep, atomic=False)) for _ in range(2)]
            done = [asyncio.create_task(store.submit("train", f"t{number}")) for number in range(20)]
            await asyncio.sleep(0)
            for task in asleep:
                task.cancel()
            assert len({job.id for job in await asyncio.gather(*done)}) == 20
            assert all(
                isinstance(one, asyncio.CancelledError) for one in await asyncio.gather(*asleep, return_exceptions=True)
            )
            assert len(await store.claim(worker="w", limit=50)) == 20

    asyncio.run(main())


def test_a_task_waits_for_a_connection_as_long_as_the_pool_lets_it(postgres_url: str) -> None:
    async def main() -> None:
        url = postgres_url.replace("+psycopg", "+asyncpg")
        async with AsyncJobStore(url, pool_size=3, max_overflow=0, pool_timeout=0.01) as store:
            asleep = asyncio.create_task(
                store.run(lambda bind: bind.exec_driver_sql("SELECT pg_sleep(60)"), atomic=False)
            )
            await asyncio.sleep(0)
            with pytest.raises(PoolTimeoutError):
                await store.submit("train", "spam")
            asleep.cancel()
            await asyncio.wait([asleep])
            await store.submit("train", "spam")

    asyncio.run(main())


def test_an_end_that_cannot_be_recorded_is_noted_on_the_error(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        job = store.submit("train", "spam")
        with pytest.raises(ValueError, match="boom") as caught, store.running(job):
            store.requeue(store.claim_one(store.submit("train", "other"), worker="x"))
            with store.engine.begin() as connection:
                connection.execute(text("DELETE FROM ml_job_leases"))
            raise ValueError("boom")
        assert "was not recorded" in caught.value.__notes__[0]
        assert store.get(job.id).status is MlJobStatus.RUNNING


@pytest.mark.parametrize("driver", ["sqlite", "sqlite+aiosqlite"])
def test_opening_a_file_that_somebody_writes_to_waits_for_the_writer(tmp_path: Path, driver: str) -> None:
    """SQLite's busy timeout does not cover the switch to WAL: it fails at once while a writer holds the file."""
    path = tmp_path / "fresh.db"
    writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    writer.execute("CREATE TABLE host (x)")
    writer.execute("BEGIN IMMEDIATE")
    letting_go = threading.Timer(0.2, writer.execute, ["COMMIT"])
    letting_go.start()

    async def look() -> str:
        async with AsyncJobStore(f"{driver}:///{path}") as store:
            mode: str = await store.run(lambda bind: bind.execute(text("PRAGMA journal_mode")).scalar_one())
            return mode

    if driver == "sqlite":
        with JobStore(f"sqlite:///{path}") as store, store.connect() as bind:
            assert bind.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
    else:
        assert asyncio.run(look()) == "wal"
    letting_go.join()
    writer.close()


def test_opening_a_file_that_is_never_let_go_ends_with_the_timeout(tmp_path: Path) -> None:
    path = tmp_path / "fresh.db"
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("CREATE TABLE host (x)")
    writer.execute("BEGIN IMMEDIATE")
    store = JobStore(f"sqlite:///{path}", connect_args={"timeout": 0.05})
    with store, pytest.raises(OperationalError, match="locked"):
        store.find()
    writer.close()


@pytest.mark.parametrize("turns", [80, 1], ids=["a statement sent again", "an operation run again"])
def test_an_operation_waits_for_a_locked_file_as_long_as_the_timeout_says(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """In turns of a few milliseconds: SQLite's own wait starves beside processes that take the lock again at once."""
    monkeypatch.setattr(_connections, "_TURNS", turns)
    path = sqlite_url.removeprefix("sqlite:///")
    writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    with JobStore(sqlite_url) as store:
        job = store.submit("train", "spam")
        for again in (lambda: store.submit("train", "ham"), lambda: store.cancel(job), lambda: store.claim(worker="w")):
            writer.execute("BEGIN IMMEDIATE")
            letting_go = threading.Timer(0.03, writer.execute, ["COMMIT"])
            letting_go.start()
            assert again()
            letting_go.join()
        assert store.counts().total() == 2
        store._single.close()
        with store.engine.connect() as connection:  # a host's own statements wait as they did
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 30_000
    with JobStore(sqlite_url, connect_args={"timeout": 0.02}) as hasty:
        writer.execute("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="locked"):
            hasty.submit("train", "spam")
        writer.execute("COMMIT")
        assert hasty.counts().total() == 2
    writer.close()


def test_a_store_that_nobody_closes_leaves_the_hosts_connections_as_they_were(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)

    def found() -> tuple[int, dict[Any, Any]]:
        with engine.connect() as connection:
            return connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one(), {**connection.info}

    before = found()
    for _ in range(2):
        JobStore(engine).submit("train", "spam")  # on the one connection that the pool has
        gc.collect()
        assert found() == before
    engine.dispose()


def test_an_awaited_operation_waits_for_a_locked_file_in_the_same_turns(sqlite_url: str) -> None:
    writer = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None, check_same_thread=False)

    async def run() -> None:
        async with AsyncJobStore(sqlite_url) as store:
            job = await store.submit("train", "spam")
            for again in (
                partial(store.cancel, job),
                partial(store.submit, "train", "ham"),
                partial(store.claim, worker="w"),
            ):
                writer.execute("BEGIN IMMEDIATE")
                letting_go = threading.Timer(0.03, writer.execute, ["COMMIT"])
                letting_go.start()
                assert await again()
                letting_go.join()
            await store._single.aclose()
            async with store.engine.connect() as connection:  # a host's own statements wait as they did
                assert (await connection.exec_driver_sql("PRAGMA busy_timeout")).scalar_one() == 30_000
        async with AsyncJobStore(sqlite_url, connect_args={"timeout": 0.02}) as hasty:
            writer.execute("BEGIN IMMEDIATE")
            with pytest.raises(OperationalError, match="locked"):
                await hasty.submit("train", "spam")
            writer.execute("COMMIT")
            assert (await hasty.counts()).total() == 2

    asyncio.run(run())
    writer.close()


def test_a_listener_ends_well_after_its_engine_was_disposed_of(postgres_url: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    with ChangeListener(engine, MlJob.__table__) as listener:
        listener.wait(0)
        engine.dispose()
        listener.wait(0)
    with ChangeListener(engine, MlJob.__table__) as another:
        another.wait(0)
        assert another._connection is not None


def test_an_interrupt_while_a_connection_is_made_ready_leaves_none_in_use(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with JobStore(sqlite_url) as store:
        pool: Any = store.engine.pool
        with monkeypatch.context() as patched:
            patched.setattr(_connections, "_pragma", interrupt)
            with pytest.raises(KeyboardInterrupt) as interrupted:
                store.submit("train", "spam")
        assert pool.checkedout() == 0, interrupted
        store.submit("train", "spam")
