"""The processes of a pool: one that dies, and that none outlives its worker."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals

import pytest

from mljobs import JobStore, MlJobStatus
from mljobs.worker import _pools
from tests import worker_app
from tests.waiting import until
from tests.worker_process import WorkerProcess
from tests.workers import worker_of

QUEUED, RUNNING, COMPLETED, FAILED, _ = MlJobStatus


@pytest.fixture
def store(sqlite_url: str) -> Iterator[JobStore]:
    """What becomes of the processes has nothing to do with the database."""
    with JobStore(sqlite_url) as store:
        yield store


def has_ended(pid: int) -> bool:
    """Whether a process runs no more; a zombie that nobody has asked about does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


def test_a_process_that_dies_costs_its_own_job_an_attempt_and_no_other(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = JobStore(url)
    executor = worker_app.pool(2)
    executor.submit(os.getpid).result(60)  # or a job waits for its start so long that it is put back
    good = store.submit("train", "good", {"place": str(tmp_path)})
    bad = store.submit("train", "bad", {"place": str(tmp_path)})
    with executor, caplog.at_level(logging.WARNING, "mljobs.worker"):
        worker = worker_of(store, executor=executor, concurrency=2)
        worker.handles("train")(worker_app.waits_or_dies)
        tally = worker.run(until_idle=True)
    good, bad = store.get(good.id), store.get(bad.id)
    assert (good.status, good.attempts) == (COMPLETED, 1)
    assert (bad.status, bad.attempts) == (COMPLETED, 2)
    assert tally.jobs == {"completed": 2, "requeued": 1}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("a process of the pool died (pid ")
    assert "exit code 3" in line
    assert "\n" not in line
    store.close()


def test_a_job_that_kills_its_process_every_time_fails_and_the_worker_goes_on(store: JobStore) -> None:
    job, other = store.submit("train", "bad"), store.submit("backfill", "good", {"n": 1})
    with worker_app.pool() as executor:
        worker = worker_of(store, executor=executor, max_attempts=2)
        worker.handles("train")(worker_app.dies)
        worker.handles("backfill")(worker_app.squares)
        tally = worker.run(until_idle=True)
        assert tally.jobs == {"requeued": 1, "failed": 1, "completed": 1}
        store.submit("backfill", "good", {"n": 2})
        assert worker.run(until_idle=True).jobs == {"completed": 1}  # although the pool that it was given is broken
    job = store.get(job.id)
    assert (job.status, job.attempts) == (FAILED, 2)
    assert "gave up after 2 attempts" in str(job.error_message)
    assert store.get(other.id).status is COMPLETED


def test_a_pool_that_breaks_too_often_ends_the_worker_with_the_reason(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pools, "REBUILDS_MAX", 1)
    job = store.submit("train", "spam")
    with worker_app.pool() as executor:
        executor.submit(os.getpid).result(60)
        worker = worker_of(store, executor=executor)
        worker.handles("train")(worker_app.dies)
        with pytest.raises(BrokenExecutor):
            worker.run(until_idle=True)
    assert (store.get(job.id).status, store.get(job.id).attempts) == (QUEUED, 2)


def test_a_handler_that_does_not_end_in_time_takes_its_process_along(store: JobStore) -> None:
    job = store.submit("train", "spam")
    with worker_app.pool() as executor:
        worker = worker_of(store, executor=executor, grace=0)
        worker.handles("train")(worker_app.hangs)
        thread = threading.Thread(target=worker.run)
        thread.start()
        pid = until(lambda: store.get(job.id).metrics)["pid"]
        worker.stop()
        thread.join(60)
        assert not thread.is_alive()
        until(lambda: has_ended(pid))
    assert worker.abandoned == 1
    assert (store.get(job.id).status, store.get(job.id).attempts) == (QUEUED, 1)


@pytest.mark.parametrize("number", [SIGTERM, SIGKILL])
def test_no_process_of_a_pool_outlives_the_command(sqlite_url: str, store: JobStore, number: Signals) -> None:
    store.submit("train", "spam")
    with WorkerProcess(sqlite_url, app="tests.worker_app:make_pooled", GRACE=0) as worker:
        pid = int(worker.hears("begun").rpartition(" ")[2])
        worker.send(number)
        assert worker.ends() == (0 if number == SIGTERM else -SIGKILL)
        until(lambda: has_ended(pid))
