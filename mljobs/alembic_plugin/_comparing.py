"""Compare job tables for autogenerate and ``alembic check``, after Alembic's own comparison of tables.

- A new job table gets its guard, one that goes loses it first.
- A guard that is missing, incomplete, altered or of another release is put up anew; so are our CHECKs and indexes, where
  Alembic does not compare what differs (the tokens of a CHECK, the order of an index on SQLite).
- What mljobs keeps beside a table, and the tables of our own migrations, are not the host's to drop.

The database is asked by :func:`mljobs.schema._catalog.record_differences`, the same comparison as ``mljobs verify``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from alembic.operations import ops
from sqlalchemy import Identity, Table, inspect, text
from sqlalchemy.sql.elements import conv

from mljobs.alembic_plugin._operations import CreateJobCheckOp, CreateMljobsGuardOp, DropMljobsGuardOp
from mljobs.alembic_plugin._rebuilding import definitions, descend
from mljobs.alembic_plugin._rendering import render_ours
from mljobs.alembic_plugin._views import CreateMljobsOverviewOp, DropMljobsOverviewOp
from mljobs.errors import InvalidValueError, SchemaError
from mljobs.guards._companions import companion_names, is_blob_index, kinds_of, listed, short_name
from mljobs.guards._overview import overview_of
from mljobs.schema._catalog import OWN_TABLES, Part, guarded_tables, overviews_of, record_differences
from mljobs.types import DialectCheck

if TYPE_CHECKING:
    from sqlalchemy import Connection, Constraint, Index

log = logging.getLogger(__name__)

_GUARD_KINDS = frozenset(
    {
        *("trigger", "state of trigger", "function", "attributes of function", "statistics"),
        *("companion", "rows of companion", "blob index"),
    }
)


def compare(context: Any, upgrade: Any, schemas: Iterable[str | None]) -> None:
    """Look at what Alembic has found, and at the job tables themselves.

    Args:
        context: Alembic's ``AutogenContext``.
        upgrade: What the migration will do so far; changed in place.
        schemas: Those that ``env.py`` compares, None for the default one.
    """
    if _is_off(context) or getattr(upgrade, "compared_by_mljobs", False):
        return
    upgrade.compared_by_mljobs = True  # registered under two names
    connection: Connection = context.connection
    if connection.dialect.name not in ("postgresql", "sqlite"):
        return
    render_ours(context.opts)
    job_tables = {place: table for place, table in _tables_of(context).items() if "mljobs" in table.info}
    searched = list(schemas)
    guarded = _guarded(connection, searched)
    _keep_own_tables(upgrade, {*job_tables, *guarded})
    _drop_guards_first(connection, upgrade, guarded)
    _drop_overviews_first(connection, upgrade, searched)
    _restore_what_reflection_loses(connection, upgrade, guarded)
    _create_guards_of_new_tables(upgrade, job_tables)
    for (schema, name), table in job_tables.items():
        if schema in searched and _is_compared(context, table, schema):
            _repair(connection, upgrade, table, schema, name)
            _add_missing_overview(connection, upgrade, table, schema)
    _ignore_other_dialects(connection, upgrade, context.sorted_tables)
    _warn_of_altered_checks(context, upgrade)


# ------------------------------------------------------------------------------------------------- what is not theirs


def hide_own_tables(context: Any, schemas: Iterable[str | None]) -> None:
    """Let Alembic's own comparison not see what is ours, which it would log as removed, line by line.

    A table of ours that is in the host's metadata as well is the host's to compare.

    Args:
        context: Alembic's ``AutogenContext``.
        schemas: Those that ``env.py`` compares, None for the default one.
    """
    connection: Connection = context.connection
    filters = getattr(context, "_name_filters", None)
    if _is_off(context) or filters is None or connection.dialect.name not in ("postgresql", "sqlite"):
        return
    known = _tables_of(context)
    ours = _beside({*(place for place in known if "mljobs" in known[place].info), *_guarded(connection, schemas)})

    def include_name(name: str | None, kind: str, parents: Any) -> bool:
        if kind == "index":
            return not is_blob_index(name, parents.get("table_name"))
        place = (parents.get("schema_name"), str(name))
        return kind != "table" or place in known or not (name in OWN_TABLES or place in ours)

    filters.append(include_name)


def _is_off(context: Any) -> bool:
    return "~mljobs" in (context.opts.get("autogenerate_plugins") or ())


def _tables_of(context: Any) -> dict[tuple[str | None, str], Table]:
    """Return the tables of the host's metadata by schema, None for the default one, and name."""
    default = context.connection.dialect.default_schema_name
    return {(None if table.schema == default else table.schema, table.name): table for table in context.sorted_tables}


def _guarded(connection: Connection, schemas: Iterable[str | None]) -> set[tuple[str | None, str]]:
    """Return the tables in the database that have a guard, in the same form."""
    return {(schema, name) for schema in schemas for name in guarded_tables(connection, schema)}


def _beside(job_tables: Iterable[tuple[str | None, str]]) -> set[tuple[str | None, str]]:
    return {(schema, companion_names(name)[role]) for schema, name in job_tables for role in ("guard", "counts")}


def _keep_own_tables(upgrade: Any, job_tables: Iterable[tuple[str | None, str]]) -> None:
    """Take out every drop of our own tables, and of what stands beside a job table."""
    beside = _beside(job_tables)
    dropped = {_place(found) for found in upgrade.ops if isinstance(found, ops.DropTableOp)}
    ours = {place for place in dropped if place in beside or place[1] in OWN_TABLES}
    upgrade.ops[:] = [found for found in upgrade.ops if _place(found) not in ours]


def _place(operation: Any) -> tuple[str | None, str]:
    return getattr(operation, "schema", None), str(getattr(operation, "table_name", ""))


def _drop_guards_first(connection: Connection, upgrade: Any, guarded: set[tuple[str | None, str]]) -> None:
    """Take down the guard of each job table that goes, and let no table go before those that refer to it."""
    drops = [found for found in upgrade.ops if isinstance(found, ops.DropTableOp)]
    if guarded.isdisjoint(map(_place, drops)):
        return
    ordered: list[Any] = []
    for drop in _referring_first(connection, drops):
        schema, name = place = _place(drop)
        if place in guarded:
            kinds = _stored_kinds(connection, name, schema)
            ordered.append(DropMljobsGuardOp(name, schema=schema, kinds=kinds))
            log.info("Detected removed job table %r", name)
        ordered.append(drop)
    upgrade.ops[:] = [found for found in upgrade.ops if found not in drops] + ordered


def _drop_overviews_first(connection: Connection, upgrade: Any, schemas: Iterable[str | None]) -> None:
    """Drop the views that read a table that goes: PostgreSQL would not let it go, SQLite would leave them broken."""
    gone = {_place(found) for found in upgrade.ops if isinstance(found, ops.DropTableOp)}
    upgrade.ops[:0] = [
        DropMljobsOverviewOp(found, schema=schema)
        for schema in (schemas if gone else ())
        for found in overviews_of(connection, schema)
        if not gone.isdisjoint({(schema, name) for name in found.reads})
    ]


_INDEXES = text("""\
SELECT indexname, indexdef FROM pg_indexes WHERE tablename = :name AND schemaname = coalesce(:schema, current_schema())""")


def _restore_what_reflection_loses(connection: Connection, upgrade: Any, guarded: set[tuple[str | None, str]]) -> None:
    """Give the way back what reflection does not see: on SQLite the tokens' AUTOINCREMENT and the order of the indexes.

    On PostgreSQL, with an older SQLAlchemy, the operators by which an index compares names.
    """
    seen, sqlite = inspect(connection), connection.dialect.name == "sqlite"
    for drop in [found for found in upgrade.ops if isinstance(found, ops.DropTableOp)]:
        schema, name = place = _place(drop)
        if sqlite and {"token", "target_lock"} <= {column["name"] for column in seen.get_columns(name, schema=schema)}:
            drop.table_kw["sqlite_autoincrement"] = True
        if place not in guarded:
            continue
        rows = (
            definitions(connection, schema, "index")
            if sqlite
            else connection.execute(_INDEXES, {"name": name, "schema": schema})
        )
        texts: dict[str, str] = {row[0]: row[1] for row in rows}
        for table_ops in _of_table(upgrade, schema, name):
            for at, change in enumerate(table_ops.ops):
                if isinstance(change, ops.DropIndexOp):
                    index = change.to_index()
                    written = texts.get(str(index.name), "")
                    if sqlite:
                        descend(index, written)
                    elif operators := dict(re.findall(r'(\w+)"? (\w+_ops)\b', written)):
                        index.dialect_kwargs["postgresql_ops"] = operators
                    table_ops.ops[at] = ops.DropIndexOp.from_index(index)


def _referring_first(connection: Connection, drops: list[Any]) -> list[Any]:
    """Return the drops in an order that foreign keys allow; Alembic itself gives none."""
    seen = inspect(connection)
    referred = {
        _place(drop): {
            (key["referred_schema"], key["referred_table"])
            for key in seen.get_foreign_keys(drop.table_name, schema=drop.schema)
        }
        for drop in drops
    }
    left, ordered = list(drops), []
    while left:
        needed = set().union(*(referred[_place(drop)] - {_place(drop)} for drop in left))
        free = [drop for drop in left if _place(drop) not in needed] or left  # a circle: as it came
        ordered += free
        left = [drop for drop in left if drop not in free]
    return ordered


def _stored_kinds(connection: Connection, name: str, schema: str | None) -> list[str]:
    """Return the tokens that the CHECK in the database lists."""
    checks = inspect(connection).get_check_constraints(name, schema=schema)
    ours = short_name(f"ck_{name}_kind")  # unless the table was renamed; a host may have checks on kind of its own
    for check in sorted(checks, key=lambda each: each["name"] != ours):
        if re.search(r"\bkind\b", str(check["sqltext"])):
            return [token.replace("''", "'") for token in re.findall(r"'((?:[^']|'')*)'", str(check["sqltext"]))]
    return []


def _create_guards_of_new_tables(upgrade: Any, job_tables: dict[tuple[str | None, str], Table]) -> None:
    for create in [found for found in upgrade.ops if isinstance(found, ops.CreateTableOp)]:
        for mark in [name for name in create.info if str(name).startswith("mljobs")]:
            del create.info[mark]  # for this process, not for a migration
        schema, name = _place(create)
        table = next((t for t in job_tables.values() if (t.schema, t.name) == (schema, name)), None)
        if table is not None:
            upgrade.ops.append(_guard_of(table))


def _guard_of(table: Table, kinds: Iterable[str] | None = None) -> CreateMljobsGuardOp:
    return CreateMljobsGuardOp(
        table.name,
        schema=table.schema,
        kinds=tuple(kinds_of(table) if kinds is None else kinds),
        with_rowid=bool(table.dialect_options["sqlite"]["with_rowid"]),
    )


# ------------------------------------------------------------------------------------------------------ what differs


def _is_compared(context: Any, table: Table, schema: str | None) -> bool:
    """Whether the filters of ``env.py`` let this table pass."""
    return bool(
        context.run_name_filters(table.name, "table", {"schema_name": schema})
        and context.run_object_filters(table, table.name, "table", False, None)
    )


def _repair(connection: Connection, upgrade: Any, table: Table, schema: str | None, name: str) -> None:
    """Add what makes an existing job table as this release has it."""
    try:
        parts = record_differences(connection, table)
    except (SchemaError, InvalidValueError) as error:
        log.warning("the guard of table %s is not compared: %s", name, error)
        return
    if not parts:
        return
    changed = _changed_names(upgrade, schema, name)
    kinds = _stored_kinds(connection, name, schema)
    changes = [*_checks(table, parts, changed, kinds), *_indexes(table, parts, changed)]
    if changes:
        upgrade.ops.append(ops.ModifyTableOps(name, changes, schema=schema))
    if any(part.kind in _GUARD_KINDS for part in parts):
        log.info("Detected that the guard of table %r is missing, altered or of another release", name)
        guard = _guard_of(table)
        guard.previous = _guard_of(table, kinds or None)
        upgrade.ops.append(guard)


def _add_missing_overview(connection: Connection, upgrade: Any, table: Table, schema: str | None) -> None:
    """Make the view that a job class names, after its tables; what a view of this name reads is ``verify``'s to say."""
    overview = overview_of(table)
    dropped = {found.view_name for found in upgrade.ops if isinstance(found, DropMljobsOverviewOp)}
    if overview is None or overview.name in {*inspect(connection).get_view_names(schema=schema)} - dropped:
        return
    log.info("Detected that the view %r is missing", overview.name)
    upgrade.ops.append(CreateMljobsOverviewOp(overview, schema=table.schema))


def _changed_names(upgrade: Any, schema: str | None, name: str) -> set[str]:
    """Return the constraints and indexes of a table that Alembic itself has found to differ."""
    found = set()
    for table_ops in _of_table(upgrade, schema, name):
        for change in table_ops.ops:
            changed = getattr(change, "constraint_name", None) or getattr(change, "index_name", None)
            if changed:
                found.add(str(changed))
    return found


def _of_table(upgrade: Any, schema: str | None, name: str) -> Iterator[Any]:
    for found in upgrade.ops:
        if isinstance(found, ops.ModifyTableOps) and _place(found) == (schema, name):
            yield found


def _checks(table: Table, parts: Iterable[Part], changed: set[str], before: list[str]) -> Iterator[Any]:
    kind_check = short_name(f"ck_{table.name}_kind")
    named: dict[str, Constraint] = {str(each.name): each for each in table.constraints if each.name}
    for part in parts:
        if part.kind == "check" and part.name not in changed and part.name in named:
            if part.have is not None:
                condition = re.sub(r"^CHECK \((.*)\)$", r"\1", part.have)
                if part.name == kind_check and before:  # as the mixin writes it, so that the way back leads there
                    condition = f"kind IN ({listed(before)})"
                yield CreateJobCheckOp(conv(part.name), table.name, condition, schema=table.schema).reverse()
            yield CreateJobCheckOp.from_constraint(named[part.name])


def _indexes(table: Table, parts: Iterable[Part], changed: set[str]) -> Iterator[Any]:
    named: dict[str, Index] = {str(index.name): index for index in table.indexes}
    for part in parts:
        if part.kind == "index" and part.have is not None and part.name not in changed and part.name in named:
            yield ops.DropIndexOp.from_index(named[part.name])
            yield ops.CreateIndexOp.from_index(named[part.name])


def _ignore_other_dialects(connection: Connection, upgrade: Any, tables: Iterable[Table]) -> None:
    """Take out differences that are none: a CHECK for the other database, the IDENTITY of a lease's token on SQLite."""
    dialect_name = connection.dialect.name
    checks = [check for table in tables for check in table.constraints if isinstance(check, DialectCheck)]
    elsewhere = {str(check.name) for check in checks if check.dialect_name != dialect_name}

    def is_none(change: Any) -> bool:
        if dialect_name == "sqlite" and isinstance(change, ops.AlterColumnOp):  # Alembic before 1.17
            return isinstance(change.modify_server_default, Identity)
        return isinstance(change, ops.CreateCheckConstraintOp) and str(change.constraint_name) in elsewhere

    for table_ops in [found for found in upgrade.ops if isinstance(found, ops.ModifyTableOps)]:
        table_ops.ops[:] = [change for change in table_ops.ops if not is_none(change)]
        if not table_ops.ops:
            upgrade.ops.remove(table_ops)


def _warn_of_altered_checks(context: Any, upgrade: Any) -> None:
    """Warn of a revision that SQLite would leave half way, with what stands before it done."""
    if context.connection.dialect.name != "sqlite" or context.opts.get("render_as_batch"):
        return
    for table_ops in [found for found in upgrade.ops if isinstance(found, ops.ModifyTableOps)]:
        if any(isinstance(change, ops.CreateCheckConstraintOp) for change in table_ops.ops):
            log.warning(
                "SQLite cannot alter a CHECK, and this revision would stop half way at table %r: say render_as_batch=True "
                "in context.configure of env.py, and make it anew",
                table_ops.table_name,
            )
