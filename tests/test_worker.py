"""Workers: what handlers are given, where they run, what becomes of what they return or raise."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from mljobs import (
    AsyncJobStore,
    InvalidValueError,
    JobStore,
    LeaseLostError,
    MlJob,
    MlJobKind,
    MlJobStatus,
    SchemaError,
    TerminalStateError,
    Worker,
    exponential,
)
from mljobs.store._run import Run
from mljobs.worker._recording import OutcomeWriter
from mljobs.worker._remote import RemoteResult
from tests import worker_app
from tests.processes import until
from tests.worlds import World

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = MlJobStatus


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as store:
        yield store


def worker_of(store: Any, **options: Any) -> Worker:
    return Worker(store, **{"poll": 0.05, "grace": 20, **options})


def ended(store: JobStore, job: MlJob) -> MlJob:
    return store.get(job.id)


# ------------------------------------------------------------------------------------------------------ what is handled


def test_a_handler_is_given_the_run_and_what_it_returns_becomes_the_metrics(store: JobStore) -> None:
    worker = worker_of(store)
    seen: list[Any] = []

    @worker.handles(MlJobKind.TRAIN)
    def train(run: Run) -> Any:
        seen.append((run.spec, run.attempt, store.get(run.job.id).status))
        return {"auc": 0.97}

    job = store.submit("train", "spam", {"lr": 0.1})
    tally = worker.run(until_idle=True)
    assert seen == [({"lr": 0.1}, 1, RUNNING)]
    job = ended(store, job)
    assert (job.status, job.progress, job.metrics) == (COMPLETED, 100, {"auc": 0.97})
    assert tally.jobs == {"completed": 1}
    assert str(tally) == "1 completed"
    assert train.__name__ == "train"


def test_a_handler_that_returns_nothing_keeps_the_metrics_of_the_run(store: JobStore) -> None:
    worker = worker_of(store)

    @worker.handles("train")
    def train(run: Run) -> None:
        run.metrics = {"loss": 0.5}

    job = store.submit("train", "spam")
    worker.run(until_idle=True)
    assert ended(store, job).metrics == {"loss": 0.5}


def test_an_exception_fails_its_job_with_the_reason_and_no_other(store: JobStore) -> None:
    worker = worker_of(store, concurrency=3)

    @worker.handles("train")
    def train(run: Run) -> int:
        run.progress(30)
        return 1 // run.spec["by"]

    bad, good = store.submit("train", "bad", {"by": 0}), store.submit("train", "good", {"by": 1})
    tally = worker.run(until_idle=True)
    bad = ended(store, bad)
    assert (bad.status, bad.progress) == (FAILED, 30)
    assert bad.error_message is not None
    assert bad.error_message.startswith("ZeroDivisionError")
    assert "test_worker.py" in bad.error_message
    assert ended(store, good).status is COMPLETED
    assert tally.jobs == {"completed": 1, "failed": 1}


@pytest.mark.parametrize("returned", [{1, 2}, float("nan"), {"x": object()}])
def test_metrics_that_json_cannot_hold_fail_the_job(store: JobStore, returned: Any) -> None:
    worker = worker_of(store)
    worker.handles("train")(lambda run: returned)
    job = store.submit("train", "spam")
    worker.run(until_idle=True)
    job = ended(store, job)
    assert job.status is FAILED
    assert "metrics" in str(job.error_message)


def test_metrics_whose_own_code_raises_fail_the_job_and_not_the_worker(store: JobStore) -> None:
    class Broken:
        def tolist(self) -> Any:
            raise KeyError("no list")

    worker = worker_of(store)
    worker.handles("train")(lambda run: Broken() if run.spec["broken"] else 1)
    bad, good = (store.submit("train", "spam", {"broken": broken}) for broken in (True, False))
    assert worker.run(until_idle=True).jobs == {"failed": 1, "completed": 1}
    assert "KeyError: 'no list'" in str(ended(store, bad).error_message)
    assert ended(store, good).status is COMPLETED


def test_a_coroutine_that_a_plain_handler_returns_fails_the_job_and_says_what_to_do(store: JobStore) -> None:
    async def inner(run: Run) -> int:
        return run.attempt

    worker = worker_of(store)

    @worker.handles("train")
    def train(run: Run) -> Any:
        return inner(run)

    job = store.submit("train", "spam")
    worker.run(until_idle=True)
    assert "has to be an async function itself" in str(ended(store, job).error_message)


@pytest.mark.parametrize("code", ["check_violation", "object_not_in_prerequisite_state", "external_routine_exception"])
def test_what_only_the_database_refuses_fails_its_job_and_no_other(store: JobStore, code: str) -> None:
    worker = worker_of(store, concurrency=1, ahead=10)
    worker.handles("train")(lambda run: run.spec)
    jobs = store.submit_many([("train", f"t{number}", {"n": number}) for number in range(20)])
    assert jobs == 20
    trigger(store, code)
    worker.run(until_idle=True)
    by_target = {job.target_name: job for job in store.find(limit=100)}
    assert by_target["t7"].status is FAILED
    assert "refused" in str(by_target["t7"].error_message)
    assert sum(job.status is COMPLETED for job in by_target.values()) == 19


def trigger(store: JobStore, code: str) -> None:
    """A host's own rule on its table, that one job's outcome breaks."""
    with store.engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql(
                "CREATE TRIGGER host_rule BEFORE UPDATE ON ml_jobs "
                "WHEN NEW.target_name = 't7' AND NEW.status = 'completed' BEGIN SELECT RAISE(ABORT, 'not t7'); END"
            )
        else:
            connection.exec_driver_sql(
                "CREATE FUNCTION host_rule() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN RAISE EXCEPTION 'not t7' USING ERRCODE = '{code}'; END $$"
            )
            connection.exec_driver_sql(
                "CREATE TRIGGER host_rule BEFORE UPDATE ON ml_jobs FOR EACH ROW "
                "WHEN (NEW.target_name = 't7' AND NEW.status = 'completed') EXECUTE FUNCTION host_rule()"
            )


def test_sys_exit_in_a_handler_fails_the_job_and_not_the_worker(store: JobStore) -> None:
    worker = worker_of(store)

    @worker.handles("train")
    def train(run: Run) -> None:
        raise SystemExit(3)

    job = store.submit("train", "spam")
    worker.run(until_idle=True)
    job = ended(store, job)
    assert (job.status, job.attempts) == (FAILED, 1)
    assert "SystemExit" in str(job.error_message)


def test_only_kinds_with_handlers_are_claimed(store: JobStore) -> None:
    worker = worker_of(store, concurrency=2)
    for kind in ("train", "backfill"):
        worker.handles(kind)(lambda run: None)
    jobs = [store.submit(kind, "spam") for kind in ("train", "backfill", "drift_compute")]
    worker.run(until_idle=True)
    assert [ended(store, job).status for job in jobs] == [COMPLETED, COMPLETED, QUEUED]
    again = store.submit("backfill", "spam"), store.submit("train", "spam")
    worker.run(until_idle=True, kinds="train")
    assert [ended(store, job).status for job in again] == [QUEUED, COMPLETED]


def test_every_job_is_run_once_by_two_workers_in_threads(store: JobStore) -> None:
    ran: list[str] = []
    lock = threading.Lock()

    def train(run: Run) -> None:
        with lock:
            ran.append(run.job.target_name)

    store.submit_many([("train", f"t{number}", {}) for number in range(400)])
    workers = [worker_of(store, concurrency=3, name=f"w{number}") for number in range(2)]
    threads = []
    for worker in workers:
        worker.handles("train")(train)
        threads.append(threading.Thread(target=worker.run, kwargs={"until_idle": True}))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(ran) == sorted(f"t{number}" for number in range(400))
    assert store.counts()["train", "completed"] == 400


def test_jobs_of_one_exclusive_target_run_one_after_the_other_and_all_of_them(store: JobStore) -> None:
    at_once, most = 0, 0
    lock = threading.Lock()

    def train(run: Run) -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        threading.Event().wait(0.005)
        with lock:
            at_once -= 1

    worker = worker_of(store, concurrency=4)
    worker.handles("train")(train)
    for _ in range(8):
        store.submit("train", "spam", exclusive=True)
    tally = worker.run(until_idle=True)
    assert (most, tally.jobs) == (1, {"completed": 8})


@pytest.mark.parametrize("until_idle", [True, False])
def test_a_target_that_is_freed_while_a_claim_finds_it_taken_is_looked_at_again(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, *, until_idle: bool
) -> None:
    worker = worker_of(store, concurrency=2, poll=3600)
    may_end, written = threading.Event(), threading.Event()
    finish_and_claim, done_writing = store.finish_and_claim, OutcomeWriter.done_writing

    def claim(*args: Any, **kw: Any) -> Any:
        answer = finish_and_claim(*args, **kw)
        if not answer[1] and not may_end.is_set():
            may_end.set()
            assert written.wait(60)  # what was under way is recorded before this answer is looked at
        return answer

    def spy(writer: OutcomeWriter) -> None:
        done_writing(writer)
        written.set()

    def train(_run: Run) -> None:
        may_end.wait(60)
        if store.counts().get(("train", "completed")) and not until_idle:
            worker.stop()

    store.finish_and_claim = claim  # type: ignore[method-assign]
    monkeypatch.setattr(OutcomeWriter, "done_writing", spy)
    worker.handles("train")(train)
    for _ in range(2):
        store.submit("train", "spam", exclusive=True)
    assert worker.run(until_idle=until_idle).jobs == {"completed": 2}


def test_short_jobs_are_claimed_ahead_and_long_ones_are_not(store: JobStore) -> None:
    limits: list[int] = []
    claim = store.finish_and_claim

    def spy(*args: Any, **kw: Any) -> Any:
        limits.append(kw["limit"])
        return claim(*args, **kw)

    store.finish_and_claim = spy  # type: ignore[method-assign]
    worker = worker_of(store, concurrency=2)
    worker.handles("train")(lambda run: None)
    store.submit_many([("train", "short", {}) for _ in range(500)])
    worker.run(until_idle=True)
    assert max(limits) > 10
    assert all(limit <= 1024 for limit in limits)
    limits.clear()
    slow = worker_of(store, concurrency=2, ahead=0)
    slow.handles("train")(lambda run: None)
    store.submit_many([("train", "short", {}) for _ in range(50)])
    slow.run(until_idle=True)
    assert max(limits) <= 2


# ------------------------------------------------------------------------------------------------------ wrong from the start


def _two(run: Run, other: int) -> None: ...
def _none() -> None: ...
def _generator(run: Run) -> Iterator[int]:
    yield 1


def _of_job(job: MlJob) -> None: ...  # fmt: skip


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (_two, "one argument"),
        (_none, "one argument"),
        (_generator, "generator"),
        (_of_job, "MlJob"),
        (3, "expected a function"),
        (Run, "expected a function"),
    ],
)
def test_a_handler_that_cannot_work_is_refused_when_it_is_named(store: JobStore, function: Any, why: str) -> None:
    with pytest.raises(InvalidValueError, match=why) as caught:
        worker_of(store).handles("train")(function)
    assert caught.value.field == "handler"


class _Callable:
    run: int = 0  # not the parameter's type, for all that its name is the same

    def __call__(self, run: Run) -> int:
        return run.attempt


class _AsyncCallable:
    async def __call__(self, run: Run) -> int:
        return run.attempt


async def _added(number: int, run: Run) -> int:
    return number + run.attempt


@pytest.mark.parametrize(
    ("function", "metrics"),
    [(_Callable(), 1), (_AsyncCallable(), 1), (partial(_added, 2), 3), (partial(partial(_added), 2), 3)],
)
def test_whatever_can_be_called_with_a_run_is_a_handler(store: JobStore, function: Any, metrics: int) -> None:
    worker = worker_of(store)
    worker.handles("train")(function)
    job = store.submit("train", "spam")
    worker.run(until_idle=True)
    assert ended(store, job).metrics == metrics


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"retries": -1}, "retries"),
        ({"retries": True}, "retries"),
        ({"backoff": -5}, "backoff"),
        ({"backoff": "soon"}, "backoff"),
        ({"backoff": float("inf")}, "backoff"),
        ({"backoff": float("nan")}, "backoff"),
    ],
)
def test_a_policy_out_of_range_is_refused(store: JobStore, options: Any, field: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        worker_of(store).handles("train", **options)(lambda run: None)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": "4"}, "concurrency"),
        ({"lease": 0}, "lease"),
        ({"grace": -1}, "grace"),
        ({"poll": 0}, "poll"),
        ({"poll": float("inf")}, "poll"),
        ({"name": 5}, "name"),
        ({"name": "  "}, "name"),
        ({"name": "a\x00"}, "name"),
        ({"ahead": -1}, "ahead"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"executor": 4}, "executor"),
    ],
)
def test_a_worker_out_of_range_is_refused(store: JobStore, options: Any, field: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        Worker(store, **options)
    assert caught.value.field == field


def test_nothing_is_claimed_before_everything_is_known_to_fit(store: JobStore, empty_url: str) -> None:
    job = store.submit("train", "spam")
    worker = worker_of(store)
    with pytest.raises(InvalidValueError, match="handles"):
        worker.run(until_idle=True)
    worker.handles("train")(lambda run: None)
    with pytest.raises(InvalidValueError, match="handled by"):
        worker.handles("train")
    with pytest.raises(InvalidValueError, match="no handler"):
        worker.run(until_idle=True, kinds=["backfill"])
    with pytest.raises(InvalidValueError, match="nonsense"):
        worker.run(until_idle=True, kinds=["nonsense"])
    with pytest.raises(InvalidValueError, match="nonsense"):
        worker.handles("nonsense")
    with pytest.raises(InvalidValueError, match="one at least"):
        worker.run(until_idle=True, kinds=[])
    assert ended(store, job).attempts == 0
    with JobStore(empty_url) as empty:
        lost = worker_of(empty)
        lost.handles("train")(lambda run: None)
        with pytest.raises(SchemaError, match="mljobs upgrade"):
            lost.run(until_idle=True)
    with JobStore("sqlite://") as memory:
        lost = worker_of(memory)
        lost.handles("train")(lambda run: None)
        with pytest.raises(InvalidValueError, match="memory"):
            lost.run(until_idle=True)
    with pytest.raises(InvalidValueError, match="JobStore"):
        Worker("sqlite:///x.db")  # type: ignore[arg-type]


def test_a_worker_runs_once_at_a_time(store: JobStore) -> None:
    worker = worker_of(store)

    @worker.handles("train")
    def train(run: Run) -> None:
        with pytest.raises(InvalidValueError, match="running already"):
            worker.run(until_idle=True)

    job = store.submit("train", "spam")
    worker.run(until_idle=True)
    assert ended(store, job).status is COMPLETED


# ------------------------------------------------------------------------------------------------------------ retries


def test_a_failure_ends_its_record_and_submits_the_next(store: JobStore) -> None:
    worker = worker_of(store)

    @worker.handles("train", retries=2, backoff=0)
    def train(run: Run) -> None:
        raise ValueError(f"no {run.spec['n']}")

    first = store.submit("train", "spam", {"n": 1}, priority=3)
    tally = worker.run(until_idle=True)
    line = sorted(store.find(), key=lambda job: job.id)
    assert [job.status for job in line] == [FAILED] * 3
    assert [job.retry_of for job in line] == [None, line[0].id, line[1].id]
    assert [job.attempts for job in line] == [1, 1, 1]
    assert {(job.priority, job.target_name, job.spec["n"]) for job in line} == {(3, "spam", 1)}
    assert (tally.jobs, tally.retried) == ({"failed": 3}, 2)
    assert [job.id for job in store.lineage(line[2].id)] == [job.id for job in line]
    assert line[0].id == first.id


def test_a_retry_waits_as_long_as_the_backoff_says(store: JobStore) -> None:
    asked: list[int] = []

    def backoff(retry: int) -> float:
        asked.append(retry)
        return 3600

    worker = worker_of(store)
    worker.handles("train", retries=1, backoff=backoff)(partial(_fail, "no"))
    store.submit("train", "spam")
    worker.run(until_idle=True)
    (retry,) = [job for job in store.find() if job.status is QUEUED]
    assert asked == [1]
    assert retry.run_after is not None
    assert 3500 < (retry.run_after - retry.created_at).total_seconds() <= 3601


def _fail(why: str, _run: Run) -> None:
    raise RuntimeError(why)


def test_a_retry_that_cannot_be_submitted_leaves_the_first_failed(store: JobStore) -> None:
    with store.engine.begin() as connection:
        connection.exec_driver_sql("CREATE UNIQUE INDEX host_once ON ml_jobs (target_name)")
    _fails_without_a_retry(store)


def _fails_without_a_retry(store: JobStore) -> None:
    worker = worker_of(store)
    worker.handles("train", retries=3, backoff=0)(partial(_fail, "the reason"))
    job = store.submit("train", "spam")
    tally = worker.run(until_idle=True)
    job = ended(store, job)
    assert job.status is FAILED
    assert "the reason" in str(job.error_message)
    assert (tally.jobs, tally.retried) == ({"failed": 1}, 0)


def test_a_retry_that_is_refused_at_its_commit_leaves_the_first_failed(postgres_url: str) -> None:
    with JobStore(postgres_url) as store:
        with store.engine.begin() as connection:
            connection.exec_driver_sql(
                "CREATE FUNCTION host_late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "RAISE EXCEPTION 'no retries here' USING ERRCODE = 'check_violation'; END $$"
            )
            connection.exec_driver_sql(
                "CREATE CONSTRAINT TRIGGER host_late AFTER INSERT ON ml_jobs DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW WHEN (NEW.retry_of IS NOT NULL) EXECUTE FUNCTION host_late()"
            )
        _fails_without_a_retry(store)


@pytest.mark.parametrize("raised", [ZeroDivisionError, SystemExit])
def test_a_backoff_that_raises_leaves_the_first_failed(store: JobStore, raised: type[BaseException]) -> None:
    worker = worker_of(store)

    def backoff(_retry: int) -> float:
        raise raised

    worker.handles("train", retries=3, backoff=backoff)(partial(_fail, "the reason"))
    job = store.submit("train", "spam")
    assert worker.run(until_idle=True).retried == 0
    assert ended(store, job).status is FAILED


def test_exponential_grows_up_to_the_longest_and_strays_a_little() -> None:
    exact = exponential(10, 600, jitter=0)
    assert [exact(retry) for retry in (1, 2, 3, 7, 5000)] == [10, 20, 40, 600, 600]
    stray = {round(exponential(10, 600)(1), 6) for _ in range(20)}
    assert len(stray) > 1
    assert all(9 <= seconds <= 11 for seconds in stray)
    assert all(exponential(10, 600)(1000) <= 600 for _ in range(50))
    wrong: list[tuple[Any, Any]] = [(-1, 5), (10, 5), ("1", 5), (True, 5), (1, "5"), (1, float("inf"))]
    for arguments in wrong:
        with pytest.raises(InvalidValueError):
            exponential(*arguments)
    for options in ({"factor": 0.5}, {"jitter": 1}, {"factor": float("nan")}, {"jitter": None}):
        with pytest.raises(InvalidValueError):
            exponential(1, 2, **options)


# --------------------------------------------------------------------------------------------------- cancels and leases


def test_a_cancel_stops_the_handler_and_its_result_is_dropped(store: JobStore) -> None:
    worker = worker_of(store, lease=0.6)

    @worker.handles("train")
    def train(run: Run) -> dict[str, int]:
        store.cancel(run.job.id)
        run.sleep(60)
        return {"late": 1}

    job = store.submit("train", "spam", exclusive=True)
    following = store.submit("train", "spam", exclusive=True)
    store.cancel(following.id)
    tally = worker.run(until_idle=True)
    job = ended(store, job)
    assert (job.status, job.metrics) == (CANCELLED, None)
    assert tally.jobs == {"cancelled": 1}
    assert leases(store) == 0


def test_a_cancel_that_no_handler_asked_for_drops_the_result_too(store: JobStore) -> None:
    worker = worker_of(store)

    @worker.handles("train")
    def train(run: Run) -> dict[str, int]:
        store.cancel(run.job.id)
        return {"late": 1}

    job = store.submit("train", "spam")
    assert worker.run(until_idle=True).jobs == {"cancelled": 1}
    assert ended(store, job).metrics is None
    assert leases(store) == 0


def leases(store: JobStore) -> int:
    with store.engine.connect() as connection:
        number: int = connection.exec_driver_sql("SELECT count(*) FROM ml_job_leases").scalar_one()
        return number


def test_a_lost_lease_drops_the_result_and_the_worker_goes_on(store: JobStore) -> None:
    worker = worker_of(store)
    tokens: list[int] = []

    @worker.handles("train")
    def train(run: Run) -> dict[str, int]:
        if run.job.target_name == "spam":
            tokens.append(run.claim.token)
            if len(tokens) == 1:  # as if this process had stood still, and another had taken over and finished
                expire(store)
                store.rescue()
                claim = store.claim_one(run.job.id, worker="quick")
                store.complete(claim, {"quick": 1})
        return {"late": 1}

    job, after = store.submit("train", "spam"), store.submit("train", "ham")
    tally = worker.run(until_idle=True)
    assert ended(store, job).metrics == {"quick": 1}
    assert ended(store, after).status is COMPLETED
    assert tally.jobs == {"lost": 1, "completed": 1}


def test_a_lost_lease_stops_a_handler_that_listens(store: JobStore) -> None:
    worker = worker_of(store, lease=0.6)
    stopped = threading.Event()

    @worker.handles("train")
    def train(run: Run) -> None:
        with store.engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM ml_job_leases")
        try:
            run.sleep(60)
        except LeaseLostError:
            stopped.set()
            raise

    store.submit("train", "spam")
    tally = worker.run(until_idle=True)
    assert stopped.is_set()
    assert tally.jobs == {"lost": 1}


def test_a_worker_rescues_what_others_lost_its_own_kinds_to_the_end(store: JobStore) -> None:
    for kind in ("train", "backfill"):
        store.submit(kind, "spam")
    for attempt in range(2):
        assert len(store.claim(worker="silent", limit=2)) == 2
        expire(store)
        if attempt == 0:
            store.rescue()
    worker = worker_of(store, max_attempts=2, lease=1.0)
    handled = threading.Event()
    worker.handles("train")(lambda run: handled.set())
    thread = threading.Thread(target=worker.run)
    thread.start()
    finished = store.wait(next(iter(store.find(kind="train"))).id, timeout=60)
    worker.stop()
    thread.join(60)
    assert finished.status is FAILED
    assert "2 attempts" in str(finished.error_message)
    assert not handled.is_set()
    (other,) = store.find(kind="backfill")
    assert other.status is QUEUED


def expire(store: JobStore) -> None:
    with store.engine.begin() as connection:
        moment = "0" if connection.dialect.name == "sqlite" else "'2020-01-01'"
        connection.exec_driver_sql(f"UPDATE ml_job_leases SET expires_at = {moment}")


# ------------------------------------------------------------------------------------------------------------- stopping


def test_stop_lets_handlers_finish_and_claims_nothing_more(store: JobStore) -> None:
    worker = worker_of(store, concurrency=2)
    begun, go = threading.Barrier(3), threading.Event()

    @worker.handles("train")
    def train(run: Run) -> None:
        begun.wait(60)
        go.wait(60)

    jobs = [store.submit("train", f"t{number}") for number in range(5)]
    thread = threading.Thread(target=worker.run)
    thread.start()
    begun.wait(60)
    worker.stop()
    threading.Timer(0.2, go.set).start()
    thread.join(60)
    assert not thread.is_alive()
    assert sorted(ended(store, job).status for job in jobs) == sorted([COMPLETED] * 2 + [QUEUED] * 3)
    assert worker.abandoned == 0


def test_what_does_not_end_within_the_grace_is_put_back_and_its_late_result_dropped(store: JobStore) -> None:
    worker = worker_of(store, grace=0.1)
    begun, go, done = threading.Event(), threading.Event(), threading.Event()

    @worker.handles("train")
    def train(run: Run) -> dict[str, int]:
        run.progress(50)
        begun.set()
        go.wait(60)
        done.set()
        return {"late": 1}

    job = store.submit("train", "spam")
    tallies: list[Any] = []
    thread = threading.Thread(target=lambda: tallies.append(worker.run().jobs))
    thread.start()
    begun.wait(60)
    worker.stop()
    thread.join(60)
    assert not thread.is_alive()
    job = ended(store, job)
    assert (job.status, job.progress, job.attempts) == (QUEUED, 0, 1)
    assert worker.abandoned == 1
    assert leases(store) == 0
    assert tallies == [{"requeued": 1}]
    go.set()
    done.wait(60)
    assert ended(store, job).status is QUEUED


def test_a_second_stop_does_not_wait_for_the_grace(store: JobStore) -> None:
    worker = worker_of(store, grace=3600)
    begun = threading.Event()
    stopped = threading.Event()

    @worker.handles("train")
    def train(run: Run) -> None:
        begun.set()
        try:
            run.sleep(3600)
        finally:
            stopped.set()

    job = store.submit("train", "spam")
    thread = threading.Thread(target=worker.run)
    thread.start()
    begun.wait(60)
    worker.stop()
    worker.stop()
    thread.join(60)
    assert not thread.is_alive()
    assert ended(store, job).status is QUEUED
    assert stopped.wait(60)  # a handler that listens is told


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_small_pool_is_enough_for_a_worker_that_was_idle(postgres_url: str, size: int) -> None:
    options: dict[str, Any] = {"pool_size": size, "max_overflow": 0, "pool_timeout": 60}
    with JobStore(postgres_url, **options) as store, JobStore(postgres_url) as other:
        worker = worker_of(store)
        worker.handles("train", retries=1, backoff=0)(partial(_fail, "no"))
        thread = threading.Thread(target=worker.run, daemon=True)
        thread.start()
        until(lambda: _listeners(other) == 1)
        job = other.submit("train", "spam")
        until(lambda: other.counts()["train", "failed"] == 2)
        worker.stop()
        thread.join(60)
        assert not thread.is_alive()
        assert ended(other, job).status is FAILED
        until(lambda: _listeners(other) == 0)


def _listeners(store: JobStore) -> int:
    with store.engine.connect() as connection:
        asked = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND starts_with(query, 'LISTEN')"
        )
        number: int = connection.exec_driver_sql(asked).scalar_one()
        return number


def test_an_idle_worker_stops_at_once_and_wakes_for_a_new_job(store: JobStore) -> None:
    worker = worker_of(store, poll=3600 if store.engine.dialect.name == "postgresql" else 0.05)
    handled = threading.Event()
    worker.handles("train")(lambda run: handled.set())
    thread = threading.Thread(target=worker.run)
    thread.start()
    for _ in range(3):
        handled.clear()
        job = store.submit("train", "spam")
        if store.engine.dialect.name == "postgresql":
            until(lambda: handled.is_set() or _listening(store))
        assert handled.wait(60)
        assert store.wait(job.id, timeout=60).status is COMPLETED
    worker.stop()
    thread.join(60)
    assert not thread.is_alive()


def _listening(store: JobStore) -> bool:
    with store.engine.connect() as connection:
        number: int = connection.exec_driver_sql(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'"
        ).scalar_one()
        return number > 0


def test_what_was_claimed_ahead_and_waits_long_is_put_back_for_others(store: JobStore) -> None:
    worker = worker_of(store, concurrency=1)
    long, go = threading.Event(), threading.Event()

    @worker.handles("train")
    def train(run: Run) -> None:
        if run.spec.get("long"):
            long.set()
            go.wait(60)

    store.submit_many([("train", "short", {}) for _ in range(60)])
    store.submit("train", "long", {"long": True})
    store.submit_many([("train", "behind", {}) for _ in range(30)])
    thread = threading.Thread(target=worker.run, kwargs={"until_idle": True})
    thread.start()
    assert long.wait(60)
    until(lambda: store.counts()["train", "queued"] == 30)
    claims = store.claim(worker="free", limit=30)
    store.complete_many([(claim, None) for claim in claims])
    go.set()
    thread.join(60)
    assert len(claims) == 30
    assert store.counts()["train", "completed"] == 91


# ---------------------------------------------------------------------------------------------------- where handlers run


def test_async_handlers_run_on_one_loop_many_at_a_time(store: JobStore) -> None:
    worker = worker_of(store, concurrency=5)
    loops: set[int] = set()
    threads: set[int] = set()
    waiting = 0
    all_there: asyncio.Event | None = None

    @worker.handles("train")
    async def train(run: Run) -> dict[str, int]:
        nonlocal waiting, all_there
        all_there = all_there or asyncio.Event()
        loops.add(id(asyncio.get_running_loop()))
        threads.add(threading.get_ident())
        waiting += 1
        if waiting == 5:
            all_there.set()
        await asyncio.wait_for(all_there.wait(), 60)
        return {"n": run.spec["n"]}

    store.submit_many([("train", "spam", {"n": number}) for number in range(5)])
    tally = worker.run(until_idle=True)
    assert tally.jobs == {"completed": 5}
    assert (len(loops), len(threads)) == (1, 1)
    assert sorted(job.metrics["n"] for job in store.find()) == [0, 1, 2, 3, 4]


def test_plain_and_async_handlers_live_in_one_worker(store: JobStore) -> None:
    worker = worker_of(store, concurrency=3)

    @worker.handles("train")
    async def train(run: Run) -> str:
        await asyncio.sleep(0)
        raise ValueError("async")

    worker.handles("backfill")(lambda run: "plain")
    for number in range(6):
        store.submit(("train", "backfill")[number % 2], "spam")
    assert worker.run(until_idle=True).jobs == {"completed": 3, "failed": 3}


def test_a_worker_runs_on_the_loop_of_an_application(world: World) -> None:
    url = world.url

    async def main() -> Any:
        there = asyncio.get_running_loop()
        source: Any = AsyncJobStore(url) if world.is_async else JobStore(url)
        worker = worker_of(source, concurrency=2)

        @worker.handles("train")
        async def train(run: Run) -> bool:
            return asyncio.get_running_loop() is there

        with Session(world.outside) as session, session.begin():
            session.add_all([MlJob(kind="train", target_name=f"t{n}") for n in range(4)])
        tally = await worker.run_async(until_idle=True)
        closing = source.close()
        if closing is not None:
            await closing
        worker.close()
        return tally

    assert asyncio.run(main()).jobs == {"completed": 4}
    with JobStore(str(world.outside.url.render_as_string(hide_password=False))) as store:
        assert [job.metrics for job in store.find()] == [True] * 4


def test_cancelling_the_task_stops_the_worker_well(store: JobStore) -> None:
    worker = worker_of(store, grace=20)
    job = store.submit("train", "spam")

    async def main() -> None:
        begun, go = asyncio.Event(), asyncio.Event()

        @worker.handles("train")
        async def train(run: Run) -> str:
            begun.set()
            await go.wait()
            return "finished"

        task = asyncio.create_task(worker.run_async())
        await begun.wait()
        task.cancel()
        asyncio.get_running_loop().call_later(0.2, go.set)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert ended(store, job).metrics == "finished"


@pytest.mark.parametrize(("max_attempts", "status"), [(5, QUEUED), (1, FAILED)])
def test_an_async_handler_whose_loop_ends_is_put_back(store: JobStore, max_attempts: int, status: MlJobStatus) -> None:
    worker = worker_of(store, max_attempts=max_attempts)
    job = store.submit("train", "spam")

    async def main() -> None:
        begun = asyncio.Event()

        @worker.handles("train")
        async def train(run: Run) -> None:
            begun.set()
            await asyncio.Event().wait()

        tasks.append(asyncio.create_task(worker.run_async()))
        await begun.wait()  # and return: the loop cancels every task that is left

    tasks: list[Any] = []
    asyncio.run(main())
    assert tasks[0].cancelled()
    assert ended(store, job).status is status
    assert leases(store) == 0


def test_cancelling_the_task_again_stops_at_once_and_still_waits_for_the_worker(store: JobStore) -> None:
    worker = worker_of(store, grace=3600)
    begun, go = threading.Event(), threading.Event()

    @worker.handles("train")
    def train(run: Run) -> None:
        begun.set()
        go.wait(60)

    job = store.submit("train", "spam")

    async def main() -> None:
        task = asyncio.create_task(worker.run_async())
        await asyncio.to_thread(begun.wait, 60)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended(store, job).status is QUEUED
        assert worker.abandoned == 1

    try:
        asyncio.run(main())
    finally:
        go.set()


def test_async_handlers_that_do_not_end_in_time_are_cancelled_and_put_back(store: JobStore) -> None:
    worker = worker_of(store, grace=0.1)
    begun, cancelled = threading.Event(), threading.Event()

    @worker.handles("train")
    async def train(run: Run) -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    job = store.submit("train", "spam")
    thread = threading.Thread(target=worker.run)
    thread.start()
    begun.wait(60)
    worker.stop()
    thread.join(60)
    assert cancelled.wait(60)
    assert ended(store, job).status is QUEUED


def test_a_thread_pool_is_an_executor_like_any_other(store: JobStore) -> None:
    names: set[str] = set()
    with ThreadPoolExecutor(2, thread_name_prefix="mine") as executor:
        worker = worker_of(store, concurrency=2, executor=executor)

        @worker.handles("train")
        def train(run: Run) -> int:
            names.add(threading.current_thread().name.partition("_")[0])
            return run.spec["n"] * 2

        store.submit_many([("train", "spam", {"n": number}) for number in range(5)])
        assert worker.run(until_idle=True).jobs == {"completed": 5}
    assert names == {"mine"}
    assert sorted(job.metrics for job in store.find()) == [0, 2, 4, 6, 8]


def test_processes_give_back_metrics_failures_and_what_json_cannot_hold(store: JobStore) -> None:
    with worker_app.pool() as executor:
        worker = worker_of(store, executor=executor)
        worker.handles("train")(worker_app.squares)
        worker.handles("backfill")(worker_app.raises)
        worker.handles("drift_compute")(worker_app.returns_a_set)
        good = store.submit("train", "spam", {"n": 1})
        bad = store.submit("backfill", "spam", {"n": 2})
        odd = store.submit("drift_compute", "spam")
        worker.run(until_idle=True)
    good, bad, odd = (ended(store, job) for job in (good, bad, odd))
    assert (good.status, good.metrics["spec"]) == (COMPLETED, {"n": 1})
    assert good.metrics["process"] != os.getpid()
    assert bad.status is FAILED
    assert "Local: spec {'n': 2}" in str(bad.error_message)
    assert "worker_app.py" in str(bad.error_message)
    assert odd.status is FAILED
    assert "metrics" in str(odd.error_message)


def test_a_handler_that_no_process_can_be_sent_is_refused_before_the_first_claim(store: JobStore) -> None:
    with worker_app.pool() as executor:
        worker = worker_of(store, executor=executor)
        worker.handles("train")(lambda run: None)
        job = store.submit("train", "spam")
        with pytest.raises(InvalidValueError, match="functions of a module") as caught:
            worker.run(until_idle=True)
    assert caught.value.field == "handler"
    assert (ended(store, job).status, ended(store, job).attempts) == (QUEUED, 0)


def test_progress_and_cancels_cross_the_border_of_a_process(store: JobStore) -> None:
    with worker_app.pool() as executor:
        worker = worker_of(store, executor=executor)
        worker.handles("train")(worker_app.until_cancelled)
        job = store.submit("train", "spam")
        thread = threading.Thread(target=worker.run, kwargs={"until_idle": True})
        thread.start()
        until(lambda: ended(store, job).progress == 10)
        store.cancel(job.id)
        thread.join(60)
        assert not thread.is_alive()
    assert ended(store, job).status is CANCELLED
    assert leases(store) == 0


def test_a_process_that_dies_puts_its_job_back_and_ends_the_worker_with_the_reason(store: JobStore) -> None:
    with worker_app.pool() as executor:
        worker = worker_of(store, executor=executor)
        worker.handles("train")(worker_app.dies)
        job = store.submit("train", "spam")
        with pytest.raises(BrokenExecutor):
            worker.run(until_idle=True)
    job = ended(store, job)
    assert (job.status, job.attempts) == (QUEUED, 1)
    with worker_app.pool() as executor:
        worker = worker_of(store, executor=executor, max_attempts=2)
        worker.handles("train")(worker_app.dies)
        with pytest.raises(BrokenExecutor):
            worker.run(until_idle=True)
    job = ended(store, job)
    assert (job.status, job.attempts) == (FAILED, 2)
    assert "2 attempts" in str(job.error_message)


def test_a_broken_executor_costs_a_job_one_attempt_and_no_more(store: JobStore) -> None:
    class Broken(ThreadPoolExecutor):
        def submit(self, *args: Any, **kw: Any) -> Any:
            raise BrokenExecutor("all processes are gone")

    with Broken() as executor:
        for attempts in range(1, 4):
            worker = worker_of(store, executor=executor, concurrency=3)
            worker.handles("train")(lambda run: None)
            job = next(iter(store.find()), None) or store.submit("train", "spam")
            with pytest.raises(BrokenExecutor):
                worker.run(until_idle=True)
            job = ended(store, job)
            assert (job.status, job.attempts) == (QUEUED, attempts)


def test_a_process_that_gave_up_a_lease_that_is_ours_does_not_lose_the_job(store: JobStore) -> None:
    class Cut(Executor):  # its process could not reach the database for as long as a lease; the worker could
        def submit(self, *_args: Any, **_kw: Any) -> Any:
            future: Future[Any] = Future()
            future.set_result(RemoteResult(None))
            return future

    worker = worker_of(store, executor=Cut(), max_attempts=2)
    worker.handles("train")(lambda run: None)
    job = store.submit("train", "spam")
    assert worker.run(until_idle=True).jobs == {"requeued": 1, "failed": 1}
    job = ended(store, job)
    assert (job.status, job.attempts) == (FAILED, 2)
    assert "gave up after 2 attempts" in str(job.error_message)
    assert leases(store) == 0


# ------------------------------------------------------------------------------------------------------------------ logs


def test_each_job_is_one_line_of_log_with_its_data(store: JobStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mljobs.worker")
    worker = worker_of(store, name="w7")
    worker.handles("train")(partial(_fail, "why\nand where"))
    worker.handles("backfill")(lambda run: None)
    bad, good = store.submit("train", "spam"), store.submit("backfill", "embeddings_v2")
    worker.run(until_idle=True)
    records = {record.job_id: record for record in caplog.records if hasattr(record, "job_id")}
    assert set(records) == {str(bad.id), str(good.id)}
    line = records[str(bad.id)]
    assert line.levelname == "WARNING"
    assert f"job {bad.id} train spam failed after" in line.getMessage()
    assert "RuntimeError: why" in line.getMessage()
    assert "\n" not in line.getMessage()
    assert (line.outcome, line.attempt, line.kind, line.target) == ("failed", 1, "train", "spam")
    assert records[str(good.id)].levelname == "INFO"
    assert [record.getMessage() for record in caplog.records if "w7" in record.getMessage()] == [
        "worker w7 begins: train, backfill, 1 at a time",
        "worker w7 ends: 1 completed, 1 failed",
    ]


# -------------------------------------------------------------------------------------------- a database that goes away


class Flaky(JobStore):
    """A store whose database goes away when told."""

    away = False
    lose_answer = False

    def finish_and_claim(self, *args: Any, **kw: Any) -> Any:
        self._leave()
        answer = super().finish_and_claim(*args, **kw)
        self._forget(args)
        return answer

    def finish_many(self, *args: Any, **kw: Any) -> Any:
        self._leave()
        answer = super().finish_many(*args, **kw)
        self._forget(args)
        return answer

    def _leave(self) -> None:
        if self.away:
            raise OperationalError("SELECT 1", None, Exception("the server went away"))

    def _forget(self, args: Any) -> None:
        if args and args[0] and self.lose_answer:
            self.lose_answer = False
            raise OperationalError("COMMIT", None, Exception("the connection broke"))


def test_a_finish_waits_for_the_database_and_is_recorded(url: str) -> None:
    with Flaky(url) as store:
        worker = worker_of(store)

        @worker.handles("train")
        def train(run: Run) -> dict[str, int]:
            store.away = True
            threading.Timer(0.3, setattr, (store, "away", False)).start()
            return {"n": 1}

        job = store.submit("train", "spam")
        assert worker.run(until_idle=True).jobs == {"completed": 1}
        assert ended(store, job).metrics == {"n": 1}


def test_a_second_stop_is_heard_while_the_database_is_away(url: str) -> None:
    with Flaky(url) as store:
        worker = worker_of(store, grace=3600)
        ending = threading.Event()

        @worker.handles("train")
        def train(run: Run) -> None:
            store.away = True
            worker.stop()
            ending.set()

        job = store.submit("train", "spam")
        thread = threading.Thread(target=worker.run)
        thread.start()
        assert ending.wait(60)
        worker.stop()
        thread.join(60)
        assert not thread.is_alive()
        assert ended(store, job).status is RUNNING  # until its lease ends


def test_a_finish_whose_answer_was_lost_is_counted_once(url: str) -> None:
    with Flaky(url) as store:
        worker = worker_of(store)

        @worker.handles("train", retries=1, backoff=0)
        def train(run: Run) -> dict[str, int]:
            store.lose_answer = True
            return {"n": 1}

        job = store.submit("train", "spam")
        assert worker.run(until_idle=True).jobs == {"completed": 1}
        assert ended(store, job).metrics == {"n": 1}
        with pytest.raises(TerminalStateError):
            store.claim_one(job.id, worker="w")
        assert list(store.find(status="queued")) == []


def test_a_finish_whose_answer_was_lost_is_looked_up_until_the_database_answers(url: str) -> None:
    class FlakyTwice(Flaky):
        looks = 0

        def get(self, *args: Any, **kw: Any) -> Any:
            self.looks += 1
            if self.looks == 1:
                raise OperationalError("SELECT 1", None, Exception("the server went away again"))
            return super().get(*args, **kw)

    with FlakyTwice(url) as store:
        worker = worker_of(store)

        @worker.handles("train")
        def train(run: Run) -> dict[str, int]:
            store.lose_answer = True
            return {"n": 1}

        job = store.submit("train", "spam")
        assert worker.run(until_idle=True).jobs == {"completed": 1}
        assert store.looks >= 2
        assert ended(store, job).metrics == {"n": 1}
        assert leases(store) == 0


def test_a_table_that_is_gone_is_not_waited_for(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        worker = worker_of(store)

        @worker.handles("train")
        def train(run: Run) -> None:
            with store.engine.begin() as connection:
                connection.exec_driver_sql("DROP TABLE ml_job_leases")

        store.submit("train", "spam")
        with pytest.raises(OperationalError, match="no such table"):
            worker.run(until_idle=True)


def test_an_outcome_is_dropped_when_the_lease_is_gone_meanwhile(url: str) -> None:
    with Flaky(url) as store:
        worker = worker_of(store)

        @worker.handles("train")
        def train(run: Run) -> dict[str, int]:
            run.mark_lost()
            return {"n": 1}

        job = store.submit("train", "spam")
        claim_lost = worker.run(until_idle=True)
        assert claim_lost.jobs == {"lost": 1}
        assert ended(store, job).status is RUNNING  # its lease still stands; a rescue decides
        expire(store)
        assert store.rescue().requeued == [job.id]
        assert store.claim_one(job.id, worker="next").job.attempts == 2


# ------------------------------------------------------------------------------------------------- what a handler is told


def test_a_handler_sees_that_its_worker_stops_and_may_still_end_well(store: JobStore) -> None:
    worker = worker_of(store, grace=60)
    seen: list[bool] = []

    def train(run: Run) -> dict[str, str]:
        seen.append(run.stopping)
        worker.stop()
        while not run.stopping:
            run.sleep(0.01)
        return {"saved": "checkpoint"}

    worker.handles("train")(train)
    job = store.submit("train", "spam")
    assert worker.run().jobs == {"completed": 1}
    assert (seen, store.get(job).metrics) == ([False], {"saved": "checkpoint"})


def test_a_coroutine_sleeps_without_its_loop_and_wakes_when_it_is_cancelled(store: JobStore) -> None:
    worker = worker_of(store, lease=1)
    asleep = threading.Event()

    async def backfill(run: Run) -> None:
        with pytest.raises(InvalidValueError, match=r"await run\.sleep_async") as caught:
            run.sleep(1)
        assert caught.value.field == "seconds"
        asleep.set()
        await run.sleep_async(3600)

    worker.handles("backfill")(backfill)
    job = store.submit("backfill", "spam")
    thread = threading.Thread(target=lambda: asleep.wait(60) and store.cancel(job))
    thread.start()
    assert worker.run(until_idle=True).jobs == {"cancelled": 1}
    thread.join()


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "1", True, None])
def test_a_sleep_takes_seconds(store: JobStore, seconds: Any) -> None:
    store.submit("train", "spam")
    run = Run(store.claim(worker="w")[0])
    for sleep in (run.sleep, lambda seconds: asyncio.run(run.sleep_async(seconds))):
        with pytest.raises(InvalidValueError) as caught:
            sleep(seconds)
        assert caught.value.field == "seconds"


@pytest.mark.parametrize("percent", ["x", None, float("nan"), float("inf")])
def test_progress_takes_a_number(store: JobStore, percent: Any) -> None:
    store.submit("train", "spam")
    run = Run(store.claim(worker="w")[0])
    with pytest.raises(InvalidValueError) as caught:
        run.progress(percent)
    assert caught.value.field == "percent"


def test_a_backoff_that_takes_no_number_is_refused_at_once(store: JobStore) -> None:
    with pytest.raises(InvalidValueError, match="which retry it is"):
        worker_of(store).handles("train", retries=1, backoff=lambda: 1)(lambda run: None)  # type: ignore[misc,arg-type]


def test_a_rescue_names_the_jobs(store: JobStore, caplog: pytest.LogCaptureFixture) -> None:
    job = store.submit("train", "spam")
    store.claim(worker="w", lease=0.001)
    worker = worker_of(store)
    worker.handles("train")(lambda run: worker.stop())
    with caplog.at_level(logging.WARNING, "mljobs.worker"):
        assert worker.run().jobs == {"completed": 1}
    (line,) = [record for record in caplog.records if "fell silent" in record.getMessage()]
    assert str(job.id) in line.getMessage()
    assert line.requeued == [str(job.id)]  # type: ignore[attr-defined]
