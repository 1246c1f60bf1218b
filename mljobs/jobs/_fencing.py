"""How a worker writes into a record: only while the record names the worker's lease.

A write names the job and the token of its lease. Whoever takes a job away sets another lease, or none, in the record, so
the UPDATE finds no row; where PostgreSQL had to wait for the row, it checks the condition once more. A token alone could
come back, from a restarted sequence or a restored backup, so the lease must have the same ``acquired_at`` too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from mljobs.errors import LeaseLostError, TerminalStateError
from mljobs.jobs._base import Model, prepared, table_of
from mljobs.jobs._claims import Claim, Lease
from mljobs.jobs._refusals import refusal_and_start
from mljobs.jobs._statements import POSTGRES, SQLITE, Array, constant, in_rows, parameter_table, table_parameters
from mljobs.states import MlJobStatus
from mljobs.types import JobId

_WANTED, _LEASES = "wanted", "leases"
_JOB_ID, _TOKEN = attrgetter("job_id"), attrgetter("token")


@dataclass(frozen=True, slots=True)
class Written:
    """What a write has changed.

    Attributes:
        ids: The jobs that were written; None for all.
        tokens: The leases that stood when it began; not known where all were written.
    """

    ids: Collection[UUID] | None
    tokens: Collection[int]

    def __contains__(self, claim: Claim[Any]) -> bool:
        """Whether the job of this claim was written."""
        return self.ids is None or claim.job_id in self.ids


_ALL = Written(None, ())


def wanted_table(dialect: str, **columns: Any) -> Any:
    """Return the parameter table of a write: ``id`` and ``token`` of each claim, and further columns of values to write."""
    return parameter_table(_WANTED, dialect, id=JobId(), token=sa.BigInteger(), **columns)


def wanted_parameters(dialect: str, claims: Sequence[Claim[Any]], **columns: Sequence[Any]) -> dict[str, Any]:
    """Return the parameters of ``wanted_table``."""
    ids, tokens = list(map(_JOB_ID, claims)), list(map(_TOKEN, claims))
    return table_parameters(_WANTED, dialect, id=ids, token=tokens, **columns)


def lease_parameters(dialect: str, claims: Iterable[Claim[Any]]) -> dict[str, Any]:
    """Return the parameters of the leases of these claims: token, start, and whether the write ends their last job."""
    ids: set[int] = set()
    leases: dict[int, Lease] = {}
    for claim in claims:
        ids.add(claim.job_id.int)
        leases[claim.token] = claim.lease
    starts: list[datetime | None] = []
    empty: list[bool] = []
    for lease in leases.values():
        starts.append(lease.acquired_at)
        empty.append(lease.is_left_empty_without(ids))
    return table_parameters(_LEASES, dialect, token=list(leases), acquired_at=starts, empty=empty)


def standing_leases(model: Model, dialect: str) -> sa.Select[Any]:
    """Return ``token`` and ``empty`` of those leases of ``lease_parameters`` that the database still has."""
    leases = model.__leases__.alias("l")
    asked = parameter_table(
        _LEASES, dialect, token=sa.BigInteger(), acquired_at=leases.c.acquired_at.type, empty=sa.Boolean()
    )
    same = sa.and_(leases.c.token == asked.c.token, leases.c.acquired_at == asked.c.acquired_at)
    return sa.select(leases.c.token, asked.c.empty).join(asked, same)


def holds(jobs: Any, wanted: Any, held: Any, dialect: str) -> list[Any]:
    """Return the conditions of a write: the record names the lease, and the lease is the same one.

    ``IS NOT DISTINCT FROM`` is an ``=`` that no index serves. With ``=`` a plan could find the jobs by their lease, and
    would compare each job of a claim with each of its others. Only a running job has a lease, so the state is not asked.

    Args:
        jobs: The job table, or an alias.
        wanted: The ``wanted_table``.
        held: The ``standing_leases``, as a subquery or CTE.
        dialect: The dialect's name.
    """
    stands = in_rows(wanted.c.token, sa.select(held.c.token), dialect)
    if dialect == POSTGRES:
        # Of a comparison with a constant the planner expects one row in two hundred: one of the ten that it takes the
        # parameter table for.
        stands = sa.case((stands, constant(1))) == constant(1)
    return [jobs.c.id == wanted.c.id, jobs.c.lease.is_not_distinct_from(wanted.c.token), stands]


def delete_empty(model: Model, held: Any, written: sa.Select[Any] | None, dialect: str) -> sa.Delete:
    """Delete the leases that no job names any more, locked in the order of their tokens as a renewal locks them.

    Args:
        model: The mapped job class.
        held: The ``standing_leases``, as a subquery or CTE.
        written: Ids of jobs that leave their leases in the same statement.
        dialect: The dialect's name.
    """
    leases, others = model.__leases__, table_of(model).alias("o")
    standing = leases.alias("l")
    another = sa.exists(1).where(others.c.lease == standing.c.token)
    if written is not None:
        another = another.where(others.c.id.not_in(written))
    tokens = sa.select(standing.c.token).join(held, held.c.token == standing.c.token).where(held.c.empty, ~another)
    if dialect == POSTGRES:
        tokens = tokens.order_by(standing.c.token).with_for_update(of=standing)
    return sa.delete(leases).where(in_rows(leases.c.token, tokens, dialect))


Write = Callable[[Model, Any, Any, str], sa.Update]
"""Builds the UPDATE of a write: takes the model, an alias of its table, the CTE of ``standing_leases`` and the dialect."""


def one_statement(model: Model, write: Write, *, ends: bool) -> Any:
    """PostgreSQL: write in one statement.

    Args:
        model: The mapped job class.
        write: The UPDATE.
        ends: Whether the jobs leave their leases, and leases without jobs are deleted.

    Returns:
        One row: the ids that were written, and the tokens of the leases that stood; NULLs where all were written.
    """
    jobs = table_of(model).alias("j")
    held = standing_leases(model, POSTGRES).cte("held")
    written = write(model, jobs, held, POSTGRES).returning(jobs.c.id).cte("written")
    ids, tokens = sa.select(written.c.id), sa.select(held.c.token)
    fewer = sa.func.count() < sa.func.cardinality(sa.bindparam(f"{_WANTED}_id", type_=Array(JobId())))
    missed = sa.select(fewer.label("some")).select_from(written).subquery("missed")

    def found(values: sa.Select[Any], item: Any) -> Any:
        return sa.case((missed.c.some, sa.func.array(values.scalar_subquery(), type_=sa.ARRAY(item))))

    statement = sa.select(found(ids, JobId()).label("ids"), found(tokens, sa.BigInteger()).label("tokens"))
    return statement.add_cte(delete_empty(model, held, ids, POSTGRES).cte("released")) if ends else statement


def read_answer(row: Sequence[Any]) -> Written:
    """Return what the row of ``one_statement`` says."""
    ids, tokens = row
    return Written(ids, tokens or ())


class FencedWrite:
    """A write under leases: one statement on PostgreSQL, its parts in turn on SQLite.

    Args:
        write: The UPDATE.
        ends: Whether the jobs leave their leases, and leases without jobs are deleted.
    """

    def __init__(self, write: Write, *, ends: bool) -> None:
        self._ends = ends
        self.statement = prepared(lambda model, _: one_statement(model, write, ends=ends))
        self.part = prepared(lambda model, _: _update_part(model, write))

    def run(self, connection: sa.Connection, model: Model, parameters: dict[str, Any]) -> Written:
        """Write what the parameters say.

        On SQLite the UPDATE takes the write lock. The leases are read after it, and only where a job was not written.

        Args:
            connection: Where to write.
            model: The mapped job class.
            parameters: ``wanted_parameters``, ``lease_parameters``, and further parameters of the UPDATE.
        """
        if connection.dialect.name == POSTGRES:
            return read_answer(self.statement(model).rows(connection, parameters)[0])
        written = _ALL
        answer = self.part(model).answer(connection, parameters)
        wanted, *_ = parameters[_WANTED]
        if len(answer) < len(wanted):
            tokens = standing_statement(model).answer(connection, parameters).column(0)
            written = Written(set(answer.column(0)), set(tokens))
        *_, empty = parameters[_LEASES]
        if self._ends and any(empty):
            delete_statement(model).answer(connection, parameters)
        return written


def _update_part(model: Model, write: Write) -> sa.Update:
    jobs = table_of(model)
    return write(model, jobs, standing_leases(model, SQLITE).subquery("held"), SQLITE).returning(jobs.c.id)


standing_statement = prepared(standing_leases)


@prepared
def delete_statement(model: Model, dialect: str) -> sa.Delete:
    """SQLite: delete the leases that no job names any more."""
    return delete_empty(model, standing_leases(model, dialect).subquery("held"), None, dialect)


def explain(
    connection: sa.Connection, model: Model, claim: Claim[Any], written: Written, wanted: MlJobStatus
) -> TerminalStateError | LeaseLostError:
    """Return why a write has not changed the job of ``claim``: the job was cancelled, or the lease is gone.

    Args:
        connection: Where to look.
        model: The mapped job class.
        claim: The claim.
        written: What the write has changed.
        wanted: The status that it would have set.
    """
    if claim.token in written.tokens and not claim.ended:
        error, started_at = refusal_and_start(connection, model, claim.job_id, wanted)
        if isinstance(error, TerminalStateError) and started_at == claim.lease.acquired_at:
            return error
    return LeaseLostError(claim.job_id, claim.token)


def has_not_stopped(model: Model, jobs: Any) -> Any:
    """Return the condition that a job was cancelled and its worker still holds the lease.

    Args:
        model: The mapped job class.
        jobs: Its table, or an alias.
    """
    still = sa.exists().where(*_held_after_cancel(model.__leases__.alias("still"), jobs))
    return sa.and_(jobs.c.status == constant(MlJobStatus.CANCELLED), still)


def token_of(model: Model, jobs: Any) -> Any:
    """Return the expression for the token of a running job's lease; also of a cancelled one whose worker has not stopped.

    Args:
        model: The mapped job class.
        jobs: Its table, or an alias.
    """
    still = model.__leases__.alias("still")
    held = sa.select(sa.func.max(still.c.token)).where(*_held_after_cancel(still, jobs)).scalar_subquery()
    return sa.case((jobs.c.status == constant(MlJobStatus.CANCELLED), held), else_=jobs.c.lease)


def _held_after_cancel(leases: Any, jobs: Any) -> list[Any]:
    """Return the conditions for the lease of a cancelled job. Its record names no lease, but its worker and its start."""
    lock = sa.case((jobs.c.exclusive, jobs.c.target_name), else_=sa.null())
    return [
        leases.c.acquired_at == jobs.c.started_at,
        leases.c.worker == jobs.c.worker,
        leases.c.target_lock.is_not_distinct_from(lock),
    ]
