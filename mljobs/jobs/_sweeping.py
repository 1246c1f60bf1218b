"""Look after what nobody does any more: jobs whose worker fell silent, and finished records past their time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Unpack
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Connection,
    Integer,
    Select,
    String,
    Text,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    inspect,
    literal,
    null,
    select,
    tuple_,
    type_coerce,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from mljobs import events
from mljobs._values import to_member, to_utc, utc_now
from mljobs.db._prepared import Prepared
from mljobs.errors import InvalidValueError, MlJobsError
from mljobs.guards._retention import open_door
from mljobs.jobs._base import (
    Bind,
    Model,
    any_of,
    check_count,
    connection_of,
    constant,
    is_postgres,
    lock_sqlite,
    moments,
    now_of,
    per_model,
    refresh,
    table_of,
    unnested,
    whole_table_of,
)
from mljobs.jobs._filters import Filter, Filters, Where, conditions
from mljobs.record._models import MlJob
from mljobs.states import TERMINAL, MlJobStatus
from mljobs.types import JobId

_ATTEMPTS_MAX = 32_767
_BATCH_MAX = 10_000
_NO_PRIVILEGE = "42501"


@dataclass(frozen=True, slots=True)
class Rescue:
    """What a rescue did.

    Attributes:
        requeued: Jobs that are queued again.
        failed: Jobs that ended as failed, after too many attempts.
        released: Jobs that were not running any more; only their forgotten lease was removed.
        errors: Jobs that the database refused to change, with what it said. The others were rescued all the same.
    """

    requeued: list[UUID] = field(default_factory=list)
    failed: list[UUID] = field(default_factory=list)
    released: list[UUID] = field(default_factory=list)
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

    Decides on what stands at this moment: a lease that was renewed, or a job that was finished or claimed again since,
    is left alone, and two rescues at once never meet on one job. A job is only ever rescued because its worker is
    silent, never because it is long; a job that was started by hand has no lease and is never rescued.

    Args:
        session: The caller's session or connection.
        max_attempts: A job that was started so often, or more, fails instead, with the reason; 1 to 32,767.
        kinds: Which may fail so, this one or these; jobs of other kinds are only requeued. None for all.
        limit: At most so many in one call, 1 to 10,000; the longest expired first.
        model: The mapped job class.

    Returns:
        What became of each; one job that the database refuses to change does not stop the others.
    """
    whole_table_of(model)
    check_count("max_attempts", max_attempts, _ATTEMPTS_MAX)
    check_count("limit", limit, _BATCH_MAX)
    connection = connection_of(session, model)
    if isinstance(kinds, str):
        kinds = [kinds]
    tokens = [to_member(model.__kinds__, "kinds", kind).value for kind in (model.__kinds__ if kinds is None else kinds)]
    parameters = {**moments(), "max_attempts": max_attempts, "kinds": tokens}
    leases = _expired(model).rows(connection, {**parameters, "limit": limit})
    outcome = Rescue()
    if not leases:
        return outcome
    if not is_postgres(connection):
        lock_sqlite(connection, model)

    def sweep(part: Sequence[tuple[Any, ...]]) -> None:
        _rescue_some(connection, model, part, parameters, outcome)

    for lease, error in _one_bad_row_stops_nothing(connection, leases, sweep):
        outcome.errors[lease[1]] = error
    refresh(session, model, [*outcome.requeued, *outcome.failed])
    if outcome.failed and events.subscribed():
        events.add_finished(session, model, outcome.failed)
    return outcome


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a prune goes on: after this record, by time of its end, or of its creation where none is known."""

    ended: bool
    moment: datetime | None = None
    job_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Pruned:
    """What one batch of a prune did.

    Attributes:
        deleted: How many records are gone.
        cursor: Pass it as ``after`` for the next batch; None after the last one.
    """

    deleted: int
    cursor: Cursor | None


def prune(
    session: Bind,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    older_than: timedelta | datetime,
    keep_last: int = 0,
    batch: int = 1000,
    model: Model = MlJob,
    **fields: Unpack[Filters],
) -> int:
    """Delete finished records past their time, through the retention door; nothing else is ever deleted.

    A job whose lease still stands (cancelled, its worker not yet stopped) is left for later. So is one that the database
    refuses to delete, because a host's row refers to it, say.

    Args:
        session: The caller's session or connection.
        filter: A :class:`~mljobs.Filter`, or its text: only these.
        where: SQLAlchemy expressions of one's own beside it.
        older_than: Finished longer ago than this, on PostgreSQL by the database's clock, or before this time.
        keep_last: Of each kind and target, keep so many of the latest finished.
        batch: How many to delete in one statement, 1 to 10,000.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.

    Returns:
        How many were deleted.

    Raises:
        InvalidValueError: An argument is out of range.
        ProgrammingError: The role may not delete.
    """
    total, after = 0, None
    limit = _limit_of(session, model, older_than)
    while True:
        done = prune_batch(
            session,
            filter,
            where=where,
            older_than=limit,
            keep_last=keep_last,
            batch=batch,
            after=after,
            model=model,
            **fields,
        )
        total += done.deleted
        after = done.cursor
        if after is None:
            return total


def prune_batch(
    session: Bind,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    older_than: timedelta | datetime,
    keep_last: int = 0,
    batch: int = 1000,
    after: Cursor | None = None,
    model: Model = MlJob,
    **fields: Unpack[Filters],
) -> Pruned:
    """Delete one batch of what ``prune`` deletes, so that the caller may commit after each.

    Args:
        session: The caller's session or connection.
        filter: A :class:`~mljobs.Filter`, or its text: only these.
        where: SQLAlchemy expressions of one's own beside it.
        older_than: Finished longer ago than this, on PostgreSQL by the database's clock, or before this time.
        keep_last: Of each kind and target, keep so many of the latest finished.
        batch: How many to look at, 1 to 10,000.
        after: The ``cursor`` of the batch before.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.
    """
    check_count("batch", batch, _BATCH_MAX)
    if isinstance(keep_last, bool) or not isinstance(keep_last, int) or keep_last < 0:
        raise InvalidValueError("keep_last", keep_last, "expected an int of at least 0")
    limit = _limit_of(session, model, older_than)
    after = after or Cursor(ended=True)
    connection = connection_of(session, model)
    if not is_postgres(connection):
        lock_sqlite(connection, model)
    table = whole_table_of(model)
    # Imported records may have ended without saying when: these come last, by their creation.
    moment = table.c.finished_at if after.ended else table.c.created_at
    statement = _prunable(model, moment, after.ended, keep_last).where(moment < limit)
    statement = statement.where(*conditions(model, filter, where=where, **fields))
    if after.moment is not None:
        here = tuple_(literal(after.moment, moment.type), literal(after.job_id, table.c.id.type))
        statement = statement.where(tuple_(moment, table.c.id) > here)
    rows = connection.execute(statement.limit(batch)).all()
    deleted = _delete_finished(session, connection, model, [row[0] for row in rows]) if rows else 0
    if len(rows) == batch:
        return Pruned(deleted, Cursor(after.ended, rows[-1][1], rows[-1][0]))
    return Pruned(deleted, Cursor(ended=False) if after.ended else None)


def prunable(
    session: Bind,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    older_than: timedelta | datetime,
    keep_last: int = 0,
    model: Model = MlJob,
    **fields: Unpack[Filters],
) -> int:
    """Return how many records ``prune`` would delete, however long it takes to count them.

    Args:
        session: The caller's session or connection.
        filter: A :class:`~mljobs.Filter`, or its text: only these.
        where: SQLAlchemy expressions of one's own beside it.
        older_than: Finished longer ago than this, on PostgreSQL by the database's clock, or before this time.
        keep_last: Of each kind and target, keep so many of the latest finished.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.
    """
    table, limit, total = whole_table_of(model), _limit_of(session, model, older_than), 0
    chosen = conditions(model, filter, where=where, **fields)
    if keep_last:  # by one sort of all: the subquery that serves a batch would look back for each record anew
        ended = func.coalesce(table.c.finished_at, table.c.created_at)
        place = func.row_number().over(
            partition_by=(table.c.kind, table.c.target_name), order_by=(ended.desc(), table.c.id.desc())
        )
        ranked = select(table.c.id, place.label("place")).where(table.c.status.in_(TERMINAL)).subquery()
        chosen.append(table.c.id.in_(select(ranked.c.id).where(ranked.c.place > keep_last)))
    for known, moment in ((True, table.c.finished_at), (False, table.c.created_at)):
        some = _prunable(model, moment, known, 0).where(moment < limit, *chosen).order_by(None).subquery()
        total += connection_of(session, model).scalar(select(func.count()).select_from(some)) or 0
    return total


# ------------------------------------------------------------------------------------------------------- the details


def _one_bad_row_stops_nothing(
    connection: Connection, rows: Sequence[Any], sweep: Callable[[Sequence[Any]], None]
) -> Iterator[tuple[Any, Exception]]:
    """Sweep all rows at once; if the database refuses, one by one, yielding those that it refuses."""
    error = _attempt(connection, rows, sweep)
    if error is None:
        return
    if len(rows) == 1:
        yield rows[0], error
        return
    for row in rows:
        error = _attempt(connection, [row], sweep)
        if error is not None:
            yield row, error


def _attempt(connection: Connection, rows: Sequence[Any], sweep: Callable[[Sequence[Any]], None]) -> Exception | None:
    savepoint = connection.begin_nested()
    try:
        sweep(rows)
    except (DBAPIError, MlJobsError) as error:
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            raise
        savepoint.rollback()
        if getattr(getattr(error, "orig", None), "sqlstate", None) == _NO_PRIVILEGE:
            raise  # no matter of this row: the role may do it to none
        return error
    except BaseException:
        savepoint.rollback()
        raise
    savepoint.commit()
    return None


def _rescue_some(
    connection: Connection,
    model: Model,
    leases: Sequence[tuple[Any, ...]],
    parameters: dict[str, Any],
    outcome: Rescue,
) -> None:
    rows = _end_expired(model).rows(connection, {**parameters, "tokens": [lease[0] for lease in leases]})
    changed: dict[UUID, MlJobStatus] = {}
    limit = parameters["max_attempts"]
    reasons = {
        job_id: f"gave up after {limit} attempts: the lease of worker {worker} expired at {expires_at:%Y-%m-%d %H:%M:%S} UTC"
        for job_id, worker, expires_at in rows
    }
    if is_postgres(connection):
        lists = {**parameters, "ids": list(reasons), "reasons": list(reasons.values())}
        changed.update(_rescue_statement(model).rows(connection, lists) if rows else ())
    else:
        for job_id, reason in reasons.items():
            changed.update(_rescue_statement(model).rows(connection, {**parameters, "ids": job_id, "reasons": reason}))
    for job_id in reasons:
        status = changed.get(job_id)
        if status is None:
            outcome.released.append(job_id)
        elif status is MlJobStatus.FAILED:
            outcome.failed.append(job_id)
        else:
            outcome.requeued.append(job_id)


@per_model
def _expired(model: Model) -> Prepared:
    leases = model.__leases__
    return Prepared(
        lambda dialect: (
            select(leases.c.token, leases.c.job_id)
            .where(leases.c.expires_at < now_of(dialect))
            .order_by(leases.c.expires_at, leases.c.token)
            .limit(bindparam("limit", type_=Integer()))
            .with_for_update(skip_locked=True)
        )
    )


@per_model
def _end_expired(model: Model) -> Prepared:
    leases = model.__leases__
    return Prepared(
        lambda dialect: (
            delete(leases)
            .where(any_of(leases.c.token, "tokens", BigInteger(), dialect), leases.c.expires_at < now_of(dialect))
            .returning(leases.c.job_id, leases.c.worker, leases.c.expires_at)
        )
    )


@per_model
def _rescue_statement(model: Model) -> Prepared:
    def build(dialect: str) -> Any:
        jobs = table_of(model)
        job_id: Any = bindparam("ids", type_=JobId())
        reason: Any = bindparam("reasons", type_=Text())
        if dialect == "postgresql":
            gone = unnested("gone", ids=JobId(), reasons=Text())
            job_id, reason = gone.c.ids, gone.c.reasons
        spent = and_(
            jobs.c.attempts >= bindparam("max_attempts", type_=Integer()),
            any_of(type_coerce(jobs.c.kind, String()), "kinds", String(), dialect),
        )
        values = {
            "status": case(
                (spent, constant(MlJobStatus.FAILED)),
                else_=constant(MlJobStatus.QUEUED),
            ),
            "progress": case((spent, jobs.c.progress), else_=constant(0)),
            "started_at": case((spent, jobs.c.started_at), else_=null()),
            "finished_at": case((spent, now_of(dialect)), else_=null()),
            "error_message": case((spent, reason), else_=jobs.c.error_message),
        }
        return (
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.status == constant(MlJobStatus.RUNNING))
            .values(values)
            .returning(jobs.c.id, jobs.c.status)
        )

    return Prepared(build)


def _limit_of(session: Bind, model: Model, older_than: timedelta | datetime) -> datetime:
    """Return the time before which a job must have finished, on PostgreSQL by the database's clock."""
    if not isinstance(older_than, timedelta):
        return to_utc("older_than", older_than)
    if older_than < timedelta(0):
        raise InvalidValueError(
            "older_than", older_than, "a span is not negative; timedelta(0) is all that has finished"
        )
    connection = connection_of(session, model)
    now: datetime = utc_now()
    if is_postgres(connection):
        now = connection.execute(select(now_of("postgresql"))).scalar_one()
    try:
        # What finished in this very millisecond has finished no less than 0 ago.
        return to_utc("older_than", now - older_than) + timedelta(milliseconds=1)
    except OverflowError as error:
        raise InvalidValueError("older_than", older_than, "that is before the year 1") from error


def _prunable(model: Model, moment: Any, known: bool, keep_last: int) -> Select[Any]:  # noqa: FBT001 - private
    jobs, leases = table_of(model), model.__leases__
    statement = (
        select(jobs.c.id, moment)
        .where(jobs.c.status.in_(TERMINAL), ~exists().where(leases.c.job_id == jobs.c.id))
        .where(jobs.c.finished_at.is_not(None) if known else jobs.c.finished_at.is_(None))
        .order_by(moment, jobs.c.id)
    )
    if keep_last:
        later = jobs.alias("later")
        ended = func.coalesce(later.c.finished_at, later.c.created_at)
        nth = (
            select(later.c.id)
            .where(
                later.c.kind == jobs.c.kind,
                later.c.target_name == jobs.c.target_name,
                later.c.status.in_(TERMINAL),
                tuple_(ended, later.c.id) > tuple_(moment, jobs.c.id),
            )
            .correlate(jobs)
            .limit(1)
            .offset(keep_last - 1)
        )
        statement = statement.where(nth.exists())
    return statement


def _delete_finished(session: Bind, connection: Connection, model: Model, ids: Sequence[UUID]) -> int:
    table = table_of(model)
    deleted: list[UUID] = []

    def sweep(part: Sequence[UUID]) -> None:
        connection.execute(delete(table).where(table.c.id.in_(part)))
        deleted.extend(part)

    with open_door(connection, table):
        for _ in _one_bad_row_stops_nothing(connection, ids, sweep):
            pass
    if isinstance(session, Session):
        mapper = inspect(model)
        for job_id in deleted:
            held = session.identity_map.get(mapper.identity_key_from_primary_key((job_id,)))
            if held is not None:
                session.expunge(held)
    return len(deleted)
