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

from mljobs._values import utc_now
from mljobs.jobs import Bind, Model
from mljobs.jobs._base import table_of
from mljobs.jobs._changes import FIRST_ID, Slices, State, read_slices, read_states
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
_SLICE = 2_000
"""How many jobs of each order a look reads at once."""
_FIRST_SLICE = 10_000
"""The same for the first look, which reads all of the five minutes."""
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
            self.near = max(self.near, self.next)
            for second in [second for second in self._ids if second < int(self.since.timestamp())]:
                del self._ids[second]
        return self.next

    def is_new(self, moment: datetime, job_id: UUID) -> bool:
        """Whether a job is met for the first time; it is remembered."""
        if moment < self.since:
            return False
        ids = self._ids[int(moment.timestamp())]
        before = len(ids)
        ids.add(job_id.int)
        return len(ids) > before

    def forget(self, moment: datetime, job_id: UUID) -> None:
        """Take a job as not met, so that it is new when it is met again."""
        self._ids[int(moment.timestamp())].discard(job_id.int)

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
        self._queued: dict[UUID, tuple[_Key, datetime]] = {}
        self._missing: set[UUID] = set()
        self._changed: dict[UUID, State] = {}
        self._first = True
        self._by_hand_after = 0.0

    def look(self) -> FollowSteps:
        """Read what has changed since the last look, and yield it; the first look only remembers."""
        now = utc_now()
        elapsed, self._at = now - self._at, now
        orders = self._created, self._finished
        places = [order.begin(now) for order in orders]
        self._queued = {job_id: kept for job_id, kept in self._queued.items() if kept[1] >= self._created.since}
        self._missing = {*self._running, *self._queued}
        where = self._chosen.conditions()
        found: Slices = yield Read(lambda bind: self._begin(bind, places, where))
        yield from self._take(found.states)
        for order, place, end, newest in zip(orders, places, found.ends, found.newest, strict=True):
            order.next = end
            yield from self._read_on(order, (place[0] + _PACE * elapsed, FIRST_ID), where)
            order.near = (min(newest or now, now) - _SLACK, FIRST_ID)
        yield from self._read_missing(where)
        yield from self._hand_out()
        self._first = False

    def _read_on(self, order: _Order, target: Place, where: Sequence[Any]) -> FollowSteps:
        """Read the next slices, as far as ``target``; then what is new, unless they have reached it."""
        while order.next is not None and order.next < target:
            order.next = yield from self._read_slice(order, order.next, where)
        near = None if order.next is None else order.near
        while near is not None:
            near = yield from self._read_slice(order, near, where)

    def _read_slice(self, order: _Order, place: Place, where: Sequence[Any]) -> FollowSteps:
        found: Slices = yield Read(
            lambda bind: read_slices(bind, self._model, where, [(order.by_end, place)], self._size)
        )
        yield from self._take(found.states)
        return found.ends[0]

    def _begin(self, bind: Bind, places: Sequence[Place], where: Sequence[Any]) -> Slices:
        """Read the first slice of each order, and the jobs that run."""
        begin = time.monotonic()
        running = "all" if begin >= self._by_hand_after else "lease"
        starts = list(zip((False, True), places, strict=True))
        found = read_slices(bind, self._model, where, starts, self._size, running=running)
        now = time.monotonic()
        if running == "all" and now - begin > _QUICK and not self._first:
            self._by_hand_after = now + (now - begin) * _REST
        return found

    @property
    def _size(self) -> int:
        return _FIRST_SLICE if self._first else _SLICE

    def _read_missing(self, where: Sequence[Any]) -> FollowSteps:
        """Read those that ran, or were queued, and that no slice had: they may not pass any more, or be deleted."""
        for ids in _several(self._missing & {*self._running, *self._queued}, _AT_ONCE):
            read = Read(lambda bind, ids=ids: read_states(bind, self._model, where, ids))  # type: ignore[misc]
            found: list[tuple[State, bool]] = yield read
            self._take_only([state for state, _ in found])
            for job_id in {*ids}.difference(state.id for state, passes in found if passes):
                self._running.pop(job_id, None)
                self._queued.pop(job_id, None)
            for state in [state for state, passes in found if not passes]:
                self._created.forget(state.created_at, state.id)

    def _take(self, states: Iterable[State]) -> FollowSteps:
        self._take_only(states)
        if len(self._changed) >= _CHANGES_KEPT:
            yield from self._hand_out()

    def _take_only(self, states: Iterable[State]) -> None:
        self._changed |= {state.id: state for state in states if self._is_change(state)}

    def _is_change(self, state: State) -> bool:
        """Whether this is not what was known of the job; it is remembered."""
        job_id, status, progress, attempts, created_at, _, finished_at = state
        key = (status, progress, attempts)
        self._missing.discard(job_id)
        before = self._running.pop(job_id, None)
        if before is None and (kept := self._queued.pop(job_id, None)) is not None:
            before = kept[0]
        if finished_at is None or finished_at < created_at:
            new = self._created.is_new(created_at, job_id)
        else:
            new = self._finished.is_new(finished_at, job_id)
        if status is MlJobStatus.RUNNING:
            self._running[job_id] = key
            return before != key
        if status is MlJobStatus.QUEUED and (new or before is not None):
            self._queued[job_id] = key, created_at
            if len(self._queued) > _QUEUED_KEPT:
                del self._queued[next(iter(self._queued))]
        return new if before is None else before != key

    def _hand_out(self) -> FollowSteps:
        """Read the changed jobs whole, in the order in which they changed, and yield them."""
        changed, self._changed = self._changed, {}
        if self._first:
            return
        states = sorted(changed.values(), key=lambda one: (one.finished_at or one.started_at or one.created_at, one.id))
        for ids in _several([state.id for state in states], _AT_ONCE):
            where = [table_of(self._model).c.id.in_(ids)]
            found: list[MlJob] = yield Read(lambda bind, where=where: fetch(bind, self._model, where))  # type: ignore[misc]
            by_id = {job.id: job for job in found}
            for job in [by_id[job_id] for job_id in ids if job_id in by_id]:
                self._remember(job)
                yield job

    def _remember(self, job: MlJob) -> None:
        """Know a job as it is handed out: it may have changed since its state was read."""
        if job.is_terminal or job.id in self._running or job.id in self._queued:
            self._is_change(State(*(getattr(job, name) for name in State._fields)))


def _several(values: Iterable[T], number: int) -> Iterator[list[T]]:
    """Yield the values, so many at once."""
    rest = iter(values)
    while some := list(islice(rest, number)):
        yield some
