"""``watch``: which jobs were added or changed since the look before. The logic only, as in ``mljobs.store._following``.

All watches of a store share one ``ChangeReader``. Each asks about those that have changed, and about the active jobs,
whether they pass its filter, and reads whole those of them that it yields.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Generator
from functools import partial
from typing import Any
from uuid import UUID
from weakref import ref

from mljobs.jobs import Model
from mljobs.jobs._base import table_of
from mljobs.jobs._changes import read_passing
from mljobs.jobs._filters import Selection
from mljobs.jobs._reading import fetch
from mljobs.record._models import MlJob
from mljobs.states import MlJobStatus
from mljobs.store._change_reader import Change, ChangeReader, Version, several
from mljobs.store._following import BEGUN, FollowSteps, Locked, Read, check_waiting

_AT_ONCE = 1_000
"""How many jobs are read whole at once."""
_ASKED_AT_ONCE = 10_000
"""Of how many jobs it is asked at once whether they pass."""
_FINISHED_KEPT = 1_000
"""How many finished jobs a watch remembers that it has yielded, until the reader has met their end."""
_LAST = b"\xff" * 8


class SharedReader:
    """The reader that all watches of a store share, made for the first and gone with the last.

    Args:
        model: The mapped job class.
        new_lock: Makes the lock that a watch holds while it looks.
    """

    def __init__(self, model: Model, new_lock: Callable[[], Any]) -> None:
        self._model = model
        self._new_lock = new_lock
        self._begin()

    def _begin(self) -> None:
        self._making = threading.Lock()
        self._made: ref[ChangeReader] | None = None
        self._process = os.getpid()

    def get(self) -> ChangeReader:
        """Return it; after a fork a new one, for a thread of the parent may have held the lock."""
        if self._process != os.getpid():
            self._begin()
        with self._making:
            reader = None if self._made is None else self._made()
            if reader is None:
                reader = ChangeReader(self._model, self._new_lock)
                self._made = ref(reader)
            return reader


def watch_steps(shared: SharedReader, chosen: Selection, timeout: float | None, poll: float) -> FollowSteps:
    """Yield each job that was added, or whose state, progress or attempts changed, since the watch began."""
    check_waiting(timeout, poll)
    chosen.conditions()  # an error comes before the first look
    since = time.monotonic()
    end = None if timeout is None else since + timeout
    watch = Watch(shared.get(), chosen)
    yield from watch.look(since)
    yield BEGUN
    while True:
        now, looked = time.monotonic(), watch.reader.ended
        due = looked + poll
        yield max(0.0, (due if end is None else min(due, end)) - now)
        now = time.monotonic()
        since = looked if now >= due else now  # before that, a notification has come, or the end
        yield from watch.look(since)
        if end is not None and end <= now:
            return


class Watch:
    """What a watch remembers.

    Args:
        reader: Where it takes changes from.
        chosen: Which jobs.
    """

    def __init__(self, reader: ChangeReader, chosen: Selection) -> None:
        self.reader = reader
        self.position = 0
        self._chosen = chosen
        self._joined = False
        self._yielded: dict[bytes, Version] = {}

    def look(self, since: float) -> FollowSteps:
        """Yield what has changed; the first look only remembers.

        Args:
            since: By the monotonic clock: a look that began earlier does not count, a later one of another watch does.
        """
        if not self._joined:
            active = yield Locked(self.reader.lock, lambda: self.reader.join(self, since))
            passing = yield from self._passing(active)
            self._yielded = {name: version for name, version in active.items() if name in passing}
            self._joined = True
            return
        more = True
        while more:
            reader = self.reader
            changes, active, more = yield Locked(reader.lock, partial(reader.take, self, since))
            yield from self._hand_out(changes, active)
            if not more:
                self._forget(active)

    def _passing(self, names: Collection[bytes]) -> Generator[Read, Any, Collection[bytes]]:
        """Return which of these jobs pass."""
        if not (self._chosen and names):
            return names
        where, passing, model = self._chosen.conditions(), set[bytes](), self._chosen.model
        for some in several(names, _ASKED_AT_ONCE):
            ids = [UUID(bytes=name) for name in some]
            found = yield Read(lambda bind, ids=ids: read_passing(bind, model, ids, where))  # type: ignore[misc]
            passing.update(job_id.bytes for job_id in found)
        return passing

    def _hand_out(self, changes: list[Change], active: set[bytes]) -> FollowSteps:
        """Read whole, and yield, the jobs that have changed and pass, or did, or have come to pass."""
        model = self._chosen.model
        changed = {key[8:]: (key, finished) for key, finished in changes}
        passing = yield from self._passing({*changed, *active} if self._chosen else changed)
        for name in active.difference(changed) if self._chosen else ():
            if name not in passing:
                self._yielded.pop(name, None)
            elif name not in self._yielded:
                changed[name] = _LAST + name, False
        wanted = [name for name in changed if name in passing or name in self._yielded]
        for names in several(sorted(wanted, key=lambda name: changed[name][0]), _AT_ONCE):
            where = [table_of(model).c.id.in_([UUID(bytes=name) for name in names])]
            jobs: list[MlJob] = yield Read(lambda bind, where=where: fetch(bind, model, where))  # type: ignore[misc]
            found = {job.id.bytes: job for job in jobs}
            for name in names:
                before, job = self._yielded.pop(name, None), found.get(name)
                if job is None:  # deleted
                    continue
                version = (job.status, job.progress, job.attempts)
                # It may have changed since it was met; then that is met later, and is no news.
                if name in passing and not (job.is_terminal and changed[name][1]):
                    self._yielded[name] = version
                if before != version:
                    yield job

    def _forget(self, active: Collection[bytes]) -> None:
        """Keep what was yielded of the jobs that run, of those that the reader keeps, and of some that have finished."""
        ended = [name for name, version in self._yielded.items() if version[0].is_terminal]
        queued = [name for name, version in self._yielded.items() if version[0] is MlJobStatus.QUEUED]
        for name in [*ended[:-_FINISHED_KEPT], *(name for name in queued if name not in active)]:
            del self._yielded[name]
