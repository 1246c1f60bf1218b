"""One call of a handler in another process: its arguments, its result, and its access to the database.

Progress and cancels pass through the database, which every process and machine of a job system can reach anyway, and not
through a second channel. The lease is kept by the worker alone, so that it ends with the worker.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import wait as wait_for_sentinels
from pathlib import Path
from typing import Any

from sqlalchemy import URL

from mljobs.jobs import Claim, Model, Outcome, Renewal
from mljobs.states import MlJobStatus
from mljobs.store._keeper import Keeper
from mljobs.store._run import Run
from mljobs.store._store import JobStore
from mljobs.worker._calling import call_handler
from mljobs.worker._handlers import FailurePolicy, Function

_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class RemoteResult:
    """An ``Outcome`` without its claim, which the worker has already; picklable whatever the handler raised.

    Attributes:
        status: Completed, failed or queued; None where nothing may be recorded.
        error_message: Why it failed.
        metrics_json: What came out.
        retryable: Whether a failure may be retried.
    """

    status: MlJobStatus | None
    error_message: str | None = None
    metrics_json: str | None = None
    retryable: bool = True

    def outcome_of(self, run: Run) -> Outcome | None:
        """Return what to record of the run."""
        run.retryable = self.retryable
        return None if self.status is None else Outcome(run.claim, self.status, self.error_message, self.metrics_json)


@dataclass(frozen=True, slots=True)
class RemoteCall:
    """What the other process needs for one call, picklable.

    Attributes:
        function: The handler.
        policy: Which of its failures may be retried.
        claim: The lease.
        url: Where the jobs are, password included.
        model: The mapped job class.
        lease: Seconds of the lease.
        note: A file that says which process runs the handler, while it does; None for none. Only a process of a pool has
            one, and ends with its worker.
    """

    function: Function
    policy: FailurePolicy
    claim: Claim
    url: URL
    model: Model
    lease: float
    note: str | None = None

    def with_note(self, note: str) -> RemoteCall:
        """Return the call for a process of a pool."""
        return replace(self, note=note)


def run_remote_call(call: RemoteCall) -> RemoteResult:
    """Call the handler; a function of a module, which every executor can send."""
    if call.note is None:
        return _run(call)
    end_with_parent()
    note = Path(call.note)
    note.write_text(str(os.getpid()))
    try:
        return _run(call)
    finally:
        note.unlink(missing_ok=True)


def _run(call: RemoteCall) -> RemoteResult:
    run = Run(call.claim)
    keeper = _keeper_of_this_process(call.url, call.model, call.lease)
    keeper.add(run)
    try:
        outcome = call_handler(call.function, run, call.policy)
        keeper.write_reports(run)
    finally:
        keeper.remove(run)
    if outcome is None:
        return RemoteResult(None)
    return RemoteResult(outcome.status, outcome.error_message, outcome.metrics_json, run.retryable)


class _LookingStore(JobStore[Any]):
    """The store of a keeper that renews no lease, for the worker does: it only looks which leases are held."""

    def renew(self, claims: Iterable[Claim], *, lease: float = 0) -> Renewal:  # noqa: ARG002 - the keeper's own name
        """Return which leases are held, lost and cancelled."""
        return self.look(claims)


_keepers: dict[tuple[int, URL, Model], Keeper] = {}
_making = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_making=threading.Lock()))


def _keeper_of_this_process(url: URL, model: Model, lease: float) -> Keeper:
    """Return this process's keeper for a database; made once, for the process serves many calls."""
    key = (os.getpid(), url, model)
    with _making:
        if key not in _keepers:
            options = {} if url.get_backend_name() == "sqlite" else {"pool_size": 1}
            _keepers[key] = Keeper(_LookingStore(url, model=model, **options), lease, every=_LOOK_SECONDS)
        return _keepers[key]


_watched: set[int] = set()


def end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is None or os.getpid() in _watched:
        return
    _watched.add(os.getpid())

    def watch() -> None:
        wait_for_sentinels([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="mljobs-parent", daemon=True).start()
