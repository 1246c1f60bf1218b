"""Call a handler once, here or in another process, and say how it ended."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import URL

from mljobs.errors import InvalidValueError
from mljobs.jobs import Claim, Model, Outcome, Renewal
from mljobs.record._models import MlJob
from mljobs.states import MlJobStatus
from mljobs.store._keeper import Keeper
from mljobs.store._recording import failure_text
from mljobs.store._run import Run
from mljobs.store._store import JobStore
from mljobs.worker._handlers import Function

_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a handler ended, in plain values, so that it passes from process to process whatever the handler raised.

    Attributes:
        status: Completed, failed, or queued for a handler that was told to stop; None where nothing may be recorded.
        error_message: Why it failed.
        metrics_json: What came out.
    """

    status: MlJobStatus | None
    error_message: str | None = None
    metrics_json: str | None = None

    def outcome(self, claim: Claim) -> Outcome | None:
        """Return what to record."""
        return None if self.status is None else Outcome(claim, self.status, self.error_message, self.metrics_json)


def perform(function: Function, run: Run) -> Outcome | None:
    """Call the handler; return what to record, None where the job was cancelled or the lease is gone."""
    try:
        returned = function(run)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it ends this job and no other
        return ending(run, error)
    return ending(run, None, returned)


async def perform_async(function: Callable[[Run], Awaitable[Any]], run: Run, max_attempts: int) -> Outcome | None:
    """Await the handler; see ``perform``. A task that was cancelled from outside, by a loop that ends say, is put back."""
    try:
        returned = await function(run)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or not task.cancelling() or run.cancelled or run.lost:
            return ending(run, error)
        return putting_back(run, error, max_attempts)
    except BaseException as error:  # noqa: BLE001 - as above
        return ending(run, error)
    return ending(run, None, returned)


def putting_back(run: Run, error: BaseException, max_attempts: int) -> Outcome:
    """Return what to record of work that was stopped by nobody's fault: back to the queue, unless that came too often."""
    if run.attempt < max_attempts:
        return Outcome.requeued(run.claim)
    return Outcome.failed(run.claim, f"gave up after {run.attempt} attempts: {failure_text(error)}")


def ending(run: Run, error: BaseException | None, returned: Any = None) -> Outcome | None:
    """Return what to record of a handler that ended so.

    ``sys.exit()`` in a handler, or a ``CancelledError`` of its own, fails the job: put back, it would do so again.
    """
    if run.cancelled or run.lost:
        return None
    if error is not None:
        return Outcome.failed(run.claim, failure_text(error))
    if returned is not None:
        run.metrics = returned
    try:
        return Outcome.completed(run.claim, run.metrics)
    except InvalidValueError as unfit:  # metrics that JSON cannot hold
        if inspect.iscoroutine(returned):
            returned.close()
            return Outcome.failed(run.claim, f"{unfit}; the handler has to be an async function itself to be awaited")
        return Outcome.failed(run.claim, unfit)
    except Exception as broken:  # noqa: BLE001 - code of theirs, such as a tolist() that raises
        return Outcome.failed(run.claim, f"the metrics cannot be read: {failure_text(broken)}")


# ------------------------------------------------------------------------------------------------- in another process


@dataclass(frozen=True, slots=True)
class Errand:
    """One call of a handler in another process: what it needs, picklable.

    Progress and cancels pass through the database, which every process and machine of a job system can reach anyway, and
    not through a second channel. The lease is kept by the worker alone, so that it ends with the worker.

    Attributes:
        function: The handler.
        claim: The lease.
        url: Where the jobs are, password included.
        model: The mapped job class.
        lease: Seconds of the lease.
    """

    function: Function
    claim: Claim
    url: URL
    model: Model
    lease: float

    def __call__(self) -> Ended:
        """Call the handler; return how it ended."""
        run = Run(self.claim)
        keeper = _onlooker(self.url, self.model, self.lease)
        keeper.add(run)
        try:
            outcome = perform(self.function, run)
            keeper.write_progress(run)
        finally:
            keeper.remove(run)
        if outcome is None:
            return Ended(None)
        return Ended(outcome.status, outcome.error_message, outcome.metrics_json)


def do(errand: Errand) -> Ended:
    """Do an errand: a function of a module, which every executor can send."""
    return errand()


class _Onlooker:
    """A store as the keeper of another process sees it: leases are looked at, not renewed."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def renew(self, claims: Iterable[Claim], *, lease: float = 0) -> Renewal:  # noqa: ARG002 - the keeper's own name
        """Say which leases are held, lost and cancelled."""
        return self._store.look(claims)

    def set_progress_many(self, progress: Iterable[tuple[Claim, int]]) -> list[Any]:
        """Write progress."""
        return self._store.set_progress_many(progress)

    def finish_many(self, outcomes: Iterable[Outcome]) -> list[Exception | None]:
        """Write outcomes."""
        return self._store.finish_many(outcomes)

    def release(self, claims: Iterable[Claim]) -> int:
        """Give leases back."""
        return self._store.release(claims)

    def get(self, job: UUID) -> MlJob:
        """Read a job."""
        return self._store.get(job)


_keepers: dict[tuple[int, URL, Model], Keeper] = {}
_making = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_making=threading.Lock()))


def _onlooker(url: URL, model: Model, lease: float) -> Keeper:
    """Return this process's keeper for a database; made once, for the process serves many errands."""
    key = (os.getpid(), url, model)
    with _making:
        if key not in _keepers:
            store = (
                JobStore(url, model=model, pool_size=1)
                if url.get_backend_name() != "sqlite"
                else JobStore(url, model=model)
            )
            _keepers[key] = Keeper(_Onlooker(store), lease, every=_LOOK_SECONDS)
        return _keepers[key]
