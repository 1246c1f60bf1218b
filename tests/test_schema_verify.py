"""``verify`` sees every part that is gone or different, names it, and is silent about what a host has added."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection, Engine, MetaData, Table, create_engine, event, make_url, text
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.pool import NullPool

from mljobs import MlJob, MlJobLease, MlJobMixin, SchemaError, TerminalStateError, metadata, schema
from mljobs.alembic_plugin import _rebuilding as rebuilding
from mljobs.errors import InvalidValueError
from mljobs.guards._overview import overview_ddl
from mljobs.types import SqliteCheck
from tests.cases import case, undone
from tests.host_application import HostBase
from tests.postgres import Server

HARM_IN_SQLITE = {
    "trigger ml_jobs_guard_delete of table ml_jobs is missing": "DROP TRIGGER ml_jobs_guard_delete",
    "trigger ml_jobs_count_update of table ml_jobs is missing": "DROP TRIGGER ml_jobs_count_update",
    "trigger ml_jobs_guard_key of table ml_jobs differs from character": "DROP TRIGGER ml_jobs_guard_key ;; "
    "CREATE TRIGGER ml_jobs_guard_key BEFORE UPDATE ON ml_jobs BEGIN SELECT 1; END",
    "index ix_ml_jobs_active of table ml_jobs is missing": "DROP INDEX ix_ml_jobs_active",
    "index ix_ml_jobs_created of table ml_jobs is 'CREATE INDEX ix_ml_jobs_created ON ml_jobs (id, created_at)', "
    "expected 'CREATE INDEX ix_ml_jobs_created ON ml_jobs (created_at, id)'": "DROP INDEX ix_ml_jobs_created ;; "
    "CREATE INDEX ix_ml_jobs_created ON ml_jobs (id, created_at)",
    "index ix_ml_jobs_retries of table ml_jobs is 'CREATE INDEX ix_ml_jobs_retries ON ml_jobs (retry_of)'": "DROP INDEX "
    "ix_ml_jobs_retries ;; CREATE INDEX ix_ml_jobs_retries ON ml_jobs (retry_of)",
    "table ml_job_leases is missing": "DROP TABLE ml_job_leases",
    "column worker of table ml_job_leases is missing": "DROP VIEW ml_jobs_overview ;; "
    "ALTER TABLE ml_job_leases RENAME COLUMN worker TO who",
    "companion ml_jobs_counts of table ml_jobs is missing": "DROP TABLE ml_jobs_counts",
    "rows of companion ml_jobs_counts of table ml_jobs": "DELETE FROM ml_jobs_counts WHERE kind = 'train'",
    "rows of companion ml_jobs_guard of table ml_jobs is 'replace=0, retention=1', expected 'replace=0, retention=0'": (
        "UPDATE ml_jobs_guard SET open = 1 WHERE name = 'retention'"
    ),
    "view ml_jobs_overview of table ml_job_leases is missing": "DROP VIEW ml_jobs_overview",
    "view ml_jobs_overview of table ml_job_leases differs from character": "DROP VIEW ml_jobs_overview ;; "
    "CREATE VIEW ml_jobs_overview AS SELECT id, status FROM ml_jobs",
}
LEASES = "DROP TABLE ml_job_leases ;; CREATE TABLE ml_job_leases (token INTEGER NOT NULL PRIMARY KEY{}, worker {}"
LEASE_CHECKS = ",\n".join(  # SQLAlchemy 2.0 finds one CHECK in a line
    f"CONSTRAINT {check.name} CHECK ({check.sqltext})"
    for check in MlJob.__leases__.constraints
    if isinstance(check, SqliteCheck)
)
LEASE_END = (
    f", acquired_at BIGINT NOT NULL, expires_at BIGINT NOT NULL, target_lock TEXT,\n{LEASE_CHECKS}\n) ;; "
    "CREATE UNIQUE INDEX uq_ml_job_leases_target ON ml_job_leases (target_lock) WHERE target_lock IS NOT NULL"
)
HARM_IN_SQLITE |= {
    "AUTOINCREMENT of the key of table ml_job_leases is missing": LEASES.format("", "TEXT NOT NULL") + LEASE_END,
    "column worker of table ml_job_leases is 'TEXT', expected 'TEXT NOT NULL'": LEASES.format(" AUTOINCREMENT", "TEXT")
    + LEASE_END,
}
HARM_IN_POSTGRESQL = {
    "trigger ml_jobs_guard_truncate of table ml_jobs is missing": "DROP TRIGGER ml_jobs_guard_truncate ON ml_jobs",
    "state of trigger ml_jobs_guard_update of table ml_jobs is 'disabled', expected 'enabled'": (
        "ALTER TABLE ml_jobs DISABLE TRIGGER ml_jobs_guard_update"
    ),
    "state of trigger ml_jobs_guard_delete of table ml_jobs is 'disabled'": (
        "ALTER TABLE ml_jobs ENABLE REPLICA TRIGGER ml_jobs_guard_delete"
    ),
    "function ml_jobs_guard of table ml_jobs differs from character": "CREATE OR REPLACE FUNCTION ml_jobs_guard() "
    "RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off "
    "SET standard_conforming_strings = on AS $$ BEGIN RETURN NEW; END $$",
    "trigger ml_jobs_guard_update of table ml_jobs differs from character": "DROP TRIGGER ml_jobs_guard_update ON ml_jobs"
    " ;; CREATE TRIGGER ml_jobs_guard_update BEFORE UPDATE OF status ON ml_jobs FOR EACH ROW "
    "EXECUTE FUNCTION ml_jobs_guard()",
    "index ix_ml_jobs_active of table ml_jobs is missing": "DROP INDEX ix_ml_jobs_active",
    "index ix_ml_jobs_created of table ml_jobs is 'CREATE INDEX ix_ml_jobs_created ON ml_jobs USING btree (id, "
    "created_at)'": "DROP INDEX ix_ml_jobs_created ;; CREATE INDEX ix_ml_jobs_created ON ml_jobs (id, created_at)",
    "index ix_ml_jobs_queue of table ml_jobs differs from character": "DROP INDEX ix_ml_jobs_queue ;; "
    "CREATE INDEX ix_ml_jobs_queue ON ml_jobs (priority, created_at, id) WHERE status = 'queued'",
    "table ml_job_leases is missing": "DROP TABLE ml_job_leases CASCADE",
    "column worker of table ml_job_leases is 'character varying(10) NOT NULL', expected 'text NOT NULL'": (
        "DROP VIEW ml_jobs_overview ;; ALTER TABLE ml_job_leases ALTER COLUMN worker TYPE varchar(10)"
    ),
    "column created_at of table ml_jobs is 'timestamp(6) with time zone NOT NULL', "
    "expected 'timestamp(3) with time zone NOT NULL'": "DROP VIEW ml_jobs_overview ;; "
    "DROP TRIGGER ml_jobs_guard_update ON ml_jobs ;; DROP TRIGGER ml_jobs_guard_range ON ml_jobs ;; "
    "ALTER TABLE ml_jobs ALTER COLUMN created_at TYPE timestamptz(6)",
    "column target_name of table ml_jobs is 'text', expected 'text NOT NULL'": (
        "ALTER TABLE ml_jobs ALTER COLUMN target_name DROP NOT NULL"
    ),
    "column priority of table ml_jobs is 'smallint NOT NULL DEFAULT 5', expected 'smallint NOT NULL DEFAULT 0'": (
        "ALTER TABLE ml_jobs ALTER COLUMN priority SET DEFAULT 5"
    ),
    "column token of table ml_job_leases is 'bigint NOT NULL GENERATED BY DEFAULT AS IDENTITY'": (
        "ALTER TABLE ml_job_leases ALTER COLUMN token SET GENERATED BY DEFAULT"
    ),
    "check ck_ml_jobs_progress of table ml_jobs is missing": "ALTER TABLE ml_jobs DROP CONSTRAINT ck_ml_jobs_progress",
    "check ck_ml_jobs_kind of table ml_jobs differs from character": "ALTER TABLE ml_jobs DROP CONSTRAINT ck_ml_jobs_kind "
    ";; ALTER TABLE ml_jobs ADD CONSTRAINT ck_ml_jobs_kind CHECK (kind IN ('train', 'nap'))",
    "check ck_ml_jobs_progress of table ml_jobs is 'CHECK (((progress >= 0) AND (progress <= 100))) NOT VALID'": (
        "ALTER TABLE ml_jobs DROP CONSTRAINT ck_ml_jobs_progress ;; ALTER TABLE ml_jobs "
        "ADD CONSTRAINT ck_ml_jobs_progress CHECK (progress BETWEEN 0 AND 100) NOT VALID"
    ),
    "primary key ml_job_leases_pkey of table ml_job_leases is missing": (
        "ALTER TABLE ml_job_leases DROP CONSTRAINT ml_job_leases_pkey"
    ),
    "statistics ml_jobs_kind_status of table ml_jobs is missing": "DROP STATISTICS ml_jobs_kind_status",
    "view ml_jobs_overview of table ml_job_leases is missing": "DROP VIEW ml_jobs_overview",
    "view ml_jobs_overview of table ml_job_leases differs from character": "CREATE OR REPLACE VIEW ml_jobs_overview "
    "WITH (security_invoker = true) AS "
    "SELECT * FROM (SELECT (jsonb_populate_record(NULL::ml_jobs_overview, '{}')).*) AS nothing",
    "view ml_jobs_overview of table ml_job_leases differs from": (
        "ALTER VIEW ml_jobs_overview SET (security_invoker = false)"
    ),
}


def problems(target: Engine | Connection, metadata: MetaData | None = None) -> list[str]:
    try:
        schema.verify(target, metadata=metadata)
    except SchemaError as error:
        return list(error.problems)
    return []


def test_verify_names_what_differs(engine: Engine) -> None:
    harm = HARM_IN_SQLITE if engine.dialect.name == "sqlite" else HARM_IN_POSTGRESQL
    # Some harm cannot be done alone.
    with_it = (
        "trigger ml_jobs_guard_update", "trigger ml_jobs_guard_range", "view ml_jobs_overview", "check ck_mljobs_types",
    )  # fmt: skip
    for sentence, statements in harm.items():
        with case(statements), undone(engine) as connection:
            for statement in statements.split(" ;; "):
                connection.exec_driver_sql(statement)
            found = problems(connection)
            assert [problem for problem in found if problem.startswith(sentence)], found
            assert all(problem.startswith((sentence, *with_it)) for problem in found), found
    assert problems(engine) == []


def test_each_difference_is_one_sentence_that_fits_a_terminal(engine: Engine) -> None:
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql(
                "CREATE OR REPLACE FUNCTION ml_jobs_guard() RETURNS trigger LANGUAGE plpgsql "
                "SET search_path = pg_catalog, pg_temp SET row_security = off SET standard_conforming_strings = on "
                "AS $$ BEGIN RETURN NEW; END $$"
            )
        else:
            connection.exec_driver_sql("DROP TRIGGER ml_jobs_guard_insert")
            connection.exec_driver_sql(
                "CREATE TRIGGER ml_jobs_guard_insert BEFORE INSERT ON ml_jobs BEGIN SELECT 'changed'; END"
            )
    (problem,) = problems(engine)
    assert "\n" not in problem
    assert len(problem) < 400


NO_DIFFERENCE = {
    "what a host adds": [
        "ALTER TABLE ml_jobs ADD COLUMN owner INTEGER DEFAULT 7",
        "CREATE INDEX ix_host ON ml_jobs (owner)",
    ],
    "a table renamed and back": ["ALTER TABLE ml_jobs RENAME TO elsewhere", "ALTER TABLE elsewhere RENAME TO ml_jobs"],
}
TRIGGERS_OF_A_HOST = {
    "sqlite": ["CREATE TRIGGER host AFTER INSERT ON ml_jobs BEGIN SELECT 1; END"],
    "postgresql": [
        "ALTER TABLE ml_jobs ADD CONSTRAINT host CHECK (target_name <> '')",
        "CREATE FUNCTION host() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$",
        "CREATE TRIGGER host BEFORE INSERT ON ml_jobs FOR EACH ROW EXECUTE FUNCTION host()",
    ],
}


def test_what_a_host_adds_renames_or_counts_is_no_difference(engine: Engine) -> None:
    for name, statements in {**NO_DIFFERENCE, "a trigger": TRIGGERS_OF_A_HOST[engine.dialect.name]}.items():
        with case(name), undone(engine) as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)
            assert problems(connection) == []
    with case("counters that have counted"), undone(engine) as connection:
        row = {"kind": "train", "target_name": "spam", "status": "completed", "spec_json": "{}"}
        connection.execute(MlJob.__table__.insert(), row)
        assert problems(connection) == []


def test_verifying_changes_nothing(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE mine (n INTEGER)")
        schema.verify(connection)
        if engine.dialect.name == "postgresql":
            assert connection.scalar(text("SELECT count(*) FROM pg_class WHERE relpersistence = 't'")) == 0
        connection.commit()
        assert connection.scalar(text("SELECT count(*) FROM mine")) == 0


def test_an_empty_database_has_every_table_missing(empty_url: str) -> None:
    with pytest.raises(SchemaError) as caught:
        schema.verify(empty_url)
    assert caught.value.problems == (
        "table ml_jobs is missing",
        "table ml_job_leases is missing",
        "table ml_job_workers is missing",
    )


def test_a_schema_behind_this_release_is_an_error_that_says_upgrade(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema.stamp(engine)
    monkeypatch.setattr("mljobs.schema._versions.head", lambda: "9999_later")
    assert problems(engine) == [
        "the schema is at version 0001_ml_jobs, this release expects 9999_later: run an upgrade"
    ]


# ---------------------------------------------------------------------------------------------------- a host's tables


def test_a_hosts_own_tables_are_verified_with_their_guard(empty_url: str) -> None:
    engine = create_engine(empty_url)
    HostBase.metadata.create_all(engine)
    assert problems(engine, HostBase.metadata) == []
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP INDEX ix_training_runs_queue")
        connection.exec_driver_sql("DROP TABLE training_runs_leases")
        on = " ON training_runs" if engine.dialect.name == "postgresql" else ""
        connection.exec_driver_sql(f"DROP TRIGGER training_runs_guard_delete{on}")
    assert problems(engine, HostBase.metadata) == [
        "index ix_training_runs_queue of table training_runs is missing",
        "trigger training_runs_guard_delete of table training_runs is missing",
        "table training_runs_leases is missing",
    ]
    engine.dispose()


class AppBase(DeclarativeBase):
    """Of a host that keeps its jobs in a schema of their own."""


class AppJob(MlJobMixin, AppBase):
    __tablename__ = "app_jobs"
    __table_args__ = {"schema": "app"}


@pytest.fixture(params=["sqlite", "postgresql"])
def app(request: pytest.FixtureRequest) -> Iterator[Connection]:
    """A connection to a database with an empty schema ``app``."""
    sqlite = request.param == "sqlite"
    url = request.getfixturevalue("sqlite_url" if sqlite else "postgres_url")
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql("ATTACH ':memory:' AS app" if sqlite else "CREATE SCHEMA app")
        yield connection


def test_tables_in_another_schema_are_verified_there(app: Connection) -> None:
    with pytest.raises(SchemaError) as caught:
        schema.verify(app, metadata=AppBase.metadata)
    assert caught.value.problems == (
        "table app_jobs is missing",
        "table app_jobs_leases is missing",
        "table app_jobs_workers is missing",
    )
    AppBase.metadata.create_all(app)
    schema.verify(app, metadata=AppBase.metadata)


def test_a_connection_that_translates_schemas_is_verified_where_it_points(app: Connection) -> None:
    schema.verify(app)
    app.execution_options(schema_translate_map={None: "app"})
    with pytest.raises(SchemaError, match="table ml_jobs is missing"):
        schema.verify(app)
    metadata.create_all(app)
    schema.verify(app)
    assert app.get_execution_options()["schema_translate_map"][None] == "app"


def test_metadata_without_a_job_table_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidValueError, match="MlJobMixin"):
        schema.verify(engine, metadata=MetaData())


# ------------------------------------------------------------------------------------------------- roles and schemas


@pytest.fixture
def role(postgres_admin: Engine, postgres_url: str) -> Iterator[str]:
    """The URL of a database for a role that may read the tables and create none."""
    name = f"reader_{postgres_url.rpartition('_')[2]}"
    with postgres_admin.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN")
    owner = create_engine(postgres_url, poolclass=NullPool)
    with owner.begin() as connection:
        connection.exec_driver_sql("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        connection.exec_driver_sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}")
    yield owner.url.set(username=name).render_as_string(hide_password=False)
    with owner.begin() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {name}")
        connection.exec_driver_sql(f"DROP ROLE {name}")


def test_a_role_that_may_create_no_table_can_verify(role: str) -> None:
    schema.verify(role)


def test_a_role_without_temporary_tables_gets_an_error_with_the_grant(role: str, postgres_url: str) -> None:
    owner = create_engine(postgres_url, poolclass=NullPool)
    with owner.begin() as connection:
        connection.exec_driver_sql(f"REVOKE TEMPORARY ON DATABASE {owner.url.database} FROM PUBLIC")
    with pytest.raises(SchemaError, match="GRANT TEMPORARY"):
        schema.verify(role)


def test_a_read_only_server_is_told_where_to_verify(postgres_url: str) -> None:
    options = {"options": "-cdefault_transaction_read_only=on"}
    with pytest.raises(SchemaError, match="on the primary"):
        schema.verify(create_engine(postgres_url, connect_args=options, poolclass=NullPool))


@pytest.mark.parametrize("path", ['"My App"', "app, shared"])
def test_tables_anywhere_in_the_search_path_are_verified(postgres_url: str, path: str) -> None:
    plain = create_engine(postgres_url, poolclass=NullPool)
    with plain.begin() as connection:
        for name in ('"My App"', "app", "shared"):
            connection.exec_driver_sql(f"CREATE SCHEMA {name}")

    def engine(search_path: str) -> Engine:
        escaped = search_path.replace(" ", "\\ ")
        return create_engine(postgres_url, connect_args={"options": f"-csearch_path={escaped}"}, poolclass=NullPool)

    last = engine(path.rpartition(", ")[2])
    schema.upgrade(last)
    assert problems(engine(path)) == []
    with last.begin() as connection:
        connection.exec_driver_sql("DROP INDEX ix_ml_jobs_queue")
    assert problems(engine(path)) == ["index ix_ml_jobs_queue of table ml_jobs is missing"]
    assert problems(plain) == []


# ----------------------------------------------------------------------------------------------- SQLite batch rebuilds


def _rebuild(url: str, table: str, **options: Any) -> Engine:
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        operations = Operations(MigrationContext.configure(connection))
        for statement in overview_ddl(MlJob.__table__, "sqlite", create=False):  # it stands in the way of the rename
            operations.execute(statement)
        with operations.batch_alter_table(table, recreate="always", **options):
            pass
        for statement in overview_ddl(MlJob.__table__, "sqlite"):
            operations.execute(statement)
    return engine


def test_a_sqlite_batch_rebuild_from_the_model_leaves_all_as_it_was(sqlite_url: str) -> None:
    """Given as ``copy_from``, the model's table is what Alembic drops: what stands beside it stays."""
    engine = create_engine(sqlite_url, poolclass=NullPool)
    with engine.begin() as connection:
        finished = {"kind": "train", "target_name": "a", "status": "completed", "spec_json": "{}"}
        connection.execute(MlJob.__table__.insert(), finished)
    assert problems(_rebuild(sqlite_url, "ml_jobs", copy_from=MlJob.__table__)) == []
    with pytest.raises(TerminalStateError), engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM ml_jobs")


@pytest.fixture
def no_plugin() -> Iterator[None]:
    """An Alembic before 1.18, and an ``env.py`` that does not import our plugin."""
    listeners = {"before_create": rebuilding._number_on, "before_drop": rebuilding._carry_over}
    for name, listener in listeners.items():
        event.remove(Table, name, listener)
    yield
    for name, listener in listeners.items():
        event.listen(Table, name, listener)


def test_a_sqlite_batch_rebuild_keeps_all_that_is_ours(sqlite_url: str) -> None:
    assert problems(_rebuild(sqlite_url, "ml_jobs")) == []
    assert problems(_rebuild(sqlite_url, "ml_job_leases")) == []


def test_a_sqlite_batch_rebuild_that_drops_the_guard_is_noticed(sqlite_url: str, no_plugin: None) -> None:
    found = problems(_rebuild(sqlite_url, "ml_jobs"))
    for role in ("update", "delete", "insert", "key"):
        assert f"trigger ml_jobs_guard_{role} of table ml_jobs is missing" in found


def test_a_sqlite_batch_rebuild_of_the_leases_that_would_use_tokens_again_is_noticed(
    sqlite_url: str, no_plugin: None
) -> None:
    assert problems(_rebuild(sqlite_url, "ml_job_leases")) == [
        "AUTOINCREMENT of the key of table ml_job_leases is missing"
    ]


def test_a_sqlite_batch_rebuild_as_the_docs_show_it_leaves_all_as_it_was(sqlite_url: str, no_plugin: None) -> None:
    page = (Path(__file__).parent.parent / "docs" / "migrations.md").read_text()
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "batch_alter_table" in part)
    migration: dict[str, Any] = {}
    exec(compile(block, "migrations.md", "exec"), migration)
    engine = create_engine(sqlite_url, poolclass=NullPool)
    finished = {"kind": "train", "target_name": "spam", "status": "completed", "spec_json": "{}"}
    with engine.begin() as connection:
        connection.execute(MlJob.__table__.insert(), finished)
        with Operations.context(MigrationContext.configure(connection)):
            migration["upgrade"]()
    assert problems(engine) == []
    with pytest.raises(TerminalStateError), engine.begin() as connection:
        connection.exec_driver_sql("UPDATE ml_jobs SET progress = 1")
    with engine.connect() as connection:
        counted = "SELECT jobs FROM ml_jobs_counts WHERE kind = 'train' AND status = 'completed'"
        assert connection.exec_driver_sql(counted).scalar() == 1
    assert problems(_rebuild(sqlite_url, "ml_job_leases", copy_from=MlJobLease.__table__)) == []


def test_a_database_that_was_dumped_and_restored_is_as_it_should_be(
    postgres_server: Server, postgres_url: str, postgres_admin: Engine
) -> None:
    """What PostgreSQL writes out for a CHECK reads back as another tree, and is written out otherwise."""
    source = create_engine(postgres_url, poolclass=NullPool)
    HostBase.metadata.create_all(source)
    plain = make_url(postgres_url).set(drivername="postgresql")
    with postgres_admin.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE restored")
    target = plain.set(database="restored").render_as_string(hide_password=False)
    try:
        dump = [postgres_server.binaries / "pg_dump", plain.render_as_string(hide_password=False)]
        dumped = subprocess.run(dump, capture_output=True, check=True)
        psql = [postgres_server.binaries / "psql", "-v", "ON_ERROR_STOP=1", target]
        subprocess.run(psql, input=dumped.stdout, capture_output=True, check=True)
        schema.verify(target)
        schema.verify(target, metadata=HostBase.metadata)
    finally:
        with postgres_admin.connect() as connection:
            connection.exec_driver_sql("DROP DATABASE restored WITH (FORCE)")
