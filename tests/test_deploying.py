"""What docs/deploying.md says of deploys, backups and servers is so."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Engine, create_engine, inspect, make_url, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

import mljobs.alembic_plugin  # noqa: F401 - Alembic before 1.18 finds no plugin by itself
from mljobs import (
    JobStore,
    MlJob,
    MlJobMixin,
    MlJobStatus,
    SchemaError,
    TerminalStateError,
    Worker,
    jobs,
    kind_column,
    schema,
)
from mljobs.states import UnknownKind
from tests import postgres
from tests.databases import Databases
from tests.fork_server import forkserver


class OlderKind(StrEnum):
    FIT = "fit"


class NewerKind(StrEnum):
    FIT = "fit"
    TUNE = "tune"


class OlderBase(DeclarativeBase):
    pass


class NewerBase(DeclarativeBase):
    pass


class Older(MlJobMixin, OlderBase):
    __tablename__ = "deployed"
    kind: Mapped[OlderKind] = kind_column(OlderKind)
    owner: Mapped[str]


class Newer(MlJobMixin, NewerBase):
    __tablename__ = "deployed"
    kind: Mapped[NewerKind] = kind_column(NewerKind)
    owner: Mapped[str]
    team: Mapped[str] = mapped_column(server_default="nobody's")


@pytest.fixture
def migrated(empty_url: str) -> Iterator[Engine]:
    """A database that the newer release has migrated."""
    engine = create_engine(empty_url)
    NewerBase.metadata.create_all(engine)
    yield engine
    engine.dispose()


# --------------------------------------------------------------------------------------------------------------- health


def test_readiness_is_a_matter_of_the_columns_that_are_used(empty_url: str, migrated: Engine) -> None:
    for target in (migrated, empty_url):
        schema.ready(target, model=Newer)
        schema.ready(target, model=Older)  # during a deploy
        with pytest.raises(SchemaError, match=r"not ready: .*ml_jobs"):
            schema.ready(target)
    schema.upgrade(migrated)
    with migrated.begin() as connection:
        schema.ready(connection)
        connection.execute(text("ALTER TABLE deployed DROP COLUMN team"))
    schema.ready(migrated, model=Older)
    with pytest.raises(SchemaError, match="team"):
        schema.ready(migrated, model=Newer)


def test_a_database_that_does_not_answer_is_no_matter_of_its_schema() -> None:
    with pytest.raises(OperationalError):
        schema.ready("postgresql+psycopg://nobody@127.0.0.1:1/none")


# ----------------------------------------------------------------------------------------------------------- migrations

ROOT = Path(__file__).parent.parent
_ENV = """
from alembic import context
from sqlalchemy import MetaData, create_engine
from sqlalchemy.pool import NullPool
from mljobs import schema

class Base:
    metadata = MetaData()

connectable = create_engine(context.config.get_main_option("sqlalchemy.url"), poolclass=NullPool)
{shown}
"""
_REVISION = """
from alembic import op
import sqlalchemy as sa

revision = "{number}"
down_revision = {before}

def upgrade():
    op.create_table("made_{number}", sa.Column("id", sa.Integer, primary_key=True))
    {then}
"""


def _upgrade(path: str, url: str, barrier: Any, results: Any) -> None:
    config = Config()
    config.set_main_option("script_location", path)
    config.set_main_option("sqlalchemy.url", url)
    barrier.wait(60)
    try:
        command.upgrade(config, "2")
        results.put("done")
    except BaseException as error:  # noqa: BLE001 - to be shown by the test
        results.put(repr(error))


def test_a_history_of_the_hosts_own_is_upgraded_by_many_processes_at_once(empty_url: str, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "migrations.md").read_text()
    shown = page.partition('```py title="migrations/env.py"\n')[2].partition("```")[0]
    (tmp_path / "versions").mkdir()
    (tmp_path / "env.py").write_text(_ENV.format(shown=shown))
    for number, then in ((1, "pass"), (2, "pass"), (3, "raise RuntimeError('half way')")):
        before = None if number == 1 else repr(str(number - 1))
        text_of = _REVISION.format(number=number, before=before, then=then)
        (tmp_path / "versions" / f"{number}.py").write_text(text_of)
    forks = forkserver()
    barrier, results = forks.Barrier(4), forks.Queue()
    processes = [forks.Process(target=_upgrade, args=(str(tmp_path), empty_url, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=90) for _ in processes] == ["done"] * 4
    for process in processes:
        process.join()
    config = Config()
    config.set_main_option("script_location", str(tmp_path))
    config.set_main_option("sqlalchemy.url", empty_url)
    with pytest.raises(RuntimeError, match="half way"):
        command.upgrade(config, "3")
    engine = create_engine(empty_url, poolclass=NullPool)
    assert set(inspect(engine).get_table_names()) == {"alembic_version", "made_1", "made_2"}


# -------------------------------------------------------------------------------------------------------------- deploys


def test_an_older_release_goes_on_beside_a_column_and_a_kind_of_a_newer_one(migrated: Engine) -> None:
    older, newer = JobStore(migrated, model=Older), JobStore(migrated, model=Newer)
    tune = newer.submit("tune", "spam", owner="ann", team="red")
    fit = newer.submit("fit", "spam", owner="ann", team="red")
    own = older.submit("fit", "spam", owner="bob")
    worker = Worker(older, poll=0.05)
    worker.handles("fit")(lambda run: {"owner": run.job.owner})
    assert worker.run(until_idle=True).jobs == {"completed": 2}
    read: Any = older.get(tune.id)
    assert (read.status, read.kind) == (MlJobStatus.QUEUED, UnknownKind("tune"))
    assert {job.owner for job in older.find()} == {"ann", "bob"}
    assert newer.get(own.id).team == "nobody's"
    assert newer.get(fit.id).team == "red"
    assert newer.get(older.retry(fit.id, again=True).id).team == "nobody's"
    assert newer.claim(worker="w", kinds=["tune"])[0].job_id == tune.id


def test_a_column_without_a_default_stops_the_older_release(migrated: Engine) -> None:
    if migrated.dialect.name == "sqlite":  # which adds no such column: the table as a rebuild would leave it
        NewerBase.metadata.drop_all(migrated)
        NewerBase.metadata.tables["deployed"].c.team.server_default, kept = None, Newer.__table__.c.team.server_default
        try:
            NewerBase.metadata.create_all(migrated)
        finally:
            Newer.__table__.c.team.server_default = kept
    else:
        with migrated.begin() as connection:
            connection.execute(text("ALTER TABLE deployed ALTER COLUMN team DROP DEFAULT"))
    with pytest.raises(IntegrityError):
        JobStore(migrated, model=Older).submit("fit", "spam", owner="bob")


# -------------------------------------------------------------------------------------------------------------- backups


def _finished(url: str) -> MlJob:
    with JobStore(url) as store:
        job = store.submit("train", "spam", {"lr": 0.1})
        store.complete(store.claim_one(job, worker="w"), {"f1": 0.9})
        store.claim_one(store.submit("train", "eggs"), worker="w")
        return store.get(job)


def _is_guarded(url: str, job: MlJob) -> None:
    schema.verify(url)
    with JobStore(url) as store:
        assert store.get(job.id).to_json() == job.to_json()
        assert store.counts(exact=True).total() == 2
        with pytest.raises(TerminalStateError), store.engine.begin() as connection:
            connection.execute(text("UPDATE ml_jobs SET progress = 1 WHERE status = 'completed'"))
        later = store.claim_one(store.submit("train", "ham"), worker="w")
        assert later.token > 2  # the sequence came along


@pytest.mark.parametrize("how", ["all", "data only"])
def test_a_dump_is_restored_with_its_guard(
    postgres_server: postgres.Server, empty_postgres_databases: Databases, tmp_path: Path, how: str
) -> None:
    with empty_postgres_databases.fresh() as old, empty_postgres_databases.fresh() as new:
        schema.upgrade(old)
        job = _finished(old)

        def run(program: str, *options: str, url: str) -> None:
            place = make_url(url)
            at = ["-h", str(place.host), "-p", str(place.port), "-U", str(place.username), "-d", str(place.database)]
            subprocess.run([postgres_server.binaries / program, *at, *options], check=True, capture_output=True)

        dump = str(tmp_path / "dump")
        if how == "all":
            run("pg_dump", "-Fc", "-f", dump, url=old)
            run("pg_restore", dump, url=new)
        else:
            schema.upgrade(new)
            run("pg_dump", "-Fc", "--exclude-table=mljobs_alembic_version", "-f", dump, url=old)
            run("pg_restore", "--data-only", dump, url=new)
        _is_guarded(new, job)


def test_a_copy_of_a_file_in_use_is_whole_and_guarded(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    schema.upgrade(url)
    job = _finished(url)
    with JobStore(url) as store, store.connect() as held:
        assert held is not None  # somebody reads and writes meanwhile
        copies = [tmp_path / "backup.db", tmp_path / "vacuum.db"]
        with closing(sqlite3.connect(tmp_path / "jobs.db")) as old:
            with closing(sqlite3.connect(copies[0])) as new:
                old.backup(new)
            old.execute("VACUUM INTO ?", [str(copies[1])])
    for copy in copies:
        _is_guarded(f"sqlite:///{copy}", job)


# -------------------------------------------------------------------------------------------------------------- servers


def test_a_store_puts_its_file_into_wal_mode_and_readers_wait_for_no_writer(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store, JobStore(sqlite_url, connect_args={"timeout": 0}) as reader:
        job = store.submit("train", "spam")
        with store.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        with store.engine.begin() as writing:
            writing.execute(text("UPDATE ml_jobs SET progress = 0"))
            schema.ready(reader.engine)
            assert reader.get(job).target_name == "spam"
            assert reader.counts(exact=True).total() == len(reader.find()) == 1


def test_storage_parameters_are_the_hosts_own(empty_postgres_databases: Databases) -> None:
    page = (ROOT / "docs" / "deploying.md").read_text()
    settings = page.partition("```sql\n")[2].partition("```")[0]
    with empty_postgres_databases.fresh() as url:
        schema.upgrade(url)
        engine = create_engine(url, poolclass=NullPool)
        with engine.begin() as connection:
            for statement in settings.strip().removesuffix(";").split(";"):
                connection.execute(text(statement))
        schema.verify(engine)
        with engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), MlJob.metadata) == []


def test_a_job_is_written_three_times_and_a_heartbeat_changes_no_index(postgres_url: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    with engine.begin() as connection:
        job = jobs.submit(connection, "train", "spam")
        claim = jobs.claim_one(connection, job, worker="w")
        assert isinstance(claim.lease.acquired_at, datetime)
        jobs.renew(connection, [claim])
        jobs.complete(connection, claim, {"f1": 0.9})
        written = "SELECT relname, n_tup_ins, n_tup_upd, n_tup_hot_upd, n_tup_del FROM pg_stat_xact_user_tables"
        found = {row.relname: tuple(row)[1:] for row in connection.execute(text(written))}
    assert found["ml_jobs"][:2] == (1, 2)
    assert found["ml_job_leases"] == (1, 1, 1, 1)
