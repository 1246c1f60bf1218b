"""What the command costs: its start, and each documented filter on a large table.

``python -m benchmarks.command [ROWS] [URL]``: 3,000,000 rows in a fresh SQLite file where nothing else is said; a database
that was filled before (``python -m benchmarks.board`` fills it the same way) is asked as it is. The start is a process; the
lists run in this one, once to warm up and then three times, and the medians are shown.
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
            some = store.find(limit=1).jobs[0]
        for words in STARTS:
            print(f"{f'mljobs {words}':42} {start(words, url):7.0f} ms", flush=True)
        for words in (*LISTS, f"id:{some.id.hex[:9]}", f"id:*{some.id.hex[-6:]}"):
            elapsed, said = listed(words, url)
            print(f"{f'list {words}':42} {elapsed:7.1f} ms  {said}", flush=True)


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


def listed(words: str, url: str) -> tuple[float, str]:
    """Return the milliseconds of a list beyond the start, and how far it looked."""
    times, out, err = [], io.StringIO(), io.StringIO()
    for _ in range(4):
        out, err = io.StringIO(), io.StringIO()
        begin = time.perf_counter()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
            _app.run(["list", *words.split(), "--url", url])
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[1:]), f"{out.getvalue().count(chr(10)):>3} jobs  {err.getvalue()[:38].strip()}"


if __name__ == "__main__":
    main()
