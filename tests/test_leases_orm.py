"""A worker that lost its lease writes nothing through a session either: not by the record it holds, not by ``merge``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import (
    InvalidTransitionError,
    InvalidValueError,
    JobHeldError,
    JobStore,
    LeaseLostError,
    MlJob,
    MlJobsError,
    TerminalStateError,
    jobs,
)
from mljobs.jobs import Claim


def _claimed(store: JobStore, worker: str = "late") -> Claim[MlJob]:
    (claim,) = store.claim(worker=worker)
    return claim


def _rescue(store: JobStore) -> None:
    past = "1" if store.engine.dialect.name == "sqlite" else "now() - interval '1 s'"
    with store.engine.begin() as connection:
        connection.execute(text(f"UPDATE ml_job_leases SET expires_at = {past}"))
    assert len(store.rescue(max_attempts=99).requeued) == 1


def _row(store: JobStore) -> Any:
    with store.engine.connect() as connection:
        return connection.execute(text("SELECT * FROM ml_jobs")).one()


def _progress(job: MlJob) -> None:
    job.progress = 77


def _metrics(job: MlJob) -> None:
    job.metrics = {"late": 1}


LATE: list[Callable[[MlJob], None]] = [
    _progress,
    _metrics,
    lambda job: job.complete({"late": 1}),
    lambda job: job.fail("late"),
    MlJob.requeue,
    MlJob.cancel,
]


@pytest.mark.parametrize("again", [True, False], ids=["claimed again", "queued again"])
def test_a_record_that_was_loaded_under_a_lost_lease_is_not_flushed(url: str, *, again: bool) -> None:
    with JobStore(url) as store:
        store.submit("train", "spam")
        for write in LATE:
            with Session(store.engine, expire_on_commit=False) as session:
                (late,) = jobs.claim(session, worker="late")
                session.commit()
                _rescue(store)
                new = _claimed(store, "new") if again else None
                before = _row(store)
                write(late.job)
                with pytest.raises(LeaseLostError) as lost:
                    session.commit()
                assert (lost.value.job_id, lost.value.token) == (late.job_id, late.token)
            assert _row(store) == before
            if new is not None:
                store.requeue(new)


def test_a_record_that_was_loaded_under_a_lease_is_not_flushed_once_it_is_cancelled(url: str) -> None:
    with JobStore(url) as store, Session(store.engine, expire_on_commit=False) as session:
        job = store.submit("train", "spam")
        (late,) = jobs.claim(session, worker="late")
        session.commit()
        store.cancel(job)
        late.job.complete()
        with pytest.raises(TerminalStateError, match="cancelled"):
            session.commit()


@pytest.mark.parametrize("write", [lambda _: None, *LATE])
def test_merge_takes_no_job_from_the_worker_that_holds_it(url: str, write: Callable[[MlJob], None]) -> None:
    with JobStore(url) as store:
        store.submit("train", "spam")
        late = _claimed(store)
        _rescue(store)
        new = _claimed(store, "new")
        before = _row(store)
        write(late.job)
        with Session(store.engine) as session:
            session.merge(late.job)
            with pytest.raises((LeaseLostError, JobHeldError)) as refused:
                session.commit()
        if isinstance(refused.value, JobHeldError):
            assert (refused.value.worker, refused.value.expires_at) == ("new", new.expires_at)
        assert _row(store) == before
        store.complete(new, {"right": 1})


@pytest.mark.parametrize("write", [lambda _: None, *LATE])
def test_merge_neither_starts_nor_ends_a_job_that_was_put_back(url: str, write: Callable[[MlJob], None]) -> None:
    with JobStore(url) as store:
        store.submit("train", "spam")
        late = _claimed(store)
        _rescue(store)
        before = _row(store)
        write(late.job)
        with Session(store.engine) as session:
            session.merge(late.job)
            if write is MlJob.requeue:  # which it is already
                session.commit()
            else:
                with pytest.raises((LeaseLostError, InvalidTransitionError)):
                    session.commit()
        assert _row(store) == before


@pytest.mark.parametrize("write", LATE)
def test_whoever_holds_the_job_writes_it_through_a_session(url: str, write: Callable[[MlJob], None]) -> None:
    with JobStore(url) as store:
        store.submit("train", "spam")
        claim = _claimed(store)
        with Session(store.engine) as session:
            write(session.get_one(MlJob, claim.job_id))
            session.commit()
            merged = session.merge(_written(store, write))
            session.commit()
            assert merged.status is store.get(merged.id).status


def _written(store: JobStore, write: Callable[[MlJob], None]) -> MlJob:
    store.submit("train", "another")
    (claim,) = (one for one in store.claim(worker="w", limit=2) if one.job.target_name == "another")
    write(claim.job)
    return claim.job


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"lease": 99}, LeaseLostError),
        ({"lease": None}, InvalidValueError),
        ({"worker": "me"}, JobHeldError),
        ({"attempts": 7}, JobHeldError),
    ],
)
def test_what_a_claim_sets_is_not_set_by_hand(url: str, values: dict[str, Any], error: type[MlJobsError]) -> None:
    with JobStore(url) as store:
        store.submit("train", "spam")
        claim = _claimed(store)
        before = _row(store)
        with Session(store.engine) as session:
            job = session.get_one(MlJob, claim.job_id)
            for name, value in values.items():
                setattr(job, name, value)
            with pytest.raises(error):
                session.commit()
        assert _row(store) == before


def test_nobody_takes_the_job_between_the_look_at_the_lease_and_the_write(url: str) -> None:
    hurry = {"timeout": 0} if url.startswith("sqlite") else {"options": "-c lock_timeout=1ms"}
    other = create_engine(url, poolclass=NullPool, connect_args=hurry)
    refused = []

    def take(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE ml_jobs SET progress"):
            with pytest.raises(OperationalError) as error, other.begin() as connection:
                connection.execute(text("UPDATE ml_jobs SET lease = NULL, status = 'queued'"))
            refused.append(error)

    with JobStore(url) as store, Session(store.engine, expire_on_commit=False) as session:
        store.submit("train", "spam")
        (claim,) = jobs.claim(session, worker="w")
        session.commit()
        claim.job.progress = 50
        event.listen(store.engine, "before_cursor_execute", take)
        session.commit()
    assert len(refused) == 1


def test_a_flush_looks_at_the_rows_of_all_its_leased_records_at_once_and_the_next_flush_looks_anew(url: str) -> None:
    looks: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT ml_jobs.id, ml_jobs.lease"):
            looks.append(statement)

    with JobStore(url) as store, Session(store.engine, expire_on_commit=False) as session:
        store.submit_many([("train", f"t{number}", {}) for number in range(4)])
        claims = jobs.claim(session, worker="w", limit=3)
        free = session.scalars(select(MlJob).where(MlJob.lease.is_(None))).one()
        session.commit()
        event.listen(store.engine, "before_cursor_execute", note)
        for progress in (10, 20, 30):
            for job in (free, *(claim.job for claim in claims)):
                job.progress = progress
            if progress < 30:
                session.flush()
                assert len(looks) == progress // 10
        session.commit()
        store.requeue(claims[1])
        for claim in claims:
            claim.job.progress = 40
        with pytest.raises(LeaseLostError) as refused:
            session.commit()
        assert (refused.value.job_id, len(looks)) == (claims[1].job_id, 4)
        assert {store.get(claim.job_id).progress for claim in claims} == {0, 30}
