"""A worker as an application has it; tests start it in processes of their own."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from mljobs import JobStore, Worker
from mljobs.store._run import Run

worker = Worker(
    JobStore.from_env(),
    concurrency=2,
    lease=float(os.environ.get("LEASE", "60")),
    grace=float(os.environ.get("GRACE", "30")),
    max_attempts=int(os.environ.get("MAX_ATTEMPTS", "5")),
    poll=0.1,
)
not_a_worker = object()
without_handlers = Worker(JobStore.from_env())
HOLD_SECONDS = 0.1


@worker.handles("train")
def train(run: Run) -> dict[str, Any]:
    """Do what the spec says: ``acts`` has one word for each attempt, the last for all further ones."""
    say(f"begun {run.job.id.hex} {run.claim.token}")
    acts = run.spec["acts"]
    act = acts[min(run.attempt, len(acts)) - 1]
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "hang":  # and does not listen
        threading.Event().wait()
    if act == "wait":  # and listens
        run.sleep(600)
    if act == "line":  # until the test says go
        sys.stdin.readline()
    if act == "hog":
        hog(run.spec["seconds"])
    if act == "hold":
        hold(run.spec["seconds"])
    return {"act": act, "attempt": run.attempt, "process": os.getpid()}


@worker.handles("backfill")
async def block(run: Run) -> dict[str, Any]:
    """Block the event loop, as a coroutine should not."""
    say(f"begun {run.job.id.hex} {run.claim.token}")
    threading.Event().wait(run.spec["seconds"])
    return {"attempt": run.attempt, "process": os.getpid()}


def hold(seconds: float) -> None:
    """Make one call in C that keeps the GIL all the time."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def hog(seconds: float) -> None:
    """Leave the other threads hardly any time: calls in C one after the other, then a tight loop."""
    end = time.monotonic() + seconds / 2
    while time.monotonic() < end:
        hold(HOLD_SECONDS)
    end += seconds / 2
    while time.monotonic() < end:
        pass


def say(line: str) -> None:
    """Tell the test."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# ------------------------------------------------------------------------------- for executors: functions of a module


def squares(run: Run) -> dict[str, Any]:
    """Work in another process, with progress."""
    for number in run.track(range(4)):
        _ = number**2
    return {"process": os.getpid(), "spec": run.spec}


def fit(run: Run) -> dict[str, Any]:
    """Train a real classifier, epoch by epoch."""
    from mljobs.cli._training import SPEC, Training

    training = Training({**SPEC, **run.spec})
    for epoch in run.track(training):
        run.metrics = {"epochs": epoch.number, "accuracy": epoch.accuracy, "process": os.getpid()}
    return run.metrics


def dies_at_first(run: Run) -> int:
    """Take the process along, the first time."""
    if run.attempt == 1:
        os._exit(3)
    return os.getpid()


def until_cancelled(run: Run) -> None:
    """Wait for a cancel that comes through the database."""
    run.progress(10)
    run.sleep(600)


def raises(run: Run) -> None:
    """Fail with what cannot be pickled."""

    class Local(Exception):
        """Of no module."""

    raise Local(f"spec {run.spec}")


def returns_a_set(run: Run) -> Any:
    """Return what JSON cannot hold."""
    return {run.attempt}


def dies(_run: Run) -> None:
    """Take the process along."""
    os._exit(3)


def pool(workers: int = 1) -> ProcessPoolExecutor:
    """Return processes that begin afresh: a fork would take the test's threads along."""
    from tests.fork_server import forkserver

    return ProcessPoolExecutor(workers, mp_context=forkserver())


def reports_until_seen(run: Run) -> dict[str, Any]:
    """Report, wait until the record shows it, report again, and fail if the spec says so."""
    with JobStore(run.spec["url"]) as store:
        run.report(loss=0.5)
        while (shown := store.get(run.job.id).metrics) is None:
            run.sleep(0.05)
    run.report(loss=0.25, seen=shown)
    if run.spec["fail"]:
        raise RuntimeError("as the spec says")
    return {}


def raises_what_the_spec_says(run: Run) -> None:
    """Fail with the exception that the spec names."""
    from mljobs import GiveUp

    raise {"KeyError": KeyError, "GiveUp": GiveUp, "OSError": OSError}[run.spec["error"]]("as the spec says")


def waits_or_dies(run: Run) -> int:
    """Of two jobs in two processes: the one takes its process along, the first time, while the other is at work."""
    begun, died = Path(run.spec["place"]) / "begun", Path(run.spec["place"]) / "died"
    if run.job.target_name == "good" and not begun.exists():
        begun.touch()
        threading.Event().wait()  # until the pool ends this process
    elif run.job.target_name == "bad" and not died.exists():
        while not begun.exists():
            time.sleep(0.02)
        died.touch()
        os._exit(3)
    return os.getpid()


def hangs(run: Run) -> None:
    """Say in which process, and do not listen any more."""
    say(f"begun {run.job.id.hex} {os.getpid()}")
    run.report(pid=os.getpid())
    threading.Event().wait()


def make_pooled() -> Worker:
    """Return a worker whose handlers run in processes; the command takes what makes one, too."""
    pooled = Worker(
        JobStore.from_env(), concurrency=2, executor=pool(2), grace=float(os.environ.get("GRACE", "30")), poll=0.1
    )
    pooled.handles("train")(hangs)
    return pooled


def make_nothing() -> object:
    """Return no worker."""
    return object()
