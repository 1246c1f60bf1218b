"""The companions of a job table: first of all the guard's triggers, which hold against every client.

The text derives from ``states.TRANSITIONS`` and ``_fields.FIELDS``. ``companion_ddl`` builds it for any table, so a host's
own table name, schema and ``schema_translate_map`` work. Migrations hold a frozen copy of the text, never a call to this
module.

PostgreSQL: one function and seven triggers. BEFORE UPDATE OF our columns, BEFORE DELETE and BEFORE TRUNCATE refuse
early. AFTER UPDATE looks a second time: a host's own BEFORE trigger may have rewritten columns that are in no SET
list. The function compares the columns only where the record had finished. Three AFTER triggers refuse what
no client could read: times out of range, and U+0000 or a lone surrogate in JSON. A CHECK would be read and evaluated
at each UPDATE, whatever it sets. The function names nothing through the caller's ``search_path`` and obeys no row policy;
conditions and the wake function name their operators. Retention: :mod:`mljobs.guards._retention`.

SQLite: four triggers, an index and a small table, ``<table>_guard``, with two rows. ``retention`` lets deletes through.
``replace`` answers a question that SQLite's triggers cannot ask: whether the statement that fired them says OR REPLACE,
which deletes the old row without any delete trigger. The conflict policy of the outer statement applies to statements inside
the trigger, so an insert that always collides there changes its row only under OR REPLACE. So no row with the same id can
replace a finished one, even without ``PRAGMA recursive_triggers``. The index stores nothing (``WHERE 0``): incremental blob
I/O fires no trigger, but cannot write to a column that any index names.

Two more companions serve the operations:

- wake (PostgreSQL): a statement trigger notifies the channel ``mljobs`` of inserts and of status changes, but only while
  somebody listens. A listener holds a shared advisory lock; the trigger tries to take the same lock exclusively, and
  notifies if it cannot. If it can, it releases the lock at once. NOTIFY takes a global lock until its transaction has
  committed, so a busy system must not send any. A transaction with ``mljobs.notify = 'off'`` sends none: PostgreSQL
  prepares no transaction that has.
- counts: finished records are only added, or deleted by retention, so on SQLite triggers keep exact counters of them.
  On PostgreSQL one counter row would serialise all workers, so there are multivariate statistics instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Table
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql.compiler import DDLCompiler

from mljobs._fields import FIELDS, NAMES
from mljobs.states import TERMINAL, TRANSITIONS

GUARD_VERSION = 1
"""The version of the text below, which migrations of hosts name. A change of the text raises it and keeps the old text."""

TERMINAL_MESSAGE = "mljobs: record is in a terminal state"
TRANSITION_MESSAGE = "mljobs: this state may not follow the present one"
TERMINAL_CONSTRAINT = "mljobs_terminal_state"
TRANSITION_CONSTRAINT = "mljobs_illegal_transition"
UNREADABLE_CONSTRAINT = "mljobs_unreadable_json"
RANGE_CONSTRAINT = "mljobs_out_of_range"


def listed(tokens: Iterable[str]) -> str:
    """Return the tokens as SQL literals with commas between."""
    return ", ".join("'" + token.replace("'", "''") + "'" for token in tokens)


def without_parameters(condition: str) -> str:
    """Return a condition as SQLAlchemy's ``text()`` takes it, which reads ``':fit'`` as a parameter otherwise."""
    return condition.replace(":", r"\:")


_FINISHED = listed(TERMINAL)
_FINISHED_IN_STRING = _FINISHED.replace("'", "''")
# The illegal transitions, for these are fewer than the legal ones. A CHECK refuses states that do not exist.
_ILLEGAL_EDGES = [
    (old, illegal)
    for old, news in TRANSITIONS.items()
    if news and (illegal := [new for new in TRANSITIONS if new is not old and new not in news])
]
_ILLEGAL_EDGE = " OR ".join(f"OLD.status = '{old}' AND NEW.status IN ({listed(new)})" for old, new in _ILLEGAL_EDGES)


# PostgreSQL parses and plans a trigger's condition anew for each statement. For a statement that writes one row, that costs
# more than the rest of the guard. So each condition is one comparison of texts by bytes: true for every text up to the
# last one that is refused, and for some legal ones. The function then decides.
_WAS_FINISHED = f"OLD.status OPERATOR(pg_catalog.~<=~) '{max(TERMINAL)}'"
_LAST_REFUSED = max(
    f"{old}{new}"
    for old, news in TRANSITIONS.items()
    for new in TRANSITIONS
    if old in TERMINAL or (old is not new and new not in news)
)
_MAY_BE_REFUSED = f"(OLD.status OPERATOR(pg_catalog.||) NEW.status) OPERATOR(pg_catalog.~<=~) '{_LAST_REFUSED}'"
# ``*=`` compares bytes, for ``json`` has no ``=``. Long texts come last: a difference in the others is found before.
_RECORD = sorted(NAMES, key=lambda name: name in ("error_message", "spec_json", "metrics_json"))
_SAME_RECORD = "ROW({})::record *= ROW({})::record".format(
    *(", ".join(f"{row}.{name}" for name in _RECORD) for row in ("OLD", "NEW"))
)
_ESCAPE = r"\u"
_PAIR = r"\\u[dD][89abAB]..\\u[dD][c-fC-F].."  # a pair of surrogates; JSON allows only hex digits where the dots are
_TIMES = [field.name for field in FIELDS if field.form == "time"]
_NEW_TIMES = ", ".join(f"NEW.{name}" for name in _TIMES)

_POSTGRES_FUNCTION = f"""\
CREATE OR REPLACE FUNCTION {{function}}() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET row_security = off SET standard_conforming_strings = on AS $mljobs$
DECLARE
  finished boolean;
BEGIN
  IF TG_OP = 'TRUNCATE' THEN
    IF current_setting('transaction_isolation') IN ('read committed', 'read uncommitted') THEN
      EXECUTE 'SELECT EXISTS (SELECT 1 FROM ' || quote_ident(TG_TABLE_SCHEMA) || '.' || quote_ident(TG_TABLE_NAME)
        || ' WHERE status IN ({_FINISHED_IN_STRING}))' INTO finished;
    ELSE -- the snapshot may be older than what stands in the table
      finished := pg_relation_size(TG_RELID) > 0;
    END IF;
    IF finished THEN
      RAISE EXCEPTION '{TERMINAL_MESSAGE}' USING
        ERRCODE = '23000', CONSTRAINT = '{TERMINAL_CONSTRAINT}', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
        DETAIL = 'action=truncate',
        HINT = 'TRUNCATE would remove finished records. A test drops the table or rolls back; old records go by prune.';
    END IF;
    RETURN NULL;
  ELSIF TG_NARGS = 1 AND TG_ARGV[0] = 'range' THEN
    RAISE EXCEPTION 'mljobs: times lie in the years 1970 to 9999, and attempts are not negative' USING
      ERRCODE = '23514', CONSTRAINT = '{RANGE_CONSTRAINT}', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
      DETAIL = 'id=' || NEW.id;
  ELSIF TG_NARGS = 1 THEN -- the backslash itself may be escaped, and surrogates stand in pairs
    IF regexp_replace(
        replace(CASE TG_ARGV[0] WHEN 'spec_json' THEN NEW.spec_json ELSE NEW.metrics_json END::text, '\\\\', ' '),
        '{_PAIR}', ' ', 'g') ~ '\\\\u(0000|[dD][89a-fA-F])' THEN
      RAISE EXCEPTION USING MESSAGE = 'mljobs: ' || TG_ARGV[0]
        || ' holds U+0000 or a lone surrogate, beside which PostgreSQL cannot read any key',
        ERRCODE = '23514', CONSTRAINT = '{UNREADABLE_CONSTRAINT}', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
        COLUMN = TG_ARGV[0], DETAIL = 'id=' || NEW.id;
    END IF;
    RETURN NULL;
  ELSIF OLD.status IN ({_FINISHED}) THEN
    IF TG_WHEN = 'AFTER' AND {_SAME_RECORD} THEN
      RETURN NULL;
    END IF;
    RAISE EXCEPTION '{TERMINAL_MESSAGE}' USING
      ERRCODE = '23000', CONSTRAINT = '{TERMINAL_CONSTRAINT}', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
      DETAIL = 'id=' || OLD.id || ' status=' || OLD.status,
      HINT = 'A finished job never changes. Submit a new one with retry_of set to this id.';
  ELSIF {_ILLEGAL_EDGE} THEN
    RAISE EXCEPTION '{TRANSITION_MESSAGE}' USING
      ERRCODE = '23000', CONSTRAINT = '{TRANSITION_CONSTRAINT}', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
      DETAIL = 'id=' || OLD.id || ' status=' || OLD.status || ' wanted=' || NEW.status;
  ELSIF TG_OP = 'DELETE' THEN
    RETURN OLD;
  END IF;
  RETURN NEW;
END
$mljobs$"""


def _readable(column: str) -> str:
    return f"""\
CREATE TRIGGER {{{{{column}}}}} AFTER INSERT OR UPDATE OF {column} ON {{{{table}}}} FOR EACH ROW
WHEN (pg_catalog.strpos(NEW.{column}::pg_catalog.text, '{_ESCAPE}') OPERATOR(pg_catalog.>) 0)
EXECUTE FUNCTION {{{{function}}}}('{column}')""".format()


# WHEN keeps the function call off the path of every legal write.
_POSTGRES_CREATE = (
    _POSTGRES_FUNCTION,
    f"""\
CREATE TRIGGER {{update}} BEFORE UPDATE OF {{columns}} ON {{table}} FOR EACH ROW
WHEN ({_WAS_FINISHED})
EXECUTE FUNCTION {{function}}()""",
    f"""\
CREATE TRIGGER {{after}} AFTER UPDATE ON {{table}} FOR EACH ROW
WHEN ({_MAY_BE_REFUSED})
EXECUTE FUNCTION {{function}}()""",
    f"""\
CREATE TRIGGER {{delete}} BEFORE DELETE ON {{table}} FOR EACH ROW
WHEN ({_WAS_FINISHED}
  AND coalesce(pg_catalog.current_setting('mljobs.retention', true), '') OPERATOR(pg_catalog.<>) 'on')
EXECUTE FUNCTION {{function}}()""",
    """\
CREATE TRIGGER {truncate} BEFORE TRUNCATE ON {table} FOR EACH STATEMENT
EXECUTE FUNCTION {function}()""",
    f"""\
CREATE TRIGGER {{range}} AFTER INSERT OR UPDATE OF {", ".join(_TIMES)}, attempts ON {{table}} FOR EACH ROW
WHEN (least({_NEW_TIMES}) OPERATOR(pg_catalog.<) '1970-01-01 UTC'
  OR greatest({_NEW_TIMES}) OPERATOR(pg_catalog.>=) '10000-01-01 UTC' OR NEW.attempts OPERATOR(pg_catalog.<) 0)
EXECUTE FUNCTION {{function}}('range')""",
    _readable("spec_json"),
    _readable("metrics_json"),
)
_POSTGRES_DROP = (
    *(
        f"DROP TRIGGER IF EXISTS {{{role}}} ON {{table}}"
        for role in ("metrics_json", "spec_json", "range", "truncate", "delete", "after", "update")
    ),
    "DROP FUNCTION IF EXISTS {function}()",
)


def _in_final_state(row: str) -> str:
    """Return the condition that a row has finished, for SQLite: for an IN it would fill a table in memory, for each row."""
    return "({})".format(" OR ".join(f"{row}.status = '{state}'" for state in TERMINAL))


_SQLITE_CREATE = (
    "CREATE TABLE IF NOT EXISTS {guard} (name TEXT NOT NULL PRIMARY KEY, open INTEGER NOT NULL)",
    "INSERT OR IGNORE INTO {guard} (name, open) VALUES ('replace', 0), ('retention', 0)",
    f"""\
CREATE TRIGGER {{update}} BEFORE UPDATE OF {{columns}} ON {{table}}
WHEN {_in_final_state("OLD")} OR ({_ILLEGAL_EDGE})
BEGIN
  SELECT RAISE(ABORT, '{TERMINAL_MESSAGE}') WHERE OLD.status IN ({_FINISHED});
  SELECT RAISE(ABORT, '{TRANSITION_MESSAGE}');
END""",
    f"""\
CREATE TRIGGER {{delete}} BEFORE DELETE ON {{table}}
WHEN {_in_final_state("OLD")} AND NOT EXISTS (SELECT 1 FROM {{guard_here}} WHERE name = 'retention' AND open = 1)
BEGIN
  SELECT RAISE(ABORT, '{TERMINAL_MESSAGE}');
END""",
    f"""\
CREATE TRIGGER {{insert}} BEFORE INSERT ON {{table}}
WHEN EXISTS (SELECT 1 FROM {{table_here}} WHERE ({{collides}}) AND status IN ({_FINISHED}))
BEGIN
  INSERT OR IGNORE INTO {{guard_here}} (name, open) VALUES ('replace', 1);
  SELECT RAISE(ABORT, '{TERMINAL_MESSAGE}') WHERE EXISTS (SELECT 1 FROM {{guard_here}} WHERE name = 'replace' AND open = 1);
END""",
    f"""\
CREATE TRIGGER {{key}} BEFORE UPDATE ON {{table}}
WHEN ({{moves}}) AND EXISTS (SELECT 1 FROM {{table_here}} WHERE ({{collides}}) AND id <> OLD.id AND status IN ({_FINISHED}))
BEGIN
  SELECT RAISE(ABORT, '{TERMINAL_MESSAGE}');
END""",
    "CREATE INDEX IF NOT EXISTS {blobs} ON {table_here} ({columns}) WHERE 0",
)
_SQLITE_DROP = (
    "DROP INDEX IF EXISTS {blobs}",
    "DROP TRIGGER IF EXISTS {key}",
    "DROP TRIGGER IF EXISTS {insert}",
    "DROP TRIGGER IF EXISTS {delete}",
    "DROP TRIGGER IF EXISTS {update}",
    "DROP TABLE IF EXISTS {guard}",
)

# ------------------------------------------------------------------------------------------------------ companions

WAKE_CHANNEL = "mljobs"
WORKER_LOCK = 1_835_821_683  # "mljs" in ASCII; the second key of each lock is the table's oid
WATCHER_LOCK = WORKER_LOCK + 1

_POSTGRES_CREATE_COMPANIONS = (
    f"""\
CREATE OR REPLACE FUNCTION {{wake}}() RETURNS trigger LANGUAGE plpgsql AS $mljobs$
DECLARE
  sleepers pg_catalog.int4 := CASE WHEN TG_OP OPERATOR(pg_catalog.=) 'INSERT' THEN {WORKER_LOCK} ELSE {WATCHER_LOCK} END;
  of_table pg_catalog.int4 := (TG_RELID::pg_catalog.int8 OPERATOR(pg_catalog.&) 2147483647)::pg_catalog.int4;
BEGIN
  IF pg_catalog.pg_try_advisory_lock(sleepers, of_table) THEN
    PERFORM pg_catalog.pg_advisory_unlock(sleepers, of_table);
  ELSIF coalesce(pg_catalog.current_setting('mljobs.notify', true), '') OPERATOR(pg_catalog.<>) 'off' THEN
    PERFORM pg_catalog.pg_notify(
      '{WAKE_CHANNEL}', pg_catalog.concat(pg_catalog.lower(TG_OP), ' ', TG_TABLE_SCHEMA, '.', TG_TABLE_NAME));
  END IF;
  RETURN NULL;
END
$mljobs$""",
    """\
CREATE TRIGGER {wake_insert} AFTER INSERT ON {table} FOR EACH STATEMENT
EXECUTE FUNCTION {wake}()""",
    """\
CREATE TRIGGER {wake_update} AFTER UPDATE OF status ON {table} FOR EACH STATEMENT
EXECUTE FUNCTION {wake}()""",
    "CREATE STATISTICS {statistics} (mcv) ON kind, status FROM {table}",
)
_POSTGRES_DROP_COMPANIONS = (
    "DROP STATISTICS IF EXISTS {statistics}",
    "DROP TRIGGER IF EXISTS {wake_update} ON {table}",
    "DROP TRIGGER IF EXISTS {wake_insert} ON {table}",
    "DROP FUNCTION IF EXISTS {wake}()",
)

# There is a row for every pair of kind and state from the start: an upsert in a trigger would obey an outer OR REPLACE and
# begin again at 1. Each begins with what the table holds: nothing, unless the table was rebuilt or had no guard before.
_SQLITE_CREATE_COMPANIONS = (
    """\
CREATE TABLE IF NOT EXISTS {counts} (
  kind TEXT NOT NULL, status TEXT NOT NULL, jobs INTEGER NOT NULL, PRIMARY KEY (kind, status)
)""",
    """\
INSERT OR REPLACE INTO {counts} (kind, status, jobs)
SELECT pair.column1, pair.column2,
  (SELECT count(*) FROM {counted} WHERE kind = pair.column1 AND status = pair.column2) FROM (VALUES {pairs}) AS pair""",
    f"""\
CREATE TRIGGER {{count_insert}} AFTER INSERT ON {{table}} WHEN {_in_final_state("NEW")}
BEGIN
  UPDATE {{counts_here}} SET jobs = jobs + 1 WHERE kind = NEW.kind AND status = NEW.status;
END""",
    f"""\
CREATE TRIGGER {{count_update}} AFTER UPDATE OF status ON {{table}}
WHEN {_in_final_state("NEW")} AND NOT {_in_final_state("OLD")}
BEGIN
  UPDATE {{counts_here}} SET jobs = jobs + 1 WHERE kind = NEW.kind AND status = NEW.status;
END""",
    f"""\
CREATE TRIGGER {{count_delete}} AFTER DELETE ON {{table}} WHEN {_in_final_state("OLD")}
BEGIN
  UPDATE {{counts_here}} SET jobs = jobs - 1 WHERE kind = OLD.kind AND status = OLD.status;
END""",
)
_SQLITE_DROP_COMPANIONS = (
    "DROP TRIGGER IF EXISTS {count_delete}",
    "DROP TRIGGER IF EXISTS {count_update}",
    "DROP TRIGGER IF EXISTS {count_insert}",
    "DROP TABLE IF EXISTS {counts}",
)

_TEXTS = {
    ("postgresql", True): _POSTGRES_CREATE + _POSTGRES_CREATE_COMPANIONS,
    ("postgresql", False): _POSTGRES_DROP_COMPANIONS + _POSTGRES_DROP,
    ("sqlite", True): _SQLITE_CREATE + _SQLITE_CREATE_COMPANIONS,
    ("sqlite", False): _SQLITE_DROP_COMPANIONS + _SQLITE_DROP,
}

GUARD_ROLES = ("update", "after", "delete", "truncate", "range", "spec_json", "metrics_json", "insert", "key")
"""The roles of the guard's triggers, of both databases."""
_OTHER_TRIGGERS = ("wake_insert", "wake_update", "count_insert", "count_update", "count_delete")

IDENTIFIER_MAX = 63
"""PostgreSQL's limit for a name, in bytes."""


def companion_names(table: str) -> dict[str, str]:
    """Return the names of the companions of a table, by their role."""
    ends = {role: f"guard_{role}" for role in (*GUARD_ROLES, "blobs")}
    ends |= {role: role for role in (*_OTHER_TRIGGERS, "guard", "wake", "counts")}
    ends |= {"function": "guard", "statistics": "kind_status"}
    return {role: short_name(f"{table}_{end}") for role, end in ends.items()}


def is_blob_index(name: str | None, table: str | None) -> bool:
    """Whether an index is the guard's own, which keeps SQLite's incremental blob I/O out; no model describes it."""
    return table is not None and name == companion_names(table)["blobs"]


def short_name(name: str) -> str:
    """Return a name that PostgreSQL can hold: one of more than 63 bytes is cut and ends with a digest of the whole.

    PostgreSQL would cut it without an error, and two triggers of one table could get the same name.
    """
    if len(name.encode()) <= IDENTIFIER_MAX:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[: IDENTIFIER_MAX - 9].decode(errors='ignore')}_{digest}"


class CompanionDDL(ExecutableDDLElement):
    """One statement that creates or drops a companion of a table."""

    inherit_cache = False

    def __init__(self, table: Table, text: str, kinds: Sequence[str] | None = None) -> None:
        self.table = table
        self.text = text
        self.kinds = kinds

    @property
    def drops_by_itself(self) -> bool:
        """Whether this object stays when the table is dropped."""
        return self.text.startswith(("DROP FUNCTION", "DROP TABLE"))


@compiles(CompanionDDL)
def _render(element: CompanionDDL, compiler: DDLCompiler, **_: object) -> str:
    preparer = compiler.preparer
    table = element.table
    schema = preparer.schema_for_object(table)
    prefix = f"{preparer.quote_schema(schema)}." if schema else ""
    names = {role: preparer.quote(name) for role, name in companion_names(table.name).items()}
    here = {f"{role}_here": names[role] for role in ("guard", "counts")} | {"table_here": preparer.quote(table.name)}
    # SQLite: the schema goes before a trigger's name and nowhere else. PostgreSQL: before everything but that name.
    sqlite = compiler.dialect.name == "sqlite"
    for role in (*GUARD_ROLES, *_OTHER_TRIGGERS, "blobs"):
        names[role] = f"{prefix if sqlite else ''}{names[role]}"
    for role in ("function", "guard", "wake", "counts", "statistics"):
        names[role] = f"{prefix}{names[role]}"
    rowid = not sqlite or table.dialect_options["sqlite"]["with_rowid"]
    kinds = kinds_of(table) if element.kinds is None else element.kinds
    return element.text.format(
        **names,
        **here,
        table=here["table_here"] if sqlite else f"{prefix}{here['table_here']}",
        counted=f"{prefix}{here['table_here']}",
        columns=", ".join(preparer.quote(name) for name in NAMES),
        collides="id = NEW.id OR rowid = NEW.rowid" if rowid else "id = NEW.id",
        moves="NEW.id <> OLD.id OR NEW.rowid <> OLD.rowid" if rowid else "NEW.id <> OLD.id",
        pairs=", ".join(f"({listed([kind])}, '{status}')" for kind in kinds for status in TERMINAL),
    )


def companion_ddl(
    table: Table, dialect_name: str, *, create: bool = True, kinds: Sequence[str] | None = None
) -> Sequence[CompanionDDL]:
    """Return the statements that create (or drop) the companions of ``table``, in order; none for an unknown dialect.

    Args:
        table: The job table. Its name, schema and SQLite options are used; its column ``kind`` where ``kinds`` is None.
        dialect_name: ``postgresql`` or ``sqlite``.
        create: False for the statements that drop.
        kinds: The tokens of the column ``kind``, for SQLite's counters.
    """
    return [CompanionDDL(table, text, kinds) for text in _TEXTS.get((dialect_name, create), ())]


def schema_of(connection: Connection, table: Table) -> str | None:
    """Return the schema that holds ``table`` for this connection: a tenant's, where its engine translates schemas."""
    schemas = connection.get_execution_options().get("schema_translate_map") or {}
    schema: str | None = schemas.get(table.schema, table.schema)
    return schema


def qualified_name(connection: Connection, table: Table) -> str:
    """Return the table's name, quoted and in the schema that this connection's translate map gives it."""
    schema = schema_of(connection, table)
    name = quoted(connection, table.name)
    return f"{quoted(connection, schema)}.{name}" if schema else name


def quoted(connection: Connection, name: str) -> str:
    """Return a name in quotes, where it needs them: for a value, or a statement that has no parameters."""
    text = connection.dialect.identifier_preparer.quote(name)
    # Where parameters are %s, SQLAlchemy doubles every percent sign, which only a statement with parameters undoes.
    return text.replace("%%", "%") if "%" in name and text.count("%") == 2 * name.count("%") else text


def kinds_of(table: Table) -> tuple[str, ...]:
    """Return the tokens that the column ``kind`` of a mapped job table may hold."""
    kind_type: Any = table.c.kind.type
    enum: type[StrEnum] = kind_type.enum
    return tuple(member.value for member in enum)
