"""Handlers on Ray, by the lines that docs/executors.md shows.

``python -m pytest -n 0 tests/slow/test_ray.py`` after ``pip install ray``: its wheel is large, and it starts a dozen
processes, so the README's test command leaves this file out.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
import ray

from mljobs import JobStore, MlJobStatus, Worker
from tests import worker_app
from tests.waiting import until

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "executors.md").read_text()


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    block = re.search(r"```py\n(# ray.*?)```", PAGE, re.DOTALL)
    assert block is not None
    shown = block[1].partition("worker = Worker(")[0].replace("ray.init(num_cpus=2)", "")
    names: dict[str, Any] = {}
    exec(compile(shown, "executors.md", "exec"), names)
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    yield names["RayExecutor"]()
    ray.shutdown()


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as store:
        yield store


def test_training_spreads_over_the_processes_of_ray(store: JobStore, executor: Executor) -> None:
    worker = Worker(store, concurrency=4, executor=executor, poll=0.1, grace=120)
    worker.handles("train")(worker_app.fit)
    store.submit_many([("train", f"digits_{seed}", {"seed": seed, "epochs": 5}) for seed in range(6)])
    assert worker.run(until_idle=True).jobs == {"completed": 6}
    found = list(store.find())
    assert all(job.metrics["accuracy"] > 0.9 for job in found)
    assert os.getpid() not in {job.metrics["process"] for job in found}


def test_progress_and_cancels_reach_a_process_of_ray(store: JobStore, executor: Executor) -> None:
    worker = Worker(store, executor=executor, poll=0.1, grace=120)
    worker.handles("train")(worker_app.until_cancelled)
    job = store.submit("train", "spam")
    thread = threading.Thread(target=worker.run, kwargs={"until_idle": True})
    thread.start()
    until(lambda: store.get(job.id).progress == 10)
    store.cancel(job.id)
    thread.join(60)
    assert not thread.is_alive()
    assert store.get(job.id).status is MlJobStatus.CANCELLED


def test_a_failure_on_ray_is_the_jobs_own_with_its_reason(store: JobStore, executor: Executor) -> None:
    worker = Worker(store, executor=executor, poll=0.1, grace=120)
    worker.handles("train")(worker_app.raises)
    job = store.submit("train", "spam", {"n": 2})
    assert worker.run(until_idle=True).jobs == {"failed": 1}
    assert "spec {'n': 2}" in str(store.get(job.id).error_message)


def test_a_process_of_ray_that_dies_puts_its_job_back_and_the_worker_goes_on(
    store: JobStore, executor: Executor
) -> None:
    worker = Worker(store, executor=executor, poll=0.1, grace=120)
    worker.handles("train")(worker_app.dies_at_first)
    job = store.submit("train", "spam")
    assert worker.run(until_idle=True).jobs == {"requeued": 1, "completed": 1}
    assert store.get(job.id).attempts == 2
