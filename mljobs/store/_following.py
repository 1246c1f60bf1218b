"""Follow jobs: wait for one to finish. The logic only; who reads and who sleeps, the store knows.

Each generator here yields what it needs next: a :class:`Read` of the database, or several of them (:class:`Locked`), whose
answer it is sent, a number of seconds to sleep, or a job to hand to the caller. So one body serves threads and coroutines;
what runs it stands in ``mljobs.store._followers``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from mljobs._values import check_seconds
from mljobs.errors import MlJobsError, WaitTimeout
from mljobs.jobs import Bind, JobRef, Model, get
from mljobs.jobs._base import id_of, model_and_id
from mljobs.record._models import MlJob

_POLL = 1.0
_POLL_SQLITE = 0.1


@dataclass(frozen=True, slots=True)
class Read:
    """A read of the database: the operation to run."""

    operation: Callable[[Bind], Any]


@dataclass(frozen=True, slots=True)
class Locked:
    """Reads to be made under a lock, one after the other; the answer is what they return.

    Attributes:
        lock: Of threads, or of tasks.
        steps: Makes them, again where they were interrupted.
    """

    lock: Any
    steps: Callable[[], Generator[Read, Any, Any]]


class Begun:
    """What ``watch`` says after its first look: what comes after it is yielded."""


BEGUN = Begun()

FollowSteps = Generator["Read | Locked | float | Begun | Any", Any, Any]


def check_waiting(timeout: float | None, poll: float) -> None:
    """Refuse what is not a number of seconds of at least 0; no timeout is None.

    Raises:
        InvalidValueError: One of them is not.
    """
    if timeout is not None:
        check_seconds("timeout", timeout)
    check_seconds("poll", poll)


def wait_steps(job: JobRef, timeout: float | None, poll: float, model: Model) -> FollowSteps:
    """Read until the job has finished, and return it."""
    check_waiting(timeout, poll)
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


def poll_seconds(dialect_name: str, poll: float | None) -> float:
    """Return the seconds between two reads: ``poll``, or what suits the database."""
    if poll is not None:
        return poll
    return _POLL if dialect_name == "postgresql" else _POLL_SQLITE


def closed_meanwhile(job: JobRef) -> MlJobsError:
    """Return the error of a ``wait`` whose store was closed."""
    return MlJobsError(f"the store was closed while job {id_of(job)} was waited for")
