"""One suite over both databases and all drivers. Each test has a fresh database, copied from a template."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.pool import NullPool

from mljobs import metadata
from tests import postgres
from tests.worlds import DRIVERS, World, outside_engine

_numbers = count()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Server]:
    with postgres.server() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_admin(postgres_server: postgres.Server) -> Iterator[Engine]:
    """Creates and drops databases."""
    admin = create_engine(postgres_server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    yield admin
    admin.dispose()


@pytest.fixture(scope="session")
def postgres_template(postgres_admin: Engine) -> str:
    """The name of a database with the schema, which nobody is connected to."""
    name = "mljobs_template"
    with postgres_admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {name}"))
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine = create_engine(postgres_admin.url.set(database=name), poolclass=NullPool)
    metadata.create_all(engine)
    engine.dispose()
    return name


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "jobs.db"
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
    metadata.create_all(engine)
    engine.dispose()
    return path


def _postgres_database(admin: Engine, template: str | None) -> Iterator[str]:
    name = f"mljobs_test_{next(_numbers)}"
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else "")))
    yield admin.url.set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def postgres_url(postgres_admin: Engine, postgres_template: str) -> Iterator[str]:
    """The URL of a fresh PostgreSQL database with the schema."""
    yield from _postgres_database(postgres_admin, postgres_template)


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """The URL of a fresh SQLite file with the schema."""
    path = tmp_path / "jobs.db"
    shutil.copy(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
    else:
        yield from _postgres_database(request.getfixturevalue("postgres_admin"), None)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a fresh database with the schema, for blocking code."""
    fresh: str = request.getfixturevalue(f"{'postgres' if request.param == 'postgresql' else 'sqlite'}_url")
    return fresh


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    """A plain engine on a fresh database with the schema."""
    made = create_engine(url)
    yield made
    made.dispose()


@pytest.fixture(params=list(DRIVERS))
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A fresh database with the schema, through each driver."""
    name: str = request.param
    plain: str = request.getfixturevalue("postgres_url" if name.startswith("postgresql") else "sqlite_url")
    made = World(name, make_url(plain).set(drivername=DRIVERS[name]).render_as_string(False), outside_engine(plain))
    yield made
    made.close()


@pytest.fixture
def store(world: World) -> Any:
    """A store in each world, with a blocking face."""
    return world.store()
