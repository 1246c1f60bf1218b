"""A finished job never changes: not by the ORM, not by Core, not by raw SQL."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Engine, delete, insert, select, text, update
from sqlalchemy.orm import Session

from mljobs import (
    InvalidTransitionError,
    InvalidValueError,
    MlJob,
    MlJobKind,
    MlJobStatus,
    TerminalStateError,
)
from mljobs.guards import retention


def _set(session: Session, job: MlJob) -> None:
    job.progress = 50
    session.flush()


def _set_expired(session: Session, job: MlJob) -> None:
    session.expire(job)
    job.error_message = "late"
    session.flush()


def _row_switch(session: Session, job: MlJob) -> None:
    session.delete(job)
    session.add(MlJob(id=job.id, kind="train", target_name="other"))
    session.flush()


def _delete_orm(session: Session, job: MlJob) -> None:
    session.delete(job)
    session.flush()


def _merge(session: Session, job: MlJob) -> None:
    session.merge(MlJob(id=job.id, kind="train", target_name="other"))
    session.flush()


ROUTES: dict[str, Callable[[Session, MlJob], Any]] = {
    "attribute": _set,
    "expired attribute": _set_expired,
    "row switch": _row_switch,
    "delete": _delete_orm,
    "merge": _merge,
    "bulk update": lambda s, _: s.execute(update(MlJob).values(progress=3)),
    "update by key": lambda s, job: s.execute(update(MlJob), [{"id": job.id, "progress": 3}]),
    "query update": lambda s, _: s.query(MlJob).update({"progress": 3}),
    "bulk mappings": lambda s, job: s.bulk_update_mappings(MlJob, [{"id": job.id, "progress": 3}]),
    "core update": lambda s, _: s.connection().execute(update(MlJob.__table__).values(progress=3)),
    "bulk delete": lambda s, _: s.execute(delete(MlJob)),
    "text": lambda s, _: s.execute(text("UPDATE ml_jobs SET status = 'queued'")),
    "driver sql": lambda s, _: s.connection().exec_driver_sql("UPDATE ml_jobs SET metrics_json = '{}'"),
    "no-op text": lambda s, _: s.execute(text("UPDATE ml_jobs SET progress = progress")),
}


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


@pytest.mark.parametrize("route", ROUTES)
def test_a_finished_job_refuses_every_route_and_the_session_goes_on(session: Session, route: str) -> None:
    job = _finished(session)
    before = session.execute(text("SELECT * FROM ml_jobs")).all()
    with pytest.raises(TerminalStateError), session.begin_nested():
        ROUTES[route](session, job)
    session.rollback()
    assert session.execute(text("SELECT * FROM ml_jobs")).all() == before


@pytest.mark.parametrize("verb", ["INSERT OR REPLACE", "REPLACE"])
def test_replacing_a_finished_row_is_refused_without_any_pragma(session: Session, verb: str) -> None:
    if session.connection().dialect.name != "sqlite":
        with pytest.raises(TerminalStateError):  # PostgreSQL's way to lose a whole table
            _finished(session)
            session.execute(text("TRUNCATE ml_jobs CASCADE"))
        return
    job = _finished(session)
    values = f"(id, kind, target_name, status, progress, created_at, spec_json) VALUES ('{job.id.hex}', 'train', 'x', "
    with pytest.raises(TerminalStateError):
        session.execute(text(f"{verb} INTO ml_jobs {values}'queued', 0, 0, '[]')"))
    session.rollback()
    session.execute(text(f"INSERT OR IGNORE INTO ml_jobs {values}'queued', 0, 0, '[]')"))
    assert session.scalars(select(MlJob.status)).all() == [MlJobStatus.COMPLETED]


def test_an_illegal_edge_is_refused_by_the_hook_and_by_the_trigger(session: Session) -> None:
    job = MlJob(kind="train", target_name="spam")
    session.add(job)
    session.commit()
    job.status = MlJobStatus.COMPLETED
    with pytest.raises(InvalidTransitionError):
        session.flush()
    session.rollback()
    with pytest.raises(InvalidTransitionError):
        session.execute(text("UPDATE ml_jobs SET status = 'completed'"))


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
        ("created_at", datetime(2026, 1, 1)),  # noqa: DTZ001 - naive on purpose
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
