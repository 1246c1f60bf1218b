"""Progress and metrics of running jobs: what is reported, when it is written, and what becomes of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from mljobs import InvalidValueError, JobCancelled, JobStore, LeaseLostError, MlJobStatus, TerminalStateError, Worker
from mljobs.jobs import Claim
from mljobs.store._keeper import Keeper
from mljobs.store._run import Run
from tests import worker_app
from tests.backends import Backend
from tests.waiting import until

_, RUNNING, COMPLETED, FAILED, CANCELLED = MlJobStatus


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as store:
        yield store


def claimed(store: Any, number: int = 1) -> list[Claim]:
    for _ in range(number):
        store.submit("train", "spam")
    claims: list[Claim] = store.claim(worker="w", limit=number)
    return claims


def worker_of(store: Any, **options: Any) -> Worker:
    return Worker(store, **{"poll": 0.05, "grace": 20, **options})


# ---------------------------------------------------------------------------------------------------- the operation


def test_progress_and_metrics_are_recorded_under_the_lease_and_each_alone_keeps_the_other(backend: Backend) -> None:
    store = backend.store()
    job = store.submit("train", "spam")
    (claim,) = store.claim(worker="w")
    store.report(claim, progress=10, metrics={"loss": 0.5})
    store.report(claim, progress=20)
    assert (store.get(job.id).progress, store.get(job.id).metrics) == (20, {"loss": 0.5})
    store.report(claim, metrics={"loss": 0.4})
    assert (store.get(job.id).progress, store.get(job.id).metrics) == (20, {"loss": 0.4})
    store.complete(claim)
    assert store.get(job.id).metrics == {"loss": 0.4}
    with pytest.raises(LeaseLostError):
        store.report(claim, metrics={"loss": 0.1})
    assert store.get(job.id).metrics == {"loss": 0.4}


def test_a_report_of_a_cancelled_job_is_refused_and_nothing_is_written(backend: Backend) -> None:
    store = backend.store()
    job = store.submit("train", "spam")
    (claim,) = store.claim(worker="w")
    store.report(claim, metrics={"loss": 0.5})
    store.cancel(job.id)
    with pytest.raises(TerminalStateError):
        store.report(claim, metrics={"loss": 0.1})
    with pytest.raises(InvalidValueError):
        store.report(claim, metrics={"loss": float("nan")})
    assert (store.get(job.id).status, store.get(job.id).metrics) == (CANCELLED, {"loss": 0.5})


# ------------------------------------------------------------------------------------------- when a keeper writes it


class Watched:
    """A store that counts its writes, and whose database goes away when the test says so."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self.away = False
        self.writes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def report_many(self, reports: Any) -> list[Any]:
        if self.away:
            raise OperationalError("UPDATE", None, Exception("the server went away"))
        given = list(reports)
        self.writes.append(len(given))
        return self.store.report_many(given)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def kept(store: Any, clock: Clock, number: int = 1) -> tuple[Keeper, list[Run]]:
    """Return a keeper without its thread: the test says when."""
    keeper = Keeper(store, 3600, clock)
    runs = [Run(claim) for claim in claimed(store, number)]
    keeper._runs.update(runs)
    return keeper, runs


def test_reports_of_all_jobs_are_one_write_a_second_with_the_progress(store: JobStore) -> None:
    watched, clock = Watched(store), Clock()
    keeper, runs = kept(watched, clock, 3)
    for epoch in range(50):
        for number, run in enumerate(runs):
            run.report(loss=1 / (epoch + 1), epoch=epoch)
            run.progress(epoch)
            if number:
                run.report(own=number)
        keeper.write_reports()
    assert watched.writes == [3]
    clock.now += 1
    keeper.write_reports()
    assert watched.writes == [3, 3]
    shown = [store.get(run.job.id) for run in runs]
    assert [job.metrics for job in shown] == [
        {"loss": 0.02, "epoch": 49},
        {"loss": 0.02, "epoch": 49, "own": 1},
        {"loss": 0.02, "epoch": 49, "own": 2},
    ]
    assert {(job.status, job.progress) for job in shown} == {(RUNNING, 49)}
    keeper.write_reports()
    clock.now += 5
    keeper.write_reports()
    assert watched.writes == [3, 3]  # nothing new


def test_the_last_report_outlives_a_database_that_is_away(store: JobStore) -> None:
    watched, clock = Watched(store), Clock()
    keeper, (run,) = kept(watched, clock)
    run.report(loss=0.3)
    watched.away = True
    keeper.write_reports()
    run.report(loss=0.2)
    clock.now += 1
    keeper.write_reports()
    watched.away = False
    keeper.write_reports(run)
    assert store.get(run.job.id).metrics == {"loss": 0.2}


def test_a_lost_lease_writes_nothing_and_the_next_report_says_so(store: JobStore) -> None:
    keeper, (run,) = kept(store, Clock())
    run.report(loss=0.3)
    store.requeue(run.claim)
    (other,) = store.claim(worker="other")
    store.report(other, metrics={"loss": 0.9})
    keeper.write_reports()
    assert store.get(run.job.id).metrics == {"loss": 0.9}
    with pytest.raises(LeaseLostError):
        run.report(loss=0.1)


def test_a_cancel_ends_reporting(store: JobStore) -> None:
    keeper, (run,) = kept(store, Clock())
    run.report(loss=0.3)
    store.cancel(run.job.id)
    keeper.write_reports()
    with pytest.raises(JobCancelled):
        run.report(loss=0.1)
    assert store.get(run.job.id).metrics is None


def test_a_value_that_json_cannot_hold_is_named_by_its_path_and_the_rest_stays_as_it_was(store: JobStore) -> None:
    (claim,) = claimed(store)
    run = Run(claim)
    run.report(loss=0.3)
    with pytest.raises(InvalidValueError) as caught:
        run.report(loss=0.2, by_class={"ham": 0.1, "spam": [1.0, float("inf")]})
    assert caught.value.field == "metrics.by_class.spam[1]"
    assert run.metrics == {"loss": 0.3}
    run.metrics = [1, 2]
    with pytest.raises(InvalidValueError, match="dict"):
        run.report(loss=0.1)


def test_the_metrics_of_a_run_are_a_dict_to_begin_with_and_none_are_recorded_where_none_are_set(
    store: JobStore,
) -> None:
    (first, second, third) = claimed(store, 3)
    assert Run(first).measured is None
    run = Run(second)
    assert run.metrics == {}
    assert run.measured is None
    run.metrics["auc"] = 0.9
    assert run.measured == {"auc": 0.9}
    run = Run(third)
    run.metrics = {}
    assert run.measured == {}


def test_threads_may_report_at_once(store: JobStore) -> None:
    keeper, (run,) = kept(store, Clock())

    def report(name: str) -> None:
        for value in range(500):
            run.report(**{f"{name}{value % 50}": value})

    threads = [threading.Thread(target=report, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        keeper.write_reports(run)
    keeper.write_reports(run)
    expected = {f"{name}{value}": 450 + value for name in "abcd" for value in range(50)}
    assert store.get(run.job.id).metrics == expected


# ------------------------------------------------------------------------------------------------------- of handlers


def test_the_record_of_a_running_job_shows_what_its_handler_has_reported(store: JobStore) -> None:
    worker, seen = worker_of(store), threading.Event()

    @worker.handles("train")
    def train(run: Run) -> dict[str, float]:
        for epoch in run.track(range(4), report=lambda epoch: {"epoch": epoch, "loss": 1 / (epoch + 1)}):
            if epoch == 2:
                assert seen.wait(60)
        return {"auc": 0.9}

    job = store.submit("train", "spam")
    thread = threading.Thread(target=worker.run, kwargs={"until_idle": True})
    thread.start()
    until(lambda: store.get(job.id).metrics is not None)
    shown = store.get(job.id)
    seen.set()
    thread.join(60)
    assert (shown.status, shown.progress, shown.metrics) == (RUNNING, 50, {"epoch": 1, "loss": 0.5})
    assert store.get(job.id).metrics == {"epoch": 3, "loss": 0.25, "auc": 0.9}


def test_a_coroutine_reports_as_a_function_does(store: JobStore) -> None:
    worker = worker_of(store)

    async def batches() -> AsyncIterator[int]:
        for number in range(3):
            yield number

    @worker.handles("train")
    async def train(run: Run) -> None:
        async for number in run.track(batches(), total=3, report=lambda number: {"batch": number} if number else None):
            if number == 2:
                await asyncio.to_thread(until, lambda: store.get(run.job.id).metrics is not None)

    job = store.submit("train", "spam")
    assert worker.run(until_idle=True).jobs == {"completed": 1}
    assert store.get(job.id).metrics == {"batch": 2}


def test_a_failed_job_keeps_what_was_measured(store: JobStore) -> None:
    worker = worker_of(store)

    @worker.handles("train")
    def train(run: Run) -> None:
        run.report(loss=0.3, epoch=2)
        run.metrics["note"] = "diverges"
        raise RuntimeError("out of memory")

    job = store.submit("train", "spam")
    worker.run(until_idle=True)
    done = store.get(job.id)
    assert (done.status, done.metrics) == (FAILED, {"loss": 0.3, "epoch": 2, "note": "diverges"})
    with pytest.raises(ZeroDivisionError), store.running(store.submit("train", "spam")) as run:
        run.report(loss=0.1)
        _ = 1 // 0
    assert store.get(run.job.id).metrics == {"loss": 0.1}


@pytest.mark.parametrize("returned", [True, False])
def test_one_nan_fails_the_job_with_its_path_and_costs_no_other_metric(store: JobStore, *, returned: bool) -> None:
    worker = worker_of(store)
    metrics = {"auc": 0.9, "by_class": {"ham": 0.8, "spam": float("nan")}, "folds": [1.0, float("inf")]}

    @worker.handles("train")
    def train(run: Run) -> Any:
        run.metrics = metrics
        return metrics if returned else None

    job = store.submit("train", "spam")
    worker.run(until_idle=True)
    done = store.get(job.id)
    assert done.status is FAILED
    assert done.metrics == {"auc": 0.9, "by_class": {"ham": 0.8}, "folds": [1.0, None]}
    assert "metrics.by_class.spam, metrics.folds[1]" in str(done.error_message)


def test_work_that_is_put_back_keeps_what_was_measured_for_the_next_attempt(store: JobStore) -> None:
    worker, begun = worker_of(store, grace=0), threading.Event()

    @worker.handles("train")
    def train(run: Run) -> Any:
        if run.attempt == 2:
            return run.job.metrics
        run.report(checkpoint="a")
        begun.set()
        run.sleep(600)
        return None

    job = store.submit("train", "spam")
    thread = threading.Thread(target=worker.run)
    thread.start()
    assert begun.wait(60)
    worker.stop()
    thread.join(60)
    assert store.get(job.id).metrics == {"checkpoint": "a"}
    worker.run(until_idle=True)
    assert (store.get(job.id).status, store.get(job.id).metrics) == (COMPLETED, {"checkpoint": "a"})


def test_a_process_of_a_pool_reports_through_the_database(store: JobStore, url: str) -> None:
    job = store.submit("train", "spam", {"fail": False, "url": url})
    bad = store.submit("train", "spam", {"fail": True, "url": url})
    with worker_app.pool() as executor:
        worker = worker_of(store, executor=executor)
        worker.handles("train")(worker_app.reports_until_seen)
        worker.run(until_idle=True)
    assert store.get(job.id).metrics == {"loss": 0.25, "seen": {"loss": 0.5}}
    assert (store.get(bad.id).status, store.get(bad.id).metrics) == (FAILED, {"loss": 0.25, "seen": {"loss": 0.5}})


def test_metrics_of_any_size_and_letters_arrive_as_they_were_reported(store: JobStore) -> None:
    keeper, (run,) = kept(store, Clock())
    metrics = {"ünïcode": "\u2028", "deep": {"a": [1, 2.5, None, True]}, "long": "x" * 100_000}
    run.report(**metrics)
    keeper.write_reports(run)
    assert json.loads(str(store.get(run.job.id).metrics_json)) == metrics
