"""The view for people with a SQL shell says, in words, what runs, waits and is stuck."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, inspect, text, update
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.pool import NullPool

from mljobs import JobStore, MlJob, MlJobLease, MlJobMixin, SchemaError, schema
from mljobs._values import utc_now
from mljobs.errors import InvalidValueError
from mljobs.guards._overview import overview_ddl


def _row(engine: Engine, job_id: Any) -> Any:
    table = text("SELECT * FROM ml_jobs_overview WHERE id = :id")
    with engine.connect() as connection:
        return connection.execute(
            table, {"id": str(job_id) if engine.dialect.name == "postgresql" else job_id.hex}
        ).one()


def _text(value: Any) -> str:
    """Return an interval as psql shows it; SQLite has that text already."""
    if not isinstance(value, timedelta):
        return str(value)
    days = f"{value.days} day{'s' * (value.days != 1)} " if value.days else ""
    return f"{days}{timedelta(seconds=value.seconds)!s:0>8}"


def _add(engine: Engine, **values: Any) -> Any:
    with Session(engine) as session:
        job = MlJob(**{"kind": "train", "target_name": "spam", **values})
        session.add(job)
        session.commit()
        return job.id


def _end_lease(engine: Engine, when: datetime) -> None:
    with engine.begin() as connection:
        connection.execute(update(MlJobLease).values(expires_at=when))


def test_a_finished_job_shows_how_long_it_waited_and_took(engine: Engine) -> None:
    now = utc_now()
    created = now - timedelta(days=3, hours=1)
    started = created + timedelta(days=1, seconds=61)
    spans = {
        "created_at": created,
        "started_at": started,
        "finished_at": started + timedelta(seconds=3600, milliseconds=275),
    }
    row = _row(engine, _add(engine, status="failed", error_message="CUDA out of memory\nTraceback ...", **spans))
    assert _text(row.age).startswith("3 days 01:00:")
    assert _text(row.queue_wait) == "1 day 00:01:01"
    assert _text(row.duration) == "01:00:00"
    assert row.duration_ms == 3_600_275
    assert row.error == "CUDA out of memory"
    assert (row.worker, row.lease_ends_at, row.note) == (None, None, None)
    assert not row.stuck
    shown = row.created_at
    assert str(shown if isinstance(shown, str) else shown.astimezone(UTC))[:19] == f"{created:%Y-%m-%d %H:%M:%S}"


def test_a_running_job_shows_its_worker_and_is_stuck_once_that_is_silent(engine: Engine) -> None:
    with JobStore(engine) as store:
        job = store.submit("train", "spam")
        store.claim(worker="gpu-1")
    row = _row(engine, job.id)
    assert (row.status, row.worker, bool(row.stuck), row.note) == ("running", "gpu-1", False, None)
    assert row.lease_ends_at is not None
    _end_lease(engine, utc_now() - timedelta(seconds=5))
    row = _row(engine, job.id)
    assert (bool(row.stuck), row.note) == (True, "its worker is silent")
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM ml_jobs_overview WHERE stuck")) == 1


def test_a_job_started_by_hand_is_not_stuck_and_says_why(engine: Engine) -> None:
    row = _row(engine, _add(engine, status="running", started_at=utc_now() - timedelta(hours=2)))
    assert (bool(row.stuck), row.note) == (False, "started by hand, no lease")
    assert _text(row.duration).startswith("02:00:")


def test_a_cancelled_job_whose_worker_goes_on_says_so(engine: Engine) -> None:
    with JobStore(engine) as store:
        job = store.submit("train", "spam")
        store.claim(worker="gpu-1")
        store.cancel(job)
    assert _row(engine, job.id).note == "its worker has not stopped yet"


def test_a_queued_job_says_what_it_waits_for(engine: Engine) -> None:
    with JobStore(engine) as store:
        store.submit("train", "spam", exclusive=True)
        store.claim(worker="gpu-1")
        behind = store.submit("train", "spam", exclusive=True)
        later = store.submit("train", "ham", run_after=timedelta(hours=1))
        free = store.submit("train", "ham")
    notes = [_row(engine, job.id).note for job in (behind, later, free)]
    assert notes == ["its target is taken", "not before run_after", None]
    assert _text(_row(engine, later.id).queue_wait) == "00:00:00"


def test_a_job_of_tomorrow_one_that_ran_backwards_and_a_long_error_break_nothing(engine: Engine) -> None:
    row = _row(engine, _add(engine, created_at=utc_now() + timedelta(days=1), error_message="x" * 500))
    assert (_text(row.age), _text(row.queue_wait), row.duration, row.error) == ("00:00:00", "00:00:00", None, "x" * 200)
    backwards = {"started_at": utc_now(), "finished_at": utc_now() - timedelta(days=1), "error_message": ""}
    row = _row(engine, _add(engine, status="completed", **backwards))
    assert (row.duration, row.duration_ms, row.error) == (None, None, "")


def test_psql_needs_no_more_than_a_condition_to_find_what_is_stuck_by_an_index(postgres_url: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("SET enable_seqscan = off")
        plan = connection.exec_driver_sql("EXPLAIN SELECT * FROM ml_jobs_overview WHERE stuck").scalars().all()
    assert any("ix_ml_jobs_active" in line for line in plan), plan


# ------------------------------------------------------------------------------------------------ a host's own table


class HostBase(DeclarativeBase):
    """Of a host that wants a view too."""


class Run(MlJobMixin, HostBase):
    __tablename__ = "odd runs"
    __overview_name__ = "odd runs seen"


class Plain(MlJobMixin, HostBase):
    __tablename__ = "plain_runs"


@pytest.fixture
def host(empty_url: str) -> Any:
    engine = create_engine(empty_url, poolclass=NullPool)
    HostBase.metadata.create_all(engine)
    yield engine
    engine.dispose()


def test_a_hosts_class_has_a_view_only_if_it_names_one(host: Engine) -> None:
    assert inspect(host).get_view_names() == ["odd runs seen"]
    schema.verify(host, metadata=HostBase.metadata)
    with host.begin() as connection:
        connection.execute(Run.__table__.insert(), {"kind": "train", "target_name": "a", "spec_json": "{}"})
        assert connection.execute(text('SELECT status, note FROM "odd runs seen"')).all() == [("queued", None)]
    with host.begin() as connection:
        for statement in overview_ddl(Run.__table__, host.dialect.name, create=False):
            connection.execute(statement)
    with pytest.raises(SchemaError, match="view odd runs seen of table odd runs_leases is missing"):
        schema.verify(host, metadata=HostBase.metadata)
    with pytest.raises(InvalidValueError, match="__overview_name__"):
        overview_ddl(Plain.__table__, host.dialect.name)


def test_the_view_goes_with_its_tables(host: Engine) -> None:
    HostBase.metadata.drop_all(host)
    assert inspect(host).get_view_names() == []
    HostBase.metadata.create_all(host)
