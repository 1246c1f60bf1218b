"""What comes with a job table: its checks, its indexes, the table of its leases."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.elements import conv

from mljobs._fields import NAMES
from mljobs._values import MAX_PROGRESS
from mljobs.guards._companions import listed, short_name, without_parameters
from mljobs.guards._hooks import install_triggers
from mljobs.states import ACTIVE, MlJobStatus
from mljobs.types import JobId, SqliteCheck, UtcMillis


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

    hex_digits = "length(id) = 32 AND id NOT GLOB '*[^0-9a-f]*'"
    return [
        check("kind", f"kind IN ({listed(kinds)})"),
        check("status", f"status IN ({listed(MlJobStatus)})"),
        check("progress", f"progress BETWEEN 0 AND {MAX_PROGRESS}"),
        check("lease", f"lease IS NULL OR status = '{MlJobStatus.RUNNING}'"),
        # PostgreSQL's uuid and json types check these themselves.
        check("id", hex_digits, SqliteCheck),
        check("spec_json", "json_valid(spec_json)", SqliteCheck),
        check("metrics_json", "metrics_json IS NULL OR json_valid(metrics_json)", SqliteCheck),
    ]


def _add_indexes(table: sa.Table) -> None:
    columns = table.c

    def index(suffix: str, *keys: Any, where: str | None = None) -> None:
        condition: dict[str, Any] = (
            {} if where is None else {"postgresql_where": sa.text(where), "sqlite_where": sa.text(where)}
        )
        sa.Index(_name("ix", table, suffix), *keys, **condition)

    index(
        "queue",
        columns.priority.desc(),
        columns.created_at,
        columns.id,
        where=f"status = '{MlJobStatus.QUEUED}'",
    )
    index(
        "kind",
        columns.kind,
        columns.priority.desc(),
        columns.created_at,
        columns.id,
        where=f"status = '{MlJobStatus.QUEUED}'",
    )
    index("active", columns.target_name, columns.kind, where=f"status IN ({listed(ACTIVE)})")
    index("created", columns.created_at, columns.id)
    index("finished", columns.finished_at, columns.id, where="finished_at IS NOT NULL")
    index("target", columns.target_name, columns.created_at, columns.id)
    index("failed", columns.created_at, columns.id, where=f"status = '{MlJobStatus.FAILED}'")
    index("retries", columns.retry_of, where="retry_of IS NOT NULL")


def lease_table(jobs: sa.Table, name: str) -> sa.Table:
    """Return the table of present leases on ``jobs``. The record is history, the lease is the present."""
    token = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # only INTEGER PRIMARY KEY counts up by itself there
    leases = sa.Table(
        name,
        jobs.metadata,
        sa.Column("token", token, sa.Identity(always=True), primary_key=True),
        sa.Column("job_id", JobId(), sa.ForeignKey(jobs.c.id, ondelete="CASCADE"), nullable=False),
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("acquired_at", UtcMillis("acquired_at"), nullable=False),
        sa.Column("expires_at", UtcMillis("expires_at"), nullable=False),
        sa.Column("target_lock", sa.Text),
        schema=jobs.schema,
        # A token is never used again: without AUTOINCREMENT SQLite would hand out the highest one twice.
        sqlite_autoincrement=True,
    )
    sa.Index(_name("uq", leases, "job"), leases.c.job_id, unique=True)
    # Partial, for most leases lock no target. And none by expires_at: the table is as small as the work in hand, and a
    # heartbeat that changes no index is a HOT update.
    held = sa.text("target_lock IS NOT NULL")
    sa.Index(_name("uq", leases, "target"), leases.c.target_lock, unique=True, postgresql_where=held, sqlite_where=held)
    return leases
