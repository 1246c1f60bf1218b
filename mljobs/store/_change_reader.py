"""What a store's watches share: the reader that looks which jobs were added or changed. The logic only, as in ``watch``.

A look reads what is new at the end of two orders, of creation and of end, and the jobs that run. The time of a job is taken
before its transaction commits, by a clock that need not be the reader's: by a host's object minutes before it is written, by
a statement in a transaction that stays open. PostgreSQL's snapshots do not tell of it, for such a transaction may have
no id yet when its time is taken. So each look also reads one slice further of the five minutes before, begins anew at their
end, and remembers which jobs it has met there. Where few jobs come, one slice is all of it, at each look.

Whichever watch is due first looks, under a lock, and lets go of the lock before it hands out a job. What was found is
kept until each watch has taken it. A watch that takes nothing for long gets a copy of the reader, and goes on from there
by itself.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from copy import copy
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, Protocol, TypeVar
from uuid import UUID
from weakref import WeakSet

from mljobs._values import utc_now
from mljobs.jobs import Bind, Model
from mljobs.jobs._changes import (
    FIRST_ID,
    KEY_BYTES,
    Slice,
    State,
    key_of,
    read_running,
    read_slice,
    read_states,
)
from mljobs.jobs._paging import Place
from mljobs.states import MlJobStatus
from mljobs.store._following import Read

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
"""Of how many queued jobs the state is remembered: the latest."""
_AT_ONCE = 1_000
"""How many jobs are read by their ids at once."""
_CHANGES_AT_ONCE = 10_000
"""After how many changes a look pauses, so that they are handed out."""
_CHANGES_KEPT = 100_000
"""How many changes are kept for the watch that is the furthest behind."""
_QUICK, _REST = 0.05, 20.0
"""Jobs begun by hand are looked for at each look, where that takes at most so many seconds; else after 20 times as long."""

Version = tuple[MlJobStatus, int, int]
"""State, progress and attempts: where one of them is another, the job has changed."""
Change = tuple[bytes, bool]
"""The key of a job by the time at which it changed, see ``key_of``; and whether it has finished."""


class Taker(Protocol):
    """What a reader knows of a watch.

    Attributes:
        reader: The reader that it takes changes from.
        position: How many changes of the reader it has taken.
    """

    reader: ChangeReader
    position: int


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
        self._keys = bytearray()

    def begin(self, now: datetime) -> Place:
        """Return where a look starts."""
        if self.next is None:
            # Five minutes before the last beginning: what was committed after it, and so was not met, is not older.
            self.since, self._begun = max(self.since, self._begun - _OVERLAP), now
            self.next = (self.since, FIRST_ID)
            del self._keys[: self._offset(self.next)]
        self.near = max(self.near, (self.since, FIRST_ID))  # what is older was forgotten, and would be new
        return self.next

    def put(self, start: Place, found: Slice) -> list[bytes]:
        """Remember the jobs of a slice, instead of those that were there; return the keys of those that were not."""
        begin, end = self._offset(start), len(self._keys) if found.end is None else self._offset(found.end)
        known = self._keys[begin:end]
        if known == found.keys:
            return []
        self._keys[begin:end] = found.keys
        before = {*_split(known)}
        return [key for key in _split(found.keys) if key not in before]

    def add(self, moment: datetime, job_id: UUID) -> None:
        """Take a job as met."""
        begin = self._offset((moment, job_id))
        key = key_of(moment, job_id)
        if moment >= self.since and self._keys[begin : begin + KEY_BYTES] != key:
            self._keys[begin:begin] = key

    def latest(self, number: int) -> set[bytes]:
        """Return the ids of the last so many jobs."""
        return {key[8:] for key in _split(self._keys[-number * KEY_BYTES :])}

    def __copy__(self) -> _Order:
        other = object.__new__(_Order)
        other.__dict__ |= {**self.__dict__, "_keys": self._keys[:]}
        return other

    def _offset(self, place: Place) -> int:
        """Return where the first key is that does not lie before a place."""
        keys = self._keys
        key_at: Callable[[int], bytes] = lambda at: bytes(keys[at * KEY_BYTES : (at + 1) * KEY_BYTES])  # noqa: E731
        return KEY_BYTES * bisect_left(range(len(self)), key_of(*place), key=key_at)

    def __len__(self) -> int:
        return len(self._keys) // KEY_BYTES


Steps = Generator[Read, Any, T]


class ChangeReader:
    """What was found, and the looks. Each method that returns steps is to be called under ``lock``.

    Args:
        model: The mapped job class.
        new_lock: Makes the lock: of threads or of tasks.

    Attributes:
        lock: Held by the watch that looks.
        ended: When the last look ended, by the monotonic clock.
    """

    def __init__(self, model: Model, new_lock: Callable[[], Any]) -> None:
        self.lock = new_lock()
        self.ended = -math.inf
        self._new_lock = new_lock
        self._model = model
        self._at = utc_now()
        self._created, self._finished = _Order(by_end=False, now=self._at), _Order(by_end=True, now=self._at)
        self._active: dict[bytes, Version] = {}
        self._met: set[bytes] = set()
        self._changes: list[Change] = []
        self._dropped = 0
        self._takers: WeakSet[Taker] = WeakSet()
        self._begun = -math.inf
        self._whole = -math.inf
        self._paused: Generator[Read | None, Any, None] | None = None
        self._paused_at = 0
        self._by_hand_after = 0.0

    @property
    def _end(self) -> int:
        return self._dropped + len(self._changes)

    def join(self, taker: Taker, since: float) -> Steps[dict[bytes, Version]]:
        """Read all of the five minutes, unless another watch did since then; return the active jobs.

        What a late commit brings is thus known from what was there before the watch began.
        """
        if self._whole < since:
            self._paused = self._look(whole=True)
            while self._paused is not None:
                yield from self._look_on(self._paused)
        taker.reader, taker.position = self, self._end
        self._takers.add(taker)
        return {**self._active}

    def take(self, taker: Taker, since: float) -> Steps[tuple[list[Change], set[bytes], bool]]:
        """Look, unless a watch did since then.

        Returns:
            What has changed since the watch took last; the ids of the active jobs; whether there is more to take.
        """
        if taker.reader is not self:  # it was left behind while it waited for the lock
            return [], set(), True
        if self._paused is not None or self._begun < since:
            yield from self._look_on(self._paused or self._look(whole=False))
        if taker.reader is not self:
            return [], set(), True
        changes = self._changes[taker.position - self._dropped :]
        taker.position = self._end
        self._drop_taken()
        return changes, {*self._active}, self._paused is not None or self._begun < since

    def _look_on(self, look: Generator[Read | None, Any, None]) -> Steps[None]:
        """Go on with a look until it ends or pauses."""
        self._paused = None  # whoever reads may be interrupted: what it has met is kept, and the next look begins anew
        answer: Any = None
        for_pause = False
        while not for_pause:
            try:
                step = look.send(answer)
            except StopIteration:
                break
            for_pause = step is None
            answer = None if step is None else (yield step)
        if for_pause:
            self._paused, self._paused_at = look, self._end
        self._drop_taken()

    def _look(self, *, whole: bool) -> Generator[Read | None, Any, None]:
        """Read what has changed since the last look; yield None where it may pause."""
        begun, now = time.monotonic(), utc_now()
        elapsed, self._at, self._paused_at = now - self._at, now, self._end
        orders = (self._created, self._finished)
        for order in orders if whole else ():
            order.next = None
        starts = [(order, order.begin(now)) for order in orders]
        running, slices = yield Read(lambda bind: self._read_first(bind, starts, _MOST if whole else _SLICE))
        for state in running:
            self._note(state)
        for (order, start), found in zip(starts, slices, strict=True):
            target = None if whole else (start[0] + _PACE * elapsed, FIRST_ID)
            yield from self._read_on(order, start, found, target)
            order.near = (min(found.newest or now, now) - _SLACK, FIRST_ID)
        yield from self._read_missing({state.id.bytes for state in running})
        self._begun, self.ended = begun, time.monotonic()
        if whole:
            self._whole = begun

    def _read_first(
        self, bind: Bind, starts: Sequence[tuple[_Order, Place]], size: int
    ) -> tuple[list[State], list[Slice]]:
        """Read the jobs that run, and the first slice of each order."""
        begin = time.monotonic()
        leased = begin < self._by_hand_after
        running = read_running(bind, self._model, leased=leased)
        now = time.monotonic()
        if not leased and now - begin > _QUICK:
            self._by_hand_after = now + (now - begin) * _REST
        return running, [
            read_slice(bind, self._model, start, by_end=order.by_end, size=size) for order, start in starts
        ]

    def _read_on(
        self, order: _Order, start: Place, found: Slice, target: Place | None
    ) -> Generator[Read | None, Any, None]:
        """Read the next slices, as far as ``target``; then what is new, unless they have reached it."""
        self._meet(order, start, found)
        place = order.next = found.end
        again = True
        while place is not None:
            if again and target is not None and place >= target:
                again, place = False, order.near
            if self._end - self._paused_at >= _CHANGES_AT_ONCE:
                yield None
            read = Read(lambda bind, at=place: read_slice(bind, self._model, at, by_end=order.by_end, size=_MOST))  # type: ignore[misc]
            found = yield read
            self._meet(order, place, found)
            place = found.end
            if again:
                order.next = place

    def _meet(self, order: _Order, start: Place, found: Slice) -> None:
        """Take the jobs of a slice that are new as changed."""
        new = order.put(start, found)
        if order.by_end and self._active:
            for key in new:
                self._active.pop(key[8:], None)
        if self._takers:
            self._changes.extend((key, order.by_end) for key in new)
        if new and not order.by_end:  # kept until they are looked at: this look may fail before
            self._met.update(key[8:] for key in new[-_QUEUED_KEPT:])
            self._met &= order.latest(_QUEUED_KEPT)  # of the others none is remembered

    def _read_missing(self, running: set[bytes]) -> Steps[None]:
        """Read those that ran, or were queued, and do not run: they may be deleted."""
        latest = self._created.latest(_QUEUED_KEPT)
        for names in several({*self._active, *self._met} - running, _AT_ONCE):
            ids = [UUID(bytes=name) for name in names]
            found: list[State] = yield Read(lambda bind, ids=ids: read_states(bind, self._model, ids))  # type: ignore[misc]
            for state in found:
                self._note(state, latest)
            for name in {*names}.difference(state.id.bytes for state in found):
                self._active.pop(name, None)
                self._change(bytes(8) + name, finished=True)
        self._met.clear()

    def _note(self, state: State, latest: Container[bytes] = ()) -> None:
        """Remember a state, and take the job as changed if it is another than before.

        Args:
            state: Of a job.
            latest: Which jobs are remembered while they are queued.
        """
        name = state.id.bytes
        before, version = self._active.pop(name, None), (state.status, state.progress, state.attempts)
        moment = state.started_at or state.created_at
        if state.finished_at is not None and state.finished_at >= state.created_at:
            moment = state.finished_at
            self._finished.add(moment, state.id)
        else:
            self._created.add(state.created_at, state.id)
        if state.status is MlJobStatus.RUNNING or (state.status is MlJobStatus.QUEUED and name in latest):
            self._active[name] = version
        if before != version:
            self._change(key_of(moment, state.id), finished=state.status.is_terminal)

    def _change(self, key: bytes, *, finished: bool) -> None:
        if self._takers:
            self._changes.append((key, finished))

    def _drop_taken(self) -> None:
        """Drop the changes that each watch has taken; leave behind who has too many to take."""
        first = self._end
        for taker in [*self._takers]:
            if self._end - taker.position > _CHANGES_KEPT:
                self._leave_behind(taker)
            else:
                first = min(first, taker.position)
        del self._changes[: first - self._dropped]
        self._dropped = first

    def _leave_behind(self, taker: Taker) -> None:
        """Give a watch a reader of its own, which remembers what this one does."""
        self._takers.discard(taker)
        taker.reader = own = object.__new__(ChangeReader)
        own.__dict__ |= {
            **self.__dict__,
            "lock": self._new_lock(),
            "_paused": None,
            "_created": copy(self._created),
            "_finished": copy(self._finished),
            "_active": {**self._active},
            "_met": {*self._met},
            "_changes": self._changes[taker.position - self._dropped :],
            "_dropped": taker.position,
            "_takers": WeakSet([taker]),
        }


def _split(keys: bytes | bytearray) -> list[bytes]:
    packed = bytes(keys)
    return [packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)]


def several(values: Iterable[T], number: int) -> Iterator[list[T]]:
    """Yield the values, so many at once."""
    rest = iter(values)
    while some := list(islice(rest, number)):
        yield some
