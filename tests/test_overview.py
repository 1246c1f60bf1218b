"""The view for people with a SQL shell says, in words, what runs, waits and is stuck."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, inspect, text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

from mljobs import JobStore, MlJob, MlJobLease, MlJobMixin, ModelError, SchemaError, kind_column, schema
from mljobs._values import utc_now
from mljobs.errors import InvalidValueError
from mljobs.guards._overview import Overview, overview_ddl, view_ddl
from mljobs.jobs import WorkerInfo, WorkerState
from mljobs.jobs._workers import register_worker, update_worker


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


def _register(store: JobStore, *kinds: str) -> WorkerInfo:
    now = utc_now()
    with store.connect() as bind:
        return register_worker(bind, WorkerInfo("w", "host", 7, kinds, 1, "1.0", now, now))


def _notes(engine: Engine, jobs: Iterable[MlJob]) -> list[str | None]:
    return [_row(engine, job.id).note for job in jobs]


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
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM ml_job_leases"))
    row = _row(engine, job.id)
    assert (bool(row.stuck), row.note) == (False, "its lease was deleted")


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
        free, other = store.submit("train", "ham"), store.submit("backfill", "ham")
        jobs = (behind, later, free, other)
        assert _notes(engine, jobs) == ["its target is taken", "not before run_after", *["no worker is running"] * 2]
        worker = _register(store, "train", "drift_compute")
        assert _notes(engine, jobs)[2:] == [None, "no worker handles this kind"]
        with store.connect() as bind:
            update_worker(bind, worker, WorkerState.STOPPING)
        assert _notes(engine, jobs)[2:] == ["no worker is running"] * 2
        _register(store, "backfill")
        assert _notes(engine, jobs)[2:] == ["no worker handles this kind", None]
        with store.engine.begin() as connection:
            connection.execute(update(MlJob.__workers__).values(last_seen_at=utc_now() - timedelta(seconds=65)))
        assert _notes(engine, jobs)[2:] == ["no worker is running"] * 2
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


class OddKind(StrEnum):
    PLAIN = "train"
    QUOTED = 'a "train" \u00e9\\'


class Run(MlJobMixin, HostBase):
    __tablename__ = "odd runs"
    __overview_name__ = "odd runs seen"
    __overview_columns__ = ("the owner", "note_")
    kind: Mapped[OddKind] = kind_column(OddKind)
    owner: Mapped[str | None] = mapped_column("the owner")
    note_: Mapped[str | None]


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
        seen = text('SELECT status, note FROM "odd runs seen"')
        assert connection.execute(seen).all() == [("queued", "no worker is running")]
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


def test_a_view_shows_the_columns_of_the_hosts_own_that_its_class_names(host: Engine) -> None:
    with JobStore(host, model=Run) as store:
        job = store.submit("train", "spam", owner="ann", note_="mine")
    with host.connect() as connection:
        row = connection.execute(text('SELECT id, "the owner", note_ FROM "odd runs seen"')).one()
    assert str(row.id).replace("-", "") == job.id.hex
    assert row[1:] == ("ann", "mine")


def test_a_view_shows_no_column_that_is_not_there_and_none_under_the_name_of_ours() -> None:
    class Base(DeclarativeBase):
        pass

    with pytest.raises(ModelError, match="__overview_columns__ name salary, which is no column of its own"):

        class Bad(MlJobMixin, Base):
            __tablename__ = "bad_runs"
            __overview_name__ = "bad"
            __overview_columns__ = ("salary",)

    with pytest.raises(InvalidValueError, match="the view has a column of this name already"):
        Overview("seen", Run.__table__, Run.__leases__, columns=("note",))


def test_a_kind_with_quotes_is_not_taken_for_the_one_inside(host: Engine) -> None:
    with JobStore(host, model=Run) as store:
        store.submit(OddKind.PLAIN, "a")
        now = utc_now()
        with store.connect() as bind:
            for name, state in (("w", WorkerState.RUNNING), ("x", WorkerState.GONE)):
                kinds = ('a "train" \u00e9\\',) if name == "w" else ("train",)
                worker = register_worker(bind, WorkerInfo(name, "h", 7, kinds, 1, "1", now, now), model=Run)
                update_worker(bind, worker, state, model=Run)
        store.submit(OddKind.QUOTED, "b")
    with host.connect() as connection:
        rows = connection.execute(text('SELECT target_name, note FROM "odd runs seen" ORDER BY 1')).all()
    assert rows == [("a", "no worker handles this kind"), ("b", None)]


def test_a_view_without_a_table_of_workers_says_nothing_of_them(host: Engine) -> None:
    older = Overview("odd runs seen", Run.__table__, Run.__leases__)
    with host.begin() as connection:
        for create in (False, True):
            for statement in view_ddl(older, host.dialect.name, create=create):
                connection.execute(statement)
        connection.execute(text('DROP TABLE "odd runs_workers"'))
    with JobStore(host, model=Run) as store:
        store.submit("train", "spam")
        assert store.workers() == []
    with host.connect() as connection:
        assert connection.execute(text('SELECT note FROM "odd runs seen"')).all() == [(None,)]
