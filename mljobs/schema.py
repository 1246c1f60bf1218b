"""The tables of mljobs in a database: bring them up to date, take them down, check that they are what they should be.

Every upgrade is one transaction, on SQLite too, and waits for an upgrade that another process has begun. The version
is kept in ``mljobs_alembic_version``, a table of our own, so it never meets a host's.

``verify`` lets the database judge: it builds what ``create_all`` builds (PostgreSQL: as temporary tables in a savepoint
that is rolled back; SQLite: in memory) and compares the definitions that the server itself writes out for both.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alembic import command, context
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, NestedTransaction, create_engine, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import StaticPool

from mljobs.engines import new_engine
from mljobs.errors import InvalidValueError, SchemaError
from mljobs.triggers import companion_names

if TYPE_CHECKING:
    from sqlalchemy import MetaData, Table

VERSION_TABLE = "mljobs_alembic_version"
"""Where Alembic keeps our version."""

OWN_TABLES = frozenset({"ml_jobs", "ml_jobs_guard", "ml_jobs_counts", "ml_job_leases", VERSION_TABLE})
"""Every table that our migrations make, on either database; for a host's autogenerate, which must not drop them."""

Target = str | URL | Engine | Connection
"""A database: its URL, an engine, or a connection whose transaction is to be used."""

_LOCK = 7_955_930_144_303_215_201  # "mljobs ma" as a number: one upgrade at a time
_TABLES = ("ml_jobs", "ml_job_leases")
_OLDEST = {"postgresql": (12,), "sqlite": (3, 35)}  # CREATE STATISTICS (mcv); RETURNING
_alembic = threading.RLock()  # Alembic keeps the migration that runs in globals of its modules


def migrations_path() -> Path:
    """Return where the migrations are: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    inside = here / "migrations"
    return inside if inside.is_dir() else here.parent / "migrations"


def is_ours(name: str | None, kind: str, _parents: Mapping[str, Any]) -> bool:
    """Say whether our autogenerate should look at what a database holds; an ``include_name`` hook of Alembic."""
    return kind != "table" or name in _TABLES


def upgrade(target: Target, revision: str = "head") -> None:
    """Bring the tables up to date, all or nothing; nothing to do is no error.

    Args:
        target: The database. A connection's transaction is used and left open; what fails is taken back to where it
            stood before the call.
        revision: How far; ``head`` for all the way.

    Raises:
        SchemaError: The database is newer than this version of mljobs, has the tables from elsewhere, or is older than
            PostgreSQL 12 or SQLite 3.35; or no such revision.
        InvalidValueError: ``target`` is no database that mljobs knows, or a connection in AUTOCOMMIT.
    """
    with _connected(target) as connection, migrating(connection):
        _refuse_newer(connection)
        if current(connection) is None and inspect(connection).has_table("ml_jobs"):
            raise SchemaError(
                f"table ml_jobs exists, but {VERSION_TABLE} names no version; if metadata.create_all made it, say so "
                "with mljobs.schema.stamp; if your own Alembic did, upgrade there"
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


def _raise(problems: list[str]) -> None:
    if problems:
        raise SchemaError("the schema is not what this version of mljobs expects", problems)


# ------------------------------------------------------------------------------------------------- one at a time


@contextmanager
def migrating(connection: Connection) -> Iterator[None]:
    """Hold off every other upgrade until the transaction ends; take back what the block did if it fails.

    Raises:
        SchemaError: Alembic refused; the message is its own.
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
    with _savepoint(connection):
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        try:
            yield
        except CommandError as error:
            raise SchemaError(str(error)) from error


def _savepoint(connection: Connection) -> NestedTransaction:
    try:
        return connection.begin_nested()
    except DBAPIError as error:
        if _sqlstate(error) == "25P01":  # no transaction to have a savepoint in
            raise InvalidValueError(
                "target", connection, "it is in AUTOCOMMIT, and this needs a transaction; give the engine instead"
            ) from error
        raise


def _sqlstate(error: DBAPIError) -> str | None:
    state: str | None = getattr(error.orig, "sqlstate", None)
    return state


@contextmanager
def _connected(target: Target) -> Iterator[Connection]:
    if isinstance(target, Connection):
        _refuse_unknown(target)
        yield target
    elif isinstance(target, Engine):
        if target.dialect.name == "postgresql":
            # Neither AUTOCOMMIT, nor a level that would read the version as it was before the lock was granted.
            target = target.execution_options(isolation_level="READ COMMITTED")
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
        function(_config(connection), revision)


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


# -------------------------------------------------------------------------------------------------- what stands there

_Found = dict[tuple[str, str], str]
"""What a table is and what stands beside it: the kind and name of each part, and its definition."""

_SHOWN = 100


def _differences(connection: Connection, metadata: MetaData | None) -> list[str]:
    from mljobs.model import metadata as own  # noqa: PLC0415 - upgrading works without the model

    tables = _job_tables(own if metadata is None else metadata)
    if not tables:
        raise InvalidValueError("metadata", metadata, "no class with MlJobMixin is in it")
    expected = (_expected_postgresql if connection.dialect.name == "postgresql" else _expected_sqlite)(
        connection, tables
    )
    problems = []
    for table in tables:
        found = _read(connection, table.name, _schema_of(connection, table))
        if not found:
            problems.append(f"table {table.name} is missing")
            continue
        for (kind, name), definition in expected[table].items():
            subject = f"{kind} {name} of table {table.name}"
            have = found.get((kind, name))
            if have is None:
                problems.append(f"{subject} is missing")
            elif have != definition:
                problems.append(f"{subject} {_difference(have, definition)}")
    return problems


def _difference(have: str, wanted: str) -> str:
    if max(len(have), len(wanted)) <= _SHOWN:
        return f"is {have!r}, expected {wanted!r}"
    same = next((at for at, (left, right) in enumerate(zip(have, wanted, strict=False)) if left != right), None)
    start = max(0, (min(len(have), len(wanted)) if same is None else same) - _SHOWN // 4)
    return f"differs from character {start} on: {_excerpt(have, start)}, expected {_excerpt(wanted, start)}"


def _excerpt(definition: str, start: int) -> str:
    part = definition[start : start + _SHOWN]
    return repr(part + ("..." if start + _SHOWN < len(definition) else ""))


def _job_tables(metadata: MetaData) -> list[Table]:
    """Return the job tables, each followed by its lease table."""
    tables = []
    for jobs in metadata.tables.values():
        if "mljobs" in jobs.info:
            leases = (
                table
                for table in metadata.tables.values()
                if {"token", "target_lock"} <= set(table.columns.keys()) and table.c.job_id.references(jobs.c.id)
            )
            tables += [jobs, *leases]
    return tables


def _with_references(tables: Iterable[Table]) -> list[Table]:
    """Return the tables and those that their foreign keys need."""
    needed: dict[Table, None] = {}
    waiting = list(tables)
    while waiting:
        table = waiting.pop()
        if table not in needed:
            needed[table] = None
            waiting += [key.column.table for key in table.foreign_keys]
    return list(needed)


def _schema_of(connection: Connection, table: Table) -> str | None:
    translated: Mapping[str | None, str | None] = connection.get_execution_options().get("schema_translate_map") or {}
    return translated.get(table.schema, table.schema)


def _create(connection: Connection, tables: Iterable[Table], schema: str | None) -> None:
    needed = _with_references(tables)
    metadata = needed[0].metadata
    own = connection.get_execution_options().get("schema_translate_map")
    connection.execution_options(schema_translate_map=dict.fromkeys({None, *(each.schema for each in needed)}, schema))
    try:
        metadata.create_all(connection, tables=needed)
    finally:
        connection.execution_options(schema_translate_map=own)


def _read(connection: Connection, table: str, schema: str | None) -> _Found:
    read = _read_postgresql if connection.dialect.name == "postgresql" else _read_sqlite
    return read(connection, table, schema)


def _on_one_line(definition: object) -> str:
    return " ".join(str(definition).split())


def _expected_sqlite(_connection: Connection, tables: list[Table]) -> dict[Table, _Found]:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    try:
        with engine.begin() as connection:
            _create(connection, tables, None)
            return {table: _read_sqlite(connection, table.name, None) for table in tables}
    finally:
        engine.dispose()


def _read_sqlite(connection: Connection, table: str, schema: str | None) -> _Found:
    quote = connection.dialect.identifier_preparer.quote
    prefix = f"{quote(schema)}." if schema else ""
    found: _Found = {}

    def add(kind: str, name: str, definition: object) -> None:
        # SQLite writes names in quotes after a rename: they say nothing.
        found[kind, name] = _on_one_line(definition).replace('"', "")

    for _, name, kind, notnull, default, key in connection.exec_driver_sql(
        f"PRAGMA {prefix}table_info({quote(table)})"
    ):
        parts = (kind, "NOT NULL" * notnull, "" if default is None else f"DEFAULT {default}", "PRIMARY KEY" * bool(key))
        add("column", name, " ".join(filter(None, parts)))
    if not found:
        return found
    for check in inspect(connection).get_check_constraints(table, schema=schema):
        if check["name"]:
            add("check", str(check["name"]), check["sqltext"])
    for row in connection.exec_driver_sql(f"PRAGMA {prefix}foreign_key_list({quote(table)})"):
        add("foreign key", row[3], f"REFERENCES {row[2]} ({row[4]}) ON UPDATE {row[5]} ON DELETE {row[6]}")
    _read_sqlite_master(connection, table, prefix, add)
    return found


def _read_sqlite_master(
    connection: Connection, table: str, prefix: str, add: Callable[[str, str, object], object]
) -> None:
    names = companion_names(table)
    # A door that stands open lets every delete through. What the counters have counted is no matter of schema.
    row_columns = {names["door"]: "name, open", names["counts"]: "kind, status"}
    statement = (
        f"SELECT type, name, sql FROM {prefix}sqlite_master WHERE sql IS NOT NULL"  # noqa: S608 - quoted
        " AND (tbl_name = ? AND type IN ('index', 'trigger') OR type = 'table' AND name IN (?, ?, ?))"
    )
    for kind, name, sql in connection.exec_driver_sql(statement, (table, table, *row_columns)).all():
        if kind != "table":
            add(kind, name, sql)
        elif name in row_columns:
            add("companion", name, sql)
            quoted = prefix + connection.dialect.identifier_preparer.quote(name)
            rows = connection.exec_driver_sql(f"SELECT {row_columns[name]} FROM {quoted} ORDER BY 1, 2")  # noqa: S608
            add("rows of companion", name, ", ".join("=".join(map(str, row)) for row in rows))
        elif re.search(r"\bAUTOINCREMENT\b", sql, re.IGNORECASE):
            add("AUTOINCREMENT", "of the key", "")


def _expected_postgresql(connection: Connection, tables: list[Table]) -> dict[Table, _Found]:
    """Build the expected tables as temporary ones, so that this very server writes out both definitions."""
    savepoint = _savepoint(connection)
    try:
        _create(connection, tables, "pg_temp")
        return {table: _read_postgresql(connection, table.name, "pg_temp") for table in tables}
    except DBAPIError as error:
        if _sqlstate(error) in _NOT_ALLOWED:
            reason = str(error.orig).partition("\n")[0]
            raise SchemaError(
                f"verify makes temporary tables to compare with, and this role or server may not: {reason}; "
                "GRANT TEMPORARY ON DATABASE to the role, or verify as another one, on the primary"
            ) from error
        raise
    finally:
        savepoint.rollback()


_NOT_ALLOWED = ("42501", "25006")  # insufficient privilege, read-only transaction

_TABLE = text("""\
SELECT c.oid, quote_ident(n.nspname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = to_regclass(:name)""")
_COLUMNS = text("""\
SELECT a.attname, format_type(a.atttypid, a.atttypmod) || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
  || coalesce(' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid), '')
  || CASE a.attidentity WHEN 'a' THEN ' GENERATED ALWAYS AS IDENTITY' WHEN 'd' THEN ' GENERATED BY DEFAULT AS IDENTITY'
     ELSE '' END
FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = :table AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum""")
_CONSTRAINTS = text("""\
SELECT CASE contype WHEN 'c' THEN 'check' WHEN 'p' THEN 'primary key' ELSE 'foreign key' END, conname,
  pg_get_constraintdef(oid)
FROM pg_constraint WHERE conrelid = :table AND contype IN ('c', 'p', 'f') ORDER BY conname""")
_INDEXES = text("""\
SELECT c.relname, pg_get_indexdef(i.indexrelid) || CASE WHEN i.indisvalid THEN '' ELSE ' INVALID' END
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = :table AND NOT i.indisprimary
ORDER BY c.relname""")
_TRIGGERS = text("""\
SELECT t.tgname, pg_get_triggerdef(t.oid), CASE WHEN t.tgenabled IN ('O', 'A') THEN 'enabled' ELSE 'disabled' END,
  p.proname, p.prosrc
FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid WHERE t.tgrelid = :table AND NOT t.tgisinternal
ORDER BY t.tgname""")
_STATISTICS = text("SELECT stxname, pg_get_statisticsobjdef(oid) FROM pg_statistic_ext WHERE stxrelid = :table")


def _read_postgresql(connection: Connection, table: str, schema: str | None) -> _Found:
    quote = connection.dialect.identifier_preparer.quote
    row = connection.execute(_TABLE, {"name": f"{quote(schema)}.{quote(table)}" if schema else quote(table)}).first()
    found: _Found = {}
    if row is None:
        return found
    oid, home = row
    qualifier = re.compile(rf'(?<![\w"])(?:pg_temp(?:_\d+)?|{re.escape(home)})\.')

    def add(kind: str, name: str, definition: str) -> None:
        found[kind, name] = _on_one_line(qualifier.sub("", definition))

    values = {"table": oid}
    for column, definition in connection.execute(_COLUMNS, values):
        add("column", column, definition)
    for kind, constraint, definition in connection.execute(_CONSTRAINTS, values):
        add(kind, constraint, definition)
    for index, definition in connection.execute(_INDEXES, values):
        add("index", index, definition)
    for trigger, definition, state, function, body in connection.execute(_TRIGGERS, values):
        add("trigger", trigger, definition)
        add("state of trigger", trigger, state)
        add("function", function, body)
    for statistics, definition in connection.execute(_STATISTICS, values):
        add("statistics", statistics, definition)
    return found
