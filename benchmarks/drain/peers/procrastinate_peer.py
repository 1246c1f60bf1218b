"""procrastinate at its best settings: psycopg, many jobs at a time; run in an environment of its own."""

import asyncio
import sys

import procrastinate


def application(url: str) -> procrastinate.App:
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url, min_size=4, max_size=20))

    @app.task(name="noop", pass_context=False)
    async def noop() -> None: ...

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
        await app.run_worker_async(wait=False, concurrency=concurrency, install_signal_handlers=False, listen_notify=False)
        print("done", flush=True)


action, address, *rest = sys.argv[1:]
if action == "fill":
    asyncio.run(fill(address, int(rest[0])))
else:
    asyncio.run(drain(address, 1 if rest[0] == "single" else 20))
