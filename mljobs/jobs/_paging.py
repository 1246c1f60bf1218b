"""Pages of jobs in the order of creation or of end. Without an index only a bounded number of jobs is looked at."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from time import perf_counter
from typing import Any, Final, Literal, get_args
from uuid import UUID

from sqlalchemy import ColumnElement, Subquery, and_, false, func, literal, select, tuple_, union_all

from mljobs._values import check_count, from_millis, to_job_id, to_millis
from mljobs.errors import InvalidValueError
from mljobs.jobs._base import Bind, connection_of, is_postgres, table_of
from mljobs.jobs._filters import Selection
from mljobs.jobs._serving import Range, branches, divided
from mljobs.states import ACTIVE

MAX_PAGE = 10_000
"""The most jobs on one page."""
WINDOWS = (1000, 9000, 90_000)
"""Jobs that are looked at in one statement, one after the other."""
_ALWAYS = 2  # windows that are looked at whatever time they take
_STEP = 1000
_FEW = 10_000  # jobs that are sorted in a few milliseconds

Order = Literal["newest", "oldest", "last_finished", "first_finished"]
"""By creation, or by end, which leaves out what has not finished."""
ORDERS: Final = get_args(Order)
_DOWNWARDS: Final = ("newest", "last_finished")
Place = tuple[datetime, UUID]
"""Where a job stands in the order: its creation, or its end, and its id."""
Reader = Callable[[Sequence[ColumnElement[bool]], Sequence[Any], int], list[Any]]
"""Reads what passes conditions, in an order, at most so many."""


@dataclass(frozen=True, slots=True)
class Found:
    """The jobs of a page, where the next one starts, at how many jobs was looked, and whether that was enough."""

    jobs: tuple[Any, ...]
    cursor: str | None
    scanned: int | None = None
    complete: bool = True


class Paging:
    """Reads one page of the jobs that are selected.

    Args:
        session: The caller's session or connection.
        chosen: Which jobs.
        order: See ``Order``.
        limit: At most so many jobs, 1 to 10,000.
    """

    def __init__(self, session: Bind, chosen: Selection, order: Order = "newest", limit: int = 1) -> None:
        check_count("limit", limit, MAX_PAGE)
        if order not in ORDERS:
            raise InvalidValueError("order", order, f"expected {' or '.join(map(repr, ORDERS))}")
        table = table_of(chosen.model)
        self._session = session
        self._chosen = chosen
        self._order = order
        self._limit = limit
        self._by_end = order.endswith("finished")
        self._key: tuple[Any, Any] = (table.c.finished_at if self._by_end else table.c.created_at, table.c.id)
        at_work = any(term.name == "status" and set(term.values) <= set(ACTIVE) for term in chosen.filter.terms)
        if at_work and not is_postgres(connection_of(session, chosen.model)):
            self._sort_few()  # SQLite would look for them among all that finished

    @property
    def _by(self) -> list[Any]:
        return [column.desc() if self._order in _DOWNWARDS else column.asc() for column in self._key]

    def _sort_few(self) -> None:
        """Order by expressions that no index has: few jobs pass, and by an index in this order all would be looked at."""
        moment, job_id = self._key
        self._key = (func.coalesce(moment, moment, type_=moment.type), func.coalesce(job_id, job_id, type_=job_id.type))

    def find(self, read: Reader, *, after: str | None, scan: bool, seconds: float | None = None) -> Found:
        """Return the page.

        Args:
            read: Reads the jobs.
            after: The cursor of the page before.
            scan: Look at all jobs, however long it takes.
            seconds: Look no further after about so long; at 10,000 jobs at least. None for no limit.

        Raises:
            InvalidValueError: ``after`` is no cursor of this order.
        """
        start = None if after is None else read_cursor(after, self._order)
        branches = self._branches()
        if branches:
            return self._merge(read, branches, start)
        served, looked_at = self.divided(sort_all=scan)
        if not scan and looked_at:
            return self._look(read, served, looked_at, start, seconds)
        where = [*self._between(start, None), *served, *looked_at]
        return self._full(read(where, self._by, self._limit + 1), None)

    def count(self, most: int) -> int:
        """Return how many jobs are selected, or ``most`` where it is as many or more."""
        number = 0
        for branch in self._branches() or [self]:
            served, looked_at = branch.divided(sort_all=True)
            # In the order of an index: PostgreSQL would read the table from its beginning, where the newest jobs are not.
            number += self._number([*served, *looked_at], most - number, branch._by)  # noqa: SLF001 - of this class
            if number >= most:
                break
        return number

    def divided(self, *, sort_all: bool) -> tuple[list[ColumnElement[bool]], list[ColumnElement[bool]]]:
        """Return the conditions that an index serves, and those for which each job has to be looked at.

        Args:
            sort_all: Take what is only served where few jobs pass as served.
        """
        parts = divided(self._chosen, by_end=self._by_end)
        ranges = [condition for each in parts.ranges for condition in each.conditions]
        few = next(filter(self._few, parts.ranges), None)
        if few is not None:
            self._sort_few()
            job_id = table_of(self._chosen.model).c.id
            # By themselves, or SQLite would rather read the whole table than look up what it takes for many.
            ranges.append(job_id.in_(union_all(*(select(job_id).where(*each) for each in few.alternatives))))
        elif not sort_all:
            return parts.served, self._without_index([*ranges, *parts.looked_at])
        return [*parts.served, *ranges], parts.looked_at

    def _without_index(self, looked_at: list[ColumnElement[bool]]) -> list[ColumnElement[bool]]:
        """Return the conditions so that no index serves them: SQLite would take one for a window of another."""
        if not looked_at or is_postgres(connection_of(self._session, self._chosen.model)):
            return looked_at
        return [func.coalesce(and_(*looked_at), false())]

    @property
    def reach(self) -> int:
        """How many jobs are looked at unless ``scan`` is given."""
        return sum(WINDOWS)

    def latest(self, served: Sequence[ColumnElement[bool]]) -> list[ColumnElement[bool]]:
        """Return the condition for the next 100,000 jobs in the order; none where there are no more."""
        return self._between(None, self._place(served, None, self.reach))

    def _full(self, jobs: Sequence[Any], scanned: int | None) -> Found:
        kept = tuple(jobs[: self._limit])
        cursor = cursor_of(kept[-1], self._order) if len(jobs) > self._limit else None
        return Found(kept, cursor, scanned)

    def _branches(self) -> list[Paging]:
        chosen = [] if self._by_end else branches(self._chosen)
        return [Paging(self._session, one, self._order, self._limit) for one in chosen]

    def _merge(self, read: Reader, branches: Sequence[Paging], start: Place | None) -> Found:
        """Read each branch in order by its own index, and the first of all."""
        most = self._limit + 1
        merged = union_all(*(select(branch._part(start)) for branch in branches)).subquery()  # noqa: SLF001 - of this class
        by = [column.desc() if self._order in _DOWNWARDS else column.asc() for column in merged.c]
        ids = select(merged.c[1]).order_by(*by).limit(most)
        self._sort_few()
        return self._full(read([table_of(self._chosen.model).c.id.in_(ids)], self._by, most), None)

    def _part(self, start: Place | None) -> Subquery:
        """Return the places of the first jobs after ``start``."""
        served, _ = self.divided(sort_all=False)
        places = select(*self._key).where(*self._between(start, None), *served)
        return places.order_by(*self._by).limit(self._limit + 1).subquery()

    def _few(self, found: Range) -> bool:
        number = 0
        for each in found.alternatives:
            number += self._number(each, _FEW + 1 - number, ())
            if number > _FEW:
                return False
        return True

    def _number(self, where: Sequence[ColumnElement[bool]], most: int, by: Sequence[Any]) -> int:
        some = select(table_of(self._chosen.model).c.id).where(*where).order_by(*by).limit(most).subquery()
        number: int = (
            connection_of(self._session, self._chosen.model)
            .execute(select(func.count()).select_from(some))
            .scalar_one()
        )
        return number

    def _look(
        self,
        read: Reader,
        served: Sequence[ColumnElement[bool]],
        looked_at: Sequence[ColumnElement[bool]],
        start: Place | None,
        seconds: float | None,
    ) -> Found:
        """Look at one job after the other, in growing windows; the last is as large as the time lets it be."""
        found: list[Any] = []
        scanned = window = 0
        begin = last = perf_counter()
        for at, most in enumerate(WINDOWS):
            now = perf_counter()
            if seconds is None or at < _ALWAYS:
                window = most
            else:
                window = _fitting(seconds - (now - begin), window / (now - last), most)
            if not window:
                break
            last = now
            end = self._place(served, start, window)
            found += read([*self._between(start, end), *served, *looked_at], self._by, self._limit + 1)
            scanned += window
            if end is None or len(found) > self._limit:
                return self._full(found, None if end is None else scanned)
            start = end
        cursor = None if start is None else _cursor(*start, self._order)
        return Found(tuple(found), cursor, scanned, len(found) == self._limit)

    def _place(self, where: Sequence[ColumnElement[bool]], start: Place | None, window: int) -> Place | None:
        """Return the place of the job that comes ``window`` jobs after ``start``; None where there are fewer."""
        between = self._between(start, None)
        statement = select(*self._key).where(*between, *where).order_by(*self._by).limit(1).offset(window - 1)
        row = connection_of(self._session, self._chosen.model).execute(statement).first()
        return None if row is None else (row[0], row[1])

    def _between(self, start: Place | None, end: Place | None) -> list[ColumnElement[bool]]:
        """Return the conditions for what comes after ``start`` and up to ``end``.

        Times are compared by themselves too: from the pairs alone PostgreSQL takes a window for a third of the table, and
        reads all of it.
        """
        here, moment = tuple_(*self._key), self._key[0]
        newest = self._order in _DOWNWARDS
        bounds: list[ColumnElement[bool]] = []
        if self._by_end:
            bounds.append(table_of(self._chosen.model).c.finished_at.is_not(None))
        if start is not None:
            bounds.append(here < self._there(start) if newest else here > self._there(start))
            bounds.append(moment <= start[0] if newest else moment >= start[0])
        if end is not None:
            bounds.append(here >= self._there(end) if newest else here <= self._there(end))
            bounds.append(moment >= end[0] if newest else moment <= end[0])
        return bounds

    def _there(self, place: Place) -> Any:
        moment, job_id = self._key
        return tuple_(literal(place[0], moment.type), literal(place[1], job_id.type))


def _fitting(seconds: float, jobs_a_second: float, most: int) -> int:
    """Return how many jobs, in thousands, can be looked at in so many seconds."""
    return max(0, min(most, int(seconds * jobs_a_second) // _STEP * _STEP))


def cursor_of(job: Any, order: Order) -> str:
    """Return where the page after this job starts; of a record or a summary."""
    return _cursor(job.finished_at if order.endswith("finished") else job.created_at, job.id, order)


def _cursor(moment: datetime, job_id: UUID, order: Order) -> str:
    parts = json.dumps([order[0], to_millis(moment), job_id.hex], separators=(",", ":"))
    return base64.urlsafe_b64encode(parts.encode()).decode().rstrip("=")


def read_cursor(cursor: str, order: Order) -> Place:
    """Return the time and id that a cursor holds.

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
