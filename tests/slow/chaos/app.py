"""The worker that the processes run. What it does is in the ledger, and its token in what it returns."""

from __future__ import annotations

import os
import signal
from typing import Any

from mljobs import JobStore, Worker
from mljobs.store._run import Run
from tests.slow.chaos import RETRIES
from tests.slow.chaos.ledger import Ledger

worker = Worker(
    JobStore.from_env(),
    concurrency=int(os.environ["CHAOS_CONCURRENCY"]),
    lease=float(os.environ["CHAOS_LEASE"]),
    grace=5,
    poll=0.2,
    max_attempts=int(os.environ["CHAOS_MAX_ATTEMPTS"]),
)
ledger = Ledger(os.environ["CHAOS_LEDGER"])


def work(run: Run) -> dict[str, int]:
    """Do what the spec says, and leave a trace of it."""
    job, token = run.job.id.hex, run.claim.token
    ledger.begin(job, token)
    if run.spec.get("poison"):
        os.kill(os.getpid(), signal.SIGKILL)
    seconds = run.spec.get("seconds", 0)
    if seconds:
        for _ in run.track(range(4)):
            run.sleep(seconds / 4)
    ledger.end(job, token)
    if int(job[-2:], 16) < run.spec.get("fail", 0):  # by the id: the retry of the same work has another chance
        raise RuntimeError(f"token={token}")
    return {"token": token, "process": os.getpid()}


worker.handles("train")(work)
worker.handles("backfill", retries=RETRIES, backoff=0.05)(work)


@worker.handles("drift_compute")
async def drift(run: Run) -> Any:
    """Do the same on the event loop."""
    return work(run)


@worker.handles("feature_refresh", retries=RETRIES, backoff=0)
def refresh(run: Run) -> None:
    """Return nothing, but leave the metrics in the run."""
    run.metrics = work(run)
