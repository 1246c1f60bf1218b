"""Outcomes on their way into the database: nothing is said to have ended before it is committed.

Handlers put outcomes here and go on. Whoever claims next takes what waits here along, in one statement; what nobody took
within a few milliseconds, a thread of the outbox writes. While the database is away they are kept, and so are their
leases; an outcome is dropped only when its lease is known to be gone.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from mljobs import jobs
from mljobs.db._failures import database_is_away, first_line
from mljobs.db._timeouts import answers_within, limit_idle_transaction
from mljobs.errors import InvalidValueError, TerminalStateError
from mljobs.jobs import Bind, Claim, Outcome
from mljobs.jobs._base import connection_of
from mljobs.states import MlJobStatus
from mljobs.store._keeper import Keeper
from mljobs.store._recording import FIRST_PAUSE, LONGEST_PAUSE, was_recorded
from mljobs.store._run import Run
from mljobs.store._store import JobStore
from mljobs.worker._handlers import Handler

logger = logging.getLogger("mljobs.worker")

LINGER = 0.003
"""Seconds that an outcome waits for company at most."""
BATCH = 1000
"""The most outcomes that one statement writes."""


@dataclass(slots=True)
class Entry:
    """One run that has ended.

    Attributes:
        run: Whose lease is still kept.
        outcome: What to record; None for a cancelled or lost run.
        handler: Whose policy says what a failure leads to.
        seconds: How long the handler took.
        doubtful: Whether an attempt to record it was made whose answer never came.
        refused: Whether the database refused what the handler returned, and the outcome says so instead.
        alone: Whether the database refused the failure together with its retry, and it is recorded without.
    """

    run: Run
    outcome: Outcome | None
    handler: Handler | None
    seconds: float
    doubtful: bool = False
    refused: bool = False
    alone: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is nothing but an outcome, which may share a statement with others."""
        outcome = self.outcome
        return outcome is not None and (outcome.status is not MlJobStatus.FAILED or not self.retries)

    @property
    def retries(self) -> bool:
        """Whether a new record has to follow a failure in the same transaction."""
        return self.handler is not None and self.handler.retries > 0 and not self.alone


@dataclass
class Tally:
    """What a worker has done.

    Attributes:
        jobs: How many runs ended how: ``completed``, ``failed``, ``cancelled``, ``requeued``, ``lost``.
        retried: How many failures led to a new record.
    """

    jobs: Counter[str] = field(default_factory=Counter)
    retried: int = 0

    def __str__(self) -> str:
        parts = [f"{number} {name}" for name, number in sorted(self.jobs.items())]
        if self.retried:
            parts.append(f"{self.retried} retried")
        return ", ".join(parts) or "no jobs"


class Outbox:
    """Outcomes that wait to be recorded.

    Args:
        store: Where the jobs are.
        keeper: Keeps the leases until then.
        patience: Seconds to wait for the database's answer to one statement; None for as long as it takes.

    Attributes:
        tally: What has been recorded.
        on_recorded: Called with the entries after each write, whatever became of them.
    """

    def __init__(self, store: JobStore, keeper: Keeper, patience: float | None = None) -> None:
        self._patience = patience
        self.tally = Tally()
        self._store = store
        self._keeper = keeper
        self.on_recorded: Callable[[Sequence[Entry]], None] = lambda _: None
        self._waiting: deque[Entry] = deque()
        self._others: deque[Entry] = deque()
        self._filled = threading.Event()
        self._closing = threading.Event()
        self._hurry = threading.Event()
        self._requeued: set[int] = set()
        self._writing = 0
        self._idle = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="mljobs-outbox", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------ handlers put

    def put(self, entry: Entry) -> None:
        """Have this recorded, by whoever claims next; ``nudge`` has to follow where nobody may."""
        if entry.run.claim.token in self._requeued:
            return
        (self._waiting if entry.plain else self._others).append(entry)

    def nudge(self) -> None:
        """Have what waits written within a few milliseconds, if nobody takes it before."""
        if (self._waiting or self._others) and not self._filled.is_set():
            self._filled.set()

    def requeue(self, runs: Sequence[Run]) -> None:
        """Put back, at once, what has not ended; what its handlers report later is dropped.

        Raises:
            DBAPIError: The database is away; nothing was written.
        """
        outcomes = [Outcome.requeued(run.claim) for run in runs]
        with answers_within(self._patience):
            errors = self._store.finish_many(outcomes)
        # An error means that it ended, or was lost, at the last moment: whoever found that counts it.
        told = zip(runs, outcomes, errors, strict=True)
        done = [Entry(run, outcome, None, 0.0) for run, outcome, error in told if error is None]
        self._requeued.update(entry.run.claim.token for entry in done)
        self._end(done, ["requeued"] * len(done))

    # ------------------------------------------------------------------------------------------- whoever writes takes

    def take(self, most: int = BATCH, *, plain: bool = False) -> list[Entry]:
        """Take what waits, to write it; ``settle``, ``put_back`` or ``write``, then ``done_writing``, have to follow.

        Args:
            most: How many at most.
            plain: Only what is nothing but an outcome.
        """
        taken: list[Entry] = []
        with self._idle:
            for waiting in (self._waiting,) if plain else (self._waiting, self._others):
                while waiting and len(taken) < most:
                    taken.append(waiting.popleft())
            if taken:
                self._writing += 1
        return taken

    def put_back(self, entries: Sequence[Entry]) -> None:
        """Keep what could not be written for another attempt; drop what has lost its lease."""
        kept: list[Entry] = []
        lost: list[Entry] = []
        for entry in entries:
            entry.doubtful = True
            (lost if entry.run.lost else kept).append(entry)
        self._end(lost, ["lost"] * len(lost))
        for entry in reversed(kept):
            (self._waiting if entry.plain else self._others).appendleft(entry)
        if kept:
            self._filled.set()

    def settle(self, entries: Sequence[Entry], errors: Sequence[Exception | None]) -> None:
        """Take note of what was committed, and of what was refused because the job is not ours any more."""
        self._end(entries, [self._what_became(entry, error) for entry, error in zip(entries, errors, strict=True)])

    def _what_became(self, entry: Entry, error: Exception | None) -> str:
        outcome = entry.outcome
        if outcome is not None and (error is None or (entry.doubtful and was_recorded(self._store, outcome))):
            return _WORDS[outcome.status]
        if isinstance(error, TerminalStateError):
            entry.run.mark_cancelled()
            return "cancelled"
        entry.run.mark_lost()
        return "lost"

    def write(self, entries: Sequence[Entry]) -> None:
        """Write what was taken: all that is nothing but an outcome in one statement, the others one by one.

        Raises:
            DBAPIError: The database is away; what is not written yet has been put back.
        """
        plain = [entry for entry in entries if entry.plain]
        groups = deque([plain] if plain else [])
        groups.extend([entry] for entry in entries if not entry.plain)
        while groups:
            group = groups[0]
            try:
                with answers_within(self._patience):
                    self._write_group(group)
            except Exception as error:
                if database_is_away(error):
                    self.put_back([entry for group in groups for entry in group])
                    raise
                groups.popleft()
                if len(group) > 1:  # one of them is at fault, and which one is seen when each is written by itself
                    groups.extendleft([entry] for entry in reversed(group))
                elif not group[0].plain and group[0].outcome is not None:  # at its commit: a deferred constraint, say
                    logger.exception("job %s failed, and its retry could not be submitted", group[0].run.claim.job_id)
                    group[0].alone = True
                    groups.appendleft(group)
                elif not group[0].refused:
                    groups.appendleft([_as_refused(group[0], error)])
                else:
                    logger.exception("job %s: its end could not be recorded", group[0].run.claim.job_id)
                    self._end(group, ["lost"])  # its lease will run out, and a rescue decide
            else:
                groups.popleft()

    def _write_group(self, group: Sequence[Entry]) -> None:
        first = group[0]
        if first.outcome is None:
            held = not first.run.lost and self._store.release([first.run.claim]) > 0
            self._end(group, ["cancelled" if held else "lost"])
        elif not first.plain:
            self._write_with_retry(first)
        else:
            outcomes = [entry.outcome for entry in group if entry.outcome is not None]
            self.settle(group, self._store.finish_many(outcomes))

    def _write_with_retry(self, entry: Entry) -> None:
        retry = None
        with self._store.connect() as bind:
            if self._patience is not None:
                limit_idle_transaction(connection_of(bind), self._patience)
            errors = jobs.finish_many(bind, [entry.outcome] if entry.outcome is not None else [])
            if errors == [None]:
                retry = _submit_retry(bind, entry)
        if retry is not None:
            with self._idle:
                self.tally.retried += 1
            logger.info("job %s will be retried as %s in %.0f s", entry.run.claim.job_id, *retry)
        self.settle([entry], errors)

    def _end(self, entries: Sequence[Entry], words: Sequence[str]) -> None:
        """Count and log what became of each, and let its lease go."""
        with self._idle:
            self.tally.jobs.update(words)
        if logger.isEnabledFor(logging.WARNING):
            for entry, word in zip(entries, words, strict=True):
                level = logging.WARNING if word in _ALARMING else logging.INFO
                if level == logging.WARNING or logger.isEnabledFor(logging.INFO):
                    _log(level, entry, word)
        self._keeper.remove_many([entry.run for entry in entries])
        self.on_recorded(entries)

    def done_writing(self) -> None:
        """Say that what was taken has been settled or put back."""
        with self._idle:
            self._writing -= 1
            self._idle.notify_all()

    # ------------------------------------------------------------------------------------------------ its own thread

    def _loop(self) -> None:
        pause = FIRST_PAUSE
        while True:
            self._filled.wait()
            self._hurry.wait(LINGER)
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
        with self._idle:
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
            with self._idle:
                self._idle.wait(min(0.05, left) if left is not None else 0.05)
        return True

    def close(self) -> None:
        """Stop the thread; what still waits is left to the leases' end."""
        self._closing.set()
        self._hurry.set()
        self._filled.set()
        self._thread.join(timeout=5)


# ------------------------------------------------------------------------------------------------------- the details

_WORDS = {
    MlJobStatus.COMPLETED: "completed",
    MlJobStatus.FAILED: "failed",
    MlJobStatus.QUEUED: "requeued",
}


_ALARMING = ("failed", "lost")


def _as_refused(entry: Entry, error: Exception) -> Entry:
    """Return the entry as a failure that says what the database did not take."""
    reason = f"the database refused the outcome: {first_line(error)}"
    entry.outcome = Outcome.failed(entry.run.claim, reason)
    entry.refused = True
    return entry


def _submit_retry(bind: Bind, entry: Entry) -> tuple[Any, float] | None:
    """Submit the next record beside the failure; if that is not possible the failure stands all the same."""
    job, handler = entry.run.claim.job, entry.handler
    if handler is None:
        return None
    done = len(jobs.lineage(bind, job.id, model=type(job))) - 1
    if done >= handler.retries:
        return None
    savepoint: AbstractContextManager[Any] = bind.begin_nested()
    try:
        wait = _wait_before(handler, done + 1)
        with savepoint:
            retry = jobs.retry(bind, job.id, run_after=timedelta(seconds=wait) if wait else None, model=type(job))
    except Exception as error:
        if database_is_away(error):
            raise
        logger.exception("job %s failed, and its retry could not be submitted", job.id)
        return None
    return retry.id, wait


def _wait_before(handler: Handler, retry: int) -> float:
    try:
        wait = float(handler.backoff(retry))
    except Exception:
        raise
    except BaseException as error:  # sys.exit() in theirs must not end a thread of ours
        raise InvalidValueError("backoff", handler.backoff, f"it ended with {error!r}") from error
    if math.isnan(wait):
        raise InvalidValueError("backoff", wait, "expected seconds")
    return max(0.0, wait)


def _log(level: int, entry: Entry, word: str) -> None:
    claim: Claim = entry.run.claim
    reason = entry.outcome.error_message if entry.outcome is not None and word == "failed" else None
    logger.log(
        level,
        "job %s %s %s %s%s, attempt %d%s",
        claim.job_id,
        claim.job.kind,
        claim.job.target_name,
        word,
        f" after {entry.seconds:.3f} s" if entry.seconds else "",  # unknown of what is put back
        claim.job.attempts,
        f": {first_line(reason)}" if reason else "",
        extra={
            "job_id": str(claim.job_id),
            "kind": str(claim.job.kind),
            "target": claim.job.target_name,
            "outcome": word,
            "seconds": entry.seconds or None,
            "attempt": claim.job.attempts,
            "error": reason,
        },
    )
