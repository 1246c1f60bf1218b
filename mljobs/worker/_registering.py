"""A worker's row in the table of workers: made before the first claim, updated by the thread that renews leases."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from mljobs import __version__
from mljobs._logging import logger_of
from mljobs._values import utc_now
from mljobs.db._failures import CONNECTION_ERRORS, database_is_away, first_line
from mljobs.db._timeouts import answer_seconds, answers_within
from mljobs.jobs._workers import WorkerInfo, WorkerState, has_worker_table, register_worker, update_worker
from mljobs.store._store import JobStore

logger = logger_of("mljobs.worker")


class Registration:
    """A worker's row. There is none where the database has no table of workers, or the role may not write it.

    Args:
        store: Where the jobs are.
        name: The name that the worker wants.
        kinds: What it handles.
        concurrency: How many handlers may run at a time.
        lease: Seconds of each lease.
    """

    def __init__(self, store: JobStore, name: str, kinds: Sequence[str], concurrency: int, lease: float) -> None:
        now = utc_now()
        self._store = store
        self._answer_seconds = answer_seconds(lease)
        self._worker = WorkerInfo(
            name, socket.gethostname(), os.getpid(), tuple(kinds), concurrency, __version__, now, now
        )
        self._kept = False
        self.state = WorkerState.RUNNING

    @property
    def name(self) -> str:
        """The name, which no other worker that runs has."""
        return self._worker.name

    def open(self) -> None:
        """Make the row."""
        try:
            with answers_within(self._answer_seconds), self._store.engine.connect() as connection:
                if not has_worker_table(connection, self._store.model):
                    return
            self._register()
        except CONNECTION_ERRORS as error:
            if database_is_away(error):
                raise
            self._give_up(error)

    def _register(self) -> None:
        wanted = self._worker.name
        with self._store.connect() as bind:
            self._worker = register_worker(bind, self._worker, model=self._store.model)
        self._kept = True
        if self.name != wanted:
            logger.warning("another worker is named %s: this one is %s", wanted, self.name)

    def renew(self) -> None:
        """Write that the worker is still there, in one statement; while the database is away, do nothing."""
        if not self._kept:
            return
        try:
            with answers_within(self._answer_seconds), self._store.connect(atomic=False) as bind:
                there = update_worker(bind, self._worker, self.state, model=self._store.model)
            if not there:  # pruned, or taken over, while this process stood still
                self._register()
        except CONNECTION_ERRORS as error:
            if not database_is_away(error):
                self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        self._kept = False
        logger.info("this worker is not seen in %s: %s", self._store.model.__workers__.name, first_line(error))

    def close(self) -> None:
        """Write that the worker is gone."""
        self.state = WorkerState.GONE
        self.renew()
