"""Watches that are interrupted, cancelled, shared, closed, or whose database goes away; async stores on several loops."""

from __future__ import annotations

import asyncio
import gc
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import NullPool

from mljobs import AsyncJobStore, JobStore, MlJob, WaitTimeout
from mljobs.db._failures import database_is_away
from mljobs.db._wake import ChangeListener
from mljobs.store import _followers
from mljobs.store._followers import Follower
from mljobs.store._following import Read
from tests.backends import DRIVERS
from tests.waiting import until

AWAITED = {
    "sqlite": "sqlite+aiosqlite",
    "asyncpg": DRIVERS["postgresql-asyncpg"],
    "psycopg": DRIVERS["postgresql-psycopg-async"],
}


def test_a_watch_begins_when_it_is_made_and_an_awaited_one_where_it_is_entered(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        store.submit("train", "before")
        with store.watch(poll=0.001, timeout=0.002) as watch:
            store.submit("train", "between")
            assert [job.target_name for job in watch] == ["between"]

    async def check() -> None:
        async with AsyncJobStore(sqlite_url) as store, store.watch(poll=0.001, timeout=0.002) as watch:
            await store.submit("train", "between")
            assert [job.target_name async for job in watch] == ["between"]

    asyncio.run(check())


def test_a_watch_that_was_interrupted_goes_on_and_misses_nothing(sqlite_url: str) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with JobStore(sqlite_url) as store, store.watch(poll=60) as watch:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            with pytest.raises(KeyboardInterrupt):
                next(watch)
            store.submit("train", "spam")
            watch._listener.wake()
            assert next(watch).target_name == "spam"
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("driver", ["sqlite", "psycopg"])
def test_a_watch_that_is_cancelled_anywhere_goes_on_and_yields_each_job_once(
    request: pytest.FixtureRequest, driver: str
) -> None:
    url = request.getfixturevalue("sqlite_url" if driver == "sqlite" else "postgres_url")
    _, _, rest = url.partition(":")
    numbers = range(24) if driver == "sqlite" else range(0, 24, 4)

    async def check() -> None:
        seen = []
        async with AsyncJobStore(f"{AWAITED[driver]}:{rest}") as store, store.watch(poll=0) as watch:
            for number in numbers:
                await store.submit("train", str(number))
                asking = asyncio.ensure_future(anext(watch))
                for _ in range(number):
                    await asyncio.sleep(0)
                asking.cancel()
                await asyncio.wait([asking])
                if not asking.cancelled():
                    seen.append(asking.result().target_name)
            while len(seen) < len(numbers):
                seen.append((await asyncio.wait_for(anext(watch), 60)).target_name)
        assert seen == [str(number) for number in numbers]

    asyncio.run(check())


def test_threads_share_a_watch_and_another_one_closes_it(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store, ThreadPoolExecutor() as pool:
        watch = store.watch(poll=0.001)
        asking = [pool.submit(next, watch) for _ in range(2)]
        for name in ("a", "b"):
            store.submit("train", name)
        assert sorted(one.result(60).target_name for one in asking) == ["a", "b"]
        watch = store.watch(poll=300)
        ended = [pool.submit(list, watch) for _ in range(2)]
        until(lambda: all(one.running() for one in ended))
        watch.close()
        assert [one.result(60) for one in ended] == [[], []]

    async def check() -> None:
        async with AsyncJobStore(sqlite_url) as store:
            watch = store.watch(poll=300)
            asking = [asyncio.ensure_future(anext(watch, None)) for _ in range(2)]
            await asyncio.sleep(0)
            await asyncio.wait_for(watch.aclose(), 60)
            assert await asyncio.gather(*asking) == [None, None]

    asyncio.run(check())


def test_a_handler_of_signals_closes_the_store_that_its_own_thread_watches(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        before = signal.signal(signal.SIGALRM, lambda *_: store.close())
        try:
            watch = store.watch(poll=60)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            assert list(watch) == []
        finally:
            signal.signal(signal.SIGALRM, before)


@contextmanager
def _outages(monkeypatch: pytest.MonkeyPatch, *, answers_at_first: bool = True) -> Iterator[Any]:
    """Yield what follows an answer, errors as many as are wanted, and another answer."""
    monkeypatch.setattr(_followers, "_FIRST_PAUSE", 0)
    engine = create_engine("sqlite://")
    errors: list[BaseException] = []

    def read(_: Read) -> str:
        if errors:
            raise errors.pop()
        return "answer"

    def steps() -> Any:
        if answers_at_first:
            yield (yield Read(lambda _: None))
        yield (yield Read(lambda _: None))

    def follow(*failing: BaseException, timeout: float | None = None) -> Any:
        follower: Follower[Any] = Follower(steps(), read, ChangeListener(engine, MlJob.__table__), timeout)
        if answers_at_first:
            assert next(follower) == "answer"
        errors[:] = failing
        return closing(follower)

    yield follow
    engine.dispose()


def _away() -> OperationalError:
    return OperationalError("SELECT 1", {}, ConnectionError("the server is starting up"))


def test_a_database_that_is_away_is_waited_for_once_it_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    with _outages(monkeypatch) as follow:
        with follow(_away(), OSError(), _away()) as follower:
            assert list(follower) == ["answer"]
        with follow(ValueError("a mistake")) as follower, pytest.raises(ValueError, match="mistake"):
            next(follower)
        with follow(_away(), timeout=0) as follower, pytest.raises(OperationalError):
            next(follower)
        monkeypatch.setattr(_followers, "_AWAY_SECONDS", 0)
        with follow(_away(), _away()) as follower:
            for _ in range(2):
                with pytest.raises(OperationalError):
                    next(follower)
            assert list(follower) == ["answer"]
    with (
        _outages(monkeypatch, answers_at_first=False) as follow,
        follow(_away()) as follower,
        pytest.raises(OperationalError),
    ):
        next(follower)


def test_a_server_that_is_starting_up_is_away_to_every_driver(postgres_url: str) -> None:
    starting = "DO $$ BEGIN RAISE SQLSTATE '57P03'; END $$"
    with JobStore(postgres_url) as store, pytest.raises(DBAPIError) as blocking, store.connect() as connection:
        connection.exec_driver_sql(starting)

    async def check(driver: str) -> None:
        async with AsyncJobStore(postgres_url.replace("postgresql+psycopg", driver)) as store:
            with pytest.raises(DBAPIError) as awaited:
                await store.run(lambda bind: bind.exec_driver_sql(starting))
            assert database_is_away(awaited.value)

    assert database_is_away(blocking.value)
    for driver in (AWAITED["asyncpg"], AWAITED["psycopg"]):
        asyncio.run(check(driver))


def test_watches_and_waits_outlive_the_loss_of_all_connections(postgres_url: str) -> None:
    admin = create_engine(postgres_url, poolclass=NullPool, isolation_level="AUTOCOMMIT")

    def lose() -> None:
        with admin.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            ).all()

    with JobStore(postgres_url) as store, JobStore(admin) as other:
        watch = store.watch(poll=0.01)
        lose()
        job = other.submit("train", "spam")
        assert next(watch).target_name == "spam"
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(store.wait, job, poll=0.001)
            until(lambda: len(store._followers) == 2)
            lose()
            other.cancel(job)
            assert waiting.result(60).is_terminal

        async def check(driver: str) -> None:
            url = postgres_url.replace("postgresql+psycopg", driver)
            async with AsyncJobStore(url) as awaited, awaited.watch(poll=0.01) as watch:
                lose()
                other.submit("train", "eggs")
                assert (await asyncio.wait_for(anext(watch), 60)).target_name == "eggs"

        for driver in (AWAITED["asyncpg"], AWAITED["psycopg"]):
            asyncio.run(check(driver))
    admin.dispose()


@pytest.mark.parametrize("driver", AWAITED)
def test_a_store_is_used_on_one_loop_after_another(request: pytest.FixtureRequest, driver: str) -> None:
    url = request.getfixturevalue("sqlite_url" if driver == "sqlite" else "postgres_url")
    _, _, rest = url.partition(":")
    pool = {} if driver == "sqlite" else {"pool_size": 3, "max_overflow": 0}
    store = AsyncJobStore(f"{AWAITED[driver]}:{rest}", **pool)
    watch = store.watch(poll=0)

    async def use(name: str) -> Any:
        asking = asyncio.ensure_future(anext(watch))
        while not watch._begun:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)
        await asyncio.gather(*(store.submit("train", name) for _ in range(6)))
        await store.submit_many([("train", name, None)])
        with pytest.raises(WaitTimeout):
            await store.wait(await store.submit("train", name), timeout=0)
        seen = [await asyncio.wait_for(asking, 60)]
        while len(seen) < 8:
            seen.append(await anext(watch))
        assert {job.target_name for job in seen} == {name}

    async def close() -> None:
        await asyncio.wait_for(store.close(), 60)
        assert [job async for job in watch] == []

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of connections whose loop ended before they were closed
        asyncio.run(use("first"))
        asyncio.run(use("second"))
        asyncio.run(close())
        gc.collect()
