"""Who works: the workers that keep a row, what each holds, and whoever holds a lease without a row."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from mljobs import jobs
from mljobs.jobs import Bind, JobSummary, Model, WorkerInfo, WorkerState
from mljobs.jobs._base import connection_of
from mljobs.jobs._workers import has_worker_table

State = Literal["silent", "stopping", "idle", "busy"]
"""What a worker does, those first at which somebody has to look."""
_STATES: tuple[State, ...] = ("silent", "stopping", "idle", "busy")
_SILENT_SHOWN = timedelta(hours=1)
_AT_ONCE = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker, as the pages show it.

    Attributes:
        name: Its name.
        state: What it does.
        kinds: What it has handlers for; of one without a row, the kinds of what it holds.
        held: How many jobs it holds.
        concurrency: How many it may run at a time; None without a row, as all below but ``longest`` and ``left``.
        host: Where it runs.
        pid: Its process there.
        version: Of mljobs.
        started_at: When it began.
        last_seen_at: When it last said that it is there.
        silent: For how many seconds it has said nothing, or its lease has ended; None unless it is silent.
        longest: Seconds since the start of the job that runs longest.
        left: Seconds of the lease that ends first; None without a lease, or of one that has ended.
    """

    name: str
    state: State
    kinds: tuple[str, ...]
    held: int
    concurrency: int | None = None
    host: str | None = None
    pid: int | None = None
    version: str | None = None
    started_at: datetime | None = None
    last_seen_at: datetime | None = None
    silent: float | None = None
    longest: float = 0.0
    left: float | None = None


def read_workers(bind: Bind, model: Model, now: datetime) -> list[WorkerInfo] | None:
    """Return the workers that run, and those that fell silent in the last hour; None where no table of them is."""
    if not has_worker_table(connection_of(bind, model), model):
        return None
    found = jobs.workers(bind, gone=True, model=model)
    return [one for one in found if one.state is not WorkerState.GONE or _fell_silent(one, now)]


def _fell_silent(worker: WorkerInfo, now: datetime) -> bool:
    return worker.silent and (bool(worker.jobs) or now - worker.last_seen_at < _SILENT_SHOWN)


def workers_of(
    registered: Sequence[WorkerInfo] | None, running: Sequence[JobSummary], moment: datetime
) -> list[WorkerRow]:
    """Return who works, the silent ones first.

    Args:
        registered: Those that keep a row.
        running: The jobs that are held.
        moment: The present time.
    """
    held: dict[str, list[JobSummary]] = {worker.name: [] for worker in registered or ()}
    for job in running:
        if job.worker is not None and job.expires_at is not None:
            held.setdefault(job.worker, []).append(job)
    known = {worker.name: worker for worker in registered or ()}
    rows = [_row(name, known.get(name), own, moment) for name, own in held.items()]
    return sorted(rows, key=lambda row: (_STATES.index(row.state), -(row.silent or 0), row.name))


def _row(name: str, known: WorkerInfo | None, own: Sequence[JobSummary], moment: datetime) -> WorkerRow:
    ends = min((job.expires_at for job in own if job.expires_at), default=None)
    left = (ends - moment).total_seconds() if ends is not None else None
    longest = max(((moment - job.started_at).total_seconds() for job in own if job.started_at), default=0.0)
    silent = -left if left is not None and left < 0 else None
    if known is not None and known.silent:
        silent = max(silent or 0.0, (moment - known.last_seen_at).total_seconds())
    state: State = "busy" if own else "idle"
    if silent is not None:
        state = "silent"
    elif known is not None and known.state is WorkerState.STOPPING:
        state = "stopping"
    own_kinds = tuple(sorted({str(job.kind) for job in own}))
    if known is None:
        return WorkerRow(name, state, own_kinds, len(own), silent=silent, longest=longest, left=_positive(left))
    return WorkerRow(
        name, state, known.kinds, len(own), known.concurrency, known.host, known.pid, known.version, known.started_at,
        known.last_seen_at, silent, longest, _positive(left),
    )  # fmt: skip


def _positive(left: float | None) -> float | None:
    return left if left is not None and left >= 0 else None


def why_unhandled(rows: Sequence[WorkerRow]) -> tuple[str, frozenset[str]]:
    """Return what to say of a queued job that nobody takes, and the kinds that somebody does take."""
    working = [row for row in rows if row.state in ("idle", "busy")]
    handled: Collection[str] = {kind for row in working for kind in row.kinds}
    return "no worker handles this kind" if working else "no worker is running", frozenset(handled)


def unhandled(queued: Mapping[str, datetime | None], rows: Sequence[WorkerRow], now: datetime) -> dict[str, str]:
    """Return for each kind that waits and that no worker takes why it waits.

    Args:
        queued: Since when the oldest job of each kind could have run.
        rows: Who works.
        now: The present time.
    """
    why, handled = why_unhandled(rows)
    return {
        kind: why
        for kind, oldest in queued.items()
        if kind not in handled and oldest is not None and now - oldest > _AT_ONCE
    }
