"""What comes with a job table: its checks, its indexes, the tables of its leases and of its workers."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.elements import conv

from mljobs._fields import FIELDS, NAMES, Field
from mljobs._values import MAX_MS, MAX_PROGRESS
from mljobs.guards._companions import listed, short_name, without_parameters
from mljobs.guards._errors import exclusive_index
from mljobs.guards._hooks import install_triggers
from mljobs.states import ACTIVE, TERMINAL, MlJobStatus
from mljobs.types import PostgresCheck, SqliteCheck, UtcMillis


def add_checks_and_indexes(table: sa.Table, kinds: type[StrEnum]) -> None:
    """Add to a job table what its columns alone do not say."""
    for constraint in _checks(table, kinds):
        table.append_constraint(constraint)
    _add_indexes(table)


def record_table(table: sa.Table) -> sa.Table:
    """Return what the mixin alone makes of a mapped job table: none of the host's columns, keys, checks and indexes."""
    # In the host's order, which PostgreSQL's statistics keep.
    names = [column.name for column in table.c if column.name in NAMES]
    columns = [sa.Column(name, table.c[name].type, primary_key=name == "id") for name in names]
    with_rowid = table.dialect_options["sqlite"]["with_rowid"]
    bare = sa.Table(table.name, sa.MetaData(), *columns, schema=table.schema, sqlite_with_rowid=with_rowid)
    kind_type: Any = table.c.kind.type
    add_checks_and_indexes(bare, kind_type.enum)
    install_triggers(bare)
    return bare


def _name(prefix: str, table: sa.Table, suffix: str) -> conv:
    """Return a name that no naming convention of the host's changes, and that PostgreSQL can hold."""
    return conv(short_name(f"{prefix}_{table.name}_{suffix}"))


def _checks(table: sa.Table, kinds: type[StrEnum]) -> list[sa.CheckConstraint]:
    def check(suffix: str, condition: str, kind: type[sa.CheckConstraint] = sa.CheckConstraint) -> sa.CheckConstraint:
        return kind(sa.text(without_parameters(condition)), name=_name("ck", table, suffix))

    return [
        check("kind", f"kind IN ({listed(kinds)})"),
        check("status", f"status IN ({listed(MlJobStatus)})"),
        check("progress", f"progress BETWEEN 0 AND {MAX_PROGRESS}"),
        check("lease", f"lease IS NULL OR status = '{MlJobStatus.RUNNING}'"),
        # PostgreSQL's types check these themselves, and the guard what they do not: there a CHECK is read and evaluated at
        # each UPDATE, whatever it sets.
        check("times", " AND ".join(_time_in_range(name) for name in _TIMES), SqliteCheck),
        check("id", _hex_digits("id"), SqliteCheck),
        check("retry_of", f"retry_of IS NULL OR {_hex_digits('retry_of')}", SqliteCheck),
        check("texts", " AND ".join(f"({name} IS NULL OR typeof({name}) = 'text')" for name in _TEXTS), SqliteCheck),
        check("numbers", " AND ".join(map(_number_in_range, _NUMBERS)), SqliteCheck),
        check("spec_json", _readable_json("spec_json"), SqliteCheck),
        check("metrics_json", f"metrics_json IS NULL OR {_readable_json('metrics_json')}", SqliteCheck),
    ]


_TIMES = [field.name for field in FIELDS if field.form == "time"]
_TEXTS = [field.name for field in FIELDS if field.form == "text"]
_NUMBERS = [field for field in FIELDS if field.form in ("small", "big", "flag")]


def _time_in_range(name: str) -> str:
    return f"({name} IS NULL OR typeof({name}) = 'integer' AND {name} BETWEEN 0 AND {MAX_MS})"


def _number_in_range(field: Field) -> str:
    name = f'"{field.name}"' if field.form == "flag" else field.name
    limits = (0, 1) if field.form == "flag" else field.limits
    known = f"typeof({name}) = 'integer'" + (f" AND {name} BETWEEN {limits[0]} AND {limits[1]}" if limits else "")
    return f"({name} IS NULL OR {known})" if field.nullable else known


def _hex_digits(name: str) -> str:
    return f"typeof({name}) = 'text' AND length({name}) = 32 AND {name} NOT GLOB '*[^0-9a-f]*'"


def _readable_json(name: str) -> str:
    """Return SQLite's condition that a text is JSON, without U+0000, escaped or not, and without a lone surrogate.

    Looked at where there is any escape. A space takes the place of an escaped backslash, char(1) that of a high surrogate's
    first digits, char(2) that of a low one's: JSON cannot hold them. Two digits on, the other must follow, or have come.
    """
    escapes = f"lower(replace({name}, '\\\\', ' '))"
    marked = escapes
    for digit in "89abcdef":
        marked = f"replace({marked}, '\\ud{digit}', char({1 if digit in '89ab' else 2}))"
    parts = (
        f"instr({escapes}, '\\u0000') = 0",
        f"{marked} NOT GLOB '*' || char(1) || '[0-9a-f][0-9a-f][^' || char(2) || ']*'",
        f"'   ' || {marked} NOT GLOB '*[^' || char(1) || ']??' || char(2) || '*'",
    )
    readable = f"instr({name}, '\\u') = 0 OR {' AND '.join(parts)}"
    return f"typeof({name}) = 'text' AND json_valid({name}) AND instr({name}, char(0)) = 0 AND ({readable})"


def _add_indexes(table: sa.Table) -> None:
    """Add the indexes; docs/benchmarks.md says which question each serves and what it costs a write."""
    columns = table.c

    def index(suffix: str, keys: str, where: str | None = None, *, by_bytes: bool = False) -> None:
        options: dict[str, Any] = {}
        if where is not None:
            options |= {"postgresql_where": sa.text(where), "sqlite_where": sa.text(where)}
        if by_bytes:  # whatever the collation of the database: so it serves the beginning of a name as well as `=`
            options["postgresql_ops"] = {"target_name": "text_pattern_ops"}
        named = (columns[key].desc() if key == "priority" else columns[key] for key in keys.split())
        sa.Index(_name("ix", table, suffix), *named, **options)

    queued = f"status = '{MlJobStatus.QUEUED}'"
    index("queue", "priority created_at id", queued)
    index("kind", "kind priority created_at id", queued)
    # The state comes first: so what runs is found at once behind a million that wait, and a claim adds to a page of its own.
    index("active", "status target_name kind", f"status IN ({listed(ACTIVE)})", by_bytes=True)
    index("created", "created_at id")
    # Of the finished ones only, so that a job is written into it once; those at work are few.
    index("finished_kind", "kind created_at id", f"status IN ({listed(TERMINAL)})")
    index("finished", "finished_at id", "finished_at IS NOT NULL")
    # The kind comes last in what others lead to: a job of another kind is not looked up in the table.
    index("target", "target_name created_at id kind", by_bytes=True)
    # With OR, from which SQLite infers that a plain comparison with one of the two is served.
    ended = f"status = '{MlJobStatus.FAILED}' OR status = '{MlJobStatus.CANCELLED}'"
    index("failed", "status created_at id kind", ended)
    index("failed_target", "status target_name created_at id kind", ended, by_bytes=True)
    index("retries", "retry_of", "retry_of IS NOT NULL")
    index("lease", "lease", "lease IS NOT NULL")
    # The second column is always true here: it tells SQLite's message from that of a host's own index on the target.
    running = sa.text(f"\"exclusive\" AND status = '{MlJobStatus.RUNNING}'")
    sa.Index(
        conv(exclusive_index(table.name)),
        columns.target_name,
        columns.exclusive,
        unique=True,
        postgresql_where=running,
        sqlite_where=running,
    )


def lease_table(jobs: sa.Table, name: str) -> sa.Table:
    """Return the table of present leases on ``jobs``. The record is history, the lease is the present.

    A lease belongs to a claim, and the records of its jobs name it. An exclusive job has one of its own, with the lock of
    its target.
    """
    token = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # only INTEGER PRIMARY KEY counts up by itself there
    leases = sa.Table(
        name,
        jobs.metadata,
        sa.Column("token", token, sa.Identity(always=True), primary_key=True),
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("acquired_at", UtcMillis("acquired_at"), nullable=False),
        sa.Column("expires_at", UtcMillis("expires_at"), nullable=False),
        sa.Column("target_lock", sa.Text),
        schema=jobs.schema,
        # A token is never used again: without AUTOINCREMENT SQLite would hand out the highest one twice.
        sqlite_autoincrement=True,
    )
    # Partial, for most leases lock no target. And none by expires_at: the table is as small as the work in hand, and a
    # heartbeat that changes no index is a HOT update.
    held = sa.text("target_lock IS NOT NULL")
    sa.Index(_name("uq", leases, "target"), leases.c.target_lock, unique=True, postgresql_where=held, sqlite_where=held)
    _add_value_checks(leases, "acquired_at", "expires_at")
    leases.add_is_dependent_on(jobs)  # no foreign key says so, but a view that comes with the leases reads both
    return leases


def worker_table(jobs: sa.Table, name: str) -> sa.Table:
    """Return the table of the workers that run ``jobs``: one row for each name, small, and of no worth without them."""
    workers = sa.Table(
        name,
        jobs.metadata,
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.BigInteger, nullable=False),
        sa.Column("kinds", sa.Text, nullable=False),  # a JSON list
        sa.Column("concurrency", sa.BigInteger, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("started_at", UtcMillis("started_at"), nullable=False),
        sa.Column("last_seen_at", UtcMillis("last_seen_at"), nullable=False),
        schema=jobs.schema,
    )
    _add_value_checks(workers, "started_at", "last_seen_at")
    return workers


def _add_value_checks(table: sa.Table, *times: str) -> None:
    """Refuse values that Python cannot read: one such row would stop the reading of all others.

    The names are of no table, so that they stay right when a host renames it.
    """
    in_years = " AND ".join(f"{name} >= '1970-01-01 UTC' AND {name} < '10000-01-01 UTC'" for name in times)
    in_range = " AND ".join(_time_in_range(name) for name in times)
    others = [column for column in table.c if column.name not in times and not column.identity]
    types = " AND ".join(_of_its_type(column) for column in others)
    table.append_constraint(PostgresCheck(sa.text(in_years), name=conv("ck_mljobs_years")))
    table.append_constraint(SqliteCheck(sa.text(in_range), name=conv("ck_mljobs_times")))
    table.append_constraint(SqliteCheck(sa.text(types), name=conv("ck_mljobs_types")))


def _of_its_type(column: sa.Column[Any]) -> str:
    known = f"typeof({column.name}) = '{'text' if isinstance(column.type, sa.Text) else 'integer'}'"
    return f"({column.name} IS NULL OR {known})" if column.nullable else known
