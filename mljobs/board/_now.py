"""What runs, waits and needs attention now: read once for all viewers, then put into words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any

from mljobs import jobs
from mljobs._values import utc_now
from mljobs.board._charts import Column, bar
from mljobs.board._finished import FinishedKept
from mljobs.board._format import cut, duration, short, when
from mljobs.board._html import Html
from mljobs.board._workers import WorkerRow, read_workers, unhandled, workers_of
from mljobs.jobs import Bind, Finished, JobSummary, Model, Queue, WorkerInfo
from mljobs.states import MlJobStatus

RUNNING_SHOWN = 200
_SLOW = 2.0
_HOUR, _DAY, _MINUTE = timedelta(hours=1), timedelta(days=1), timedelta(minutes=1)
_ATTENTION_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is around the running jobs; read less often than they are."""

    queue: Queue
    next: list[JobSummary]
    failed: list[JobSummary]
    minutes: list[Finished]
    held: list[tuple[JobSummary, str]]
    not_stopped: list[JobSummary]
    waits_p95: dict[str, float]
    any_jobs: bool
    workers: list[WorkerInfo] | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What stood in the database at one moment."""

    at: datetime
    running: list[JobSummary]
    usual: dict[tuple[str, str], float]
    around: Surroundings

    def workers(self, moment: datetime) -> list[WorkerRow]:
        """Return who works, the silent ones first."""
        return workers_of(self.around.workers, [*self.running, *self.around.not_stopped], moment)

    def unhandled(self, moment: datetime) -> dict[str, str]:
        """Return why jobs wait, for each kind that no worker takes; none where that is not known."""
        queued = {kind.kind: kind.oldest for kind in self.around.queue.kinds}
        return unhandled(queued, self.workers(moment), moment) if self.around.workers is not None else {}


def read_running(bind: Bind, model: Model) -> list[JobSummary]:
    """Return the running jobs."""
    return jobs.running_jobs(bind, limit=RUNNING_SHOWN + 1, model=model)


def read_surroundings(
    bind: Bind, model: Model, minutes_kept: FinishedKept, waits: dict[str, float] | None
) -> Surroundings:
    """Return what is around the running jobs.

    Args:
        bind: Where to read.
        model: The mapped job class.
        minutes_kept: What finished in the minutes before, as far as it is counted.
        waits: The usual waits, where they are known still.
    """
    now = utc_now()
    if waits is None:
        spread = jobs.durations(bind, since=now - _DAY, model=model)
        waits = {kind.kind: kind.waited.p95 for kind in spread.kinds if kind.waited is not None}
    queue = jobs.queue_depths(bind, model=model)
    hour_ago = _minute(now) - 59 * _MINUTE
    minutes_kept.count(bind, hour_ago, model)
    minutes = minutes_kept.per(_MINUTE, hour_ago)
    return Surroundings(
        queue=queue,
        next=jobs.next_claims(bind, limit=5, model=model),
        failed=jobs.last_failures(bind, limit=5, model=model),
        minutes=minutes,
        held=jobs.held_in_queue(bind, model=model),
        not_stopped=jobs.held_after_end(bind, model=model),
        waits_p95=waits,
        workers=read_workers(bind, model, now),
        any_jobs=bool(minutes or queue.kinds) or jobs.count_up_to(bind, 1, model=model) > 0,
    )


def _minute(moment: datetime) -> datetime:
    return moment.replace(second=0, microsecond=0)


# -------------------------------------------------------------------------------------------------------- in words


@dataclass(frozen=True, slots=True)
class RunningRow:
    """A running job in the table."""

    job: JobSummary
    bar: Html
    elapsed: str
    late: bool
    ends: datetime | None
    ends_in: str
    silent: str
    lease_left: str


@dataclass(frozen=True, slots=True)
class Trouble:
    """What needs attention: a sentence with a reason and a time, of a job or of a kind."""

    mark: str
    job: JobSummary | None
    why: Html
    since: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class NowView:
    """All of the page."""

    at: datetime
    rows: list[RunningRow]
    more_running: bool
    troubles: list[Trouble]
    more_troubles: int
    silent: int
    expired: int
    ready: int
    delayed: int
    held: int
    oldest: datetime | None
    completed: int
    failed: int
    columns: list[Column]
    around: Surroundings
    workers: list[WorkerRow]
    unhandled: dict[str, str]
    late_kinds: frozenset[str] = field(default_factory=frozenset)

    @property
    def running(self) -> str:
        """How many run."""
        return f"{RUNNING_SHOWN}+" if self.more_running else str(len(self.rows))

    @property
    def deepest(self) -> int:
        """The deepest of the queues."""
        return max((kind.ready for kind in self.around.queue.kinds), default=0) or 1

    @property
    def idle(self) -> bool:
        """Whether nothing runs, waits or has ever been."""
        return not self.rows and not self.around.any_jobs


def view(snapshot: Snapshot) -> NowView:
    """Return the snapshot as the page shows it."""
    now, around = snapshot.at, snapshot.around
    workers = snapshot.workers(now)
    rows = [_row(job, snapshot.usual.get((str(job.kind), job.target_name)), now) for job in snapshot.running]
    troubles = _troubles(snapshot, now)
    by_minute = _columns(around.minutes, _minute(now) - 59 * _MINUTE, _MINUTE, 60)
    oldest = min((kind.oldest for kind in around.queue.kinds if kind.oldest is not None), default=None)
    return NowView(
        at=now,
        rows=rows[:RUNNING_SHOWN],
        more_running=len(rows) > RUNNING_SHOWN,
        troubles=troubles[:_ATTENTION_SHOWN],
        more_troubles=max(0, len(troubles) - _ATTENTION_SHOWN),
        silent=sum(row.state == "silent" for row in workers),
        expired=sum(bool(row.silent) for row in rows),
        ready=sum(kind.ready for kind in around.queue.kinds),
        delayed=sum(kind.delayed for kind in around.queue.kinds),
        held=sum(kind.held for kind in around.queue.kinds),
        oldest=oldest,
        completed=sum(one.completed for one in by_minute),
        failed=sum(one.failed for one in by_minute),
        columns=by_minute,
        around=around,
        workers=workers,
        unhandled=snapshot.unhandled(now),
        late_kinds=frozenset(
            kind.kind
            for kind in around.queue.kinds
            if kind.oldest is not None
            and (now - kind.oldest).total_seconds() > max(around.waits_p95.get(kind.kind, float("inf")), 10)
        ),
    )


def _columns(found: Sequence[Finished], start: datetime, width: timedelta, number: int) -> list[Column]:
    return columns_of(found, start, width, number)


def columns_of(found: Sequence[Finished], start: datetime, width: timedelta, number: int) -> list[Column]:
    """Return a column for each span of time, those without a finished job too."""
    by_start: dict[datetime, dict[Any, int]] = {
        moment: {one.status: one.jobs for one in group} for moment, group in groupby(found, lambda one: one.start)
    }
    made = []
    for at in range(number):
        moment = start + at * width
        ends = by_start.get(moment, {})
        made.append(Column(moment, *(ends.get(status, 0) for status in _ENDS)))
    return made


_ENDS = (MlJobStatus.COMPLETED, MlJobStatus.FAILED, MlJobStatus.CANCELLED)


def running_row(job: JobSummary, usual: float | None, now: datetime) -> RunningRow:
    """Return a running job as a row."""
    return _row(job, usual, now)


def _row(job: JobSummary, usual: float | None, now: datetime) -> RunningRow:
    elapsed = max(0.0, (now - job.started_at).total_seconds()) if job.started_at else 0.0
    silent = job.expires_at is not None and job.expires_at < now
    ends = None
    if 0 < job.progress < 100 and not silent:
        ends = now + timedelta(seconds=elapsed * (100 - job.progress) / job.progress)
    tick = min(100.0, 100 * elapsed / usual) if usual else None
    label = f"{job.target_name[:80]}, {job.progress} per cent" + (", its worker is silent" if silent else "")
    return RunningRow(
        job=job,
        bar=bar(job.progress, tick, fill="fwarn" if silent else "frun", label=label),
        elapsed=duration(elapsed),
        late=bool(usual) and elapsed > _SLOW * (usual or 0) and elapsed > 60,
        ends=ends,
        ends_in=short(ends - now) if ends else "",
        silent=duration(now - job.expires_at) if silent and job.expires_at else "",
        lease_left=short(job.expires_at - now) if job.expires_at and not silent else "",
    )


def _troubles(snapshot: Snapshot, now: datetime) -> list[Trouble]:
    found = []
    for job in snapshot.running:
        if job.expires_at is not None and job.expires_at < now:
            why = Html("worker {} is silent; its lease ended {}").format(
                cut(job.worker or ""), when(job.expires_at, "hms", zone=True)
            )
            found.append(Trouble("silent", job, why, duration(now - job.expires_at)))
    found.sort(key=lambda trouble: (trouble.job and trouble.job.expires_at) or now)
    waiting = {depth.kind: depth for depth in snapshot.around.queue.kinds}
    for kind, reason in snapshot.unhandled(now).items():
        depth = waiting[kind]
        why = Html("{:,} queued; {}").format(depth.ready, reason)
        found.append(Trouble("slow", None, why, duration(now - depth.oldest) if depth.oldest else "", kind))
    for job in snapshot.running:
        usual = snapshot.usual.get((str(job.kind), job.target_name))
        if usual and job.started_at:
            elapsed = (now - job.started_at).total_seconds()
            if elapsed > _SLOW * usual and elapsed > 60:
                why = Html("runs {:.1f} times as long as usual (median of the last 20: {})").format(
                    elapsed / usual, short(usual)
                )
                found.append(Trouble("slow", job, why, duration(elapsed)))
    for job, holder in snapshot.around.held:
        ready = job.run_after or job.created_at
        if ready <= now:
            why = Html("queued; its target is taken by {} (exclusive)").format(cut(holder))
            found.append(Trouble("held", job, why, duration(now - ready)))
    for job in snapshot.around.not_stopped:
        tail = Html("; it holds the target until {}") if job.exclusive else Html("; its lease ends {}")
        why = Html("{}, but {} has not stopped").format(job.status, cut(job.worker or ""))
        why += tail.format(when(job.expires_at, "hms", zone=True))
        found.append(Trouble("cancelled", job, why, duration(now - job.finished_at) if job.finished_at else ""))
    return found
