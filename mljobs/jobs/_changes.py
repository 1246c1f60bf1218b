"""Read the states of jobs, few columns of each: those that run, and slices in the order of creation or of end.

Every statement reads a range of an index, however large the table is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from mljobs._values import MAX_MS, from_millis, to_millis
from mljobs.db._prepared import Prepared
from mljobs.jobs._base import Bind, Model, connection_of, per_model, table_of
from mljobs.jobs._paging import Place
from mljobs.jobs._records import is_ml_job
from mljobs.jobs._statements import POSTGRES, any_of, constant, in_active_state
from mljobs.record._sql import epoch_millis
from mljobs.states import MlJobStatus

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
class Slice:
    """A part of the jobs in the order of creation or of end.

    Attributes:
        keys: A key of each job, one after the other; see ``key_of``.
        end: The first place after it; None where it reaches the end of the order.
        newest: The last time in the order; None where there are no jobs.
    """

    keys: bytes
    end: Place | None
    newest: datetime | None


KEY_BYTES: Final = 24
_MICROS_2000: Final = 946_684_800_000_000


def key_of(moment: datetime, job_id: UUID) -> bytes:
    """Return a time and an id as bytes of one length, which sort as they do: microseconds since 2000, and the id."""
    return (to_millis(moment) * 1000 - _MICROS_2000).to_bytes(8, signed=True) + job_id.bytes


def read_slice(bind: Bind, model: Model, start: Place, *, by_end: bool, size: int) -> Slice:
    """Return which jobs are in a slice.

    A job that has ended is in the order of end only; except where it ended before it was created, as a host may say.

    Args:
        bind: The caller's session or connection.
        model: The mapped job class.
        start: The first place.
        by_end: Whether in the order of end; else of creation.
        size: How many jobs are in it at most.
    """
    connection, end, newest = connection_of(bind, model), None, None
    places = {"moment": start[0], "id": start[1], "size": size}
    for latest, moment, job_id in _edges(model, by_end).rows(connection, places):
        if latest:
            newest = moment
        else:
            end = moment, job_id
    places["end_moment"], places["end_id"] = end or _END
    ((keys,),) = _rows(connection, places, _slice, model, by_end, connection.dialect.name)
    return Slice(bytes.fromhex(keys or "") if keys is None or isinstance(keys, str) else bytes(keys), end, newest)


@per_model
def _edges(model: Model, by_end: bool) -> Prepared:  # noqa: FBT001 - one of two
    """Return the statement for the last time in an order, and for the first place after a slice."""
    table = table_of(model)
    key = _key(table, by_end)
    ended = [table.c.finished_at.is_not(None)] if by_end else []
    last = sa.select(*key).where(*ended).order_by(*(column.desc() for column in key)).limit(constant(1))
    after = sa.select(*key).where(*ended, sa.tuple_(*key) >= _place(table)).order_by(*key)
    after = after.limit(constant(1)).offset(sa.bindparam("size", type_=sa.Integer()))
    found = [(constant(1), last.subquery()), (constant(0), after.subquery())]
    return Prepared(lambda _: sa.union_all(*(sa.select(latest.label("latest"), *rows.c) for latest, rows in found)))


def _slice(model: Model, by_end: bool, dialect_name: str) -> sa.Select[Any]:  # noqa: FBT001 - one of two
    """Return the statement for the keys of a slice, as one value: to make Python values of each took longer."""
    table = table_of(model)
    key = _key(table, by_end)
    # PostgreSQL takes the partial index only where its own condition stands in the statement.
    ended = [table.c.finished_at.is_not(None), table.c.finished_at >= table.c.created_at]
    mine = ended if by_end else [sa.func.coalesce(table.c.finished_at < table.c.created_at, sa.true())]
    place = sa.tuple_(*key)
    inner = _of(model, sa.select(*key)).where(place >= _place(table), place < _place(table, "end_"), *mine)
    moment, job_id = inner.order_by(*key).subquery("met").c
    if dialect_name == POSTGRES:
        in_bytes = sa.func.timestamptz_send(moment).concat(sa.func.uuid_send(job_id))
        return sa.select(sa.func.string_agg(in_bytes, sa.literal_column("''::bytea"), type_=sa.LargeBinary()))
    micros = epoch_millis(moment) * constant(1000) - sa.literal_column(str(_MICROS_2000))
    in_digits = sa.func.printf("%016x", micros).concat(sa.type_coerce(job_id, sa.String()))
    return sa.select(sa.func.group_concat(in_digits, ""))


def _key(table: sa.Table, by_end: bool) -> tuple[Any, Any]:  # noqa: FBT001 - one of two
    return (table.c.finished_at if by_end else table.c.created_at), table.c.id


def _place(table: sa.Table, prefix: str = "") -> Any:
    moment = sa.bindparam(f"{prefix}moment", type_=table.c.created_at.type)
    return sa.tuple_(moment, sa.bindparam(f"{prefix}id", type_=table.c.id.type))


def read_running(bind: Bind, model: Model, *, leased: bool) -> list[State]:
    """Return the states of the jobs that run.

    Args:
        bind: The caller's session or connection.
        model: The mapped job class.
        leased: Only those under a lease. The others are looked for among all that are queued, for lack of an index.
    """
    return [State(*row) for row in _rows(connection_of(bind, model), {}, _running, model, leased)]


def _running(model: Model, leased: bool) -> sa.Select[Any]:  # noqa: FBT001 - one of two
    table = table_of(model)
    under_lease = [table.c.status == constant(MlJobStatus.RUNNING), table.c.lease.is_not(None)]
    return _select(model).where(*(under_lease if leased else in_active_state(table, MlJobStatus.RUNNING)))


def read_states(bind: Bind, model: Model, ids: Sequence[UUID]) -> list[State]:
    """Return the states of these jobs."""
    connection = connection_of(bind, model)
    rows = _rows(connection, {"ids": list(ids)}, _states, model, connection.dialect.name)
    return [State(*row) for row in rows]


def _states(model: Model, dialect_name: str) -> sa.Select[Any]:
    return _select(model).where(_these(model, dialect_name))


def read_passing(bind: Bind, model: Model, ids: Sequence[UUID], where: Sequence[sa.ColumnElement[bool]]) -> list[UUID]:
    """Return which of these jobs pass."""
    connection = connection_of(bind, model)
    statement = _of(model, sa.select(table_of(model).c.id)).where(_these(model, connection.dialect.name), *where)
    return list(connection.scalars(statement, {"ids": list(ids)}))


def _these(model: Model, dialect_name: str) -> Any:
    job_id = table_of(model).c.id
    return any_of(job_id, "ids", job_id.type, dialect_name)


def _rows(
    connection: Connection,
    parameters: Mapping[str, Any],
    build: Callable[..., sa.Select[Any]],
    model: Model,
    *key: Any,
) -> Iterable[Sequence[Any]]:
    """Return the rows of the statement that ``build`` makes; of the plain record it is made once."""
    if not is_ml_job(model):
        return connection.execute(build(model, *key), parameters)
    return _prepared(model, build, *key).rows(connection, parameters)


@per_model
def _prepared(model: Model, build: Callable[..., sa.Select[Any]], *key: Any) -> Prepared:
    return Prepared(lambda _: build(model, *key))


def _select(model: Model) -> sa.Select[Any]:
    return _of(model, sa.select(*(table_of(model).c[name] for name in State._fields)))


def _of(model: Model, statement: sa.Select[Any]) -> sa.Select[Any]:
    """Return the statement, of a subclass for its own jobs only."""
    return statement if is_ml_job(model) else statement.select_from(model)
