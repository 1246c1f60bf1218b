"""The SELECT of the jobs that a claim may start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from mljobs.db._prepared import HOLE, Prepared
from mljobs.jobs._base import Model, per_model, prepared, table_of
from mljobs.jobs._statements import any_of, constant, now_of
from mljobs.states import MlJobStatus
from mljobs.types import JobId

_INLINE_MAX = 128


def queued_jobs(model: Model, which: str, limit: Any, dialect: str) -> sa.Select[Any]:
    """Return the jobs that a claim may start.

    Args:
        model: The mapped job class.
        which: What to pick, see ``claim_parameters``.
        limit: The expression for how many at most.
        dialect: The dialect's name.
    """
    jobs, leases = table_of(model).alias("j"), model.__leases__
    running = table_of(model).alias("r")
    taken = sa.or_(
        sa.exists(1).where(leases.c.target_lock == jobs.c.target_name),
        # Started by hand, without a lease.
        sa.exists(1).where(
            running.c.target_name == jobs.c.target_name,
            running.c.exclusive,
            running.c.status == constant(MlJobStatus.RUNNING),
        ),
    )
    by, *more = which.split()
    condition: list[sa.ColumnElement[bool]] = [jobs.c.status == constant(MlJobStatus.QUEUED)]
    condition.append(~jobs.c.exclusive if "shared" in more else ~sa.and_(jobs.c.exclusive, taken))
    if "skip" in more:
        condition.append(~any_of(jobs.c.id, "skip", JobId(), dialect))
    if by == "ids":
        condition.append(any_of(jobs.c.id, "ids", JobId(), dialect))
    else:
        condition.append(sa.or_(jobs.c.run_after.is_(None), jobs.c.run_after <= now_of(dialect)))
    kind = sa.type_coerce(jobs.c.kind, sa.String())
    if (
        by == "kind"
    ):  # an index that begins with the kind serves it: one job behind a million of another kind is found at once
        condition.append(kind == sa.bindparam("kind", type_=sa.String()))
    elif by == "kinds":
        condition.append(any_of(kind, "kinds", sa.String(), dialect))
    return (
        sa.select(jobs.c.id, jobs.c.exclusive, jobs.c.target_name, jobs.c.priority, jobs.c.created_at)
        .where(*condition)
        .order_by(jobs.c.priority.desc(), jobs.c.created_at, jobs.c.id)
        .limit(limit)
    )


def with_limit(build: Callable[[Model, str, Any, str], sa.Select[Any]]) -> Callable[[Model, str, int], Prepared]:
    """Return a function of model, name and limit that returns the statement.

    The limit stands in the text. For a parameter PostgreSQL's generic plan would expect a tenth of the queue, so the server
    would plan anew each time. A rare limit, which is not worth a statement of its own, is the parameter ``limit``.

    Args:
        build: Takes the model, what to pick, the limit as an expression, and the dialect's name.
    """

    @prepared
    def template(model: Model, which: str, inline: bool, dialect: str) -> sa.Select[Any]:  # noqa: FBT001 - internal
        limit: Any = sa.literal_column(HOLE, sa.Integer()) if inline else sa.bindparam("limit", type_=sa.Integer())
        return build(model, which, limit, dialect)

    @per_model
    def filled(model: Model, which: str, limit: int) -> Prepared:
        return template(model, which, True).filled(limit)

    def statement(model: Model, which: str, limit: int) -> Prepared:
        frequent = limit <= _INLINE_MAX or limit.bit_count() == 1
        return filled(model, which, limit) if frequent else template(model, which, False)

    return statement


def _picked(model: Model, which: str, limit: Any, dialect: str) -> sa.Select[Any]:
    return queued_jobs(model, which, limit, dialect).with_for_update(skip_locked=True, key_share=True)


pick_statement = with_limit(_picked)
"""Returns the statement for the jobs that a claim may start, and locks them on PostgreSQL."""
