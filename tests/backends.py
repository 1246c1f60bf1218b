"""The backends that every test of the operations runs on: two databases, five drivers, blocking and async.

A test is written once, as blocking code. On an async backend its session functions run through ``run_sync``, and its store
is an ``AsyncJobStore`` whose coroutines run to their end, all on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from inspect import iscoroutine
from typing import Any, TypeVar

from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import AsyncJobStore, JobStore

R = TypeVar("R")

DRIVERS = {
    "sqlite": "sqlite+pysqlite",
    "sqlite-aiosqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+psycopg",
    "postgresql-psycopg-async": "postgresql+psycopg_async",
    "postgresql-asyncpg": "postgresql+asyncpg",
}


class Blocking:
    """An async object seen as a blocking one."""

    def __init__(self, target: Any, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._target = target
        self._run = run

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value):
            return value

        def call(*args: Any, **kw: Any) -> Any:
            result = value(*args, **kw)
            return self._run(result) if iscoroutine(result) else result

        return call


@dataclass
class Backend:
    """One database through one driver.

    Attributes:
        name: Database and driver.
        url: With the driver of this backend.
        outside: A blocking engine on the same database, for what another process would do.
    """

    name: str
    url: str
    outside: Engine
    engine: Engine | AsyncEngine = field(init=False)
    _runner: asyncio.Runner | None = None
    _stores: list[Any] = field(default_factory=list)
    _context: Context = field(default_factory=copy_context)  # as a runner has one for all that it runs

    def __post_init__(self) -> None:
        if self.is_async:
            self._runner = asyncio.Runner()
            self.engine = create_async_engine(self.url)
        else:
            self.engine = create_engine(self.url)

    @property
    def is_async(self) -> bool:
        """Whether it runs on an event loop."""
        return self.name.count("-") > 0

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self.name.partition("-")[0]

    def run(self, fn: Callable[..., R], *args: Any) -> R:
        """Call ``fn(session, *args)`` in a transaction of its own."""
        if isinstance(self.engine, Engine):
            with Session(self.engine) as session:
                result = fn(session, *args)
                session.commit()
                return result
        return self.wait(self._run(fn, *args))

    async def _run(self, fn: Callable[..., R], *args: Any) -> R:
        assert isinstance(self.engine, AsyncEngine)
        async with AsyncSession(self.engine) as session:
            result = await session.run_sync(fn, *args)
            await session.commit()
            return result

    def wait(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine to its end on the event loop of this backend, without the runner's handler of Ctrl-C."""
        assert self._runner is not None
        loop = self._runner.get_loop()
        return loop.run_until_complete(loop.create_task(coroutine, context=self._context))

    def store(self, **options: Any) -> Any:
        """Return a store whose methods block."""
        if not self.is_async:
            store = JobStore(self.url, **options)
            self._stores.append(store)
            return store
        face = Blocking(AsyncJobStore(self.url, **options), self.wait)
        self._stores.append(face)
        return face

    def close(self) -> None:
        """Close everything that was opened."""
        for store in self._stores:
            store.close()
        if isinstance(self.engine, AsyncEngine):
            self.wait(self.engine.dispose())
        else:
            self.engine.dispose()
        if self._runner is not None:
            self._runner.close()
        self.outside.dispose()


def outside_engine(url: str) -> Engine:
    """Return a blocking engine that keeps no connection."""
    return create_engine(url, poolclass=NullPool)
