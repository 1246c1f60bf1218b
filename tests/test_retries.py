"""Retries: by hand, one at a time and with another spec; by a worker, where the failure is worth one; their lineage."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy.orm import Session

from mljobs import (
    GiveUp,
    InvalidTransitionError,
    InvalidValueError,
    JobStore,
    MlJob,
    MlJobStatus,
    Worker,
    jobs,
)
from mljobs.store._run import Run
from tests import worker_app
from tests.backends import Backend
from tests.cases import case

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = MlJobStatus


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as store:
        yield store


def finished(store: Any, status: str = "failed", **values: Any) -> MlJob:
    job: MlJob = store.submit("train", "spam", {"lr": 0.1}, **values)
    if status == "cancelled":
        store.cancel(job.id)
        return job
    (claim,) = store.claim(worker="w")
    if status == "failed":
        store.fail(claim, "no")
    else:
        store.complete(claim, {"auc": 0.9})
    return job


# ------------------------------------------------------------------------------------------------------------ by hand


def test_a_retry_may_have_another_spec_and_keeps_the_rest(backend: Backend) -> None:
    store = backend.store()
    job = finished(store, priority=3, exclusive=True)
    again = store.retry(job.id, spec={"lr": 0.01})
    assert (again.spec, again.priority, again.exclusive, again.retry_of) == ({"lr": 0.01}, 3, True, job.id)
    assert store.get(job.id).spec == {"lr": 0.1}


def test_a_job_has_one_live_retry_unless_another_is_asked_for(backend: Backend) -> None:
    store = backend.store()
    job = finished(store)
    first = store.retry(job.id)
    assert store.retry(job.id).id == first.id
    store.claim_one(first.id, worker="w")
    assert store.retry(job.id).id == first.id
    second = store.retry(job.id, another=True)
    assert second.id != first.id
    store.cancel(first.id)
    store.cancel(second.id)
    assert store.retry(job.id).id not in (first.id, second.id)


def test_a_live_retry_with_another_spec_is_not_taken_for_the_one_that_was_asked_for(store: JobStore) -> None:
    job = finished(store)
    first = store.retry(job.id, spec={"lr": 0.01})
    assert store.retry(job.id, spec={"lr": 0.01}).id == first.id
    with pytest.raises(InvalidValueError, match="another=True"):
        store.retry(job.id, spec={"lr": 0.2})
    assert store.retry(job.id, spec={"lr": 0.2}, another=True).spec == {"lr": 0.2}


def test_two_that_retry_at_once_get_one_retry(store: JobStore) -> None:
    job = finished(store)
    barrier, ids = threading.Barrier(4), []

    def retry() -> None:
        barrier.wait(60)
        ids.append(store.retry(job.id).id)

    threads = [threading.Thread(target=retry) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ids) == 4
    assert len(set(ids)) == 1


def test_a_completed_job_is_only_done_again_when_that_is_said(backend: Backend) -> None:
    store = backend.store()
    job = finished(store, "completed")
    with pytest.raises(InvalidTransitionError, match="again=True") as caught:
        store.retry(job.id)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    again = store.retry(job.id, again=True)
    assert (again.status, again.metrics, again.retry_of) == (QUEUED, None, job.id)
    assert store.retry(finished(store, "cancelled").id).status is QUEUED


def test_a_retry_in_a_session_sees_what_the_session_has_retried(store: JobStore) -> None:
    job = finished(store)
    with Session(store.engine) as session, session.begin():
        first = jobs.retry(session, job.id)
        assert jobs.retry(session, job.id) is first


def test_lineage_tells_what_came_before_and_after(backend: Backend) -> None:
    store = backend.store()
    first = finished(store)
    second = store.retry(first.id)
    store.cancel(second.id)
    third, other = store.retry(second.id), store.retry(second.id, another=True)
    store.cancel(third.id)
    fourth = store.retry(third.id)
    everything = [first.id, second.id, third.id, other.id, fourth.id]
    assert [job.id for job in store.lineage(second.id)] == everything
    assert [job.id for job in store.lineage(first.id)] == everything
    assert [job.id for job in store.lineage(third.id)] == [first.id, second.id, third.id, fourth.id]
    assert [job.id for job in store.lineage(other.id)] == [first.id, second.id, other.id]


# -------------------------------------------------------------------------------------------------------- by a worker


def worker_of(store: Any, **options: Any) -> Worker:
    return Worker(store, **{"poll": 0.05, "grace": 20, **options})


POLICIES: list[tuple[dict[str, Any], type[Exception], int]] = [
    ({}, ValueError, 3),
    ({"retry_on": OSError}, ValueError, 1),
    ({"retry_on": OSError}, ConnectionError, 3),
    ({"retry_on": [OSError, KeyError]}, KeyError, 3),
    ({"give_up_on": (ValueError, TypeError)}, ValueError, 1),
    ({"give_up_on": ValueError}, OSError, 3),
    ({"retry_on": OSError, "give_up_on": ConnectionError}, ConnectionError, 1),
    ({}, GiveUp, 1),
    ({"retry_on": Exception}, GiveUp, 1),
]


@pytest.mark.parametrize("coroutine", [False, True])
def test_only_a_failure_that_is_worth_it_is_retried(store: JobStore, *, coroutine: bool) -> None:
    for policy, raised, tries in POLICIES:
        worker = worker_of(store)

        def train(_run: Run, raised: type[Exception] = raised) -> None:
            raise raised("C must be positive")

        async def train_async(_run: Run, raised: type[Exception] = raised) -> None:
            await asyncio.sleep(0)
            raise raised("C must be positive")

        with case(policy, raised):
            worker.handles("train", retries=2, backoff=0, **policy)(train_async if coroutine else train)
            store.submit("train", "spam")
            tally = worker.run(until_idle=True)
            assert (tally.jobs, tally.retried) == ({"failed": tries}, tries - 1)
            assert all("C must be positive" in str(job.error_message) for job in store.find())


def test_metrics_that_json_cannot_hold_are_a_failure_like_any_other(store: JobStore) -> None:
    for policy in [{}, {"retry_on": OSError}]:
        with case(policy):
            worker = worker_of(store)
            worker.handles("train", retries=1, backoff=0, **policy)(lambda _run: {"loss": float("nan")})
            store.submit("train", "spam")
            assert worker.run(until_idle=True).retried == (0 if policy else 1)


def test_a_process_of_a_pool_says_whether_its_failure_is_worth_a_retry(store: JobStore) -> None:
    with worker_app.pool() as executor:
        worker = worker_of(store, executor=executor)
        worker.handles("train", retries=1, backoff=0, give_up_on=LookupError)(worker_app.raises_what_the_spec_says)
        for error in ("KeyError", "GiveUp", "OSError"):
            store.submit("train", error, {"error": error})
        tally = worker.run(until_idle=True)
    assert (tally.jobs, tally.retried) == ({"failed": 4}, 1)
    assert {job.target_name for job in store.find() if job.retry_of is not None} == {"OSError"}


def test_what_is_no_exception_class_is_refused_as_a_policy(store: JobStore) -> None:
    for value in ["ValueError", 3, [int], ValueError("x")]:
        for field in ["retry_on", "give_up_on"]:
            with case(value, field):
                with pytest.raises(InvalidValueError) as caught:
                    worker_of(store).handles("train", **{field: value})
                assert caught.value.field == field
