"""Delete finished records past their time, by retention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Unpack
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session

from mljobs._values import check_count, to_utc, utc_now
from mljobs.errors import InvalidValueError
from mljobs.guards._retention import deletable
from mljobs.jobs._base import Bind, Model, connection_of, is_postgres, lock_sqlite, own_table_of, table_of
from mljobs.jobs._batches import all_batches
from mljobs.jobs._fencing import has_not_stopped
from mljobs.jobs._filters import Filter, Filters, Where, conditions
from mljobs.jobs._savepoints import row_by_row
from mljobs.jobs._statements import POSTGRES, now_of
from mljobs.record._models import MlJob
from mljobs.states import TERMINAL

_BATCH_MAX = 10_000


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

    @property
    def changed(self) -> int:
        """How many records are gone, as of any batch."""
        return self.deleted


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
    """Delete finished records past their time, by retention; nothing else is ever deleted.

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
    options: dict[str, Any] = {"keep_last": keep_last, "batch": batch, "model": model, **fields}
    limit = _limit_of(session, model, older_than)
    return all_batches(partial(prune_batch, session, filter, where=where, older_than=limit, **options))


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
    table = own_table_of(model)
    # Imported records may have ended without saying when: these come last, by their creation.
    moment = table.c.finished_at if after.ended else table.c.created_at
    statement = _prunable(model, moment, after.ended, keep_last).where(moment < limit)
    statement = statement.where(*conditions(model, filter, where=where, **fields))
    if after.moment is not None:
        here = sa.tuple_(sa.literal(after.moment, moment.type), sa.literal(after.job_id, table.c.id.type))
        statement = statement.where(sa.tuple_(moment, table.c.id) > here)
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
    table, limit, total = own_table_of(model), _limit_of(session, model, older_than), 0
    chosen = conditions(model, filter, where=where, **fields)
    if keep_last:  # by one sort of all: the subquery that serves a batch would look back for each record anew
        ended = sa.func.coalesce(table.c.finished_at, table.c.created_at)
        place = sa.func.row_number().over(
            partition_by=(table.c.kind, table.c.target_name), order_by=(ended.desc(), table.c.id.desc())
        )
        ranked = sa.select(table.c.id, place.label("place")).where(table.c.status.in_(TERMINAL)).subquery()
        chosen.append(table.c.id.in_(sa.select(ranked.c.id).where(ranked.c.place > keep_last)))
    for known, moment in ((True, table.c.finished_at), (False, table.c.created_at)):
        some = _prunable(model, moment, known, 0).where(moment < limit, *chosen).order_by(None).subquery()
        total += connection_of(session, model).scalar(sa.select(sa.func.count()).select_from(some)) or 0
    return total


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
        now = connection.execute(sa.select(now_of(POSTGRES))).scalar_one()
    try:
        # What finished in this very millisecond has finished no less than 0 ago.
        return to_utc("older_than", now - older_than) + timedelta(milliseconds=1)
    except OverflowError as error:
        raise InvalidValueError("older_than", older_than, "that is before the year 1") from error


def _prunable(model: Model, moment: Any, known: bool, keep_last: int) -> sa.Select[Any]:  # noqa: FBT001 - private
    jobs = table_of(model)
    statement = (
        sa.select(jobs.c.id, moment)
        .where(jobs.c.status.in_(TERMINAL), ~has_not_stopped(model, jobs))
        .where(jobs.c.finished_at.is_not(None) if known else jobs.c.finished_at.is_(None))
        .order_by(moment, jobs.c.id)
    )
    if keep_last:
        later = jobs.alias("later")
        ended = sa.func.coalesce(later.c.finished_at, later.c.created_at)
        nth = (
            sa.select(later.c.id)
            .where(
                later.c.kind == jobs.c.kind,
                later.c.target_name == jobs.c.target_name,
                later.c.status.in_(TERMINAL),
                sa.tuple_(ended, later.c.id) > sa.tuple_(moment, jobs.c.id),
            )
            .correlate(jobs)
            .limit(1)
            .offset(keep_last - 1)
        )
        statement = statement.where(nth.exists())
    return statement


def _delete_finished(session: Bind, connection: sa.Connection, model: Model, ids: Sequence[UUID]) -> int:
    table = table_of(model)
    deleted: list[UUID] = []

    def sweep(part: Sequence[UUID]) -> None:
        # Not the ids that were given: a host's trigger may keep some of them without an error.
        gone = sa.delete(table).where(table.c.id.in_(part)).returning(table.c.id)
        deleted.extend(connection.scalars(gone))

    with deletable(connection, table):
        for _ in row_by_row(connection, ids, sweep):
            pass
    if isinstance(session, Session):
        mapper = sa.inspect(model)
        for job_id in deleted:
            held = session.identity_map.get(mapper.identity_key_from_primary_key((job_id,)))
            if held is not None:
                session.expunge(held)
    return len(deleted)
