"""A small history for the tests of the board, and clients that ask it as a browser does."""

from __future__ import annotations

import atexit
import re
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from anyio.from_thread import BlockingPortal, start_blocking_portal
from starlette.testclient import TestClient

from mljobs import JobStore, MlJob
from mljobs._values import utc_now
from mljobs.board import Access, create_app
from mljobs.jobs import WorkerInfo, WorkerState
from mljobs.jobs._workers import register_worker, update_worker

BASE = "http://testserver"
FORM = {"Sec-Fetch-Site": "same-origin", "Content-Type": "application/x-www-form-urlencoded"}


def ended(store: Any, status: str, *, target: str = "spam", took: float = 60, ago: float = 600, **values: Any) -> MlJob:
    """Insert a job that finished ``ago`` seconds ago, after ``took`` seconds and 30 of waiting."""
    end = utc_now() - timedelta(seconds=ago)
    start = end - timedelta(seconds=took)
    values = {"created_at": start - timedelta(seconds=30), "started_at": start, "finished_at": end} | values
    kind, spec = values.pop("kind", "train"), values.pop("spec", None)
    job: MlJob = store.submit(kind, target, spec, status=status, attempts=1, **values)
    return job


def worker(
    store: JobStore, name: str, *kinds: str, state: WorkerState = WorkerState.RUNNING, concurrency: int = 2
) -> None:
    """Let a worker be seen, as one that runs writes itself down."""
    now = utc_now()
    with store.connect() as bind:
        known = register_worker(
            bind, WorkerInfo(name, "host-1", 7, kinds, concurrency, "1.0", now, now), model=store.model
        )
        update_worker(bind, known, state, model=store.model)


ERROR = """\
ValueError: lr must be below 1
  File "app/jobs.py", line 41, in train
    return fit(run)
  File "/usr/lib/python3.11/site-packages/torch/nn/module.py", line 1773, in call
    return self.forward(x)
  File "app/fit.py", line 7, in fit
    raise ValueError("lr must be below 1")
"""


@dataclass(frozen=True)
class Made:
    """The jobs of the small history."""

    completed: list[MlJob]
    failed: MlJob
    retried: MlJob
    queued: MlJob
    running: MlJob
    silent: MlJob
    cancelled: MlJob


def history(store: JobStore) -> Made:
    """Fill a store: a job in each state, a chain of retries, a silent worker, eight runs that get better."""
    completed = [
        ended(
            store,
            "completed",
            took=60 + number,
            ago=9000 - 1000 * number,
            spec={"lr": 0.1 / (number + 1), "depth": 6, "seed": 2**70},
            metrics={"f1": 0.8 + number / 100, "loss": 0.5 - number / 100},
        )
        for number in range(8)
    ]
    failed = ended(store, "failed", ago=500, spec={"lr": 2, "opt": {"name": "adam"}}, error_message=ERROR)
    retried = store.retry(failed)
    running = store.submit("train", "spam", {"lr": 0.3})
    silent = store.submit("backfill", "events", {}, exclusive=True)
    (claim,) = [store.claim_one(running, worker="gpu-1", lease=600)]
    store.set_progress(claim, 40)
    store.claim_one(silent, worker="gpu-2", lease=0.001)
    worker(store, "gpu-1", "train")
    worker(store, "cpu-1", "backfill", "drift_compute")
    cancelled = store.submit("train", "ham")
    store.cancel(cancelled)
    queued = store.submit("backfill", "events", {}, exclusive=True, priority=3)
    return Made(completed, failed, retried, queued, running, silent, cancelled)


@cache
def _portal() -> BlockingPortal:
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(start_blocking_portal())


def client(store: Any, access: Access | None = Access.ACT, **options: Any) -> TestClient:
    """Return a client of a board on ``store``. All share an event loop: to make one for each request takes as long again."""
    authorize = None if access is None else lambda _request: access
    made = TestClient(create_app(store, authorize=authorize, **options), follow_redirects=False)
    made.portal = _portal()
    return made


def token_of(html: str) -> str:
    """Return the token of the forms on a page."""
    found = re.search(r'name="token" value="([^"]+)"', html)
    assert found is not None
    return found[1]


def send(board: TestClient, path: str, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    """Send a form as a browser does, with a token from the page of jobs."""
    from urllib.parse import urlencode

    fields.setdefault("token", token_of(board.get("/jobs").text))
    body = urlencode({name: value for name, value in fields.items() if value is not None}, doseq=True)
    return board.post(path, content=body, headers=FORM if headers is None else headers)
