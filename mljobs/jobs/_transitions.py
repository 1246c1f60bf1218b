"""What each transition sets in the record: the effects of outcomes as a table, and the SET list of each statement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from mljobs._values import MAX_PROGRESS, MAX_SMALLINT
from mljobs.jobs._statements import POSTGRES, constant, now_of
from mljobs.states import MlJobStatus


@dataclass(frozen=True, slots=True)
class Effect:
    """What changes in a job that leaves ``running``, beside its status and its lease.

    Attributes:
        progress: The new percentage; None keeps the present one.
        finished: Whether ``finished_at`` is now. Otherwise ``started_at`` is cleared too.
    """

    progress: int | None
    finished: bool


EFFECTS = {
    MlJobStatus.COMPLETED: Effect(progress=MAX_PROGRESS, finished=True),
    MlJobStatus.FAILED: Effect(progress=None, finished=True),
    MlJobStatus.CANCELLED: Effect(progress=None, finished=True),
    MlJobStatus.QUEUED: Effect(progress=0, finished=False),
}
"""By the status that follows."""
_REPORTED = (MlJobStatus.COMPLETED, MlJobStatus.FAILED, MlJobStatus.QUEUED)
"""The outcomes that a worker may record; it does not cancel."""


def start_values(jobs: Any, dialect: str, lease: Any) -> dict[str, Any]:
    """Return the SET list of a claim.

    Args:
        jobs: The job table, or an alias.
        dialect: The dialect's name.
        lease: The expression for the token of a job's lease.
    """
    attempts = jobs.c.attempts
    return {
        "status": constant(MlJobStatus.RUNNING),
        "progress": constant(0),
        "started_at": now_of(dialect),
        "attempts": sa.case((attempts < constant(MAX_SMALLINT), attempts + constant(1)), else_=attempts),
        "worker": sa.bindparam("worker", type_=sa.Text()),
        "lease": lease,
    }


def cancel_values(dialect: str) -> dict[str, Any]:
    """Return the SET list of a cancel."""
    return {"status": constant(MlJobStatus.CANCELLED), "finished_at": now_of(dialect), "lease": sa.null()}


def report_values(jobs: Any, dialect: str, progress: Any, metrics: Any) -> dict[str, Any]:
    """Return the SET list of a report. What the report leaves out is kept.

    Args:
        jobs: The job table, or an alias.
        dialect: The dialect's name.
        progress: The expression for the percentage; NULL keeps what the record holds.
        metrics: The expression for the metrics; NULL keeps what the record holds.
    """
    return {
        "progress": sa.func.coalesce(progress, jobs.c.progress),
        "metrics_json": sa.func.coalesce(_as_json(jobs, dialect, metrics), jobs.c.metrics_json),
    }


def outcome_values(jobs: Any, dialect: str, status: Any, error: Any, metrics: Any) -> dict[str, Any]:
    """Return the SET list that records outcomes; each row of the statement may have another one of ``EFFECTS``.

    Args:
        jobs: The job table, or an alias.
        dialect: The dialect's name.
        status: The expression for the status that follows.
        error: The expression for the reason; NULL keeps what the record holds.
        metrics: The expression for the metrics; NULL keeps what the record holds.
    """
    progress = [
        (status == constant(of), constant(outcome.progress))
        for of, outcome in EFFECTS.items()
        if of in _REPORTED and outcome.progress is not None
    ]
    unfinished = sa.or_(*(status == constant(of) for of, outcome in EFFECTS.items() if not outcome.finished))
    return {
        "status": sa.type_coerce(status, jobs.c.status.type),
        "progress": sa.case(*progress, else_=jobs.c.progress),
        "started_at": sa.case((unfinished, sa.null()), else_=jobs.c.started_at),
        "finished_at": sa.case((unfinished, sa.null()), else_=now_of(dialect)),
        "error_message": sa.func.coalesce(error, jobs.c.error_message),
        "metrics_json": sa.func.coalesce(_as_json(jobs, dialect, metrics), jobs.c.metrics_json),
        "lease": sa.null(),
    }


def _as_json(jobs: Any, dialect: str, text: Any) -> Any:
    return sa.cast(text, jobs.c.metrics_json.type) if dialect == POSTGRES else text
