"""What holds on every engine that runs handlers: Dask in the suite, Ray in ``tests/slow``."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Executor
from typing import Any

from mljobs import JobStore, MlJob, MlJobStatus, Worker
from tests import worker_app
from tests.waiting import until


def trains(store: JobStore, executor: Executor, **options: Any) -> list[MlJob]:
    """Train six models in other processes; return the jobs."""
    worker = Worker(store, concurrency=4, executor=executor, poll=0.1, **options)
    worker.handles("train")(worker_app.fit)
    store.submit_many([("train", f"digits_{seed}", {"seed": seed, "epochs": 5}) for seed in range(6)])
    assert worker.run(until_idle=True).jobs == {"completed": 6}
    jobs = list(store.find())
    assert all(job.metrics["accuracy"] > 0.9 for job in jobs)
    assert os.getpid() not in {job.metrics["process"] for job in jobs}
    return jobs


def reports_and_is_cancelled(store: JobStore, executor: Executor, **options: Any) -> None:
    """See progress of a job that runs elsewhere, and cancel it there."""
    worker = Worker(store, executor=executor, poll=0.1, **options)
    worker.handles("train")(worker_app.until_cancelled)
    job = store.submit("train", "spam")
    thread = threading.Thread(target=worker.run, kwargs={"until_idle": True})
    thread.start()
    until(lambda: store.get(job.id).progress == 10)
    store.cancel(job.id)
    thread.join(60)
    assert not thread.is_alive()
    assert store.get(job.id).status is MlJobStatus.CANCELLED


def fails(store: JobStore, executor: Executor, **options: Any) -> str:
    """Run a handler that raises; return the reason that is recorded."""
    worker = Worker(store, executor=executor, poll=0.1, **options)
    worker.handles("train")(worker_app.raises)
    job = store.submit("train", "spam", {"n": 2})
    assert worker.run(until_idle=True).jobs == {"failed": 1}
    return str(store.get(job.id).error_message)


def dies_and_is_done_by_another(store: JobStore, executor: Executor, **options: Any) -> None:
    """Run a handler whose process dies at the first attempt."""
    worker = Worker(store, executor=executor, poll=0.1, **options)
    worker.handles("train")(worker_app.dies_at_first)
    job = store.submit("train", "spam")
    assert worker.run(until_idle=True).jobs == {"requeued": 1, "completed": 1}
    done = store.get(job.id)
    assert (done.status, done.attempts) == (MlJobStatus.COMPLETED, 2)
