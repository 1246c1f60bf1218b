"""The outcome of a run, and recording it, also while the database is away for a time."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mljobs._logging import logger_of
from mljobs.db._failures import CONNECTION_ERRORS, database_is_away, first_line, shortened
from mljobs.errors import InvalidValueError, JobCancelled, LeaseLostError, MlJobsError, TerminalStateError
from mljobs.jobs import Outcome
from mljobs.states import MlJobStatus
from mljobs.store._keeper import Keeper, LeaseStore
from mljobs.store._run import Run

logger = logger_of(__name__)

FIRST_PAUSE = 0.05
"""Seconds before the first new attempt, while the database is away; each further pause is twice as long."""
LONGEST_PAUSE = 5.0
_TRACEBACK_FRAMES = 5
_SUMMARY_CHARACTERS = 2000
_TRACEBACK_CHARACTERS = 2000
_OURS = [Path(__file__).parents[1] / room for room in ("store", "worker")]


def failure_text(error: BaseException) -> str:
    """Return type and message of an exception, then the last frames of its traceback."""
    summary = "".join(traceback.format_exception_only(error)).strip()
    frames = "".join(
        traceback.format_list(
            [
                frame
                for frame in traceback.extract_tb(error.__traceback__)
                if Path(frame.filename).parent not in _OURS  # the frames of the handler say more
            ][-_TRACEBACK_FRAMES:]
        )
    ).rstrip()
    summary, frames = shortened(summary, _SUMMARY_CHARACTERS), shortened(frames, _TRACEBACK_CHARACTERS)
    text = f"{summary}\n{frames}" if frames else summary
    return text.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


def outcome_of(run: Run[Any], error: BaseException | None) -> Outcome | None:
    """Return the outcome of a run that has stopped; None where the job was cancelled or the lease is gone.

    An exception fails the job. ``KeyboardInterrupt``, ``SystemExit`` and ``CancelledError`` requeue it.
    """
    if run.cancelled or run.lost:
        return None
    if error is None:
        return Outcome.completed(run.claim, run.measured)
    if isinstance(error, Exception):
        return run.failed(failure_text(error))
    return run.requeued()


def record_outcome(
    store: LeaseStore, run: Run[Any], outcome: Outcome, pause: Callable[[float], object] | None = None
) -> None:
    """Record the outcome. While the database is away, try again until the lease is lost.

    Args:
        store: Where the job is.
        run: The run; a keeper renews its lease.
        outcome: What to record.
        pause: Sleeps between two attempts; takes the seconds.

    Raises:
        JobCancelled: The job was cancelled before.
        LeaseLostError: The lease is gone; nothing was written.
    """
    wait = pause or threading.Event().wait
    seconds, doubtful = FIRST_PAUSE, False
    while True:
        try:
            (error,) = store.finish_many([outcome])
        except CONNECTION_ERRORS as failure:
            if not database_is_away(failure):
                raise
            logger.warning("cannot record the end of job %s yet: %s", outcome.claim.job_id, first_line(failure))
            if run.lost:
                raise LeaseLostError(outcome.claim.job_id, outcome.claim.token) from failure
            doubtful = True
            wait(seconds)
            seconds = min(seconds * 2, LONGEST_PAUSE)
            continue
        if error is None or (doubtful and was_recorded(store, outcome)):
            return
        if isinstance(error, TerminalStateError) and error.status is MlJobStatus.CANCELLED:
            run.mark_cancelled()
            raise JobCancelled(outcome.claim.job_id) from error
        if isinstance(error, LeaseLostError):
            run.mark_lost()
        raise error


def was_recorded(store: LeaseStore, outcome: Outcome) -> bool:
    """Whether an earlier attempt, to which no answer came, has recorded the outcome."""
    try:
        job = store.get(outcome.claim.job_id)
    except MlJobsError:
        return False
    return job.status is outcome.status and job.attempts == outcome.claim.job.attempts


def record_end(store: LeaseStore, keeper: Keeper, run: Run[Any], error: BaseException | None) -> None:
    """Record how the work on a run ended."""
    try:
        outcome = outcome_of(run, error)
    except InvalidValueError as unfit:  # metrics that JSON cannot hold
        record_outcome(store, run, run.unfit(unfit))
        raise
    try:
        if error is not None:
            keeper.write_reports(run)
        if outcome is not None:
            record_outcome(store, run, outcome)
        if run.cancelled:
            store.release([run.claim])
    except Exception as failure:
        if error is None:
            raise
        error.add_note(f"mljobs: the end of job {run.claim.job_id} was not recorded: {failure}")
        return
    finally:
        keeper.remove(run)
    if error is None:
        run.check()
