"""The queue: its depth by kind, the jobs that are claimed next, and those that wait for a target."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Boolean, ColumnElement, and_, func, literal, or_, select, type_coerce

from mljobs._values import check_count, utc_now
from mljobs.jobs._base import Bind, Model, connection_of, table_of
from mljobs.jobs._paging import MAX_PAGE
from mljobs.jobs._picking import queued_jobs
from mljobs.jobs._statements import constant, in_active_state, moments
from mljobs.jobs._summaries import JobSummary, summaries_of
from mljobs.record._models import MlJob
from mljobs.states import MlJobStatus
from mljobs.types import UtcMillis

_QUEUE_READ = 20_000


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """What waits of a kind.

    Attributes:
        kind: The kind.
        ready: Jobs that could run now.
        delayed: Jobs whose time has not come.
        held: Exclusive jobs among the ready ones whose target is taken.
        oldest: Since when the one that waits longest could have run; None without any.
    """

    kind: str
    ready: int
    delayed: int
    held: int
    oldest: datetime | None


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits, by kind.

    Attributes:
        kinds: Those of which a job waits, the deepest first.
        complete: Whether all were looked at; no more than 20,000 are.
        now: The time that this was true.
    """

    kinds: tuple[QueueDepth, ...]
    complete: bool
    now: datetime


def queue_depths(session: Bind, *, model: Model = MlJob) -> Queue:
    """Return what waits by kind: how many, since when, and for what.

    Args:
        session: The caller's session or connection.
        model: The mapped job class.
    """
    table, leases, now = table_of(model), model.__leases__, utc_now()
    connection = connection_of(session, model)
    queued = (
        select(table.c.kind, table.c.created_at, table.c.run_after, table.c.exclusive, table.c.target_name)
        .where(table.c.status == constant(MlJobStatus.QUEUED))
        .limit(_QUEUE_READ + 1)
        .subquery()
    )
    at = literal(now, UtcMillis("now"))
    ready = or_(queued.c.run_after.is_(None), queued.c.run_after <= at)
    taken = queued.c.target_name.in_(select(leases.c.target_lock).where(leases.c.target_lock.is_not(None)))
    since = type_coerce(func.coalesce(queued.c.run_after, queued.c.created_at), UtcMillis("since"))
    statement = select(
        queued.c.kind,
        _count(ready),
        _count(~ready),
        _count(and_(ready, type_coerce(queued.c.exclusive, Boolean), taken)),
        func.min(since).filter(ready),
        func.count(),
    ).group_by(queued.c.kind)
    rows = connection.execute(statement).all()
    kinds = [QueueDepth(str(kind), depth, delayed, held, oldest) for kind, depth, delayed, held, oldest, _ in rows]
    kinds.sort(key=lambda depth: (-depth.ready, depth.kind))
    return Queue(tuple(kinds), sum(row[-1] for row in rows) <= _QUEUE_READ, now)


def _count(condition: ColumnElement[bool]) -> Any:
    return func.count().filter(condition)


def next_claims(session: Bind, *, limit: int = 5, model: Model = MlJob) -> list[JobSummary]:
    """Return the jobs that would be claimed next, in this order.

    Args:
        session: The caller's session or connection.
        limit: At most so many, 1 to 10,000.
        model: The mapped job class.
    """
    check_count("limit", limit, MAX_PAGE)
    connection = connection_of(session, model)
    rows = connection.execute(queued_jobs(model, "any", constant(limit), connection.dialect.name), moments()).all()
    return summaries_of(connection, [row[0] for row in rows], text=0, model=model)


def held_in_queue(session: Bind, *, limit: int = 20, model: Model = MlJob) -> list[tuple[JobSummary, str]]:
    """Return the queued exclusive jobs whose target is taken, and by whom, the longest waiting first.

    Args:
        session: The caller's session or connection.
        limit: At most so many, 1 to 10,000.
        model: The mapped job class.
    """
    check_count("limit", limit, MAX_PAGE)
    table, leases = table_of(model), model.__leases__
    connection = connection_of(session, model)
    # From the few locks to their targets' jobs, sorted after: in the order of creation SQLite would read all that finished.
    waiting = (
        select(table.c.id, table.c.created_at, leases.c.worker)
        .join(leases, leases.c.target_lock == table.c.target_name)
        .where(*in_active_state(table, MlJobStatus.QUEUED), table.c.exclusive)
        .limit(_QUEUE_READ)
        .subquery()
    )
    statement = select(waiting.c.id, waiting.c.worker).order_by(waiting.c.created_at, waiting.c.id).limit(limit)
    holders: dict[UUID, str] = {row[0]: row[1] for row in connection.execute(statement)}
    jobs = summaries_of(connection, holders, text=0, model=model)
    return [(job, holders[job.id]) for job in jobs]
