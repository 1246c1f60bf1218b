"""What happened to every row: triggers of the test's own write down each INSERT, UPDATE and DELETE, in the same transaction.

The number of an event grows along the life of one job, for whoever writes a row holds its lock until the end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine

_POSTGRES = (
    (
        "CREATE TABLE chaos_audit (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tx text NOT NULL, what text NOT NULL, "
        "op text NOT NULL, old json, new json)"
    ),
    """\
CREATE FUNCTION chaos_audit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO chaos_audit (tx, what, op, old, new) VALUES (pg_current_xact_id()::text, TG_TABLE_NAME, TG_OP,
    CASE WHEN TG_OP <> 'INSERT' THEN row_to_json(OLD) END, CASE WHEN TG_OP <> 'DELETE' THEN row_to_json(NEW) END);
  RETURN NULL;
END $$""",
    (
        "CREATE TRIGGER chaos_audit AFTER INSERT OR UPDATE OR DELETE ON ml_jobs "
        "FOR EACH ROW EXECUTE FUNCTION chaos_audit()"
    ),
    "CREATE TRIGGER chaos_audit AFTER INSERT OR DELETE ON ml_job_leases FOR EACH ROW EXECUTE FUNCTION chaos_audit()",
)
_JOB = (
    "id",
    "status",
    "attempts",
    "progress",
    "started_at",
    "finished_at",
    "error_message",
    "metrics_json",
    "retry_of",
    "lease",
)
_LEASE = ("token", "worker", "target_lock")


def _sqlite() -> list[str]:
    statements = [
        (
            "CREATE TABLE chaos_audit (n INTEGER PRIMARY KEY AUTOINCREMENT, tx text, what text NOT NULL, op text NOT NULL, "
            "old text, new text)"
        )
    ]
    for table, columns, verbs in (
        ("ml_jobs", _JOB, ("INSERT", "UPDATE", "DELETE")),
        ("ml_job_leases", _LEASE, ("INSERT", "DELETE")),
    ):
        for verb in verbs:
            row = {
                side: "json_object(" + ", ".join(f"'{name}', {side}.{name}" for name in columns) + ")"
                for side in ("OLD", "NEW")
            }
            old = "NULL" if verb == "INSERT" else row["OLD"]
            new = "NULL" if verb == "DELETE" else row["NEW"]
            statements.append(
                f"CREATE TRIGGER chaos_{table}_{verb} AFTER {verb} ON {table} BEGIN "
                f"INSERT INTO chaos_audit (what, op, old, new) VALUES ('{table}', '{verb}', {old}, {new}); END"
            )
    return statements


@dataclass(frozen=True)
class Event:
    """One row that was written.

    Attributes:
        n: Its number.
        tx: The transaction; None on SQLite, where transactions do not mix.
        what: The table.
        op: ``INSERT``, ``UPDATE`` or ``DELETE``.
        old: The row before.
        new: The row after.
    """

    n: int
    tx: str | None
    what: str
    op: str
    old: dict[str, Any] | None
    new: dict[str, Any] | None

    @property
    def job(self) -> str:
        """The id of the job that it is about, as hex; of a lease, which is of several jobs, nothing."""
        row = self.new or self.old or {}
        return str(row["id"]).replace("-", "") if self.what == "ml_jobs" else ""

    @property
    def claimed(self) -> int | None:
        """The token under which a claim has just started the job; None where this is no claim."""
        before, after = ((row or {}).get("lease") for row in (self.old, self.new))
        return None if self.what != "ml_jobs" or after == before else after


def install(engine: Engine) -> None:
    """Begin to write down."""
    with engine.begin() as connection:
        for statement in _POSTGRES if engine.dialect.name == "postgresql" else _sqlite():
            connection.exec_driver_sql(statement)


def read(engine: Engine) -> list[Event]:
    """Return everything, in order."""
    cast = "::text" if engine.dialect.name == "postgresql" else ""
    with engine.connect() as connection:
        rows = connection.exec_driver_sql(
            f"SELECT n, tx, what, op, old{cast}, new{cast} FROM chaos_audit ORDER BY n"
        ).all()
    return [Event(*row[:4], *(None if side is None else json.loads(side) for side in row[4:])) for row in rows]
