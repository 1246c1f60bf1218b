"""Our revisions, and those that a host generates, as other people's tools judge them: pytest-alembic and squawk."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from pytest_alembic import tests as builtin
from pytest_alembic.config import Config as RunnerConfig
from pytest_alembic.runner import runner
from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import NullPool

from tests.alembic_history import History
from tests.cases import case
from tests.test_alembic_plugin import models

ROOT = Path(__file__).parent.parent


@pytest.fixture
def empty(empty_url: str) -> Iterator[Engine]:
    engine = create_engine(empty_url)
    yield engine
    engine.dispose()


def config_of_ours() -> Config:
    return Config(str(ROOT / "alembic.ini"))


TESTS = [
    builtin.test_single_head_revision,
    builtin.test_upgrade,
    builtin.test_model_definitions_match_ddl,
    builtin.test_up_down_consistency,
]


def test_pytest_alembics_tests_pass_on_our_revisions(empty: Engine) -> None:
    _check_all(config_of_ours(), empty)


def test_pytest_alembics_tests_pass_on_what_autogenerate_writes(empty: Engine, tmp_path: Path) -> None:
    host = History(tmp_path / "alembic", empty, models()[1])
    host.revision()
    _check_all(host.config, empty)


def _check_all(config: Config, engine: Engine) -> None:
    for check in TESTS:
        with case(check.__name__), runner(RunnerConfig.from_raw_config(config), engine=engine) as alembic_runner:
            check(alembic_runner)
            alembic_runner.migrate_down_to("base")


def squawk(script: str, tmp_path: Path, *but: str) -> None:
    path = tmp_path / "migration.sql"
    path.write_text(script)
    program = Path(sys.executable).parent / "squawk"
    config = ROOT / ".squawk.toml"
    excluded = tomllib.loads(config.read_text())["excluded_rules"]
    exclude = [f"--exclude={','.join([*excluded, *but])}"] if but else []  # it takes the place of the file's
    done = subprocess.run(
        [program, "-c", config, "--pg-version", "15", *exclude, path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# To take the tables down is what a downgrade to base is for; the command asks first.
DOWN = ("ban-drop-table", "ban-drop-view", "ban-drop-function", "ban-drop-trigger")


# Its users have an INTEGER key.
OF_THE_HOST = ("prefer-bigint-over-int", "prefer-identity")


def scripts(config: Config, output: StringIO) -> tuple[str, str]:
    config.output_buffer = output
    command.upgrade(config, "heads", sql=True)
    up = output.getvalue()
    output.seek(0)
    output.truncate()
    command.downgrade(config, "heads:base", sql=True)
    return up, output.getvalue()


def test_squawk_passes_on_our_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLJOBS_DATABASE_URL", "postgresql:///nowhere")
    up, down = scripts(config_of_ours(), StringIO())
    assert up.count("CREATE TABLE") == 4  # the jobs, their leases, their workers, our version
    assert "DROP TABLE ml_job_leases;" in down
    squawk(up, tmp_path)
    squawk(down, tmp_path, *DOWN)


def test_squawk_passes_on_what_autogenerate_writes(tmp_path: Path, postgres_url: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    host = History(tmp_path / "alembic", engine, models()[1])
    host.revision()
    up, down = scripts(host.config, StringIO())
    assert "CREATE TRIGGER training_runs_guard_update" in up
    assert "DROP TRIGGER IF EXISTS training_runs_guard_update" in down
    squawk(up, tmp_path, *OF_THE_HOST)
    squawk(down, tmp_path, *DOWN, "require-concurrent-index-deletion")  # of a table that goes in the next line


def test_squawk_reports_an_unsafe_migration(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="require-concurrent-index-creation"):
        squawk("CREATE INDEX slow ON users (name);", tmp_path)
