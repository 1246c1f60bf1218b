"""Find what lets a finished record change although every part of the guard is there: rules, triggers, settings."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sqlalchemy import Connection, Table, text

from mljobs.guards._beside import leases_of, tables_beside
from mljobs.guards._companions import companion_names, qualified_name, schema_of
from mljobs.guards._retention import retention_triggers
from mljobs.guards._unique import finished_key


def hazards(connection: Connection, jobs: Table) -> Iterator[str]:
    """Yield one sentence for each thing that undermines the guard of a job table, or the tokens of its leases.

    Args:
        connection: Where to look.
        jobs: The job table, which is there.
    """
    if connection.dialect.name == "postgresql":
        yield from _of_postgresql(connection, jobs)
    else:
        yield from _of_sqlite(connection, jobs)
    leases = leases_of(jobs)
    given = _highest_token(connection, jobs, leases)
    last = _last_token(connection, leases)
    if connection.dialect.name == "postgresql" and connection.execute(_GOES_BACK, _named(connection, leases)).scalar():
        yield f"the numbering of {leases.name}.token comes back to old ones: ALTER SEQUENCE ... NO CYCLE INCREMENT BY 1"
    if last is not None and given > last:
        yield (
            f"the numbering of {leases.name}.token stands at {last}, but token {given} was given out: old tokens would come "
            "back, and with them the writes of workers that are gone"
        )
    if max(given, last or 0) > _TOKENS_END:
        yield (
            f"the numbering of {leases.name}.token is near its end, at {max(given, last or 0)}: claims will fail; delete "
            "the lease that says so, and set the numbering back to the highest token that is in use"
        )


_TOKENS_END = 2**62
"""Far beyond what claims use up, and half of what a token can be."""


# -------------------------------------------------------------------------------------------------------- PostgreSQL

_RULES = text(
    "SELECT rulename FROM pg_rewrite WHERE ev_class = to_regclass(:name) AND rulename <> '_RETURN' ORDER BY 1"
)
_CHILDREN = text("""\
SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = to_regclass(:name) ORDER BY 1""")
_KIND = text("SELECT relkind = 'p', relpersistence = 'u' FROM pg_class WHERE oid = to_regclass(:name)")
_SETTINGS = text("""\
SELECT coalesce('role ' || quote_ident(r.rolname), 'database ' || quote_ident(current_database())), setting
FROM pg_db_role_setting s LEFT JOIN pg_roles r ON r.oid = s.setrole, unnest(s.setconfig) AS setting
WHERE s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
  AND lower(setting) ~ '^(mljobs\\.retention=(on|1|true|yes)|session_replication_role=replica)$'
ORDER BY 1, 2""")
# Of the triggers of a host, those that turn retention on for whoever deletes.
_OPENERS = text("""\
SELECT t.tgname, p.proname FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
WHERE t.tgrelid = to_regclass(:name) AND NOT t.tgisinternal AND t.tgname <> ALL (:ours)
  AND concat_ws(' ', p.prosrc, p.proconfig::text) ~* 'mljobs\\.retention|session_replication_role'
ORDER BY t.tgname""")
_SESSION = text("""\
SELECT current_setting('session_replication_role'), coalesce(current_setting('mljobs.retention', true), '')""")
_GOES_BACK = text("""\
SELECT seqcycle OR seqincrement < 1 FROM pg_sequence
WHERE seqrelid = CAST(pg_get_serial_sequence(:name, 'token') AS regclass)""")
# NULL where this role may not look; a sequence that was set back has no last value, which is 0.
_SEQUENCE = text("""\
SELECT CASE WHEN has_sequence_privilege(s.name, 'USAGE, SELECT') THEN coalesce(pg_sequence_last_value(s.name), 0) END
FROM (SELECT pg_get_serial_sequence(:name, 'token')::regclass AS name) AS s""")


# Of the tables beside a job table, where we have no triggers.
_BESIDE_TRIGGERS = text("""\
SELECT t.tgname, c.relname FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
WHERE t.tgrelid = to_regclass(:name) AND NOT t.tgisinternal ORDER BY t.tgname""")
_BESIDE = (
    "trigger {trigger} on table {table}: what mljobs keeps there holds no longer if a write is left out or changed; "
    "DROP TRIGGER"
)


def _of_postgresql(connection: Connection, jobs: Table) -> Iterator[str]:
    values = {"name": qualified_name(connection, jobs)}
    for (rule,) in connection.execute(_RULES, values):
        yield f"rule {rule} on table {jobs.name} rewrites its statements, past what the guard sees: DROP RULE"
    for (child,) in connection.execute(_CHILDREN, values):
        yield (
            f"table {child} inherits from {jobs.name}: its rows are read as jobs and have no guard of their own; "
            f"ALTER TABLE {child} NO INHERIT {jobs.name}"
        )
    row = connection.execute(_KIND, values).one()
    if row[0]:
        yield f"table {jobs.name} is partitioned: a part can be truncated or detached with its finished records"
    if row[1]:
        yield f"table {jobs.name} is UNLOGGED: a crash of the server empties it"
    for trigger, function in connection.execute(_OPENERS, {**values, "ours": [*companion_names(jobs.name).values()]}):
        yield f"trigger {trigger} on table {jobs.name} opens the guard in its function {function}: DROP TRIGGER"
    yield from _beside_on_postgresql(connection, jobs)
    for whose, setting in connection.execute(_SETTINGS):
        name, _, value = setting.partition("=")
        yield f"{whose} has {name} set to {value!r}, which opens the guard in each of its sessions: ALTER ... RESET {name}"
    replication, retention = connection.execute(_SESSION).one()
    if replication == "replica":  # under "local" they do
        yield f"session_replication_role is {replication!r} in this session: triggers do not fire"
    if retention == "on":
        yield "mljobs.retention is 'on' in this session: finished jobs can be deleted"


def _beside_on_postgresql(connection: Connection, jobs: Table) -> Iterator[str]:
    """Yield one sentence for each trigger on the tables of leases and of workers."""
    for beside in tables_beside(jobs):
        for trigger, table in connection.execute(_BESIDE_TRIGGERS, _named(connection, beside)):
            yield _BESIDE.format(trigger=trigger, table=table)


# ------------------------------------------------------------------------------------------------------------ SQLite


def _of_sqlite(connection: Connection, jobs: Table) -> Iterator[str]:
    quote, schema = connection.dialect.identifier_preparer.quote, schema_of(connection, jobs)
    prefix = f"{quote(schema)}." if schema else ""
    statement = f"SELECT sql FROM {prefix}sqlite_master WHERE type = 'table' AND name = ?"  # noqa: S608 - quoted
    definition = str(connection.exec_driver_sql(statement, (jobs.name,)).scalar())
    if re.search(r"\bON\s+CONFLICT\s+REPLACE\b", definition, re.IGNORECASE):
        yield f"table {jobs.name} says ON CONFLICT REPLACE, which deletes records without any trigger"
    if jobs.dialect_options["sqlite"]["with_rowid"]:
        known = connection.exec_driver_sql(f"PRAGMA {prefix}table_xinfo({quote(jobs.name)})").all()
        for column in [name for _, name, *_ in known if name.lower() == "rowid"]:
            yield (
                f"column {column} of table {jobs.name} hides SQLite's own rowid, by which finished records can then be "
                "replaced: give it another name"
            )
    ours = {index.name for index in jobs.indexes}
    listed = connection.exec_driver_sql(f"PRAGMA {prefix}index_list({quote(jobs.name)})").all()
    for _, name, unique, origin, _ in listed:
        if not unique or origin == "pk" or name in ours:
            continue
        sql = f"SELECT sql FROM {prefix}sqlite_master WHERE type = 'index' AND name = ?"  # noqa: S608 - quoted
        index = connection.exec_driver_sql(sql, (name,)).scalar()
        if index is None:  # of a UNIQUE in the table
            columns = [row[2] for row in connection.exec_driver_sql(f"PRAGMA {prefix}index_info({quote(name)})")]
            index = f"({', '.join(map(quote, columns))})"
        if finished_key(index):
            yield (
                f"unique index {name} of table {jobs.name} holds finished records: INSERT OR REPLACE deletes them without "
                "any trigger where recursive_triggers is off; add WHERE status IN ('queued', 'running')"
            )

    yield from _triggers_of_sqlite(connection, jobs, prefix)


_AFTER = re.compile(r"\bAFTER\s+(?:INSERT|UPDATE|DELETE)\b", re.IGNORECASE)


def _triggers_of_sqlite(connection: Connection, jobs: Table, prefix: str) -> Iterator[str]:
    """Yield one sentence for each trigger of a host that turns retention on, or gets between a statement and the guard."""
    names = companion_names(jobs.name)
    ours = {*names.values(), *retention_triggers(jobs)}
    beside = {names["guard"], names["counts"], *(table.name for table in tables_beside(jobs))}
    guarding, writes = (
        re.compile(rf'(?<![\w"]){before}["\[`]?{re.escape(name)}(?!\w)', re.IGNORECASE)
        for before, name in (("", names["guard"]), (r"(?:UPDATE|INTO|DELETE\s+FROM)\s+(?:OR\s+\w+\s+)?", jobs.name))
    )
    for catalog in (f"{prefix}sqlite_master", "sqlite_temp_master"):
        statement = (
            f"SELECT name, tbl_name, sql FROM {catalog} WHERE type = 'trigger' AND sql IS NOT NULL ORDER BY name"  # noqa: S608
        )
        for name, table, sql in connection.exec_driver_sql(statement).all():
            head, _, body = sql.partition("BEGIN")
            if name in ours:
                continue
            if guarding.search(body):
                yield (
                    f"trigger {name} on table {table} writes or reads {names['guard']}, "
                    f"which says whether finished jobs may be deleted: DROP TRIGGER {name}"
                )
            elif table in beside:
                yield _BESIDE.format(trigger=name, table=table)
            elif table == jobs.name and not _AFTER.search(head) and writes.search(body):
                yield (
                    f"trigger {name} on table {table} writes jobs before the row that is changed: the guard then sees the "
                    "row as it was, and a job may finish and change within one statement; make it an AFTER trigger"
                )


# ------------------------------------------------------------------------------------------------------------ tokens


def _highest_token(connection: Connection, jobs: Table, leases: Table) -> int:
    """Return the highest token that a lease or a running job is known by."""
    in_leases = f"SELECT max(token) FROM {qualified_name(connection, leases)}"  # noqa: S608 - quoted
    in_jobs = f"SELECT max(lease) FROM {qualified_name(connection, jobs)} WHERE status IN ('queued', 'running')"  # noqa: S608
    found = [connection.execute(text(statement)).scalar() for statement in (in_leases, in_jobs)]
    return max(token or 0 for token in found)


def _named(connection: Connection, table: Table) -> dict[str, str]:
    return {"name": qualified_name(connection, table)}


def _last_token(connection: Connection, leases: Table) -> int | None:
    """Return the last token that was given out; None where this role may not know."""
    if connection.dialect.name == "postgresql":
        last: int | None = connection.execute(_SEQUENCE, _named(connection, leases)).scalar()
        return last
    quote, schema = connection.dialect.identifier_preparer.quote, schema_of(connection, leases)
    prefix = f"{quote(schema)}." if schema else ""
    if not connection.exec_driver_sql(f"SELECT 1 FROM {prefix}sqlite_master WHERE name = 'sqlite_sequence'").scalar():  # noqa: S608
        return None
    seq = connection.exec_driver_sql(f"SELECT seq FROM {prefix}sqlite_sequence WHERE name = ?", (leases.name,)).scalar()  # noqa: S608
    return int(seq or 0)
