"""Workers that can be seen: a row for each, what it holds, and what becomes of it when the worker ends or falls silent."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

import mljobs
from mljobs import AsyncJobStore, InvalidValueError, JobStore, MlJob, MlJobStatus, Worker, jobs
from mljobs._values import utc_now
from mljobs.cli._work import load_worker
from mljobs.jobs import WorkerInfo, WorkerState
from mljobs.jobs._workers import SILENT_AFTER, register_worker, update_worker
from mljobs.store._keeper import Keeper
from mljobs.store._run import Run
from tests.backends import Backend
from tests.waiting import until

RUNNING, STOPPING, GONE = WorkerState
WORKERS = MlJob.__workers__


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as store:
        yield store


def worker_of(store: Any, **options: Any) -> Worker:
    return Worker(store, **{"poll": 0.05, "grace": 20, "name": "w", **options})


def info(name: str = "w") -> WorkerInfo:
    now = utc_now()
    return WorkerInfo(name, "host", 7, ("train", "backfill"), 4, "1.0", now, now)


def register(store: JobStore, name: str = "w") -> WorkerInfo:
    with store.connect() as bind:
        return register_worker(bind, info(name))


def age(store: JobStore, name: str, span: timedelta) -> None:
    """Let a worker have fallen silent."""
    with store.engine.begin() as connection:
        connection.execute(sa.update(WORKERS).where(WORKERS.c.name == name).values(last_seen_at=utc_now() - span))


def test_a_worker_is_seen_with_all_that_it_holds_while_it_runs_and_as_gone_after(store: JobStore, url: str) -> None:
    worker, begun, go = worker_of(store, concurrency=2), threading.Semaphore(0), threading.Event()

    @worker.handles("train")
    def train(_run: Run) -> None:
        begun.release()
        assert go.wait(60)

    ids = [store.submit("train", "spam").id for _ in range(2)]
    thread = threading.Thread(target=worker.run, kwargs={"until_idle": True})
    thread.start()
    for _ in ids:
        assert begun.acquire(timeout=60)
    (seen,) = store.workers()

    async def ask() -> list[WorkerInfo]:
        async with AsyncJobStore(url) as other:
            return await other.workers()

    assert asyncio.run(ask()) == [seen]
    go.set()
    thread.join(60)
    assert (seen.name, seen.kinds, seen.concurrency, seen.state) == ("w", ("train",), 2, RUNNING)
    assert set(seen.jobs) == set(ids)
    assert seen.version == mljobs.__version__
    assert store.workers() == []
    (gone,) = store.workers(gone=True)
    assert (gone.name, gone.state, gone.jobs) == ("w", GONE, ())


def test_a_worker_that_lets_its_last_job_end_is_stopping(store: JobStore) -> None:
    worker, begun, go = worker_of(store, lease=0.3), threading.Event(), threading.Event()

    @worker.handles("train")
    def train(_run: Run) -> None:
        begun.set()
        assert go.wait(60)

    store.submit("train", "spam")
    thread = threading.Thread(target=worker.run)
    thread.start()
    assert begun.wait(60)
    worker.stop()
    until(lambda: [seen.state for seen in store.workers()] == [STOPPING])
    go.set()
    thread.join(60)
    assert store.workers() == []


def test_an_idle_worker_stays_seen(store: JobStore) -> None:
    worker = worker_of(store, lease=0.3)
    worker.handles("train")(lambda _run: None)
    thread = threading.Thread(target=worker.run)
    thread.start()
    until(lambda: bool(store.workers()))
    first = store.workers()[0].last_seen_at
    until(lambda: store.workers()[0].last_seen_at > first)
    worker.stop()
    thread.join(60)


def test_names_are_unique_among_the_living_and_used_again_after(
    store: JobStore, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = register(store), register(store)
    assert (first.name, second.name) == ("w", "w-2")
    worker = worker_of(store)
    names: list[str] = []
    worker.handles("train")(lambda run: names.append(run.claim.worker))
    job = store.submit("train", "spam")
    with caplog.at_level(logging.WARNING, "mljobs.worker"):
        worker.run(until_idle=True)
    assert names == ["w-3"] == [store.get(job.id).worker]
    assert "another worker is named w: this one is w-3" in caplog.text
    with store.connect() as bind:
        assert update_worker(bind, first, GONE)
    assert register(store).name == "w"
    age(store, "w-2", SILENT_AFTER + timedelta(seconds=5))
    assert [seen.name for seen in store.workers()] == ["w"]
    assert register(store).name == "w-2"


def test_a_row_that_another_took_is_not_written_by_the_first(store: JobStore) -> None:
    first = register(store)
    age(store, "w", SILENT_AFTER + timedelta(seconds=5))
    with store.engine.begin() as connection:
        connection.execute(sa.update(WORKERS).values(started_at=utc_now() - timedelta(hours=1)))
    second = replace(first, started_at=store.workers(gone=True)[0].started_at)
    with store.connect() as bind:
        assert not update_worker(bind, first)
        assert update_worker(bind, second)


def test_rows_go_by_themselves_when_their_workers_are_gone_for_a_day(store: JobStore) -> None:
    register(store, "old")
    register(store, "recent")
    age(store, "old", timedelta(days=1, seconds=5))
    age(store, "recent", timedelta(hours=23))
    register(store, "new")
    assert {seen.name for seen in store.workers(gone=True)} == {"recent", "new"}


def test_a_keeper_calls_once_for_each_renewal_with_leases_and_without(engine: sa.Engine) -> None:
    calls: list[int] = []
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    with JobStore(engine) as store:  # its engines have the listeners that this one has by now
        seen = register(store)

        def renew() -> None:
            statements.clear()
            with store.connect(atomic=False) as bind:
                update_worker(bind, seen)
            calls.append(sum("ml_job_workers" in statement for statement in statements))

        with Keeper(store, 60, every=0.01, on_renewal=renew) as keeper:
            keeper.start()
            until(lambda: len(calls) >= 3)
            store.submit("train", "spam")
            keeper.add(Run(store.claim(worker="w")[0]))
            number = len(calls)
            until(lambda: len(calls) >= number + 3)
    assert set(calls) == {1}


def test_without_the_table_workers_run_as_before_and_none_is_seen(store: JobStore) -> None:
    with store.engine.begin() as connection:
        connection.exec_driver_sql("DROP VIEW ml_jobs_overview")  # which a database without the table has without it
        connection.exec_driver_sql("DROP TABLE ml_job_workers")
    worker = worker_of(store)
    worker.handles("train")(lambda _run: 1)
    job = store.submit("train", "spam")
    assert worker.run(until_idle=True).jobs == {"completed": 1}
    assert (store.get(job.id).worker, store.get(job.id).status) == ("w", MlJobStatus.COMPLETED)
    assert store.workers() == []


def test_a_row_that_is_removed_while_its_worker_runs_is_made_again(store: JobStore) -> None:
    worker = worker_of(store, lease=0.3)
    worker.handles("train")(lambda _run: None)
    thread = threading.Thread(target=worker.run)
    thread.start()
    until(lambda: bool(store.workers()))
    with store.engine.begin() as connection:
        connection.execute(sa.delete(WORKERS))
    until(lambda: bool(store.workers()))
    worker.stop()
    thread.join(60)


def test_workers_are_seen_in_a_session_too(backend: Backend) -> None:
    store = backend.store()
    assert store.workers() == []
    with sa.orm.Session(backend.outside) as session, session.begin():
        register_worker(session, info())
        (seen,) = jobs.workers(session)
    assert store.workers() == [seen]
    assert (seen.host, seen.pid, seen.kinds, seen.concurrency) == ("host", 7, ("train", "backfill"), 4)


def made_by_function() -> Worker:
    worker = worker_of(JobStore("sqlite:///nowhere.db"))
    worker.handles("train")(lambda _run: None)
    return worker


def test_the_command_takes_a_function_that_makes_a_worker() -> None:
    assert load_worker("tests.test_workers_seen:made_by_function").name == "w"
    with pytest.raises(InvalidValueError, match="info is a WorkerInfo, not a Worker"):
        load_worker("tests.test_workers_seen:info")
