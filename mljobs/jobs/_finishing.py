"""Record outcomes: complete, fail or requeue claimed jobs, each if its lease still holds it. And cancel a job."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import msgspec
import sqlalchemy as sa

from mljobs import events
from mljobs._values import storable_text, to_json_text
from mljobs.jobs._base import Bind, JobRef, M, Model, connection_of, model_and_id, prepared, table_of
from mljobs.jobs._claims import Claim, model_of, note_ends
from mljobs.jobs._fencing import (
    FencedWrite,
    Written,
    explain,
    holds,
    lease_parameters,
    wanted_parameters,
    wanted_table,
)
from mljobs.jobs._holding import newest_by_job
from mljobs.jobs._records import refresh
from mljobs.jobs._refusals import state_of
from mljobs.jobs._statements import constant, moments
from mljobs.jobs._transitions import cancel_values, outcome_values
from mljobs.record._models import MlJob
from mljobs.record._values import error_text
from mljobs.states import ACTIVE, MlJobStatus
from mljobs.types import JobId

_CLAIM = attrgetter("claim")
_COMPLETED = MlJobStatus.COMPLETED
_FAILED = MlJobStatus.FAILED
_QUEUED = MlJobStatus.QUEUED


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """How the work on one claim ended. Make one by ``completed``, ``failed`` or ``requeued``, which check the values."""

    claim: Claim[Any]
    status: MlJobStatus
    error_message: str | None = None
    metrics_json: str | None = None

    @classmethod
    def completed(cls, claim: Claim[Any], metrics: Any = None) -> Outcome:
        """Return the outcome of a completed job.

        Args:
            claim: What ``claim`` returned.
            metrics: What came out, any JSON-able value; None keeps what the record holds.

        Raises:
            InvalidValueError: JSON, or PostgreSQL, cannot hold the metrics.
        """
        text = None if metrics is None else to_json_text("metrics", metrics)
        return cls(claim, _COMPLETED, metrics_json=text)

    @classmethod
    def failed(cls, claim: Claim[Any], error: str | BaseException) -> Outcome:
        """Return the outcome of a failed job, with the reason.

        Raises:
            InvalidValueError: ``error`` is neither a string nor an exception, or cannot be stored.
        """
        return cls(claim, _FAILED, error_message=storable_text("error_message", error_text(error)))

    @classmethod
    def requeued(cls, claim: Claim[Any]) -> Outcome:
        """Return the outcome that requeues the job: progress 0, not started, its attempts still counted."""
        return cls(claim, _QUEUED)


def complete(session: Bind, claim: Claim[Any], metrics: Any = None) -> None:
    """Complete the job, if this lease still holds it: progress 100, finished now, the lease gone.

    Args:
        session: The caller's session or connection.
        claim: What ``claim`` returned.
        metrics: What came out, any JSON-able value; None keeps what the record holds.

    Raises:
        InvalidValueError: JSON cannot hold the metrics; nothing was written.
        LeaseLostError: The lease is gone; nothing was written.
        TerminalStateError: The job was cancelled meanwhile; it stays so, and the lease is given back.
    """
    _finish_one(session, Outcome.completed(claim, metrics))


def fail(session: Bind, claim: Claim[Any], error: str | BaseException) -> None:
    """Fail the job with the reason, if this lease still holds it: finished now, the lease gone.

    Args:
        session: The caller's session or connection.
        claim: What ``claim`` returned.
        error: The reason; of an exception its type and message.

    Raises:
        InvalidValueError: ``error`` cannot be stored; nothing was written.
        LeaseLostError: The lease is gone; nothing was written.
        TerminalStateError: The job was cancelled meanwhile; it stays so, and the lease is given back.
    """
    _finish_one(session, Outcome.failed(claim, error))


def requeue(session: Bind, claim: Claim[Any]) -> None:
    """Put the job back, if this lease still holds it: queued, progress 0, not started, attempts kept, the lease gone.

    Args:
        session: The caller's session or connection.
        claim: What ``claim`` returned.

    Raises:
        LeaseLostError: The lease is gone; nothing was written.
        TerminalStateError: The job was cancelled meanwhile; it stays so, and the lease is given back.
    """
    _finish_one(session, Outcome.requeued(claim))


def complete_many(session: Bind, claims: Iterable[tuple[Claim[Any], Any]]) -> list[Exception | None]:
    """Complete many jobs in one statement, each if its lease still holds it; see ``finish_many``.

    Args:
        session: The caller's session or connection.
        claims: Pairs of claim and metrics.
    """
    return finish_many(session, [Outcome.completed(claim, metrics) for claim, metrics in claims])


def fail_many(session: Bind, claims: Iterable[tuple[Claim[Any], str | BaseException]]) -> list[Exception | None]:
    """Fail many jobs in one statement, each if its lease still holds it; see ``finish_many``.

    Args:
        session: The caller's session or connection.
        claims: Pairs of claim and reason.
    """
    return finish_many(session, [Outcome.failed(claim, error) for claim, error in claims])


def requeue_many(session: Bind, claims: Iterable[Claim[Any]]) -> list[Exception | None]:
    """Put many jobs back in one statement, each if its lease still holds it; see ``finish_many``.

    Args:
        session: The caller's session or connection.
        claims: What ``claim`` returned.
    """
    return finish_many(session, [Outcome.requeued(claim) for claim in claims])


def finish_many(session: Bind, outcomes: Iterable[Outcome]) -> list[Exception | None]:
    """Record many outcomes in one statement, each if its lease still holds the job.

    Args:
        session: The caller's session or connection.
        outcomes: Any mix, of one model.

    Returns:
        For each outcome, in order, None where it was recorded, else the error that ``complete`` would raise.
    """
    given = list(outcomes)
    if not given:
        return []
    model = model_of(map(_CLAIM, given))
    connection = connection_of(session, model)
    distinct = one_for_each_job(given)
    written = record_outcomes(connection, model, distinct)
    return answers(session, model, given, distinct, written)


def one_for_each_job(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return one outcome for each job, in the order of the ids; see ``newest_by_job``."""
    return newest_by_job(outcomes, _CLAIM)


def record_outcomes(
    connection: sa.Connection, model: Model, outcomes: Sequence[Outcome], write: FencedWrite | None = None
) -> Written:
    """Write outcomes, each if its lease still holds the job, and delete the leases that have no job any more.

    Args:
        connection: Where to write.
        model: The mapped job class.
        outcomes: One for each job.
        write: The write to use instead of ``finish_update``.
    """
    return (write or _FINISH).run(connection, model, outcome_parameters(connection.dialect.name, outcomes) | moments())


def outcome_parameters(dialect: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the parameters of ``finish_update``, and those of the leases."""
    rows = [(one.claim, one.status._value_, one.error_message, one.metrics_json) for one in outcomes]
    claims, status, error, metrics = zip(*rows, strict=True)
    wanted = wanted_parameters(dialect, claims, status=status, error=error, metrics=metrics)
    return wanted | lease_parameters(dialect, claims)


def answers(
    session: Bind,
    model: Model,
    outcomes: Sequence[Outcome],
    tried: Sequence[Outcome],
    written: Written,
) -> list[Exception | None]:
    """Return for each outcome, in order, None or why it was not recorded.

    Args:
        session: The caller's session or connection.
        model: The mapped job class.
        outcomes: What the caller gave.
        tried: The ``one_for_each_job`` of them.
        written: What the write has changed.
    """
    connection = connection_of(session, model)
    errors: list[Exception | None] = [None] * len(outcomes)
    if written.ids is not None or len(tried) < len(outcomes):
        done = {id(outcome) for outcome in tried if outcome.claim in written}
        for at, outcome in enumerate(outcomes):
            if id(outcome) not in done:
                errors[at] = explain(connection, model, outcome.claim, written, outcome.status)
            outcome.claim.note_end()
    else:
        note_ends(map(_CLAIM, outcomes))
    refresh(session, model, (outcome.claim.job_id for outcome in outcomes))
    if events.subscribed():
        ended = [one.claim.job_id for one, error in zip(outcomes, errors, strict=True) if error is None]
        events.add_finished(session, model, ended)
    return errors


def cancel(session: Bind, job: JobRef, *, model: type[M] = MlJob) -> bool:  # type: ignore[assignment]
    """Cancel the job if it is queued or running. It is terminal at once; its worker stops at its next check.

    The lease of a running job stays until its worker has stopped or the lease expires, so that an exclusive target is
    not taken while somebody still works on it.

    Args:
        session: The caller's session or connection.
        job: The job or its id.
        model: The mapped job class.

    Returns:
        True if it was still cancellable; False if it had finished. Source: RedDB's ``cancel``.

    Raises:
        JobNotFound: No record has this id.
    """
    model, job_id = model_and_id(job, model)
    connection = connection_of(session, model)
    cancelled = bool(_cancellation(model).rows(connection, {"id": job_id, **moments()}))
    if not cancelled:
        state_of(connection, model, job_id)
    refresh(session, model, [job_id])
    if cancelled and events.subscribed():
        events.add_finished(session, model, [job_id])
    return cancelled


def _finish_one(session: Bind, outcome: Outcome) -> None:
    (error,) = finish_many(session, [outcome])
    if error is not None:
        raise error


# ---------------------------------------------------------------------------------------------------- the statements


def finish_update(_: Model, jobs: Any, held: Any, dialect: str) -> sa.Update:
    """Return the UPDATE that records outcomes."""
    return outcome_update(jobs, dialect, lambda wanted: holds(jobs, wanted, held, dialect))


def outcome_update(jobs: Any, dialect: str, conditions: Callable[[Any], list[Any]]) -> sa.Update:
    """Return the UPDATE that sets what belongs to each outcome.

    Args:
        jobs: The job table, or an alias.
        dialect: The dialect's name.
        conditions: Takes the ``wanted_table``; returns the conditions under which a job gets its outcome.
    """
    wanted = wanted_table(dialect, status=sa.String(), error=sa.Text(), metrics=sa.Text())
    columns = wanted.c
    values = outcome_values(jobs, dialect, columns.status, columns.error, columns.metrics)
    return sa.update(jobs).where(*conditions(wanted)).values(values)


_FINISH = FencedWrite(finish_update, ends=True)


@prepared
def _cancellation(model: Model, dialect: str) -> Any:
    jobs = table_of(model)
    active = jobs.c.status.in_([constant(status) for status in ACTIVE])
    update = sa.update(jobs).where(jobs.c.id == sa.bindparam("id", type_=JobId()), active)
    return update.values(cancel_values(dialect)).returning(jobs.c.id)
