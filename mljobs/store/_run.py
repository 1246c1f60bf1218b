"""``Run``: the work on one claimed job, as its handler sees it: progress, metrics, whether to stop."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Generic, TypeVar, overload

from mljobs.errors import InvalidValueError, JobCancelled, LeaseLostError
from mljobs.jobs import Claim, Outcome, Report
from mljobs.jobs._base import M
from mljobs.states import MlJobStatus
from mljobs.store._metrics import storable_metrics, unfit_paths

_T = TypeVar("_T")
_Measure = Callable[[_T], Mapping[str, Any] | None]
_REPORT_SECONDS = 1.0
_CHECK_SECONDS = 0.25
_SHARED = threading.Lock()  # for all runs: it is held for a few instructions, and a lock for each would cost more
os.register_at_fork(after_in_child=lambda: globals().update(_SHARED=threading.Lock()))


def worker_name() -> str:
    """Return a name for operators to read: host and process."""
    return f"{socket.gethostname()}-{os.getpid()}"


class Run(Generic[M]):
    """The work on one claimed job.

    Every method may be called from any thread, and none waits for the database.

    Attributes:
        claim: The lease under which the work is done.
        retryable: Whether a failure may be retried, as its handler's policy says.
        until: When the lease ends as far as its keeper knows, on the keeper's clock.
    """

    # Defaults are the class's: a run of a short job lives for microseconds, and sets few of these.
    retryable = True
    until = 0.0
    _metrics: Any = None
    _metrics_set = False
    _reported = False
    _unreported = False
    _progress: int | None = None
    _written = 0.0
    _cancelled = False
    _lost = False
    _stopping = False
    _woken: threading.Event | None = None  # made when somebody sleeps

    def __init__(self, claim: Claim[M]) -> None:
        self.claim = claim

    def __repr__(self) -> str:
        return f"<Run of job {self.claim.job_id}, attempt {self.attempt}, lease {self.claim.token}>"

    @property
    def job(self) -> M:
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
    def metrics(self) -> Any:
        """What came out, any JSON-able value; a dict to begin with. Recorded when the job completes or fails."""
        if self._metrics is None and not self._metrics_set:
            self._metrics = {}
        return self._metrics

    @metrics.setter
    def metrics(self, value: Any) -> None:
        self._metrics = value
        self._metrics_set = True

    @property
    def measured(self) -> Any:
        """The metrics to record; None where the work has set none."""
        return self._metrics if self._metrics or self._metrics_set else None

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
        """Whether the worker is stopping: the job is requeued when its grace ends, so save a checkpoint now.

        Only known in the worker's own process, not in the processes of an executor.
        """
        return self._stopping

    def check(self) -> None:
        """Raise if the job was cancelled or its lease is gone.

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

    def report(self, **metrics: Any) -> None:
        """Report metrics: ``run.report(loss=0.31, epoch=4)``. They are merged with ``run.metrics``.

        Written with the progress, at most once a second, and the last values are never lost. Whoever reads the record of
        the running job sees them; a job that fails keeps them.

        Args:
            **metrics: JSON-able values, by name.

        Raises:
            InvalidValueError: JSON cannot hold a value, or ``run.metrics`` is no dict; nothing was reported.
            JobCancelled: The job was cancelled.
            LeaseLostError: The lease is gone.
        """
        self.check()
        _, unfit = storable_metrics(metrics)
        if unfit:
            raise InvalidValueError(unfit[0], metrics, "JSON cannot hold it; nothing was reported")
        with _SHARED:
            current = self._metrics
            if current is None:
                current = self._metrics = {}
            if not isinstance(current, dict):
                raise InvalidValueError("metrics", current, "run.report() merges into a dict")
            current.update(metrics)
            self._reported = self._unreported = True

    def sleep(self, seconds: float) -> None:
        """Sleep, but no longer than until the job is cancelled or the lease is gone; for a handler that waits for something.

        Args:
            seconds: How long at most.

        Raises:
            InvalidValueError: Not a number of seconds; or called in a coroutine, whose event loop it would block.
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
    def track(
        self, items: AsyncIterable[_T], total: int | None = None, *, report: _Measure[_T] | None = None
    ) -> AsyncIterator[_T]: ...
    @overload
    def track(
        self, items: Iterable[_T], total: int | None = None, *, report: _Measure[_T] | None = None
    ) -> Iterator[_T]: ...
    def track(
        self,
        items: Iterable[_T] | AsyncIterable[_T],
        total: int | None = None,
        *,
        report: _Measure[_T] | None = None,
    ) -> Iterator[_T] | AsyncIterator[_T]:
        """Go through ``items``, reporting progress after each, and stop where the job was cancelled.

        Args:
            items: What to go through, sync or async.
            total: How many there are; None asks ``len``, and without one no progress is reported.
            report: Called with each item when it is done; the metrics that it returns are reported, None for none.
        """
        known = len(items) if total is None and isinstance(items, Sized) else total
        if isinstance(items, AsyncIterable):
            return self._track_async(items, known, report)
        return self._track(items, known, report)

    def _track(self, items: Iterable[_T], total: int | None, measure: _Measure[_T] | None) -> Iterator[_T]:
        self.check()
        for done, item in enumerate(items, 1):
            yield item
            self._reached(item, done, total, measure)

    async def _track_async(
        self, items: AsyncIterable[_T], total: int | None, measure: _Measure[_T] | None
    ) -> AsyncIterator[_T]:
        self.check()
        done = 0
        async for item in items:
            yield item
            done += 1
            self._reached(item, done, total, measure)

    def _reached(self, item: _T, done: int, total: int | None, measure: _Measure[_T] | None) -> None:
        self.check()
        metrics = measure(item) if measure is not None else None
        if metrics is not None:
            self.report(**metrics)
        if total:
            self.progress(done * 100 // total)

    # ------------------------------------------------------------------------ for the keeper and whoever records outcomes

    def keep_result(self, returned: Any) -> None:
        """Set the metrics to what a handler returned; a dict is merged with what was reported before."""
        if self._reported and isinstance(returned, dict) and isinstance(self._metrics, dict):
            returned = {**self._metrics, **returned}
        self.metrics = returned

    def failed(self, error: str | BaseException) -> Outcome:
        """Return the outcome of a failure, with the metrics so far."""
        reason = Outcome.failed(self.claim, error).error_message
        return Outcome(self.claim, MlJobStatus.FAILED, reason, self._storable_metrics())

    def requeued(self) -> Outcome:
        """Return the outcome that requeues the job, with the metrics so far."""
        return Outcome(self.claim, MlJobStatus.QUEUED, None, self._storable_metrics())

    def unfit(self, error: InvalidValueError) -> Outcome:
        """Return the outcome of a job with metrics that JSON cannot hold: failed, with the metrics that it can hold."""
        text, paths = storable_metrics(self.measured)
        reason = Outcome.failed(self.claim, f"{error}\nnot JSON: {unfit_paths(paths)}").error_message
        return Outcome(self.claim, MlJobStatus.FAILED, reason, text)

    def _storable_metrics(self) -> str | None:
        measured = self.measured
        return None if measured is None else storable_metrics(measured)[0]

    def take_report(self, now: float, *, everything: bool = False) -> Report | None:
        """Return the report that is due and count it as written; None where nothing is due."""
        with _SHARED:
            nothing = self._progress is None and not self._unreported
            if nothing or not (everything or now - self._written >= _REPORT_SECONDS):
                return None
            progress, unreported = self._progress, self._unreported
            self._progress, self._unreported, self._written = None, False, now
            metrics = dict(self._metrics) if unreported and isinstance(self._metrics, dict) else None
        return Report(self.claim, progress, None if metrics is None else storable_metrics(metrics)[0])

    def put_back_report(self, report: Report) -> None:
        """Report again what could not be written, unless there are newer values."""
        with _SHARED:
            if self._progress is None:
                self._progress = report.progress
            self._unreported = self._unreported or report.metrics_json is not None

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
