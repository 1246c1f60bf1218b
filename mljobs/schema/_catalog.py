"""Compare the tables of a database with those that this release makes, part by part.

The expected tables are made by ``create_all``: on PostgreSQL as temporary tables in a savepoint that is rolled back, on
SQLite in memory. Then the definitions that the server writes for both are compared. Text that SQLAlchemy renders would not
do: PostgreSQL keeps the meaning of a CHECK or a WHEN, not its text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import Connection, MetaData, Table, create_engine, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import StaticPool

from mljobs.errors import InvalidValueError, SchemaError
from mljobs.guards._beside import leases_of, tables_beside
from mljobs.guards._companions import GUARD_ROLES, companion_names, quoted, schema_of
from mljobs.guards._overview import VIEW_COLUMNS, Overview, overview_of
from mljobs.schema._hazards import hazards
from mljobs.schema._savepoints import as_by_default, savepoint, sqlstate

if TYPE_CHECKING:
    from sqlalchemy import Inspector

VERSION_TABLE = "mljobs_alembic_version"
"""Where Alembic keeps our version."""

OWN_TABLES = frozenset({"ml_jobs", "ml_jobs_guard", "ml_jobs_counts", "ml_job_leases", "ml_job_workers", VERSION_TABLE})
"""Every table that our migrations make, on either database; for a host's autogenerate, which must not drop them."""

_Found = dict[tuple[str, str], str]
"""What a table is and what stands beside it: the kind and name of each part, and its definition."""

_SHOWN = 100


def differences(connection: Connection, metadata: MetaData) -> list[str]:
    """Return one sentence for each part of a job table, its leases or its view that is not as ``metadata`` has it.

    Raises:
        InvalidValueError: No job table is in ``metadata``; or the connection is in AUTOCOMMIT.
        SchemaError: The role may not make temporary tables.
    """
    tables = _job_tables(metadata)
    if not tables:
        raise InvalidValueError("metadata", metadata, "no class with MlJobMixin is in it")
    with as_by_default(connection):
        return _differences(connection, tables)


def _differences(connection: Connection, tables: list[Table]) -> list[str]:
    postgresql = connection.dialect.name == "postgresql"
    read, expect = (_read_postgresql, _expected_postgresql) if postgresql else (_read_sqlite, _expected_sqlite)
    expected = expect(connection, tables)
    problems = []
    for table in tables:
        found = read(connection, table, schema_of(connection, table))
        if not found:
            problems.append(f"table {table.name} is missing")
            continue
        for (kind, name), definition in expected[table].items():
            subject = f"{kind} {name} of table {table.name}"
            have = _found_as(found, kind, name, definition)
            if have is None:
                if " of " not in kind:  # the rows or the state of what is missing itself
                    problems.append(f"{subject} is missing")
            elif not _same(kind, have, definition):
                problems.append(f"{subject} {_difference(have, definition)}")
        if "mljobs" in table.info and inspect(connection).has_table(
            leases_of(table).name, schema=schema_of(connection, table)
        ):
            problems += hazards(connection, table)
    return problems


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a job table that is not as this release makes it.

    Attributes:
        kind: ``trigger``, ``function``, ``check``, ``index`` and so on.
        name: Its name.
        have: Its definition in the database; None where it is missing.
    """

    kind: str
    name: str
    have: str | None


def record_differences(connection: Connection, table: Table) -> list[Part]:
    """Return the parts of a job table, as the mixin alone makes it, that differ; none where the table is missing.

    A host's own columns, keys and triggers are not looked at, nor made for the comparison.

    Raises:
        InvalidValueError: The connection is in AUTOCOMMIT.
        SchemaError: The role may not make temporary tables.
    """
    from mljobs.record._table import record_table  # noqa: PLC0415 - upgrading works without the model

    bare = record_table(table)
    postgresql = connection.dialect.name == "postgresql"
    read, expect = (_read_postgresql, _expected_postgresql) if postgresql else (_read_sqlite, _expected_sqlite)
    with as_by_default(connection):
        found = read(connection, table, schema_of(connection, table))
        if not found:
            return []
        expected = expect(connection, [bare])[bare]
    return [
        Part(kind, name, have)
        for (kind, name), definition in expected.items()
        if not _same(kind, have := _found_as(found, kind, name, definition), definition)
    ]


def guarded_tables(connection: Connection, schema: str | None) -> set[str]:
    """Return the tables of a schema beside which a guard stands, whole or in part."""
    if connection.dialect.name == "postgresql":
        rows = connection.execute(_GUARDED, {"schema": schema})
    else:
        prefix = f"{connection.dialect.identifier_preparer.quote(schema)}." if schema else ""
        rows = connection.exec_driver_sql(f"SELECT tbl_name, name FROM {prefix}sqlite_master WHERE type = 'trigger'")  # noqa: S608 - quoted
    triggers = rows.all()
    guards = {table: {companion_names(table)[role] for role in GUARD_ROLES} for table, _ in triggers}
    return {table for table, trigger in triggers if trigger in guards[table]}


def overviews_of(connection: Connection, schema: str | None) -> list[Overview]:
    """Return the overviews that stand in a schema, by any name."""
    seen = inspect(connection)
    found = []
    for view in seen.get_view_names(schema=schema):
        text_of = seen.get_view_definition(view, schema=schema) or ""  # SQLite has no columns of a broken view
        if not all(column in text_of for column in _OVERVIEW_COLUMNS):
            continue
        read = [name for name in seen.get_table_names(schema=schema) if _names(text_of, name)]
        jobs = [name for name in read if _has(seen, name, schema, _RECORD_COLUMNS)]
        leases = [name for name in read if _has(seen, name, schema, _LEASE_COLUMNS)]
        workers = [name for name in read if _has(seen, name, schema, _WORKER_COLUMNS)]
        if jobs and leases:
            table, held = (Table(name, MetaData(), schema=schema) for name in (jobs[0], leases[0]))
            seen_by = Table(workers[0], MetaData(), schema=schema) if workers else None
            columns = [column["name"] for column in seen.get_columns(view, schema=schema)]
            own = tuple(name for name in columns if name not in VIEW_COLUMNS)
            found.append(Overview(view, table, held, seen_by, own))
    return found


_OVERVIEW_COLUMNS = ("queue_wait", "lease_ends_at", "stuck", "note", "duration_ms")
_RECORD_COLUMNS = frozenset({"spec_json", "target_name"})
_LEASE_COLUMNS = frozenset({"token", "acquired_at", "target_lock"})
_WORKER_COLUMNS = frozenset({"kinds", "concurrency", "last_seen_at"})


def _has(seen: Inspector, name: str, schema: str | None, columns: frozenset[str]) -> bool:
    return {column["name"] for column in seen.get_columns(name, schema=schema)} >= columns


def _names(statement: str, name: str) -> bool:
    in_quotes = '"{}"'.format(name.replace('"', '""'))
    return in_quotes in statement or re.search(rf'(?<![\w"]){re.escape(name)}(?![\w"])', statement) is not None


def _found_as(found: _Found, kind: str, name: str, wanted: str) -> str | None:
    """Return what a part is; a key is itself under any name: PostgreSQL gives one, which a renamed table keeps."""
    have = found.get((kind, name))
    if have is None and kind in _KEYS:
        return next((each for (of, _), each in found.items() if of == kind and each == wanted), None)
    return have


_KEYS = frozenset({"primary key", "foreign key"})


def _same(kind: str, have: str | None, wanted: str) -> bool:
    if have == wanted or have is None:
        return have == wanted
    return kind in _WITH_CONDITIONS and _as_first_written(have) == _as_first_written(wanted)


_WITH_CONDITIONS = frozenset({"check", "index", "trigger", "view"})
_CAST = re.compile(r"::(?:character varying|text)(?:\[\])?")
_NEEDLESS = re.compile(r"""(?<![\w"])\((\w+|ARRAY\[[^\]]*\])\)""")
_LITERAL = re.compile(r"'(?:[^']|'')*'")
_PLACE = "literal_"


def _as_first_written(definition: str) -> tuple[str, list[str]]:
    """Return a condition without the casts between texts that PostgreSQL adds, and the brackets that these need.

    What the server writes out for ``kind IN ('a', 'b')`` reads back as another tree: a database that was dumped and
    restored has the casts elsewhere. Literals are compared apart, as they are: a cast inside one is no cast.
    """
    literals = _LITERAL.findall(definition)
    bare = _CAST.sub("", _LITERAL.sub(_PLACE, definition))
    while bare != (fewer := _NEEDLESS.sub(r"\1", bare)):
        bare = fewer
    return bare, literals


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
    """Return the job tables, each followed by the tables of its leases and of its workers."""
    tables = []
    for jobs in metadata.tables.values():
        if "mljobs" in jobs.info:
            tables += [jobs, *tables_beside(jobs)]
    return tables


def _with_references(tables: Iterable[Table]) -> list[Table]:
    """Return the tables and those that their foreign keys need, leases last: the view beside them reads the others."""
    needed: dict[Table, None] = {}
    waiting = list(tables)
    while waiting:
        table = waiting.pop()
        if table not in needed:
            needed[table] = None
            waiting += [key.column.table for key in table.foreign_keys]
    return sorted(needed, key=lambda table: "target_lock" in table.c)  # a copy by to_metadata does not say so


def _create(connection: Connection, tables: Iterable[Table], schema: str | None) -> None:
    needed = _with_references(tables)
    metadata = needed[0].metadata
    own = connection.get_execution_options().get("schema_translate_map")
    connection.execution_options(schema_translate_map=dict.fromkeys({None, *(each.schema for each in needed)}, schema))
    try:
        # Nothing is there yet. To ask would be to send a statement that was compiled for another map.
        metadata.create_all(connection, tables=needed, checkfirst=False)
    finally:
        connection.execution_options(schema_translate_map=own)


def _on_one_line(definition: object) -> str:
    return " ".join(str(definition).split())


def _expected_sqlite(_connection: Connection, tables: list[Table]) -> dict[Table, _Found]:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    try:
        with engine.begin() as connection:
            _create(connection, tables, None)
            return {table: _read_sqlite(connection, table, None) for table in tables}
    finally:
        engine.dispose()


def _read_sqlite(connection: Connection, read: Table, schema: str | None) -> _Found:
    quote, table = connection.dialect.identifier_preparer.quote, read.name
    prefix = f"{quote(schema)}." if schema else ""
    found: _Found = {}

    def add(kind: str, name: str, definition: object) -> None:
        found[kind, name] = _without_needless_quotes(str(definition))

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
    view = _view_of(read)
    statement = f"SELECT sql FROM {prefix}sqlite_master WHERE type = 'view' AND name = ?"  # noqa: S608 - quoted
    for (sql,) in connection.exec_driver_sql(statement, (view,)):
        add("view", view, sql)
    return found


def _without_needless_quotes(definition: str) -> str:
    """Return SQL on one line, without the quotes around names that SQLite writes after a rename; literals as they are."""
    parts = _QUOTED.split(definition)
    for at, part in enumerate(parts):
        if not at % 2:
            parts[at] = re.sub(r"\s+", " ", part)
        elif _PLAIN_NAME.fullmatch(part):
            parts[at] = part.strip('"')
    return "".join(parts).strip()


_QUOTED = re.compile(r"""('(?:[^']|'')*'|"(?:[^"]|"")*")""")
_PLAIN_NAME = re.compile(r'"\w[\w ]*"')


def _view_of(table: Table) -> str:
    """Return the name of the view that is compared with this table: the leases', which come last; none is empty."""
    overview = overview_of(table)
    return overview.name if overview is not None and overview.leases is table else ""


def _read_sqlite_master(
    connection: Connection, table: str, prefix: str, add: Callable[[str, str, object], object]
) -> None:
    names = companion_names(table)
    # Retention that is left on lets every delete through. What the counters have counted is no matter of schema.
    row_columns = {names["guard"]: "name, open", names["counts"]: "kind, status"}
    statement = (
        f"SELECT type, name, sql FROM {prefix}sqlite_master WHERE sql IS NOT NULL"  # noqa: S608 - quoted
        " AND (tbl_name = ? AND type IN ('index', 'trigger') OR type = 'table' AND name IN (?, ?, ?))"
    )
    for kind, name, sql in connection.exec_driver_sql(statement, (table, table, *row_columns)).all():
        if kind != "table":
            add("blob index" if name == names["blobs"] else kind, name, sql)
        elif name in row_columns:
            add("companion", name, sql)
            quoted = prefix + connection.dialect.identifier_preparer.quote(name)
            rows = connection.exec_driver_sql(f"SELECT {row_columns[name]} FROM {quoted} ORDER BY 1, 2")  # noqa: S608
            add("rows of companion", name, ", ".join("=".join(map(str, row)) for row in rows))
        elif re.search(r"\bAUTOINCREMENT\b", sql, re.IGNORECASE):
            add("AUTOINCREMENT", "of the key", "")


def _expected_postgresql(connection: Connection, tables: list[Table]) -> dict[Table, _Found]:
    """Build the expected tables as temporary ones, so that this very server writes out both definitions."""
    undone = savepoint(connection)
    try:
        _create(connection, tables, "pg_temp")
        return {table: _read_postgresql(connection, table, "pg_temp") for table in tables}
    except DBAPIError as error:
        if sqlstate(error) in _NOT_ALLOWED:
            reason = str(error.orig).partition("\n")[0]
            raise SchemaError(
                f"verify makes temporary tables to compare with, and this role or server may not: {reason}; "
                "GRANT TEMPORARY ON DATABASE to the role, or verify as another one, on the primary"
            ) from error
        raise
    finally:
        undone.rollback()


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
  p.proname, p.prosrc, concat_ws(' ', l.lanname, p.provolatile, CASE WHEN p.prosecdef THEN 'SECURITY DEFINER' END,
    p.proconfig::text)
FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_language l ON l.oid = p.prolang
WHERE t.tgrelid = :table AND NOT t.tgisinternal
ORDER BY t.tgname""")
# In the schema of the table, wherever that is. With the options, for one decides whose rights it reads with.
_VIEW = text("""\
SELECT v.relname, concat_ws(' ', v.reloptions::text, pg_get_viewdef(v.oid))
FROM pg_class v JOIN pg_class t ON t.relnamespace = v.relnamespace
WHERE t.oid = :table AND v.relkind = 'v' AND v.relname = :view""")
_GUARDED = text("""\
SELECT c.relname, t.tgname FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
WHERE c.relnamespace = CAST(coalesce(quote_ident(:schema), quote_ident(current_schema())) AS regnamespace)
  AND NOT t.tgisinternal""")
_STATISTICS = text("SELECT stxname, pg_get_statisticsobjdef(oid) FROM pg_statistic_ext WHERE stxrelid = :table")


def _read_postgresql(connection: Connection, read: Table, schema: str | None) -> _Found:
    name = quoted(connection, read.name)
    row = connection.execute(_TABLE, {"name": f"{quoted(connection, schema)}.{name}" if schema else name}).first()
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
    for trigger, definition, state, function, body, attributes in connection.execute(_TRIGGERS, values):
        add("trigger", trigger, definition)
        add("state of trigger", trigger, state)
        add("function", function, body)
        add("attributes of function", function, attributes)
    for statistics, definition in connection.execute(_STATISTICS, values):
        add("statistics", statistics, definition)
    for view, definition in connection.execute(_VIEW, {**values, "view": _view_of(read)}):
        add("view", view, definition)
    return found
