"""The three ways into a host's Alembic, each as an application that has installed the wheel."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.pool import NullPool

from mljobs import schema
from tests.fork_server import ForkServer
from tests.installed_wheel import ROOT, Installed, install

_FINDS_PLUGINS = find_spec("alembic.runtime.plugins") is not None


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    base = tmp_path_factory.getbasetemp()
    return install(base.parent if base.name.startswith("popen-") else base)


@pytest.fixture(scope="session")
def installed_python(installed: Installed) -> Iterator[ForkServer]:
    """Runs the commands of the environment."""
    with ForkServer(installed.python, installed.environment) as server:
        yield server


class Host:
    """A copy of an example, with a database."""

    def __init__(self, name: str, url: str, home: Path, python: ForkServer) -> None:
        self.path = home / name
        shutil.copytree(ROOT / "examples" / name, self.path, ignore=shutil.ignore_patterns("__pycache__"))
        if not _FINDS_PLUGINS:  # then an env.py has a line more; see docs/migrations.md
            env = self.path / "migrations" / "env.py"
            env.write_text(
                env.read_text().replace("import context\n", "import context\nimport mljobs.alembic_plugin\n")
            )
        self.url = url
        self.engine = create_engine(url, poolclass=NullPool)
        self._python = python

    def run(self, *arguments: str) -> str:
        """Run ``python ...`` in the application's directory."""
        done = self._python.run(*arguments, cwd=self.path, env={"DATABASE_URL": self.url})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def fails(self, *arguments: str) -> str:
        """Run what must fail; return what it says."""
        done = self._python.run(*arguments, cwd=self.path, env={"DATABASE_URL": self.url})
        assert done.returncode != 0, done.stdout
        return done.stdout + done.stderr

    def alembic(self, *arguments: str) -> str:
        return self.run("-m", "alembic", *arguments)

    def tables(self) -> set[str]:
        return set(inspect(self.engine).get_table_names())

    def generated(self) -> str:
        """Autogenerate a revision; return what its functions do."""
        self.alembic("revision", "--autogenerate", "--rev-id", "made", "-m", "made", "--head", self.head)
        (path,) = (self.path / "migrations" / "versions").glob("made_*.py")
        return path.read_text().partition("def upgrade")[2]

    head = "head"


@pytest.fixture
def host(empty_url: str, tmp_path: Path, installed_python: ForkServer) -> Any:
    return lambda name: Host(name, empty_url, tmp_path, installed_python)


def test_the_wheel_is_what_the_examples_run_with(installed: Installed, tmp_path: Path) -> None:
    program = "import mljobs, mljobs.schema; print(mljobs.__file__, mljobs.schema.migrations_path())"
    done = installed.run("-c", program, cwd=tmp_path)
    for path in done.stdout.split():
        assert Path(path).is_relative_to(installed.python.parent.parent), done
    found = "import importlib.metadata as m; print(*m.entry_points(group='alembic.plugins'))"
    assert installed.run("-c", found, cwd=tmp_path).stdout.count("mljobs.alembic_plugin") == 1


def test_a_host_with_a_separate_history_migrates_up_and_down(host: Any) -> None:
    app = host("alembic_separate")
    app.run("-m", "mljobs", "upgrade", "--url", app.url)
    app.alembic("upgrade", "head")
    assert app.run("app.py").splitlines() == ["emails.csv completed {'rows': 3}"]
    assert "No new upgrade operations detected." in app.alembic("check")
    made = app.generated()
    assert made.count("pass") == 2
    assert "drop_table" not in made
    app.run("-m", "mljobs", "upgrade", "--url", app.url)
    app.alembic("downgrade", "base")
    schema.verify(app.engine)
    assert "uploads" not in app.tables()
    assert schema.current(app.engine) == schema.head()


def test_a_host_with_one_history_migrates_up_and_down(host: Any) -> None:
    app = host("alembic_one_history")
    app.head = "app@head"
    app.alembic("upgrade", "heads")
    assert app.run("app.py").splitlines() == ["emails.csv completed {'rows': 3}"]
    assert "No new upgrade operations detected." in app.alembic("check")
    assert app.generated().count("pass") == 2
    assert {line.partition(" ")[0] for line in app.alembic("current").splitlines()} == {"0001_ml_jobs", "0001_uploads"}
    schema.verify(app.engine)
    app.alembic("downgrade", "app@base")
    schema.verify(app.engine)
    app.alembic("upgrade", "heads")
    app.alembic("downgrade", "mljobs@base")  # takes what depends on it along
    assert app.tables() == {"alembic_version"}
    app.alembic("upgrade", "heads")
    schema.verify(app.engine)


def test_the_first_revision_in_one_history_begins_beside_ours(host: Any) -> None:
    """The commands of docs/migrations.md and the example's README, typed into an application that has none."""
    app = host("alembic_one_history")
    for old in (app.path / "migrations" / "versions").glob("*.py"):
        old.unlink()
    app.alembic("upgrade", "heads")
    without_env = [("revision", "-m", "mine"), ("revision", "-m", "mine", "--head", "mljobs@head")]
    for natural in (("revision", "--autogenerate", "-m", "mine"), *(without_env if _FINDS_PLUGINS else ())):
        refused = app.fails("-m", "alembic", *natural)
        assert "--head base --branch-label app --version-path migrations/versions -m" in refused
    readme = (app.path / "README.md").read_text()
    docs = (ROOT / "docs" / "migrations.md").read_text()
    first, later = (line for line in readme.splitlines() if line.startswith("$ alembic revision"))
    assert first in docs
    assert later in docs
    _, _, *arguments = shlex.split(first)
    app.alembic(*arguments)
    app.alembic("upgrade", "heads")
    assert "No new upgrade operations detected." in app.alembic("check")
    app.run("app.py")
    _, _, *arguments = shlex.split(later)
    app.alembic(*arguments)
    assert len(list((app.path / "migrations" / "versions").glob("*.py"))) == 2
    if _FINDS_PLUGINS:
        app.alembic("merge", "heads", "-m", "merged")  # needless, but a thing people do: it is theirs too
        assert len(list((app.path / "migrations" / "versions").glob("*.py"))) == 3
        app.alembic("upgrade", "heads")
    schema.verify(app.engine)
    ours = app.run("-c", "import mljobs.schema as s; print(*(p.name for p in s.migrations_path().rglob('0*.py')))")
    everything = app.run(
        "-c", "import mljobs.schema as s; print(*(p.name for p in s.migrations_path().rglob('*_*.py')))"
    )
    assert sorted(everything.split()) == sorted(ours.split())


def test_the_mixin_with_autogenerate(host: Any) -> None:
    app = host("alembic_mixin")
    app.alembic("upgrade", "head")
    told = app.run("app.py").splitlines()
    assert told == ["Ada fit completed {'f1': 0.9}", "a finished run never changes"]
    assert "No new upgrade operations detected." in app.alembic("check")
    on = " ON training_runs" if app.engine.dialect.name == "postgresql" else ""
    with app.engine.begin() as connection:
        connection.execute(text(f"DROP TRIGGER training_runs_guard_delete{on}"))
    assert "create_mljobs_guard" in app.fails("-m", "alembic", "check")
    assert app.generated().count("op.create_mljobs_guard('training_runs', kinds=['fit', 'tune'], version=1)") == 2
    app.alembic("upgrade", "head")
    assert "No new upgrade operations detected." in app.alembic("check")
    app.alembic("downgrade", "0001_training_runs")  # over a batch that rebuilds the table on SQLite
    app.alembic("upgrade", "head")
    assert "No new upgrade operations detected." in app.alembic("check")
    with app.engine.begin() as connection:
        connection.execute(text("DELETE FROM training_runs_leases"))
    app.alembic("downgrade", "base")
    assert app.tables() == {"alembic_version"}


def test_the_mixins_migrations_are_what_autogenerate_writes_today(host: Any) -> None:
    app = host("alembic_mixin")
    for old in (app.path / "migrations" / "versions").glob("*.py"):
        old.unlink()
    made = app.generated()
    first = (ROOT / "examples" / "alembic_mixin" / "migrations" / "versions" / "0001_training_runs.py").read_text()
    for line in made.splitlines():
        if "training_runs" in line and "postgresql" not in line and "note" not in line:
            assert line.strip() in first
