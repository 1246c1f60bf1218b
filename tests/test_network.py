"""A server that says nothing: behind a partition, frozen, or with a proxy between that only swallows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError

from mljobs import JobStore, MlJobStatus, Worker
from mljobs.db._engines import engine_options, new_engine
from mljobs.db._failures import database_is_away
from mljobs.db._timeouts import answer_seconds, answers_within, limit_idle_transaction, obey_timeouts
from mljobs.store._run import Run
from tests.slow.chaos.proxy import Proxy
from tests.waiting import until

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = MlJobStatus


@pytest.fixture
def proxy(postgres_url: str) -> Iterator[Proxy]:
    with Proxy(make_url(postgres_url).port or 5432) as proxy:
        yield proxy


@pytest.fixture
def there(postgres_url: str) -> Iterator[JobStore]:
    """A store with a network of its own."""
    with JobStore(postgres_url) as store:
        yield store


@pytest.fixture
def far(postgres_url: str, proxy: Proxy) -> Iterator[JobStore]:
    """A store behind the proxy."""
    with JobStore(make_url(postgres_url).set(port=proxy.port)) as store:
        yield store


def in_thread(worker: Worker) -> threading.Thread:
    thread = threading.Thread(target=worker.run)
    thread.start()
    return thread


def stop(worker: Worker, thread: threading.Thread) -> None:
    worker.stop()
    thread.join(60)
    assert not thread.is_alive()


def test_a_silent_server_is_given_up_after_the_time_that_was_said(proxy: Proxy, far: JobStore) -> None:
    job = far.submit("train", "spam")
    proxy.stall()
    with pytest.raises(OperationalError, match=r"has not answered within 0\.2 s") as caught, answers_within(0.2):
        far.get(job.id)
    assert database_is_away(caught.value)
    proxy.heal()
    assert far.get(job.id).status is QUEUED


def test_who_says_nothing_waits_as_long_as_it_takes(far: JobStore) -> None:
    with far.engine.connect() as connection, answers_within(0.05):
        with answers_within(None):
            connection.execute(text("SELECT pg_sleep(0.3)"))
        with pytest.raises(OperationalError):
            connection.execute(text("SELECT pg_sleep(60)"))


def test_a_connection_that_was_cut_is_replaced(proxy: Proxy, far: JobStore) -> None:
    job = far.submit("train", "spam")
    assert proxy.cut() > 0
    with pytest.raises(OperationalError) as caught:
        far.get(job.id)
    assert database_is_away(caught.value)
    assert far.get(job.id).status is QUEUED


def test_a_partition_past_the_lease_stops_the_handler_and_the_worker_goes_on_afterwards(
    proxy: Proxy, far: JobStore, there: JobStore
) -> None:
    lonely, other = (Worker(store, lease=2, poll=0.1, name=name) for store, name in ((far, "lonely"), (there, "other")))
    lost = threading.Event()

    @lonely.handles("train")
    def train(run: Run) -> str:
        if run.attempt == 1 and run.job.target_name == "spam":
            proxy.stall()
            try:
                run.sleep(60)
            finally:
                lost.set()
        return "lonely"

    other.handles("train")(lambda run: "other")
    job = there.submit("train", "spam")
    first = in_thread(lonely)
    assert lost.wait(60)
    second = in_thread(other)
    done = there.wait(job.id, timeout=60)
    stop(other, second)
    assert (done.status, done.metrics, done.attempts) == (COMPLETED, "other", 2)
    proxy.heal()
    following = there.submit("train", "ham")
    assert there.wait(following.id, timeout=60).metrics == "lonely"
    stop(lonely, first)
    assert there.get(job.id).to_json() == done.to_json()


def test_a_partition_within_a_transaction_does_not_hold_its_locks_for_ever(
    proxy: Proxy, far: JobStore, there: JobStore
) -> None:
    lonely = Worker(far, lease=2, poll=0.1)

    def backoff(_retry: int) -> float:  # asked for within the transaction that ends the job and submits the next
        proxy.stall()
        return 0

    @lonely.handles("train", retries=1, backoff=backoff)
    def train(run: Run) -> None:
        raise ValueError("this time")

    job = there.submit("train", "spam")
    first = in_thread(lonely)
    until(lambda: there.get(job.id).status is RUNNING)
    other = Worker(there, lease=2, poll=0.1)
    other.handles("train")(lambda run: "other")
    second = in_thread(other)
    done = there.wait(job.id, timeout=60)
    stop(other, second)
    proxy.heal()
    stop(lonely, first)
    assert (done.status, done.metrics, done.attempts) == (COMPLETED, "other", 2)
    assert [job.id for job in there.find()] == [job.id]


def test_a_transaction_that_falls_silent_is_ended_by_the_server(there: JobStore) -> None:
    job = there.submit("train", "spam")
    with there.engine.connect() as connection:
        with connection.begin():
            limit_idle_transaction(connection, 60)
        with pytest.raises(DBAPIError) as caught, connection.begin():
            limit_idle_transaction(connection, 0.05)
            connection.execute(text("UPDATE ml_jobs SET priority = 1"))
            assert there.cancel(job.id)  # waits for the lock until the server takes it away
            connection.execute(text("SELECT 1"))
        assert database_is_away(caught.value)


@pytest.mark.parametrize(("lease", "seconds"), [(0.5, 1), (8, 4), (60, 30), (3600, 30)])
def test_who_holds_leases_waits_for_half_of_one(lease: float, seconds: float) -> None:
    assert answer_seconds(lease) == seconds


def options(url: str, **given: Any) -> dict[str, Any]:
    connect_args: dict[str, Any] = engine_options(make_url(url), given, autocommit=False).get("connect_args", {})
    return connect_args


def test_what_the_url_says_comes_before_our_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGCONNECT_TIMEOUT", raising=False)
    plain = options("postgresql+psycopg://h/x")
    assert plain["connect_timeout"] == 10
    assert plain["tcp_user_timeout"] == 30_000
    said = options("postgresql+psycopg://h/x?connect_timeout=3&keepalives_idle=5")
    assert "connect_timeout" not in said
    assert "keepalives_idle" not in said
    assert said["keepalives_interval"] == 10
    given = {"tcp_user_timeout": 5, "application_name": "app"}
    assert options("postgresql+psycopg://h/x", connect_args=given) == {**plain, **given}
    assert given == {"tcp_user_timeout": 5, "application_name": "app"}
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "7")
    assert "connect_timeout" not in options("postgresql+psycopg://h/x")
    assert options("postgresql+asyncpg://h/x") == {}
    assert set(options("sqlite:///x.db")) == {"timeout"}


def test_the_settings_reach_the_connection(postgres_url: str) -> None:
    engine = new_engine(f"{postgres_url}?keepalives_idle=11")
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        said = {option.keyword: option.val for option in driver.pgconn.info}
    engine.dispose()
    assert (said[b"keepalives_idle"], said[b"tcp_user_timeout"]) == (b"11", b"30000")


def test_other_engines_are_left_alone(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    obey_timeouts(engine)
    with engine.connect() as connection, answers_within(0.1):
        limit_idle_transaction(connection, 1)
        assert connection.scalar(text("SELECT 1")) == 1
    engine.dispose()
