"""The tables of mljobs in a database: bring them up to date, take them down, check that they are what they should be.

Every upgrade is one transaction, on SQLite too, and waits for an upgrade that another process has begun. The version
is kept in ``mljobs_alembic_version``, a table of our own, so it never meets a host's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, inspect, text
from sqlalchemy.pool import StaticPool

from mljobs.engines import new_engine
from mljobs.errors import InvalidValueError, SchemaError

if TYPE_CHECKING:
    from sqlalchemy import MetaData

VERSION_TABLE = "mljobs_alembic_version"
"""Where Alembic keeps our version."""

Target = str | URL | Engine | Connection
"""A database: its URL, an engine, or a connection whose transaction is to be used."""

_LOCK = 7_955_930_144_303_215_201  # "mljobs ma" as a number: one upgrade at a time
_PREFIXES = ("ml_jobs", "ml_job_leases")


def migrations_path() -> Path:
    """Return where the migrations are: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    inside = here / "migrations"
    return inside if inside.is_dir() else here.parent / "migrations"


def is_ours(name: str | None, kind: str, _parents: Mapping[str, Any]) -> bool:
    """Say whether Alembic's autogenerate should look at what a database holds; an ``include_name`` hook."""
    return kind != "table" or name in _PREFIXES


def upgrade(target: Target, revision: str = "head") -> None:
    """Bring the tables up to date; nothing to do is no error.

    Args:
        target: The database. A connection's transaction is used and left open.
        revision: How far; ``head`` for all the way.

    Raises:
        SchemaError: The database is newer than this version of mljobs, or has the tables from elsewhere.
    """
    with _connected(target) as connection, migrating(connection):
        _refuse_newer(connection)
        if current(connection) is None and inspect(connection).has_table("ml_jobs"):
            raise SchemaError(
                "table ml_jobs exists, but no migration made it; if metadata.create_all did and "
                "mljobs.schema.verify finds nothing, say so with mljobs.schema.stamp"
            )
        _run(command.upgrade, connection, revision)


def downgrade(target: Target, revision: str = "base") -> None:
    """Take the tables back to an earlier version; ``base`` drops them, finished records included.

    Args:
        target: The database. A connection's transaction is used and left open.
        revision: How far back.

    Raises:
        SchemaError: The database is newer than this version of mljobs.
    """
    with _connected(target) as connection, migrating(connection):
        _refuse_newer(connection)
        _run(command.downgrade, connection, revision)


def stamp(target: Target, revision: str = "head") -> None:
    """Say that the tables stand as ``revision`` makes them, without making them; ``verify`` them first.

    Args:
        target: The database. A connection's transaction is used and left open.
        revision: What they are.
    """
    with _connected(target) as connection, migrating(connection):
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
    """
    from mljobs.model import metadata as own  # noqa: PLC0415 - upgrading works without the model

    with _connected(target) as connection:
        problems = []
        if metadata is None:
            _refuse_newer(connection)
            version, expected = current(connection), head()
            if version is not None and version != expected:
                problems.append(f"the schema is at version {version}, this release expects {expected}: run an upgrade")
        checked = metadata if metadata is not None else own
        if connection.dialect.name == "postgresql":
            problems += _compare(_expected_postgresql(connection, checked), checked, _read_postgresql, connection)
        else:
            problems += _compare(_expected_sqlite(checked), checked, _read_sqlite, connection)
    if problems:
        raise SchemaError("the schema is not what this version of mljobs expects", problems)


# ------------------------------------------------------------------------------------------------- one at a time


@contextmanager
def migrating(connection: Connection) -> Iterator[None]:
    """Begin a transaction that holds off every other upgrade until it ends.

    Raises:
        SchemaError: Alembic refused; the message is its own.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    else:
        driver: Any = connection.connection.dbapi_connection
        # Python's sqlite3 begins a transaction for rows only; without this each CREATE would commit itself.
        if not driver.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
    try:
        yield
    except CommandError as error:
        raise SchemaError(str(error)) from error


@contextmanager
def _connected(target: Target) -> Iterator[Connection]:
    if isinstance(target, Connection):
        yield target
    elif isinstance(target, Engine):
        with target.begin() as connection:
            yield connection
    elif isinstance(target, str | URL):
        engine = new_engine(target)
        try:
            with engine.begin() as connection:
                yield connection
        finally:
            engine.dispose()
    else:
        raise InvalidValueError(
            "target", target, "expected a URL, an Engine or a Connection; of an AsyncEngine use connection.run_sync"
        )


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    if connection is not None:
        config.attributes["connection"] = connection
    return config


def _run(function: Any, connection: Connection, revision: str) -> None:
    function(_config(connection), revision)


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


@dataclass
class _Found:
    """What a table is and what stands beside it: for each part its name and its definition."""

    parts: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, part: str, name: str, definition: object) -> None:
        self.parts.setdefault(part, {})[name] = " ".join(str(definition).split())


def _compare(expected: Mapping[str, _Found], metadata: MetaData, read: Any, connection: Connection) -> list[str]:
    problems = []
    for table in metadata.sorted_tables:
        if table.name not in expected:
            continue
        found: _Found | None = read(connection, table.name, table.schema)
        if found is None:
            problems.append(f"table {table.name} is missing")
            continue
        for part, definitions in expected[table.name].parts.items():
            have = found.parts.get(part, {})
            for name, definition in definitions.items():
                if name not in have:
                    problems.append(f"{part} {name} of table {table.name} is missing")
                elif have[name] != definition:
                    problems.append(f"{part} {name} of table {table.name} is {have[name]!r}, expected {definition!r}")
    return problems


def _guarded(metadata: MetaData) -> list[str]:
    """Return the names of the job tables and their lease tables."""
    names = [table.name for table in metadata.tables.values() if "mljobs" in table.info]
    leases = [table.name for table in metadata.tables.values() if {"token", "target_lock"} <= set(table.columns.keys())]
    return names + leases


def _expected_sqlite(metadata: MetaData) -> dict[str, _Found]:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    try:
        with engine.begin() as connection:
            tables = [table for table in metadata.sorted_tables if table.schema is None]
            metadata.create_all(connection, tables=tables)
            read = {name: _read_sqlite(connection, name, None) for name in _guarded(metadata)}
    finally:
        engine.dispose()
    return {name: found for name, found in read.items() if found is not None}


def _read_sqlite(connection: Connection, table: str, schema: str | None) -> _Found | None:
    quote = connection.dialect.identifier_preparer.quote
    prefix = f"{quote(schema)}." if schema else ""
    columns = connection.exec_driver_sql(f"PRAGMA {prefix}table_info({quote(table)})").all()
    if not columns:
        return None
    found = _Found()
    for _, name, kind, notnull, default, key in columns:
        found.add("column", name, f"{kind}{' NOT NULL' if notnull else ''} default {default} key {key}")
    for check in inspect(connection).get_check_constraints(table, schema=schema):
        if check["name"]:
            found.add("check", str(check["name"]), check["sqltext"])
    statement = f"SELECT type, name, sql FROM {prefix}sqlite_master WHERE tbl_name = ? AND sql IS NOT NULL"  # noqa: S608
    for kind, name, sql in connection.exec_driver_sql(statement, (table,)):
        if kind in ("index", "trigger"):
            found.add(kind, name, sql)
    beside = f"SELECT name, sql FROM {prefix}sqlite_master WHERE type = 'table' AND name IN (?, ?)"  # noqa: S608
    for name, sql in connection.exec_driver_sql(beside, (f"{table}_guard", f"{table}_counts")):
        found.add("table", name, sql)
        rows = connection.exec_driver_sql(f"SELECT * FROM {prefix}{quote(name)}")  # noqa: S608 - quoted
        found.add("rows of", name, sorted(tuple(row)[:-1] for row in rows))
    return found


def _expected_postgresql(connection: Connection, metadata: MetaData) -> dict[str, _Found]:
    """Build the expected tables as temporary ones, so that this very server writes out both definitions."""
    schemas = {table.schema for table in metadata.tables.values()}
    savepoint = connection.begin_nested()
    try:
        scratch = connection.execution_options(schema_translate_map=dict.fromkeys(schemas, "pg_temp"))
        try:
            metadata.create_all(scratch, checkfirst=False)
        finally:
            connection.execution_options(schema_translate_map=None)
        read = {name: _read_postgresql(connection, name, "pg_temp") for name in _guarded(metadata)}
    finally:
        savepoint.rollback()
    return {name: found for name, found in read.items() if found is not None}


_TABLE = text("SELECT to_regclass(:name)::oid, current_schema()")
_COLUMNS = text("""\
SELECT a.attname, format_type(a.atttypid, a.atttypmod) || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
  || ' default ' || coalesce(pg_get_expr(d.adbin, d.adrelid), 'none') || ' identity ' || a.attidentity::text
FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = :table AND a.attnum > 0 AND NOT a.attisdropped""")
_CONSTRAINTS = text("""\
SELECT CASE contype WHEN 'c' THEN 'check' WHEN 'p' THEN 'primary key' ELSE 'foreign key' END, conname,
  pg_get_constraintdef(oid) || CASE WHEN convalidated THEN '' ELSE ' NOT VALID' END
FROM pg_constraint WHERE conrelid = :table AND contype IN ('c', 'p', 'f')""")
_INDEXES = text("""\
SELECT c.relname, pg_get_indexdef(i.indexrelid) || CASE WHEN i.indisvalid THEN '' ELSE ' INVALID' END
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = :table AND NOT i.indisprimary""")
_TRIGGERS = text("""\
SELECT t.tgname, pg_get_triggerdef(t.oid), CASE WHEN t.tgenabled IN ('O', 'A') THEN 'enabled' ELSE 'disabled' END,
  p.proname, p.prosrc
FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid WHERE t.tgrelid = :table AND NOT t.tgisinternal""")
_EXTENDED = text("SELECT stxname, pg_get_statisticsobjdef(oid) FROM pg_statistic_ext WHERE stxrelid = :table")


def _read_postgresql(connection: Connection, table: str, schema: str | None) -> _Found | None:
    quote = connection.dialect.identifier_preparer.quote
    name = f"{quote(schema)}.{quote(table)}" if schema else quote(table)
    oid, here = connection.execute(_TABLE, {"name": name}).one()
    if oid is None:
        return None
    schemas = "|".join(re.escape(quote(each)) for each in {schema or here, here} if each)
    qualifier = re.compile(rf"\b(?:pg_temp(?:_\d+)?|{schemas})\.")
    found = _Found()

    def add(part: str, part_name: str, definition: str) -> None:
        found.add(part, part_name, qualifier.sub("", definition))

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
    for statistics, definition in connection.execute(_EXTENDED, values):
        add("statistics", statistics, definition)
    return found
