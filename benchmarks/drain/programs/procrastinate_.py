"""procrastinate at its best settings: psycopg, many jobs at a time; run in an environment of its own."""

import asyncio
import sys
import time

import procrastinate


def application(url: str) -> procrastinate.App:
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url, min_size=4, max_size=20))

    @app.task(name="noop", pass_context=False)
    async def noop() -> None:
        if LISTENS:
            print(time.monotonic(), flush=True)

    return app


async def fill(url: str, number: int) -> None:
    app = application(url)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        task = app.tasks["noop"]
        for start in range(0, number, 2000):
            await task.batch_defer_async(*[{}] * min(2000, number - start))


async def drain(url: str, concurrency: int) -> None:
    app = application(url)
    async with app.open_async():
        print("ready", flush=True)
        sys.stdin.readline()
        await app.run_worker_async(
            wait=False, concurrency=concurrency, install_signal_handlers=False, listen_notify=False
        )
        print("done", flush=True)


async def listen(url: str) -> None:
    app = application(url)
    async with app.open_async():
        print("ready", flush=True)
        await app.run_worker_async(concurrency=1)


async def submit(url: str) -> None:
    app = application(url)
    async with app.open_async():
        print("ready", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            began = time.monotonic()
            await app.tasks["noop"].defer_async()
            print(began, flush=True)


action, address, *rest = sys.argv[1:]
LISTENS = action == "listen"
asyncio.run(
    {
        "fill": lambda: fill(address, int(rest[0])),
        "drain": lambda: drain(address, 1 if rest[0] == "single" else 20),
        "listen": lambda: listen(address),
        "submit": lambda: submit(address),
    }[action]()
)
