"""Claim jobs: pick queued ones, make their leases, start them.

One lease serves all jobs of a claim, and the record of each names it. An exclusive job has a lease of its own, which holds
the lock of its target too; the lock stands until the worker has stopped or the lease expires, even if the job is cancelled
before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import count, repeat
from typing import Any, NoReturn

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, aggregate_order_by
from sqlalchemy.dialects.postgresql import insert as insert_on_postgres
from sqlalchemy.orm import Session

from mljobs._values import check_count, check_lease, check_seconds, from_millis, to_member
from mljobs.db._answers import Answer
from mljobs.errors import TargetLockedError
from mljobs.jobs._base import (
    Bind,
    JobRef,
    M,
    Model,
    connection_of,
    id_of,
    is_postgres,
    lock_sqlite,
    model_and_id,
    own_table_of,
    per_model,
    table_of,
)
from mljobs.jobs._claims import Claim, ClaimedRows, Lease, UnreadJob
from mljobs.jobs._picking import pick_statement, queued_jobs, with_limit
from mljobs.jobs._records import is_ml_job, loaded
from mljobs.jobs._refusals import refusal_and_start, state_of
from mljobs.jobs._refusing import ROUNDS, start_refusal, unless_target_taken, without_waiting
from mljobs.jobs._starting import LEASE_COLUMNS, lease_values, place_of, start_in_turn
from mljobs.jobs._statements import constant, expiry_of, in_rows, moments
from mljobs.jobs._transitions import start_values
from mljobs.record._models import MlJob
from mljobs.record._values import worker_name
from mljobs.states import MlJobStatus
from mljobs.types import JobId

DEFAULT_LEASE = 60.0
"""Seconds that a claim lasts without renewal."""
MAX_BATCH = 10_000
"""The most jobs that one statement claims, renews or finishes."""
_LOCK_TIMEOUT = 0.25
_BEFORE_RECORD = 2
"""The columns before the record's in a row of ``claim_rows``: how many jobs were picked, and the end of the lease."""


def claim(
    session: Bind,
    *,
    worker: str,
    kinds: Iterable[str] | None = None,
    limit: int = 1,
    lease: float = DEFAULT_LEASE,
    skip: Iterable[JobRef] = (),
    lock_timeout: float | None = None,
    model: type[M] = MlJob,  # type: ignore[assignment]
) -> list[Claim[M]]:
    """Start queued jobs that nobody holds, the highest priority first, then the oldest.

    Each becomes running with progress 0 and one more attempt. Jobs whose ``run_after`` lies ahead wait; of an exclusive
    target one job runs at a time, and the jobs behind it do not wait for it.

    Args:
        session: The caller's session or connection; the claim is part of its transaction.
        worker: A name for operators to read, e.g. ``"host-1234"``.
        kinds: Only this one, or these; None for all.
        limit: At most so many, 1 to 10,000.
        lease: Seconds until the claims end unless they are renewed.
        skip: Jobs that stay queued, or their ids: those that a ``StartRefusedError`` named, say.
        lock_timeout: PostgreSQL: seconds to wait for an open transaction that is taking the target of an exclusive job;
            after them no exclusive job is claimed in this call. It stands until the transaction ends. None waits as
            long as the session's own ``lock_timeout`` says.
        model: The mapped job class.

    Returns:
        The claims, in the order of the queue; empty when there is nothing to do.

    Raises:
        InvalidValueError: An argument is out of range.
        StartRefusedError: One job cannot be started; nothing was claimed.
    """
    which, parameters = claim_parameters(model, worker, kinds, limit, lease, skip, lock_timeout)
    if parameters["kinds"] == []:
        return []
    return claim_by_parameters(session, model, which, parameters, limit)


def claim_parameters(  # noqa: PLR0917 - those of claim
    model: Model,
    worker: str,
    kinds: Iterable[str] | None,
    limit: int,
    lease: float,
    skip: Iterable[JobRef],
    lock_timeout: float | None,
) -> tuple[str, dict[str, Any]]:
    """Return the name of the statement that claims what ``claim`` was asked for, and its parameters.

    The name is one word for what is picked (``any``, ``kind``, ``kinds``, ``ids``), then ``skip`` and ``timeout`` where
    these arguments are given, then ``shared`` where no exclusive job is picked: ``"kinds skip"``.

    Raises:
        InvalidValueError: An argument is out of range.
    """
    own_table_of(model)
    if isinstance(kinds, str):
        kinds = [kinds]
    tokens = None if kinds is None else sorted({to_member(model.__kinds__, "kinds", kind).value for kind in kinds})
    parameters = {"worker": worker_name(worker), "kinds": tokens, **moments(check_lease(lease))}
    check_count("limit", limit, MAX_BATCH)
    more = ""
    if skipped := list(map(id_of, skip)):
        more, parameters = f"{more} skip", {**parameters, "skip": skipped}
    if lock_timeout is not None:
        check_seconds("lock_timeout", lock_timeout, above_zero=True)
        more, parameters = f"{more} timeout", {**parameters, "lock_timeout": _milliseconds(lock_timeout)}
    if tokens is None:  # all kinds that this release knows are not all kinds: a newer one may have queued others
        return f"any{more}", parameters
    if len(tokens) == 1:
        return f"kind{more}", {**parameters, "kind": tokens[0]}
    return f"kinds{more}", parameters


def _milliseconds(seconds: float) -> str:
    return str(max(1, int(seconds * 1000)))


def claim_one(
    session: Bind,
    job: JobRef,
    *,
    worker: str,
    lease: float = DEFAULT_LEASE,
    model: type[M] = MlJob,  # type: ignore[assignment]
) -> Claim[M]:
    """Start this job, if it is queued and its target is free, whatever its ``run_after`` is.

    Args:
        session: The caller's session or connection; the claim is part of its transaction.
        job: The job or its id.
        worker: A name for operators to read.
        lease: Seconds until the claim ends unless it is renewed.
        model: The mapped job class.

    Raises:
        JobNotFound: No record has this id.
        TerminalStateError: It has finished.
        InvalidTransitionError: It is running already.
        TargetLockedError: It is exclusive, and another job holds its target.
        StartRefusedError: Its row cannot be read as the class, or the database refuses the write; it stays queued.
    """
    model, job_id = model_and_id(job, model)
    own_table_of(model)
    parameters = {"worker": worker_name(worker), "ids": [job_id], **moments(check_lease(lease))}
    claims = claim_by_parameters(session, model, "ids", parameters, 1)
    if claims:
        return claims[0]
    connection = connection_of(session, model)
    if state_of(connection, model, job_id) is MlJobStatus.QUEUED:
        raise TargetLockedError(job_id)
    raise refusal_and_start(connection, model, job_id, MlJobStatus.RUNNING)[0]


# --------------------------------------------------------------------------------------------------------- the claim


def claim_by_parameters(
    session: Bind, model: Model, which: str, parameters: dict[str, Any], limit: int
) -> list[Claim[Any]]:
    """Claim by the statement and the parameters that ``claim_parameters`` returns."""
    connection = connection_of(session, model)
    claim_some = _on_postgres if is_postgres(connection) else _on_sqlite
    claims: list[Claim[Any]] = []
    # A picked job gets no lease if its exclusive target was taken in the same moment: pick another one in its place.
    for _ in range(ROUNDS):
        parameters["limit"] = limit - len(claims)
        try:
            started, picked = claim_some(session, connection, model, which, parameters)
        except Exception as error:  # noqa: BLE001 - is raised again
            if claims:  # these are ours; the next call meets the error
                break
            raise_refusal(session, connection, model, which, parameters, error)
        claims += started
        if len(started) == picked or len(claims) == limit:
            break
    return claims


def raise_refusal(  # noqa: PLR0917 - internal, called twice
    session: Bind, connection: sa.Connection, model: Model, which: str, parameters: dict[str, Any], error: Exception
) -> NoReturn:
    """Raise the error that names the job for which a claim failed; ``error`` itself if it failed for another reason."""
    which_of_these = "ids timeout"
    of_these = {"lock_timeout": _milliseconds(_LOCK_TIMEOUT), **parameters}

    def pick() -> list[Any]:
        found: dict[Any, None] = {}
        for one in (which, f"{which} shared"):  # either may have failed, see without_waiting
            rows = pick_statement(model, one, parameters["limit"]).rows(connection, parameters)
            found |= dict.fromkeys(row[0] for row in rows)
        return list(found)

    def attempt(ids: Sequence[Any]) -> object:
        asked = {**of_these, "ids": ids, "limit": max(1, len(ids))}
        if is_postgres(connection):
            return _started(connection, connection, model, which_of_these, asked)
        return _on_sqlite(connection, connection, model, which_of_these, asked)

    refused = start_refusal(connection, model, error, pick, attempt)
    if refused is None:
        raise error
    if isinstance(session, Session):
        session.expire_all()  # it may have read jobs as running whose start was undone
    raise refused from error


def _on_postgres(
    session: Bind, connection: sa.Connection, model: Model, which: str, parameters: dict[str, Any]
) -> tuple[list[Claim[Any]], int]:
    return without_waiting(
        which,
        lambda which: unless_target_taken(connection, lambda: _started(session, connection, model, which, parameters)),
    )


def _started(
    session: Bind, connection: sa.Connection, model: Model, which: str, parameters: dict[str, Any]
) -> tuple[list[Claim[Any]], int]:
    statement = _claim_statement(model, which, parameters["limit"])
    answer = statement.answer(connection, parameters)
    first = answer.row(0)
    return claims_of(session, model, answer, lease_period(model, first), parameters["worker"]), first[0]


def _on_sqlite(
    session: Bind, connection: sa.Connection, model: Model, which: str, parameters: dict[str, Any]
) -> tuple[list[Claim[Any]], int]:
    """Run the parts of the statement in turn, under the write lock: no target can be taken meanwhile."""
    lock_sqlite(connection, model)

    def started() -> tuple[list[Claim[Any]], int]:
        answer, picked = start_in_turn(connection, model, which, parameters)
        period = from_millis(parameters["now"]), from_millis(parameters["expires"])
        return claims_of(session, model, answer, period, parameters["worker"], before=0), picked

    # For a host's class in a savepoint: if its types cannot read a row, the start is undone, and the job at fault is found.
    return started() if is_ml_job(model) else unless_target_taken(connection, started)


def claims_of(
    session: Bind,
    model: Model,
    answer: Answer,
    period: tuple[datetime, datetime],
    worker: str,
    *,
    before: int = _BEFORE_RECORD,
) -> list[Claim[Any]]:
    """Return claims in the order of the rows. Their records are members of ``session``, unless it is a connection.

    Args:
        session: The caller's session or connection.
        model: The mapped job class.
        answer: The rows of the claim's statement; a row without an id where nothing was started.
        period: When the leases begin and end, the same for all.
        worker: The name that the claims are made under.
        before: How many columns stand before the record's in a row.
    """
    ids = answer.column(before + place_of(model, "id"))
    if not ids or ids[0] is None:
        return []
    kinds, tokens = answer.column(before + place_of(model, "kind")), answer.column(before + place_of(model, "lease"))
    acquired_at, expires_at = period
    of_lease: dict[int, list[int]] = {}
    for token, job_id in zip(tokens, ids, strict=True):
        of_lease.setdefault(token, []).append(job_id.int)
    leases = {token: Lease(model, token, acquired_at, job_ids) for token, job_ids in of_lease.items()}
    rows = ClaimedRows(model, answer, _record_in_row(model, before))
    jobs: Iterable[Any]
    if isinstance(session, sa.Connection) and is_ml_job(model):
        jobs = map(UnreadJob, repeat(rows), count(), kinds)
    else:
        jobs = loaded(session, model, [rows.read(at) for at in range(len(answer))])
    held = map(leases.__getitem__, tokens)
    return list(map(Claim, jobs, ids, tokens, repeat(worker), repeat(expires_at), held))


@per_model
def _record_in_row(model: Model, before: int) -> slice:
    return slice(before, before + len(table_of(model).columns))


def lease_period(model: Model, first: Sequence[Any]) -> tuple[datetime, datetime]:
    """Return when the leases begin and end, from the first row of ``claim_rows``."""
    return first[_BEFORE_RECORD + place_of(model, "started_at")], first[1]


# ---------------------------------------------------------------------------------------------------- the statements


def claim_rows(model: Model, which: str, limit: Any, dialect: str, beside: sa.Subquery | None = None) -> sa.Select[Any]:
    """PostgreSQL: pick jobs, make their leases and start them in one statement.

    The jobs that start are found by an array of ids, and the token of an exclusive one by a JSON object with a key for each
    target. With joins instead, the planner, which cannot know how many jobs there will be, would read the whole table for
    one job, or compare each of five hundred jobs with each of five hundred leases.

    Returns:
        A row for each job that was started, in the order of the queue: how many were picked, the end of the lease, the
        record, and the columns of ``beside``, which has one row. Without a started job one row, whose record is NULL.
    """
    jobs: Any = table_of(model).alias("j")
    picked = queued_jobs(model, which, limit, dialect).with_for_update(skip_locked=True, key_share=True).cte("picked")
    by_queue = aggregate_order_by(picked.c.id, picked.c.priority.desc(), picked.c.created_at, picked.c.id)
    first = sa.func.array_agg(by_queue, type_=sa.ARRAY(JobId()))[constant(1)]
    exclusive: list[sa.ColumnElement[bool]] = [picked.c.exclusive]
    if "timeout" in which.split():
        # In force for the locks that this statement takes later. Only where a job is exclusive: others wait for none.
        timeout = sa.bindparam("lock_timeout", type_=sa.Text())
        exclusive.append(sa.func.set_config(constant("lock_timeout"), timeout, sa.true()).is_not(None))
    alone = (
        sa.select(picked.c.target_name, first.label("id")).where(*exclusive).group_by(picked.c.target_name).cte("alone")
    )
    leased = _leases_of(model, picked, alone, dialect)
    own = sa.select(sa.func.jsonb_object_agg(leased.c.target_lock, leased.c.token, type_=JSONB())).where(
        leased.c.target_lock.is_not(None)
    )
    of_own = own.scalar_subquery()[jobs.c.target_name].astext
    of_all = sa.select(leased.c.token).where(leased.c.target_lock.is_(None)).scalar_subquery()
    token = sa.case((jobs.c.exclusive, sa.cast(of_own, sa.BigInteger())), else_=of_all)
    ids = (
        sa.select(picked.c.id)
        .where(~picked.c.exclusive)
        .union_all(sa.select(alone.c.id).join(leased, leased.c.target_lock == alone.c.target_name))
    )
    begun = (
        sa.update(jobs)
        .where(in_rows(jobs.c.id, ids, dialect))
        .values(start_values(jobs, dialect, token))
        .returning(*jobs.columns)
        .cte("begun")
    )
    number = sa.select(sa.func.count().label("picked")).select_from(picked).subquery("number")
    source: Any = number if beside is None else number.join(beside, sa.true())
    more = () if beside is None else beside.columns
    rows = sa.select(number.c.picked, expiry_of(dialect).label("expires_at"), *begun.columns, *more)
    in_order = begun.c.priority.desc(), begun.c.created_at, begun.c.id
    return rows.select_from(source.outerjoin(begun, sa.true())).order_by(*in_order)


def _leases_of(model: Model, picked: sa.CTE, alone: sa.CTE, dialect: str) -> sa.CTE:
    """Return the INSERT of one lease for all jobs that are not exclusive, and of one for each target that is free."""
    leases = model.__leases__
    shared = sa.select(sa.cast(sa.null(), sa.Text()).label("target_lock")).where(
        sa.exists(1).where(~picked.c.exclusive)
    )
    locks = shared.union_all(sa.select(alone.c.target_name)).subquery("locks")
    # In one order, so that two claims which take several targets never deadlock.
    rows = sa.select(*lease_values(dialect, locks.c.target_lock)).order_by(locks.c.target_lock)
    insert = insert_on_postgres(leases).from_select(LEASE_COLUMNS, rows).on_conflict_do_nothing()
    return insert.returning(leases.c.token, leases.c.target_lock).cte("leased")


_claim_statement = with_limit(claim_rows)
