"""The record, its leases and its workers, with the guard, the view and what else stands beside them.

Frozen SQL: a migration says what was true when it was written, so it imports nothing of mljobs. A test holds the result
against what the models build today.

PostgreSQL refuses to change the type of a column that a view reads, and on SQLite a table that a view reads cannot be
renamed into place: a later revision that does either drops the view first and makes it again at its end.

Revision ID: 0001_ml_jobs
Revises:
Create Date: 2026-11-24
"""

from __future__ import annotations

from alembic import op

revision = "0001_ml_jobs"
down_revision = None
branch_labels = ("mljobs",)
depends_on = None

_POSTGRESQL = (
    """\
CREATE TABLE ml_jobs (
  id UUID NOT NULL,
  kind VARCHAR(32) NOT NULL,
  target_name TEXT NOT NULL,
  status VARCHAR(16) NOT NULL,
  progress SMALLINT NOT NULL,
  created_at TIMESTAMP(3) WITH TIME ZONE NOT NULL,
  started_at TIMESTAMP(3) WITH TIME ZONE,
  finished_at TIMESTAMP(3) WITH TIME ZONE,
  error_message TEXT,
  spec_json JSON NOT NULL,
  metrics_json JSON,
  attempts SMALLINT DEFAULT 0 NOT NULL,
  priority SMALLINT DEFAULT 0 NOT NULL,
  run_after TIMESTAMP(3) WITH TIME ZONE,
  exclusive BOOLEAN DEFAULT false NOT NULL,
  retry_of UUID,
  worker TEXT,
  lease BIGINT,
  PRIMARY KEY (id),
  CONSTRAINT ck_ml_jobs_kind CHECK (kind IN ('train', 'backfill', 'feature_refresh', 'drift_compute')),
  CONSTRAINT ck_ml_jobs_status CHECK (status IN ('queued', 'running', 'completed', 'failed', 'cancelled')),
  CONSTRAINT ck_ml_jobs_progress CHECK (progress BETWEEN 0 AND 100),
  CONSTRAINT ck_ml_jobs_lease CHECK (lease IS NULL OR status = 'running')
)""",
    """\
CREATE INDEX ix_ml_jobs_active ON ml_jobs (status, target_name text_pattern_ops, kind) \
WHERE status IN ('queued', 'running')""",
    "CREATE INDEX ix_ml_jobs_created ON ml_jobs (created_at, id)",
    """\
CREATE INDEX ix_ml_jobs_failed ON ml_jobs (status, created_at, id, kind) \
WHERE status = 'failed' OR status = 'cancelled'""",
    """\
CREATE INDEX ix_ml_jobs_failed_target ON ml_jobs (status, target_name text_pattern_ops, created_at, id, kind) \
WHERE status = 'failed' OR status = 'cancelled'""",
    "CREATE INDEX ix_ml_jobs_finished ON ml_jobs (finished_at, id) WHERE finished_at IS NOT NULL",
    """\
CREATE INDEX ix_ml_jobs_finished_kind ON ml_jobs (kind, created_at, id) \
WHERE status IN ('completed', 'failed', 'cancelled')""",
    "CREATE INDEX ix_ml_jobs_kind ON ml_jobs (kind, priority DESC, created_at, id) WHERE status = 'queued'",
    "CREATE INDEX ix_ml_jobs_lease ON ml_jobs (lease) WHERE lease IS NOT NULL",
    "CREATE INDEX ix_ml_jobs_queue ON ml_jobs (priority DESC, created_at, id) WHERE status = 'queued'",
    "CREATE INDEX ix_ml_jobs_retries ON ml_jobs (retry_of) WHERE retry_of IS NOT NULL",
    "CREATE INDEX ix_ml_jobs_target ON ml_jobs (target_name text_pattern_ops, created_at, id, kind)",
    """\
CREATE UNIQUE INDEX uq_ml_jobs_exclusive ON ml_jobs (target_name, exclusive) WHERE "exclusive" AND status = 'running'""",
    """\
CREATE OR REPLACE FUNCTION ml_jobs_guard() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET row_security = off SET standard_conforming_strings = on AS $mljobs$
DECLARE
  finished boolean;
BEGIN
  IF TG_OP = 'TRUNCATE' THEN
    IF current_setting('transaction_isolation') IN ('read committed', 'read uncommitted') THEN
      EXECUTE 'SELECT EXISTS (SELECT 1 FROM ' || quote_ident(TG_TABLE_SCHEMA) || '.' || quote_ident(TG_TABLE_NAME)
        || ' WHERE status IN (''completed'', ''failed'', ''cancelled''))' INTO finished;
    ELSE -- the snapshot may be older than what stands in the table
      finished := pg_relation_size(TG_RELID) > 0;
    END IF;
    IF finished THEN
      RAISE EXCEPTION 'mljobs: record is in a terminal state' USING
        ERRCODE = '23000', CONSTRAINT = 'mljobs_terminal_state', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
        DETAIL = 'action=truncate',
        HINT = 'TRUNCATE would remove finished records. A test drops the table or rolls back; old records go by prune.';
    END IF;
    RETURN NULL;
  ELSIF TG_NARGS = 1 AND TG_ARGV[0] = 'range' THEN
    RAISE EXCEPTION 'mljobs: times lie in the years 1970 to 9999, and attempts are not negative' USING
      ERRCODE = '23514', CONSTRAINT = 'mljobs_out_of_range', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
      DETAIL = 'id=' || NEW.id;
  ELSIF TG_NARGS = 1 THEN -- the backslash itself may be escaped, and surrogates stand in pairs
    IF regexp_replace(
        replace(CASE TG_ARGV[0] WHEN 'spec_json' THEN NEW.spec_json ELSE NEW.metrics_json END::text, '\\\\', ' '),
        '\\\\u[dD][89abAB]..\\\\u[dD][c-fC-F]..', ' ', 'g') ~ '\\\\u(0000|[dD][89a-fA-F])' THEN
      RAISE EXCEPTION USING MESSAGE = 'mljobs: ' || TG_ARGV[0]
        || ' holds U+0000 or a lone surrogate, beside which PostgreSQL cannot read any key',
        ERRCODE = '23514', CONSTRAINT = 'mljobs_unreadable_json', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
        COLUMN = TG_ARGV[0], DETAIL = 'id=' || NEW.id;
    END IF;
    RETURN NULL;
  ELSIF OLD.status IN ('completed', 'failed', 'cancelled') THEN
    IF TG_WHEN = 'AFTER' AND ROW(OLD.id, OLD.kind, OLD.target_name, OLD.status, OLD.progress, OLD.created_at, OLD.started_at, OLD.finished_at, OLD.attempts, OLD.priority, OLD.run_after, OLD.exclusive, OLD.retry_of, OLD.worker, OLD.lease, OLD.error_message, OLD.spec_json, OLD.metrics_json)::record *= ROW(NEW.id, NEW.kind, NEW.target_name, NEW.status, NEW.progress, NEW.created_at, NEW.started_at, NEW.finished_at, NEW.attempts, NEW.priority, NEW.run_after, NEW.exclusive, NEW.retry_of, NEW.worker, NEW.lease, NEW.error_message, NEW.spec_json, NEW.metrics_json)::record THEN
      RETURN NULL;
    END IF;
    RAISE EXCEPTION 'mljobs: record is in a terminal state' USING
      ERRCODE = '23000', CONSTRAINT = 'mljobs_terminal_state', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
      DETAIL = 'id=' || OLD.id || ' status=' || OLD.status,
      HINT = 'A finished job never changes. Submit a new one with retry_of set to this id.';
  ELSIF OLD.status = 'queued' AND NEW.status IN ('completed') THEN
    RAISE EXCEPTION 'mljobs: this state may not follow the present one' USING
      ERRCODE = '23000', CONSTRAINT = 'mljobs_illegal_transition', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
      DETAIL = 'id=' || OLD.id || ' status=' || OLD.status || ' wanted=' || NEW.status;
  ELSIF TG_OP = 'DELETE' THEN
    RETURN OLD;
  END IF;
  RETURN NEW;
END
$mljobs$""",
    """\
CREATE TRIGGER ml_jobs_guard_update BEFORE UPDATE OF id, kind, target_name, status, progress, created_at, started_at, finished_at, error_message, spec_json, metrics_json, attempts, priority, run_after, exclusive, retry_of, worker, lease ON ml_jobs FOR EACH ROW
WHEN (OLD.status OPERATOR(pg_catalog.~<=~) 'failed')
EXECUTE FUNCTION ml_jobs_guard()""",
    """\
CREATE TRIGGER ml_jobs_guard_after AFTER UPDATE ON ml_jobs FOR EACH ROW
WHEN ((OLD.status OPERATOR(pg_catalog.||) NEW.status) OPERATOR(pg_catalog.~<=~) 'queuedcompleted')
EXECUTE FUNCTION ml_jobs_guard()""",
    """\
CREATE TRIGGER ml_jobs_guard_delete BEFORE DELETE ON ml_jobs FOR EACH ROW
WHEN (OLD.status OPERATOR(pg_catalog.~<=~) 'failed'
  AND coalesce(pg_catalog.current_setting('mljobs.retention', true), '') OPERATOR(pg_catalog.<>) 'on')
EXECUTE FUNCTION ml_jobs_guard()""",
    """\
CREATE TRIGGER ml_jobs_guard_truncate BEFORE TRUNCATE ON ml_jobs FOR EACH STATEMENT
EXECUTE FUNCTION ml_jobs_guard()""",
    """\
CREATE TRIGGER ml_jobs_guard_range AFTER INSERT OR UPDATE OF created_at, started_at, finished_at, run_after, attempts ON ml_jobs FOR EACH ROW
WHEN (least(NEW.created_at, NEW.started_at, NEW.finished_at, NEW.run_after) OPERATOR(pg_catalog.<) '1970-01-01 UTC'
  OR greatest(NEW.created_at, NEW.started_at, NEW.finished_at, NEW.run_after) OPERATOR(pg_catalog.>=) '10000-01-01 UTC' OR NEW.attempts OPERATOR(pg_catalog.<) 0)
EXECUTE FUNCTION ml_jobs_guard('range')""",
    """\
CREATE TRIGGER ml_jobs_guard_spec_json AFTER INSERT OR UPDATE OF spec_json ON ml_jobs FOR EACH ROW
WHEN (pg_catalog.strpos(NEW.spec_json::pg_catalog.text, '\\u') OPERATOR(pg_catalog.>) 0)
EXECUTE FUNCTION ml_jobs_guard('spec_json')""",
    """\
CREATE TRIGGER ml_jobs_guard_metrics_json AFTER INSERT OR UPDATE OF metrics_json ON ml_jobs FOR EACH ROW
WHEN (pg_catalog.strpos(NEW.metrics_json::pg_catalog.text, '\\u') OPERATOR(pg_catalog.>) 0)
EXECUTE FUNCTION ml_jobs_guard('metrics_json')""",
    """\
CREATE OR REPLACE FUNCTION ml_jobs_wake() RETURNS trigger LANGUAGE plpgsql AS $mljobs$
DECLARE
  sleepers pg_catalog.int4 := CASE WHEN TG_OP OPERATOR(pg_catalog.=) 'INSERT' THEN 1835821683 ELSE 1835821684 END;
  of_table pg_catalog.int4 := (TG_RELID::pg_catalog.int8 OPERATOR(pg_catalog.&) 2147483647)::pg_catalog.int4;
BEGIN
  IF pg_catalog.pg_try_advisory_lock(sleepers, of_table) THEN
    PERFORM pg_catalog.pg_advisory_unlock(sleepers, of_table);
  ELSIF coalesce(pg_catalog.current_setting('mljobs.notify', true), '') OPERATOR(pg_catalog.<>) 'off' THEN
    PERFORM pg_catalog.pg_notify(
      'mljobs', pg_catalog.concat(pg_catalog.lower(TG_OP), ' ', TG_TABLE_SCHEMA, '.', TG_TABLE_NAME));
  END IF;
  RETURN NULL;
END
$mljobs$""",
    """\
CREATE TRIGGER ml_jobs_wake_insert AFTER INSERT ON ml_jobs FOR EACH STATEMENT
EXECUTE FUNCTION ml_jobs_wake()""",
    """\
CREATE TRIGGER ml_jobs_wake_update AFTER UPDATE OF status ON ml_jobs FOR EACH STATEMENT
EXECUTE FUNCTION ml_jobs_wake()""",
    "CREATE STATISTICS ml_jobs_kind_status (mcv) ON kind, status FROM ml_jobs",
    """\
CREATE TABLE ml_job_leases (
  token BIGINT GENERATED ALWAYS AS IDENTITY,
  worker TEXT NOT NULL,
  acquired_at TIMESTAMP(3) WITH TIME ZONE NOT NULL,
  expires_at TIMESTAMP(3) WITH TIME ZONE NOT NULL,
  target_lock TEXT,
  PRIMARY KEY (token),
  CONSTRAINT ck_mljobs_years CHECK (acquired_at >= '1970-01-01 UTC' AND acquired_at < '10000-01-01 UTC' AND expires_at >= '1970-01-01 UTC' AND expires_at < '10000-01-01 UTC')
)""",
    "CREATE UNIQUE INDEX uq_ml_job_leases_target ON ml_job_leases (target_lock) WHERE target_lock IS NOT NULL",
    """\
CREATE TABLE ml_job_workers (
  name TEXT NOT NULL,
  host TEXT NOT NULL,
  pid BIGINT NOT NULL,
  kinds TEXT NOT NULL,
  concurrency BIGINT NOT NULL,
  version TEXT NOT NULL,
  state TEXT NOT NULL,
  started_at TIMESTAMP(3) WITH TIME ZONE NOT NULL,
  last_seen_at TIMESTAMP(3) WITH TIME ZONE NOT NULL,
  PRIMARY KEY (name),
  CONSTRAINT ck_mljobs_years CHECK (started_at >= '1970-01-01 UTC' AND started_at < '10000-01-01 UTC' AND last_seen_at >= '1970-01-01 UTC' AND last_seen_at < '10000-01-01 UTC')
)""",
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
  j.worker, l.ends_at AS lease_ends_at,
  j.status = 'running' AND coalesce(l.ends_at < statement_timestamp(), false) AS stuck,
  CASE
    WHEN j.status = 'running' AND j.lease IS NULL THEN 'started by hand, no lease'
    WHEN j.status = 'running' AND l.ends_at IS NULL THEN 'its lease was deleted'
    WHEN j.status = 'running' AND l.ends_at < statement_timestamp() THEN 'its worker is silent'
    WHEN j.status IN ('completed', 'failed', 'cancelled') AND l.ends_at IS NOT NULL THEN 'its worker has not stopped yet'
    WHEN j.status = 'queued' AND j.run_after > statement_timestamp() THEN 'not before run_after'
    WHEN j.status = 'queued' AND j.exclusive
      AND (EXISTS (SELECT 1 FROM ml_job_leases h WHERE h.target_lock = j.target_name)
      OR EXISTS (SELECT 1 FROM ml_jobs r WHERE r.target_name = j.target_name AND r."exclusive"
        AND r.status = 'running')) THEN 'its target is taken'
    WHEN j.status = 'queued' AND NOT EXISTS (SELECT 1 FROM ml_job_workers w
      WHERE w.state = 'running' AND w.last_seen_at >= statement_timestamp() - interval '60 seconds') THEN 'no worker is running'
    WHEN j.status = 'queued' AND NOT EXISTS (SELECT 1 FROM ml_job_workers w
      WHERE w.state = 'running' AND w.last_seen_at >= statement_timestamp() - interval '60 seconds' AND strpos(w.kinds, to_json(j.kind::text)::text) > 0) THEN 'no worker handles this kind'
  END AS note,
  j.attempts, j.priority, j.created_at, j.started_at, j.finished_at, j.run_after,
  CASE WHEN j.finished_at >= j.started_at
    THEN (extract(epoch FROM j.finished_at - j.started_at) * 1000)::bigint END AS duration_ms,
  j.retry_of,
  left(split_part(j.error_message, chr(10), 1), 200) AS error
FROM ml_jobs j CROSS JOIN LATERAL (SELECT CASE
    WHEN j.status = 'running' THEN (SELECT r.expires_at FROM ml_job_leases r WHERE r.token = j.lease)
    WHEN j.status = 'cancelled' AND j.started_at >= (SELECT min(acquired_at) FROM ml_job_leases) THEN (
      SELECT max(c.expires_at) FROM ml_job_leases c
      WHERE c.acquired_at = j.started_at AND c.worker = j.worker
        AND c.target_lock IS NOT DISTINCT FROM CASE WHEN j."exclusive" THEN j.target_name END)
  END AS ends_at) l""",
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
CREATE TABLE ml_jobs (
  id CHAR(32) NOT NULL,
  kind VARCHAR(32) NOT NULL,
  target_name TEXT NOT NULL,
  status VARCHAR(16) NOT NULL,
  progress SMALLINT NOT NULL,
  created_at BIGINT NOT NULL,
  started_at BIGINT,
  finished_at BIGINT,
  error_message TEXT,
  spec_json TEXT NOT NULL,
  metrics_json TEXT,
  attempts SMALLINT DEFAULT 0 NOT NULL,
  priority SMALLINT DEFAULT 0 NOT NULL,
  run_after BIGINT,
  "exclusive" BOOLEAN DEFAULT false NOT NULL,
  retry_of CHAR(32),
  worker TEXT,
  lease BIGINT,
  PRIMARY KEY (id),
  CONSTRAINT ck_ml_jobs_kind CHECK (kind IN ('train', 'backfill', 'feature_refresh', 'drift_compute')),
  CONSTRAINT ck_ml_jobs_status CHECK (status IN ('queued', 'running', 'completed', 'failed', 'cancelled')),
  CONSTRAINT ck_ml_jobs_progress CHECK (progress BETWEEN 0 AND 100),
  CONSTRAINT ck_ml_jobs_lease CHECK (lease IS NULL OR status = 'running'),
  CONSTRAINT ck_ml_jobs_times CHECK ((created_at IS NULL OR typeof(created_at) = 'integer' AND created_at BETWEEN 0 AND 253402300799999) AND (started_at IS NULL OR typeof(started_at) = 'integer' AND started_at BETWEEN 0 AND 253402300799999) AND (finished_at IS NULL OR typeof(finished_at) = 'integer' AND finished_at BETWEEN 0 AND 253402300799999) AND (run_after IS NULL OR typeof(run_after) = 'integer' AND run_after BETWEEN 0 AND 253402300799999)),
  CONSTRAINT ck_ml_jobs_id CHECK (typeof(id) = 'text' AND length(id) = 32 AND id NOT GLOB '*[^0-9a-f]*'),
  CONSTRAINT ck_ml_jobs_retry_of CHECK (retry_of IS NULL OR typeof(retry_of) = 'text' AND length(retry_of) = 32 AND retry_of NOT GLOB '*[^0-9a-f]*'),
  CONSTRAINT ck_ml_jobs_texts CHECK ((target_name IS NULL OR typeof(target_name) = 'text') AND (error_message IS NULL OR typeof(error_message) = 'text') AND (worker IS NULL OR typeof(worker) = 'text')),
  CONSTRAINT ck_ml_jobs_numbers CHECK (typeof(progress) = 'integer' AND progress BETWEEN 0 AND 100 AND typeof(attempts) = 'integer' AND attempts BETWEEN 0 AND 32767 AND typeof(priority) = 'integer' AND priority BETWEEN -32768 AND 32767 AND typeof("exclusive") = 'integer' AND "exclusive" BETWEEN 0 AND 1 AND (lease IS NULL OR typeof(lease) = 'integer')),
  CONSTRAINT ck_ml_jobs_spec_json CHECK (typeof(spec_json) = 'text' AND json_valid(spec_json) AND instr(spec_json, char(0)) = 0 AND (instr(spec_json, '\\u') = 0 OR instr(lower(replace(spec_json, '\\\\', ' ')), '\\u0000') = 0 AND replace(replace(replace(replace(replace(replace(replace(replace(lower(replace(spec_json, '\\\\', ' ')), '\\ud8', char(1)), '\\ud9', char(1)), '\\uda', char(1)), '\\udb', char(1)), '\\udc', char(2)), '\\udd', char(2)), '\\ude', char(2)), '\\udf', char(2)) NOT GLOB '*' || char(1) || '[0-9a-f][0-9a-f][^' || char(2) || ']*' AND '   ' || replace(replace(replace(replace(replace(replace(replace(replace(lower(replace(spec_json, '\\\\', ' ')), '\\ud8', char(1)), '\\ud9', char(1)), '\\uda', char(1)), '\\udb', char(1)), '\\udc', char(2)), '\\udd', char(2)), '\\ude', char(2)), '\\udf', char(2)) NOT GLOB '*[^' || char(1) || ']??' || char(2) || '*')),
  CONSTRAINT ck_ml_jobs_metrics_json CHECK (metrics_json IS NULL OR typeof(metrics_json) = 'text' AND json_valid(metrics_json) AND instr(metrics_json, char(0)) = 0 AND (instr(metrics_json, '\\u') = 0 OR instr(lower(replace(metrics_json, '\\\\', ' ')), '\\u0000') = 0 AND replace(replace(replace(replace(replace(replace(replace(replace(lower(replace(metrics_json, '\\\\', ' ')), '\\ud8', char(1)), '\\ud9', char(1)), '\\uda', char(1)), '\\udb', char(1)), '\\udc', char(2)), '\\udd', char(2)), '\\ude', char(2)), '\\udf', char(2)) NOT GLOB '*' || char(1) || '[0-9a-f][0-9a-f][^' || char(2) || ']*' AND '   ' || replace(replace(replace(replace(replace(replace(replace(replace(lower(replace(metrics_json, '\\\\', ' ')), '\\ud8', char(1)), '\\ud9', char(1)), '\\uda', char(1)), '\\udb', char(1)), '\\udc', char(2)), '\\udd', char(2)), '\\ude', char(2)), '\\udf', char(2)) NOT GLOB '*[^' || char(1) || ']??' || char(2) || '*'))
)""",
    "CREATE INDEX ix_ml_jobs_active ON ml_jobs (status, target_name, kind) WHERE status IN ('queued', 'running')",
    "CREATE INDEX ix_ml_jobs_created ON ml_jobs (created_at, id)",
    """\
CREATE INDEX ix_ml_jobs_failed ON ml_jobs (status, created_at, id, kind) \
WHERE status = 'failed' OR status = 'cancelled'""",
    """\
CREATE INDEX ix_ml_jobs_failed_target ON ml_jobs (status, target_name, created_at, id, kind) \
WHERE status = 'failed' OR status = 'cancelled'""",
    "CREATE INDEX ix_ml_jobs_finished ON ml_jobs (finished_at, id) WHERE finished_at IS NOT NULL",
    """\
CREATE INDEX ix_ml_jobs_finished_kind ON ml_jobs (kind, created_at, id) \
WHERE status IN ('completed', 'failed', 'cancelled')""",
    "CREATE INDEX ix_ml_jobs_kind ON ml_jobs (kind, priority DESC, created_at, id) WHERE status = 'queued'",
    "CREATE INDEX ix_ml_jobs_lease ON ml_jobs (lease) WHERE lease IS NOT NULL",
    "CREATE INDEX ix_ml_jobs_queue ON ml_jobs (priority DESC, created_at, id) WHERE status = 'queued'",
    "CREATE INDEX ix_ml_jobs_retries ON ml_jobs (retry_of) WHERE retry_of IS NOT NULL",
    "CREATE INDEX ix_ml_jobs_target ON ml_jobs (target_name, created_at, id, kind)",
    """\
CREATE UNIQUE INDEX uq_ml_jobs_exclusive ON ml_jobs (target_name, "exclusive") WHERE "exclusive" AND status = 'running'""",
    "CREATE TABLE IF NOT EXISTS ml_jobs_guard (name TEXT NOT NULL PRIMARY KEY, open INTEGER NOT NULL)",
    "INSERT OR IGNORE INTO ml_jobs_guard (name, open) VALUES ('replace', 0), ('retention', 0)",
    """\
CREATE TRIGGER ml_jobs_guard_update BEFORE UPDATE OF id, kind, target_name, status, progress, created_at, started_at, finished_at, error_message, spec_json, metrics_json, attempts, priority, run_after, "exclusive", retry_of, worker, lease ON ml_jobs
WHEN (OLD.status = 'completed' OR OLD.status = 'failed' OR OLD.status = 'cancelled') OR (OLD.status = 'queued' AND NEW.status IN ('completed'))
BEGIN
  SELECT RAISE(ABORT, 'mljobs: record is in a terminal state') WHERE OLD.status IN ('completed', 'failed', 'cancelled');
  SELECT RAISE(ABORT, 'mljobs: this state may not follow the present one');
END""",
    """\
CREATE TRIGGER ml_jobs_guard_delete BEFORE DELETE ON ml_jobs
WHEN (OLD.status = 'completed' OR OLD.status = 'failed' OR OLD.status = 'cancelled') AND NOT EXISTS (SELECT 1 FROM ml_jobs_guard WHERE name = 'retention' AND open = 1)
BEGIN
  SELECT RAISE(ABORT, 'mljobs: record is in a terminal state');
END""",
    """\
CREATE TRIGGER ml_jobs_guard_insert BEFORE INSERT ON ml_jobs
WHEN EXISTS (SELECT 1 FROM ml_jobs WHERE (id = NEW.id OR rowid = NEW.rowid) AND status IN ('completed', 'failed', 'cancelled'))
BEGIN
  INSERT OR IGNORE INTO ml_jobs_guard (name, open) VALUES ('replace', 1);
  SELECT RAISE(ABORT, 'mljobs: record is in a terminal state') WHERE EXISTS (SELECT 1 FROM ml_jobs_guard WHERE name = 'replace' AND open = 1);
END""",
    """\
CREATE TRIGGER ml_jobs_guard_key BEFORE UPDATE ON ml_jobs
WHEN (NEW.id <> OLD.id OR NEW.rowid <> OLD.rowid) AND EXISTS (SELECT 1 FROM ml_jobs WHERE (id = NEW.id OR rowid = NEW.rowid) AND id <> OLD.id AND status IN ('completed', 'failed', 'cancelled'))
BEGIN
  SELECT RAISE(ABORT, 'mljobs: record is in a terminal state');
END""",
    """\
CREATE INDEX IF NOT EXISTS ml_jobs_guard_blobs ON ml_jobs (id, kind, target_name, status, progress, created_at, started_at, finished_at, error_message, spec_json, metrics_json, attempts, priority, run_after, "exclusive", retry_of, worker, lease) WHERE 0""",
    """\
CREATE TABLE IF NOT EXISTS ml_jobs_counts (
  kind TEXT NOT NULL, status TEXT NOT NULL, jobs INTEGER NOT NULL, PRIMARY KEY (kind, status)
)""",
    """\
INSERT OR REPLACE INTO ml_jobs_counts (kind, status, jobs)
SELECT pair.column1, pair.column2,
  (SELECT count(*) FROM ml_jobs WHERE kind = pair.column1 AND status = pair.column2) FROM (VALUES ('train', 'completed'), ('train', 'failed'), ('train', 'cancelled'), ('backfill', 'completed'), ('backfill', 'failed'), ('backfill', 'cancelled'), ('feature_refresh', 'completed'), ('feature_refresh', 'failed'), ('feature_refresh', 'cancelled'), ('drift_compute', 'completed'), ('drift_compute', 'failed'), ('drift_compute', 'cancelled')) AS pair""",
    """\
CREATE TRIGGER ml_jobs_count_insert AFTER INSERT ON ml_jobs WHEN (NEW.status = 'completed' OR NEW.status = 'failed' OR NEW.status = 'cancelled')
BEGIN
  UPDATE ml_jobs_counts SET jobs = jobs + 1 WHERE kind = NEW.kind AND status = NEW.status;
END""",
    """\
CREATE TRIGGER ml_jobs_count_update AFTER UPDATE OF status ON ml_jobs
WHEN (NEW.status = 'completed' OR NEW.status = 'failed' OR NEW.status = 'cancelled') AND NOT (OLD.status = 'completed' OR OLD.status = 'failed' OR OLD.status = 'cancelled')
BEGIN
  UPDATE ml_jobs_counts SET jobs = jobs + 1 WHERE kind = NEW.kind AND status = NEW.status;
END""",
    """\
CREATE TRIGGER ml_jobs_count_delete AFTER DELETE ON ml_jobs WHEN (OLD.status = 'completed' OR OLD.status = 'failed' OR OLD.status = 'cancelled')
BEGIN
  UPDATE ml_jobs_counts SET jobs = jobs - 1 WHERE kind = OLD.kind AND status = OLD.status;
END""",
    """\
CREATE TABLE ml_job_leases (
  token INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
  worker TEXT NOT NULL,
  acquired_at BIGINT NOT NULL,
  expires_at BIGINT NOT NULL,
  target_lock TEXT,
  CONSTRAINT ck_mljobs_times CHECK ((acquired_at IS NULL OR typeof(acquired_at) = 'integer' AND acquired_at BETWEEN 0 AND 253402300799999) AND (expires_at IS NULL OR typeof(expires_at) = 'integer' AND expires_at BETWEEN 0 AND 253402300799999)),
  CONSTRAINT ck_mljobs_types CHECK (typeof(worker) = 'text' AND (target_lock IS NULL OR typeof(target_lock) = 'text'))
)""",
    "CREATE UNIQUE INDEX uq_ml_job_leases_target ON ml_job_leases (target_lock) WHERE target_lock IS NOT NULL",
    """\
CREATE TABLE ml_job_workers (
  name TEXT NOT NULL,
  host TEXT NOT NULL,
  pid BIGINT NOT NULL,
  kinds TEXT NOT NULL,
  concurrency BIGINT NOT NULL,
  version TEXT NOT NULL,
  state TEXT NOT NULL,
  started_at BIGINT NOT NULL,
  last_seen_at BIGINT NOT NULL,
  PRIMARY KEY (name),
  CONSTRAINT ck_mljobs_times CHECK ((started_at IS NULL OR typeof(started_at) = 'integer' AND started_at BETWEEN 0 AND 253402300799999) AND (last_seen_at IS NULL OR typeof(last_seen_at) = 'integer' AND last_seen_at BETWEEN 0 AND 253402300799999)),
  CONSTRAINT ck_mljobs_types CHECK (typeof(name) = 'text' AND typeof(host) = 'text' AND typeof(pid) = 'integer' AND typeof(kinds) = 'text' AND typeof(concurrency) = 'integer' AND typeof(version) = 'text' AND typeof(state) = 'text')
)""",
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
    WHEN v.status = 'running' AND v.lease IS NULL THEN 'started by hand, no lease'
    WHEN v.status = 'running' AND expires_at IS NULL THEN 'its lease was deleted'
    WHEN v.status = 'running' AND expires_at < now THEN 'its worker is silent'
    WHEN v.status IN ('completed', 'failed', 'cancelled') AND expires_at IS NOT NULL THEN 'its worker has not stopped yet'
    WHEN v.status = 'queued' AND v.run_after > now THEN 'not before run_after'
    WHEN v.status = 'queued' AND v."exclusive"
      AND (EXISTS (SELECT 1 FROM ml_job_leases h WHERE h.target_lock = v.target_name)
      OR EXISTS (SELECT 1 FROM ml_jobs r WHERE r.target_name = v.target_name AND r."exclusive"
        AND r.status = 'running')) THEN 'its target is taken'
    WHEN v.status = 'queued' AND NOT EXISTS (SELECT 1 FROM ml_job_workers w
      WHERE w.state = 'running' AND w.last_seen_at >= now - 60000) THEN 'no worker is running'
    WHEN v.status = 'queued' AND NOT EXISTS (SELECT 1 FROM ml_job_workers w
      WHERE w.state = 'running' AND w.last_seen_at >= now - 60000 AND instr(w.kinds, json_quote(v.kind)) > 0) THEN 'no worker handles this kind'
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
      j.created_at, j.started_at, j.finished_at, j.run_after, j.retry_of, j.error_message, j.worker, j.lease,
      CASE
    WHEN j.status = 'running' THEN (SELECT r.expires_at FROM ml_job_leases r WHERE r.token = j.lease)
    WHEN j.status = 'cancelled' AND j.started_at >= (SELECT min(acquired_at) FROM ml_job_leases) THEN (
      SELECT max(c.expires_at) FROM ml_job_leases c
      WHERE c.acquired_at = j.started_at AND c.worker = j.worker
        AND c.target_lock IS CASE WHEN j."exclusive" THEN j.target_name END)
  END AS expires_at,
      CAST(strftime('%s', 'now') AS INTEGER) * 1000 + CAST(substr(strftime('%f', 'now'), 4) AS INTEGER) AS now
    FROM ml_jobs j
  )
) AS v""",
)

_DROP_POSTGRESQL = (
    "DROP VIEW ml_jobs_overview",
    "DROP TABLE ml_job_workers",
    "DROP TABLE ml_job_leases",
    "DROP TABLE ml_jobs",
    "DROP FUNCTION ml_jobs_wake()",
    "DROP FUNCTION ml_jobs_guard()",
)

_DROP_SQLITE = (
    "DROP VIEW ml_jobs_overview",
    "DROP TABLE ml_job_workers",
    "DROP TABLE ml_job_leases",
    "DROP TABLE ml_jobs",
    "DROP TABLE ml_jobs_guard",
    "DROP TABLE ml_jobs_counts",
)


def _run(postgresql: tuple[str, ...], sqlite: tuple[str, ...]) -> None:
    name = op.get_context().dialect.name
    for statement in {"postgresql": postgresql, "sqlite": sqlite}[name]:
        op.execute(statement)


def upgrade() -> None:
    """Create the tables and all that stands beside them."""
    _run(_POSTGRESQL, _SQLITE)


def downgrade() -> None:
    """Drop everything, finished records too."""
    _run(_DROP_POSTGRESQL, _DROP_SQLITE)
