"""Read the states of jobs, few columns of each: those that run, and slices in the order of creation or of end.

Every statement reads a range of an index, however large the table is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa

from mljobs._values import MAX_MS, from_millis
from mljobs.db._prepared import Prepared
from mljobs.jobs._base import Bind, Model, connection_of, is_plain_record, per_model, table_of
from mljobs.jobs._paging import Place
from mljobs.jobs._statements import constant, in_active_state
from mljobs.states import MlJobStatus

Conditions = Sequence[sa.ColumnElement[bool]]

FIRST_ID: Final = UUID(int=0)
_END: Final = (from_millis(MAX_MS), UUID(int=2**128 - 1))


class State(NamedTuple):
    """A job as a look sees it."""

    id: UUID
    status: MlJobStatus
    progress: int
    attempts: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class Slices:
    """What was read.

    Attributes:
        states: The jobs that pass.
        ends: For each slice the first place after it; None where it reaches the end of the order.
        newest: For each slice the last time in its order, of all jobs.
    """

    states: list[State]
    ends: list[Place | None]
    newest: list[datetime | None]


def read_slices(
    bind: Bind,
    model: Model,
    where: Conditions,
    starts: Sequence[tuple[bool, Place]],
    size: int,
    *,
    running: str = "none",
) -> Slices:
    """Return the states in some slices, each of ``size`` jobs at most, before the conditions are applied.

    A job that has ended is in the order of end only; except where it ended before it was created, as a host may say.

    Args:
        bind: The caller's session or connection.
        model: The mapped job class.
        where: What jobs have to pass.
        starts: Where the slices start: whether in the order of end, or else of creation, and the first place in it.
        size: How many jobs are looked at in each.
        running: Which running jobs are read too: ``"none"``; those under a ``"lease"``; ``"all"``, for which it looks at all
            queued ones too, for lack of an index.
    """
    connection, orders = connection_of(bind, model), tuple(by_end for by_end, _ in starts)
    places: dict[str, Any] = {"size": size}
    for number, (_, place) in enumerate(starts):
        places[f"moment{number}"], places[f"id{number}"] = place
    ends: list[Place | None] = [None] * len(starts)
    newest: list[datetime | None] = [None] * len(starts)
    for number, latest, moment, job_id in _edges(model, orders).rows(connection, places):
        if latest:
            newest[number] = moment
        else:
            ends[number] = (moment, job_id)
    for number, end in enumerate(ends):
        places[f"end_moment{number}"], places[f"end_id{number}"] = end or _END
    if where or not is_plain_record(model):
        found: Any = connection.execute(_states(model, orders, running, where), places)
    else:
        found = _all_states(model, orders, running).rows(connection, places)
    return Slices([State(*row) for row in found], ends, newest)


@per_model
def _edges(model: Model, orders: tuple[bool, ...]) -> Prepared:
    """Return the statement for the last time in each order, and for the first place after each slice."""
    table, parts = table_of(model), []
    for number, by_end in enumerate(orders):
        key = _key(table, by_end)
        ended = [table.c.finished_at.is_not(None)] if by_end else []
        last = sa.select(*key).where(*ended).order_by(*(column.desc() for column in key)).limit(constant(1))
        after = sa.select(*key).where(*ended, sa.tuple_(*key) >= _place(table, "", number)).order_by(*key)
        after = after.limit(constant(1)).offset(sa.bindparam("size", type_=sa.Integer()))
        for latest, statement in ((1, last), (0, after)):
            found = statement.subquery()
            parts.append(sa.select(constant(number).label("number"), constant(latest).label("latest"), *found.c))
    return Prepared(lambda _: sa.union_all(*parts))


@per_model
def _all_states(model: Model, orders: tuple[bool, ...], running: str) -> Prepared:
    return Prepared(lambda _: _states(model, orders, running, ()))


def _states(model: Model, orders: Sequence[bool], running: str, where: Conditions) -> Any:
    """Return the statement for the jobs that pass in each slice, and for those that run."""
    table, parts = table_of(model), list[Any]()
    if running == "all":
        parts.append(in_active_state(table, MlJobStatus.RUNNING))
    elif running == "lease":
        parts.append([table.c.status == constant(MlJobStatus.RUNNING), table.c.lease.is_not(None)])
    for number, by_end in enumerate(orders):
        key = sa.tuple_(*_key(table, by_end))
        # PostgreSQL takes the partial index only where its own condition stands in the statement.
        not_by_end = sa.func.coalesce(table.c.finished_at < table.c.created_at, sa.true())
        mine = table.c.finished_at.is_not(None) if by_end else not_by_end
        parts.append([key >= _place(table, "", number), key < _place(table, "end_", number), mine])
    return sa.union_all(*(_select(model).where(*part, *where) for part in parts))


def _key(table: sa.Table, by_end: bool) -> tuple[Any, Any]:  # noqa: FBT001 - one of two
    return (table.c.finished_at if by_end else table.c.created_at), table.c.id


def _place(table: sa.Table, prefix: str, number: int) -> Any:
    return sa.tuple_(
        sa.bindparam(f"{prefix}moment{number}", type_=table.c.created_at.type),
        sa.bindparam(f"{prefix}id{number}", type_=table.c.id.type),
    )


def read_states(bind: Bind, model: Model, where: Conditions, ids: Sequence[UUID]) -> list[tuple[State, bool]]:
    """Return the states of these jobs, and whether each passes."""
    passes = sa.case((sa.and_(sa.true(), *where), constant(1)), else_=constant(0))
    statement = _select(model).add_columns(passes).where(table_of(model).c.id.in_(ids))
    return [(State(*row[:-1]), bool(row[-1])) for row in connection_of(bind, model).execute(statement)]


def _select(model: Model) -> sa.Select[Any]:
    table = table_of(model)
    statement = sa.select(*(table.c[name] for name in State._fields))
    return statement if is_plain_record(model) else statement.select_from(model)  # of a subclass its own jobs only
