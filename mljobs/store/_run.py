"""``Run``: the work on one claimed job, as the working code sees it: progress, cancel, a lost lease."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sized
from typing import Any, TypeVar, overload

from mljobs.errors import InvalidValueError, JobCancelled, LeaseLostError
from mljobs.jobs import Claim
from mljobs.record._models import MlJob

_T = TypeVar("_T")
_PROGRESS_SECONDS = 1.0
_CHECK_SECONDS = 0.25
_SHARED = threading.Lock()  # for all runs: it is held for a few instructions, and a lock for each would cost more
os.register_at_fork(after_in_child=lambda: globals().update(_SHARED=threading.Lock()))


def worker_name() -> str:
    """Return a name for operators to read: host and process."""
    return f"{socket.gethostname()}-{os.getpid()}"


class Run:
    """The work on one claimed job.

    Every method may be called from any thread, and none waits for the database.

    Attributes:
        claim: The lease under which the work is done.
        metrics: What came out, any JSON-able value; recorded when the job completes.
        until: When the lease ends as far as its keeper knows, on the keeper's clock.
    """

    __slots__ = ("_cancelled", "_lost", "_progress", "_stopping", "_woken", "_written", "claim", "metrics", "until")

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.metrics: Any = None
        self.until = 0.0
        self._progress: int | None = None
        self._written = 0.0
        self._cancelled = False
        self._lost = False
        self._stopping = False
        self._woken: threading.Event | None = None  # made when somebody sleeps: a short job never does

    def __repr__(self) -> str:
        return f"<Run of job {self.claim.job_id}, attempt {self.attempt}, lease {self.claim.token}>"

    @property
    def job(self) -> MlJob:
        """The record as it was claimed."""
        return self.claim.job

    @property
    def spec(self) -> Any:
        """What to do: the job's ``spec``."""
        return self.claim.job.spec

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1."""
        return self.claim.job.attempts

    @property
    def cancelled(self) -> bool:
        """Whether the job has been cancelled; the work should stop."""
        return self._cancelled

    @property
    def lost(self) -> bool:
        """Whether the lease is gone; the work should stop, nothing that it reports will be accepted."""
        return self._lost

    @property
    def stopping(self) -> bool:
        """Whether the worker has been told to stop: the job is put back when its grace ends, so save what helps then.

        Seen in the worker's own process; a handler in an executor's process is told nothing before.
        """
        return self._stopping

    def check(self) -> None:
        """Stop here if the work is no longer wanted.

        Raises:
            JobCancelled: The job was cancelled.
            LeaseLostError: The lease is gone.
        """
        if self._cancelled:
            raise JobCancelled(self.claim.job_id)
        if self._lost:
            raise LeaseLostError(self.claim.job_id, self.claim.token)

    def progress(self, percent: int) -> None:
        """Report progress; written at most once a second, and the last value is never lost.

        Args:
            percent: 0..100; more counts as 100.

        Raises:
            InvalidValueError: Not a number.
            JobCancelled: The job was cancelled.
            LeaseLostError: The lease is gone.
        """
        self.check()
        try:
            whole = int(percent)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidValueError("percent", percent, "expected a number, 0 to 100") from error
        with _SHARED:
            self._progress = max(0, min(100, whole))

    def sleep(self, seconds: float) -> None:
        """Sleep, unless the work is no longer wanted; for a handler that waits for something outside.

        Args:
            seconds: How long at most.

        Raises:
            InvalidValueError: Not a number of seconds, or this is a coroutine, whose loop would stand still.
            JobCancelled: The job was cancelled.
            LeaseLostError: The lease is gone.
        """
        _check_pause(seconds)
        if asyncio._get_running_loop() is not None:  # noqa: SLF001 - the public one raises
            raise InvalidValueError("seconds", seconds, "in a coroutine, `await run.sleep_async(seconds)`")
        with _SHARED:
            if self._woken is None:
                self._woken = threading.Event()
        self.check()
        self._woken.wait(seconds)
        self.check()

    async def sleep_async(self, seconds: float) -> None:
        """Sleep as ``sleep`` does, in a coroutine.

        Args:
            seconds: How long at most.

        Raises:
            InvalidValueError: Not a number of seconds.
            JobCancelled: The job was cancelled.
            LeaseLostError: The lease is gone.
        """
        _check_pause(seconds)
        end = time.monotonic() + seconds
        self.check()
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _CHECK_SECONDS))
            self.check()

    @overload
    def track(self, items: AsyncIterable[_T], total: int | None = None) -> AsyncIterator[_T]: ...
    @overload
    def track(self, items: Iterable[_T], total: int | None = None) -> Iterator[_T]: ...
    def track(
        self, items: Iterable[_T] | AsyncIterable[_T], total: int | None = None
    ) -> Iterator[_T] | AsyncIterator[_T]:
        """Go through ``items``, reporting progress after each, and stop where the job was cancelled.

        Args:
            items: What to go through, sync or async.
            total: How many there are; None asks ``len``, and without one no progress is reported.
        """
        known = len(items) if total is None and isinstance(items, Sized) else total
        if isinstance(items, AsyncIterable):
            return self._track_async(items, known)
        return self._track(items, known)

    def _track(self, items: Iterable[_T], total: int | None) -> Iterator[_T]:
        self.check()
        for done, item in enumerate(items, 1):
            yield item
            self._reached(done, total)

    async def _track_async(self, items: AsyncIterable[_T], total: int | None) -> AsyncIterator[_T]:
        self.check()
        done = 0
        async for item in items:
            yield item
            done += 1
            self._reached(done, total)

    def _reached(self, done: int, total: int | None) -> None:
        self.check()
        if total:
            self.progress(done * 100 // total)

    # What the keeper does with it.

    def due_progress(self, now: float, *, everything: bool = False) -> int | None:
        """Take the value to be written now, if there is one."""
        with _SHARED:
            if self._progress is None or not (everything or now - self._written >= _PROGRESS_SECONDS):
                return None
            value, self._progress, self._written = self._progress, None, now
            return value

    def keep_progress(self, value: int) -> None:
        """Put back a value that could not be written, unless a later one has come."""
        with _SHARED:
            if self._progress is None:
                self._progress = value

    def mark_cancelled(self) -> None:
        """Tell the work that the job was cancelled."""
        self._cancelled = True
        self._wake()

    def mark_stopping(self) -> None:
        """Tell the work that its worker stops."""
        self._stopping = True

    def mark_lost(self) -> None:
        """Tell the work that the lease is gone."""
        self._lost = True
        self._wake()

    def _wake(self) -> None:
        with _SHARED:
            if self._woken is not None:
                self._woken.set()


def _check_pause(seconds: float) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= threading.TIMEOUT_MAX:
        raise InvalidValueError("seconds", seconds, "expected seconds of at least 0")
