"""The migrations make what the models describe, all or nothing, one at a time, and verify sees every difference."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Engine, create_engine, inspect, make_url, text
from sqlalchemy.pool import NullPool

from mljobs import MlJob, MlJobKind, MlJobStatus, SchemaError, TerminalStateError, metadata, schema
from mljobs.errors import InvalidValueError
from tests.postgres import Server

ROOT = Path(__file__).parent.parent


@pytest.fixture
def empty(empty_url: str) -> Any:
    engine = create_engine(empty_url, poolclass=NullPool)
    yield engine
    engine.dispose()


def _tables(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names())


def test_migrations_make_what_the_models_describe(empty: Engine) -> None:
    schema.upgrade(empty)
    schema.verify(empty)
    assert schema.current(empty) == schema.head()


def test_create_all_makes_what_the_migrations_make(empty: Engine) -> None:
    metadata.create_all(empty)
    schema.verify(empty)


def test_down_to_base_leaves_nothing_and_up_again_works(empty: Engine) -> None:
    schema.upgrade(empty)
    schema.downgrade(empty)
    assert _tables(empty) == {schema.VERSION_TABLE}
    if empty.dialect.name == "postgresql":
        with empty.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM pg_proc WHERE proname LIKE 'ml\\_jobs%'")) == 0
    schema.upgrade(empty)
    schema.verify(empty)


def test_upgrading_twice_changes_nothing(empty: Engine) -> None:
    schema.upgrade(empty)
    schema.upgrade(empty)
    schema.verify(empty)


def test_the_check_lists_are_those_of_the_enums(empty: Engine) -> None:
    schema.upgrade(empty)
    checks = {check["name"]: str(check["sqltext"]) for check in inspect(empty).get_check_constraints("ml_jobs")}
    for name, enum in (("ck_ml_jobs_kind", MlJobKind), ("ck_ml_jobs_status", MlJobStatus)):
        for member in enum:
            assert f"'{member.token}'" in checks[name]


def test_a_connection_is_used_and_its_transaction_left_to_the_caller(empty: Engine) -> None:
    with empty.connect() as connection:
        schema.upgrade(connection)
        assert schema.current(connection) == schema.head()
        connection.rollback()
    assert _tables(empty) == set()


def test_an_async_engine_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(InvalidValueError, match="run_sync"):
        schema.upgrade(object())  # type: ignore[arg-type]


def _alembic(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MLJOBS_DATABASE_URL": url}
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_alembic_command_upgrades_checks_and_downgrades(empty_url: str, empty: Engine) -> None:
    for arguments in (["upgrade", "head"], ["check"], ["downgrade", "base"], ["upgrade", "mljobs@head"]):
        done = _alembic(empty_url, *arguments)
        assert done.returncode == 0, done.stderr
    schema.verify(empty)


def test_a_change_of_the_model_is_seen_by_alembic_check(empty_url: str, empty: Engine) -> None:
    schema.upgrade(empty)
    with empty.begin() as connection:
        connection.execute(text("DROP INDEX ix_ml_jobs_target"))
    assert _alembic(empty_url, "check").returncode != 0


def test_a_host_table_is_none_of_our_business(empty_url: str, empty: Engine) -> None:
    with empty.begin() as connection:
        connection.execute(text("CREATE TABLE uploads (id INTEGER PRIMARY KEY)"))
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('host1')"))
    schema.upgrade(empty)
    assert _alembic(empty_url, "check").returncode == 0
    schema.downgrade(empty)
    assert _tables(empty) == {"uploads", "alembic_version", schema.VERSION_TABLE}
    with empty.connect() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "host1"


def test_offline_sql_is_applied_by_the_databases_own_shell(
    empty_url: str, empty: Engine, request: pytest.FixtureRequest
) -> None:
    script = _alembic(empty_url, "upgrade", "head", "--sql")
    assert script.returncode == 0, script.stderr
    if empty.dialect.name == "sqlite":
        shell = sqlite3.connect(str(empty.url.database))
        shell.executescript(script.stdout)
        shell.close()
    else:
        server: Server = request.getfixturevalue("postgres_server")
        url = make_url(empty_url)
        done = subprocess.run(
            [
                server.binaries / "psql", "-v", "ON_ERROR_STOP=1",
                "-h", str(url.host), "-p", str(url.port), "-U", str(url.username), "-d", str(url.database),
            ],
            input=script.stdout,
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    schema.verify(empty)
    assert schema.current(empty) == schema.head()


BREAKS: dict[str, dict[str, str]] = {
    "a lost trigger": {
        "sqlite": "DROP TRIGGER ml_jobs_guard_delete",
        "postgresql": "DROP TRIGGER ml_jobs_guard_delete ON ml_jobs",
    },
    "a trigger with another body": {
        "sqlite": "DROP TRIGGER ml_jobs_guard_update ;; "
        "CREATE TRIGGER ml_jobs_guard_update BEFORE UPDATE ON ml_jobs BEGIN SELECT 1; END",
        "postgresql": "CREATE OR REPLACE FUNCTION ml_jobs_guard() RETURNS trigger LANGUAGE plpgsql "
        "AS $$ BEGIN RETURN NEW; END $$",
    },
    "a trigger on fewer columns": {
        "sqlite": "DROP TRIGGER ml_jobs_guard_key",
        "postgresql": "DROP TRIGGER ml_jobs_guard_update ON ml_jobs ;; CREATE TRIGGER ml_jobs_guard_update BEFORE UPDATE OF "
        "status ON ml_jobs FOR EACH ROW EXECUTE FUNCTION ml_jobs_guard()",
    },
    "a lost index": {"sqlite": "DROP INDEX ix_ml_jobs_queue", "postgresql": "DROP INDEX ix_ml_jobs_queue"},
    "an index without its condition": {
        "sqlite": "DROP INDEX ix_ml_jobs_queue ;; CREATE INDEX ix_ml_jobs_queue ON ml_jobs (priority DESC, created_at, id)",
        "postgresql": "DROP INDEX ix_ml_jobs_queue ;; "
        "CREATE INDEX ix_ml_jobs_queue ON ml_jobs (priority DESC, created_at, id)",
    },
    "a lost table": {"sqlite": "DROP TABLE ml_job_leases", "postgresql": "DROP TABLE ml_job_leases"},
    "a lost column": {
        "sqlite": "DROP INDEX ix_ml_job_leases_expires ;; ALTER TABLE ml_job_leases DROP COLUMN expires_at",
        "postgresql": "ALTER TABLE ml_job_leases DROP COLUMN expires_at",
    },
    "a door table without its rows": {
        "sqlite": "DELETE FROM ml_jobs_guard",
        "postgresql": "ALTER TABLE ml_jobs DISABLE TRIGGER ml_jobs_guard_update",
    },
    "a lost check": {
        "sqlite": "DROP TABLE ml_jobs_counts",
        "postgresql": "ALTER TABLE ml_jobs DROP CONSTRAINT ck_ml_jobs_progress",
    },
    "a column of another type": {
        "sqlite": "ALTER TABLE ml_job_leases RENAME COLUMN worker TO who",
        "postgresql": "ALTER TABLE ml_job_leases ALTER COLUMN worker TYPE varchar(10)",
    },
}


@pytest.mark.parametrize("harm", BREAKS)
def test_verify_names_what_differs(engine: Engine, harm: str) -> None:
    schema.verify(engine)
    with engine.begin() as connection:
        for statement in BREAKS[harm][engine.dialect.name].split(" ;; "):
            connection.exec_driver_sql(statement)
    with pytest.raises(SchemaError) as caught:
        schema.verify(engine)
    assert caught.value.problems
    assert all("ml_job" in problem for problem in caught.value.problems)


def test_what_a_host_adds_is_no_difference(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE ml_jobs ADD COLUMN owner INTEGER"))
        connection.execute(text("CREATE INDEX ix_host ON ml_jobs (owner)"))
    schema.verify(engine)


def test_verifying_changes_nothing(engine: Engine) -> None:
    with engine.connect() as connection:
        schema.verify(connection)
        if engine.dialect.name == "postgresql":
            assert connection.scalar(text("SELECT count(*) FROM pg_class WHERE relpersistence = 't'")) == 0
        connection.rollback()


def test_a_sqlite_batch_rebuild_that_drops_the_guard_is_noticed(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, poolclass=NullPool)
    with engine.begin() as connection:
        operations = Operations(MigrationContext.configure(connection))
        with operations.batch_alter_table("ml_jobs", recreate="always"):
            pass
    with pytest.raises(SchemaError) as caught:
        schema.verify(engine)
    assert any("trigger ml_jobs_guard_update" in problem for problem in caught.value.problems)


def test_a_schema_newer_than_the_code_is_refused(empty: Engine) -> None:
    schema.upgrade(empty)
    with empty.begin() as connection:
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999_future'"))
    actions: list[Callable[[Engine], None]] = [schema.upgrade, schema.downgrade, schema.verify]
    for action in actions:
        with pytest.raises(SchemaError, match="9999_future"):
            action(empty)
    assert "ml_jobs" in _tables(empty)


def test_tables_from_elsewhere_are_refused_until_they_are_stamped(engine: Engine) -> None:
    with pytest.raises(SchemaError, match="stamp"):
        schema.upgrade(engine)
    schema.verify(engine)
    schema.stamp(engine)
    schema.upgrade(engine)
    assert schema.current(engine) == schema.head()


def test_a_revision_that_does_not_exist_is_a_clear_error(empty: Engine) -> None:
    with pytest.raises(SchemaError, match="nowhere"):
        schema.upgrade(empty, "nowhere")
    assert _tables(empty) == set()


HALF_WAY = """
from alembic import op
revision = "0002_breaks"
down_revision = "0001_ml_jobs"
branch_labels = None
depends_on = None

def upgrade():
    op.execute("CREATE TABLE half_way (id INTEGER)")
    op.execute("INSERT INTO half_way VALUES (1)")
    op.execute("this is not SQL")
"""


def test_an_upgrade_that_fails_half_way_leaves_nothing(
    empty: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "0002_breaks.py").write_text(HALF_WAY)
    original = schema._config

    def config(connection: Any = None) -> Config:
        made = original(connection)
        made.set_main_option(
            "version_locations", os.pathsep.join([str(schema.migrations_path() / "versions"), str(broken)])
        )
        return made

    monkeypatch.setattr(schema, "_config", config)
    with pytest.raises(Exception, match="syntax error"):
        schema.upgrade(empty)
    assert _tables(empty) == set()


def _upgrade_when_told(url: str, barrier: Any, results: Any) -> None:
    engine = create_engine(url, poolclass=NullPool)
    barrier.wait(30)
    try:
        schema.upgrade(engine)
        results.put("done")
    except BaseException as error:  # noqa: BLE001 - to be shown by the test
        results.put(repr(error))


def test_processes_that_upgrade_at_the_same_moment_all_succeed(empty_url: str, empty: Engine) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(4), spawn.Queue()
    processes = [spawn.Process(target=_upgrade_when_told, args=(empty_url, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == ["done"] * 4
    for process in processes:
        process.join(30)
    schema.verify(empty)


def test_the_guard_of_a_migrated_database_holds(empty: Engine) -> None:
    schema.upgrade(empty)
    with empty.begin() as connection:
        connection.execute(
            MlJob.__table__.insert(),
            {"kind": "train", "target_name": "spam", "status": "completed", "spec_json": "{}"},
        )
    with pytest.raises(TerminalStateError), empty.begin() as connection:
        connection.exec_driver_sql("UPDATE ml_jobs SET progress = 1")


def test_every_revision_is_frozen_and_goes_down_again() -> None:
    for path in (schema.migrations_path() / "versions").glob("*.py"):
        source = path.read_text()
        assert "import mljobs" not in source, path
        assert "from mljobs" not in source, path
        assert "def downgrade" in source, path


def test_the_top_level_configuration_has_one_head() -> None:
    config = Config(str(ROOT / "alembic.ini"))
    command.heads(config)
    assert schema.head()
