"""``python -m benchmarks.viewers [JOBS]``: how fast a worker drains a queue, with 20 open viewers of the board and without.

A worker in a process of its own drains no-op jobs from PostgreSQL; in another process a board on the same database has 20
open streams of its page *now*. Eight pairs, in turn; the ratio of each pair is what counts. ``BENCH_REPEATS`` changes it.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time

from benchmarks.bench import database
from benchmarks.board import VIEWERS, open_viewers
from mljobs import JobStore

REPEATS = int(os.environ.get("BENCH_REPEATS", "8"))
_PROGRAM = [sys.executable, "-m", "benchmarks.drain.programs.mljobs_"]


async def look(url: str) -> None:
    """Keep 20 viewers open until the input ends."""
    with JobStore(url) as store:
        hub, viewers = open_viewers(store)
        await hub.now()
        print("ready", flush=True)
        begin, used = time.perf_counter(), time.process_time()
        await asyncio.to_thread(sys.stdin.readline)
        print((time.process_time() - used) / (time.perf_counter() - begin), flush=True)
        hub.stop()
        await asyncio.wait(viewers, timeout=5)


def _started(command: list[str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def _told(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def drain(url: str, jobs: int, *, watched: bool) -> tuple[float, float]:
    """Return how many jobs a second are done, and which share of a core the board takes meanwhile."""
    subprocess.run([*_PROGRAM, "fill", url, str(jobs)], check=True)
    worker = _started([*_PROGRAM, "drain", url, "many"])
    board = _started([sys.executable, "-m", "benchmarks.viewers", "look", url]) if watched else None
    begin = time.perf_counter()
    _told(worker)
    rate = jobs / (time.perf_counter() - begin)
    share = float(_told(board)) if board is not None else 0.0
    for process in (worker, board):
        if process is not None:
            process.wait()
    return rate, share


def main() -> None:
    if sys.argv[1:2] == ["look"]:
        asyncio.run(look(sys.argv[2]))
        return
    jobs = int(sys.argv[1].replace("_", "")) if len(sys.argv) > 1 else 100_000
    ratios, shares, rates = [], [], {True: list[float](), False: list[float]()}
    with database() as url:
        drain(url, jobs // 10, watched=False)
        for number in range(REPEATS):
            for watched in (True, False) if number % 2 else (False, True):
                rate, share = drain(url, jobs, watched=watched)
                rates[watched].append(rate)
                shares += [share] if watched else []
            ratios.append(rates[True][-1] / rates[False][-1])
            print(f"{rates[False][-1]:,.0f}/s without, {rates[True][-1]:,.0f}/s with: {ratios[-1]:.3f}", flush=True)
    print(
        f"{VIEWERS} viewers: {statistics.median(rates[True]):,.0f}/s, none: {statistics.median(rates[False]):,.0f}/s, "
        f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f}); the board took "
        f"{100 * statistics.median(shares):.1f} % of a core ({100 * min(shares):.1f} .. {100 * max(shares):.1f})"
    )


if __name__ == "__main__":
    main()
