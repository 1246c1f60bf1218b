"""oban for Python at its best settings: uvloop, a large queue limit; run in an environment of its own."""

import asyncio
import sys

import uvloop
from oban import Oban, worker
from oban.schema import install
from psycopg_pool import AsyncConnectionPool


@worker(queue="default")
class Noop:
    async def process(self, _job: object) -> None: ...


async def fill(url: str, number: int) -> None:
    async with AsyncConnectionPool(url, min_size=1, max_size=4) as pool:
        await install(pool)
        oban = Oban(pool=pool)
        for start in range(0, number, 5000):
            await oban.enqueue_many([Noop.new({}) for _ in range(min(5000, number - start))])


async def drain(url: str, limit: int) -> None:
    async with AsyncConnectionPool(url, min_size=4, max_size=10, kwargs={"autocommit": False}) as pool:
        oban = Oban(pool=pool, queues={"default": {"limit": limit}}, stager={"interval": 0.05})
        print("ready", flush=True)
        sys.stdin.readline()
        async with oban:
            while True:
                await asyncio.sleep(0.02)
                async with pool.connection() as connection:
                    left = await connection.execute(
                        "SELECT EXISTS (SELECT 1 FROM oban_jobs WHERE state IN ('available', 'executing'))"
                    )
                    if not (await left.fetchone())[0]:
                        print("done", flush=True)
                        break


action, address, *rest = sys.argv[1:]
uvloop.run(fill(address, int(rest[0])) if action == "fill" else drain(address, 1 if rest[0] == "single" else 200))
