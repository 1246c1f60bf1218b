"""The migrations make what the models describe, all or nothing, one at a time, and verify sees every difference."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine, inspect, make_url, text

from mljobs import MlJob, MlJobKind, MlJobStatus, SchemaError, TerminalStateError, metadata, schema
from tests.fork_server import ForkServer
from tests.postgres import Server

ROOT = Path(__file__).parent.parent
Alembic = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def empty(empty_url: str) -> Any:
    engine = create_engine(empty_url)
    yield engine
    engine.dispose()


@pytest.fixture
def engine_of_create_all(empty: Engine, request: pytest.FixtureRequest) -> Any:
    """An engine on a database of the same kind, made from the models."""
    kind = "postgres" if empty.dialect.name == "postgresql" else "sqlite"
    engine = create_engine(request.getfixturevalue(f"{kind}_url"))
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


def _dump(engine: Engine, binaries: Path | None) -> list[str]:
    """Return every definition in the database as the database itself tells it, whatever ``verify`` may think of it."""
    if binaries is None:
        with engine.connect() as connection:
            rows = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")
            # SQLite keeps the text as it was sent; the order of the CHECKs, a line each, is not fixed.
            return sorted(
                "\n".join(sorted(" ".join(line.split()).rstrip(",") for line in sql.splitlines())) for (sql,) in rows
            )
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    dump = [binaries / "pg_dump", "--schema-only", "--no-owner", "--exclude-table", schema.VERSION_TABLE, url]
    done = subprocess.run(dump, capture_output=True, text=True, check=True)
    return sorted(line for line in done.stdout.split(";\n") if "\\restrict" not in line and "\\unrestrict" not in line)


def test_migrations_and_create_all_make_the_same_catalog(
    empty: Engine, engine_of_create_all: Engine, request: pytest.FixtureRequest
) -> None:
    postgresql = empty.dialect.name == "postgresql"
    binaries = request.getfixturevalue("postgres_server").binaries if postgresql else None
    schema.upgrade(empty)
    if not postgresql:
        with empty.begin() as connection:
            connection.exec_driver_sql(f"DROP TABLE {schema.VERSION_TABLE}")
    made, wanted = _dump(empty, binaries), _dump(engine_of_create_all, binaries)
    assert len(wanted) > 20
    assert made == wanted


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
        assert re.findall(r"'(\w+)'", checks[name]) == [member.token for member in enum]


def test_a_connection_is_used_and_its_transaction_left_to_the_caller(empty: Engine) -> None:
    with empty.connect() as connection:
        schema.upgrade(connection)
        assert schema.current(connection) == schema.head()
        connection.rollback()
    assert _tables(empty) == set()


@pytest.fixture
def alembic(python: ForkServer) -> Alembic:
    """Runs an ``alembic`` command, by default in the checkout's root."""

    def run(url: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return python.run("-m", "alembic", *arguments, cwd=cwd, env={"MLJOBS_DATABASE_URL": url})

    return run


def test_the_alembic_command_upgrades_checks_and_downgrades(empty_url: str, alembic: Alembic, empty: Engine) -> None:
    for arguments in (["upgrade", "head"], ["check"], ["downgrade", "base"], ["upgrade", "mljobs@head"]):
        done = alembic(empty_url, *arguments)
        assert done.returncode == 0, done.stderr
    schema.verify(empty)


def test_the_alembic_command_works_from_any_directory_and_takes_a_url(
    empty_url: str, alembic: Alembic, tmp_path: Path
) -> None:
    ini = str(ROOT / "alembic.ini")
    async_url = empty_url.replace("sqlite:", "sqlite+aiosqlite:").replace("+psycopg:", "+asyncpg:")
    done = alembic("", "-c", ini, "-x", f"url={async_url}", "upgrade", "head", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    schema.verify(empty_url)
    assert not (tmp_path / "mljobs.db").exists()
    done = alembic("", "-c", ini, "upgrade", "head", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    schema.verify(f"sqlite:///{tmp_path / 'mljobs.db'}")


def test_the_alembic_command_says_an_unknown_revision_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "nowhere"],
        cwd=ROOT,
        env={**os.environ, "MLJOBS_DATABASE_URL": f"sqlite:///{tmp_path / 'jobs.db'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "FAILED: Can't locate revision identified by 'nowhere'" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_change_of_the_model_is_seen_by_alembic_check(empty_url: str, alembic: Alembic, empty: Engine) -> None:
    schema.upgrade(empty)
    with empty.begin() as connection:
        connection.execute(text("DROP INDEX ix_ml_jobs_target"))
    assert alembic(empty_url, "check").returncode != 0


def test_a_host_table_is_ignored(empty_url: str, alembic: Alembic, empty: Engine) -> None:
    with empty.begin() as connection:
        connection.execute(text("CREATE TABLE uploads (id INTEGER PRIMARY KEY)"))
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('host1')"))
    schema.upgrade(empty)
    assert alembic(empty_url, "check").returncode == 0
    schema.downgrade(empty)
    assert _tables(empty) == {"uploads", "alembic_version", schema.VERSION_TABLE}
    with empty.connect() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "host1"


def _apply(script: str, url: str, request: pytest.FixtureRequest) -> None:
    """Give the script to the database's own shell."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        shell = sqlite3.connect(str(parsed.database))
        shell.executescript(script)
        shell.close()
        return
    server: Server = request.getfixturevalue("postgres_server")
    plain = parsed.set(drivername="postgresql").render_as_string(hide_password=False)
    psql = [server.binaries / "psql", "-v", "ON_ERROR_STOP=1", plain]
    done = subprocess.run(psql, input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_offline_sql_is_applied_by_the_databases_own_shell(
    empty_url: str, alembic: Alembic, empty: Engine, request: pytest.FixtureRequest
) -> None:
    up = alembic(empty_url, "upgrade", "head", "--sql")
    assert up.returncode == 0, up.stderr
    _apply(up.stdout, empty_url, request)
    schema.verify(empty)
    assert schema.current(empty) == schema.head()
    down = alembic(empty_url, "downgrade", "head:base", "--sql")
    assert down.returncode == 0, down.stderr
    _apply(down.stdout, empty_url, request)
    assert _tables(empty) <= {schema.VERSION_TABLE}
    assert schema.current(empty) is None


def test_an_offline_script_that_fails_half_way_leaves_nothing(
    empty_url: str, alembic: Alembic, empty: Engine, request: pytest.FixtureRequest
) -> None:
    script = alembic(empty_url, "upgrade", "head", "--sql").stdout.replace("COMMIT;", "this is not SQL;\nCOMMIT;")
    with pytest.raises((sqlite3.OperationalError, AssertionError), match="syntax error"):
        _apply(script, empty_url, request)
    assert _tables(empty) == set()


def test_a_schema_newer_than_the_code_is_refused(empty: Engine) -> None:
    schema.upgrade(empty)
    with empty.begin() as connection:
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999_future'"))
    actions: list[Callable[[Engine], None]] = [schema.upgrade, schema.downgrade, schema.verify, schema.stamp]
    for action in actions:
        with pytest.raises(SchemaError, match=r"version 9999_future, which this release .* does not know: .*install"):
            action(empty)
    assert schema.current(empty) == "9999_future"
    assert "ml_jobs" in _tables(empty)


def test_tables_from_elsewhere_are_refused_until_they_are_stamped(engine: Engine) -> None:
    with pytest.raises(SchemaError, match=r"mljobs\.schema\.stamp"):
        schema.upgrade(engine)
    schema.stamp(engine)
    schema.upgrade(engine)
    assert schema.current(engine) == schema.head()


def test_tables_that_are_not_ours_cannot_be_stamped(empty: Engine) -> None:
    with empty.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE ml_jobs (id INTEGER PRIMARY KEY)")
    with pytest.raises(SchemaError) as caught:
        schema.stamp(empty)
    assert "column kind of table ml_jobs is missing" in caught.value.problems
    assert schema.current(empty) is None


def test_a_revision_that_does_not_exist_is_a_clear_error(empty: Engine) -> None:
    with pytest.raises(SchemaError, match="nowhere"):
        schema.upgrade(empty, "nowhere")
    assert _tables(empty) == set()


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
