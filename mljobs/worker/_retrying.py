"""Submit the retry of a failed job, in the transaction that records the failure."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

from mljobs import jobs
from mljobs._logging import logger_of
from mljobs.db._failures import database_is_away, first_line
from mljobs.errors import InvalidValueError
from mljobs.jobs import Bind
from mljobs.jobs._reading import up_to
from mljobs.worker._finished import FinishedRun
from mljobs.worker._handlers import Handler

logger = logger_of("mljobs.worker")


def submit_retry(bind: Bind, entry: FinishedRun) -> tuple[Any, float] | None:
    """Submit the retry; if that is not possible, log why and record the failure without one."""
    job, handler = entry.run.claim.job, entry.handler
    if handler is None:
        return None
    done = len(up_to(bind, job.id, type(job))) - 1
    if done >= handler.retries:
        return None
    savepoint: AbstractContextManager[Any] = bind.begin_nested()
    try:
        wait = _wait_before(handler, done + 1)
        with savepoint:
            after = timedelta(seconds=wait) if wait else None
            # Nobody can have retried what fails in this very transaction.
            retry = jobs.retry(bind, job.id, run_after=after, another=True, model=type(job))
    except Exception as error:
        if database_is_away(error):
            raise
        logger.error(  # noqa: TRY400 - one line; the traceback is ours
            "job %s failed, and its retry could not be submitted: %s", job.id, first_line(error)
        )
        return None
    return retry.id, wait


def _wait_before(handler: Handler, retry: int) -> float:
    try:
        wait = float(handler.backoff(retry))
    except Exception:
        raise
    except BaseException as error:  # sys.exit() in a host's function must not end this thread
        raise InvalidValueError("backoff", handler.backoff, f"it ended with {error!r}") from error
    if math.isnan(wait):
        raise InvalidValueError("backoff", wait, "expected seconds")
    return max(0.0, wait)
