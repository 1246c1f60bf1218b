"""mljobs: a worker with every lease and guard on."""

import sys
import time

from sqlalchemy import text

from benchmarks.bench import clear
from mljobs import JobStore, MlJob, Worker, metadata

action, url, *rest = sys.argv[1:]
url = url.replace("postgresql://", "postgresql+psycopg://")
store = JobStore(url)

if action == "fill":
    metadata.create_all(store.engine)
    clear(url)
    store.submit_many(
        MlJob(kind="train", target_name=f"t{n % 100}", spec_json='{"lr":0.1}') for n in range(int(rest[0]))
    )
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
elif action == "drain":
    worker = Worker(store, concurrency=1, ahead=0) if rest[0] == "single" else Worker(store, concurrency=1)
    worker.handles("train")(lambda _run: None)
    print("ready", flush=True)
    sys.stdin.readline()
    worker.run(until_idle=True)
    print("done", flush=True)
elif action == "listen":
    worker = Worker(store)
    worker.handles("train")(lambda _run: print(time.monotonic(), flush=True))
    print("ready", flush=True)
    worker.run()
else:
    print("ready", flush=True)
    while sys.stdin.readline():
        began = time.monotonic()
        store.submit("train", "spam", {})
        print(began, flush=True)
