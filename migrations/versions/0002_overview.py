"""The view ml_jobs_overview, for people who only have a SQL shell.

PostgreSQL refuses to change the type of a column that a view reads, and on SQLite a table that a view reads cannot be
renamed into place: a later revision that does either drops the view first and makes it again at its end.

Revision ID: 0002_overview
Revises: 0001_ml_jobs
Create Date: 2026-11-25
"""

from __future__ import annotations

from alembic import op

revision = "0002_overview"
down_revision = "0001_ml_jobs"
branch_labels = None
depends_on = None

_POSTGRESQL = (
    """\
CREATE VIEW ml_jobs_overview AS
SELECT j.id, j.kind, j.target_name, j.status, j.progress,
  date_trunc('second', greatest(statement_timestamp() - j.created_at, interval '0')) AS age,
  date_trunc('second', greatest(
    coalesce(j.started_at, j.finished_at, statement_timestamp()) - greatest(j.created_at, j.run_after), interval '0'
  )) AS queue_wait,
  date_trunc('second', CASE
    WHEN j.finished_at >= j.started_at THEN j.finished_at - j.started_at
    WHEN j.status = 'running' AND j.started_at <= statement_timestamp() THEN statement_timestamp() - j.started_at
  END) AS duration,
  l.worker, l.expires_at AS lease_ends_at,
  j.status = 'running' AND coalesce(l.expires_at < statement_timestamp(), false) AS stuck,
  CASE
    WHEN j.status = 'running' AND l.token IS NULL THEN 'started by hand, no lease'
    WHEN j.status = 'running' AND l.expires_at < statement_timestamp() THEN 'its worker is silent'
    WHEN j.status IN ('completed', 'failed', 'cancelled') AND l.token IS NOT NULL THEN 'its worker has not stopped yet'
    WHEN j.status = 'queued' AND j.run_after > statement_timestamp() THEN 'not before run_after'
    WHEN j.status = 'queued' AND j.exclusive
      AND EXISTS (SELECT 1 FROM ml_job_leases h WHERE h.target_lock = j.target_name) THEN 'its target is taken'
  END AS note,
  j.attempts, j.priority, j.created_at, j.started_at, j.finished_at, j.run_after,
  CASE WHEN j.finished_at >= j.started_at
    THEN (extract(epoch FROM j.finished_at - j.started_at) * 1000)::bigint END AS duration_ms,
  j.retry_of,
  left(split_part(j.error_message, chr(10), 1), 200) AS error
FROM ml_jobs j LEFT JOIN ml_job_leases l ON l.job_id = j.id""",
    """\
DO $mljobs$
BEGIN
  IF current_setting('server_version_num')::integer >= 150000 THEN
    ALTER VIEW ml_jobs_overview SET (security_invoker = true);
  END IF;
END
$mljobs$""",
)

_SQLITE = (
    """\
CREATE VIEW ml_jobs_overview AS
SELECT id, kind, target_name, status, progress,
  CASE WHEN age >= 172800 THEN (age / 86400) || ' days ' WHEN age >= 86400 THEN '1 day ' ELSE '' END
    || time(age, 'unixepoch') AS age,
  CASE WHEN queue_wait >= 172800 THEN (queue_wait / 86400) || ' days ' WHEN queue_wait >= 86400 THEN '1 day ' ELSE '' END
    || time(queue_wait, 'unixepoch') AS queue_wait,
  CASE WHEN duration >= 172800 THEN (duration / 86400) || ' days ' WHEN duration >= 86400 THEN '1 day ' ELSE '' END
    || time(duration, 'unixepoch') AS duration,
  worker, strftime('%Y-%m-%d %H:%M:%S', expires_at / 1000, 'unixepoch') || printf('.%03d', expires_at % 1000) AS lease_ends_at,
  status = 'running' AND coalesce(expires_at < now, 0) AS stuck,
  CASE
    WHEN status = 'running' AND token IS NULL THEN 'started by hand, no lease'
    WHEN status = 'running' AND expires_at < now THEN 'its worker is silent'
    WHEN status IN ('completed', 'failed', 'cancelled') AND token IS NOT NULL THEN 'its worker has not stopped yet'
    WHEN status = 'queued' AND run_after > now THEN 'not before run_after'
    WHEN status = 'queued' AND "exclusive"
      AND EXISTS (SELECT 1 FROM ml_job_leases h WHERE h.target_lock = target_name) THEN 'its target is taken'
  END AS note,
  attempts, priority,
  strftime('%Y-%m-%d %H:%M:%S', created_at / 1000, 'unixepoch') || printf('.%03d', created_at % 1000) AS created_at,
  strftime('%Y-%m-%d %H:%M:%S', started_at / 1000, 'unixepoch') || printf('.%03d', started_at % 1000) AS started_at,
  strftime('%Y-%m-%d %H:%M:%S', finished_at / 1000, 'unixepoch') || printf('.%03d', finished_at % 1000) AS finished_at,
  strftime('%Y-%m-%d %H:%M:%S', run_after / 1000, 'unixepoch') || printf('.%03d', run_after % 1000) AS run_after,
  duration_ms, retry_of,
  substr(error_message, 1,
    min(coalesce(nullif(instr(error_message, char(10)), 0) - 1, 200), 200)) AS error
FROM (
  SELECT *,
    max(now - created_at, 0) / 1000 AS age,
    max(coalesce(started_at, finished_at, now) - max(created_at, coalesce(run_after, 0)), 0) / 1000 AS queue_wait,
    CASE WHEN finished_at >= started_at THEN finished_at - started_at
      WHEN status = 'running' AND started_at <= now THEN now - started_at END / 1000 AS duration,
    CASE WHEN finished_at >= started_at THEN finished_at - started_at END AS duration_ms
  FROM (
    SELECT j.id, j.kind, j.target_name, j.status, j.progress, j.attempts, j.priority, j."exclusive",
      j.created_at, j.started_at, j.finished_at, j.run_after, j.retry_of, j.error_message,
      l.token, l.worker, l.expires_at,
      CAST(strftime('%s', 'now') AS INTEGER) * 1000 + CAST(substr(strftime('%f', 'now'), 4) AS INTEGER) AS now
    FROM ml_jobs j LEFT JOIN ml_job_leases l ON l.job_id = j.id
  )
)""",
)


def upgrade() -> None:
    """Create the view."""
    name = op.get_context().dialect.name
    for statement in {"postgresql": _POSTGRESQL, "sqlite": _SQLITE}[name]:
        op.execute(statement)


def downgrade() -> None:
    """Drop the view; the tables stay as they are."""
    op.execute("DROP VIEW ml_jobs_overview")
