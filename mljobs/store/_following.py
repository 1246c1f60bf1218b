"""Follow jobs: wait for one to finish, watch which change. The logic only; who reads and who sleeps, the store knows.

Each generator here yields what it needs next: a :class:`Read` of the database, whose answer it is sent, a number of
seconds to sleep, or a job to hand to the caller. So one body serves threads and coroutines.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import or_

from mljobs._values import utc_now
from mljobs.errors import InvalidValueError, MlJobsError, WaitTimeout
from mljobs.jobs import Bind, JobRef, Model, get
from mljobs.jobs._base import id_of, model_and_id, table_of
from mljobs.jobs._filters import Selection
from mljobs.jobs._reading import fetch
from mljobs.record._models import MlJob
from mljobs.states import MlJobStatus

if TYPE_CHECKING:
    from mljobs.db._wake import AsyncChangeListener, ChangeListener

_POLL = 1.0
_POLL_SQLITE = 0.1
_OVERLAP = timedelta(minutes=5)
"""How far back a watch looks, so that a transaction that committed late is still seen."""


@dataclass(frozen=True, slots=True)
class Read:
    """A read of the database: the operation to run."""

    operation: Callable[[Bind], Any]


class Follower:
    """A ``wait`` or ``watch`` under way, which its store can end from another thread.

    Args:
        listener: What it waits with.

    Attributes:
        busy: Held while it reads or waits, not while its caller has a job.
        closed: Whether the store was closed.
    """

    def __init__(self, listener: ChangeListener) -> None:
        self._listener = listener
        self.busy = threading.Lock()
        self.closed = False

    def close(self) -> None:
        """End it, and close its connection."""
        self.closed = True
        self._listener.wake()
        with self.busy:
            self._listener.close()


class AsyncFollower:
    """A ``wait`` or ``watch`` under way, which its store can end from another task; see ``Follower``."""

    def __init__(self, listener: AsyncChangeListener) -> None:
        self._listener = listener
        self.busy = asyncio.Lock()
        self.closed = False

    async def close(self) -> None:
        """End it, and close its connection."""
        self.closed = True
        self._listener.wake()
        async with self.busy:
            await self._listener.close()


FollowSteps = Generator["Read | float | Any", Any, Any]


def check_seconds(field: str, value: float | None) -> None:
    """Refuse what is not a number of seconds of at least 0.

    Raises:
        InvalidValueError: It is not.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
        raise InvalidValueError(field, value, "expected seconds of at least 0")


def wait_steps(job: JobRef, timeout: float | None, poll: float, model: Model) -> FollowSteps:
    """Read until the job has finished, and return it."""
    check_seconds("timeout", timeout)
    check_seconds("poll", poll)
    model, job_id = model_and_id(job, model)
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        current: MlJob = yield Read(lambda bind: get(bind, job_id, model=model))
        if current.is_terminal:
            return current
        left = poll if end is None else end - time.monotonic()
        if left <= 0:
            raise WaitTimeout(job_id, timeout or 0.0, current.status)
        yield min(poll, left)


def watch_steps(chosen: Selection, timeout: float | None, poll: float) -> FollowSteps:
    """Yield each job that was added, or whose state, progress or attempts changed, since the watch began."""
    check_seconds("timeout", timeout)
    check_seconds("poll", poll)
    model = chosen.model
    chosen.conditions()  # an error comes before the first look
    end = None if timeout is None else time.monotonic() + timeout
    seen: dict[UUID, tuple[Any, ...]] = {}
    first = True
    while True:
        jobs: list[MlJob] = yield Read(lambda bind: _recent(bind, model, chosen.conditions()))
        present = {job.id for job in jobs}
        gone = [job_id for job_id, state in seen.items() if job_id not in present and not state[0].is_terminal]
        if gone:
            jobs += yield Read(lambda bind, gone=gone: _these(bind, model, gone))  # type: ignore[misc]
        now: dict[UUID, tuple[Any, ...]] = {}
        for job in sorted(jobs, key=lambda job: (job.finished_at or job.started_at or job.created_at, job.id)):
            state = (job.status, job.progress, job.attempts)
            if job.id in present:
                now[job.id] = state
            if not first and seen.get(job.id) != state:
                yield job
        seen, first = now, False
        left = poll if end is None else end - time.monotonic()
        if left <= 0:
            return
        yield min(poll, left)


def _recent(bind: Bind, model: Model, where: Sequence[Any]) -> list[MlJob]:
    """Return the running jobs, and those that were created or finished lately."""
    table = table_of(model)
    since = utc_now() - _OVERLAP
    lately = or_(table.c.status == MlJobStatus.RUNNING, table.c.created_at >= since, table.c.finished_at >= since)
    return fetch(bind, model, [lately, *where])


def _these(bind: Bind, model: Model, ids: Sequence[UUID]) -> list[MlJob]:
    return fetch(bind, model, [table_of(model).c.id.in_(ids)])


def poll_seconds(dialect_name: str, poll: float | None) -> float:
    """Return the seconds between two reads: ``poll``, or what suits the database."""
    if poll is not None:
        return poll
    return _POLL if dialect_name == "postgresql" else _POLL_SQLITE


def closed_meanwhile(job: JobRef) -> MlJobsError:
    """Return the error of a ``wait`` whose store was closed."""
    return MlJobsError(f"the store was closed while job {id_of(job)} was waited for")
