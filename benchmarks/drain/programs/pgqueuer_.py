"""pgqueuer at its best settings: asyncpg, uvloop, large batches; run in an environment of its own (see environments)."""

import asyncio
import sys
import time
from datetime import timedelta

import asyncpg
import uvloop
from pgqueuer import AsyncpgDriver, PgQueuer, Queries
from pgqueuer.domain.types import QueueExecutionMode


async def fill(url: str, number: int) -> None:
    connection = await asyncpg.connect(url)
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    for start in range(0, number, 10_000):
        batch = min(10_000, number - start)
        await queries.enqueue(["noop"] * batch, [b"{}"] * batch, [0] * batch)
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


async def drain(url: str, batch: int) -> None:
    queuer = PgQueuer(AsyncpgDriver(await asyncpg.connect(url)))

    @queuer.entrypoint("noop")
    async def noop(_job: object) -> None: ...

    print("ready", flush=True)
    sys.stdin.readline()
    await queuer.qm.run(batch_size=batch, mode=QueueExecutionMode.drain, dequeue_timeout=timedelta(seconds=1))
    print("done", flush=True)


async def listen(url: str) -> None:
    queuer = PgQueuer(AsyncpgDriver(await asyncpg.connect(url)))

    @queuer.entrypoint("noop")
    async def noop(_job: object) -> None:
        print(time.monotonic(), flush=True)

    print("ready", flush=True)
    await queuer.qm.run(batch_size=1)


async def submit(url: str) -> None:
    queries = Queries(AsyncpgDriver(await asyncpg.connect(url)))
    print("ready", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        began = time.monotonic()
        await queries.enqueue("noop", b"{}", 0)
        print(began, flush=True)


action, address, *rest = sys.argv[1:]
uvloop.run(
    {
        "fill": lambda: fill(address, int(rest[0])),
        "drain": lambda: drain(address, 1 if rest[0] == "single" else 500),
        "listen": lambda: listen(address),
        "submit": lambda: submit(address),
    }[action]()
)
