"""Cancel or retry many jobs: batch by batch, so that each can be committed, stopped, and run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack
from uuid import UUID

from sqlalchemy import ColumnElement, exists, select

from mljobs.db._binds import resolve
from mljobs.errors import InvalidValueError
from mljobs.jobs._base import Bind, Model, connection_of, is_postgres, lock_sqlite, own_table_of, table_of
from mljobs.jobs._filters import Filter, Filters, Selection, Where, selection
from mljobs.jobs._finishing import cancel
from mljobs.jobs._paging import Paging
from mljobs.jobs._reading import Counts, counts
from mljobs.jobs._retrying import retry
from mljobs.jobs._savepoints import row_by_row
from mljobs.record._models import MlJob
from mljobs.states import ACTIVE, MlJobStatus

Action = Literal["cancel", "retry"]
"""What can be done to many jobs by a filter."""

BATCH = 500
"""Jobs in a batch, where the caller says nothing."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one batch did.

    Attributes:
        jobs: The jobs that were cancelled, or those that were retried.
        errors: Jobs with which it was not possible, with the reason; the others were done all the same.
        cursor: Pass it as ``after`` for the next batch; None after the last one.
    """

    jobs: tuple[UUID, ...]
    errors: Mapping[UUID, Exception] = field(default_factory=dict)
    cursor: str | None = None

    @property
    def changed(self) -> int:
        """How many jobs were cancelled or retried."""
        return len(self.jobs)


def affected(
    session: Bind,
    action: Action,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    exact: bool = True,
    model: Model = MlJob,
    **fields: Unpack[Filters],
) -> Counts:
    """Return how many jobs an action would change, by kind and state: what to show before it is done.

    Args:
        session: The caller's session or connection.
        action: ``"cancel"`` or ``"retry"``.
        filter: A :class:`~mljobs.Filter`, or its text.
        where: SQLAlchemy expressions of one's own beside it.
        exact: Count everything, however long it takes; otherwise as ``counts`` does.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.
    """
    chosen = changed_by(action, selection(model, filter, where, fields))
    return counts(session, chosen.filter, where=chosen.where, exact=exact, model=model)


def cancel_batch(
    session: Bind,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    everything: bool = False,
    batch: int = BATCH,
    after: str | None = None,
    model: Model = MlJob,
    **fields: Unpack[Filters],
) -> Batch:
    """Cancel the queued and running jobs of one batch, the oldest first; jobs that finish meanwhile are left as they are.

    Args:
        session: The caller's session or connection.
        filter: A :class:`~mljobs.Filter`, or its text.
        where: SQLAlchemy expressions of one's own beside it.
        everything: Say so where there is no filter at all.
        batch: How many at most, 1 to 10,000.
        after: The ``cursor`` of the batch before.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.

    Raises:
        InvalidValueError: No filter, and ``everything`` was not said.
    """
    chosen = _meant("cancel", selection(model, filter, where, fields), everything=everything)
    return _each(session, chosen, batch, after, lambda job_id: cancel(session, job_id, model=model))


def retry_batch(
    session: Bind,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    everything: bool = False,
    batch: int = BATCH,
    after: str | None = None,
    unless_active: bool = False,
    model: Model = MlJob,
    **fields: Unpack[Filters],
) -> Batch:
    """Retry the failed and cancelled jobs of one batch, the oldest first; those that were retried before are left out.

    Completed jobs are retried only where the filter says ``status:completed``.

    Args:
        session: The caller's session or connection.
        filter: A :class:`~mljobs.Filter`, or its text.
        where: SQLAlchemy expressions of one's own beside it.
        everything: Say so where there is no filter at all.
        batch: How many at most, 1 to 10,000.
        after: The ``cursor`` of the batch before.
        unless_active: Leave out those of whose kind and target a job is queued or running.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.

    Raises:
        InvalidValueError: No filter, and ``everything`` was not said.
    """
    chosen = _meant("retry", selection(model, filter, where, fields), everything=everything)

    def act(job_id: UUID) -> bool:
        again = retry(session, job_id, again=True, unless_active=unless_active, model=model)
        return bool(again.retry_of == job_id)  # otherwise another job is at work

    return _each(session, chosen, batch, after, act)


def _meant(action: Action, chosen: Selection, *, everything: bool) -> Selection:
    own_table_of(chosen.model)
    if not chosen and not everything:
        raise InvalidValueError("filter", None, f"without one this would {action} all jobs: say everything=True")
    return changed_by(action, chosen)


def changed_by(action: Action, chosen: Selection) -> Selection:
    """Return the selection with what the action needs: a state that allows it, no retry yet."""
    if action == "cancel":
        return Selection(chosen.filter & Filter(status=ACTIVE), chosen.where, chosen.model)
    named = {value for term in chosen.filter.terms if term.name == "status" for value in term.values}
    states = [MlJobStatus.FAILED, MlJobStatus.CANCELLED]
    if MlJobStatus.COMPLETED in named:
        states.append(MlJobStatus.COMPLETED)
    return Selection(chosen.filter & Filter(status=states), (*chosen.where, _not_retried(chosen.model)), chosen.model)


def _not_retried(model: Model) -> ColumnElement[bool]:
    jobs = table_of(model)
    later = jobs.alias("later")
    return ~exists(select(later.c.id).where(later.c.retry_of == jobs.c.id).correlate(jobs))


def _each(session: Bind, chosen: Selection, batch: int, after: str | None, act: Callable[[UUID], object]) -> Batch:
    """Act on each job of a batch, the oldest first; one with which it is not possible does not stop the others."""
    table = table_of(chosen.model)
    connection = connection_of(session, chosen.model)
    if not is_postgres(connection):
        lock_sqlite(connection, chosen.model)

    def read(where: Sequence[ColumnElement[bool]], order: Sequence[Any], most: int) -> list[Any]:
        statement = select(table.c.id, table.c.created_at).where(*where).order_by(*order).limit(most)
        return list(connection.execute(statement))

    found = Paging(session, chosen, "oldest", batch).find(read, after=after, scan=False)
    done: list[UUID] = []
    errors: dict[UUID, Exception] = {}

    def act_on(rows: Sequence[Any]) -> None:
        done.extend([row.id for row in rows if act(row.id)])

    for row, error in row_by_row(resolve(session), found.jobs, act_on):
        errors[row.id] = error
    return Batch(tuple(done), errors, found.cursor)
