"""What the board costs: each page's time in the server on a large table, and the looks of 20 viewers.

``python -m benchmarks.board [ROWS] [URL]``: 3,000,000 rows in a fresh SQLite file where nothing else is said. A database
that was filled before is asked as it is. Each page is asked once, then five times; the medians of the five are shown: by
the clock, and the CPU time of this process, which SQLite is part of.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sqlalchemy import text
from starlette.testclient import TestClient

from mljobs import JobStore, schema
from mljobs.board import create_app
from mljobs.board._now_page import render_now
from mljobs.board._site import Links

VIEWERS, _SECONDS = 20, 5.0
_SQLITE = """
WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {rows} - 1)
INSERT INTO ml_jobs (id, kind, target_name, status, progress, created_at, started_at, finished_at, error_message, spec_json,
                     metrics_json, attempts, priority, exclusive, worker)
SELECT printf('%012x7%03x8%015x', {now} - ({rows} - i) * {span} / {rows}, i % 4096, i),
  CASE i % 4 WHEN 0 THEN 'train' WHEN 1 THEN 'backfill' WHEN 2 THEN 'feature_refresh' ELSE 'drift_compute' END,
  'target_' || (i % 500), CASE WHEN i % 30 = 0 THEN 'failed' WHEN i % 97 = 0 THEN 'cancelled' ELSE 'completed' END, 100,
  {now} - ({rows} - i) * {span} / {rows}, {now} - ({rows} - i) * {span} / {rows} + 400, {now} - ({rows} - i) * {span} / {rows} + 400 + i % 500,
  CASE WHEN i % 30 = 0 THEN 'ValueError: row ' || i || ' is NaN' END, '{{"lr": 0.' || (i % 9 + 1) || ', "depth": ' || (i % 7) || '}}',
  CASE WHEN i % 30 THEN '{{"f1": 0.' || (i % 1000) || '}}' END, 1, 0, 0, 'w' || (i % 20) FROM n"""
_POSTGRES = """
INSERT INTO ml_jobs (id, kind, target_name, status, progress, created_at, started_at, finished_at, error_message, spec_json,
                     metrics_json, attempts, priority, exclusive, worker)
SELECT (lpad(to_hex({now} - ({rows} - i) * {span} / {rows}), 12, '0') || '7' || lpad(to_hex(i % 4096), 3, '0') || '8' || lpad(to_hex(i), 15, '0'))::uuid,
  (ARRAY['train', 'backfill', 'feature_refresh', 'drift_compute'])[i % 4 + 1], 'target_' || (i % 500),
  CASE WHEN i % 30 = 0 THEN 'failed' WHEN i % 97 = 0 THEN 'cancelled' ELSE 'completed' END, 100, at, at + interval '400 ms',
  at + (400 + i % 500) * interval '1 ms', CASE WHEN i % 30 = 0 THEN 'ValueError: row ' || i || ' is NaN' END,
  json_build_object('lr', (i % 9 + 1) / 10.0, 'depth', i % 7), CASE WHEN i % 30 > 0 THEN json_build_object('f1', (i % 1000) / 1000.0) END,
  1, 0, false, 'w' || (i % 20)
FROM (SELECT i, date_trunc('milliseconds', to_timestamp(({now} - ({rows} - i) * {span} / {rows}) / 1000.0)) AS at
      FROM generate_series(0::bigint, {rows} - 1) AS i) AS n"""


def fill(store: JobStore, rows: int, *, apart: float = 900) -> None:
    """Insert finished jobs, one each 900 milliseconds up to now, or so many, and some that run and wait."""
    statement = _POSTGRES if store.engine.dialect.name == "postgresql" else _SQLITE
    with store.engine.begin() as connection:
        connection.execution_options(no_parameters=True).exec_driver_sql(
            statement.format(rows=rows, span=int(rows * apart), now=int(time.time() * 1000))
        )
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    for number in range(300):
        store.submit("train", f"target_{number % 50}", {"lr": 0.1})
    store.claim(worker="w1", limit=40, lease=3600)


def pages(store: JobStore) -> dict[str, str]:
    """Return what is asked."""
    some = store.find("status:completed target:target_1", limit=14).jobs
    failed = store.find("status:failed", limit=1).jobs[0]
    return {
        "now": "/",
        "jobs": "/jobs",
        "jobs, failed": "/jobs?q=status:failed",
        "jobs, target and spec": "/jobs?q=target:target_7 spec.lr>0.5",
        "jobs, spec, no index": "/jobs?q=spec.depth>5",
        "jobs, nothing, no index": "/jobs?q=error:nowhere",
        "job": f"/jobs/{failed.id}",
        "targets": "/targets",
        "target": "/target?name=target_3",
        "compare 14": "/compare?" + "&".join(f"id={job.id}" for job in some),
        "overview 24h": "/overview",
        "overview 30d": "/overview?span=30d",
        "api/jobs": "/api/jobs",
        "api/stats": "/api/stats",
        "api/workers": "/api/workers",
        "poll of now": "/poll?view=now",
    }


def ask(store: JobStore) -> None:
    """Print how long each page takes."""
    board: Any = TestClient(create_app(store))
    for name, path in pages(store).items():
        clock, cpu = [], []
        for _ in range(6):
            begin, used = time.perf_counter(), time.process_time()
            answer = board.get(path)
            clock.append(1000 * (time.perf_counter() - begin))
            cpu.append(1000 * (time.process_time() - used))
        shown = f"{statistics.median(clock[1:]):7.1f} ms  CPU {statistics.median(cpu[1:]):7.1f} ms  first {clock[0]:7.1f} ms"
        print(f"{name:24} {shown}  {answer.status_code} {len(answer.content):>8,} bytes", flush=True)


def open_viewers(store: JobStore) -> tuple[Any, list[asyncio.Task[None]]]:
    """Open a board's page *now* for 20 viewers; return the hub that they hear, and the viewers."""
    site = create_app(store).state.site
    view = site.hub.view(("now", ""), lambda: render_now(site, Links("")))

    async def follow() -> None:
        async for _ in site.hub.follow(view, ""):
            pass

    return site.hub, [asyncio.create_task(follow()) for _ in range(VIEWERS)]


async def watch(store: JobStore) -> None:
    """Print how many looks 20 viewers cost."""
    hub, viewers = open_viewers(store)
    await asyncio.sleep(2)
    before, used = hub.looks, time.process_time()
    await asyncio.sleep(_SECONDS)
    looks, used = hub.looks - before, time.process_time() - used
    print(f"{VIEWERS} viewers: {looks / _SECONDS:.1f} looks a second, {100 * used / _SECONDS:.1f} % of one core")
    hub.stop()
    await asyncio.wait(viewers, timeout=5)


def main() -> None:
    rows = int(sys.argv[1].replace("_", "")) if len(sys.argv) > 1 else 3_000_000
    with tempfile.TemporaryDirectory() as directory:
        url = sys.argv[2] if len(sys.argv) > 2 else f"sqlite:///{Path(directory) / 'jobs.db'}"
        with JobStore(url) as store:
            schema.upgrade(store.engine)
            begin = time.perf_counter()
            if not store.count_up_to(1):
                fill(store, rows)
            print(f"{rows:,} rows in {store.engine.dialect.name}, made in {time.perf_counter() - begin:.0f} s")
            ask(store)
            asyncio.run(watch(store))


if __name__ == "__main__":
    main()
