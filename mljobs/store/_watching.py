"""``watch``: which jobs were added or changed since the look before. The logic only, as in ``mljobs.store._following``.

A look reads what is new at the end of two orders, of creation and of end, and the jobs that run. The time of a job is taken
before its transaction commits, by a clock that need not be the reader's: by a host's object minutes before it is written, by
a statement in a transaction that stays open. PostgreSQL's snapshots do not tell of it, for such a transaction may have
no id yet when its time is taken. So each look also reads one slice further of the five minutes before, begins anew at their
end, and remembers which ids it has met there. Where few jobs come, one slice is all of it, at each look.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, TypeVar
from uuid import UUID

from mljobs._values import from_millis, to_millis, utc_now
from mljobs.jobs import Bind, Model
from mljobs.jobs._base import table_of
from mljobs.jobs._changes import FIRST_ID, Slice, State, read_running, read_slice, read_states
from mljobs.jobs._filters import Selection
from mljobs.jobs._paging import Place
from mljobs.jobs._reading import fetch
from mljobs.record._models import MlJob
from mljobs.states import MlJobStatus
from mljobs.store._following import FollowSteps, Read, check_seconds

T = TypeVar("T")

_OVERLAP = timedelta(minutes=5)
"""How long after its time a job may be committed and still be seen."""
_SLACK = timedelta(seconds=1)
"""How far before the newest job a look starts to read: most of what is late is not later than that."""
_SLICE = 1_000
"""How many jobs of each order a look reads again, at least."""
_MOST = 10_000
"""How many jobs of an order are read at once."""
_PACE = 4
"""How many times as fast as jobs come the five minutes are read again."""
_QUEUED_KEPT = 1_000
"""Of how many queued jobs a watch remembers the state: the latest."""
_AT_ONCE = 1_000
"""How many jobs are read by their ids at once."""
_CHANGES_KEPT = 10_000
"""How many changes are put in order before they are handed out."""
_QUICK, _REST = 0.05, 20.0
"""Jobs begun by hand are looked for at each look, where that takes at most so many seconds; else after 20 times as long."""

_Key = tuple[MlJobStatus, int, int]


def watch_steps(chosen: Selection, timeout: float | None, poll: float) -> FollowSteps:
    """Yield each job that was added, or whose state, progress or attempts changed, since the watch began."""
    check_seconds("timeout", timeout)
    check_seconds("poll", poll)
    chosen.conditions()  # an error comes before the first look
    end = None if timeout is None else time.monotonic() + timeout
    watch = _Watch(chosen)
    while True:
        yield from watch.look()
        left = poll if end is None else end - time.monotonic()
        if left <= 0:
            return
        yield min(poll, left)


class _Order:
    """What was read in one order, of creation or of end.

    Args:
        by_end: Which of the two.
        now: The present time.

    Attributes:
        since: Where the present reading of the five minutes began; what is older is forgotten.
        near: From here on a look reads all.
        next: Where the next slice starts; None where the five minutes are begun anew.
    """

    def __init__(self, by_end: bool, now: datetime) -> None:  # noqa: FBT001 - one of two
        self.by_end = by_end
        self.since = now - _OVERLAP
        self.near: Place = (self.since, FIRST_ID)
        self.next: Place | None = None
        self._begun = now
        self._ids: defaultdict[int, set[int]] = defaultdict(set)

    def begin(self, now: datetime) -> Place:
        """Return where a look starts."""
        if self.next is None:
            # Five minutes before the last beginning: what was committed after it, and so was not met, is not older.
            self.since, self._begun = max(self.since, self._begun - _OVERLAP), now
            self.next = (self.since, FIRST_ID)
            for second in [second for second in self._ids if second < to_millis(self.since) // 1000]:
                del self._ids[second]
        self.near = max(self.near, (self.since, FIRST_ID))  # what is older was forgotten, and would be new
        return self.next

    def new(self, met: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return which of these jobs, each a time in milliseconds and an id, are met for the first time; remember them."""
        found = []
        for moment, number in met:
            ids = self._ids[moment // 1000]
            if number not in ids:
                ids.add(number)
                found.append((moment, number))
        return found

    def add(self, moment: datetime, job_id: UUID) -> None:
        """Take a job as met."""
        if moment >= self.since:
            self._ids[to_millis(moment) // 1000].add(job_id.int)

    def forget(self, moment: datetime, job_id: UUID) -> None:
        """Take a job as not met, so that it is new when it is met again."""
        self._ids[to_millis(moment) // 1000].discard(job_id.int)

    def __len__(self) -> int:
        return sum(map(len, self._ids.values()))


class _Watch:
    """What a watch remembers, and its looks.

    Args:
        chosen: Which jobs.
    """

    def __init__(self, chosen: Selection) -> None:
        self._chosen = chosen
        self._model: Model = chosen.model
        self._at = utc_now()
        self._created, self._finished = _Order(by_end=False, now=self._at), _Order(by_end=True, now=self._at)
        self._running: dict[UUID, _Key] = {}
        self._queued: dict[UUID, tuple[_Key | None, datetime]] = {}
        self._missing: set[UUID] = set()
        self._changed: dict[UUID, tuple[int, bool]] = {}
        self._first = True
        self._by_hand_after = 0.0

    def look(self) -> FollowSteps:
        """Read what has changed since the last look, and yield it; the first look only remembers."""
        now = utc_now()
        elapsed, self._at = now - self._at, now
        where = self._chosen.conditions()
        starts = [(order, order.begin(now)) for order in (self._created, self._finished)]
        self._queued = {job_id: kept for job_id, kept in self._queued.items() if kept[1] >= self._created.since}
        self._missing = {*self._running, *self._queued}
        running, slices = yield Read(lambda bind: self._begin(bind, starts, where))
        for state in running:
            self._take(state)
        for (order, start), found in zip(starts, slices, strict=True):
            order.next = yield from self._meet(order, found)
            yield from self._read_on(order, (start[0] + _PACE * elapsed, FIRST_ID), where)
            order.near = (min(found.newest or now, now) - _SLACK, FIRST_ID)
        yield from self._read_missing(where)
        yield from self._hand_out()
        self._first = False

    def _begin(
        self, bind: Bind, starts: Sequence[tuple[_Order, Place]], where: Sequence[Any]
    ) -> tuple[list[State], list[Slice]]:
        """Read the jobs that run, and the first slice of each order."""
        begin = time.monotonic()
        leased = begin < self._by_hand_after
        running = read_running(bind, self._model, where, leased=leased)
        now = time.monotonic()
        if not leased and now - begin > _QUICK:
            self._by_hand_after = now + (now - begin) * _REST
        size = _MOST if self._first else _SLICE
        return running, [
            read_slice(bind, self._model, where, start, by_end=order.by_end, size=size) for order, start in starts
        ]

    def _read_on(self, order: _Order, target: Place, where: Sequence[Any]) -> FollowSteps:
        """Read the next slices, as far as ``target``; then what is new, unless they have reached it."""
        while order.next is not None and order.next < target:
            order.next = yield from self._read_slice(order, order.next, where)
        near = None if order.next is None else order.near
        while near is not None:
            near = yield from self._read_slice(order, near, where)

    def _read_slice(self, order: _Order, start: Place, where: Sequence[Any]) -> FollowSteps:
        found: Slice = yield Read(
            lambda bind: read_slice(bind, self._model, where, start, by_end=order.by_end, size=_MOST)
        )
        return (yield from self._meet(order, found))

    def _meet(self, order: _Order, found: Slice) -> FollowSteps:
        """Take the jobs of a slice that are new as changed; return where the slice ends."""
        new = order.new(found.met)
        if self._first:
            new = [] if order.by_end else new[-_QUEUED_KEPT:]
        for moment, number in new:
            job_id = UUID(int=number)
            if self._first:
                self._keep_queued(job_id, None, from_millis(moment))
            else:
                self._changed[job_id] = moment, True
                self._missing.discard(job_id)
        if len(self._changed) >= _CHANGES_KEPT:
            yield from self._hand_out()
        return found.end

    def _read_missing(self, where: Sequence[Any]) -> FollowSteps:
        """Read those that ran, or were queued, and do not run: they may not pass any more, or be deleted."""
        for ids in _several({*self._queued} if self._first else {*self._missing}, _AT_ONCE):
            read = Read(lambda bind, ids=ids: read_states(bind, self._model, where, ids))  # type: ignore[misc]
            found: list[tuple[State, bool]] = yield read
            for state, passes in found:
                self._take(state, passes=passes)
            for job_id in {*ids}.difference(state.id for state, _ in found):  # deleted
                self._running.pop(job_id, None)
                self._queued.pop(job_id, None)

    def _take(self, state: State, *, passes: bool = True) -> None:
        """Remember a state, and take the job as changed if it is another than before."""
        moment = state.finished_at or state.started_at or state.created_at
        if self._remember(state, passes=passes):
            self._changed[state.id] = to_millis(moment), passes

    def _remember(self, state: State, *, passes: bool) -> bool:
        """Remember a state, of a job that does not pass nothing; return whether it is another than before."""
        job_id, status, progress, attempts, created_at, _, finished_at = state
        key: _Key = (status, progress, attempts)
        self._missing.discard(job_id)
        before = self._running.pop(job_id, None)
        if before is None and (kept := self._queued.pop(job_id, None)) is not None:
            before = kept[0]
        if not passes:
            self._created.forget(created_at, job_id)
        elif finished_at is not None and finished_at >= created_at:
            self._finished.add(finished_at, job_id)
        else:
            self._created.add(created_at, job_id)
        if passes and status is MlJobStatus.RUNNING:
            self._running[job_id] = key
        elif passes and status is MlJobStatus.QUEUED:
            self._keep_queued(job_id, key, created_at)
        return before != key

    def _keep_queued(self, job_id: UUID, key: _Key | None, created_at: datetime) -> None:
        self._queued[job_id] = key, created_at
        if len(self._queued) > _QUEUED_KEPT:
            del self._queued[next(iter(self._queued))]

    def _hand_out(self) -> FollowSteps:
        """Read the changed jobs whole, in the order in which they changed, and yield them."""
        changed, self._changed = self._changed, {}
        if self._first:
            return
        for ids in _several(sorted(changed, key=lambda job_id: (changed[job_id][0], job_id)), _AT_ONCE):
            where = [table_of(self._model).c.id.in_(ids)]
            found: list[MlJob] = yield Read(lambda bind, where=where: fetch(bind, self._model, where))  # type: ignore[misc]
            by_id = {job.id: job for job in found}
            for job in [by_id[job_id] for job_id in ids if job_id in by_id]:
                state = State(*(getattr(job, name) for name in State._fields))
                self._remember(state, passes=changed[job.id][1])  # it may have changed since it was met
                yield job


def _several(values: Iterable[T], number: int) -> Iterator[list[T]]:
    """Yield the values, so many at once."""
    rest = iter(values)
    while some := list(islice(rest, number)):
        yield some
