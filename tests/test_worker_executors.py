"""Workers: handlers in threads, on event loops and in processes."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy.orm import Session

from mljobs import (
    AsyncJobStore,
    InvalidValueError,
    JobStore,
    MlJob,
    MlJobStatus,
)
from mljobs.store._run import Run
from mljobs.worker._remote import RemoteResult
from tests import worker_app
from tests.backends import Backend
from tests.leases import count_leases
from tests.waiting import until
from tests.workers import ended, worker_of

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = MlJobStatus


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as store:
        yield store


# ---------------------------------------------------------------------------------------------------- where handlers run


def test_async_handlers_run_on_one_loop_many_at_a_time(store: JobStore) -> None:
    worker = worker_of(store, concurrency=5)
    loops: set[int] = set()
    threads: set[int] = set()
    waiting = 0
    all_there: asyncio.Event | None = None

    @worker.handles("train")
    async def train(run: Run) -> dict[str, int]:
        nonlocal waiting, all_there
        all_there = all_there or asyncio.Event()
        loops.add(id(asyncio.get_running_loop()))
        threads.add(threading.get_ident())
        waiting += 1
        if waiting == 5:
            all_there.set()
        await asyncio.wait_for(all_there.wait(), 60)
        return {"n": run.spec["n"]}

    store.submit_many([("train", "spam", {"n": number}) for number in range(5)])
    tally = worker.run(until_idle=True)
    assert tally.jobs == {"completed": 5}
    assert (len(loops), len(threads)) == (1, 1)
    assert sorted(job.metrics["n"] for job in store.find()) == [0, 1, 2, 3, 4]


def test_plain_and_async_handlers_live_in_one_worker(store: JobStore) -> None:
    worker = worker_of(store, concurrency=3)

    @worker.handles("train")
    async def train(run: Run) -> str:
        await asyncio.sleep(0)
        raise ValueError("async")

    worker.handles("backfill")(lambda run: "plain")
    for number in range(6):
        store.submit(("train", "backfill")[number % 2], "spam")
    assert worker.run(until_idle=True).jobs == {"completed": 3, "failed": 3}


def test_a_worker_runs_on_the_loop_of_an_application(backend: Backend) -> None:
    url = backend.url

    async def main() -> Any:
        there = asyncio.get_running_loop()
        source: Any = AsyncJobStore(url) if backend.is_async else JobStore(url)
        worker = worker_of(source, concurrency=2)

        @worker.handles("train")
        async def train(run: Run) -> bool:
            return asyncio.get_running_loop() is there

        with Session(backend.outside) as session, session.begin():
            session.add_all([MlJob(kind="train", target_name=f"t{n}") for n in range(4)])
        tally = await worker.run_async(until_idle=True)
        closing = source.close()
        if closing is not None:
            await closing
        worker.close()
        return tally

    assert asyncio.run(main()).jobs == {"completed": 4}
    with JobStore(str(backend.outside.url.render_as_string(hide_password=False))) as store:
        assert [job.metrics for job in store.find()] == [True] * 4


def test_cancelling_the_task_stops_the_worker_well(store: JobStore) -> None:
    worker = worker_of(store, grace=20)
    job = store.submit("train", "spam")

    async def main() -> None:
        begun, go = asyncio.Event(), asyncio.Event()

        @worker.handles("train")
        async def train(run: Run) -> str:
            begun.set()
            await go.wait()
            return "finished"

        task = asyncio.create_task(worker.run_async())
        await begun.wait()
        task.cancel()
        asyncio.get_running_loop().call_later(0.2, go.set)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert ended(store, job).metrics == "finished"


@pytest.mark.parametrize(("max_attempts", "status"), [(5, QUEUED), (1, FAILED)])
def test_an_async_handler_whose_loop_ends_is_put_back(store: JobStore, max_attempts: int, status: MlJobStatus) -> None:
    worker = worker_of(store, max_attempts=max_attempts)
    job = store.submit("train", "spam")

    async def main() -> None:
        begun = asyncio.Event()

        @worker.handles("train")
        async def train(run: Run) -> None:
            begun.set()
            await asyncio.Event().wait()

        tasks.append(asyncio.create_task(worker.run_async()))
        await begun.wait()  # and return: the loop cancels every task that is left

    tasks: list[Any] = []
    asyncio.run(main())
    assert tasks[0].cancelled()
    assert ended(store, job).status is status
    assert count_leases(store.engine) == 0


def test_cancelling_the_task_again_stops_at_once_and_still_waits_for_the_worker(store: JobStore) -> None:
    worker = worker_of(store, grace=3600)
    begun, go = threading.Event(), threading.Event()

    @worker.handles("train")
    def train(run: Run) -> None:
        begun.set()
        go.wait(60)

    job = store.submit("train", "spam")

    async def main() -> None:
        task = asyncio.create_task(worker.run_async())
        await asyncio.to_thread(begun.wait, 60)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended(store, job).status is QUEUED
        assert worker.abandoned == 1

    try:
        asyncio.run(main())
    finally:
        go.set()


def test_async_handlers_that_do_not_end_in_time_are_cancelled_and_put_back(store: JobStore) -> None:
    worker = worker_of(store, grace=0.1)
    begun, cancelled = threading.Event(), threading.Event()

    @worker.handles("train")
    async def train(run: Run) -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    job = store.submit("train", "spam")
    thread = threading.Thread(target=worker.run)
    thread.start()
    begun.wait(60)
    worker.stop()
    thread.join(60)
    assert cancelled.wait(60)
    assert ended(store, job).status is QUEUED


def test_a_thread_pool_is_an_executor_like_any_other(store: JobStore) -> None:
    names: set[str] = set()
    with ThreadPoolExecutor(2, thread_name_prefix="mine") as executor:
        worker = worker_of(store, concurrency=2, executor=executor)

        @worker.handles("train")
        def train(run: Run) -> int:
            names.add(threading.current_thread().name.partition("_")[0])
            return run.spec["n"] * 2

        store.submit_many([("train", "spam", {"n": number}) for number in range(5)])
        assert worker.run(until_idle=True).jobs == {"completed": 5}
    assert names == {"mine"}
    assert sorted(job.metrics for job in store.find()) == [0, 2, 4, 6, 8]


def test_processes_give_back_metrics_failures_and_what_json_cannot_hold(store: JobStore) -> None:
    with worker_app.pool() as executor:
        worker = worker_of(store, executor=executor)
        worker.handles("train")(worker_app.squares)
        worker.handles("backfill")(worker_app.raises)
        worker.handles("drift_compute")(worker_app.returns_a_set)
        good = store.submit("train", "spam", {"n": 1})
        bad = store.submit("backfill", "spam", {"n": 2})
        odd = store.submit("drift_compute", "spam")
        worker.run(until_idle=True)
    good, bad, odd = (ended(store, job) for job in (good, bad, odd))
    assert (good.status, good.metrics["spec"]) == (COMPLETED, {"n": 1})
    assert good.metrics["process"] != os.getpid()
    assert bad.status is FAILED
    assert "Local: spec {'n': 2}" in str(bad.error_message)
    assert "worker_app.py" in str(bad.error_message)
    assert odd.status is FAILED
    assert "metrics" in str(odd.error_message)


def test_a_handler_that_no_process_can_be_sent_is_refused_before_the_first_claim(store: JobStore) -> None:
    with worker_app.pool() as executor:
        worker = worker_of(store, executor=executor)
        worker.handles("train")(lambda run: None)
        job = store.submit("train", "spam")
        with pytest.raises(InvalidValueError, match="functions of a module") as caught:
            worker.run(until_idle=True)
    assert caught.value.field == "handler"
    assert (ended(store, job).status, ended(store, job).attempts) == (QUEUED, 0)


def test_progress_and_cancels_cross_the_border_of_a_process(store: JobStore) -> None:
    with worker_app.pool() as executor:
        worker = worker_of(store, executor=executor)
        worker.handles("train")(worker_app.until_cancelled)
        job = store.submit("train", "spam")
        thread = threading.Thread(target=worker.run, kwargs={"until_idle": True})
        thread.start()
        until(lambda: ended(store, job).progress == 10)
        store.cancel(job.id)
        thread.join(60)
        assert not thread.is_alive()
    assert ended(store, job).status is CANCELLED
    assert count_leases(store.engine) == 0


def test_a_broken_executor_costs_a_job_one_attempt_and_no_more(store: JobStore) -> None:
    class Broken(ThreadPoolExecutor):
        def submit(self, *args: Any, **kw: Any) -> Any:
            raise BrokenExecutor("all processes are gone")

    with Broken() as executor:
        for attempts in range(1, 4):
            worker = worker_of(store, executor=executor, concurrency=3)
            worker.handles("train")(lambda run: None)
            job = next(iter(store.find()), None) or store.submit("train", "spam")
            with pytest.raises(BrokenExecutor):
                worker.run(until_idle=True)
            job = ended(store, job)
            assert (job.status, job.attempts) == (QUEUED, attempts)


def test_a_process_that_gave_up_a_lease_that_is_ours_does_not_lose_the_job(store: JobStore) -> None:
    class Cut(Executor):  # its process could not reach the database for as long as a lease; the worker could
        def submit(self, *_args: Any, **_kw: Any) -> Any:
            future: Future[Any] = Future()
            future.set_result(RemoteResult(None))
            return future

    worker = worker_of(store, executor=Cut(), max_attempts=2)
    worker.handles("train")(lambda run: None)
    job = store.submit("train", "spam")
    assert worker.run(until_idle=True).jobs == {"requeued": 1, "failed": 1}
    job = ended(store, job)
    assert (job.status, job.attempts) == (FAILED, 2)
    assert "gave up after 2 attempts" in str(job.error_message)
    assert count_leases(store.engine) == 0
