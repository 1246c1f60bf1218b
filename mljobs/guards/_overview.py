"""The overview: a view beside a job table for people with a SQL shell, which says what runs, waits and is stuck.

One row for each job, with its lease: ages and durations ready to read, no JSON. It is made with the lease table, which it
reads, and dropped before it. Migrations hold a frozen copy of the text, never a call to this module.

A host's own table has no view unless its class sets ``__overview_name__``: on SQLite a view stands in the way of
``batch_alter_table``, which renames the table that the view reads, and a host that was not asked would find out in its next
migration. With one, a migration that changes a column of the record drops the view first and makes it again after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Table, event
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql.compiler import DDLCompiler

from mljobs.errors import InvalidValueError
from mljobs.states import TERMINAL, MlJobStatus

_FINISHED = ", ".join(f"'{status}'" for status in TERMINAL)
_QUEUED, _RUNNING = MlJobStatus.QUEUED, MlJobStatus.RUNNING
_ERROR_SHOWN = 200
SILENT_SECONDS = 60
"""A worker that was not seen for so long is gone. It says that it is there every five seconds, or oftener."""

_NOTE = f"""\
CASE
    WHEN {{j}}status = '{_RUNNING}' AND {{j}}lease IS NULL THEN 'started by hand, no lease'
    WHEN {{j}}status = '{_RUNNING}' AND {{ends}} IS NULL THEN 'its lease was deleted'
    WHEN {{j}}status = '{_RUNNING}' AND {{ends}} < {{now}} THEN 'its worker is silent'
    WHEN {{j}}status IN ({_FINISHED}) AND {{ends}} IS NOT NULL THEN 'its worker has not stopped yet'
    WHEN {{j}}status = '{_QUEUED}' AND {{j}}run_after > {{now}} THEN 'not before run_after'
    WHEN {{j}}status = '{_QUEUED}' AND {{j}}{{exclusive}}
      AND (EXISTS (SELECT 1 FROM {{{{leases}}}} h WHERE h.target_lock = {{j}}target_name)
      OR EXISTS (SELECT 1 FROM {{{{jobs}}}} r WHERE r.target_name = {{j}}target_name AND r."exclusive"
        AND r.status = '{_RUNNING}')) THEN 'its target is taken'{{{{no_worker}}}}
  END AS note"""

# A worker is there if it runs and was seen lately; one that lets its last jobs end claims no more. A kind stands in the JSON
# list of a worker's kinds as it is quoted: inside a longer token its quotes would be escaped.
_NO_WORKER = f"""
    WHEN {{job}}.status = '{_QUEUED}' AND NOT EXISTS (SELECT 1 FROM {{workers}} w
      WHERE w.state = 'running' AND w.last_seen_at >= {{since}}) THEN 'no worker is running'
    WHEN {{job}}.status = '{_QUEUED}' AND NOT EXISTS (SELECT 1 FROM {{workers}} w
      WHERE w.state = 'running' AND w.last_seen_at >= {{since}} AND {{handles}}) THEN 'no worker handles this kind'"""
_NO_WORKER_WORDS = {
    "postgresql": {
        "job": "j",
        "since": f"statement_timestamp() - interval '{SILENT_SECONDS} seconds'",
        "handles": "strpos(w.kinds, to_json(j.kind::text)::text) > 0",
    },
    "sqlite": {
        "job": "v",
        "since": f"now - {SILENT_SECONDS * 1000}",
        "handles": "instr(w.kinds, json_quote(v.kind)) > 0",
    },
}

# When the lease ends under which a record runs; or ran, if it was cancelled and its worker has not stopped: then the record
# names no lease any more, but still says when it was claimed, and by whom.
_ENDS = f"""\
CASE
    WHEN j.status = '{_RUNNING}' THEN (SELECT r.expires_at FROM {{{{leases}}}} r WHERE r.token = j.lease)
    WHEN j.status = '{MlJobStatus.CANCELLED}' AND j.started_at >= (SELECT min(acquired_at) FROM {{{{leases}}}}) THEN (
      SELECT max(c.expires_at) FROM {{{{leases}}}} c
      WHERE c.acquired_at = j.started_at AND c.worker = j.worker
        AND c.target_lock {{same}} CASE WHEN j."exclusive" THEN j.target_name END)
  END"""

# PostgreSQL: intervals, which sort and compare, and which psql shows as 1 day 02:03:04.
_POSTGRES_VIEW = f"""\
CREATE VIEW {{view}} AS
SELECT j.id, j.kind, j.target_name, j.status, j.progress,
  date_trunc('second', greatest(statement_timestamp() - j.created_at, interval '0')) AS age,
  date_trunc('second', greatest(
    coalesce(j.started_at, j.finished_at, statement_timestamp()) - greatest(j.created_at, j.run_after), interval '0'
  )) AS queue_wait,
  date_trunc('second', CASE
    WHEN j.finished_at >= j.started_at THEN j.finished_at - j.started_at
    WHEN j.status = '{_RUNNING}' AND j.started_at <= statement_timestamp() THEN statement_timestamp() - j.started_at
  END) AS duration,
  j.worker, l.ends_at AS lease_ends_at,
  j.status = '{_RUNNING}' AND coalesce(l.ends_at < statement_timestamp(), false) AS stuck,
  {_NOTE.format(j="j.", ends="l.ends_at", now="statement_timestamp()", exclusive="exclusive")},
  j.attempts, j.priority, j.created_at, j.started_at, j.finished_at, j.run_after,
  CASE WHEN j.finished_at >= j.started_at
    THEN (extract(epoch FROM j.finished_at - j.started_at) * 1000)::bigint END AS duration_ms,
  j.retry_of,
  left(split_part(j.error_message, chr(10), 1), {_ERROR_SHOWN}) AS error{{columns}}
FROM {{jobs}} j CROSS JOIN LATERAL (SELECT {_ENDS.format(same="IS NOT DISTINCT FROM")} AS ends_at) l"""

# Since PostgreSQL 15 a view may read with the rights of whoever asks; otherwise it would pass row security by.
_POSTGRES_INVOKER = """\
DO $mljobs$
BEGIN
  IF current_setting('server_version_num')::integer >= 150000 THEN
    ALTER VIEW {view} SET (security_invoker = true);
  END IF;
END
$mljobs$"""


def _span(seconds: str) -> str:
    return f"""\
CASE WHEN {seconds} >= 172800 THEN ({seconds} / 86400) || ' days ' WHEN {seconds} >= 86400 THEN '1 day ' ELSE '' END
    || time({seconds}, 'unixepoch') AS {seconds}"""


def _moment(millis: str, name: str = "") -> str:
    seconds = f"strftime('%Y-%m-%d %H:%M:%S', {millis} / 1000, 'unixepoch')"
    return f"{seconds} || printf('.%03d', {millis} % 1000) AS {name or millis}"


# SQLite: the same as text, times in UTC. Now is put together of whole numbers, for julianday() is a float.
_SQLITE_VIEW = f"""\
CREATE VIEW {{view}} AS
SELECT id, kind, target_name, status, progress,
  {_span("age")},
  {_span("queue_wait")},
  {_span("duration")},
  worker, {_moment("expires_at", "lease_ends_at")},
  status = '{_RUNNING}' AND coalesce(expires_at < now, 0) AS stuck,
  {_NOTE.format(j="v.", ends="expires_at", now="now", exclusive='"exclusive"')},
  attempts, priority,
  {_moment("created_at")},
  {_moment("started_at")},
  {_moment("finished_at")},
  {_moment("run_after")},
  duration_ms, retry_of,
  substr(error_message, 1,
    min(coalesce(nullif(instr(error_message, char(10)), 0) - 1, {_ERROR_SHOWN}), {_ERROR_SHOWN})) AS error{{columns}}
FROM (
  SELECT *,
    max(now - created_at, 0) / 1000 AS age,
    max(coalesce(started_at, finished_at, now) - max(created_at, coalesce(run_after, 0)), 0) / 1000 AS queue_wait,
    CASE WHEN finished_at >= started_at THEN finished_at - started_at
      WHEN status = '{_RUNNING}' AND started_at <= now THEN now - started_at END / 1000 AS duration,
    CASE WHEN finished_at >= started_at THEN finished_at - started_at END AS duration_ms
  FROM (
    SELECT j.id, j.kind, j.target_name, j.status, j.progress, j.attempts, j.priority, j."exclusive",
      j.created_at, j.started_at, j.finished_at, j.run_after, j.retry_of, j.error_message, j.worker, j.lease{{columns}},
      {_ENDS.format(same="IS")} AS expires_at,
      CAST(strftime('%s', 'now') AS INTEGER) * 1000 + CAST(substr(strftime('%f', 'now'), 4) AS INTEGER) AS now
    FROM {{jobs}} j
  )
) AS v"""

_POSTGRES_CREATE = (_POSTGRES_VIEW, _POSTGRES_INVOKER)
_SQLITE_CREATE = (_SQLITE_VIEW,)
_DROP = ("DROP VIEW IF EXISTS {view}",)

_TEXTS = {
    ("postgresql", True): _POSTGRES_CREATE,
    ("postgresql", False): _DROP,
    ("sqlite", True): _SQLITE_CREATE,
    ("sqlite", False): _DROP,
}
_INFO = "mljobs_overview"


VIEW_COLUMNS = frozenset((
    "id", "kind", "target_name", "status", "progress", "age", "queue_wait", "duration", "worker", "lease_ends_at", "stuck",
    "note", "attempts", "priority", "created_at", "started_at", "finished_at", "run_after", "duration_ms", "retry_of",
    "error", "error_message", "exclusive", "expires_at", "ends_at", "now",
))  # fmt: skip
"""The columns that a view has without a host's, and those that its text needs."""


@dataclass(frozen=True, slots=True)
class Overview:
    """A view: its name, the tables that it reads, and the host's own columns of the job table that it shows.

    Without a table of workers the view says nothing about them.
    """

    name: str
    jobs: Table
    leases: Table
    workers: Table | None = None
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for column in self.columns:
            if column in VIEW_COLUMNS:
                raise InvalidValueError("columns", column, "the view has a column of this name already")

    @property
    def reads(self) -> frozenset[str]:
        """The names of the tables that it reads."""
        return frozenset(table.name for table in (self.jobs, self.leases, self.workers) if table is not None)


class OverviewDDL(ExecutableDDLElement):
    """One statement that creates or drops a view."""

    inherit_cache = False

    def __init__(self, overview: Overview, text: str) -> None:
        self.overview = overview
        self.text = text


@compiles(OverviewDDL)
def _render(element: OverviewDDL, compiler: DDLCompiler, **_: object) -> str:
    preparer, overview = compiler.preparer, element.overview
    schema = preparer.schema_for_object(overview.jobs)
    prefix = f"{preparer.quote_schema(schema)}." if schema else ""
    # SQLite: a view reads from the schema that it is in, and may name no other.
    inside = "" if compiler.dialect.name == "sqlite" else prefix
    no_worker = ""
    if overview.workers is not None:
        words = _NO_WORKER_WORDS[compiler.dialect.name]
        no_worker = _NO_WORKER.format(**words, workers=inside + preparer.quote(overview.workers.name))
    return element.text.format(
        view=prefix + preparer.quote(overview.name),
        jobs=inside + preparer.quote(overview.jobs.name),
        leases=inside + preparer.quote(overview.leases.name),
        no_worker=no_worker,
        columns="".join(f", {preparer.quote(column)}" for column in overview.columns),
    )


def overview_of(table: Table) -> Overview | None:
    """Return the view beside a job table, or beside its leases; None where there is none."""
    found: Overview | None = table.info.get(_INFO)
    return found


def overview_ddl(table: Table, dialect_name: str, *, create: bool = True) -> Sequence[OverviewDDL]:
    """Return the statements that create (or drop) the view beside a job table, in order; none for an unknown dialect.

    Raises:
        InvalidValueError: The table has none; set ``__overview_name__`` in its class.
    """
    overview = overview_of(table)
    if overview is None:
        raise InvalidValueError("table", table.name, "it has no overview; set __overview_name__ in its class")
    return view_ddl(overview, dialect_name, create=create)


def view_ddl(overview: Overview, dialect_name: str, *, create: bool = True) -> Sequence[OverviewDDL]:
    """Return the statements that create (or drop) a view, in order; none for an unknown dialect."""
    return [OverviewDDL(overview, text) for text in _TEXTS.get((dialect_name, create), ())]


def install_overview(overview: Overview) -> None:
    """Create the view with the tables and drop it with them, where a host uses ``metadata.create_all``."""
    leases = overview.leases
    overview.jobs.info[_INFO] = leases.info[_INFO] = overview

    # The listeners go with a copy by Table.to_metadata, whose view reads the copies.
    @event.listens_for(leases, "after_create", propagate=True)
    def create(created: Table, connection: Connection, **_: object) -> None:
        for statement in view_ddl(_overview_beside(created), connection.dialect.name):
            connection.execute(statement)

    @event.listens_for(leases, "before_drop", propagate=True)
    def drop(dropped: Table, connection: Connection, **_: object) -> None:
        for statement in view_ddl(_overview_beside(dropped), connection.dialect.name, create=False):
            connection.execute(statement)


def _overview_beside(leases: Table) -> Overview:
    """Return the view beside a table of leases: of a copy the one that reads the copy of the job table."""
    known: Overview = leases.info[_INFO]
    if known.leases is leases:
        return known

    def beside(table: Table) -> Table | None:
        return leases.metadata.tables.get(table.name if leases.schema is None else f"{leases.schema}.{table.name}")

    jobs = beside(known.jobs)
    if jobs is None:
        return known
    workers = None if known.workers is None else beside(known.workers)
    copied = Overview(known.name, jobs, leases, workers, known.columns)
    jobs.info[_INFO] = leases.info[_INFO] = copied
    return copied
