"""``Keeper``: a thread that renews the leases of runs.

It renews all leases in one statement, which also tells it of cancels, and writes progress and metrics in another. So a
handler that blocks its thread or its event loop does not lose its lease.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol, Self
from uuid import UUID

from mljobs._logging import logger_of
from mljobs.db._failures import CONNECTION_ERRORS, first_line
from mljobs.db._timeouts import answer_seconds, answers_within
from mljobs.errors import TerminalStateError
from mljobs.jobs import Claim, Outcome, Renewal, Report
from mljobs.store._run import Run

logger = logger_of(__name__)

_WRITE_SECONDS = 1.0
_RENEW_SECONDS = 5.0
_RETRY_SECONDS = 0.5


class LeaseStore(Protocol):
    """What ``Keeper`` and ``record_outcome`` need of a store."""

    def renew(self, claims: Iterable[Claim[Any]], *, lease: float = ...) -> Renewal[Any]:
        """Extend leases."""

    def report_many(self, reports: Iterable[Report]) -> list[Any]:
        """Write progress and metrics."""

    def finish_many(self, outcomes: Iterable[Outcome]) -> list[Exception | None]:
        """Write outcomes."""

    def release(self, claims: Iterable[Claim[Any]]) -> int:
        """Give leases back."""

    def get(self, job: UUID) -> Any:
        """Read a job."""


class Keeper:
    """Keeps the leases of runs alive from a thread of its own.

    Args:
        store: Where the jobs are.
        lease: Seconds of each lease.
        clock: A monotonic clock, in seconds.
        every: Seconds between two renewals, so also until a cancel is noticed; None for a third of the lease, at most 5.
        on_renewal: Called after each renewal; also where there was no lease to renew.
    """

    def __init__(
        self,
        store: LeaseStore,
        lease: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        every: float | None = None,
        on_renewal: Callable[[], None] | None = None,
    ) -> None:
        self._store = store
        self._lease = lease
        self._answer_seconds = answer_seconds(lease)
        self._every = min(lease / 3, _RENEW_SECONDS) if every is None else every
        self._clock = clock
        self._on_renewal = on_renewal
        self._runs: set[Run[Any]] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, run: Run[Any]) -> None:
        """Keep this run's lease from now on."""
        self.add_many([run])

    def add_many(self, runs: Iterable[Run[Any]], since: float | None = None) -> None:
        """Keep the leases of these runs from now on.

        Args:
            runs: Claimed in one statement.
            since: When the claim was asked for, on this keeper's clock; None for now.
        """
        until = (self._clock() if since is None else since) + self._lease
        with self._changed:
            for run in runs:
                run.until = until
                self._runs.add(run)
        self.start()

    def start(self) -> None:
        """Start the thread, if it does not run yet. ``add`` does so too."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="mljobs-keeper", daemon=True)
                self._thread.start()

    def remove(self, run: Run[Any]) -> None:
        """Stop keeping this run's lease."""
        self.remove_many([run])

    def remove_many(self, runs: Iterable[Run[Any]]) -> None:
        """Stop keeping the leases of these runs."""
        with self._changed:
            self._runs.difference_update(runs)

    def overdue(self, run: Run[Any]) -> bool:
        """Whether this run's lease may have expired, because the whole process was suspended."""
        return run.until <= self._clock()

    def catch_up(self) -> None:
        """Renew now if a lease may have expired: until a rescue it can still be renewed."""
        with self._changed:
            late = any(run.until <= self._clock() for run in self._runs)
        if late:
            self.renew()

    def renew(self) -> bool:
        """Renew all leases now, and mark the runs that are cancelled or lost; return False where the database is away."""
        with self._changed:
            runs = {run.claim: run for run in self._runs}
            first_end = min((run.until for run in self._runs), default=0.0)
        if not runs:
            return True
        asked = self._clock()
        try:
            with answers_within(answer_seconds(self._lease, first_end - asked)):
                renewal = self._store.renew(runs, lease=self._lease)
        except CONNECTION_ERRORS as error:
            logger.warning("cannot renew %d leases: %s", len(runs), first_line(error))
            self._give_up_expired()
            return False
        with self._changed:
            for claim in (*renewal.held, *renewal.cancelled):
                runs[claim].until = asked + self._lease
            self._runs.difference_update(runs[claim] for claim in renewal.lost)
        for claim in renewal.cancelled:
            runs[claim].mark_cancelled()
        for claim in renewal.lost:
            runs[claim].mark_lost()
        return True

    def write_reports(self, only: Run[Any] | None = None) -> None:
        """Write the progress and metrics that are due, of all runs in one statement; of ``only`` also what is not due."""
        now = self._clock()
        with self._changed:
            runs = [only] if only is not None else list(self._runs)
        due = [(run, run.take_report(now, everything=only is not None)) for run in runs]
        reports = [(run, report) for run, report in due if report is not None]
        if not reports:
            return
        try:
            with answers_within(self._answer_seconds):
                errors = self._store.report_many([report for _, report in reports])
        except CONNECTION_ERRORS as error:
            logger.warning("cannot write progress: %s", first_line(error))
            for run, report in reports:
                run.put_back_report(report)
            return
        for (run, _), refused in zip(reports, errors, strict=True):
            if isinstance(refused, TerminalStateError):
                run.mark_cancelled()
            elif refused is not None:
                run.mark_lost()

    def _give_up_expired(self) -> None:
        """Mark as lost the runs whose lease has expired: another worker may have the job by now."""
        now = self._clock()
        with self._changed:
            expired = [run for run in self._runs if run.until <= now]
            self._runs.difference_update(expired)
        for run in expired:
            run.mark_lost()

    def _loop(self) -> None:
        due = self._clock() + self._every
        while True:
            with self._changed:
                if not self._closed:
                    self._changed.wait(max(0.0, min(due - self._clock(), _WRITE_SECONDS)))
                if self._closed:
                    return
            try:
                self.write_reports()
                if self._clock() >= due:
                    renewed = self.renew()
                    if renewed and self._on_renewal is not None:
                        self._on_renewal()
                    due = self._clock() + (self._every if renewed else min(self._every, _RETRY_SECONDS))
            except Exception:
                logger.exception("the keeper goes on after an unexpected error")
                due = self._clock() + self._every

    def close(self) -> None:
        """Stop the thread. The leases stand until they expire."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
