"""Upgrade, downgrade, stamp and verify, each on a URL, an engine or the caller's connection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alembic import command, context
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, exists, inspect, select, text
from sqlalchemy.exc import DBAPIError

from mljobs.db._engines import at_level, new_engine
from mljobs.db._failures import first_line, tables_are_missing
from mljobs.errors import InvalidValueError, SchemaError
from mljobs.guards._companions import is_blob_index
from mljobs.jobs import Model, table_of
from mljobs.record._models import MlJob
from mljobs.schema._catalog import VERSION_TABLE, differences
from mljobs.schema._savepoints import savepoint

if TYPE_CHECKING:
    from sqlalchemy import MetaData

Target = str | URL | Engine | Connection
"""A database: its URL, an engine, or a connection whose transaction is to be used."""

_LOCK = 7_955_930_144_303_215_201  # "mljobs ma" as a number: one upgrade at a time
_TABLES = ("ml_jobs", "ml_job_leases", "ml_job_workers")
_OLDEST = {"postgresql": (12,), "sqlite": (3, 35)}  # CREATE STATISTICS (mcv); RETURNING
_alembic = threading.RLock()  # Alembic keeps the migration that runs in globals of its modules


def migrations_path() -> Path:
    """Return where the migrations are: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent.parent
    inside = here / "migrations"
    return inside if inside.is_dir() else here.parent / "migrations"


def is_ours(name: str | None, kind: str, parents: Mapping[str, Any]) -> bool:
    """Say whether our autogenerate should look at what a database holds; an ``include_name`` hook of Alembic."""
    if kind == "index":  # Alembic before 1.18 does not ask our plugin
        return not is_blob_index(name, parents.get("table_name"))
    return kind != "table" or name in _TABLES


def upgrade(target: Target, revision: str = "head") -> None:
    """Bring the tables up to date, all or nothing; nothing to do is no error.

    Args:
        target: The database. A connection's transaction is used and left open; what fails is taken back to where it
            stood before the call.
        revision: How far; ``head`` for all the way.

    Raises:
        SchemaError: The database is newer than this version of mljobs, has the tables from elsewhere, or is older than
            PostgreSQL 12 or SQLite 3.35; or has lost the tables; or no such revision.
        InvalidValueError: ``target`` is no database that mljobs knows, or a connection in AUTOCOMMIT.
    """
    with _connected(target) as connection, migrating(connection):
        _refuse_newer(connection)
        if current(connection) is None and inspect(connection).has_table("ml_jobs"):
            raise SchemaError(
                f"table ml_jobs exists, but {VERSION_TABLE} names no version; if metadata.create_all made it, say so "
                "with mljobs.schema.stamp; if your own Alembic did, upgrade there"
            )
        before = current(connection)
        missing = [name for name in _TABLES if not inspect(connection).has_table(name)] if before else []
        if missing:
            raise SchemaError(
                f"{VERSION_TABLE} says that the schema is at {before}, but table {missing[0]} is missing: if it was dropped "
                "on purpose, by drop_all say, drop what is left, mljobs.schema.stamp(target, 'base') and upgrade again"
            )
        _run(command.upgrade, connection, revision)


def downgrade(target: Target, revision: str = "base") -> None:
    """Take the tables back to an earlier version, all or nothing; ``base`` drops them, finished records included.

    Args:
        target: The database. A connection's transaction is used and left open.
        revision: How far back.

    Raises:
        SchemaError: The database is newer than this version of mljobs; or no such revision.
        InvalidValueError: ``target`` is no database that mljobs knows, or a connection in AUTOCOMMIT.
    """
    with _connected(target) as connection, migrating(connection):
        _refuse_newer(connection)
        _run(command.downgrade, connection, revision)


def stamp(target: Target, revision: str = "head") -> None:
    """Say that the tables stand as ``revision`` makes them, without making them; for ``head`` they are verified first.

    Args:
        target: The database. A connection's transaction is used and left open.
        revision: What they are.

    Raises:
        SchemaError: The tables are not those of ``head``; ``problems`` says why. Or no such revision.
        InvalidValueError: ``target`` is no database that mljobs knows, or a connection in AUTOCOMMIT.
    """
    with _connected(target) as connection, migrating(connection):
        _refuse_newer(connection)
        if revision in {"head", "heads", head()}:
            _raise(_differences(connection, None))
        _run(command.stamp, connection, revision)


def current(target: Target) -> str | None:
    """Return the version that the database is at; None where no migration has run.

    Args:
        target: The database.
    """
    with _connected(target) as connection:
        heads = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_heads()
    return ", ".join(sorted(heads)) or None


def head() -> str:
    """Return the version that this release of mljobs makes."""
    return ScriptDirectory.from_config(_config()).get_current_head() or ""


def verify(target: Target, *, metadata: MetaData | None = None) -> None:
    """Check that tables, columns, checks, indexes and the body of every trigger are what this version expects.

    What a host has added (columns, indexes, triggers of its own) is its own affair. PostgreSQL compares with temporary
    tables, made and dropped in a savepoint, so the role needs the right to make them (by default everybody has it).

    Args:
        target: The database.
        metadata: Tables to check instead of our own, for a host's classes with ``MlJobMixin``.

    Raises:
        SchemaError: Something differs; ``problems`` has one sentence for each.
        InvalidValueError: ``target`` is no database that mljobs knows, or a connection in AUTOCOMMIT; or ``metadata``
            holds no job table.
    """
    with _connected(target) as connection:
        problems: list[str] = []
        if metadata is None:
            _refuse_newer(connection)
            version, expected = current(connection), head()
            if version is not None and version != expected:
                problems.append(f"the schema is at version {version}, this release expects {expected}: run an upgrade")
        _raise(problems + _differences(connection, metadata))


def ready(target: Target, *, model: Model = MlJob) -> None:
    """Check by one cheap query that the tables are there, with the columns that this release uses: for a readiness probe.

    It passes with tables of a later release too, in which columns were added.

    Args:
        target: The database.
        model: The mapped job class.

    Raises:
        SchemaError: A table or a column is missing.
        DBAPIError: The database does not answer, or not to this role.
        InvalidValueError: ``target`` is no database that mljobs knows.
    """
    used = select(*(exists(select(table)) for table in (table_of(model), model.__leases__)))
    try:
        if isinstance(target, Engine):  # reads only: it waits for no writer
            with target.connect() as connection:
                connection.execute(used)
        else:
            with _connected(target) as connection:
                connection.execute(used)
    except DBAPIError as error:
        if tables_are_missing(error):
            raise SchemaError(f"not ready: {first_line(error)}") from error
        raise


def _differences(connection: Connection, metadata: MetaData | None) -> list[str]:
    from mljobs.record._models import metadata as own  # noqa: PLC0415 - upgrading works without the model

    return differences(connection, own if metadata is None else metadata)


def _raise(problems: list[str]) -> None:
    if problems:
        raise SchemaError("the schema is not what this version of mljobs expects", problems)


# ------------------------------------------------------------------------------------------------- one at a time


@contextmanager
def migrating(connection: Connection) -> Iterator[None]:
    """Hold off every other upgrade until the transaction ends; take back what the block did if it fails.

    Raises:
        InvalidValueError: The connection commits each statement by itself.
    """
    if connection.dialect.name == "sqlite":
        driver: Any = connection.connection.driver_connection
        # Python's sqlite3 begins a transaction for rows only; without this each CREATE would commit itself.
        if not driver.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:  # begun by a host, perhaps DEFERRED: only a write takes the lock before the version is read
            connection.exec_driver_sql("CREATE TABLE mljobs_upgrading (locked INTEGER)")
            connection.exec_driver_sql("DROP TABLE mljobs_upgrading")
    with savepoint(connection):
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        yield


@contextmanager
def _connected(target: Target) -> Iterator[Connection]:
    if isinstance(target, Connection):
        _refuse_unknown(target)
        yield target
    elif isinstance(target, Engine):
        if target.dialect.name == "postgresql":
            # Neither AUTOCOMMIT, nor a level that would read the version as it was before the lock was granted.
            target = at_level(target, "READ COMMITTED")
        with target.begin() as connection:
            _refuse_unknown(connection)
            yield connection
    elif isinstance(target, str | URL):
        engine = new_engine(target)
        try:
            with _connected(engine) as connection:
                yield connection
        finally:
            engine.dispose()
    else:
        raise InvalidValueError(
            "target",
            target,
            "expected a URL, an Engine or a Connection; of an AsyncEngine: "
            "async with engine.begin() as connection: await connection.run_sync(schema.upgrade)",
        )


def _refuse_unknown(connection: Connection) -> None:
    name = connection.dialect.name
    oldest = _OLDEST.get(name)
    if oldest is None:
        raise InvalidValueError("target", connection.engine, f"mljobs knows PostgreSQL and SQLite, not {name}")
    version = connection.dialect.server_version_info or ()
    if version < oldest:
        needed, found = (".".join(map(str, parts)) for parts in (oldest, version))
        raise SchemaError(f"mljobs needs {name} {needed} or later; this is {found}")


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    if connection is not None:
        config.attributes["connection"] = connection
    return config


def _run(function: Callable[[Config, str], object], connection: Connection, revision: str) -> None:
    with _alembic:
        if _alembic_is_running():
            raise SchemaError(
                "Alembic is running a migration in this process, and cannot run another inside it; "
                "add our revisions to version_locations in your alembic.ini instead"
            )
        try:
            function(_config(connection), revision)
        except CommandError as error:
            raise SchemaError(str(error)) from error


def _alembic_is_running() -> bool:
    try:
        context.is_offline_mode()
    except (NameError, AttributeError):  # Alembic's ways to say: none has been active yet, none is active any more
        return False
    return True


def _refuse_newer(connection: Connection) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    version = current(connection)
    unknown = set(version.split(", ")) - known if version else set()
    if unknown:
        raise SchemaError(
            f"the schema is at version {', '.join(sorted(unknown))}, which this release of mljobs does not know: "
            "a newer one has upgraded it; install that one"
        )
