"""Work run by hand: the lease is kept, progress gets through, and the block's end is the job's end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from mljobs import InvalidValueError, JobCancelled, JobStore, LeaseLostError, MlJobStatus, WaitTimeout
from mljobs.jobs import Claim, Outcome
from mljobs.store._keeper import Keeper
from mljobs.store._recording import record_outcome
from mljobs.store._run import Run
from tests.backends import Backend
from tests.leases import expire_leases


@contextmanager
def _entered(backend: Backend, store: Any, job: Any, **options: Any) -> Any:
    """Enter ``store.running`` as this backend does."""
    if not backend.is_async:
        with store.running(job, **options) as run:
            yield run
        return
    manager = store._target.running(job, **options)
    run = backend.wait(manager.__aenter__())
    try:
        yield run
    except BaseException as error:
        if not backend.wait(manager.__aexit__(type(error), error, error.__traceback__)):
            raise
    else:
        backend.wait(manager.__aexit__(None, None, None))


def test_leaving_the_block_completes_the_job_with_its_metrics(backend: Backend, store: Any) -> None:
    job = store.submit("train", "spam", {"epochs": 3})
    with _entered(backend, store, job) as run:
        assert store.get(job.id).status is MlJobStatus.RUNNING
        assert (run.spec, run.attempt, run.job.id) == ({"epochs": 3}, 1, job.id)
        for _ in run.track(range(3)):
            pass
        run.metrics = {"f1": 0.9}
    job = store.get(job.id)
    assert (job.status, job.progress, job.metrics) == (MlJobStatus.COMPLETED, 100, {"f1": 0.9})


def test_an_exception_fails_the_job_with_its_reason_and_goes_on(backend: Backend, store: Any) -> None:
    job = store.submit("train", "spam")
    with pytest.raises(ZeroDivisionError), _entered(backend, store, job) as run:
        run.progress(40)
        _ = 1 / 0
    job = store.get(job.id)
    assert (job.status, job.progress) == (MlJobStatus.FAILED, 40)
    assert job.error_message.startswith("ZeroDivisionError: division by zero\n")
    assert "test_running.py" in job.error_message
    assert "store.py" not in job.error_message


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_only_asks_to_stop_puts_the_job_back(sqlite_url: str, error: type[BaseException]) -> None:
    with JobStore(sqlite_url) as store:
        job = store.submit("train", "spam")
        with pytest.raises(error), store.running(job):
            raise error
        job = store.get(job.id)
        assert (job.status, job.attempts) == (MlJobStatus.QUEUED, 1)


def test_metrics_that_json_cannot_hold_fail_the_job(backend: Backend, store: Any) -> None:
    job = store.submit("train", "spam")
    with pytest.raises(InvalidValueError), _entered(backend, store, job) as run:
        run.metrics = {"loss": float("nan")}
    assert store.get(job.id).status is MlJobStatus.FAILED


def test_a_cancel_stops_the_work_at_its_next_check(backend: Backend, store: Any) -> None:
    job = store.submit("train", "spam", exclusive=True)
    reached: list[int] = []
    with pytest.raises(JobCancelled), _entered(backend, store, job, lease=0.3) as run:
        store.cancel(job.id)
        with pytest.raises(JobCancelled):
            run.sleep(30)  # the keeper brings it
        reached += run.track(range(5))
    assert reached == []
    assert store.get(job.id).status is MlJobStatus.CANCELLED
    store.submit("train", "spam", exclusive=True)
    assert len(store.claim(worker="next")) == 1  # the target is free at once


def test_a_cancel_that_the_handler_did_not_check_for_is_raised_at_the_end(backend: Backend, store: Any) -> None:
    job = store.submit("train", "spam")
    with pytest.raises(JobCancelled), _entered(backend, store, job):
        store.cancel(job.id)
    assert store.get(job.id).status is MlJobStatus.CANCELLED


def test_a_lost_lease_is_an_error_and_nothing_is_written(backend: Backend, store: Any) -> None:
    job = store.submit("train", "spam")
    with pytest.raises(LeaseLostError), _entered(backend, store, job) as run:
        expire_leases(backend.outside)
        store.rescue()
        (claim,) = store.claim(worker="quick")
        store.complete(claim, {"quick": True})
        run.metrics = {"late": True}
    assert store.get(job.id).metrics == {"quick": True}


def test_the_lease_is_kept_while_the_work_blocks(backend: Backend, store: Any) -> None:
    job = store.submit("train", "spam")
    with _entered(backend, store, job, lease=0.5):  # noqa: SIM117 - the reason stands between
        # Nothing of ours runs in this thread, the event loop's own, until the lease has been renewed.
        with backend.outside.connect() as connection:
            first = connection.exec_driver_sql("SELECT expires_at FROM ml_job_leases").scalar_one()
            pause = threading.Event()
            for _ in range(200):
                connection.rollback()
                if connection.exec_driver_sql("SELECT expires_at FROM ml_job_leases").scalar_one() > first:
                    break
                pause.wait(0.05)
            else:
                pytest.fail("the lease was not renewed")


def test_a_database_in_memory_is_refused() -> None:
    with JobStore("sqlite://") as store, pytest.raises(InvalidValueError, match="memory"), store.running(1):
        pass


def test_async_items_are_tracked_too(sqlite_url: str) -> None:
    async def items() -> AsyncIterator[int]:
        for number in range(4):
            yield number

    async def work(run: Run) -> list[int]:
        return [number async for number in run.track(items(), total=4)]

    with JobStore(sqlite_url) as store:
        run = Run(_claimed(store))
    assert asyncio.run(work(run)) == [0, 1, 2, 3]
    assert run.take_report(100.0).progress == 100


# ---------------------------------------------------------------------------------- the keeper, on a clock of the test's


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FlakyStore:
    """A store whose database goes away when told."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.away = False
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kw: Any) -> Any:
            self.calls.append(name)
            if self.away:
                raise OperationalError("SELECT 1", None, Exception("the server went away"))
            return getattr(self._store, name)(*args, **kw)

        return call


@pytest.fixture
def flaky(url: str) -> Any:
    with JobStore(url) as store:
        yield FlakyStore(store)


def _claimed(store: Any) -> Claim:
    store.submit("train", "spam")
    claims: list[Claim] = store.claim(worker="w")
    return claims[0]


def test_progress_is_written_once_a_second_and_the_last_value_never_lost(flaky: FlakyStore) -> None:
    clock = Clock()
    claim = _claimed(flaky)
    with Keeper(flaky, 3600, clock) as keeper:
        run = Run(claim)
        keeper._runs.add(run)  # without its thread: the test says when
        flaky.calls.clear()
        for value in range(50):
            run.progress(value)
            keeper.write_reports()
        assert flaky.calls == ["report_many"]
        assert flaky._store.get(claim.job_id).progress == 0
        clock.now += 1
        keeper.write_reports()
        assert flaky._store.get(claim.job_id).progress == 49
        run.progress(60)
        flaky.away = True
        clock.now += 1
        keeper.write_reports()
        flaky.away = False
        keeper.write_reports(run)
        assert flaky._store.get(claim.job_id).progress == 60


def test_a_database_that_is_away_for_a_whole_lease_costs_the_lease(flaky: FlakyStore) -> None:
    clock = Clock()
    claim = _claimed(flaky)
    with Keeper(flaky, 60, clock) as keeper:
        run = Run(claim)
        run.until = clock() + 60
        keeper._runs.add(run)
        flaky.away = True
        clock.now += 59
        keeper.renew()
        assert not run.lost
        clock.now += 2
        keeper.renew()
        assert run.lost
        with pytest.raises(LeaseLostError):
            run.progress(5)


def test_a_database_that_comes_back_in_time_costs_nothing(flaky: FlakyStore) -> None:
    clock = Clock()
    claim = _claimed(flaky)
    with Keeper(flaky, 60, clock) as keeper:
        run = Run(claim)
        run.until = clock() + 60
        keeper._runs.add(run)
        for away in (True, False, True):
            flaky.away = away
            clock.now += 40
            keeper.renew()
        assert not run.lost


def test_a_process_that_stood_still_for_a_lease_looks_whether_it_is_its_own_still(flaky: FlakyStore) -> None:
    clock = Clock()
    claim = _claimed(flaky)
    with Keeper(flaky, 60, clock) as keeper:
        run = Run(claim)
        run.until = clock() + 60
        keeper._runs.add(run)
        flaky.calls.clear()
        clock.now += 59
        keeper.catch_up()
        assert flaky.calls == []
        clock.now += 2
        keeper.catch_up()
        assert flaky.calls == ["renew"]
        assert not run.lost
        assert not keeper.overdue(run)


def test_a_finish_is_tried_until_it_is_recorded(flaky: FlakyStore) -> None:
    claim = _claimed(flaky)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        flaky.away = len(pauses) < 4

    flaky.away = True
    record_outcome(flaky, Run(claim), Outcome.completed(claim, {"f1": 1}), pause)
    assert pauses == [0.05, 0.1, 0.2, 0.4]
    assert flaky._store.get(claim.job_id).metrics == {"f1": 1}


def test_a_finish_whose_answer_was_lost_is_known_to_stand(flaky: FlakyStore) -> None:
    claim = _claimed(flaky)

    class Deaf(FlakyStore):
        def finish_many(self, outcomes: Any) -> Any:
            answer = self._store.finish_many(outcomes)
            if not self.calls:
                self.calls.append("lost")
                raise OperationalError("COMMIT", None, Exception("the connection broke"))
            return answer

    record_outcome(Deaf(flaky._store), Run(claim), Outcome.completed(claim), lambda _: None)
    assert flaky._store.get(claim.job_id).status is MlJobStatus.COMPLETED


def test_a_finish_ends_when_the_lease_is_gone(flaky: FlakyStore) -> None:
    claim = _claimed(flaky)
    run = Run(claim)
    run.mark_lost()
    flaky.away = True
    with pytest.raises(LeaseLostError):
        record_outcome(flaky, run, Outcome.completed(claim), lambda _: None)


# ------------------------------------------------------------------------------------------------------- wait, watch


def test_wait_returns_a_finished_job_and_times_out_on_others(store: Any) -> None:
    job = store.submit("train", "spam")
    with pytest.raises(WaitTimeout) as caught:
        store.wait(job.id, timeout=0)
    assert caught.value.status is MlJobStatus.QUEUED
    store.cancel(job.id)
    assert store.wait(job, timeout=30).status is MlJobStatus.CANCELLED
    with pytest.raises(InvalidValueError):
        store.wait(job, timeout=-1)


def test_wait_wakes_when_somebody_else_finishes_the_job(backend: Backend, store: Any) -> None:
    job = store.submit("train", "spam")

    def finish() -> None:
        with backend.outside.begin() as connection:
            connection.exec_driver_sql("UPDATE ml_jobs SET status = 'cancelled'")

    timer = threading.Timer(0.2, finish)
    timer.start()
    assert store.wait(job.id, timeout=60, poll=0.2).status is MlJobStatus.CANCELLED
    timer.join()


def test_waiting_works_with_every_notification_lost(backend: Backend, store: Any) -> None:
    if backend.dialect == "postgresql":
        with backend.outside.begin() as connection:
            connection.exec_driver_sql("DROP TRIGGER ml_jobs_wake_update ON ml_jobs")
    test_wait_wakes_when_somebody_else_finishes_the_job(backend, store)


def test_watch_yields_what_changes_and_ends_in_time(backend: Backend, store: Any) -> None:
    old = store.submit("train", "old")
    seen: list[tuple[str, str]] = []
    over = threading.Event()

    def act() -> None:
        while not over.wait(0.05):  # until the watch, which begins with its first look, has seen it
            with backend.outside.begin() as connection:
                connection.exec_driver_sql("UPDATE ml_jobs SET status = 'running', progress = progress + 1")

    actor = threading.Thread(target=act)
    actor.start()
    if backend.is_async:

        async def collect() -> None:
            async for job in store._target.watch(timeout=20, poll=0.05):
                _collect(job)
                if len(seen) == 1:
                    return

        def _collect(job: Any) -> None:
            seen.append((job.target_name, job.status.token))

        backend.wait(collect())
    else:
        watch = store.watch(timeout=20, poll=0.05)
        for job in watch:
            seen.append((job.target_name, job.status.token))
            break
        watch.close()
    over.set()
    actor.join()
    assert seen == [(old.target_name, "running")]


def test_a_plain_session_add_wakes_a_listener(postgres_url: str) -> None:
    from sqlalchemy.orm import Session

    from mljobs import MlJob
    from mljobs.db._wake import ChangeListener

    with JobStore(postgres_url) as store, ChangeListener(store.engine, MlJob.__table__, workers=True) as listener:
        listener.wait(0)  # begins to listen

        def add() -> None:
            with Session(store.engine) as session, session.begin():
                session.add(MlJob(kind="train", target_name="spam"))

        timer = threading.Timer(0.1, add)
        timer.start()
        woken = threading.Event()

        def sleep() -> None:
            listener.wait(300)
            woken.set()

        sleeping = threading.Thread(target=sleep)
        sleeping.start()
        assert woken.wait(60)
        sleeping.join()
        timer.join()


def test_no_notification_is_sent_while_nothing_waits(postgres_url: str) -> None:
    import psycopg

    with JobStore(postgres_url) as store:
        address = postgres_url.replace("+psycopg", "")
        with psycopg.connect(address, autocommit=True) as ear:
            ear.execute("LISTEN mljobs")
            store.submit("train", "spam")
            ear.execute("SELECT 1")
            assert list(ear.notifies(timeout=0.2)) == []
