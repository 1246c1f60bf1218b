"""Handlers on Ray, by the lines that docs/executors.md shows.

``python -m pytest -n 0 tests/slow/test_ray.py`` after ``pip install ray``: its wheel is large, and it starts a dozen
processes, so the README's test command leaves this file out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
import ray

from mljobs import JobStore
from tests import on_executors

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
    on_executors.trains(store, executor, grace=120)


def test_progress_and_cancels_reach_a_process_of_ray(store: JobStore, executor: Executor) -> None:
    on_executors.reports_and_is_cancelled(store, executor, grace=120)


def test_a_failure_on_ray_is_the_jobs_own_with_its_reason(store: JobStore, executor: Executor) -> None:
    assert "spec {'n': 2}" in on_executors.fails(store, executor, grace=120)


def test_a_process_of_ray_that_dies_puts_its_job_back_and_the_worker_goes_on(
    store: JobStore, executor: Executor
) -> None:
    on_executors.dies_and_is_done_by_another(store, executor, grace=120)
