"""The promises hold for whatever is given to ``schema``: a URL, an engine of any kind, a caller's own transaction."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Column, Connection, Engine, Integer, MetaData, Table, create_engine, event, inspect, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from mljobs import InvalidValueError, MlJob, SchemaError, schema
from mljobs.db._engines import new_engine
from mljobs.schema import _versions
from tests.backends import DRIVERS
from tests.fork_server import forkserver

ASYNC = {name: driver for name, driver in DRIVERS.items() if "-" in name}


# ------------------------------------------------------------------------------------------------------------ engines


def _engine(url: str) -> Engine:
    return create_engine(url, poolclass=NullPool)


def _autocommit(url: str) -> Engine:
    return create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")


def _unusual(url: str) -> Engine:
    """Engines that read the version before they hold the lock, if they are let."""
    if url.startswith("postgresql"):
        return create_engine(url, poolclass=NullPool, isolation_level="REPEATABLE READ")
    engine = create_engine(url, poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def no_legacy_transactions(dbapi_connection: Any, _record: object) -> None:
        dbapi_connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


ENGINES: dict[str, Callable[[str], Engine]] = {
    "plain": _engine,
    "AUTOCOMMIT": _autocommit,
    "of a store": lambda url: new_engine(url, autocommit=True),
    "unusual": _unusual,
}


@pytest.fixture(params=ENGINES)
def of_any_kind(request: pytest.FixtureRequest, empty_url: str) -> Any:
    engine = ENGINES[request.param](empty_url)
    yield engine
    engine.dispose()


def _tables(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names())


def test_an_engine_of_any_kind_goes_up_and_down_and_keeps_its_settings(of_any_kind: Engine, empty_url: str) -> None:
    with of_any_kind.connect() as connection:
        level = connection.get_isolation_level()
    schema.upgrade(of_any_kind)
    schema.verify(of_any_kind)
    schema.verify(_engine(empty_url))
    schema.downgrade(of_any_kind)
    assert schema.current(of_any_kind) is None
    schema.upgrade(of_any_kind)
    assert schema.current(empty_url) == schema.head()
    with of_any_kind.connect() as connection:
        assert connection.get_isolation_level() == level


BROKEN = """
from alembic import op
revision = "9999_breaks"
down_revision = "0001_ml_jobs"
branch_labels = None
depends_on = None

def upgrade():
    op.execute("CREATE TABLE half_way (id INTEGER)")
    op.execute("INSERT INTO half_way VALUES (1)")
    op.execute("this is not SQL")
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release whose last revision fails half-way."""
    more = tmp_path / "broken"
    more.mkdir()
    (more / "9999_breaks.py").write_text(BROKEN)
    original = _versions._config

    def config(connection: Connection | None = None) -> Config:
        made = original(connection)
        locations = os.pathsep.join([str(schema.migrations_path() / "versions"), str(more)])
        made.set_main_option("version_locations", locations)
        return made

    monkeypatch.setattr(_versions, "_config", config)


@pytest.mark.usefixtures("broken")
def test_an_upgrade_that_fails_half_way_leaves_nothing_through_an_engine_of_any_kind(of_any_kind: Engine) -> None:
    with pytest.raises(DBAPIError, match="syntax error"):
        schema.upgrade(of_any_kind)
    assert _tables(of_any_kind) == set()


@pytest.mark.usefixtures("broken")
def test_an_upgrade_that_fails_leaves_the_callers_transaction_as_it_was_before(empty_url: str) -> None:
    engine = _engine(empty_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE mine (n INTEGER)")
        connection.exec_driver_sql("INSERT INTO mine VALUES (1)")
        with pytest.raises(DBAPIError, match="syntax error"):
            schema.upgrade(connection)
        connection.exec_driver_sql("INSERT INTO mine VALUES (2)")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT sum(n) FROM mine").scalar() == 3
    assert _tables(engine) == {"mine"}


# ------------------------------------------------------------------------------------------------- one at a time


def _upgrade_at_the_barrier(kind: str, url: str, barrier: Any, results: Any) -> None:
    target = url if kind == "URL" else ENGINES[kind](url)
    barrier.wait(60)
    try:
        schema.upgrade(target)
        results.put("done")
    except BaseException as error:  # noqa: BLE001 - to be shown by the test
        results.put(repr(error))


def test_processes_that_upgrade_at_the_same_moment_all_succeed(empty_url: str) -> None:
    kinds = ["URL", "AUTOCOMMIT", "unusual"] * 2  # each kind meets its own and the others
    forks = forkserver()
    barrier, results = forks.Barrier(len(kinds)), forks.Queue()
    processes = [
        forks.Process(target=_upgrade_at_the_barrier, args=(kind, empty_url, barrier, results)) for kind in kinds
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=90) for _ in processes] == ["done"] * len(kinds)
    for process in processes:
        process.join(30)
    schema.verify(empty_url)


def test_two_histories_of_a_hosts_own_that_upgrade_at_once_go_one_after_the_other(empty_url: str) -> None:
    asked, found = threading.Event(), list[bool]()

    def second() -> None:
        engine = create_engine(empty_url, poolclass=NullPool)
        with engine.begin() as connection:
            asked.set()
            with schema.migrating(connection):
                found.append(inspect(connection).has_table("of_the_first"))
        engine.dispose()

    engine = create_engine(empty_url, poolclass=NullPool)
    thread = threading.Thread(target=second)
    with engine.begin() as connection, schema.migrating(connection):
        thread.start()
        assert asked.wait(60)
        connection.exec_driver_sql("CREATE TABLE of_the_first (id INTEGER)")
    thread.join(60)
    engine.dispose()
    assert found == [True]  # it looked when the first had committed


def test_threads_that_upgrade_databases_of_their_own_do_not_meet_in_alembics_globals(tmp_path: Path) -> None:
    barrier, errors = threading.Barrier(4), []

    def upgrade(number: int) -> None:
        barrier.wait(30)
        try:
            schema.upgrade(f"sqlite:///{tmp_path / f'{number}.db'}")
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=upgrade, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    for number in range(4):
        schema.verify(f"sqlite:///{tmp_path / f'{number}.db'}")


@pytest.mark.parametrize("patience", [{"timeout": 0}, {"options": "-clock_timeout=1ms"}], ids=["sqlite", "postgresql"])
def test_an_upgrade_gives_up_waiting_for_another_as_the_engine_says(
    patience: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("sqlite_url" if "timeout" in patience else "postgres_url")
    schema.stamp(url)
    impatient = create_engine(url, poolclass=NullPool, connect_args=patience)
    with _engine(url).connect() as connection:
        schema.upgrade(connection)
        with pytest.raises(DBAPIError, match="lock"):
            schema.upgrade(impatient)
        connection.rollback()
    schema.upgrade(impatient)


# ------------------------------------------------------------------------------------------------------------ async


@pytest.fixture(params=ASYNC)
def async_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """An async engine on an empty database."""
    name = request.param
    if name.startswith("sqlite"):
        url = f"sqlite:///{tmp_path / 'async.db'}"
    else:
        url = request.getfixturevalue("empty_postgres_url")
    with asyncio.Runner() as runner:
        engine = create_async_engine(make_url(url).set(drivername=ASYNC[name]), poolclass=NullPool)
        yield engine, runner.run
        runner.run(engine.dispose())


@pytest.fixture
def empty_postgres_url(postgres_url: str) -> str:
    engine = _engine(postgres_url)
    MlJob.metadata.drop_all(engine)
    assert _tables(engine) == set()
    return postgres_url


Run = Callable[[Coroutine[Any, Any, Any]], Any]


def test_each_async_driver_goes_up_and_down_and_is_verified(async_engine: tuple[AsyncEngine, Run]) -> None:
    engine, run = async_engine

    async def life() -> None:
        async with engine.begin() as connection:
            await connection.run_sync(schema.upgrade)
            await connection.run_sync(schema.verify)
        async with engine.begin() as connection:
            await connection.run_sync(schema.verify)
            assert await connection.run_sync(schema.current) == schema.head()
        async with engine.begin() as connection:
            await connection.run_sync(schema.upgrade)
            await connection.run_sync(schema.downgrade)
        async with engine.connect() as connection:
            assert await connection.run_sync(schema.current) is None

    run(life())


@pytest.mark.usefixtures("broken")
def test_an_async_upgrade_that_fails_half_way_leaves_nothing(async_engine: tuple[AsyncEngine, Run]) -> None:
    engine, run = async_engine

    async def fail() -> set[str]:
        async with engine.begin() as connection:
            with pytest.raises(DBAPIError, match="syntax error"):
                await connection.run_sync(schema.upgrade)
        async with engine.connect() as connection:
            return set(await connection.run_sync(lambda sync: inspect(sync).get_table_names()))

    assert run(fail()) == set()


def test_an_async_engine_itself_is_refused_with_what_to_type_instead(async_engine: tuple[Any, Run]) -> None:
    with pytest.raises(InvalidValueError, match=r"await connection.run_sync\(schema.upgrade\)"):
        schema.upgrade(async_engine[0])


@pytest.mark.parametrize("driver", DRIVERS.values())
def test_a_url_with_any_driver_is_a_database(driver: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    sqlite = driver.startswith("sqlite")
    plain = f"sqlite:///{tmp_path / 'x.db'}" if sqlite else request.getfixturevalue("empty_postgres_url")
    url = make_url(plain).set(drivername=driver)
    schema.upgrade(url)
    schema.verify(url.render_as_string(hide_password=False))


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_connection_in_autocommit_is_refused_where_a_transaction_is_needed(postgres_url: str) -> None:
    actions: list[Callable[[Connection], None]] = [schema.upgrade, schema.downgrade, schema.stamp, schema.verify]
    with _autocommit(postgres_url).connect() as connection:
        assert schema.current(connection) is None
        for action in actions:
            with pytest.raises(InvalidValueError, match="AUTOCOMMIT"):
                action(connection)


def test_another_kind_of_database_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidValueError, match="expected one of"):
        schema.upgrade("mysql://root@localhost/jobs")
    engine = _engine(f"sqlite:///{tmp_path / 'x.db'}")
    monkeypatch.setattr(engine.dialect, "name", "mysql")
    with pytest.raises(InvalidValueError, match="mljobs knows PostgreSQL and SQLite, not mysql"):
        schema.upgrade(engine)


def test_a_server_that_is_too_old_is_refused(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine(empty_url)
    with engine.connect() as connection:
        name = connection.dialect.name
    old, oldest = {"postgresql": ((11, 22), "12"), "sqlite": ((3, 34, 1), "3.35")}[name]
    monkeypatch.setattr(engine.dialect, "server_version_info", old)
    message = f"needs {name} {oldest} or later; this is {old[0]}"
    with engine.connect() as connection, pytest.raises(SchemaError, match=message):
        schema.upgrade(connection)


def test_inside_a_migration_of_a_hosts_the_way_that_works_is_named(empty_url: str, tmp_path: Path) -> None:
    (tmp_path / "versions").mkdir()
    (tmp_path / "env.py").write_text(
        "from alembic import context\n"
        "context.configure(connection=context.config.attributes['connection'])\n"
        "context.run_migrations()\n"
    )
    (tmp_path / "versions" / "host1.py").write_text(
        "from alembic import op\n"
        "from mljobs import schema\n"
        "revision, down_revision = 'host1', None\n"
        "def upgrade():\n"
        "    schema.upgrade(op.get_bind())\n"
    )
    config = Config()
    config.set_main_option("script_location", str(tmp_path))
    config.set_main_option("path_separator", "os")
    engine = _engine(empty_url)
    with pytest.raises(SchemaError, match="version_locations"), engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    schema.upgrade(engine)


# ------------------------------------------------------------------------------------------------------- good manners


def test_the_hosts_logging_is_left_alone_and_nothing_is_printed(
    empty_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    names = (None, "alembic", "alembic.runtime.migration", "sqlalchemy", "mljobs")
    before = [(logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in names]
    for action in (schema.upgrade, schema.verify, schema.current, schema.downgrade):
        action(empty_url)
    assert [(logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in names] == before
    assert capfd.readouterr() == ("", "")


def test_a_hosts_autogenerate_leaves_our_tables_alone(empty_url: str) -> None:
    """As ``docs/migrations.md`` shows it."""
    engine = _engine(empty_url)
    schema.upgrade(engine)
    host = MetaData()
    Table("uploads", host, Column("id", Integer, primary_key=True))

    def include_name(name: str | None, kind: str, _parents: object) -> bool:
        return not (kind == "table" and name in schema.OWN_TABLES)

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_name": include_name})
        assert [change[:1] for change in compare_metadata(context, host)] == [("add_table",)]
        assert _tables(engine) <= schema.OWN_TABLES


def test_finished_records_go_down_with_their_table_where_foreign_keys_are_enforced(empty_url: str) -> None:
    schema.upgrade(empty_url)
    engine = new_engine(empty_url)
    with engine.begin() as connection:
        row = {"kind": "train", "target_name": "spam", "status": "completed", "spec_json": "{}"}
        connection.execute(MlJob.__table__.insert(), row)
    engine.dispose()
    schema.downgrade(empty_url)
    assert _tables(_engine(empty_url)) == {schema.VERSION_TABLE}
