"""oban for Python at its best settings: uvloop, a large queue limit; run in an environment of its own."""

import asyncio
import sys
import time

import uvloop
from oban import Oban, worker
from oban.schema import install
from psycopg_pool import AsyncConnectionPool


@worker(queue="default")
class Noop:
    async def process(self, _job: object) -> None:
        if LISTENS:
            print(time.monotonic(), flush=True)


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


async def listen(url: str) -> None:
    async with AsyncConnectionPool(url, min_size=4, max_size=10) as pool, Oban(pool=pool, queues={"default": 1}):
        print("ready", flush=True)
        await asyncio.Event().wait()


async def submit(url: str) -> None:
    async with AsyncConnectionPool(url, min_size=1, max_size=4) as pool:
        oban = Oban(pool=pool)
        async with oban:
            print("ready", flush=True)
            while await asyncio.to_thread(sys.stdin.readline):
                began = time.monotonic()
                await oban.enqueue(Noop.new({}))
                print(began, flush=True)


action, address, *rest = sys.argv[1:]
LISTENS = action == "listen"
uvloop.run(
    {
        "fill": lambda: fill(address, int(rest[0])),
        "drain": lambda: drain(address, 1 if rest[0] == "single" else 200),
        "listen": lambda: listen(address),
        "submit": lambda: submit(address),
    }[action]()
)
