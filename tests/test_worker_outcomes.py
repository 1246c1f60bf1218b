"""Workers: retries, cancels, lost leases, and what a stop does to running jobs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from mljobs import (
    InvalidValueError,
    JobStore,
    LeaseLostError,
    MlJobStatus,
    exponential,
)
from mljobs.store._run import Run
from mljobs.worker import _prefetching
from tests.leases import count_leases, expire_leases
from tests.waiting import until
from tests.workers import ended, fail, worker_of

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = MlJobStatus


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as store:
        yield store


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
    worker.handles("train", retries=1, backoff=backoff)(partial(fail, "no"))
    store.submit("train", "spam")
    worker.run(until_idle=True)
    (retry,) = [job for job in store.find() if job.status is QUEUED]
    assert asked == [1]
    assert retry.run_after is not None
    assert 3500 < (retry.run_after - retry.created_at).total_seconds() <= 3601


def test_a_failure_with_a_retry_is_recorded_before_an_idle_worker_sleeps(store: JobStore) -> None:
    worker = worker_of(store, poll=3600)
    worker.handles("train", retries=1, backoff=3600)(partial(fail, "no"))
    job = store.submit("train", "spam")
    thread = threading.Thread(target=worker.run)
    thread.start()
    until(lambda: ended(store, job).status is FAILED)
    worker.stop()
    thread.join()


def test_a_retry_that_cannot_be_submitted_leaves_the_first_failed(store: JobStore) -> None:
    with store.engine.begin() as connection:
        connection.exec_driver_sql("CREATE UNIQUE INDEX host_once ON ml_jobs (target_name)")
    _fails_without_a_retry(store)


def _fails_without_a_retry(store: JobStore) -> None:
    worker = worker_of(store)
    worker.handles("train", retries=3, backoff=0)(partial(fail, "the reason"))
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

    worker.handles("train", retries=3, backoff=backoff)(partial(fail, "the reason"))
    job = store.submit("train", "spam")
    assert worker.run(until_idle=True).retried == 0
    assert ended(store, job).status is FAILED


def test_exponential_grows_to_its_maximum_with_jitter() -> None:
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
    assert count_leases(store.engine) == 0


def test_a_cancel_that_no_handler_asked_for_drops_the_result_too(store: JobStore) -> None:
    worker = worker_of(store)

    @worker.handles("train")
    def train(run: Run) -> dict[str, int]:
        store.cancel(run.job.id)
        return {"late": 1}

    job = store.submit("train", "spam")
    assert worker.run(until_idle=True).jobs == {"cancelled": 1}
    assert ended(store, job).metrics is None
    assert count_leases(store.engine) == 0


def test_a_lost_lease_drops_the_result_and_the_worker_goes_on(store: JobStore) -> None:
    worker = worker_of(store)
    tokens: list[int] = []

    @worker.handles("train")
    def train(run: Run) -> dict[str, int]:
        if run.job.target_name == "spam":
            tokens.append(run.claim.token)
            if len(tokens) == 1:  # as if this process had stood still, and another had taken over and finished
                expire_leases(store.engine)
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
        expire_leases(store.engine)
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
    assert count_leases(store.engine) == 0
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
        worker.handles("train", retries=1, backoff=0)(partial(fail, "no"))
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


def test_what_was_claimed_ahead_and_waits_long_is_put_back_for_others(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_prefetching, "STALE_SECONDS", 0.5)
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
