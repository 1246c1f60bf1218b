"""Read jobs: one, a page, a target's history, or how many there are."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from inspect import signature
from typing import Any, Final, Literal, overload
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, func, literal, select, text, tuple_

from mljobs._values import from_millis, storable_text, to_job_id, to_member, to_millis, to_utc
from mljobs.errors import InvalidValueError, JobNotFound
from mljobs.guards._companions import companion_names, qualified_name, schema_of
from mljobs.jobs._base import (
    Bind,
    JobRef,
    Model,
    check_count,
    connection_of,
    is_postgres,
    named,
    plain,
    record,
    record_columns,
    session_on,
    table_of,
    whole,
    whole_table_of,
)
from mljobs.record._models import MlJob
from mljobs.states import ACTIVE, TERMINAL, MlJobStatus

MAX_PAGE = 10_000
"""The most jobs on one page."""
_SMALL = 50_000  # rows that PostgreSQL counts in a few milliseconds

Order = Literal["newest", "oldest"]


@dataclass(frozen=True, slots=True)
class Page(Sequence[MlJob]):
    """Jobs in order, and where the next page starts.

    Attributes:
        jobs: The jobs.
        cursor: Pass it as ``after`` for the next page; None on the last one.
    """

    jobs: tuple[MlJob, ...]
    cursor: str | None = None

    @overload
    def __getitem__(self, index: int) -> MlJob: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[MlJob]: ...
    def __getitem__(self, index: int | slice) -> MlJob | Sequence[MlJob]:
        return self.jobs[index]

    def __iter__(self) -> Iterator[MlJob]:
        return iter(self.jobs)

    def __len__(self) -> int:
        return len(self.jobs)


@dataclass(frozen=True, slots=True)
class Counts(Mapping[tuple[str, str], int]):
    """How many jobs of each kind are in each state: ``counts["train", "queued"]``, by member or token.

    Attributes:
        jobs: The figures; pairs that nobody has are 0.
        exact: Whether the figures of finished jobs are exact. Those of queued and running jobs always are.
    """

    jobs: Mapping[tuple[str, str], int]
    exact: bool

    def __getitem__(self, pair: tuple[str, str]) -> int:
        return self.jobs[pair]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.jobs)

    def __len__(self) -> int:
        return len(self.jobs)

    def total(self, *, kind: str | None = None, status: str | None = None) -> int:
        """Return the sum over a kind, a state, both or all."""
        return sum(
            jobs
            for (of_kind, in_status), jobs in self.jobs.items()
            if kind in (None, of_kind) and status in (None, in_status)
        )


def get(session: Bind, job: JobRef, *, model: Model = MlJob) -> MlJob:
    """Return the record as the database holds it now.

    Args:
        session: The caller's session or connection; in a session the job is a member of it.
        job: The job or its id.
        model: The mapped job class.

    Raises:
        JobNotFound: No record has this id.
    """
    model, job_id = named(job, model)
    for found in fetch(session, model, [_column(model, "id") == job_id], [], 1):
        return found
    raise JobNotFound(job_id)


def conditions(
    model: Model = MlJob,
    *,
    kind: str | Iterable[str] | None = None,
    status: str | Iterable[str] | None = None,
    target: str | None = None,
    target_prefix: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    finished_after: datetime | None = None,
    finished_before: datetime | None = None,
    error_contains: str | None = None,
) -> list[ColumnElement[bool]]:
    """Return the conditions that these filters stand for, to be combined with AND.

    Args:
        model: The mapped job class.
        kind: One kind or several.
        status: One state or several.
        target: The whole ``target_name``.
        target_prefix: Its beginning.
        created_after: At this time or later.
        created_before: Earlier than this time.
        finished_after: At this time or later.
        finished_before: Earlier than this time.
        error_contains: A part of ``error_message``, ASCII case ignored.

    Raises:
        InvalidValueError: A value is not one that its field can hold.
    """
    of = {name: _column(model, name) for name in ("kind", "status", "target_name", "error_message")}
    found: list[ColumnElement[bool]] = []
    if kind is not None:
        found.append(of["kind"].in_(_members(model.__kinds__, "kind", kind)))
    if status is not None:
        found.append(of["status"].in_(_members(MlJobStatus, "status", status)))
    if target is not None:
        found.append(of["target_name"] == storable_text("target", target))
    if target_prefix is not None:
        found.append(of["target_name"].startswith(storable_text("target_prefix", target_prefix), autoescape=True))
        # LIKE ignores ASCII case on SQLite.
        found.append(func.substr(of["target_name"], 1, len(target_prefix)) == literal(target_prefix))
    for field, name, moment in (
        ("created_at", "created_after", created_after),
        ("created_at", "created_before", created_before),
        ("finished_at", "finished_after", finished_after),
        ("finished_at", "finished_before", finished_before),
    ):
        if moment is not None:
            column, limit = _column(model, field), to_utc(name, moment)
            found.append(column >= limit if name.endswith("after") else column < limit)
    if error_contains is not None:
        found.append(of["error_message"].icontains(storable_text("error_contains", error_contains), autoescape=True))
    return found


FILTERS: Final = tuple(name for name in signature(conditions).parameters if name != "model")
"""The names of the filters."""


def named_conditions(model: Model, filters: Mapping[str, Any]) -> list[ColumnElement[bool]]:
    """Return the conditions that filters stand for whose names come from a caller.

    Raises:
        InvalidValueError: No such filter, or a value that it cannot take.
    """
    for name, value in filters.items():
        if name not in FILTERS:
            raise InvalidValueError(name, value, f"no such filter; there are {', '.join(FILTERS)}")
    return conditions(model, **filters)


def find(
    session: Bind,
    *,
    kind: str | Iterable[str] | None = None,
    status: str | Iterable[str] | None = None,
    target: str | None = None,
    target_prefix: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    finished_after: datetime | None = None,
    finished_before: datetime | None = None,
    error_contains: str | None = None,
    order: Order = "newest",
    limit: int = 50,
    after: str | None = None,
    model: Model = MlJob,
) -> Page:
    """Return a page of jobs, by time of creation.

    Args:
        session: The caller's session or connection; in a session the jobs are members of it.
        kind: One kind or several.
        status: One state or several.
        target: The whole ``target_name``.
        target_prefix: Its beginning.
        created_after: Created at this time or later.
        created_before: Created earlier than this time.
        finished_after: Finished at this time or later.
        finished_before: Finished earlier than this time.
        error_contains: A part of ``error_message``, ASCII case ignored.
        order: ``"newest"`` or ``"oldest"`` first.
        limit: At most so many jobs, 1 to 10,000.
        after: The ``cursor`` of the page before; pages stay in step while jobs come and go.
        model: The mapped job class.

    Raises:
        InvalidValueError: A value is not one that its field can hold, or ``after`` is no cursor of this order.
    """
    check_count("limit", limit, MAX_PAGE)
    if order not in ("newest", "oldest"):
        raise InvalidValueError("order", order, "expected 'newest' or 'oldest'")
    where = conditions(
        model,
        kind=kind,
        status=status,
        target=target,
        target_prefix=target_prefix,
        created_after=created_after,
        created_before=created_before,
        finished_after=finished_after,
        finished_before=finished_before,
        error_contains=error_contains,
    )
    created, key = _column(model, "created_at"), _column(model, "id")
    if after is not None:
        moment, job_id = read_cursor(after, order)
        here = tuple_(literal(moment, created.type), literal(job_id, key.type))
        where.append(tuple_(created, key) < here if order == "newest" else tuple_(created, key) > here)
    by = [created.desc(), key.desc()] if order == "newest" else [created.asc(), key.asc()]
    jobs = fetch(session, model, where, by, limit + 1)
    more = len(jobs) > limit
    return Page(tuple(jobs[:limit]), cursor_of(jobs[limit - 1], order) if more else None)


def history(
    session: Bind,
    target_name: str,
    *,
    kind: str | Iterable[str] | None = None,
    limit: int = 50,
    after: str | None = None,
    model: Model = MlJob,
) -> Page:
    """Return what was done on one target, the newest first.

    Args:
        session: The caller's session or connection.
        target_name: The whole name.
        kind: One kind or several.
        limit: At most so many jobs, 1 to 10,000.
        after: The ``cursor`` of the page before.
        model: The mapped job class.
    """
    return find(session, kind=kind, target=target_name, limit=limit, after=after, model=model)


def lineage(session: Bind, job: JobRef, *, model: Model = MlJob) -> list[MlJob]:
    """Return the job and those that it retries, the first attempt first.

    Args:
        session: The caller's session or connection.
        job: The job or its id.
        model: The mapped job class.

    Raises:
        JobNotFound: No record has this id.
    """
    model, job_id = named(job, model)
    found: Any = get(session, job_id, model=model)
    line, seen = [found], {found.id}
    while found.retry_of is not None and found.retry_of not in seen:
        try:
            found = get(session, found.retry_of, model=model)
        except JobNotFound:  # pruned since
            break
        line.append(found)
        seen.add(found.id)
    return line[::-1]


def counts(session: Bind, *, exact: bool = False, model: Model = MlJob) -> Counts:
    """Return how many jobs of each kind are in each state, within milliseconds at ten million finished jobs.

    Queued and running jobs are counted. Finished ones are exact on SQLite, which keeps counters by trigger, and on
    PostgreSQL below about 50,000 rows; above that PostgreSQL's statistics give them, as fresh as its last ANALYZE.

    Args:
        session: The caller's session or connection.
        exact: Count everything, however long it takes.
        model: The mapped job class.
    """
    table = whole_table_of(model)
    connection = connection_of(session)
    jobs: dict[tuple[str, str], int] = {(kind, status): 0 for kind in model.__kinds__ for status in MlJobStatus}
    estimate = None
    if not is_postgres(connection):
        finished = _sqlite_counters(connection, model)
        estimate = finished if not exact else None
        exact = True
    elif not exact:
        estimate = _postgres_statistics(connection, model)
    statement = select(table.c.kind, table.c.status, func.count()).group_by(table.c.kind, table.c.status)
    if estimate is not None:
        jobs.update(estimate)
        statement = statement.where(table.c.status.in_(ACTIVE))
    for kind, status, number in connection.execute(statement):
        jobs[kind, status] = number
    return Counts(jobs, exact or estimate is None)


# ------------------------------------------------------------------------------------------------------- the details


def _column(model: Model, name: str) -> Any:
    table_of(model)  # a clear error for what is no job class
    return getattr(model, name)


def _members(enum: type[StrEnum], field: str, value: str | Iterable[str]) -> list[StrEnum]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Iterable):
        raise InvalidValueError(field, value, "expected one or several of " + ", ".join(enum))
    return [to_member(enum, field, one) for one in values]


def fetch(
    bind: Bind, model: Model, where: Sequence[ColumnElement[bool]], order: Sequence[Any] = (), limit: int | None = None
) -> list[MlJob]:
    """Return the jobs for which all of ``where`` holds, each of the class that it is."""
    if isinstance(bind, Connection) and plain(model):
        rows = bind.execute(select(*record_columns(model)).where(*where).order_by(*order).limit(limit))
        return [record(model, row) for row in rows]
    if isinstance(bind, Connection):
        with session_on(bind) as session:
            jobs = fetch(session, model, where, order, limit)
            session.expunge_all()
        return jobs
    statement = whole(model).where(*where).order_by(*order).limit(limit)
    return list(bind.scalars(statement.execution_options(populate_existing=True)))


def cursor_of(job: Any, order: Order) -> str:
    """Return where the page after this job starts; of a record or a summary."""
    parts = json.dumps([order[0], to_millis(job.created_at), job.id.hex], separators=(",", ":"))
    return base64.urlsafe_b64encode(parts.encode()).decode().rstrip("=")


def read_cursor(cursor: str, order: Order) -> tuple[datetime, UUID]:
    """Return the creation time and id that a cursor holds.

    Raises:
        InvalidValueError: It is none, or of another order.
    """
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        direction, millis, digits = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        if direction != order[0] or isinstance(millis, bool) or not isinstance(millis, int):
            raise ValueError("of another order")  # noqa: TRY301 - told below like any other
        return from_millis(millis), to_job_id(digits)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidValueError("after", cursor, f"not a cursor of a page in {order} order") from error


def _sqlite_counters(connection: Connection, model: Model) -> dict[tuple[str, str], int]:
    table = table_of(model)
    preparer = connection.dialect.identifier_preparer
    name = preparer.quote(companion_names(table.name)["counts"])
    schema = schema_of(connection, table)
    qualified = f"{preparer.quote(schema)}.{name}" if schema else name
    rows = connection.execute(text(f"SELECT kind, status, jobs FROM {qualified}"))  # noqa: S608 - quoted identifiers
    kinds = model.__kinds__
    return {(kinds(kind), MlJobStatus(status)): jobs for kind, status, jobs in rows}


_STATISTICS = text("""\
SELECT greatest(c.reltuples, 0) * CASE WHEN c.relpages > 0
         THEN (pg_relation_size(c.oid) / current_setting('block_size')::bigint)::float8 / c.relpages ELSE 0 END,
       c.reltuples < 0, s.most_common_vals, s.most_common_freqs
FROM pg_class c
LEFT JOIN pg_stats_ext s ON s.statistics_schemaname = (SELECT nspname FROM pg_namespace WHERE oid = c.relnamespace)
  AND s.statistics_name = :statistics
WHERE c.oid = CAST(:relation AS regclass)""")


def _postgres_statistics(connection: Connection, model: Model) -> dict[tuple[str, str], int] | None:
    """Return estimates of the finished jobs; None where counting is as quick, or nothing is known yet."""
    table = table_of(model)
    asked = {"relation": qualified_name(connection, table), "statistics": companion_names(table.name)["statistics"]}
    row = connection.execute(_STATISTICS, asked).one()
    total, unknown, values, frequencies = row
    if unknown or values is None or total < _SMALL:
        return None
    found = {
        (kind, status): round(total * frequency)
        for (kind, status), frequency in zip(values, frequencies, strict=True)
        if status in TERMINAL
    }
    kinds = model.__kinds__
    return {(kinds(kind), MlJobStatus(status)): jobs for (kind, status), jobs in found.items()}
