"""Which run to start next. The first idle thread claims for all, and records what has ended meanwhile.

Handlers' threads ask ``Prefetcher.next``. The first that finds few runs in the buffer claims for all: it writes the
waiting outcomes and claims the next jobs in one statement (``finish_and_claim``), while the other threads start the runs
in the buffer. So a worker with one slot makes one round trip a job, and a worker with short jobs one for hundreds.

Only jobs that can start soon are claimed ahead: as many as lately ended in ``AHEAD_SECONDS``. So a job does not wait here
while another worker is idle, and its lease does not expire before it starts. A job that waits longer, because a long job
came after many short ones, is requeued.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from mljobs._logging import logger_of
from mljobs.db._failures import database_is_away, first_line
from mljobs.db._timeouts import answer_seconds, answers_within
from mljobs.errors import StartRefusedError
from mljobs.jobs import Claim, Outcome
from mljobs.jobs._claiming import MAX_BATCH
from mljobs.jobs._submitting import first_active
from mljobs.store._keeper import Keeper
from mljobs.store._recording import FIRST_PAUSE, LONGEST_PAUSE
from mljobs.store._run import Run
from mljobs.store._store import JobStore
from mljobs.worker._finished import FinishedRun
from mljobs.worker._recording import OutcomeWriter

logger = logger_of("mljobs.worker")

AHEAD_SECONDS = 0.25
"""How long a job that was claimed ahead should wait at most."""
STALE_SECONDS = 2.0
"""How long it waits before it is requeued."""
LOCK_SECONDS = 0.25
"""How long a claim waits for an open transaction that takes a target, before it claims no exclusive jobs."""
REFUSED_MAX = 10_000
"""How many jobs that cannot be started a worker passes over; with more at the head of the queue it waits."""
_ROUND = 16
_BUSY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ClaimSettings:
    """What a worker claims.

    Attributes:
        worker: The name that leases carry.
        kinds: The kinds that it handles.
        lease: Seconds of each lease.
        slots: How many handlers may run at a time.
        ahead: How many jobs to claim ahead of need at most.
        poll: Seconds between two looks at an empty queue, with every notification lost.
        until_idle: Whether to stop when there is nothing to do.
        until_empty: Whether to stop when no job of these kinds is queued or running, whatever its ``run_after``.
    """

    worker: str
    kinds: Sequence[str]
    lease: float
    slots: int
    ahead: int
    poll: float
    until_idle: bool
    until_empty: bool = False


class Prefetcher:
    """A buffer of claimed runs, and the one thread that claims more.

    Args:
        store: Where the jobs are.
        settings: What to claim.
        keeper: Keeps the leases from the moment of the claim.
        writer: Has the outcomes that the statement of a claim writes too.
        on_idle: Called when no run is under way, after ``stop`` or because no job is left.
        clock: A monotonic clock, in seconds.
    """

    def __init__(
        self,
        store: JobStore,
        settings: ClaimSettings,
        *,
        keeper: Keeper,
        writer: OutcomeWriter,
        on_idle: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._settings = settings
        self._answer_seconds = answer_seconds(settings.lease)
        self._keeper = keeper
        self._writer = writer
        self._on_idle = on_idle
        self._clock = clock
        self._lock = threading.Lock()  # its own `with` costs half of the condition's
        self._changed = threading.Condition(self._lock)
        self._buffer: deque[Run] = deque()
        self._buffered_at = 0.0
        self._under_way: set[Run] = set()
        self._claiming = False
        self._drained = False  # the last claim found less than was asked for: there is hardly more
        self._stopped = False
        self._stopping = threading.Event()
        self._waiting = 0
        self._claimer_waits = False  # for the end of what is under way, to see that nothing is left
        self._rate = 0.0
        self._ended = 0
        self._intervals: deque[tuple[int, float]] = deque()
        self._recorded = 0  # how many times: an outcome may free a target that a claim has just found taken
        self._since = clock()
        self._listener = store.new_listener(workers=True)
        self._slept = False
        self._woken_at = 0.0
        self._refused: list[UUID] = []
        self.abandoned = 0

    # ------------------------------------------------------------------------------------------- what places call

    def next(self) -> Run | None:
        """Return the next run, waiting for one; None when the worker stops."""
        while True:
            with self._lock:
                run = self._take_or_claim()
            if run is None:
                return None
            if run is not True:
                if (self._clock() < run.until and not run.cancelled and not run.lost) or self._still_ours(run):
                    return run
                continue
            try:
                self._claim_for_all()
            finally:
                with self._lock:
                    self._claiming = False
                    self._writer.nudge()
                    idle = self._stopped and not self._under_way
                    if self._stopped:
                        self._changed.notify_all()
                    else:
                        self._changed.notify()  # who claims next
                if idle:
                    self._on_idle()

    def _take_or_claim(self) -> Run | Literal[True] | None:
        """Return a run; True where the caller has to claim for all; None where the worker stops."""
        while True:
            if self._stopped:
                self._writer.nudge()  # no claim will record what this thread has just handed over
                return None
            if len(self._under_way) < self._settings.slots:
                if not self._claiming and len(self._buffer) <= (0 if self._drained else self._low_mark()):
                    self._claiming = True
                    return True
                if self._buffer:
                    run = self._buffer.popleft()
                    self._under_way.add(run)
                    self._writer.nudge()
                    return run
            self._writer.nudge()
            self._waiting += 1
            self._changed.wait()
            self._waiting -= 1

    def _low_mark(self) -> int:
        """Return the number of runs in the buffer at which to claim; with several threads it is not yet empty then."""
        return 0 if self._settings.slots == 1 else self._ahead() // 4

    def _still_ours(self, run: Run) -> bool:
        """Whether the lease of a run that starts late still stands: the process may have been suspended."""
        if self._keeper.overdue(run):
            self._keeper.renew()
        if not run.lost and not run.cancelled and self._keeper.overdue(run):
            run.mark_lost()
        if run.lost or run.cancelled:
            self._writer.put(FinishedRun(run, None, None, 0.0))
            self._writer.nudge()
            self.ended(run)
            return False
        return True

    def ended(self, run: Run) -> None:
        """Note that this run's handler has ended and the writer has its outcome."""
        with self._lock:
            self._under_way.discard(run)
            self._ended += 1
            if self._stopped:
                if not self._under_way and not self._claiming:
                    self._on_idle()
            elif self._claimer_waits:
                self._changed.notify_all()
            elif self._waiting:
                self._changed.notify()

    # ---------------------------------------------------------------------------------------- the thread that claims

    def _ahead(self) -> int:
        return min(self._settings.ahead, int(self._rate * min(AHEAD_SECONDS, self._settings.lease / 4)))

    def _measure(self) -> None:
        """Set how many runs end a second: over the last claims that cover ``AHEAD_SECONDS``, or over the last one if higher.

        Called before a claim: the runs that have ended since the last one are those that it claimed.
        """
        now = self._clock()
        ended, seconds = self._ended, now - self._since
        if not ended or seconds <= 0:
            return
        self._ended, self._since = 0, now
        intervals = self._intervals
        intervals.append((ended, seconds))
        whole = sum(seconds for _, seconds in intervals)
        while whole - intervals[0][1] >= AHEAD_SECONDS:
            whole -= intervals.popleft()[1]
        self._rate = max(ended / seconds, sum(ended for ended, _ in intervals) / whole)

    def _forget_rate(self) -> None:
        self._rate, self._ended, self._since = 0.0, 0, self._clock()
        self._intervals.clear()

    def _number(self) -> int:
        """Return how many jobs to claim; a large number is rounded down to a power of two, so that few statements exist."""
        with self._lock:
            self._measure()
            free = self._settings.slots - len(self._under_way)
            number = free + self._ahead() - len(self._buffer)
        if number > _ROUND:
            number = 1 << (number.bit_length() - 1)
        return max(1, min(number, MAX_BATCH))

    def _claim_for_all(self) -> None:
        """Write the waiting outcomes and claim jobs; sleep if there are none."""
        pause = FIRST_PAUSE
        while not self._stopped:
            recorded = self._recorded
            taken = self._writer.take(batchable_only=True)
            try:
                claims = self._exchange(taken)
            except Exception as error:
                if not _is_passing(error):
                    raise
                logger.warning("cannot claim jobs yet: %s", first_line(error))
                self._stopping.wait(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
                continue
            finally:
                if taken:
                    self._writer.done_writing()
            if claims or self._buffer:
                return
            self._slept = True  # from here on ``recorded`` wakes this thread
            if taken or self._recorded != recorded:
                continue
            if self._nothing_left(recorded):
                return
            self._writer.nudge()  # for the outcomes that share no statement with others
            self._sleep()
            return

    def _exchange(self, taken: Sequence[FinishedRun]) -> bool:
        """Write ``taken``, claim, and buffer the claims; return whether there are any."""
        outcomes = [entry.outcome for entry in taken if entry.outcome is not None]
        number = self._number()
        asked = self._clock()
        try:
            errors, claims = self._finish_and_claim(outcomes, number)
        except Exception as error:
            if taken and not _is_passing(error):  # one of the outcomes is at fault
                self._writer.write(taken)
                return True
            self._writer.put_back(taken)
            raise
        self._drained = len(claims) < number
        self._add_claims(claims, asked)
        if taken:
            try:
                self._writer.settle(taken, errors)
            except Exception:  # the database went away while a doubtful outcome was looked up
                self._writer.put_back(taken)
                raise
        return bool(claims)

    def _finish_and_claim(
        self, outcomes: Sequence[Outcome], number: int
    ) -> tuple[list[Exception | None], list[Claim[Any]]]:
        """Write outcomes and claim. A job that cannot be started is logged once, and skipped as long as this worker runs."""
        settings = self._settings
        while True:
            try:
                with answers_within(self._answer_seconds):
                    return self._store.finish_and_claim(
                        outcomes,
                        worker=settings.worker,
                        kinds=settings.kinds,
                        limit=number,
                        lease=settings.lease,
                        skip=self._refused,
                        lock_timeout=LOCK_SECONDS,
                    )
            except StartRefusedError as refused:
                if len(self._refused) >= REFUSED_MAX:
                    raise
                self._refused.append(refused.job_id)
                logger.error(  # noqa: TRY400 - one line; the traceback is ours
                    "worker %s passes over what it cannot start: %s",
                    settings.worker,
                    first_line(refused),
                    extra={"job_id": str(refused.job_id)},
                )

    def _add_claims(self, claims: Sequence[Claim], asked: float) -> None:
        if not claims:
            return
        runs = [Run(claim) for claim in claims]
        self._keeper.add_many(runs, since=asked)
        with self._lock:
            self._buffer.extend(runs)
            self._buffered_at = self._clock()
            stopped = self._stopped
            if self._waiting:
                self._changed.notify(len(runs))
        if stopped:
            self._put_back_buffered()
        if self._slept and self._clock() - self._woken_at > _BUSY_SECONDS:
            self._listener.disconnect()  # while somebody listens, every submit pays for a notification
            self._slept = False

    def _nothing_left(self, recorded: int) -> bool:
        """Return True if this thread need not sleep: it has waited, or nothing is left and the worker stops.

        Args:
            recorded: What ``_recorded`` was before the claim that found nothing.
        """
        if not self._settings.until_idle and not self._settings.until_empty:
            return False
        with self._lock:
            if self._under_way or self._buffer or not self._writer.empty:
                self._claimer_waits = True
                self._changed.wait(self._settings.poll)
                self._claimer_waits = False
                return True
            if self._recorded != recorded:
                return True
        if self._settings.until_empty and self._any_left():
            return False
        with self._lock:
            self._stopped = True
            self._changed.notify_all()
        self._on_idle()
        return True

    def _any_left(self) -> bool:
        """Whether a job of these kinds is queued, or running in another worker."""
        try:
            with answers_within(self._answer_seconds), self._store.connect(atomic=False) as bind:
                return (
                    first_active(bind, self._store.model, self._store.model.kind.in_(self._settings.kinds)) is not None
                )
        except Exception as error:
            if not database_is_away(error):
                raise
            return True

    def _sleep(self) -> None:
        self._listener.wait(self._settings.poll)
        self._woken_at = self._clock()
        with self._lock:
            self._forget_rate()

    def recorded(self, entries: Sequence[FinishedRun]) -> None:
        """Claim again soon if an exclusive job has ended: other jobs may have waited for its target."""
        with self._lock:
            self._recorded += 1
            if self._claimer_waits:
                self._changed.notify_all()
                return
        if self._slept and any(entry.run.job.exclusive for entry in entries):
            self._listener.wake()

    # ---------------------------------------------------------------------------------------- what the worker calls

    def put_back_stale(self) -> None:
        """Requeue jobs that were claimed ahead and have waited long: other workers may be idle."""
        with self._lock:
            if not self._buffer or self._clock() - self._buffered_at < STALE_SECONDS:
                return
            self._forget_rate()
        self._put_back_buffered()

    def _put_back_buffered(self) -> None:
        with self._lock:
            runs = list(self._buffer)
            self._buffer.clear()
        for run in runs:
            self._writer.put(FinishedRun(run, Outcome.requeued(run.claim), None, 0.0))
        self._writer.nudge()

    def stop(self) -> None:
        """Claim nothing more, requeue the jobs that have not started, and wake every thread that waits."""
        with self._lock:
            self._stopped = True
            idle = not self._under_way and not self._claiming
            self._changed.notify_all()
        self._stopping.set()
        self._listener.wake()
        self._put_back_buffered()
        if idle:
            self._on_idle()

    @property
    def stopped(self) -> bool:
        """Whether nothing more is claimed."""
        return self._stopped

    def under_way(self) -> list[Run]:
        """Return the runs whose handlers have not ended."""
        with self._lock:
            return list(self._under_way)

    @property
    def busy(self) -> bool:
        """Whether a handler has not ended, or a claim may still bring something."""
        with self._lock:
            return bool(self._under_way) or self._claiming

    def abandon(self, runs: Sequence[Run]) -> None:
        """Count these runs as abandoned: their handlers may go on, but nobody waits for them."""
        with self._lock:
            self.abandoned += len(runs)
            self._under_way.difference_update(runs)

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()


def _is_passing(error: BaseException) -> bool:
    """Whether a later claim may succeed."""
    return isinstance(error, StartRefusedError) or database_is_away(error)
