"""Write the outcomes of runs. A job is logged and counted as ended only after its outcome is committed.

Handlers' threads put outcomes here and go on. The thread that claims next writes them in the statement that claims. The
writer's own thread writes the outcomes that no claim has taken within a few milliseconds. While the database is away, the
outcomes and their leases are kept; an outcome is dropped only when its lease is gone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from mljobs import jobs
from mljobs._logging import logger_of
from mljobs.db._failures import database_is_away, first_line
from mljobs.db._timeouts import answers_within, limit_idle_transaction
from mljobs.errors import TerminalStateError
from mljobs.jobs import Claim, Outcome
from mljobs.jobs._base import connection_of
from mljobs.jobs._claims import Lease
from mljobs.states import MlJobStatus
from mljobs.store._keeper import Keeper
from mljobs.store._recording import FIRST_PAUSE, LONGEST_PAUSE, was_recorded
from mljobs.store._run import Run
from mljobs.store._store import JobStore
from mljobs.worker._finished import FinishedRun, Tally, log_outcomes
from mljobs.worker._retrying import submit_retry

logger = logger_of("mljobs.worker")

BATCH_WAIT = 0.003
"""Seconds that an outcome waits for others, to be written with them."""
MANY = 16
"""If so many outcomes come within ``BATCH_WAIT``, the jobs are so short that the next claim will soon take them."""
MANY_WAIT = 0.05
"""Seconds that they then wait for that claim at most."""
BATCH = 2048
"""The most outcomes that one statement writes."""


_WORDS = {
    MlJobStatus.COMPLETED: "completed",
    MlJobStatus.FAILED: "failed",
    MlJobStatus.QUEUED: "requeued",
}


class OutcomeWriter:
    """Outcomes that wait to be recorded.

    Args:
        store: Where the jobs are.
        keeper: Keeps the leases until then.
        answer_seconds: Seconds to wait for the database's answer to one statement; None for as long as it takes.

    Attributes:
        tally: What has been recorded.
        on_recorded: Called with the entries after each write, whatever became of them.
    """

    def __init__(self, store: JobStore, keeper: Keeper, answer_seconds: float | None = None) -> None:
        self._answer_seconds = answer_seconds
        self.tally = Tally()
        self._store = store
        self._keeper = keeper
        self.on_recorded: Callable[[Sequence[FinishedRun]], None] = lambda _: None
        self._waiting: deque[FinishedRun] = deque()
        self._others: deque[FinishedRun] = deque()
        self._filled = threading.Event()
        self._closing = threading.Event()
        self._hurry = threading.Event()
        self._requeued: set[Run] = set()
        self._left_over: dict[Lease, Claim] = {}
        self._writing = 0
        self._no_writer = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="mljobs-writer", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------ handlers put

    def put(self, entry: FinishedRun) -> None:
        """Add a run that has ended; the next claim writes its outcome. Where none may follow, call ``nudge`` too."""
        if self._requeued and entry.run in self._requeued:
            return
        (self._waiting if entry.batchable else self._others).append(entry)

    def nudge(self) -> None:
        """Have the writer's own thread write what waits, within a few milliseconds, unless a claim takes it before."""
        if (self._waiting or self._others) and not self._filled.is_set():
            self._filled.set()

    def requeue(self, runs: Sequence[Run]) -> None:
        """Requeue at once the runs that have not ended; what their handlers report later is dropped.

        Raises:
            DBAPIError: The database is away; nothing was written.
        """
        outcomes = [run.requeued() for run in runs]
        with answers_within(self._answer_seconds):
            errors = self._store.finish_many(outcomes)
        # An error means that it ended, or was lost, at the last moment, and has been counted as that.
        results = zip(runs, outcomes, errors, strict=True)
        done = [FinishedRun(run, outcome, None, 0.0) for run, outcome, error in results if error is None]
        self._requeued.update(entry.run for entry in done)
        self._end(done, ["requeued"] * len(done))

    # -------------------------------------------------------------------------------- what the thread that writes calls

    def take(self, most: int = BATCH, *, batchable_only: bool = False) -> list[FinishedRun]:
        """Take what waits, to write it; ``settle``, ``put_back`` or ``write``, then ``done_writing``, have to follow.

        Args:
            most: How many at most.
            batchable_only: Only what shares a statement with others.
        """
        taken: list[FinishedRun] = []
        with self._no_writer:
            for waiting in (self._waiting,) if batchable_only else (self._waiting, self._others):
                taken += [waiting.popleft() for _ in range(min(len(waiting), most - len(taken)))]
            if taken:
                self._writing += 1
        return taken

    def put_back(self, entries: Sequence[FinishedRun]) -> None:
        """Keep what could not be written for another attempt; drop the runs that have lost their lease."""
        kept: list[FinishedRun] = []
        lost: list[FinishedRun] = []
        for entry in entries:
            entry.doubtful = True
            (lost if entry.run.lost else kept).append(entry)
        self._end(lost, ["lost"] * len(lost))
        for entry in reversed(kept):
            (self._waiting if entry.batchable else self._others).appendleft(entry)
        if kept:
            self._filled.set()

    def settle(self, entries: Sequence[FinishedRun], errors: Sequence[Exception | None]) -> None:
        """Note which outcomes were committed, and which were refused because the lease is gone or the job cancelled."""
        self._end(entries, [self._what_became(entry, error) for entry, error in zip(entries, errors, strict=True)])
        leases = {(claim := entry.run.claim).lease: claim for entry in entries}
        with self._no_writer:
            self._left_over.update((lease, claim) for lease, claim in leases.items() if lease.may_be_left_over)

    def _what_became(self, entry: FinishedRun, error: Exception | None) -> str:
        outcome = entry.outcome
        if outcome is not None and (error is None or (entry.doubtful and was_recorded(self._store, outcome))):
            return _WORDS[outcome.status]
        if isinstance(error, TerminalStateError):
            entry.run.mark_cancelled()
            return "cancelled"
        entry.run.mark_lost()
        return "lost"

    def write(self, entries: Sequence[FinishedRun]) -> None:
        """Write what was taken: what is batchable in one statement, the others one by one.

        Raises:
            DBAPIError: The database is away; what is not written yet has been put back.
        """
        batch = [entry for entry in entries if entry.batchable]
        groups = deque([batch] if batch else [])
        groups.extend([entry] for entry in entries if not entry.batchable)
        while groups:
            group = groups[0]
            try:
                with answers_within(self._answer_seconds):
                    self._write_group(group)
            except Exception as error:
                if database_is_away(error):
                    self.put_back([entry for group in groups for entry in group])
                    raise
                groups.popleft()
                if len(group) > 1:  # one of them is at fault, and which one is seen when each is written by itself
                    groups.extendleft([entry] for entry in reversed(group))
                elif (
                    not group[0].batchable and group[0].outcome is not None
                ):  # at its commit: a deferred constraint, say
                    _cannot(group[0], "failed, and its retry could not be submitted", error)
                    group[0].retry_refused = True
                    groups.appendleft(group)
                elif not group[0].refused:
                    groups.appendleft([_as_refused(group[0], error)])
                else:
                    _cannot(group[0], "has ended, and that could not be recorded", error)
                    self._end(group, ["lost"])  # its lease will run out, and a rescue decide
            else:
                groups.popleft()

    def _write_group(self, group: Sequence[FinishedRun]) -> None:
        first = group[0]
        if first.outcome is None:
            # The job of a lost one stays in its lease: without it no rescue would ever put it back.
            held = not first.run.lost and self._store.release([first.run.claim]) > 0
            self._end(group, ["cancelled" if held else "lost"])
        elif not first.batchable:
            self._write_with_retry(first)
        else:
            outcomes = [entry.outcome for entry in group if entry.outcome is not None]
            self.settle(group, self._store.finish_many(outcomes))

    def _write_with_retry(self, entry: FinishedRun) -> None:
        retry = None
        with self._store.connect() as bind:
            if self._answer_seconds is not None:
                limit_idle_transaction(connection_of(bind, self._store.model), self._answer_seconds)
            errors = jobs.finish_many(bind, [entry.outcome] if entry.outcome is not None else [])
            if errors == [None]:
                retry = submit_retry(bind, entry)
        if retry is not None:
            with self._no_writer:
                self.tally.retried += 1
            logger.info("job %s will be retried as %s in %.0f s", entry.run.claim.job_id, *retry)
        self.settle([entry], errors)

    def _end(self, entries: Sequence[FinishedRun], words: Sequence[str]) -> None:
        """Count and log what became of each run, and stop keeping its lease."""
        with self._no_writer:
            self.tally.jobs.update(words)
        log_outcomes(entries, words)
        self._keeper.remove_many([entry.run for entry in entries])
        self.on_recorded(entries)

    def release_left_over(self) -> None:
        """Delete leases whose jobs ended in two writes at the same time, neither of which saw that it was the last."""
        with self._no_writer:
            left_over, self._left_over = self._left_over, {}
        if left_over:
            try:
                with answers_within(self._answer_seconds):
                    self._store.release(left_over.values())
            except Exception as error:  # noqa: BLE001 - whatever it is, a rescue deletes them when they have expired
                logger.warning("leases without jobs are left until they expire: %s", first_line(error))

    def done_writing(self) -> None:
        """Note that what was taken has been settled or put back."""
        with self._no_writer:
            self._writing -= 1
            self._no_writer.notify_all()

    # ------------------------------------------------------------------------------------------------ its own thread

    def _loop(self) -> None:
        pause = FIRST_PAUSE
        while True:
            self._filled.wait()
            self._hurry.wait(BATCH_WAIT)
            if len(self._waiting) >= MANY:
                self._hurry.wait(MANY_WAIT - BATCH_WAIT)
            self._filled.clear()
            if self._closing.is_set():
                return
            entries = self.take()
            if not entries:
                continue
            try:
                self.write(entries)
                pause = FIRST_PAUSE
            except Exception as error:  # noqa: BLE001 - only a database that is away gets here
                logger.warning("cannot record the end of %d jobs yet: %s", len(entries), first_line(error))
                self._hurry.wait(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
            finally:
                self.done_writing()
                if self._waiting or self._others:
                    self._filled.set()

    @property
    def empty(self) -> bool:
        """Whether nothing waits and nothing is being written."""
        with self._no_writer:
            return not self._waiting and not self._others and self._writing == 0

    def drain(self, timeout: float | None) -> bool:
        """Wait until everything is recorded or dropped.

        Args:
            timeout: Seconds; None for as long as it takes.

        Returns:
            Whether it is.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not self.empty:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            with self._no_writer:
                self._no_writer.wait(min(0.05, left) if left is not None else 0.05)
        return True

    def close(self) -> None:
        """Stop the thread. What still waits is not written: those leases expire, and a rescue requeues the jobs."""
        self._closing.set()
        self._hurry.set()
        self._filled.set()
        self._thread.join(timeout=5)


def _as_refused(entry: FinishedRun, error: Exception) -> FinishedRun:
    """Return the entry as a failure that says what the database did not take."""
    reason = f"the database refused the outcome: {first_line(error)}"
    entry.outcome = Outcome.failed(entry.run.claim, reason)
    entry.refused = True
    return entry


def _cannot(entry: FinishedRun, what: str, error: Exception) -> None:
    logger.error("job %s %s: %s", entry.run.claim.job_id, what, first_line(error))
