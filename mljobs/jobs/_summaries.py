"""Jobs as lists and pages show them: one row each with its lease, texts cut in the database, no query for each job."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, Unpack
from uuid import UUID

from sqlalchemy import Column, ColumnElement, Connection, Select, Text, case, cast, func, literal, null, select

from mljobs._values import check_count
from mljobs.errors import InvalidValueError
from mljobs.jobs._base import Bind, JobRef, Model, connection_of, id_of, is_postgres, model_and_id, table_of
from mljobs.jobs._fencing import has_not_stopped, token_of
from mljobs.jobs._filters import Filter, Filters, Where, selection
from mljobs.jobs._paging import MAX_PAGE, Order, Paging
from mljobs.jobs._statements import in_active_state
from mljobs.record._models import MlJob
from mljobs.record._sql import first_line_of
from mljobs.states import MlJobStatus

_ERROR_SHOWN = 300
TEXT_SHOWN: Final = 4_000
"""How many characters of ``spec`` and ``metrics`` a list reads; of a longer text only the size is returned."""
_ENDED_READ = 20_000
_CHAIN_ROUNDS = 100
_CHAIN_RECORDS = 500


@dataclass(frozen=True, slots=True)
class JobSummary:
    """A job as a list shows it: the record with its texts cut, and its lease.

    Attributes:
        error: First line of ``error_message``, at most 300 characters; or as much of the whole as was asked for.
        spec: The JSON text; None where it is longer than was asked for.
        spec_bytes: Its size as stored, on PostgreSQL after compression.
        metrics: As ``spec``; None where there are none, too.
        metrics_bytes: As ``spec_bytes``; 0 where there are none.
        worker: Who runs the job, or ran it last; None where that is not known.
        token: Of its lease; None without one.
        acquired_at: When that was taken.
        expires_at: When that ends.
    """

    id: UUID
    kind: str
    target_name: str
    status: MlJobStatus
    progress: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    run_after: datetime | None
    attempts: int
    priority: int
    exclusive: bool
    retry_of: UUID | None
    error: str | None
    spec: str | None
    spec_bytes: int
    metrics: str | None
    metrics_bytes: int
    worker: str | None
    token: int | None
    acquired_at: datetime | None
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class SummaryPage:
    """Summaries in order, and where the next page starts.

    Attributes:
        jobs: The summaries.
        cursor: Pass it as ``after`` for the next page; None on the last one.
        scanned: How many jobs were looked at; None where all that could match were.
        complete: Whether the page is as full as it can be; otherwise there may be more jobs from ``cursor`` on.
    """

    jobs: tuple[JobSummary, ...]
    cursor: str | None
    scanned: int | None = None
    complete: bool = True


def summaries(
    session: Bind,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    order: Order = "newest",
    limit: int = 50,
    after: str | None = None,
    scan: bool = False,
    seconds: float | None = None,
    text: int = TEXT_SHOWN,
    model: Model = MlJob,
    **fields: Unpack[Filters],
) -> SummaryPage:
    """Return a page of jobs as lists show them, in order; it looks as far as ``find`` does.

    Args:
        session: The caller's session or connection.
        filter: A :class:`~mljobs.Filter`, or its text.
        where: SQLAlchemy expressions of one's own beside it.
        order: ``"newest"`` or ``"oldest"`` first, by creation; ``"last_finished"`` or ``"first_finished"``, by end.
        limit: At most so many jobs, 1 to 10,000.
        after: The ``cursor`` of the page before.
        scan: Look at all jobs, however long it takes.
        seconds: For what no index serves: look no further after about so long, at 10,000 jobs at least; None for no limit.
        text: How many characters of ``spec`` and ``metrics`` to read at most; 0 for none.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.

    Raises:
        InvalidValueError: ``after`` is no cursor of this order.
    """
    paging = Paging(session, selection(model, filter, where, fields), order, limit)
    connection = connection_of(session, model)
    found = paging.find(
        lambda conditions, by, most: _read(connection, model, conditions, by, most, text=text),
        after=after,
        scan=scan,
        seconds=seconds,
    )
    return SummaryPage(found.jobs, found.cursor, found.scanned, found.complete)


def summaries_of(
    session: Bind, ids: Iterable[JobRef], *, text: int = TEXT_SHOWN, error: int = 0, model: Model = MlJob
) -> list[JobSummary]:
    """Return these jobs as lists show them, in this order; those that are not there are left out.

    Args:
        session: The caller's session or connection.
        ids: At most 10,000.
        text: How many characters of ``spec`` and ``metrics`` to read at most; 0 for none.
        error: How many characters of the whole error to read at most; 0 for its first line.
        model: The mapped job class.
    """
    wanted = list(dict.fromkeys(id_of(job) for job in ids))
    if len(wanted) > MAX_PAGE:
        raise InvalidValueError("ids", len(wanted), f"expected at most {MAX_PAGE}")
    if not wanted:
        return []
    table = table_of(model)
    where = [table.c.id.in_(wanted)]
    found = {
        job.id: job for job in _read(connection_of(session, model), model, where, [], None, text=text, error=error)
    }
    return [found[job_id] for job_id in wanted if job_id in found]


def running_jobs(session: Bind, *, limit: int = 200, model: Model = MlJob) -> list[JobSummary]:
    """Return the running jobs with their leases, the longest running first, without ``spec`` and ``metrics``.

    Args:
        session: The caller's session or connection.
        limit: At most so many, 1 to 10,000.
        model: The mapped job class.
    """
    check_count("limit", limit, MAX_PAGE)
    table = table_of(model)
    where = in_active_state(table, MlJobStatus.RUNNING)
    return _read(connection_of(session, model), model, where, [table.c.started_at, table.c.id], limit, text=0)


def held_after_end(session: Bind, *, limit: int = 50, model: Model = MlJob) -> list[JobSummary]:
    """Return the finished jobs whose worker still holds the lease: cancelled, and not stopped yet; of the last 20,000.

    Args:
        session: The caller's session or connection.
        limit: At most so many, 1 to 10,000.
        model: The mapped job class.
    """
    check_count("limit", limit, MAX_PAGE)
    table, leases, connection = table_of(model), model.__leases__, connection_of(session, model)
    # Asked for first: with a subquery in its place PostgreSQL takes a third of the table to be as young, and reads all.
    since = connection.scalar(select(func.min(leases.c.acquired_at)))
    if since is None:
        return []
    lately = (
        select(table)
        .where(table.c.finished_at >= since)
        .order_by(table.c.finished_at.desc(), table.c.id.desc())
        .limit(_ENDED_READ)
        .subquery()
    )
    ids = select(lately.c.id).where(has_not_stopped(model, lately)).order_by(lately.c.finished_at).limit(limit)
    return summaries_of(session, connection.scalars(ids).all(), text=0, model=model)


def chains(session: Bind, ids: Iterable[JobRef], *, model: Model = MlJob) -> dict[UUID, list[JobSummary]]:
    """Return for each of these jobs all records of the same work: what it retries, and what retries it, oldest first.

    Args:
        session: The caller's session or connection.
        ids: The jobs or their ids.
        model: The mapped job class.

    Returns:
        By id; a chain of more than 500 records in all is cut.
    """
    wanted = [id_of(job) for job in ids]
    table, connection = table_of(model), connection_of(session, model)
    known = {job.id: job for job in summaries_of(session, wanted, text=0, model=model)}
    ups = {job.retry_of for job in known.values() if job.retry_of is not None} - set(known)
    downs = set(known)
    for _ in range(_CHAIN_ROUNDS):
        if not (ups or downs) or len(known) > _CHAIN_RECORDS:
            break
        found = _read(connection, model, [table.c.id.in_(ups)], [], None, text=0) if ups else []
        found += _read(connection, model, [table.c.retry_of.in_(downs)], [], _CHAIN_RECORDS, text=0) if downs else []
        fresh = [job for job in found if job.id not in known]
        known |= {job.id: job for job in fresh}
        downs = {job.id for job in fresh}
        ups = {job.retry_of for job in fresh if job.retry_of is not None} - set(known)
    return {job_id: _same_work(job_id, known) for job_id in wanted if job_id in known}


def chain(session: Bind, job: JobRef, *, model: Model = MlJob) -> list[JobSummary]:
    """Return all records of the same work as this job: what it retries, and what retries it, oldest first.

    Args:
        session: The caller's session or connection.
        job: The job or its id.
        model: The mapped job class.
    """
    model, job_id = model_and_id(job, model)
    return chains(session, [job_id], model=model).get(job_id, [])


def _same_work(job_id: UUID, known: dict[UUID, JobSummary]) -> list[JobSummary]:
    linked: dict[UUID, set[UUID]] = {}
    for job in known.values():
        if job.retry_of in known:
            linked.setdefault(job.id, set()).add(job.retry_of)
            linked.setdefault(job.retry_of, set()).add(job.id)
    reached, open_ends = {job_id}, [job_id]
    while open_ends:
        near = linked.get(open_ends.pop(), set()) - reached
        reached |= near
        open_ends += near
    return sorted((known[one] for one in reached), key=lambda job: (job.created_at, job.id))


def _read(
    connection: Connection,
    model: Model,
    where: Sequence[ColumnElement[bool]],
    order: Sequence[Any],
    limit: int | None,
    *,
    text: int,
    error: int = 0,
) -> list[JobSummary]:
    statement = _statement(model, text, error, postgres=is_postgres(connection))  # type: ignore[arg-type] # a class can be hashed
    rows = connection.execute(statement.where(*where).order_by(*order).limit(limit))
    return [_summary(row, text) for row in rows]


@lru_cache(64)  # to put it together takes longer than to send it
def _statement(model: Model, text: int, error: int, *, postgres: bool) -> Select[Any]:
    table, leases = table_of(model), model.__leases__
    joined = table.outerjoin(leases, leases.c.token == token_of(model, table))
    return select(
        table.c.id,
        table.c.kind,
        table.c.target_name,
        table.c.status,
        table.c.progress,
        table.c.created_at,
        table.c.started_at,
        table.c.finished_at,
        table.c.run_after,
        table.c.attempts,
        table.c.priority,
        table.c.exclusive,
        table.c.retry_of,
        func.substr(table.c.error_message, 1, error)
        if error
        else func.substr(first_line_of(table.c.error_message), 1, _ERROR_SHOWN),
        *_cut(table.c.spec_json, text, postgres=postgres),
        *_cut(table.c.metrics_json, text, postgres=postgres),
        table.c.worker,
        leases.c.token,
        leases.c.acquired_at,
        leases.c.expires_at,
    ).select_from(joined)


def _cut(column: Column[Any], text: int, *, postgres: bool) -> tuple[Any, Any]:
    """Return the text where it is short, and how large it is; a large one is not even unpacked on PostgreSQL."""
    if not text:
        return null(), literal(0)
    raw = cast(column, Text)
    size = func.pg_column_size(column) if postgres else func.length(raw)
    return case((size <= text, func.substr(raw, 1, text + 1))), func.coalesce(size, 0)


def _summary(row: Sequence[Any], text: int) -> JobSummary:
    values = list(row)
    for at in (_SPEC, _METRICS):
        if values[at] is not None and len(values[at]) > text:  # packed it was short enough
            values[at], values[at + 1] = None, len(values[at])
    return JobSummary(*values)


_FIELDS = tuple(JobSummary.__dataclass_fields__)
_SPEC, _METRICS = _FIELDS.index("spec"), _FIELDS.index("metrics")
