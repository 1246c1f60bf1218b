"""``python -m benchmarks.async_store``: an ``AsyncJobStore`` beside its driver with the very same statements.

asyncpg and psycopg, with 1, 8 and 64 tasks on one event loop and as many connections as tasks, 16 at most: submit, claim +
complete one by one, and in batches of 100. Store and driver take turns, slice by slice, each in a table of its own database.
Beside the clock stands the CPU of this process.

``python -m benchmarks.async_store asyncpg --tasks 8`` runs only that; ``--repeats`` and ``--scale`` shorten it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import psycopg
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from benchmarks.bench import clear
from benchmarks.lifecycle import COLUMNS, SPEC, address, claimed, row, under_leases
from mljobs import AsyncJobStore, MlJob, metadata
from mljobs.db._prepared import Prepared
from mljobs.jobs import _finishing
from mljobs.jobs._claiming import _claim_statement
from mljobs.jobs._submitting import _NOT_DEFAULT, _insertion
from tests import postgres

DRIVERS = ("asyncpg", "psycopg")
CONNECTIONS = 16
METRICS, METRICS_TEXT = {"auc": 0.97}, '{"auc":0.97}'
BATCH = 100
Rival = dict[str, Callable[[int], Awaitable[object]]]


def of_store(store: AsyncJobStore) -> Rival:
    """Return what one task does with the store, so many times."""

    async def submit(times: int) -> None:
        for _ in range(times):
            await store.submit("train", "spam", SPEC)

    async def one_by_one(times: int) -> None:
        for _ in range(times):
            (claim,) = await store.claim(worker="w")
            await store.complete(claim, METRICS)

    async def batches(times: int) -> None:
        for _ in range(times):
            claims = await store.claim(worker="w", limit=BATCH)
            await store.complete_many([(claim, METRICS) for claim in claims])

    return {"submit": submit, "claim + complete": one_by_one, "batches of 100": batches}


class RawAsyncpg:
    """Connections of asyncpg, which sends a statement by position."""

    async def open(self, url: str, size: int) -> None:
        self.pool = await asyncpg.create_pool(url, min_size=size, max_size=size, reset=_no_reset)

    def prepared(self, statement: Prepared, dialect: Any) -> Callable[[dict[str, Any]], Awaitable[list[Any]]]:
        compiled = statement._text(dialect, {})

        async def send(values: dict[str, Any]) -> list[Any]:
            async with self.pool.acquire() as connection:
                return await connection.fetch(compiled.text, *compiled.in_order({**compiled.fixed, **values}))  # type: ignore[no-any-return]

        return send

    async def close(self) -> None:
        await self.pool.close()


async def _no_reset(_connection: object) -> None:
    """Leave out the round trip that clears a connection, as the store does."""


class RawPsycopg:
    """Connections of psycopg, handed out from a queue."""

    async def open(self, url: str, size: int) -> None:
        self.idle: asyncio.LifoQueue[psycopg.AsyncConnection[Any]] = asyncio.LifoQueue()
        for _ in range(size):
            self.idle.put_nowait(await psycopg.AsyncConnection.connect(url, autocommit=True))

    def prepared(self, statement: Prepared, dialect: Any) -> Callable[[dict[str, Any]], Awaitable[list[Any]]]:
        compiled = statement._text(dialect, {})

        async def send(values: dict[str, Any]) -> list[Any]:
            connection = await self.idle.get()
            try:
                cursor = await connection.execute(compiled.text, {**compiled.fixed, **values}, prepare=True)
                return await cursor.fetchall() if cursor.description else []
            finally:
                self.idle.put_nowait(connection)

        return send

    async def close(self) -> None:
        while not self.idle.empty():
            await self.idle.get_nowait().close()


def of_driver(raw: RawAsyncpg | RawPsycopg, dialect: Any) -> Rival:
    """Return what one task does with the driver alone, so many times."""
    statements = _insertion(MlJob, _NOT_DEFAULT), _finishing._FINISH.statement(MlJob)
    insert, finish = (raw.prepared(one, dialect) for one in statements)
    claims = {limit: raw.prepared(_claim_statement(MlJob, "any", limit), dialect) for limit in (1, BATCH)}
    done = {"status": "completed", "error": None, "metrics": METRICS_TEXT}

    async def submit(times: int) -> None:
        for _ in range(times):
            await insert(dict(zip(COLUMNS, row(), strict=True)))

    def working(limit: int) -> Callable[[int], Awaitable[None]]:
        async def work(times: int) -> None:
            for _ in range(times):
                rows = await claims[limit]({"worker": "w", "lease": timedelta(seconds=60), "limit": limit})
                await finish(under_leases(claimed(rows), ends=True, **done))

        return work

    return {"submit": submit, "claim + complete": working(1), "batches of 100": working(BATCH)}


@asynccontextmanager
async def rivals(driver: str, urls: dict[str, str], tasks: int) -> AsyncIterator[dict[str, Rival]]:
    """Yield the store's operations and the driver's, each on a database of its own."""
    size = min(tasks, CONNECTIONS)
    raw = RawAsyncpg() if driver == "asyncpg" else RawPsycopg()
    ours = urls["store"].replace("+psycopg", "+asyncpg" if driver == "asyncpg" else "+psycopg_async")
    # Two connections of a pool stay free for transactions.
    async with AsyncJobStore(ours, pool_size=size + 2, max_overflow=0) as store:
        await raw.open(address(urls["driver"]), size)
        yield {"store": of_store(store), "driver": of_driver(raw, store.engine.sync_engine.dialect)}
        await raw.close()


async def in_tasks(act: Callable[[int], Awaitable[object]], tasks: int, times: int) -> tuple[float, float]:
    """Return the seconds by the clock and of CPU that the tasks took, each of which acts so many times."""
    clock, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(act(times) for _ in range(tasks)))
    return time.perf_counter() - clock, time.process_time() - cpu


async def measure(driver: str, urls: dict[str, str], tasks: int, repeats: int, scale: float) -> None:
    """Print what the store reaches of the driver, for each operation."""
    jobs = {"submit": int(320 * scale), "claim + complete": int(192 * scale), "batches of 100": int(6400 * scale)}
    slices = 4
    found: dict[str, list[dict[str, tuple[float, float]]]] = {name: [] for name in jobs}
    async with rivals(driver, urls, tasks) as both:
        for repeat in range(repeats + 1):
            for url in urls.values():
                await asyncio.to_thread(clear, url)
            for name, wanted in jobs.items():
                batch = BATCH if name.startswith("batches") else 1
                times = max(1, wanted // tasks // batch // slices)
                number = times * tasks * slices * batch
                for url in urls.values() if name != "submit" else ():
                    await asyncio.to_thread(_fill, url, number)
                sums = {rival: [0.0, 0.0] for rival in both}
                for _ in range(slices):
                    for rival in random.sample(list(both), 2):
                        clock, cpu = await in_tasks(both[rival][name], tasks, times)
                        sums[rival][0] += clock
                        sums[rival][1] += cpu
                if repeat:  # the first one only warms up
                    found[name].append({rival: (clock / number, cpu / number) for rival, (clock, cpu) in sums.items()})
    for name, rounds in found.items():
        report(f"{driver}, {tasks:>2} tasks, {name}", rounds)


def report(title: str, rounds: list[dict[str, tuple[float, float]]]) -> None:
    rates = {rival: statistics.median(1 / costs[rival][0] for costs in rounds) for rival in ("store", "driver")}
    ratios = [costs["driver"][0] / costs["store"][0] for costs in rounds]
    cpu = {rival: statistics.median(costs[rival][1] for costs in rounds) * 1e6 for rival in rates}
    print(
        f"{title:<38} store {rates['store']:>8,.0f}/s  driver {rates['driver']:>8,.0f}/s"
        f"  ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        f"  CPU us a job {cpu['store']:.0f}, {cpu['driver']:.0f}",
        flush=True,
    )


def _fill(url: str, number: int) -> None:
    from mljobs import JobStore  # noqa: PLC0415

    with JobStore(url) as store:
        store.submit_many([("train", f"t{at % 100}", SPEC) for at in range(number)])
        with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ANALYZE ml_jobs"))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.async_store", description=__doc__)
    parser.add_argument("drivers", nargs="*", default=list(DRIVERS))
    parser.add_argument("--tasks", type=int, action="append")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--scale", type=float, default=1.0)
    asked = parser.parse_args(arguments)
    with postgres.server() as server:
        admin = create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        urls = {}
        for rival in ("store", "driver"):
            with admin.connect() as connection:
                connection.execute(text(f"CREATE DATABASE async_{rival}"))
            urls[rival] = admin.url.set(database=f"async_{rival}").render_as_string(hide_password=False)
            metadata.create_all(create_engine(urls[rival], poolclass=NullPool))
        for driver in asked.drivers:
            for tasks in asked.tasks or (1, 8, 64):
                asyncio.run(measure(driver, urls, tasks, asked.repeats, asked.scale))


if __name__ == "__main__":
    main(sys.argv[1:])
