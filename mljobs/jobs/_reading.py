"""Read jobs: one, a page, a target's history, or how many there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack, overload
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, func, select, text

from mljobs.errors import JobNotFound
from mljobs.guards._companions import companion_names, qualified_name, schema_of
from mljobs.jobs._base import Bind, JobRef, M, Model, connection_of, is_postgres, model_and_id, own_table_of, table_of
from mljobs.jobs._filters import Filter, Filters, Selection, Where, selection
from mljobs.jobs._paging import Order, Paging
from mljobs.jobs._records import is_ml_job, record, record_columns, select_all, session_on
from mljobs.record._html import jobs_html
from mljobs.record._models import MlJob
from mljobs.states import ACTIVE, TERMINAL, MlJobStatus, UnknownKind

_SMALL = 50_000  # rows that PostgreSQL counts in a few milliseconds


@dataclass(frozen=True, slots=True)
class Page(Sequence[M]):
    """Jobs in order, and where the next page starts.

    Attributes:
        jobs: The jobs.
        cursor: Pass it as ``after`` for the next page; None on the last one.
        scanned: How many jobs were looked at; None where all that could match were.
        complete: Whether the page is as full as it can be; otherwise there may be more jobs from ``cursor`` on.
    """

    jobs: tuple[M, ...]
    cursor: str | None = None
    scanned: int | None = None
    complete: bool = True

    @overload
    def __getitem__(self, index: int) -> M: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[M]: ...
    def __getitem__(self, index: int | slice) -> M | Sequence[M]:
        return self.jobs[index]

    def __iter__(self) -> Iterator[M]:
        return iter(self.jobs)

    def __len__(self) -> int:
        return len(self.jobs)

    def _repr_html_(self) -> str:
        return jobs_html(self.jobs, "" if self.cursor is None else "There are more: pass after=page.cursor.")


@dataclass(frozen=True, slots=True)
class Counts(Mapping[tuple[str, str], int]):
    """How many jobs of each kind are in each state: ``counts["train", "queued"]``, by member or token.

    Attributes:
        jobs: The figures; pairs that nobody has are 0.
        exact: Whether the figures of finished jobs are exact. Those of queued and running jobs always are.
        scanned: How many jobs were looked at; None where all that could match were.
        complete: Whether all were counted; otherwise only the latest ``scanned``.
    """

    jobs: Mapping[tuple[str, str], int]
    exact: bool
    scanned: int | None = None
    complete: bool = True

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        by_kind = {kind: None for kind, _ in self.jobs}
        lines = [
            f"{kind}: "
            + ", ".join(f"{status} {about if status in TERMINAL else ''}{self.jobs[kind, status]:,}" for status in have)
            for kind in by_kind
            if (have := [status for status in MlJobStatus if self.jobs.get((kind, status))])
        ]
        return "\n".join(lines) or "no jobs"

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


def get(session: Bind, job: JobRef, *, model: type[M] = MlJob) -> M:  # type: ignore[assignment]
    """Return the record as the database holds it now.

    Args:
        session: The caller's session or connection; in a session the job is a member of it.
        job: The job or its id.
        model: The mapped job class.

    Raises:
        JobNotFound: No record has this id.
    """
    model, job_id = model_and_id(job, model)
    for found in fetch(session, model, [table_of(model).c.id == job_id], [], 1):
        present: M = found
        return present
    raise JobNotFound(job_id)


def find(
    session: Bind,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    order: Order = "newest",
    limit: int = 50,
    after: str | None = None,
    scan: bool = False,
    model: type[M] = MlJob,  # type: ignore[assignment]
    **fields: Unpack[Filters],
) -> Page[M]:
    """Return a page of jobs, by time of creation.

    What no index serves (an error's text, say) is looked for among the next 100,000 jobs, and the page says if it
    reached no further: ``page.complete`` is False, and ``page.cursor`` goes on there.

    Args:
        session: The caller's session or connection; in a session the jobs are members of it.
        filter: A :class:`~mljobs.Filter`, or its text: ``"status:failed created:<2h"``.
        where: SQLAlchemy expressions of one's own beside it.
        order: ``"newest"`` or ``"oldest"`` first, by creation; ``"last_finished"`` or ``"first_finished"``, by end.
        limit: At most so many jobs, 1 to 10,000.
        after: The ``cursor`` of the page before; pages stay in step while jobs come and go.
        scan: Look at all jobs, however long it takes.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.

    Raises:
        InvalidValueError: A value is not one that its field can hold, or ``after`` is no cursor of this order.
    """
    chosen = selection(model, filter, where, fields)
    paging = Paging(session, chosen, order, limit)
    found = paging.find(lambda *what: fetch(session, model, *what), after=after, scan=scan)
    return Page(found.jobs, found.cursor, found.scanned, found.complete)


def history(
    session: Bind,
    target_name: str,
    *,
    kind: str | Iterable[str] | None = None,
    limit: int = 50,
    after: str | None = None,
    model: type[M] = MlJob,  # type: ignore[assignment]
) -> Page[M]:
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


def lineage(session: Bind, job: JobRef, *, model: type[M] = MlJob) -> list[M]:  # type: ignore[assignment]
    """Return the job with those that it retries before it, and those that retry it after it; the first attempt first.

    Args:
        session: The caller's session or connection.
        job: The job or its id.
        model: The mapped job class.

    Raises:
        JobNotFound: No record has this id.
    """
    model, job_id = model_and_id(job, model)
    line = up_to(session, job_id, model)
    table, last, seen = table_of(model), [line[-1].id], {found.id for found in line}
    while last:
        later = fetch(session, model, [table.c.retry_of.in_(last), table.c.id.not_in(seen)])
        line += sorted(later, key=lambda job: (job.created_at, job.id))
        last = [job.id for job in later]
        seen.update(last)
    return line


def up_to(session: Bind, job_id: UUID, model: type[M]) -> list[M]:
    """Return the job and those that it retries, the first attempt first.

    Raises:
        JobNotFound: No record has this id.
    """
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


def counts(
    session: Bind,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    exact: bool = False,
    model: type[M] = MlJob,  # type: ignore[assignment]
    **fields: Unpack[Filters],
) -> Counts:
    """Return how many jobs of each kind are in each state, within milliseconds at ten million finished jobs.

    Queued and running jobs are counted. Finished ones are exact on SQLite, which keeps counters by trigger, and on
    PostgreSQL below about 50,000 rows; above that PostgreSQL's statistics give them, as fresh as its last ANALYZE.
    With filters other than kinds and states the latest 100,000 jobs are counted: ``complete`` says whether that was all.

    Args:
        session: The caller's session or connection.
        filter: A :class:`~mljobs.Filter`, or its text.
        where: SQLAlchemy expressions of one's own beside it.
        exact: Count everything, however long it takes.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.
    """
    chosen = selection(model, filter, where, fields)
    if chosen.where or any(term.name not in ("kind", "status") for term in chosen.filter.terms):
        return _counted(session, chosen, exact=exact)
    found = _all_counts(session, exact=exact, model=model)
    if not chosen:
        return found
    wanted = {
        term.name: set(term.values) for term in chosen.filter.terms
    }  # a second term of one name narrows the first
    for term in chosen.filter.terms:
        wanted[term.name] &= set(term.values)
    kinds, states = wanted.get("kind"), wanted.get("status")
    chosen.conditions()  # refuses a kind that the class does not have
    kept = {
        (kind, status): number if (kinds is None or kind in kinds) and (states is None or status in states) else 0
        for (kind, status), number in found.items()
    }
    return replace(found, jobs=kept)


def _counted(session: Bind, chosen: Selection, *, exact: bool) -> Counts:
    """Count the jobs that pass, among all or the latest 100,000 that an index leads to."""
    table = own_table_of(chosen.model)
    paging = Paging(session, chosen)
    served, looked_at = paging.divided(sort_all=exact)
    latest = [] if exact else paging.latest(served)
    statement = select(table.c.kind, table.c.status, func.count()).where(*latest, *served, *looked_at)
    jobs: dict[tuple[str, str], int] = dict.fromkeys(_pairs(chosen.model), 0)
    for kind, status, number in connection_of(session, chosen.model).execute(
        statement.group_by(table.c.kind, table.c.status)
    ):
        jobs[kind, status] = number
    scanned = paging.reach if latest else None
    return Counts(jobs, exact=not latest, scanned=scanned, complete=not latest)


def _pairs(model: Model) -> list[tuple[str, str]]:
    return [(kind, status) for kind in model.__kinds__ for status in MlJobStatus]


def _all_counts(session: Bind, *, exact: bool, model: Model) -> Counts:
    table = own_table_of(model)
    connection = connection_of(session, model)
    jobs: dict[tuple[str, str], int] = dict.fromkeys(_pairs(model), 0)
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


def fetch(
    bind: Bind, model: Model, where: Sequence[ColumnElement[bool]], order: Sequence[Any] = (), limit: int | None = None
) -> list[Any]:
    """Return the jobs for which all of ``where`` holds, each of the class that it is."""
    if isinstance(bind, Connection) and is_ml_job(model):
        rows = bind.execute(select(*record_columns(model)).where(*where).order_by(*order).limit(limit))
        return [record(model, row) for row in rows]
    if isinstance(bind, Connection):
        with session_on(bind) as session:
            jobs = fetch(session, model, where, order, limit)
            session.expunge_all()
        return jobs
    statement = select_all(model).where(*where).order_by(*order).limit(limit)
    return list(bind.scalars(statement.execution_options(populate_existing=True)))


def _sqlite_counters(connection: Connection, model: Model) -> dict[tuple[str, str], int]:
    table = table_of(model)
    preparer = connection.dialect.identifier_preparer
    name = preparer.quote(companion_names(table.name)["counts"])
    schema = schema_of(connection, table)
    qualified = f"{preparer.quote(schema)}.{name}" if schema else name
    rows = connection.execute(text(f"SELECT kind, status, jobs FROM {qualified}"))  # noqa: S608 - quoted identifiers
    kinds = model.__kinds__
    return {(_kind(kinds, kind), MlJobStatus(status)): jobs for kind, status, jobs in rows}


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
    return {(_kind(kinds, kind), MlJobStatus(status)): jobs for (kind, status), jobs in found.items()}


def _kind(kinds: Any, token: str) -> str:
    member: str = kinds(token) if token in kinds._value2member_map_ else UnknownKind(token)
    return member
