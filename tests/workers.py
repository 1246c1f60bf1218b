"""What the tests of workers have in common."""

from __future__ import annotations

from typing import Any

from mljobs import (
    JobStore,
    MlJob,
    Worker,
)
from mljobs.store._run import Run


def worker_of(store: Any, **options: Any) -> Worker:
    return Worker(store, **{"poll": 0.05, "grace": 20, **options})


def ended(store: JobStore, job: MlJob) -> MlJob:
    return store.get(job.id)


def fail(why: str, _run: Run) -> None:
    raise RuntimeError(why)
