"""The record: what it knows, what it refuses, and retention."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Engine, delete, event, insert, inspect, select, update
from sqlalchemy.orm import Session

from mljobs import (
    InvalidTransitionError,
    InvalidValueError,
    MlJob,
    MlJobKind,
    MlJobsError,
    MlJobStatus,
    TerminalStateError,
)
from mljobs._values import utc_now
from mljobs.guards import retention


@pytest.fixture
def session(engine: Engine) -> Any:
    with Session(engine) as opened:
        yield opened


def _finished(session: Session) -> MlJob:
    job = MlJob(kind=MlJobKind.TRAIN, target_name="spam", spec={"lr": 0.05})
    session.add(job)
    session.commit()
    job.start()
    session.commit()
    job.complete({"f1": 0.9})
    session.commit()
    return job


def test_retention_opens_deletes_only_and_closes_again(session: Session) -> None:
    _finished(session)
    with pytest.raises(TerminalStateError), session.begin_nested(), retention(session, MlJob):
        session.execute(update(MlJob).values(progress=3))
    session.rollback()
    with retention(session, MlJob):
        session.execute(delete(MlJob).where(MlJob.is_terminal))
    assert session.scalars(select(MlJob)).all() == []
    _finished(session)
    with pytest.raises(TerminalStateError):
        session.execute(delete(MlJob))


def test_a_job_may_be_started_and_completed_in_one_flush(session: Session, engine: Engine) -> None:
    jobs = [MlJob(kind="train", target_name=f"t{number}", spec={}) for number in range(3)]
    session.add_all(jobs)
    session.commit()
    for job in jobs:
        job.start()
        job.complete({"f1": 0.9})
    session.commit()
    with Session(engine) as other:
        for job in other.scalars(select(MlJob)):
            assert (job.status, job.progress, job.attempts) == (MlJobStatus.COMPLETED, 100, 1)
            assert None not in (job.started_at, job.finished_at, job.metrics)
    jobs[0].progress = 50
    with pytest.raises(TerminalStateError):
        session.commit()


def test_a_start_by_hand_is_not_recorded_as_that_of_the_worker_before(session: Session) -> None:
    job = MlJob(kind="train", target_name="spam", spec={}, worker="of the first attempt")
    session.add(job)
    session.commit()
    for name, recorded in ((None, "of the first attempt"), (None, None), ("w2", "w2"), (None, None)):
        job.start(name)
        session.commit()
        assert job.worker == recorded
        job.requeue()
        session.commit()
    job.worker = "w3"
    job.start()
    session.commit()
    assert job.worker == "w3"


def test_a_start_that_was_rolled_back_leads_nowhere(session: Session) -> None:
    job = MlJob(kind="train", target_name="spam", spec={})
    session.add(job)
    session.commit()
    job.start()
    session.rollback()
    job.status = MlJobStatus.COMPLETED
    with pytest.raises(InvalidTransitionError, match="is queued and cannot become completed"):
        session.flush()
    session.rollback()
    job.status, job.started_at = MlJobStatus.COMPLETED, utc_now()
    with pytest.raises(InvalidTransitionError):
        session.flush()


@pytest.mark.parametrize(
    ("meanwhile", "error"),
    [(MlJob.start, InvalidTransitionError), (MlJob.cancel, TerminalStateError)],
)
def test_a_start_and_completion_in_one_flush_find_what_others_did_meanwhile(
    session: Session, engine: Engine, meanwhile: Callable[[MlJob], None], error: type[MlJobsError]
) -> None:
    job = MlJob(kind="train", target_name="spam", spec={})
    session.add(job)
    session.commit()
    session.refresh(job)
    job.start()
    job.complete()
    with Session(engine) as other:
        meanwhile(other.get_one(MlJob, job.id))
        other.commit()
        found = other.get_one(MlJob, job.id).status
    with pytest.raises(error, match=f"is {found}"):
        session.flush()


def test_hybrids_work_in_queries_and_json_goes_round(session: Session) -> None:
    job = _finished(session)
    found = session.scalars(
        select(MlJob).where(MlJob.duration_ms >= 0, MlJob.spec["lr"].as_float() < 0.1, MlJob.is_terminal)
    ).all()
    assert found == [job]
    row = session.execute(select(MlJob.spec, MlJob.metrics, MlJob.created_at_ms, MlJob.duration_ms)).one()
    assert tuple(row) == ({"lr": 0.05}, {"f1": 0.9}, job.created_at_ms, job.duration_ms)
    assert MlJob.from_json(job.to_json()).to_json() == job.to_json()


def test_a_core_insert_is_complete_too(session: Session) -> None:
    session.execute(insert(MlJob).values(kind="backfill", target_name="rows", spec_json="{}"))
    job = session.scalars(select(MlJob)).one()
    assert (job.status, job.progress, job.attempts) == (MlJobStatus.QUEUED, 0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("progress", 101),
        ("progress", -1),
        ("kind", "x"),
        ("status", "done"),
        ("id", "zz"),
        ("id", 1 << 128),
        ("created_at", datetime(2026, 1, 1)),
        ("started_at", datetime(1969, 1, 1, tzinfo=UTC)),
        ("spec", float("nan")),
    ],
)
def test_a_wrong_value_is_refused_where_it_is_set(field: str, value: Any) -> None:
    with pytest.raises(InvalidValueError) as caught:
        MlJob(**{"kind": "train", "target_name": "spam", field: value})
    assert caught.value.field == field
    assert caught.value.value is value


@pytest.mark.parametrize(
    ("field", "value"),
    [("target_name", "a\x00b"), ("error_message", "\ud800"), ("spec_json", "{"), ("metrics_json", "NaN")],
)
def test_text_that_no_database_can_hold_is_refused_at_flush(session: Session, field: str, value: str) -> None:
    session.add(MlJob(**{"kind": "train", "target_name": "spam", field: value}))
    with pytest.raises(InvalidValueError) as caught:
        session.flush()
    assert caught.value.field == field


def test_a_decoded_job_is_as_if_it_had_been_constructed(engine: Engine) -> None:
    text = MlJob(kind="train", target_name="spam", status="running", progress=7).to_json()
    MlJob(kind="train", target_name="first")  # from now on the short way
    job = MlJob.from_json(text)
    assert (job.attempts, job.priority, job.exclusive, job.run_after, job.retry_of) == (0, 0, False, None, None)
    assert inspect(job).transient
    assert inspect(job).modified
    with pytest.raises(InvalidValueError):
        job.progress = 101
    with Session(engine) as session, session.begin():
        session.add(MlJob.from_json(text))
    with Session(engine) as session, session.begin():
        stored = session.get_one(MlJob, job.id)
        session.delete(stored)
        session.add(MlJob.from_json(text.replace("spam", "other")))  # a row switch: all of it is written
    with Session(engine) as session, session.begin():
        assert session.get_one(MlJob, job.id).target_name == "other"
        session.merge(MlJob.from_json(text)).complete()
    with Session(engine) as session:
        stored = session.get_one(MlJob, job.id)
        assert (stored.target_name, stored.status) == ("spam", "completed")
        session.expire(stored)
        assert MlJob.from_json(stored.to_json()).to_json() == stored.to_json()


def test_listeners_of_a_host_see_decoded_jobs_too() -> None:
    seen: list[MlJob] = []

    def on_init(job: MlJob, _args: object, _values: object) -> None:
        seen.append(job)

    event.listen(MlJob, "init", on_init)
    try:
        job = MlJob.from_json(MlJob(kind="train", target_name="spam").to_json())
    finally:
        event.remove(MlJob, "init", on_init)
    assert seen[-1] is job
