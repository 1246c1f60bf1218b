"""``on_finished``, and what it can listen to."""

from __future__ import annotations

import sys
from inspect import iscoroutinefunction
from typing import Any, ClassVar
from weakref import ref

from sqlalchemy.orm import Session, sessionmaker

from mljobs.errors import InvalidValueError
from mljobs.events._delivering import Callback, Matches, Subscription
from mljobs.events._sessions import install
from mljobs.record._mixin import MlJobMixin

_MAKER = "mljobs.maker"


class EventSource:
    """A store: what finishes through it can be listened to.

    Attributes:
        awaits_callbacks: Whether a callback may be a coroutine function.
        diverted_events: Where finished jobs go instead of to the callbacks; None for to the callbacks.
    """

    awaits_callbacks: ClassVar[bool] = False
    diverted_events: list[Any] | None = None

    def divert_events(self) -> list[Any]:
        """Return the list to which finished jobs go from now on, for a store that works for another one."""
        self.diverted_events = []
        return self.diverted_events

    def on_finished(self, callback: Callback) -> Subscription:
        """Call ``callback(job)`` after the commit of each job that finishes through this store; see ``on_finished``.

        Args:
            callback: Takes the finished record; of an ``AsyncJobStore`` it may be a coroutine function.
        """
        return on_finished(callback, self)


def on_finished(callback: Callback, target: object = None) -> Subscription:
    """Call ``callback(job)`` whenever a job has finished: after the commit, once, with the detached record.

    The callback runs in the thread that committed, before ``commit()`` returns. What it raises is logged and undoes
    nothing. A process that dies between the commit and the callback never calls it: what must not be missed belongs
    in the transaction itself, or to ``store.watch``.

    A record that is inserted already finished (an import) has not finished here, and calls nobody.

    Args:
        callback: Takes the record, every column loaded. A coroutine function is awaited where ``target`` is async.
        target: What to listen to. None for everything in this process; a ``JobStore`` or ``AsyncJobStore``; a
            ``Session``, ``AsyncSession``, ``sessionmaker``, ``async_sessionmaker``, ``scoped_session`` or a class of
            sessions; a job class, for the jobs of that class.

    Returns:
        What ``remove()`` ends; also a context manager that does so, and callable as the callback was.

    Raises:
        InvalidValueError: ``callback`` cannot be called, ``target`` cannot be listened to, or a coroutine function is
            given for a target that is not async.

    Example:
        ``on_finished(lambda job: print(job.target_name, job.status), store)``
    """
    if not callable(callback):
        raise InvalidValueError("callback", callback, "expected a function that takes the job")
    subscription = Subscription(callback)
    matches, takes_async = _matching(target, subscription)
    called = callback if iscoroutinefunction(callback) else getattr(callback, "__call__", None)  # noqa: B004
    if iscoroutinefunction(called) and not takes_async:
        raise InvalidValueError(
            "callback",
            callback,
            "a coroutine function needs something async to listen to: an AsyncJobStore, an AsyncSession or its maker",
        )
    install()
    subscription.listen(matches)
    return subscription


def _matching(target: object, subscription: Subscription) -> tuple[Matches, bool]:
    """Return whether a job of an origin is what ``target`` names, and whether the callback may be awaited there."""
    if target is None:
        return lambda _job, _origin: True, False
    target = getattr(target, "session_factory", target)  # of a scoped_session
    if isinstance(target, sessionmaker):
        target = target.class_  # a class of its own for each maker
    if isinstance(target, type):
        if issubclass(target, Session):
            return lambda _job, origin: isinstance(origin.session, target), False
        if issubclass(target, MlJobMixin):
            return lambda job, _origin: job is None or isinstance(job, target), False
    elif isinstance(target, Session | EventSource):
        alone = ref(target, lambda _: subscription.remove())
        if isinstance(target, Session):
            return lambda _job, origin: origin.session is not None and origin.session is alone(), False
        return lambda _job, origin: origin.store is not None and origin.store is alone(), target.awaits_callbacks
    return _matching_async(target, subscription), True


def _matching_async(target: object, subscription: Subscription) -> Matches:
    asyncio = sys.modules.get("sqlalchemy.ext.asyncio")  # else nobody can have made a target of it
    if asyncio is not None:
        of = asyncio.async_session
        if isinstance(target, asyncio.async_sessionmaker):
            # Its sessions are of no class of their own; but each takes over the maker's info.
            info = dict(target.kw.get("info") or {})
            mark = info.setdefault(_MAKER, object())
            target.configure(info=info)
            return lambda _job, origin: origin.session is not None and origin.session.info.get(_MAKER) is mark
        if isinstance(target, type) and issubclass(target, asyncio.AsyncSession):
            kind = target
            return lambda _job, origin: origin.session is not None and isinstance(of(origin.session), kind)
        if isinstance(target, asyncio.AsyncSession):
            alone = ref(target.sync_session, lambda _: subscription.remove())
            return lambda _job, origin: origin.session is not None and origin.session is alone()
    raise InvalidValueError(
        "target", target, "expected a store, a session, a sessionmaker, a class of sessions or a job class"
    )
