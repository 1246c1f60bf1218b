"""The store behind the board, awaited, whichever of the two it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from sqlalchemy.engine import make_url

from mljobs import jobs
from mljobs.db._failures import CONNECTION_ERRORS, database_is_away, tables_are_missing
from mljobs.jobs import Bind, Model
from mljobs.store._store import JobStore

R = TypeVar("R")

_THREADS = 8
_QUERY_CANCELED = "57014"


class DatabaseAway(Exception):
    """The database does not answer."""


class TablesMissing(DatabaseAway):
    """The database answers, and has no such tables."""


class TooSlow(Exception):
    """A statement took longer than the board lets it."""


class Backend:
    """Run operations of :mod:`mljobs.jobs` on the host's store, each page's in one transaction.

    Args:
        store: A ``JobStore`` or an ``AsyncJobStore``.
        model: The mapped job class; None for the store's.
        seconds: How long a statement may take, on PostgreSQL.
    """

    def __init__(self, store: Any, model: Model | None, seconds: float) -> None:
        self.store = store
        self.model: Model = model or store.model
        self._blocking = isinstance(store, JobStore)
        self._seconds = seconds
        self._threads: CapacityLimiter | None = None

    @property
    def place(self) -> str:
        """Which database and table, as it may be shown: without user, host and password."""
        engine = self.store.engine
        url = make_url(str(engine.url))
        name = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}.get(url.get_backend_name(), "database")
        return f"{name}, table {self.model.__table__.name}"  # type: ignore[attr-defined]

    async def read(self, work: Callable[[Bind], R]) -> R:
        """Run reading operations in one transaction, each statement with a limit of time.

        Raises:
            DatabaseAway: It does not answer.
            TooSlow: A statement took too long.
        """
        return await self._run(partial(_limited, work, self._seconds))

    async def write(self, work: Callable[[Bind], R]) -> R:
        """Run operations that change something in one transaction.

        Raises:
            DatabaseAway: It does not answer.
        """
        return await self._run(work)

    async def _run(self, work: Callable[[Bind], R]) -> R:
        try:
            if self._blocking:
                if self._threads is None:
                    self._threads = CapacityLimiter(_THREADS)
                return await to_thread.run_sync(self._in_thread, work, limiter=self._threads)
            result: R = await self.store.run(work)
        except CONNECTION_ERRORS as error:
            named = _named(error)
            if named is None:
                raise
            raise named from error
        return result

    def _in_thread(self, work: Callable[[Bind], R]) -> R:
        with self.store.connect() as bind:
            return work(bind)


def _limited(work: Callable[[Bind], R], seconds: float, bind: Bind) -> R:
    jobs.limit_time(bind, seconds)
    return work(bind)


def _named(error: Exception) -> DatabaseAway | TooSlow | None:
    """Return what a page says of an error of the database; None of one of ours."""
    original = getattr(error, "orig", None) or error
    if getattr(original, "sqlstate", None) == _QUERY_CANCELED:
        return TooSlow("it took longer than the board lets a page take")
    line = str(original).strip().partition("\n")[0] or type(original).__name__
    if tables_are_missing(error):
        return TablesMissing(f"{line}; 'mljobs upgrade' makes the tables, or brings them up to date")
    return DatabaseAway(line) if database_is_away(error) else None
