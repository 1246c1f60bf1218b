"""What the command costs: its start, and each documented filter on a large table, the newest page and one further back.

``python -m benchmarks.command [ROWS] [URL]``: 3,000,000 rows in a fresh SQLite file where nothing else is said; a database
that was filled before (``python -m benchmarks.board`` fills it the same way) is asked as it is. The start is a process; the
lists run in this one, once to warm up and then three times, and the medians are shown: clock, and CPU of this process,
which SQLite is part of.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.board import fill
from mljobs import JobStore, schema
from mljobs.cli import _app
from mljobs.jobs._paging import cursor_of

STARTS = ("--version", "--help", "list --help", "list")
LISTS = (
    *(
        "",
        "kind:train",
        "status:failed",
        "status:failed,cancelled",
        "status:running",
        "target:target_7",
        "target:target_7*",
    ),
    *(
        "worker:w1",
        "worker:w*",
        "error:row",
        "error:nowhere",
        "created:<2h",
        "created:<30d",
        "finished:<2h",
        "started:<2h",
    ),
    *(
        "run_after:>2026-01-01",
        "took:>1s",
        "waited:>10m",
        "progress:>=50",
        "attempts:>1",
        "priority:>0",
        "exclusive:true",
    ),
    *("spec.lr>0.5", "spec.nothing:1", "metrics.f1>=0.9", "metrics.f1>2", "retry_of:0199f3c2000070008000000000009d4e"),
    *(
        "kind:drift_compute",
        "kind:train,backfill",
        "status:cancelled",
        "target:nothing*",
        "status:failed error:nowhere",
    ),
    *(
        "target:target_7 kind:train",
        "target:target_7 spec.lr>5",
        "finished:<30d status:failed",
        "status:failed worker:nobody",
    ),
    *("kind:train status:failed target:target_1", "status:completed took:>10s", "target:target_7 spec.lr>0.5"),
)


def main() -> None:
    rows = int(sys.argv[1].replace("_", "")) if len(sys.argv) > 1 else 3_000_000
    with tempfile.TemporaryDirectory() as directory:
        url = sys.argv[2] if len(sys.argv) > 2 else f"sqlite:///{Path(directory) / 'jobs.db'}"
        with JobStore(url) as store:
            schema.upgrade(store.engine)
            if not store.count_up_to(1):
                fill(store, rows)
            some, middle = store.find(limit=1).jobs[0], middle_of(store)
        for words in STARTS:
            print(f"{f'mljobs {words}':42} {start(words, url):7.0f} ms", flush=True)
        for words in (*LISTS, f"id:{some.id.hex[:9]}", f"id:*{some.id.hex[-6:]}"):
            shown = [listed(words, url, *more) for more in ((), ("--after", middle))]
            print(f"{f'list {words}':50} {'   '.join(shown)}", flush=True)


def start(words: str, url: str) -> float:
    """Return the milliseconds of a process, with modules that are compiled."""
    environment = {**os.environ, "MLJOBS_DATABASE_URL": url}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "mljobs", *words.split()], env=environment, check=True, capture_output=True
        )
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[1:])


def middle_of(store: JobStore) -> str:
    """Return the cursor of a page that begins at half of the table's time."""
    first, last = store.find(limit=1, order="oldest").jobs[0], store.find(limit=1).jobs[0]
    half = first.created_at + (last.created_at - first.created_at) / 2
    (job,) = store.find(limit=1, created_before=half).jobs
    return cursor_of(job, "newest")


def listed(words: str, url: str, *more: str) -> str:
    """Return the milliseconds of a list beyond the start, and how far it looked."""
    clock, cpu, out, err = [], [], io.StringIO(), io.StringIO()
    for _ in range(4):
        out, err = io.StringIO(), io.StringIO()
        begin, used = time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
            _app.run(["list", *words.split(), *more, "--url", url])
        clock.append(1000 * (time.perf_counter() - begin))
        cpu.append(1000 * (time.process_time() - used))
    looked = " looked at 100,000" if "100,000" in err.getvalue() else ""
    jobs = out.getvalue().count("\n")
    return f"{statistics.median(clock[1:]):7.1f} ms, CPU {statistics.median(cpu[1:]):6.1f}, {jobs:>3} jobs{looked:18}"


if __name__ == "__main__":
    main()
