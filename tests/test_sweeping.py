"""Rescue and prune, through a store, in every backend."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mljobs import (
    InvalidValueError,
    LeaseLostError,
    MlJob,
    MlJobStatus,
)
from tests.backends import Backend
from tests.leases import count_leases, expire_leases

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = MlJobStatus
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


# ----------------------------------------------------------------------------------------------------------- sweeping


def test_rescue_puts_back_and_gives_up_after_the_last_attempt(store: Any, backend: Backend) -> None:
    job = store.submit("train", "spam")
    for attempt in (1, 2):
        (claim,) = store.claim(worker="crashing")
        store.set_progress(claim, 60)
        assert not store.rescue(max_attempts=2)
        expire_leases(backend.outside)
        rescue = store.rescue(max_attempts=2)
        assert (rescue.requeued, rescue.failed) == (([job.id], []) if attempt == 1 else ([], [job.id]))
        job = store.get(job.id)
        if attempt == 1:
            assert (job.status, job.progress, job.started_at) == (QUEUED, 0, None)
    assert (job.status, job.progress) == (FAILED, 60)
    assert job.finished_at is not None
    assert "2 attempts" in job.error_message
    assert "worker crashing" in job.error_message
    assert count_leases(backend.outside) == 0


def test_a_job_started_by_hand_is_never_rescued_and_a_long_one_neither(store: Any, backend: Backend) -> None:
    store.submit("train", "by hand")
    with backend.outside.begin() as connection:
        started = "0" if backend.dialect == "sqlite" else "'1999-01-01'"
        connection.exec_driver_sql(f"UPDATE ml_jobs SET status = 'running', started_at = {started}")
    store.submit("train", "long")
    (claim,) = store.claim(worker="w")
    with backend.outside.begin() as connection:
        connection.exec_driver_sql(f"UPDATE ml_jobs SET started_at = {started}")
    assert not store.rescue()
    store.complete(claim)


def test_a_lease_whose_job_was_put_back_by_hand_is_only_deleted(store: Any, backend: Backend) -> None:
    store.submit("train", "spam", exclusive=True)
    (claim,) = store.claim(worker="w")
    with backend.outside.begin() as connection:
        connection.exec_driver_sql("UPDATE ml_jobs SET status = 'queued', lease = NULL")
    assert store.claim(worker="v") == []
    expire_leases(backend.outside)
    assert store.rescue().released == [claim.token]
    assert len(store.claim(worker="v")) == 1


def test_one_bad_row_does_not_stop_a_rescue(store: Any, backend: Backend) -> None:
    ids = [store.submit("train", target).id for target in ("a", "bad", "c")]
    store.claim(worker="w", limit=3)
    expire_leases(backend.outside)
    _refuse(backend, "UPDATE")
    rescue = store.rescue()
    assert sorted(rescue.requeued) == sorted([ids[0], ids[2]])
    assert list(rescue.errors) == [ids[1]]
    assert store.get(ids[1]).status is RUNNING


def test_one_bad_row_does_not_stop_a_prune(store: Any, backend: Backend) -> None:
    for target in ("a", "bad", "c"):
        store.submit("train", target)
    for claim in store.claim(worker="w", limit=3):
        store.complete(claim)
    _refuse(backend, "DELETE")
    assert store.prune(older_than=timedelta(0), batch=2) == 2
    assert [job.target_name for job in store.find()] == ["bad"]


def _refuse(backend: Backend, verb: str) -> None:
    """A host's own trigger that refuses to touch one row."""
    with backend.outside.begin() as connection:
        if backend.dialect == "sqlite":
            connection.exec_driver_sql(
                f"CREATE TRIGGER host BEFORE {verb} ON ml_jobs WHEN OLD.target_name = 'bad' "
                "BEGIN SELECT RAISE(ABORT, 'not this one'); END"
            )
            return
        connection.exec_driver_sql(
            "CREATE FUNCTION host() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$"
        )
        connection.exec_driver_sql(
            f"CREATE TRIGGER host BEFORE {verb} ON ml_jobs FOR EACH ROW WHEN (OLD.target_name = 'bad') "
            "EXECUTE FUNCTION host()"
        )


def test_prune_deletes_what_finished_long_ago_and_keeps_the_last(store: Any, backend: Backend) -> None:
    for target in ("spam", "spam", "spam", "ham"):
        store.submit("train", target)
    for claim in store.claim(worker="w", limit=4):
        store.complete(claim)
    active = store.submit("train", "spam")
    assert store.prune(older_than=timedelta(days=1)) == 0
    assert store.prune(older_than=LONG_AGO) == 0
    newest = next(job for job in store.find(target="spam", status="completed", order="newest"))
    assert store.prune(older_than=timedelta(0), keep_last=1, batch=1) == 2
    assert {job.target_name for job in store.find(status="completed")} == {"spam", "ham"}
    assert store.get(newest.id).status is COMPLETED
    assert store.prune(older_than=timedelta(0)) == 2
    assert [job.id for job in store.find()] == [active.id]
    for field, value in (("older_than", "x"), ("older_than", datetime(2020, 1, 1)), ("older_than", 5)):
        with pytest.raises(InvalidValueError):
            store.prune(**{field: value})
    for wrong in ({"keep_last": -1}, {"batch": 0}):
        with pytest.raises(InvalidValueError):
            store.prune(older_than=LONG_AGO, **wrong)


def test_prune_leaves_a_cancelled_job_whose_worker_has_not_stopped(store: Any) -> None:
    job = store.submit("train", "spam", exclusive=True)
    (claim,) = store.claim(worker="w")
    store.cancel(job.id)
    assert store.prune(older_than=timedelta(0)) == 0
    store.release([claim])
    assert store.prune(older_than=timedelta(0)) == 1


def test_prune_goes_by_creation_where_an_imported_record_does_not_say_when_it_ended(
    store: Any, backend: Backend
) -> None:
    old = MlJob(kind="train", target_name="old", status="failed", created_at=LONG_AGO)
    store.submit_many([old, MlJob(kind="train", target_name="new", status="failed")])
    assert store.prune(older_than=timedelta(days=365)) == 1
    assert [job.target_name for job in store.find()] == ["new"]


def test_deleting_a_job_and_its_id_coming_back_never_shows_the_old_result(store: Any) -> None:
    job = store.submit("train", "spam", {"first": True})
    (claim,) = store.claim(worker="w")
    store.complete(claim, {"old": 1})
    store.prune(older_than=timedelta(0))
    again = store.submit("train", "spam", id=job.id)
    assert (again.status, again.metrics, store.get(job.id).metrics) == (QUEUED, None, None)
    with pytest.raises(LeaseLostError):
        store.complete(claim, {"old": 2})
