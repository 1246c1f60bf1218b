"""A job that cannot be started stops no worker: it stays queued, is logged once, and the others run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime
from enum import Enum
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from mljobs import JobStore, MlJob, MlJobKind, MlJobMixin, MlJobStatus, StartRefusedError, TargetLockedError, jobs
from tests.workers import worker_of

QUEUED, COMPLETED = MlJobStatus.QUEUED, MlJobStatus.COMPLETED


class Base(DeclarativeBase):
    pass


class Role(Enum):
    OLD = "old"


class Run(MlJobMixin, Base):
    __tablename__ = "runs"
    __mapper_args__ = {"polymorphic_on": "flavour", "polymorphic_identity": "run"}

    flavour: Mapped[str]
    role: Mapped[Role] = mapped_column(sa.Enum(Role, native_enum=False), default=Role.OLD)
    due: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))
    mine: Mapped[int | None]


@pytest.fixture
def store(empty_url: str) -> Iterator[JobStore[Run]]:
    with JobStore(empty_url, model=Run) as store:
        Base.metadata.create_all(store.engine)
        yield store


def _write(store: JobStore[Any], statement: str) -> None:
    with store.engine.begin() as connection:
        connection.exec_driver_sql(statement)


def _refuse_start(store: JobStore[Any]) -> None:
    """Add a trigger of the host's that refuses to start jobs whose ``mine`` is 1."""
    if store.engine.dialect.name == "sqlite":
        when = "WHEN new.mine = 1 AND new.status = 'running' BEGIN SELECT RAISE(ABORT, 'no'); END"
        _write(store, f"CREATE TRIGGER host BEFORE UPDATE OF status ON runs {when}")
        return
    body = "IF new.mine = 1 AND new.status = 'running' THEN RAISE EXCEPTION 'no'; END IF; RETURN new;"
    _write(store, f"CREATE FUNCTION host() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$")
    _write(store, "CREATE TRIGGER host BEFORE UPDATE ON runs FOR EACH ROW EXECUTE FUNCTION host()")


def _poison(store: JobStore[Run], ids: list[Any], fault: str) -> None:
    """Make a fault in the rows of these jobs."""
    if fault == "trigger":
        _refuse_start(store)
    column, value = {
        "class": ("flavour", "newer"),
        "member": ("role", "new"),
        "time": ("due", "infinity"),
        "trigger": ("mine", 1),
    }[fault]
    table = sa.table("runs", sa.column("id", Run.id.type), sa.column(column))
    given: Any = sa.literal_column(f"'{value}'")
    with store.engine.begin() as connection:
        connection.execute(sa.update(table).where(table.c.id.in_(ids)).values({column: given}))


def _worker(store: JobStore[Any]) -> Any:
    worker = worker_of(store, concurrency=2)
    worker.handles("train")(lambda _run: None)
    return worker


@pytest.mark.parametrize(
    ("fault", "column"), [("class", "flavour"), ("member", "role"), ("time", "due"), ("trigger", None)]
)
def test_a_job_that_cannot_be_started_is_named_once_and_the_others_run(
    store: JobStore[Run], caplog: pytest.LogCaptureFixture, fault: str, column: str | None
) -> None:
    bad = [store.submit("train", "bad", priority=5).id for _ in range(2)]
    good = [store.submit("train", "good").id for _ in range(3)]
    _poison(store, bad, fault)
    with pytest.raises(StartRefusedError) as refused:
        store.claim(worker="by hand", limit=5)
    assert refused.value.job_id == bad[0]
    assert refused.value.column == column
    with pytest.raises(StartRefusedError, match=str(bad[1])):
        store.claim_one(bad[1], worker="by hand")
    assert store.counts()[MlJobKind.TRAIN, QUEUED] == 5

    with caplog.at_level(logging.ERROR):
        tally = _worker(store).run(until_idle=True)
    assert tally.jobs == {"completed": 3}
    named = [record.job_id for record in caplog.records]  # type: ignore[attr-defined]
    assert named == [str(job_id) for job_id in bad]
    assert store.counts()[MlJobKind.TRAIN, QUEUED] == 2
    assert {store.get(job_id).status for job_id in good} == {COMPLETED}


def test_what_ended_beside_a_job_that_cannot_be_started_is_recorded_with_the_next_claim(store: JobStore[Run]) -> None:
    ended, bad = store.submit("train", "t"), store.submit("train", "bad")
    (claim,) = store.claim(worker="w")
    _poison(store, [bad.id], "member")
    outcomes = [jobs.Outcome.completed(claim)]
    with pytest.raises(StartRefusedError):
        store.finish_and_claim(outcomes, worker="w")
    assert store.get(ended.id).status is MlJobStatus.RUNNING
    assert store.finish_and_claim(outcomes, worker="w", skip=[bad.id]) == ([None], [])
    assert store.get(ended.id).status is COMPLETED


def test_in_the_callers_session_nothing_of_a_refused_claim_stays(store: JobStore[Run]) -> None:
    good, bad = store.submit("train", "good"), store.submit("train", "bad")
    _poison(store, [bad.id], "member")
    with Session(store.engine) as session, session.begin():
        kept = session.get_one(Run, good.id)
        with pytest.raises(StartRefusedError):
            jobs.claim(session, worker="w", limit=2, model=Run)
        assert kept.status is QUEUED
        assert [claim.job_id for claim in jobs.claim(session, worker="w", skip=[bad.id], model=Run)] == [good.id]


def test_a_write_that_fails_for_every_job_is_raised_as_it_is(store: JobStore[Run]) -> None:
    store.submit("train", "t")
    _write(store, "DROP TABLE runs_leases")
    with pytest.raises(sa.exc.DBAPIError, match="runs_leases"):
        store.claim(worker="w")


def test_the_plain_record_in_its_statement_of_its_own_is_passed_over_too(url: str) -> None:
    with JobStore(url) as store:
        bad, _good = (store.submit("train", target) for target in ("bad", "good"))
        refuse = "AFTER UPDATE ON ml_jobs"
        if store.engine.dialect.name == "sqlite":
            when = "WHEN new.target_name = 'bad' AND new.status = 'running' BEGIN SELECT RAISE(ABORT, 'no'); END"
            _write(store, f"CREATE TRIGGER host {refuse} {when}")
        else:
            _write(store, "ALTER TABLE ml_jobs ADD CHECK (target_name <> 'bad' OR status = 'queued')")
        tally = _worker(store).run(until_idle=True)
        assert tally.jobs == {"completed": 1}
        assert store.get(bad.id).status is QUEUED


@pytest.mark.parametrize("how", ["claimed", "started by hand"])
def test_an_open_transaction_that_takes_a_target_keeps_no_worker_from_other_jobs(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("mljobs.worker._prefetching.LOCK_SECONDS", 0.01)
    with JobStore(postgres_url) as store, Session(store.engine) as session:
        taken, waits = (store.submit("train", "t", exclusive=True) for _ in range(2))
        other = store.submit("train", "other")
        if how == "claimed":
            jobs.claim_one(session, taken.id, worker="slow")
        else:
            session.get_one(MlJob, taken.id).start()
            session.flush()
        assert _worker(store).run(until_idle=True).jobs == {"completed": 1}
        assert store.get(other.id).status is COMPLETED
        assert store.claim(worker="w", lock_timeout=0.01) == []
        with Session(store.engine) as another, another.begin():
            another.execute(sa.text("SET LOCAL lock_timeout = '10ms'"))
            with pytest.raises(TargetLockedError):
                jobs.claim_one(another, waits.id, worker="w")
        session.rollback()
        assert _worker(store).run(until_idle=True).jobs == {"completed": 2}


def test_a_job_that_cannot_be_started_is_found_behind_a_target_that_is_waited_for(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mljobs.worker._prefetching.LOCK_SECONDS", 0.01)
    monkeypatch.setattr("mljobs.jobs._claiming._LOCK_TIMEOUT", 0.01)
    with JobStore(postgres_url) as store, Session(store.engine) as session:
        taken, *_ = (store.submit("train", "t", exclusive=True) for _ in range(3))
        for target in ("bad", "good"):
            store.submit("train", target)
        _write(store, "ALTER TABLE ml_jobs ADD CHECK (target_name <> 'bad' OR status = 'queued')")
        session.get_one(MlJob, taken.id).start()
        session.flush()
        assert _worker(store).run(until_idle=True).jobs == {"completed": 1}
        assert [job.target_name for job in store.find(status="completed")] == ["good"]
