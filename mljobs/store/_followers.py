"""Run the steps of ``wait``, ``watch`` and ``follow`` (see ``mljobs.store._following``): in a thread, or on an event loop.

A step that fails or is interrupted is done again at the next call. So who catches an error of the database, a
``KeyboardInterrupt`` or the end of ``asyncio.wait_for`` goes on with the same watch, and has missed nothing.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Self, TypeVar

from mljobs._logging import logger_of
from mljobs.db._failures import CONNECTION_ERRORS, database_is_away, first_line
from mljobs.store._following import BEGUN, FollowSteps, Locked, Read

if TYPE_CHECKING:
    from mljobs.db._wake import AsyncChangeListener, ChangeListener

T = TypeVar("T")

logger = logger_of(__name__)

_AWAY_SECONDS = 60.0
"""How long a database that has answered before may be away."""
_FIRST_PAUSE, _PAUSE = 0.05, 1.0
"""Seconds before the first new attempt, and before a later one, at most."""
_END = object()


class _Steps:
    """Steps, each of which is the present one until it has its answer.

    Args:
        steps: What to do.
        timeout: Seconds after which a database that is away is not waited for; None for no such end.

    Attributes:
        result: What the steps returned; None before their end.
    """

    def __init__(self, steps: FollowSteps, timeout: float | None) -> None:
        self._steps = steps
        self._end = math.inf if timeout is None else time.monotonic() + timeout
        self._present: Any = None
        self._answer: Any = None
        self._due = 0.0
        self._answered = False
        self._away_since: float | None = None
        self.result: Any = None

    def present(self) -> Any:
        """Return what is to be done now; after the last step ``_END``."""
        if self._present is None:
            answer, self._answer = self._answer, None
            try:
                self._present = self._steps.send(answer)
            except StopIteration as stop:
                self.result = stop.value or self.result
                return _END
            if isinstance(self._present, float | int):
                self._due = time.monotonic() + self._present
        return self._present

    def seconds(self) -> float:
        """Return how long to sleep, where that is the present step: begun before, it takes what is left of it."""
        return max(0.0, self._due - time.monotonic())

    def done(self, answer: Any = None) -> None:
        """Go on to the next step."""
        self._present, self._answer = None, answer

    def answered(self, answer: Any) -> None:
        """Go on to the next step with what the database answered."""
        self._answered, self._away_since = True, None
        self.done(answer)

    def pause_after(self, error: BaseException) -> float:
        """Return how many seconds to wait before the present step is done again; raise the error if it is not."""
        now = time.monotonic()
        if not self._answered or not database_is_away(error):
            raise error
        if self._away_since is None:
            self._away_since = now
            logger.warning("cannot read which jobs have changed, trying again: %s", first_line(error))
        left = min(self._away_since + _AWAY_SECONDS, self._end) - now
        if left <= 0:
            raise error
        return random.uniform(0, min(left, _PAUSE, now - self._away_since + _FIRST_PAUSE))  # noqa: S311 - spread, no secret


class Follower(Iterator[T]):
    """A ``wait``, ``watch`` or ``follow`` under way; any thread may ask it for what comes next, and close it.

    Args:
        steps: What to do.
        read: Answers a read.
        listener: What it waits with.
        timeout: See ``_Steps``.
    """

    def __init__(
        self, steps: FollowSteps, read: Callable[[Read], Any], listener: ChangeListener, timeout: float | None
    ) -> None:
        self._steps = _Steps(steps, timeout)
        self._read = read
        self._listener = listener
        self._busy = threading.RLock()  # a handler of signals may close it
        self._closed = False

    @property
    def result(self) -> Any:
        """What the steps returned; None before their end, or where it was closed."""
        return self._steps.result

    def begin(self) -> Self:
        """Take the first look, after which everything is yielded."""
        with self._busy:
            self._advance()
        return self

    def __next__(self) -> T:
        with self._busy:
            step = self._advance()
        if step is _END:
            self.close()
            raise StopIteration
        return step  # type: ignore[no-any-return]

    def _advance(self) -> Any:
        steps = self._steps
        while not self._closed:
            step = steps.present()
            try:
                if isinstance(step, Read):
                    steps.answered(self._read(step))
                elif isinstance(step, Locked):
                    with step.lock:
                        steps.answered(self._read_all(step))
                elif isinstance(step, float | int):
                    self._listener.wait(steps.seconds())
                    steps.done()
                else:
                    steps.done()
                    return step
            except CONNECTION_ERRORS as error:
                self._listener.wait(steps.pause_after(error))
        return _END

    def _read_all(self, locked: Locked) -> Any:
        steps, answer = locked.steps(), None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = self._read(step)

    def close(self) -> None:
        """End it, and close its connection. Doing so twice is no error."""
        self._closed = True
        self._listener.wake()
        with self._busy:
            self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncFollower(AsyncIterator[T]):
    """A ``wait``, ``watch`` or ``follow`` under way, of the tasks of one event loop after another; see ``Follower``.

    Args:
        steps: What to do.
        read: Answers a read.
        new_listener: Makes what it waits with.
        timeout: See ``_Steps``.
    """

    def __init__(
        self,
        steps: FollowSteps,
        read: Callable[[Read], Awaitable[Any]],
        new_listener: Callable[[], AsyncChangeListener],
        timeout: float | None,
    ) -> None:
        self._steps = _Steps(steps, timeout)
        self._read = read
        self._new_listener = new_listener
        self._listener: AsyncChangeListener | None = None
        self._listening: AsyncGenerator[None, None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._busy = TaskLock()
        self._closed = False
        self._begun = False

    @property
    def result(self) -> Any:
        """What the steps returned; None before their end, or where it was closed."""
        return self._steps.result

    async def __anext__(self) -> T:
        step = BEGUN
        while step is BEGUN:
            async with self._busy:
                step = await self._advance()
        if step is _END:
            await self.aclose()
            raise StopAsyncIteration
        return step  # type: ignore[return-value]

    async def _advance(self) -> Any:
        steps, listener = self._steps, await self._open()
        while not self._closed:
            step = steps.present()
            try:
                if isinstance(step, Read):
                    steps.answered(await self._read(step))
                elif isinstance(step, Locked):
                    async with step.lock:
                        steps.answered(await self._read_all(step))
                elif isinstance(step, float | int):
                    await listener.wait(steps.seconds())
                    steps.done()
                else:
                    steps.done()
                    self._begun = True
                    return step
            except CONNECTION_ERRORS as error:
                await listener.wait(steps.pause_after(error))
        return _END

    async def _open(self) -> AsyncChangeListener:
        """Return what it waits with on this loop; see to it that it is closed with this object, or with the loop."""
        loop = asyncio.get_running_loop()
        if self._listener is None or loop is not self._loop:
            self._loop, self._listener = loop, self._new_listener()
            self._listening = _listening(self._listener)
            await anext(self._listening)
        return self._listener

    async def _read_all(self, locked: Locked) -> Any:
        steps, answer = locked.steps(), None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = await self._read(step)

    async def aclose(self) -> None:
        """End it, and close its connection. Doing so twice is no error."""
        self._closed = True
        if self._listener is not None:
            self._listener.wake()
        async with self._busy:
            if self._listening is not None:
                await self._listening.aclose()

    async def __aenter__(self) -> Self:
        """Take the first look of a ``watch`` that has not begun, after which everything is yielded."""
        async with self._busy:
            if not self._begun:
                await self._advance()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def _listening(listener: AsyncChangeListener) -> AsyncGenerator[None, None]:
    """Close the listener when this ends: asyncio sees to it where nobody else does, for its generators."""
    try:
        yield
    finally:
        await listener.close()


class TaskLock:
    """A lock for the tasks of one event loop after another; asyncio's own is for those of the first."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self.lock = asyncio.Lock()

    async def __aenter__(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self.lock = loop, asyncio.Lock()
        await self.lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        self.lock.release()
