"""Rescue jobs: requeue or fail those whose lease has expired."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from mljobs import events
from mljobs._values import MAX_SMALLINT, check_count, to_member
from mljobs.jobs._base import Bind, Model, connection_of, is_postgres, lock_sqlite, own_table_of, prepared, table_of
from mljobs.jobs._claims import Claim, Lease
from mljobs.jobs._fencing import FencedWrite
from mljobs.jobs._finishing import Outcome, one_for_each_job, outcome_update, record_outcomes
from mljobs.jobs._records import refresh
from mljobs.jobs._savepoints import row_by_row
from mljobs.jobs._statements import POSTGRES, constant, in_rows, moments, now_of
from mljobs.record._models import MlJob
from mljobs.states import MlJobStatus

_BATCH_MAX = 10_000
_TOKEN_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Rescue:
    """What a rescue did.

    Attributes:
        requeued: Jobs that are queued again.
        failed: Jobs that ended as failed, after too many attempts.
        released: Tokens of leases that were deleted because no running job had them any more.
        errors: Jobs that the database refused to change, with what it said. The others were rescued all the same.
    """

    requeued: list[UUID] = field(default_factory=list)
    failed: list[UUID] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    errors: dict[UUID, Exception] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.requeued or self.failed or self.released or self.errors)


def rescue(
    session: Bind,
    *,
    max_attempts: int = 5,
    kinds: Iterable[str] | None = None,
    limit: int = 1000,
    model: Model = MlJob,
) -> Rescue:
    """Requeue running jobs whose lease has expired: progress 0, not started; fail them after ``max_attempts``.

    A lease that is renewed, or a job that is finished or claimed again, at the same moment is left alone, and two rescues
    never take one job. A job may run as long as it likes, as long as its lease is renewed. A job that was started by hand
    has no lease and is never rescued. A job whose lease was deleted by hand is rescued at once: its worker can neither
    renew nor finish it.

    Args:
        session: The caller's session or connection.
        max_attempts: A job that was started so often, or more, fails instead, with the reason; 1 to 32,767.
        kinds: Only jobs of this kind, or these, may fail; jobs of other kinds are only requeued. None for all.
        limit: At most so many jobs, and so many leases without a job, in one call, 1 to 10,000; the longest expired first.
        model: The mapped job class.

    Returns:
        What became of each; one job that the database refuses to change does not stop the others.
    """
    own_table_of(model)
    check_count("max_attempts", max_attempts, MAX_SMALLINT)
    check_count("limit", limit, _BATCH_MAX)
    connection = connection_of(session, model)
    if isinstance(kinds, str):
        kinds = [kinds]
    may_fail = {to_member(model.__kinds__, "kinds", kind) for kind in (model.__kinds__ if kinds is None else kinds)}
    parameters = {**moments(), "limit": limit}
    rescued = Rescue()
    if not is_postgres(connection):
        if not any(found(model).rows(connection, parameters) for found in (_expired_leases, _orphaned_jobs)):
            return rescued
        lock_sqlite(connection, model)
    for find, write in ((_expired_jobs, None), (_orphaned_jobs, _FINISH_ORPHANED)):
        jobs = find(model).rows(connection, parameters)
        _put_back(
            connection, model, jobs, lambda row: _outcome(row, max_attempts, may_fail), write=write, rescued=rescued
        )
        parameters["limit"] -= len(jobs)
    parameters["limit"] = limit
    rescued.released.extend(token for (token,) in _forgotten(model).rows(connection, parameters))
    refresh(session, model, [*rescued.requeued, *rescued.failed])
    if rescued.failed and events.subscribed():
        events.add_finished(session, model, rescued.failed)
    return rescued


def _put_back(
    connection: sa.Connection,
    model: Model,
    jobs: Sequence[Any],
    outcome_of: Callable[[Any], Outcome],
    *,
    write: FencedWrite | None,
    rescued: Rescue,
) -> None:
    """Write what becomes of each job; the refusal of one stops no other."""

    def put_back(part: Sequence[Any]) -> None:
        outcomes = one_for_each_job(map(outcome_of, part))
        written = record_outcomes(connection, model, outcomes, write)
        for outcome in outcomes:
            if outcome.claim in written:
                failed = outcome.status is MlJobStatus.FAILED
                (rescued.failed if failed else rescued.requeued).append(outcome.claim.job_id)

    if jobs:
        for row, error in row_by_row(connection, jobs, put_back):
            rescued.errors[row[0]] = error


def _outcome(row: Sequence[Any], max_attempts: int, may_fail: set[Any]) -> Outcome:
    """Return what becomes of a job whose lease has expired; one without an end was deleted."""
    job_id, kind, attempts, token, worker, acquired_at, expires_at = row
    claim = Claim(MlJob(id=job_id), job_id, token, worker, expires_at, Lease(MlJob, token, acquired_at, ()))
    if attempts < max_attempts or kind not in may_fail:
        return Outcome.requeued(claim)
    ended = "was deleted" if expires_at is None else f"expired at {expires_at:%Y-%m-%d %H:%M:%S} UTC"
    reason = f"gave up after {max_attempts} attempts: the lease of worker {worker} {ended}"
    return Outcome.failed(claim, reason)


# ---------------------------------------------------------------------------------------------------- the statements


@prepared
def _expired_leases(model: Model, dialect: str) -> sa.Select[Any]:
    """SQLite: an expired lease, if there is one, looked for before the write lock is taken."""
    leases = model.__leases__
    return sa.select(leases.c.token).where(leases.c.expires_at < now_of(dialect)).limit(sa.literal_column("1"))


@prepared
def _expired_jobs(model: Model, dialect: str) -> sa.Select[Any]:
    """Read the jobs of expired leases and lock both; skip what another rescue, or a renewal, has locked."""
    jobs, leases = table_of(model).alias("j"), model.__leases__.alias("l")
    expired = model.__leases__.alias("e")
    tokens = sa.select(expired.c.token).where(expired.c.expires_at < now_of(dialect))
    of_job = (jobs.c.id, jobs.c.kind, jobs.c.attempts)
    of_lease = (leases.c.token, leases.c.worker, leases.c.acquired_at, leases.c.expires_at)
    return (
        sa.select(*of_job, *of_lease)
        .join_from(leases, jobs, jobs.c.lease == leases.c.token)
        # The second condition says what the join says, so that the index of leases serves before ANALYZE, too.
        .where(leases.c.expires_at < now_of(dialect), in_rows(jobs.c.lease, tokens, dialect))
        .order_by(leases.c.expires_at, leases.c.token, jobs.c.id)
        .limit(sa.bindparam("limit", type_=sa.Integer()))
        .with_for_update(skip_locked=True, key_share=True, of=[leases, jobs])
    )


def _lease_is_gone(model: Model, jobs: Any) -> Any:
    """Return the condition that no lease stands under the token that a job names."""
    leases = model.__leases__.alias("l")
    # A subquery and no NOT EXISTS, see _forgotten.
    named = sa.select(constant(1)).where(leases.c.token == jobs.c.lease).limit(sa.literal_column("1"))
    return named.scalar_subquery().is_(None)


@prepared
def _orphaned_jobs(model: Model, _dialect: str) -> sa.Select[Any]:
    """Read the jobs whose lease was deleted by hand and lock them, by an index that has only the running jobs."""
    jobs = table_of(model).alias("j")
    no_end = sa.cast(sa.null(), model.__leases__.c.expires_at.type)
    columns = (jobs.c.id, jobs.c.kind, jobs.c.attempts, jobs.c.lease, jobs.c.worker, jobs.c.started_at, no_end)
    # A range: before ANALYZE the planner expects one row in two hundred of it. Of IS NOT NULL it expects all rows.
    claimed = jobs.c.lease.between(constant(-_TOKEN_MAX), constant(_TOKEN_MAX))
    return (
        sa.select(*columns)
        .where(claimed, _lease_is_gone(model, jobs))
        .order_by(jobs.c.lease)
        .limit(sa.bindparam("limit", type_=sa.Integer()))
        .with_for_update(skip_locked=True, key_share=True)
    )


def _orphaned_update(model: Model, jobs: Any, _held: Any, dialect: str) -> sa.Update:
    """Record outcomes of jobs that still name the lease that was deleted: none has come under its number meanwhile."""

    def conditions(wanted: Any) -> list[Any]:
        same = jobs.c.lease.is_not_distinct_from(wanted.c.token)
        return [jobs.c.id == wanted.c.id, same, _lease_is_gone(model, jobs)]

    return outcome_update(jobs, dialect, conditions)


_FINISH_ORPHANED = FencedWrite(_orphaned_update, ends=False)


@prepared
def _forgotten(model: Model, dialect: str) -> Any:
    """Delete expired leases that no job names: those of cancelled jobs, and what a dead process left."""
    jobs, leases = table_of(model).alias("j"), model.__leases__
    expired = leases.alias("l")
    # A subquery and no NOT EXISTS: that becomes a join, which before ANALYZE reads the whole job table. And no LIMIT 1:
    # where most jobs share a lease, the planner would look for one by reading the table, and find none.
    named = sa.select(sa.func.count()).where(jobs.c.lease == expired.c.token)
    tokens = (
        sa.select(expired.c.token)
        .where(expired.c.expires_at < now_of(dialect), named.scalar_subquery() == constant(0))
        .order_by(expired.c.expires_at, expired.c.token)
        .limit(sa.bindparam("limit", type_=sa.Integer()))
    )
    if dialect == POSTGRES:
        tokens = tokens.with_for_update(skip_locked=True, of=expired)
    return sa.delete(leases).where(in_rows(leases.c.token, tokens, dialect)).returning(leases.c.token)
