"""End a claim: complete, fail or requeue its job, each if the lease still holds it; or cancel a job from outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Connection,
    Select,
    String,
    Text,
    bindparam,
    case,
    cast,
    delete,
    false,
    func,
    null,
    select,
    true,
    type_coerce,
    union_all,
    update,
)

from mljobs import events
from mljobs._values import storable_text, to_json_text
from mljobs.db._prepared import Prepared
from mljobs.jobs._base import (
    Bind,
    JobRef,
    Model,
    connection_of,
    constant,
    is_postgres,
    lock_sqlite,
    moments,
    named,
    now_of,
    per_model,
    refresh,
    state_of,
    table_of,
    unnested,
)
from mljobs.jobs._claiming import Claim, explain, model_of, ordered_leases
from mljobs.record._models import MlJob
from mljobs.record._values import error_text
from mljobs.states import ACTIVE, MlJobStatus
from mljobs.types import JobId

_COMPLETED = MlJobStatus.COMPLETED
_FAILED = MlJobStatus.FAILED
_QUEUED = MlJobStatus.QUEUED


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the work on one claim ended. Made by ``completed``, ``failed`` and ``requeued``, so no illegal mix exists."""

    claim: Claim
    status: MlJobStatus
    error_message: str | None = None
    metrics_json: str | None = None

    @classmethod
    def completed(cls, claim: Claim, metrics: Any = None) -> Outcome:
        """Say that the job is done.

        Args:
            claim: What ``claim`` returned.
            metrics: What came out, any JSON-able value; None keeps what the record holds.

        Raises:
            InvalidValueError: JSON, or PostgreSQL, cannot hold the metrics.
        """
        text = None if metrics is None else to_json_text("metrics", metrics)
        return cls(claim, _COMPLETED, metrics_json=text)

    @classmethod
    def failed(cls, claim: Claim, error: str | BaseException) -> Outcome:
        """Say that the job failed, with the reason.

        Raises:
            InvalidValueError: ``error`` is neither a string nor an exception, or cannot be stored.
        """
        return cls(claim, _FAILED, error_message=storable_text("error_message", error_text(error)))

    @classmethod
    def requeued(cls, claim: Claim) -> Outcome:
        """Say that the job goes back to the queue: progress 0, not started, its attempts still counted."""
        return cls(claim, _QUEUED)


def complete(session: Bind, claim: Claim, metrics: Any = None) -> None:
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


def fail(session: Bind, claim: Claim, error: str | BaseException) -> None:
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


def requeue(session: Bind, claim: Claim) -> None:
    """Put the job back, if this lease still holds it: queued, progress 0, not started, attempts kept, the lease gone.

    Args:
        session: The caller's session or connection.
        claim: What ``claim`` returned.

    Raises:
        LeaseLostError: The lease is gone; nothing was written.
        TerminalStateError: The job was cancelled meanwhile; it stays so, and the lease is given back.
    """
    _finish_one(session, Outcome.requeued(claim))


def complete_many(session: Bind, claims: Iterable[tuple[Claim, Any]]) -> list[Exception | None]:
    """Complete many jobs in one statement, each if its lease still holds it; see ``finish_many``.

    Args:
        session: The caller's session or connection.
        claims: Pairs of claim and metrics.
    """
    return finish_many(session, [Outcome.completed(claim, metrics) for claim, metrics in claims])


def fail_many(session: Bind, claims: Iterable[tuple[Claim, str | BaseException]]) -> list[Exception | None]:
    """Fail many jobs in one statement, each if its lease still holds it; see ``finish_many``.

    Args:
        session: The caller's session or connection.
        claims: Pairs of claim and reason.
    """
    return finish_many(session, [Outcome.failed(claim, error) for claim, error in claims])


def requeue_many(session: Bind, claims: Iterable[Claim]) -> list[Exception | None]:
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
    model = model_of(outcome.claim for outcome in given)
    connection = connection_of(session, model)
    rows = _finish(connection, model, first_of_each(given))
    return answers(session, connection, model, given, rows)


def first_of_each(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return one outcome for each lease: the same claim given twice is finished once, by the first."""
    first: dict[int, Outcome] = {}
    for outcome in outcomes:
        first.setdefault(outcome.claim.token, outcome)
    return list(first.values())


def answers(
    session: Bind, connection: Connection, model: Model, outcomes: Sequence[Outcome], rows: dict[int, bool]
) -> list[Exception | None]:
    """Return for each outcome, in order, None or why it was not recorded, from what the statement told of the leases."""
    errors: list[Exception | None] = []
    for outcome in outcomes:
        token = outcome.claim.token
        if rows.get(token):
            errors.append(None)
            del rows[token]
        else:
            errors.append(explain(connection, model, outcome.claim, held=token in rows, wanted=outcome.status))
    refresh(session, model, [outcome.claim.job_id for outcome in outcomes])
    if events.subscribed():
        ended_now = zip(outcomes, errors, strict=True)
        events.add_finished(session, model, [outcome.claim.job_id for outcome, error in ended_now if error is None])
    return errors


def cancel(session: Bind, job: JobRef, *, model: Model = MlJob) -> bool:
    """Cancel the job if it is queued or running; final at once, its worker sees it at its next check.

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
    model, job_id = named(job, model)
    connection = connection_of(session, model)
    cancelled = bool(_cancellation(model).rows(connection, {"id": job_id, **moments()}))
    if not cancelled:
        state_of(connection, model, job_id)
    refresh(session, model, [job_id])
    if cancelled and events.subscribed():
        events.add_finished(session, model, [job_id])
    return cancelled


# ---------------------------------------------------------------------------------------------------- the statements


def _finish_one(session: Bind, outcome: Outcome) -> None:
    (error,) = finish_many(session, [outcome])
    if error is not None:
        raise error


def _finish(connection: Connection, model: Model, outcomes: Sequence[Outcome]) -> dict[int, bool]:
    """Write the outcomes; return for each lease that was held, and is gone now, whether its job was written."""
    if is_postgres(connection):
        single = len(outcomes) == 1
        return whether_written(_finish_statement(model, single).rows(connection, parameters_of(outcomes)))
    lock_sqlite(connection, model)
    rows: dict[int, bool] = {}
    for outcome in outcomes:
        own = {
            "token": outcome.claim.token,
            "id": outcome.claim.job_id,
            "status": outcome.status.value,
            "error": outcome.error_message,
            "metrics": outcome.metrics_json,
            **moments(),
        }
        for (token,) in _end_statement(model).rows(connection, own):
            rows[token] = bool(_outcome_statement(model).rows(connection, own))
    return rows


def whether_written(rows: Iterable[Sequence[Any]]) -> dict[int, bool]:
    """Return for each lease in the rows of ``ended`` whether its job was written."""
    tokens = {ended: tokens or () for ended, tokens in rows}
    return dict.fromkeys(tokens[False], False) | dict.fromkeys(tokens[True], True)


def parameters_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the parameters of ``ended``: plain values for one outcome, lists for several."""
    if len(outcomes) == 1:
        (outcome,) = outcomes
        return {
            "token": outcome.claim.token,
            "id": outcome.claim.job_id,
            "status": outcome.status.value,
            "error": outcome.error_message,
            "metrics": outcome.metrics_json,
        }
    return {
        "tokens": [outcome.claim.token for outcome in outcomes],
        "ids": [outcome.claim.job_id for outcome in outcomes],
        "statuses": [outcome.status.value for outcome in outcomes],
        "errors": _or_nothing([outcome.error_message for outcome in outcomes]),
        "metrics": _or_nothing([outcome.metrics_json for outcome in outcomes]),
    }


def _or_nothing(values: list[str | None]) -> list[str | None]:
    """Return ``values``, or an empty list for nothing but None: ``unnest`` fills the shorter list up with NULLs."""
    return values if values.count(None) < len(values) else []


def ended(model: Model, dialect: str, *, single: bool) -> list[Select[Any]]:
    """PostgreSQL: the lease first, then its job; two rows, False with the leases' tokens, True with those of their jobs.

    A job is written only from the row of a lease that this very statement deletes. Asking ``EXISTS`` of the lease
    instead would not do: after waiting for the job's lock, READ COMMITTED looks again at the job, not at the lease.

    Args:
        model: The mapped job class.
        dialect: Its name.
        single: One outcome, in plain parameters. With lists PostgreSQL would plan the statement anew each time, for a
            list of one costs less than the ten it reckons with; and planning takes longer than the rest.

    Returns:
        What a UNION ALL joins.
    """
    jobs, leases = table_of(model), model.__leases__
    status: Any
    if single:
        token, own_id = bindparam("token", type_=BigInteger()), bindparam("id", type_=JobId())
        status, error, metrics = _scalars()
        where = [leases.c.token == token, leases.c.job_id == own_id]
        held = delete(leases).where(*where).returning(leases.c.token, leases.c.job_id).cte("held")
        job_id = held.c.job_id
    else:
        wanted = unnested("wanted", tokens=BigInteger(), ids=JobId(), statuses=String(), errors=Text(), metrics=Text())
        ordered, columns = ordered_leases(model, dialect), wanted.c
        held = (
            delete(leases)
            .where(leases.c.token == ordered.c.token, leases.c.token == columns.tokens, leases.c.job_id == columns.ids)
            .returning(leases.c.token, columns.ids, columns.statuses, columns.errors, columns.metrics)
            .cte("held")
        )
        job_id, status, error, metrics = held.c.ids, held.c.statuses, held.c.errors, held.c.metrics
    written = (
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.status == constant(MlJobStatus.RUNNING))
        .values(_finished(model, dialect, status, error, metrics))
        .returning(held.c.token)
        .cte("written")
    )
    # Not joined: the planner expects one row of each and would compare every one with every other.
    tokens = ARRAY(BigInteger())
    of_leases: Any = select(false().label("ended"), func.array_agg(held.c.token, type_=tokens).label("tokens"))
    of_jobs: Any = select(true(), func.array_agg(written.c.token, type_=tokens))
    return [of_leases, of_jobs]


def _scalars() -> tuple[Any, Any, Any]:
    return (
        bindparam("status", type_=String()),
        bindparam("error", type_=Text()),
        bindparam("metrics", type_=Text()),
    )


@per_model
def _finish_statement(model: Model, single: bool) -> Prepared:  # noqa: FBT001 - private
    return Prepared(lambda dialect: union_all(*ended(model, dialect, single=single)))


@per_model
def _end_statement(model: Model) -> Prepared:
    leases = model.__leases__
    token, job_id = bindparam("token", type_=BigInteger()), bindparam("id", type_=JobId())
    statement = delete(leases).where(leases.c.token == token, leases.c.job_id == job_id)
    return Prepared(lambda _: statement.returning(leases.c.token))


@per_model
def _outcome_statement(model: Model) -> Prepared:
    def build(dialect: str) -> Any:
        jobs = table_of(model)
        status, error, metrics = _scalars()
        return (
            update(jobs)
            .where(jobs.c.id == bindparam("id", type_=JobId()), jobs.c.status == constant(MlJobStatus.RUNNING))
            .values(_finished(model, dialect, status, error, metrics))
            .returning(jobs.c.id)
        )

    return Prepared(build)


def _finished(model: Model, dialect: str, status: Any, error: Any, metrics: Any) -> dict[str, Any]:
    """Return every field that belongs to an outcome; the same for both databases."""
    jobs = table_of(model)
    queued, completed = status == constant(_QUEUED), status == constant(_COMPLETED)
    progress = case((queued, constant(0)), (completed, constant(100)), else_=jobs.c.progress)
    text_of_metrics = cast(metrics, jobs.c.metrics_json.type) if dialect == "postgresql" else metrics
    return {
        "status": type_coerce(status, jobs.c.status.type),
        "progress": progress,
        "started_at": case((queued, null()), else_=jobs.c.started_at),
        "finished_at": case((queued, null()), else_=now_of(dialect)),
        "error_message": func.coalesce(error, jobs.c.error_message),
        "metrics_json": func.coalesce(text_of_metrics, jobs.c.metrics_json),
    }


@per_model
def _cancellation(model: Model) -> Prepared:
    jobs = table_of(model)
    statement = update(jobs).where(
        jobs.c.id == bindparam("id", type_=JobId()),
        jobs.c.status.in_([constant(status) for status in ACTIVE]),
    )
    return Prepared(
        lambda dialect: statement.values(status=constant(MlJobStatus.CANCELLED), finished_at=now_of(dialect)).returning(
            jobs.c.id
        )
    )
