"""Concurrency with real transactions and real processes: each job once, each race one winner."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from itertools import combinations_with_replacement
from typing import Any

from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import (
    InvalidTransitionError,
    JobNotFound,
    JobStore,
    LeaseLostError,
    MlJob,
    MlJobsError,
    MlJobStatus,
    TerminalStateError,
    jobs,
    testing,
)
from tests.cases import case
from tests.fork_server import forkserver
from tests.waiting import until_blocked

_JOBS = 160
_SECONDS = 60


def _work_off(url: str, name: str, barrier: Any, results: Any) -> None:
    done = []
    with JobStore(url) as store:
        barrier.wait(_SECONDS)
        while claims := store.claim(worker=name, limit=7):
            answers = store.complete_many([(claim, {"by": name}) for claim in claims])
            done += [
                (claim.job_id.hex, claim.token, answer is None) for claim, answer in zip(claims, answers, strict=True)
            ]
    results.put(done)


def test_processes_claim_each_job_exactly_once(url: str) -> None:
    forks = forkserver()
    barrier, results = forks.Barrier(4), forks.Queue()
    with JobStore(url) as store:
        store.submit_many([("train", f"t{number % 50}", {}) for number in range(_JOBS)])
        processes = [forks.Process(target=_work_off, args=(url, f"w{number}", barrier, results)) for number in range(4)]
        for process in processes:
            process.start()
        done = [entry for _ in processes for entry in results.get(timeout=_SECONDS)]
        for process in processes:
            process.join(_SECONDS)
        assert len(done) == len({job_id for job_id, _, _ in done}) == _JOBS
        assert all(recorded for _, _, recorded in done)
        counts = store.counts()
        assert counts["train", "completed"] == counts.total() == _JOBS


def _run_exclusive(url: str, barrier: Any, results: Any) -> None:
    most = []
    with JobStore(url) as store:
        barrier.wait(_SECONDS)
        for _ in range(1000):
            claims = store.claim(worker="w", limit=3)
            if not claims:
                if not store.find(status="queued", limit=1):
                    break
                continue
            running = Counter(job.target_name for job in store.find(status="running", limit=100))
            most.append(max(running.values()))
            store.complete_many([(claim, None) for claim in claims])
    results.put(max(most, default=0))


def test_an_exclusive_target_never_runs_twice_however_many_claim(url: str) -> None:
    forks = forkserver()
    barrier, results = forks.Barrier(3), forks.Queue()
    with JobStore(url) as store:
        store.submit_many([MlJob(kind="train", target_name=f"t{number % 3}", exclusive=True) for number in range(60)])
        processes = [forks.Process(target=_run_exclusive, args=(url, barrier, results)) for _ in range(3)]
        for process in processes:
            process.start()
        assert [results.get(timeout=_SECONDS) for _ in processes] <= [1, 1, 1]
        for process in processes:
            process.join(_SECONDS)
        assert store.counts()["train", "completed"] == 60


def test_exclusivity_holds_between_two_claims_that_cannot_see_each_other(postgres_url: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    with Session(engine) as session, session.begin():
        session.add_all([MlJob(kind="train", target_name="spam", exclusive=True) for _ in range(2)])
    found: list[Any] = []
    with engine.connect() as first, engine.connect() as second:
        assert len(jobs.claim(first, worker="a")) == 1
        blocked = threading.Thread(target=lambda: found.append(jobs.claim(second, worker="b")))
        blocked.start()
        until_blocked(engine)
        first.commit()
        blocked.join(_SECONDS)
        second.commit()
    assert found == [[]]
    engine.dispose()


def test_two_that_submit_unless_active_at_once_make_one_job(url: str) -> None:
    with JobStore(url) as store:
        barrier, found = threading.Barrier(6), []

        def submit() -> None:
            barrier.wait(_SECONDS)
            found.append(store.submit("train", "spam", unless_active=True).id)

        threads = [threading.Thread(target=submit) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_SECONDS)
        assert len(found) == 6
        assert len(set(found)) == 1
        assert store.counts().total() == 1


# ------------------------------------------------------------------------------------------------- races in pairs

Move = Callable[[Any, Any], Any]

MOVES: dict[str, Move] = {
    "complete": lambda bind, claim: jobs.complete(bind, claim, {"by": "complete"}),
    "fail": lambda bind, claim: jobs.fail(bind, claim, "by fail"),
    "requeue": jobs.requeue,
    "cancel": lambda bind, claim: jobs.cancel(bind, claim.job_id),
    "rescue": lambda bind, claim: jobs.rescue(bind),
    "progress": lambda bind, claim: jobs.set_progress(bind, claim, 55),
    "renew": lambda bind, claim: jobs.renew(bind, [claim]),
    "prune": lambda bind, claim: jobs.prune(bind, older_than=timedelta(0)),
    "retry": lambda bind, claim: jobs.retry(bind, claim.job_id),
}


def test_of_two_operations_on_one_job_each_is_complete_or_refused(url: str) -> None:
    """The second begins while the first has not committed; afterwards the record is what one order of them gives."""
    with JobStore(url) as store:
        for one, other in combinations_with_replacement(MOVES, 2):
            with case(one, other):
                _race(store, one, other)
                testing.empty(store.engine)


def _race(store: JobStore, one: str, other: str) -> None:
    store.submit("train", "spam")
    (claim,) = store.claim(worker="w", lease=0.001)
    _expire(store.engine)
    results: list[Any] = []
    entered = threading.Event()

    def second() -> None:
        try:
            with store.connect() as bind:
                entered.set()
                results.append(("done", MOVES[other](bind, claim)))
        except MlJobsError as error:
            results.append(("refused", error))

    with store.connect() as bind:
        first = _outcome(lambda: MOVES[one](bind, claim))
        racing = threading.Thread(target=second)
        racing.start()
        assert entered.wait(_SECONDS)
        if store.engine.dialect.name == "postgresql":
            racing.join(0.05)  # time to run into the lock; correct either way
    racing.join(_SECONDS)
    assert len(results) == 1, "one of them hangs"
    _consistent(store, claim, [(one, *first), (other, *results[0])])


def _outcome(act: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "done", act()
    except MlJobsError as error:
        return "refused", error


def _expire(engine: Engine) -> None:
    moment = "0" if engine.dialect.name == "sqlite" else "'2020-01-01'"
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE ml_job_leases SET expires_at = {moment}")


def _consistent(store: JobStore, claim: Any, outcomes: list[tuple[str, str, Any]]) -> None:
    records = {job.id: job for job in store.find()}
    job = records.get(claim.job_id)
    done = {name for name, how, _ in outcomes if how == "done"}
    for name, how, error in outcomes:
        if how == "refused":
            told = InvalidTransitionError if name == "retry" else (LeaseLostError, TerminalStateError, JobNotFound)
            assert isinstance(error, told), name
    if job is None:
        assert "prune" in done
        return
    if job.status is MlJobStatus.COMPLETED:
        assert "complete" in done
        assert (job.metrics, job.progress) == ({"by": "complete"}, 100)
    if job.status is MlJobStatus.FAILED:
        assert "fail" in done
        assert job.error_message == "by fail"
    if job.status is MlJobStatus.CANCELLED:
        assert ("cancel", "done", True) in outcomes
    assert (job.finished_at is not None) is job.status.is_terminal
    if job.status is MlJobStatus.QUEUED:
        assert (job.progress, job.started_at) == (0, None)
    winners = [
        name for name, how, answer in outcomes if how == "done" and (name in ("complete", "fail") or answer is True)
    ]
    assert len(winners) <= 1
    assert job.status.is_terminal is bool(winners)


def test_rescue_leaves_a_job_alone_that_was_renewed_since_it_looked(postgres_url: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    with JobStore(postgres_url) as store:
        store.submit("train", "spam")
        (claim,) = store.claim(worker="w")
        _expire(engine)
        with engine.connect() as renewing, engine.connect() as rescuing:
            assert jobs.renew(renewing, [claim]).held
            assert not jobs.rescue(rescuing)  # skips what is locked
            renewing.commit()
            rescuing.commit()
        assert not store.rescue()
        store.complete(claim)
    engine.dispose()


def test_a_heartbeat_and_a_finish_of_the_same_worker_do_not_deadlock(postgres_url: str) -> None:
    with JobStore(postgres_url) as store:
        store.submit_many([("train", f"t{number}", {}) for number in range(400)])
        claims = store.claim(worker="w", limit=400)
        stop, errors = threading.Event(), []

        def beat() -> None:
            while not stop.is_set():
                try:
                    store.renew(reversed(claims))
                except Exception as error:  # noqa: BLE001 - to be shown
                    errors.append(error)

        beating = threading.Thread(target=beat)
        beating.start()
        for start in range(0, 400, 40):
            assert store.complete_many([(claim, None) for claim in claims[start : start + 40]]) == [None] * 40
        stop.set()
        beating.join(_SECONDS)
        assert errors == []
