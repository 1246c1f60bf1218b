"""Call a handler once, in this process, and return what to record."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from mljobs.errors import InvalidValueError
from mljobs.jobs import Outcome
from mljobs.store._recording import failure_text
from mljobs.store._run import Run
from mljobs.worker._handlers import FailurePolicy, Function


def call_handler(function: Function, run: Run, policy: FailurePolicy) -> Outcome | None:
    """Call the handler; return what to record, None where the job was cancelled or the lease is gone."""
    try:
        returned = function(run)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it ends this job and no other
        return outcome_of_call(run, policy, error)
    return outcome_of_call(run, policy, None, returned)


async def await_handler(
    function: Callable[[Run], Awaitable[Any]], run: Run, policy: FailurePolicy, max_attempts: int
) -> Outcome | None:
    """Await the handler; see ``call_handler``. A task that a loop cancels at its end puts its job back."""
    try:
        returned = await function(run)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or not task.cancelling() or run.cancelled or run.lost:
            return outcome_of_call(run, policy, error)
        return requeue_or_fail(run, error, max_attempts)
    except BaseException as error:  # noqa: BLE001 - as above
        return outcome_of_call(run, policy, error)
    return outcome_of_call(run, policy, None, returned)


def requeue_or_fail(run: Run, error: BaseException, max_attempts: int) -> Outcome:
    """Return what to record of work that was stopped from outside: back to the queue, unless that happened too often."""
    if run.attempt < max_attempts:
        return run.requeued()
    return Outcome.failed(run.claim, f"gave up after {run.attempt} attempts: {failure_text(error)}")


def outcome_of_call(
    run: Run, policy: FailurePolicy, error: BaseException | None, returned: Any = None
) -> Outcome | None:
    """Return what to record of a handler that raised ``error``, or returned.

    ``sys.exit()`` in a handler, or a ``CancelledError`` of its own, fails the job: put back, it would do so again.
    """
    if run.cancelled or run.lost:
        return None
    if error is not None:
        run.retryable = policy.may_retry(error)
        return run.failed(failure_text(error))
    if returned is not None:
        run.keep_result(returned)
    try:
        return Outcome.completed(run.claim, run.measured)
    except InvalidValueError as unfit:  # metrics that JSON cannot hold
        run.retryable = policy.may_retry(unfit)
        if inspect.iscoroutine(returned):
            returned.close()
            return Outcome.failed(run.claim, f"{unfit}; the handler has to be an async function itself to be awaited")
        return run.unfit(unfit)
    except Exception as broken:  # noqa: BLE001 - code of the host's, such as a tolist() that raises
        run.retryable = policy.may_retry(broken)
        return run.failed(f"the metrics cannot be read: {failure_text(broken)}")
