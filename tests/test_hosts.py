"""A host's own job table, through the operations and a store; and our migrations beside a host's own."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from mljobs import InvalidValueError, JobStore, LeaseLostError, MlJobStatus, TerminalStateError, jobs, schema
from tests.backends import Backend
from tests.fork_server import ForkServer
from tests.host_application import GridRun, HostBase, Team, TrainingRun


@pytest.fixture
def hosted(backend: Backend) -> Backend:
    HostBase.metadata.create_all(backend.outside)
    return backend


def test_a_store_of_a_hosts_class_does_all_that_ours_does(hosted: Backend) -> None:
    store = hosted.store(model=TrainingRun)
    run = store.submit("train", "spam", {"lr": 1}, note="mine", exclusive=True)
    assert isinstance(run, TrainingRun)
    assert (run.note, run.flavour, run.spec) == ("mine", "run", {"lr": 1})
    assert store.submit_many([("train", "ham", {}), TrainingRun(kind="backfill", target_name="x", note="n")]) == 2
    assert store.submit("train", "spam", unless_active=True).id == run.id
    (claim,) = store.claim(worker="w", kinds=["train"])
    assert isinstance(claim.job, TrainingRun)
    assert (claim.job.id, claim.job.note) == (run.id, "mine")
    store.set_progress(claim, 40)
    assert store.renew([claim]).held
    store.fail(claim, "boom")
    with pytest.raises(LeaseLostError):
        store.complete(claim)
    again = store.retry(run.id)
    assert (again.retry_of, again.note, again.exclusive) == (run.id, "mine", True)
    assert store.cancel(again) is True
    assert store.counts()["train", "failed"] == 1
    assert {job.target_name for job in store.find(status="queued")} == {"ham", "x"}
    assert store.wait(run, timeout=5).note == "mine"
    assert not store.rescue()
    assert store.prune(older_than=timedelta(0)) == 2
    assert TrainingRun.from_json(run.to_json()).to_json() == run.to_json()


def test_a_subclass_comes_back_as_what_it_is(hosted: Backend) -> None:
    def life(session: Session) -> UUID:
        run = GridRun(kind="train", target_name="grid", points=9, team=Team(id=1))
        session.add(run)
        (claim,) = jobs.claim(session, worker="w", model=TrainingRun)
        assert claim.job is run
        jobs.complete(session, claim)
        return run.id

    job_id = hosted.run(life)

    def again(session: Session) -> None:
        copy: Any = jobs.retry(session, job_id, again=True, model=TrainingRun)
        assert (type(copy), copy.points, copy.retry_of) == (GridRun, 9, job_id)

    hosted.run(again)


def test_a_connection_takes_a_hosts_class_too(url: str) -> None:
    engine = create_engine(url, poolclass=NullPool)
    HostBase.metadata.create_all(engine)
    with engine.connect() as connection:
        run: Any = jobs.submit(connection, "train", "spam", note="by connection", model=TrainingRun)
        assert run.note == "by connection"
        connection.commit()
    with engine.connect() as connection:
        assert len(jobs.find(connection, model=TrainingRun)) == 1


def test_a_store_runs_on_a_hosts_engine_and_sessionmaker(url: str) -> None:
    engine = create_engine(url)
    for source in (engine, sessionmaker(engine), sessionmaker(engine, expire_on_commit=True)):
        with JobStore(source) as store:
            job = store.submit("train", "spam")
            with store.running(job) as run:
                run.metrics = {"n": 1}
            assert store.get(job.id).metrics == {"n": 1}
            (again,) = (store.submit("train", "spam"),)
            (claim,) = store.claim(worker="w")
            assert claim.job.id == again.id
            assert claim.job.spec == {}
            store.complete(claim)
    with Session(engine) as session, pytest.raises(TerminalStateError):
        session.execute(text("UPDATE ml_jobs SET progress = 1"))
    engine.dispose()


@pytest.mark.parametrize("source", [None, 5, sessionmaker(), "nonsense", "mysql://h/x"])
def test_a_source_that_is_none_is_refused(source: Any) -> None:
    with pytest.raises(InvalidValueError) as caught:
        JobStore(source)
    assert caught.value.field in ("source", "url")


def test_a_class_without_the_mixin_is_refused(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, poolclass=NullPool)
    for model in (Team, int):
        for operation in (
            lambda bind, model: jobs.claim(bind, worker="w", model=model),
            lambda bind, model: jobs.submit(bind, "train", "x", model=model),
            lambda bind, model: jobs.find(bind, model=model),
            lambda bind, model: jobs.counts(bind, model=model),
            lambda bind, model: jobs.rescue(bind, model=model),
        ):
            with engine.connect() as connection, pytest.raises(InvalidValueError) as caught:
                operation(connection, model)
            assert caught.value.field == "model"
    with pytest.raises(InvalidValueError, match="expected a Session or a Connection"):
        jobs.claim(object(), worker="w")  # type: ignore[arg-type]


HOST_ENV = """
import os
from alembic import context
from sqlalchemy import create_engine

engine = create_engine(os.environ["HOST_URL"])
with engine.begin() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
"""
HOST_REVISION = """
from alembic import op

revision = "host1"
down_revision = None
branch_labels = ("host",)
depends_on = None


def upgrade():
    op.execute("CREATE TABLE uploads (id INTEGER PRIMARY KEY)")


def downgrade():
    op.execute("DROP TABLE uploads")
"""


def test_our_revisions_run_beside_a_hosts_own_in_its_history(
    empty_url: str, tmp_path: Path, python: ForkServer
) -> None:
    (tmp_path / "versions").mkdir()
    (tmp_path / "env.py").write_text(HOST_ENV)
    (tmp_path / "versions" / "host1.py").write_text(HOST_REVISION)
    locations = os.pathsep.join(["%(here)s/versions", str(schema.migrations_path() / "versions")])
    ini = f"[alembic]\nscript_location = %(here)s\npath_separator = os\nversion_locations = {locations}\n"
    (tmp_path / "alembic.ini").write_text(ini)

    def alembic(*arguments: str) -> None:
        done = python.run("-m", "alembic", *arguments, cwd=tmp_path, env={"HOST_URL": empty_url})
        assert done.returncode == 0, done.stderr

    alembic("upgrade", "heads")
    schema.verify(empty_url)
    engine = create_engine(empty_url, poolclass=NullPool)
    assert {"uploads", "ml_jobs", "ml_job_leases"} <= set(inspect(engine).get_table_names())
    with JobStore(empty_url) as store:
        assert store.submit("train", "spam").status is MlJobStatus.QUEUED
    alembic("downgrade", "mljobs@base")
    assert "ml_jobs" not in inspect(engine).get_table_names()
    alembic("upgrade", "heads")
    schema.verify(empty_url)
