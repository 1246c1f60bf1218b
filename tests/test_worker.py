"""Workers: which jobs they run, what handlers are given, what becomes of what these return or raise."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from mljobs import (
    InvalidValueError,
    JobStore,
    MlJob,
    MlJobKind,
    MlJobStatus,
    SchemaError,
    Worker,
)
from mljobs.store._keeper import Keeper
from mljobs.store._run import Run
from mljobs.worker._prefetching import ClaimSettings, Prefetcher
from mljobs.worker._recording import OutcomeWriter
from tests.cases import case
from tests.workers import ended, fail, worker_of

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = MlJobStatus


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as store:
        yield store


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


def test_metrics_that_json_cannot_hold_fail_the_job(store: JobStore) -> None:
    returned: list[Any] = [{1, 2}, float("nan"), {"x": object()}]
    worker = worker_of(store)
    worker.handles("train")(lambda run: returned[run.spec])
    jobs = [store.submit("train", "spam", at) for at in range(len(returned))]
    worker.run(until_idle=True)
    for job, metrics in zip(jobs, returned, strict=True):
        with case(metrics):
            found = ended(store, job)
            assert found.status is FAILED
            assert "metrics" in str(found.error_message)


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


def test_what_only_the_database_refuses_fails_its_job_and_no_other(store: JobStore) -> None:
    worker = worker_of(store, concurrency=1, ahead=10)
    worker.handles("train")(lambda run: run.spec)
    codes = ["check_violation", "object_not_in_prerequisite_state", "external_routine_exception"]
    for code in codes if store.engine.dialect.name == "postgresql" else codes[:1]:
        with case(code):
            jobs = store.submit_many([("train", f"{code} t{number}", {"n": number}) for number in range(20)])
            assert jobs == 20
            trigger(store, code)
            worker.run(until_idle=True)
            by_target = {job.target_name: job for job in store.find(limit=100) if job.target_name.startswith(code)}
            assert by_target[f"{code} t7"].status is FAILED
            assert "refused" in str(by_target[f"{code} t7"].error_message)
            assert sum(job.status is COMPLETED for job in by_target.values()) == 19


def trigger(store: JobStore, code: str) -> None:
    """A host's own rule on its table, that one job's outcome breaks."""
    with store.engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql(
                "CREATE TRIGGER host_rule BEFORE UPDATE ON ml_jobs "
                "WHEN NEW.target_name LIKE '% t7' AND NEW.status = 'completed' BEGIN SELECT RAISE(ABORT, 'not t7'); END"
            )
        else:
            connection.exec_driver_sql(
                "CREATE OR REPLACE FUNCTION host_rule() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN RAISE EXCEPTION 'not t7' USING ERRCODE = '{code}'; END $$"
            )
            connection.exec_driver_sql(
                "CREATE OR REPLACE TRIGGER host_rule BEFORE UPDATE ON ml_jobs FOR EACH ROW "
                "WHEN (right(NEW.target_name, 3) = ' t7' AND NEW.status = 'completed') EXECUTE FUNCTION host_rule()"
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


def test_how_many_are_claimed_ahead_does_not_swing_with_the_length_of_single_claims(store: JobStore) -> None:
    now = 0.0
    settings = ClaimSettings(worker="w", kinds=["train"], lease=60, slots=1, ahead=10_000, poll=1, until_idle=True)
    keeper, writer = Keeper(store, 60), OutcomeWriter(store, Keeper(store, 60))
    prefetcher = Prefetcher(store, settings, keeper=keeper, writer=writer, on_idle=lambda: None, clock=lambda: now)
    ahead = []
    for jobs_ended, seconds in [(1000, 0.2), (60, 0.1)] * 5:
        now += seconds
        prefetcher._ended = jobs_ended
        prefetcher._measure()
        ahead.append(prefetcher._ahead())
    assert min(ahead[1:]) > 800
    assert max(ahead) <= 1250
    numbers = [1]
    for _ in range(30):  # each claim takes as long as it has jobs
        prefetcher._ended, now = numbers[-1], now + 0.002 + numbers[-1] * 0.0002
        numbers.append(prefetcher._number())
    writer.close()
    prefetcher.close()
    assert len(set(numbers[10:])) == 1


# ------------------------------------------------------------------------------------------------------ wrong from the start


def _two(run: Run, other: int) -> None: ...


def _none() -> None: ...


def _generator(run: Run) -> Iterator[int]:
    yield 1


def _of_job(job: MlJob) -> None: ...  # fmt: skip


def test_a_handler_that_cannot_work_is_refused_when_it_is_named(store: JobStore) -> None:
    for function, why in [
        (_two, "one argument"),
        (_none, "one argument"),
        (_generator, "generator"),
        (_of_job, "MlJob"),
        (3, "expected a function"),
        (Run, "expected a function"),
    ]:
        with case(function):
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


def test_whatever_can_be_called_with_a_run_is_a_handler(store: JobStore) -> None:
    for function, metrics in [
        (_Callable(), 1),
        (_AsyncCallable(), 1),
        (partial(_added, 2), 3),
        (partial(partial(_added), 2), 3),
    ]:
        with case(function):
            worker = worker_of(store)
            worker.handles("train")(function)
            job = store.submit("train", "spam")
            worker.run(until_idle=True)
            assert ended(store, job).metrics == metrics


def test_a_policy_out_of_range_is_refused(store: JobStore) -> None:
    for options, field in [
        ({"retries": -1}, "retries"),
        ({"retries": True}, "retries"),
        ({"backoff": -5}, "backoff"),
        ({"backoff": "soon"}, "backoff"),
        ({"backoff": float("inf")}, "backoff"),
        ({"backoff": float("nan")}, "backoff"),
    ]:
        with case(options):
            with pytest.raises(InvalidValueError) as caught:
                worker_of(store).handles("train", **options)(lambda run: None)
            assert caught.value.field == field


def test_a_worker_out_of_range_is_refused(store: JobStore) -> None:
    for options, field in [
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
    ]:
        with case(options):
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


# ------------------------------------------------------------------------------------------------------------------ logs


def test_each_job_is_one_line_of_log_with_its_data(store: JobStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mljobs.worker")
    worker = worker_of(store, name="w7")
    worker.handles("train")(partial(fail, "why\nand where"))
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


def test_a_sleep_takes_seconds(store: JobStore) -> None:
    store.submit("train", "spam")
    run = Run(store.claim(worker="w")[0])
    wrong: list[Any] = [-1, float("nan"), float("inf"), "1", True, None]
    for seconds in wrong:
        for sleep in (run.sleep, lambda seconds: asyncio.run(run.sleep_async(seconds))):
            with case(seconds, sleep):
                with pytest.raises(InvalidValueError) as caught:
                    sleep(seconds)
                assert caught.value.field == "seconds"


def test_progress_takes_a_number(store: JobStore) -> None:
    store.submit("train", "spam")
    run = Run(store.claim(worker="w")[0])
    wrong: list[Any] = ["x", None, float("nan"), float("inf")]
    for percent in wrong:
        with case(percent):
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


def test_a_line_of_log_is_one_line_whatever_the_target_and_the_error_hold(
    store: JobStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mljobs.worker")
    worker = worker_of(store)

    @worker.handles("train")
    def train(_run: Run) -> None:
        raise RuntimeError("begins\x1b[31m " + "x" * 3_000_000 + " ends\nand a second line")

    job = store.submit("train", "spam\n2026-01-01 job ham completed\x1b[2J\u2028")
    worker.run(until_idle=True)
    (line,) = [record for record in caplog.records if hasattr(record, "job_id")]
    message = line.getMessage()
    assert message.isprintable()
    assert r"spam\n2026-01-01 job ham completed\x1b[2J\u2028" in message
    assert r"begins\x1b[31m xxx" in message
    assert " ends" in message
    assert len(message) < 1_500
    assert len(line.error) < 5_000  # type: ignore[attr-defined]
    error = str(ended(store, job).error_message)
    assert error.startswith("RuntimeError: begins")
    assert "characters left out" in error
    assert " ends\nand a second line\n" in error
    assert "in train" in error  # the traceback is not pushed out
    assert len(error) < 5_000


def test_until_empty_waits_for_retries_and_until_idle_does_not(store: JobStore) -> None:
    worker = worker_of(store)

    @worker.handles("train", retries=1, backoff=0.5)
    def train(run: Run) -> int:
        if run.job.retry_of is None:
            raise RuntimeError("the first time")
        return 1

    store.submit("train", "spam")
    other = store.submit("backfill", "nobody handles it")
    assert worker.run(until_idle=True).jobs == {"failed": 1}
    assert worker.run(until_empty=True).jobs == {"completed": 1}
    store.submit("train", "spam")
    assert worker.run(until_empty=True).jobs == {"failed": 1, "completed": 1}
    assert ended(store, other).status is QUEUED
