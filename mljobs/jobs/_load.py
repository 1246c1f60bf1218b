"""Figures for operators: by kind what is queued, running and finished; by worker the jobs that it holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select

from mljobs._values import check_count, utc_now
from mljobs.errors import InvalidValueError
from mljobs.jobs._base import Bind, Model, connection_of, table_of
from mljobs.jobs._paging import MAX_PAGE
from mljobs.jobs._queue import queue_depths
from mljobs.jobs._statements import in_active_state
from mljobs.jobs._statistics import Spread, durations
from mljobs.jobs._summaries import JobSummary, held_after_end, summaries_of
from mljobs.record._models import MlJob
from mljobs.states import TERMINAL, MlJobStatus

_HOUR = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class KindStats:
    """What is going on with the jobs of a kind.

    Attributes:
        kind: The kind.
        queued: How many wait, those included whose time has not come.
        oldest: Since when the one that waits longest could have run; None without any.
        running: How many run.
        completed: How many completed in the time that was looked at.
        failed: How many failed in it.
        cancelled: How many were cancelled in it.
        per_hour: How many finished an hour.
        ran: How long those that completed took; None without any.
        waited: How long those that were started waited; None without any.
    """

    kind: str
    queued: int
    oldest: datetime | None
    running: int
    completed: int
    failed: int
    cancelled: int
    per_hour: float
    ran: Spread | None
    waited: Spread | None


@dataclass(frozen=True, slots=True)
class Stats:
    """What is going on, by kind.

    Attributes:
        kinds: Those of which a job waits, runs or finished, by name.
        since: From when on finished jobs were counted.
        now: Until when.
        complete: Whether all were looked at: of the queue no more than 20,000 are, of durations the last 5,000.
    """

    kinds: tuple[KindStats, ...]
    since: datetime
    now: datetime
    complete: bool


def stats(session: Bind, *, over: timedelta = timedelta(days=1), model: Model = MlJob) -> Stats:
    """Return by kind what waits, what runs, how many finished an hour, and how long they took and waited.

    Args:
        session: The caller's session or connection.
        over: How far back finished jobs are counted.
        model: The mapped job class.

    Raises:
        InvalidValueError: ``over`` is not above 0.
    """
    if not isinstance(over, timedelta) or over <= timedelta(0):
        raise InvalidValueError("over", over, "expected a timedelta above 0")
    table, connection, now = table_of(model), connection_of(session, model), utc_now()
    since = now - over
    queue = queue_depths(session, model=model)
    times = durations(session, since=since, model=model)
    running = select(table.c.kind, func.count()).where(*in_active_state(table, MlJobStatus.RUNNING))
    runs = {str(kind): number for kind, number in connection.execute(running.group_by(table.c.kind))}
    ended = select(table.c.kind, table.c.status, func.count()).where(table.c.finished_at >= since)
    ends: Counter[tuple[str, MlJobStatus]] = Counter()
    for kind, status, number in connection.execute(ended.group_by(table.c.kind, table.c.status)):
        ends[str(kind), status] += number
    depths = {depth.kind: depth for depth in queue.kinds}
    spreads = {times_of.kind: times_of for times_of in times.kinds}
    kinds = []
    for kind in sorted({*depths, *runs, *spreads, *(one for one, _ in ends)}):
        depth, spread = depths.get(kind), spreads.get(kind)
        completed, failed, cancelled = (ends[kind, status] for status in TERMINAL)
        kinds.append(
            KindStats(
                kind,
                depth.ready + depth.delayed if depth else 0,
                depth.oldest if depth else None,
                runs.get(kind, 0),
                completed,
                failed,
                cancelled,
                (completed + failed + cancelled) / (over / _HOUR),
                spread.ran if spread else None,
                spread.waited if spread else None,
            )
        )
    return Stats(tuple(kinds), since, now, queue.complete and times.complete)


@dataclass(frozen=True, slots=True)
class Holder:
    """A worker that holds leases.

    Attributes:
        worker: Its name.
        jobs: What it holds, the longest first, at most as many as were asked for.
        held: How many jobs in all.
        since: When it took the first of them.
        silent: Of how many the lease has expired: it has said nothing for longer than a lease lasts.
    """

    worker: str
    jobs: tuple[JobSummary, ...]
    held: int
    since: datetime
    silent: int


def holders(session: Bind, *, limit: int = 1000, model: Model = MlJob) -> list[Holder]:
    """Return the workers that hold leases, by name, with what they hold; idle ones hold nothing and are not seen.

    Args:
        session: The caller's session or connection.
        limit: At most so many jobs, 1 to 10,000; the oldest first.
        model: The mapped job class.
    """
    check_count("limit", limit, MAX_PAGE)
    leases, now = model.__leases__, utc_now()
    jobs = table_of(model)
    statement = (
        select(jobs.c.id)
        .join(leases, leases.c.token == jobs.c.lease)
        .order_by(leases.c.acquired_at, leases.c.token, jobs.c.id)
        .limit(limit)
    )
    ids = [
        *connection_of(session, model).scalars(statement),
        *(job.id for job in held_after_end(session, limit=limit, model=model)),
    ][:limit]
    by_worker: dict[str, list[JobSummary]] = {}
    for job in summaries_of(session, ids, text=0, model=model):
        by_worker.setdefault(job.worker or "", []).append(job)
    return [
        Holder(
            worker,
            tuple(held),
            len(held),
            min(job.acquired_at or now for job in held),
            sum(job.expires_at is not None and job.expires_at < now for job in held),
        )
        for worker, held in sorted(by_worker.items())
    ]
