"""Figures over many jobs: how many finished when, how long they took and waited, why they failed.

Each reads a bounded number of rows, by an index, and says when there were more.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median, quantiles
from typing import Any, Final

from sqlalchemy import ColumnElement, String, Text, and_, case, cast, func, literal, select, type_coerce

from mljobs._values import check_count, from_millis, to_utc
from mljobs.jobs._base import Bind, Model, connection_of, table_of
from mljobs.jobs._statements import constant
from mljobs.jobs._summaries import JobSummary, summaries_of
from mljobs.record._models import MlJob
from mljobs.record._sql import epoch_millis, first_line_of, time_bucket
from mljobs.states import TERMINAL, MlJobStatus
from mljobs.types import UtcMillis

SAMPLE: Final = 5_000
"""How many finished jobs percentiles are taken from at most: the last ones."""
_FAILURES_READ = 2_000
_USUAL_OF = 20
_USUAL_LOOKED_AT = 200
_LINE = 300


# --------------------------------------------------------------------------------------------------------- finished


@dataclass(frozen=True, slots=True)
class Finished:
    """How many jobs ended in one state within one span of time."""

    start: datetime
    status: MlJobStatus
    jobs: int


def finished_per(
    session: Bind, width: timedelta, *, since: datetime, until: datetime | None = None, model: Model = MlJob
) -> list[Finished]:
    """Return how many jobs finished in each span of time, by outcome; spans without any are left out.

    Reads all that finished in between, by the index on ``finished_at``.

    Args:
        session: The caller's session or connection.
        width: Of a span: whole seconds, counted from 1970-01-01 UTC.
        since: At this time or later.
        until: Earlier than this time; None for now.
        model: The mapped job class.
    """
    table = table_of(model)
    bucket = time_bucket(table.c.finished_at, width)
    where = [table.c.finished_at >= to_utc("since", since)]
    if until is not None:
        where.append(table.c.finished_at < to_utc("until", until))
    inner = select(bucket.label("start"), table.c.status).where(*where).subquery()
    start = type_coerce(inner.c.start, UtcMillis("start"))
    statement = select(start, inner.c.status, func.count()).group_by(inner.c.start, inner.c.status).order_by(start)
    rows = connection_of(session, model).execute(statement)
    return [Finished(moment, status, jobs) for moment, status, jobs in rows if status in TERMINAL]


# -------------------------------------------------------------------------------------------------------- durations


@dataclass(frozen=True, slots=True)
class Spread:
    """How a duration is spread: median, 95th and 99th percentile, in seconds, and of how many jobs."""

    p50: float
    p95: float
    p99: float
    jobs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread | None:
        """Return the spread of these durations; None of none."""
        if not seconds:
            return None
        percentiles = quantiles(seconds if len(seconds) > 1 else [*seconds] * 2, n=100, method="inclusive")
        return cls(percentiles[49], percentiles[94], percentiles[98], len(seconds))


@dataclass(frozen=True, slots=True)
class KindDurations:
    """How long jobs of a kind take and wait.

    Attributes:
        kind: The kind.
        ran: From start to end, of those that completed; None without any.
        waited: From the time at which it could run to the start, of those that were started once; None without any.
        failed: Which share of those that completed or failed did fail, 0 to 1; None without any.
    """

    kind: str
    ran: Spread | None
    waited: Spread | None
    failed: float | None


@dataclass(frozen=True, slots=True)
class Durations:
    """Durations by kind.

    Attributes:
        kinds: Those of which a job finished, by name.
        complete: Whether all that finished in the time were looked at, not only the last 5,000.
    """

    kinds: tuple[KindDurations, ...]
    complete: bool


def durations(session: Bind, *, since: datetime, model: Model = MlJob) -> Durations:
    """Return how long jobs take and wait, by kind, over those that finished since; at most the last 5,000.

    Args:
        session: The caller's session or connection.
        since: Finished at this time or later.
        model: The mapped job class.
    """
    table, connection = table_of(model), connection_of(session, model)
    started, ended = epoch_millis(table.c.started_at), epoch_millis(table.c.finished_at)
    ready = epoch_millis(func.coalesce(table.c.run_after, table.c.created_at))
    spans = (ended - started).label("took"), (started - ready).label("wait")
    finished = select(table.c.kind, table.c.status, table.c.attempts, *spans)
    newest = finished.where(table.c.finished_at >= to_utc("since", since))
    newest = newest.order_by(table.c.finished_at.desc(), table.c.id.desc())
    lately = newest.limit(SAMPLE).subquery()
    took, wait = lately.c.took, lately.c.wait
    # One row for each kind and state: to fetch and look at each job takes half as long again.
    statement = select(
        type_coerce(lately.c.kind, String),
        type_coerce(lately.c.status, String),
        func.count(),
        _joined(took, and_(lately.c.status == constant(MlJobStatus.COMPLETED), took >= literal(0))),
        _joined(wait, and_(lately.c.attempts <= literal(1), wait >= literal(0))),
    ).group_by(lately.c.kind, lately.c.status)
    ran: dict[str, list[float]] = defaultdict(list)
    waited: dict[str, list[float]] = defaultdict(list)
    ends: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, status, number, took_millis, wait_millis in connection.execute(statement):
        ends[kind][status] = number
        ran[kind] += _seconds(took_millis)
        waited[kind] += _seconds(wait_millis)
    kinds = [
        KindDurations(str(kind), Spread.of(ran[kind]), Spread.of(waited[kind]), _share(ends[kind]))
        for kind in sorted(ends)
    ]
    full = sum(map(Counter.total, ends.values())) == SAMPLE
    more = newest.with_only_columns(table.c.id).offset(SAMPLE).limit(1)
    return Durations(tuple(kinds), not full or connection.execute(more).first() is None)


def _joined(millis: ColumnElement[int], where: ColumnElement[bool]) -> ColumnElement[Any]:
    """Return the aggregate of those numbers for which the condition holds, as text."""
    return func.aggregate_strings(case((where, cast(millis, Text))), ",")


def _seconds(millis: str | None) -> list[float]:
    return [int(one) / 1000 for one in millis.split(",")] if millis else []


def _share(ends: Counter[str]) -> float | None:
    judged = ends[MlJobStatus.COMPLETED] + ends[MlJobStatus.FAILED]
    return ends[MlJobStatus.FAILED] / judged if judged else None


def usual_durations(
    session: Bind, pairs: Iterable[tuple[str, str]], *, model: Model = MlJob
) -> dict[tuple[str, str], float]:
    """Return how long a job of this kind on this target usually takes, in seconds: the median of the last 20 that completed.

    Args:
        session: The caller's session or connection.
        pairs: Of kind and target; those of which fewer than three completed are left out of the answer.
        model: The mapped job class.
    """
    table, connection = table_of(model), connection_of(session, model)
    found = {}
    for kind, target in dict.fromkeys(pairs):
        lately = (
            select(table.c.kind, table.c.status, table.c.started_at, table.c.finished_at)
            .where(table.c.target_name == target)
            .order_by(table.c.created_at.desc(), table.c.id.desc())
            .limit(_USUAL_LOOKED_AT)
            .subquery()
        )
        took = epoch_millis(lately.c.finished_at) - epoch_millis(lately.c.started_at)
        statement = select(took).where(
            lately.c.kind == kind, lately.c.status == constant(MlJobStatus.COMPLETED), took >= literal(0)
        )
        seconds = [row[0] / 1000 for row in connection.execute(statement.limit(_USUAL_OF))]
        if len(seconds) > 2:  # fewer say nothing about what is usual
            found[kind, target] = float(median(seconds))
    return found


# --------------------------------------------------------------------------------------------------------- failures


@dataclass(frozen=True, slots=True)
class Reason:
    """Why jobs failed.

    Attributes:
        line: First line of the error, of the last one that failed so.
        jobs: How many failed with this line; digits in it may differ.
        targets: What they worked on, the most frequent first, at most five.
        more_targets: How many others.
        last: When the last of them failed.
    """

    line: str
    jobs: int
    targets: tuple[str, ...]
    more_targets: int
    last: datetime | None


@dataclass(frozen=True, slots=True)
class Reasons:
    """Why jobs failed, the most frequent reason first.

    Attributes:
        reasons: One for each first line.
        complete: Whether all failures were looked at, not only the last 2,000.
    """

    reasons: tuple[Reason, ...]
    complete: bool


def pattern_of(line: str) -> str:
    """Return what two errors have in common that differ only in their digits."""
    return re.sub(r"0x[0-9a-fA-F]+|\d+(?:\.\d+)?", "#", line)


def failure_reasons(session: Bind, *, since: datetime, model: Model = MlJob) -> Reasons:
    """Return why jobs failed that were created since, by the first line of their error; at most the last 2,000.

    Args:
        session: The caller's session or connection.
        since: Created at this time or later.
        model: The mapped job class.
    """
    table = table_of(model)
    line = func.substr(first_line_of(table.c.error_message), 1, _LINE)
    statement = (
        select(line, table.c.target_name, epoch_millis(table.c.finished_at))
        .where(table.c.status == constant(MlJobStatus.FAILED), table.c.created_at >= to_utc("since", since))
        .order_by(table.c.created_at.desc(), table.c.id.desc())
        .limit(_FAILURES_READ + 1)
    )
    rows = connection_of(session, model).execute(statement).all()
    lines = [error or "" for error, *_ in rows[:_FAILURES_READ]]
    groups: dict[str, list[int]] = defaultdict(list)
    for at, pattern in enumerate(
        pattern_of("\n".join(lines)).split("\n")[: len(lines)]
    ):  # at once, for it takes a third
        groups[pattern].append(at)
    reasons = []
    for group in groups.values():
        targets = Counter(rows[at][1] for at in group).most_common()
        last = max((finished for at in group if (finished := rows[at][2]) is not None), default=None)
        names = tuple(name for name, _ in targets[:5])
        ended = None if last is None else from_millis(last)
        reasons.append(Reason(lines[group[0]], len(group), names, len(targets) - len(names), ended))
    reasons.sort(key=lambda reason: -reason.jobs)
    return Reasons(tuple(reasons), len(rows) <= _FAILURES_READ)


def last_failures(session: Bind, *, limit: int = 5, model: Model = MlJob) -> list[JobSummary]:
    """Return the jobs that failed last, of the 200 newest that failed.

    Args:
        session: The caller's session or connection.
        limit: At most so many, 1 to 200.
        model: The mapped job class.
    """
    check_count("limit", limit, _USUAL_LOOKED_AT)
    table, connection = table_of(model), connection_of(session, model)
    newest = (
        select(table.c.id, table.c.finished_at)
        .where(table.c.status == constant(MlJobStatus.FAILED))
        .order_by(table.c.created_at.desc(), table.c.id.desc())
        .limit(_USUAL_LOOKED_AT)
        .subquery()
    )
    ids = select(newest.c.id).order_by(newest.c.finished_at.desc().nulls_last(), newest.c.id.desc()).limit(limit)
    return summaries_of(connection, connection.scalars(ids).all(), text=0, model=model)
