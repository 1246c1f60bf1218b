"""Subscriptions, and calling their callbacks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any, Protocol, Self

from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from mljobs._logging import logger_of

logger = logger_of("mljobs.events")

Callback = Callable[[Any], Any]


class Store(Protocol):
    """A store through which jobs finish.

    Attributes:
        diverted_events: Where finished jobs go instead of to the callbacks; None for to the callbacks.
    """

    diverted_events: list[Any] | None


@dataclass(frozen=True, slots=True)
class Origin:
    """Through what a job finished."""

    session: Session | None = None
    store: Store | None = None


Matches = Callable[[Any, Origin], bool]
"""Whether a job, or any job (None), that finished through an origin is of interest."""


class Subscription:
    """A callback that is registered. Calling it calls the callback, so that ``@on_finished`` leaves a function behind.

    Attributes:
        callback: What is called.
    """

    def __init__(self, callback: Callback) -> None:
        self.callback = callback
        self._matches: Matches = lambda _job, _origin: False

    def listen(self, matches: Matches) -> None:
        """Call the callback from now on for what matches."""
        global _subscriptions  # noqa: PLW0603 - one tuple, replaced as a whole, so that readers need no lock
        self._matches = matches
        with _lock:
            _subscriptions = (*_subscriptions, self)

    def matches(self, job: Any, origin: Origin) -> bool:
        """Whether this job, or any job (None), that finished through this origin is of interest."""
        return self._matches(job, origin)

    def __call__(self, job: Any) -> Any:
        """Call the callback."""
        return self.callback(job)

    def remove(self) -> None:
        """Call the callback no more. Doing so twice is no error."""
        global _subscriptions  # noqa: PLW0603
        with _lock:
            _subscriptions = tuple(other for other in _subscriptions if other is not self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


_subscriptions: tuple[Subscription, ...] = ()
_lock = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))


def subscribed() -> bool:
    """Whether anybody listens; asked first, so that nothing is done for nobody."""
    return bool(_subscriptions)


def has_listener(origin: Origin) -> bool:
    """Whether anybody may want to hear of jobs of this origin."""
    if origin.store is not None and origin.store.diverted_events is not None:
        return True
    return any(subscription.matches(None, origin) for subscription in _subscriptions)


def deliver(jobs: Sequence[Any], origin: Origin) -> None:
    """Call the callbacks for each job, in order; what a callback raises is logged.

    Args:
        jobs: Finished, and committed.
        origin: Through what.
    """
    for job, callback in _calls(jobs, origin):
        with _logging_errors(job, callback):
            answer = callback(job)
            if isawaitable(answer):
                await_only(answer)


async def deliver_async(jobs: Sequence[Any], origin: Origin) -> None:
    """Call the callbacks as ``deliver`` does, and await those that are coroutine functions.

    Args:
        jobs: Finished, and committed.
        origin: Through what.
    """
    for job, callback in _calls(jobs, origin):
        with _logging_errors(job, callback):
            answer = callback(job)
            if isawaitable(answer):
                await answer


def _calls(jobs: Sequence[Any], origin: Origin) -> Iterator[tuple[Any, Callback]]:
    later = origin.store.diverted_events if origin.store is not None else None
    if later is not None:
        later.extend(jobs)
        return
    for job in jobs:
        for subscription in _subscriptions:
            if subscription.matches(job, origin):
                yield job, subscription.callback


@contextmanager
def _logging_errors(job: Any, callback: Callback) -> Iterator[None]:
    """Log what a callback raises: the commit stands."""
    try:
        yield
    except Exception:
        name = getattr(callback, "__qualname__", repr(callback))
        logger.exception("job %s has finished, but the callback %s failed", job.id, name)
