"""Runs that have ended and wait to be recorded; and the count and the log of how they ended."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from mljobs._logging import logger_of
from mljobs.db._failures import first_line, one_line, shortened
from mljobs.jobs import Claim, Outcome
from mljobs.states import MlJobStatus
from mljobs.store._run import Run
from mljobs.worker._handlers import Handler

logger = logger_of("mljobs.worker")


class FinishedRun(msgspec.Struct, eq=False, gc=False):
    """One run that has ended.

    Attributes:
        run: Whose lease is still kept.
        outcome: What to record; None for a cancelled or lost run.
        handler: Whose policy says what a failure leads to.
        seconds: How long the handler took.
        doubtful: Whether it was sent to the database, and no answer came.
        refused: Whether the database refused what the handler returned, and the outcome says so instead.
        retry_refused: Whether the database refused the failure together with its retry, and it is recorded without.
    """

    run: Run
    outcome: Outcome | None
    handler: Handler | None
    seconds: float
    doubtful: bool = False
    refused: bool = False
    retry_refused: bool = False

    @property
    def batchable(self) -> bool:
        """Whether its outcome may share a statement with others."""
        outcome = self.outcome
        return outcome is not None and (outcome.status is not MlJobStatus.FAILED or not self.may_be_retried)

    @property
    def may_be_retried(self) -> bool:
        """Whether a new record has to follow a failure in the same transaction."""
        return self.handler is not None and self.handler.retries > 0 and self.run.retryable and not self.retry_refused


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


_ERROR_MAX = 4000
_ALARMING = frozenset(("failed", "lost"))


def log_outcomes(entries: Sequence[FinishedRun], words: Sequence[str]) -> None:
    """Log one line on what became of each job."""
    everything = logger.isEnabledFor(logging.INFO)
    if not everything and _ALARMING.isdisjoint(words):
        return
    for entry, word in zip(entries, words, strict=True):
        if everything or word in _ALARMING:
            _log(logging.WARNING if word in _ALARMING else logging.INFO, entry, word)


def _log(level: int, entry: FinishedRun, word: str) -> None:
    claim: Claim = entry.run.claim
    reason = entry.outcome.error_message if entry.outcome is not None and word == "failed" else None
    logger.log(
        level,
        "job %s %s %s %s%s, attempt %d%s",
        claim.job_id,
        claim.job.kind,
        one_line(claim.job.target_name),
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
            "error": reason and shortened(reason, _ERROR_MAX),
        },
    )
