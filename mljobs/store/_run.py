"""The work on one claimed job, whoever does it: its progress, its cancel, its lease kept alive, its outcome.

A :class:`Run` is what the working code holds. A :class:`Keeper` is a thread of its own that renews the leases of all
its runs in one statement, carries their progress, and brings back cancels; so a long import, a busy GIL or a blocked
event loop does not cost a lease. :func:`ended` says what becomes of the job when the work stops.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sqlite3
import threading
import time
import traceback
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sized
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, overload
from uuid import UUID

from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from mljobs.db._patience import answer_seconds, answers_within
from mljobs.errors import InvalidValueError, JobCancelled, LeaseLostError, MlJobsError, TerminalStateError
from mljobs.jobs._claiming import Claim, Renewal
from mljobs.jobs._finishing import Outcome
from mljobs.record._models import MlJob
from mljobs.states import MlJobStatus

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
FIRST_PAUSE = 0.05
"""Seconds before the first new attempt, while the database is away; each further pause is twice as long."""
LONGEST_PAUSE = 5.0
_PROGRESS_SECONDS = 1.0
_RENEW_SECONDS = 5.0
_AGAIN_SECONDS = 0.5
_LOOK_SECONDS = 0.25
_TRACEBACK_FRAMES = 5
_WILL_BE_SO_AGAIN = ("27", "2F", "38", "39", "54", "55000", "HV")
"""PostgreSQL's codes for what psycopg calls operational and no wait mends: limits of the program, and what triggers and
functions of the host raise."""
_TRACEBACK_CHARACTERS = 4000
_SHARED = threading.Lock()  # for all runs: it is held for a few instructions, and a lock for each would cost more
os.register_at_fork(after_in_child=lambda: globals().update(_SHARED=threading.Lock()))


class Recorder(Protocol):
    """What a keeper needs of a store."""

    def renew(self, claims: Iterable[Claim], *, lease: float = ...) -> Renewal:
        """Extend leases."""

    def set_progress_many(self, progress: Iterable[tuple[Claim, int]]) -> list[Any]:
        """Write progress."""

    def finish_many(self, outcomes: Iterable[Outcome]) -> list[Exception | None]:
        """Write outcomes."""

    def release(self, claims: Iterable[Claim]) -> int:
        """Give leases back."""

    def get(self, job: UUID) -> MlJob:
        """Read a job."""


def worker_name() -> str:
    """Return a name for operators to read: host and process."""
    return f"{socket.gethostname()}-{os.getpid()}"


def failure_text(error: BaseException) -> str:
    """Return type and message of an exception, then the last frames of its traceback."""
    summary = "".join(traceback.format_exception_only(error)).strip()
    frames = "".join(
        traceback.format_list(
            [
                frame
                for frame in traceback.extract_tb(error.__traceback__)
                if Path(frame.filename).parent != Path(__file__).parent  # the work's own frames say more than ours
            ][-_TRACEBACK_FRAMES:]
        )
    ).rstrip()
    text = f"{summary}\n{frames}" if frames else summary
    return text[:_TRACEBACK_CHARACTERS].replace("\x00", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


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
            await asyncio.sleep(min(left, _LOOK_SECONDS))
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


class Keeper:
    """Keeps the leases of runs alive from a thread of its own.

    Args:
        store: Where the jobs are.
        lease: Seconds of each lease.
        clock: A monotonic clock, in seconds.
        every: Seconds between two renewals, each of which also brings back cancels; None for a third of the lease, at
            most 5.
    """

    def __init__(
        self,
        store: Recorder,
        lease: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        every: float | None = None,
    ) -> None:
        self._store = store
        self._lease = lease
        self._patience = answer_seconds(lease)
        self._every = min(lease / 3, _RENEW_SECONDS) if every is None else every
        self._clock = clock
        self._runs: dict[int, Run] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._resting = False
        self._thread: threading.Thread | None = None

    def add(self, run: Run) -> None:
        """Keep this run's lease from now on."""
        self.add_many([run])

    def add_many(self, runs: Iterable[Run], since: float | None = None) -> None:
        """Keep the leases of these runs from now on.

        Args:
            runs: Claimed in one statement.
            since: When the claim was asked for, on this keeper's clock; None for now.
        """
        until = (self._clock() if since is None else since) + self._lease
        with self._changed:
            for run in runs:
                run.until = until
                self._runs[run.claim.token] = run
            if self._resting:
                self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="mljobs-keeper", daemon=True)
                self._thread.start()

    def remove(self, run: Run) -> None:
        """Stop keeping this run's lease."""
        self.remove_many([run])

    def remove_many(self, runs: Iterable[Run]) -> None:
        """Stop keeping the leases of these runs."""
        with self._changed:
            for run in runs:
                self._runs.pop(run.claim.token, None)

    def overdue(self, run: Run) -> bool:
        """Whether this run's lease may have ended unnoticed, because the whole process stood still."""
        return run.until <= self._clock()

    def catch_up(self) -> None:
        """Renew now if a lease may have ended unnoticed: what nobody else took is ours still."""
        with self._changed:
            late = any(run.until <= self._clock() for run in self._runs.values())
        if late:
            self.renew()

    def renew(self) -> bool:
        """Renew all leases now, and tell the runs what was found; return False where the database is away."""
        with self._changed:
            runs = dict(self._runs)
            first_end = min((run.until for run in runs.values()), default=0.0)
        if not runs:
            return True
        asked = self._clock()
        try:
            with answers_within(answer_seconds(self._lease, first_end - asked)):
                renewal = self._store.renew([run.claim for run in runs.values()], lease=self._lease)
        except (DBAPIError, PoolTimeout, OSError) as error:
            logger.warning("cannot renew %d leases: %s", len(runs), first_line(error))
            self._give_up_expired()
            return False
        with self._changed:
            for claim in (*renewal.held, *renewal.cancelled):
                runs[claim.token].until = asked + self._lease
            for claim in renewal.lost:
                self._runs.pop(claim.token, None)
        for claim in renewal.cancelled:
            runs[claim.token].mark_cancelled()
        for claim in renewal.lost:
            runs[claim.token].mark_lost()
        return True

    def write_progress(self, only: Run | None = None) -> None:
        """Write the progress that is due; of ``only`` whatever is there."""
        now = self._clock()
        with self._changed:
            runs = [only] if only is not None else list(self._runs.values())
        due = [(run, run.due_progress(now, everything=only is not None)) for run in runs]
        pairs = [(run, value) for run, value in due if value is not None]
        if not pairs:
            return
        try:
            with answers_within(self._patience):
                errors = self._store.set_progress_many([(run.claim, value) for run, value in pairs])
        except (DBAPIError, PoolTimeout, OSError) as error:
            logger.warning("cannot write progress: %s", first_line(error))
            for run, value in pairs:
                run.keep_progress(value)
            return
        for (run, _), refused in zip(pairs, errors, strict=True):
            if isinstance(refused, TerminalStateError):
                run.mark_cancelled()
            elif refused is not None:
                run.mark_lost()

    def _give_up_expired(self) -> None:
        """Where nothing could be renewed for a whole lease, somebody else may have the job by now."""
        now = self._clock()
        with self._changed:
            expired = [run for run in self._runs.values() if run.until <= now]
            for run in expired:
                del self._runs[run.claim.token]
        for run in expired:
            run.mark_lost()

    def _loop(self) -> None:
        due = self._clock() + self._every
        while True:
            with self._changed:
                if not self._closed:
                    self._changed.wait(max(0.0, min(due - self._clock(), _PROGRESS_SECONDS)))
                if not self._runs and not self._closed:  # nothing to keep, so not a tick until there is
                    self._resting = True
                    self._changed.wait()
                    self._resting = False
                    due = self._clock() + self._every
                if self._closed:
                    return
            try:
                self.write_progress()
                if self._clock() >= due:
                    pause = self._every if self.renew() else min(self._every, _AGAIN_SECONDS)
                    due = self._clock() + pause
            except Exception:
                logger.exception("the keeper goes on after an unexpected error")
                due = self._clock() + self._every

    def close(self) -> None:
        """Stop the thread; the leases live on until they expire."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def outcome_of(run: Run, error: BaseException | None) -> Outcome | None:
    """Return what to record when the work has stopped; None where nothing may be recorded any more.

    An exception fails the job. What only asks to stop (``KeyboardInterrupt``, ``SystemExit``, a cancelled coroutine)
    puts it back.
    """
    if run.cancelled or run.lost:
        return None
    if error is None:
        return Outcome.completed(run.claim, run.metrics)
    if isinstance(error, Exception):
        return Outcome.failed(run.claim, failure_text(error))
    return Outcome.requeued(run.claim)


def record_outcome(store: Recorder, run: Run, outcome: Outcome, pause: Callable[[float], object] | None = None) -> None:
    """Record the outcome, and go on trying while the database is away, until it stands or the lease is lost.

    Args:
        store: Where the job is.
        run: Whose lease is still kept alive.
        outcome: What to record.
        pause: Sleeps so many seconds between two attempts.

    Raises:
        JobCancelled: The job was cancelled before.
        LeaseLostError: The lease is gone; nothing was written.
    """
    wait = pause or threading.Event().wait
    seconds, doubtful = FIRST_PAUSE, False
    while True:
        try:
            (error,) = store.finish_many([outcome])
        except (DBAPIError, PoolTimeout, OSError) as failure:
            if not database_is_away(failure):
                raise
            logger.warning("cannot record the end of job %s yet: %s", outcome.claim.job_id, first_line(failure))
            if run.lost:
                raise LeaseLostError(outcome.claim.job_id, outcome.claim.token) from failure
            doubtful = True
            wait(seconds)
            seconds = min(seconds * 2, LONGEST_PAUSE)
            continue
        if error is None or (doubtful and stands(store, outcome)):
            return
        if isinstance(error, TerminalStateError) and error.status is MlJobStatus.CANCELLED:
            run.mark_cancelled()
            raise JobCancelled(outcome.claim.job_id) from error
        if isinstance(error, LeaseLostError):
            run.mark_lost()
        raise error


def stands(store: Recorder, outcome: Outcome) -> bool:
    """Whether an attempt whose answer was lost on the way has been recorded after all."""
    try:
        job = store.get(outcome.claim.job_id)
    except MlJobsError:
        return False
    return job.status is outcome.status and job.attempts == outcome.claim.job.attempts


def database_is_away(error: BaseException) -> bool:
    """Whether trying again later may help: no connection, a restart, a standby that is not promoted yet, a deadlock."""
    if isinstance(error, DBAPIError):
        if str(getattr(error.orig, "sqlstate", "")).startswith(_WILL_BE_SO_AGAIN):
            return False
        if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:  # no such table, say
            return False
        return isinstance(error, OperationalError | InterfaceError | InternalError) or error.connection_invalidated
    return isinstance(error, PoolTimeout | OSError)


def first_line(error: BaseException | str) -> str:
    """Return the first line of what an error says."""
    return str(error).partition("\n")[0]
