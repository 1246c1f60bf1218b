"""Handlers on an engine that exists already: Dask, on a cluster of two processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mljobs import JobStore, MlJob, MlJobStatus, Worker
from tests import on_executors, worker_app

if TYPE_CHECKING:
    from distributed import Client

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = MlJobStatus
PAGE = Path(__file__).parent.parent / "docs" / "executors.md"


@pytest.fixture(scope="module")
def forks() -> Iterator[None]:
    """Have Dask's processes be forks of one that has imported what they need, which takes seconds."""
    import dask
    from distributed.utils import get_mp_context

    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        learning = [f"sklearn.{part}" for part in ("datasets", "linear_model", "metrics", "model_selection")]
        get_mp_context().set_forkserver_preload(["tests.preloaded", "distributed", *learning])
        yield


@pytest.fixture(scope="module")
def client(forks: None) -> Iterator[Client]:
    import dask
    from distributed import Client, LocalCluster

    settings = {"distributed.scheduler.allowed-failures": 0, "distributed.worker.daemon": True}
    with (
        dask.config.set(settings),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as store:
        yield store


@pytest.fixture
def file_store(sqlite_url: str) -> Iterator[JobStore]:
    with JobStore(sqlite_url) as store:
        yield store


def test_training_spreads_over_the_processes_of_a_dask_cluster(file_store: JobStore, client: Client) -> None:
    jobs = on_executors.trains(file_store, client.get_executor())
    assert {job.metrics["epochs"] for job in jobs} == {5}
    assert len({job.metrics["process"] for job in jobs}) == 2


def test_progress_and_cancels_reach_a_dask_process(store: JobStore, client: Client) -> None:
    on_executors.reports_and_is_cancelled(store, client.get_executor())


def test_a_dask_process_reports_metrics_while_it_runs(store: JobStore, url: str, client: Client) -> None:
    worker = Worker(store, executor=client.get_executor(), poll=0.1)
    worker.handles("train")(worker_app.reports_until_seen)
    job = store.submit("train", "spam", {"fail": False, "url": url})
    assert worker.run(until_idle=True).jobs == {"completed": 1}
    assert store.get(job.id).metrics == {"loss": 0.25, "seen": {"loss": 0.5}}


def test_a_failure_on_dask_is_the_jobs_own_with_its_reason(file_store: JobStore, client: Client) -> None:
    reason = on_executors.fails(file_store, client.get_executor())
    assert reason.startswith("tests.worker_app.raises.<locals>.Local: spec {'n': 2}")


def test_a_dask_process_that_dies_puts_its_job_back_and_the_worker_goes_on(
    file_store: JobStore, client: Client
) -> None:
    on_executors.dies_and_is_done_by_another(file_store, client.get_executor())


def test_a_dask_process_that_dies_every_time_fails_its_job(file_store: JobStore, client: Client) -> None:
    worker = Worker(file_store, executor=client.get_executor(), poll=0.1, max_attempts=2)
    worker.handles("train")(worker_app.dies)
    job = file_store.submit("train", "spam")
    assert worker.run(until_idle=True).jobs == {"requeued": 1, "failed": 1}
    assert "gave up after 2 attempts: " in str(file_store.get(job.id).error_message)


def test_a_call_that_the_executor_drops_is_put_back(file_store: JobStore) -> None:
    class Drops(Executor):
        dropped = False

        def submit(self, fn: Any, /, *args: Any, **kw: Any) -> Future[Any]:
            future: Future[Any] = Future()
            if not self.dropped:
                self.dropped = True
                future.cancel()
                future.set_running_or_notify_cancel()
            else:
                future.set_result(fn(*args, **kw))
            return future

    worker = Worker(file_store, executor=Drops(), poll=0.1)
    worker.handles("train")(worker_app.squares)
    job = file_store.submit("train", "spam")
    assert worker.run(until_idle=True).jobs == {"requeued": 1, "completed": 1}
    assert file_store.get(job.id).attempts == 2


@pytest.mark.usefixtures("forks")
def test_what_the_docs_show_of_dask_runs(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLJOBS_DATABASE_URL", sqlite_url)
    block = re.search(r"```py\n(# dask.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    names: dict[str, Any] = {}
    with JobStore(sqlite_url) as store:
        job: MlJob = store.submit("train", "digits", {"epochs": 3})
        exec(compile(block[1], str(PAGE), "exec"), names)
        assert store.get(job.id).metrics["epochs"] == 3
    names["worker"]._store.close()
