"""Workers as processes: what signals, crashes, pauses and wrong command lines do to them and their jobs."""

from __future__ import annotations

from collections.abc import Iterator
from signal import SIGCONT, SIGINT, SIGKILL, SIGTERM, Signals
from typing import Any

import pytest
from sqlalchemy import select

from mljobs import JobStore, MlJob, MlJobStatus
from tests.cases import case
from tests.fork_server import ForkServer
from tests.worker_process import ROOT, WorkerProcess

QUEUED, _, COMPLETED, FAILED, _ = MlJobStatus


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as store:
        yield store


def submit(store: JobStore, *acts: str, kind: str = "train", **spec: Any) -> MlJob:
    return store.submit(kind, "spam", {"acts": acts, **spec})


def rows(store: JobStore, what: str) -> Any:
    with store.engine.connect() as connection:
        return connection.exec_driver_sql(f"SELECT {what} FROM ml_job_leases").all()


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_the_first_signal_lets_handlers_finish_and_claims_nothing_more(
    url: str, store: JobStore, number: Signals
) -> None:
    job = submit(store, "line")
    with WorkerProcess(url) as worker:
        worker.hears(f"begun {job.id.hex}")
        worker.send(number)
        worker.hears("stops claiming")
        late = submit(store, "return")
        worker.go()
        assert worker.ends() == 0
        assert ": 1 completed" in worker.lines[-1]
    assert store.get(job.id).metrics == {"act": "line", "attempt": 1, "process": worker.pid}
    assert store.get(late.id).status is QUEUED  # and where a claim was under way at that moment, it is put back
    assert rows(store, "token") == []


@pytest.mark.parametrize(("first", "second"), [(SIGTERM, SIGTERM), (SIGINT, SIGINT), (SIGTERM, SIGINT)])
def test_the_second_signal_stops_at_once_and_puts_back_what_is_left(
    url: str, store: JobStore, first: Signals, second: Signals
) -> None:
    hanging, waiting = submit(store, "hang"), submit(store, "wait")
    with WorkerProcess(url, GRACE=3600) as worker:
        worker.hears("begun", times=2)
        worker.send(first)
        worker.hears("stops claiming")
        worker.send(second)
        assert worker.ends() == 0
    for job in (store.get(hanging.id), store.get(waiting.id)):
        assert (job.status, job.progress, job.attempts) == (QUEUED, 0, 1)
    assert rows(store, "token") == []


def test_after_its_grace_a_handler_that_does_not_listen_keeps_no_process(url: str, store: JobStore) -> None:
    job = submit(store, "hang")
    with WorkerProcess(url, "--grace", "0.1") as worker:
        worker.hears("begun")
        worker.send(SIGTERM)
        assert worker.ends() == 0
        assert "puts back what has not ended in time; jobs: 1" in "\n".join(worker.lines)
    assert (store.get(job.id).status, store.get(job.id).attempts) == (QUEUED, 1)
    assert rows(store, "token") == []


def test_an_idle_worker_ends_at_the_first_signal(url: str, store: JobStore) -> None:
    with WorkerProcess(url) as worker:
        worker.hears("begins")
        worker.send(SIGTERM)
        assert worker.ends() == 0
        assert worker.lines[-1].endswith("no jobs")


# ------------------------------------------------------------------------------------------------- crashes and pauses


def test_a_killed_workers_job_is_done_by_another_once_its_lease_has_ended(url: str, store: JobStore) -> None:
    job = submit(store, "hang", "return")
    with WorkerProcess(url, LEASE=0.5) as lost:
        lost.hears(f"begun {job.id.hex}")
        lost.send(SIGKILL)
        assert lost.ends() == -SIGKILL
        ((token,),) = rows(store, "token")
        with store.engine.connect() as connection:
            expires = connection.scalar(select(MlJob.__leases__.c.expires_at))
        with WorkerProcess(url, LEASE=0.5) as heir:
            token_of_heir = int(heir.hears(f"begun {job.id.hex}").rpartition(" ")[2])
            done = store.wait(job.id, timeout=60)
            heir.send(SIGTERM)
            assert heir.ends() == 0
    assert (done.status, done.attempts) == (COMPLETED, 2)
    assert done.metrics["process"] == heir.pid
    assert done.started_at is not None
    assert done.started_at >= expires
    assert token_of_heir > token
    assert rows(store, "token") == []


def test_a_job_that_kills_its_worker_every_time_fails_after_the_last_attempt(url: str, store: JobStore) -> None:
    job = submit(store, "kill")
    variables = {"LEASE": 0.2, "MAX_ATTEMPTS": 3}
    for _ in range(3):
        with WorkerProcess(url, **variables) as worker:
            assert worker.ends() == -SIGKILL
    with WorkerProcess(url, **variables) as worker:
        done = store.wait(job.id, timeout=60)
        worker.send(SIGTERM)
        assert worker.ends() == 0
    assert (done.status, done.attempts) == (FAILED, 3)
    assert str(done.error_message).startswith("gave up after 3 attempts: the lease of worker ")


def test_a_worker_suspended_past_its_lease_writes_nothing_and_continues(url: str, store: JobStore) -> None:
    job = submit(store, "line", "return")
    with WorkerProcess(url, LEASE=1) as asleep:
        asleep.hears("begun")
        asleep.stand_still(store)
        with WorkerProcess(url, LEASE=1) as other:
            done = store.wait(job.id, timeout=60)
            other.send(SIGTERM)
            assert other.ends() == 0
        assert (done.attempts, done.metrics["process"]) == (2, other.pid)
        asleep.go()
        asleep.send(SIGCONT)
        asleep.hears(f"job {job.id} train spam lost")
        following = submit(store, "return")
        assert store.wait(following.id, timeout=60).metrics["process"] == asleep.pid
        asleep.send(SIGTERM)
        assert asleep.ends() == 0
        assert asleep.lines[-1].endswith("1 completed, 1 lost")
    assert store.get(job.id).to_json() == done.to_json()
    assert rows(store, "token") == []


def test_neither_a_busy_gil_nor_a_blocked_loop_costs_a_lease(url: str, store: JobStore) -> None:
    hog, blocked = submit(store, "hog", seconds=5), submit(store, kind="backfill", seconds=5)
    with WorkerProcess(url, LEASE=2) as busy:
        busy.hears("begun", times=2)
        with WorkerProcess(url, LEASE=2) as watching:  # and would rescue
            watching.hears("begins")
            for job in (hog, blocked):
                done = store.wait(job.id, timeout=60)
                assert (done.status, done.attempts, done.metrics["process"]) == (COMPLETED, 1, busy.pid)
            watching.send(SIGTERM)
            assert watching.ends() == 0
            assert "rescued" not in "\n".join(watching.lines)


def test_a_worker_that_stood_still_past_its_lease_does_not_rescue_its_own_job(url: str, store: JobStore) -> None:
    job = submit(store, "hold", seconds=1)
    with WorkerProcess(url, LEASE=0.5) as worker:
        done = store.wait(job.id, timeout=60)
        worker.send(SIGTERM)
        assert worker.ends() == 0
        assert "rescued" not in "\n".join(worker.lines)
    assert (done.status, done.attempts) == (COMPLETED, 1)


def test_every_job_is_run_once_by_two_processes(url: str, store: JobStore) -> None:
    store.submit_many([("train", f"t{number}", {"acts": ["return"]}) for number in range(300)])
    with WorkerProcess(url, "--until-idle", "-q") as one, WorkerProcess(url, "--until-idle", "-q") as two:
        assert (one.ends(), two.ends()) == (0, 0)
    assert store.counts()["train", "completed"] == 300
    begun = [line for worker in (one, two) for line in worker.lines if line.startswith("begun")]
    assert len(begun) == len({line.split()[1] for line in begun}) == 300


# ------------------------------------------------------------------------------------------------ wrong from the start


WRONG_ARGUMENTS = [
    (["tests.nowhere:worker"], "there is no module 'tests.nowhere'"),
    (["nowhere.jobs:worker"], "there is no module 'nowhere'"),
    (["tests.worker_app"], "expected module:name"),
    ([".worker_app:worker"], "expected module:name"),
    (["tests.worker_app:worker", "--name", ""], "expected a name"),
    (["tests.worker_app:missing"], "tests.worker_app has no 'missing'"),
    (["tests.worker_app:not_a_worker"], "not_a_worker is a object, not a Worker"),
    (["tests.worker_app:make_nothing"], "make_nothing is a object, not a Worker"),
    (["tests.worker_app:without_handlers"], "the worker has none; use @worker.handles(kind)"),
    (["tests.worker_app:worker", "--kind", "drift_compute"], "no handler for it; there are handlers for"),
    (["tests.worker_app:worker", "--kind", "nonsense"], "nonsense"),
    (["tests.worker_app:worker", "--concurrency", "0"], "concurrency"),
]


def test_a_wrong_command_line_is_one_line_and_nothing_is_claimed(sqlite_url: str, python: ForkServer) -> None:
    with JobStore(sqlite_url) as store:
        job = submit(store, "return")
        for arguments, said in WRONG_ARGUMENTS:
            with case(*arguments):
                code, err = work(python, sqlite_url, *arguments)
                assert code == 1
                assert err.startswith("mljobs: ")
                assert said in err
                assert err.count("\n") == 1
                assert (store.get(job.id).status, store.get(job.id).attempts) == (QUEUED, 0)


def test_a_database_that_is_not_there_is_one_line(python: ForkServer) -> None:
    for url, said in (
        ("mysql://u:secret@h/x", "expected one of"),
        ("no url at all", "not a database URL"),
        ("postgresql://u:secret@127.0.0.1:1/x", "127.0.0.1"),
        ("sqlite:////nowhere/at/all.db", "unable to open database file"),
    ):
        with case(url):
            code, err = work(python, url, "tests.worker_app:worker")
            assert code == 1
            assert said in err
            assert "secret" not in err
            assert (err.startswith("mljobs: "), err.count("\n")) == (True, 1)


def test_a_database_without_the_tables_is_one_line_that_says_what_to_do(python: ForkServer, empty_url: str) -> None:
    code, err = work(python, empty_url, "tests.worker_app:worker")
    assert code == 1
    assert err == "mljobs: there is no table ml_jobs: run `mljobs upgrade`, or your own migrations\n"


def work(python: ForkServer, url: str, *arguments: str) -> tuple[int, str]:
    done = python.run("-m", "mljobs", "work", *arguments, cwd=ROOT, env={"MLJOBS_DATABASE_URL": url})
    return done.returncode, done.stdout + done.stderr
