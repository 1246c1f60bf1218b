"""Fixtures: databases, stores and processes, so that one suite runs over both databases and all drivers.

How to write a fast test:

- Ask for one fixture, and the test runs once for each database: ``url`` (blocking code, two runs), ``empty_url`` (no
  tables), ``store`` or ``backend`` (each driver, five runs; only for what may differ between drivers). For what has nothing
  to do with the database take ``sqlite_url``.
- Do not create databases, servers, virtual environments or wheels: each test's database is fresh already, and most of
  them are old ones that were emptied. A test that changes the schema by DDL costs a new one, a tenth of a second.
- Cases that may share a database share a test: a loop, and around each ``tests.cases.case``, which names it in a failure.
  A parameter costs a database and its engines each time, a tenth of a second.
- What is done to a schema only to see what is said of it is done in ``tests.cases.undone``, which takes it back.
- A test that counts the connections to its database is marked ``alone``; else one that empties it later may be there.
- Give engines no ``NullPool``, unless the test is about connections: on PostgreSQL each costs 10 ms of processor time.
- Where Hypothesis draws long texts it takes twenty times as long as a generator with a seed, see ``test_codec.py``.
- A short Python command runs through ``python`` (`tests.fork_server`), which forks a process that has imported SQLAlchemy,
  Alembic and mljobs; so do workers by `tests.worker_process`, and processes of `multiprocessing` by
  ``tests.fork_server.forkserver()``. Only a test of the start itself starts Python, which costs half a second.
- Wait by `tests.waiting.until` or an event, never by a sleep; let a lease or a poll that must run out be short.
- Import what only one test needs, and takes long to import, in that test: each test process imports every file.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401 - it collects garbage as it is imported, and so early there is little
import pytest
from sqlalchemy import URL, Engine, create_engine, make_url
from sqlalchemy.pool import NullPool

from mljobs import JobStore, metadata
from tests import fork_server, postgres
from tests.backends import DRIVERS, Backend
from tests.compiled_once import compile_once
from tests.databases import Databases
from tests.fork_server import ForkServer

_MEMORY = Path("/dev/shm")
_WAITING = {
    "test_chaos.py",
    "test_executors.py",
    "test_network.py",
    "test_worker_outages.py",
    "test_worker_pools.py",
    "test_worker_processes.py",
}
_MEMORY_BYTES = 4_000_000_000  # the suite needs a quarter of it


def pytest_configure() -> None:
    """Keep the databases in memory, where there is room, and let processes keep compiled modules.

    On a disk the suite takes twice as long; and each process that tests start would compile the package anew. And let
    Ctrl-C be heard, by what tests start too. Statements are compiled once, see ``compiled_once.py``.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    gc.disable()  # until all is collected
    compile_once()
    if "TMPDIR" not in os.environ and _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _MEMORY_BYTES:
        os.environ["TMPDIR"] = str(_MEMORY)
        tempfile.tempdir = None  # so that it is looked up again


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Have each of several processes begin with files of its own: they then find each other's compiled."""
    worker, of = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if of > 1 and [Path(given).name for given in session.config.args] == ["tests"]:
        files = sorted(Path(__file__).parent.glob("test_*.py"), key=lambda path: path.stat().st_size)
        for path in files[int(worker.removeprefix("gw")) % of :: of]:
            with contextlib.suppress(Exception):  # collecting it says what is wrong
                importlib.import_module(f"tests.{path.stem}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files whose tests wait most, so that no process is left alone with them at the end."""
    items.sort(key=lambda item: item.path.name not in _WAITING)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from what was imported and collected, which stays to the end, and let it rest longer."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000)


def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes run tests: one more than there are processors, for many tests wait."""
    return min(4, (os.cpu_count() or 1) + 1)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Server]:
    with postgres.server() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_admin(postgres_server: postgres.Server) -> Iterator[Engine]:
    """For what belongs to the server: databases, roles."""
    admin = create_engine(postgres_server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    yield admin
    admin.dispose()


@pytest.fixture(scope="session")
def postgres_databases(postgres_server: postgres.Server) -> Iterator[Databases]:
    """PostgreSQL databases with the schema."""

    def fill(url: URL) -> None:
        engine = create_engine(url, poolclass=NullPool)
        metadata.create_all(engine)
        engine.dispose()

    databases = Databases(postgres_server.url, "schema", fill)
    yield databases
    databases.close()


@pytest.fixture(scope="session")
def empty_postgres_databases(postgres_server: postgres.Server) -> Iterator[Databases]:
    """Empty PostgreSQL databases."""
    databases = Databases(postgres_server.url, "empty")
    yield databases
    databases.close()


@pytest.fixture(scope="session")
def python() -> ForkServer:
    """Runs short Python commands fast, in a process each."""
    return fork_server.shared()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "jobs.db"
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
    metadata.create_all(engine)
    engine.dispose()
    return path


@pytest.fixture
def postgres_url(request: pytest.FixtureRequest, postgres_databases: Databases) -> Iterator[str]:
    """The URL of a fresh PostgreSQL database with the schema."""
    alone = request.node.get_closest_marker("alone") is not None
    with postgres_databases.fresh(alone=alone) as fresh:
        yield fresh


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
        databases: Databases = request.getfixturevalue("empty_postgres_databases")
        with databases.fresh() as fresh:
            yield fresh


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
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """A fresh database with the schema, through each driver."""
    name: str = request.param
    plain: str = request.getfixturevalue("postgres_url" if name.startswith("postgresql") else "sqlite_url")
    made = Backend(name, make_url(plain).set(drivername=DRIVERS[name]).render_as_string(False), create_engine(plain))
    yield made
    made.close()


@pytest.fixture
def store(backend: Backend) -> Any:
    """A store on each backend, whose methods block."""
    return backend.store()


@pytest.fixture(scope="session")
def full_template(sqlite_template: Path) -> Path:
    path = sqlite_template.with_name("full.db")
    shutil.copy(sqlite_template, path)
    with JobStore(f"sqlite:///{path}") as store:
        store.submit_many(("train", f"t{number}", {"n": number}) for number in range(2500))
    return path


@pytest.fixture
def full(full_template: Path, tmp_path: Path) -> Iterator[JobStore]:
    """A store on SQLite with 2,500 records."""
    path = tmp_path / "jobs.db"
    shutil.copy(full_template, path)
    with JobStore(f"sqlite:///{path}") as store:
        yield store
