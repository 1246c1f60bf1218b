"""``python -m benchmarks.viewers [JOBS]``: how fast a worker drains a queue while 20 viewers have the board open, and alone.

A worker drains no-op jobs from PostgreSQL; in another process a board on the same database has 20 open streams of its page
*now*. That process is stopped and let go on in turn, two seconds each, within one drain: so both ways are measured beside
each other, and what else the machine does falls on both. The ratio of each pair of slices is what counts.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.bench import clear, database
from benchmarks.board import VIEWERS, open_viewers
from mljobs import JobStore, Worker

_SLICE = 2.0
_SHORTEST = 0.25


async def look(url: str) -> None:
    """Keep 20 viewers open until this process is ended; print the CPU used for each line that is read."""
    with JobStore(url) as store:
        hub, _ = open_viewers(store)
        await hub.now()
        print("ready", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            print(time.process_time(), flush=True)


def work(url: str, done: Any) -> None:
    """Drain the queue, and count in ``done``."""

    def handle(_run: object) -> None:
        done.value += 1

    with JobStore(url) as store:
        worker = Worker(store, concurrency=1)
        worker.handles("train")(handle)
        worker.run(until_idle=True)


def rate(done: Any) -> float:
    """Return how many jobs a second are done in one slice."""
    begin, before = time.perf_counter(), done.value
    time.sleep(_SLICE)
    return float(done.value - before) / (time.perf_counter() - begin)


def slices(board: subprocess.Popen[str], done: Any, busy: Callable[[], bool]) -> list[tuple[float, float]]:
    """Return jobs a second with viewers and without, pair by pair, as long as the queue lasts."""
    pairs = []
    while True:
        found = {}
        for watched in random.sample((True, False), 2):
            board.send_signal(signal.SIGCONT if watched else signal.SIGSTOP)
            time.sleep(_SHORTEST)
            found[watched] = rate(done)
        if not busy():
            return pairs
        pairs.append((found[True], found[False]))


def main() -> None:
    if sys.argv[1:2] == ["look"]:
        asyncio.run(look(sys.argv[2]))
        return
    jobs = int(sys.argv[1].replace("_", "")) if len(sys.argv) > 1 else 300_000
    context = multiprocessing.get_context("spawn")
    with database() as url:
        clear(url)
        with JobStore(url) as store:
            store.submit_many([("train", f"t{number % 100}", {"lr": 0.1}) for number in range(jobs)])
        command = [sys.executable, "-m", "benchmarks.viewers", "look", url]
        board = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        assert board.stdin is not None
        assert board.stdout is not None
        board.stdout.readline()
        done = context.Value("q", 0, lock=False)
        worker = context.Process(target=work, args=(url, done))
        worker.start()
        while done.value < jobs // 50:
            time.sleep(0.01)
        pairs = slices(board, done, worker.is_alive)
        worker.join()
        board.send_signal(signal.SIGCONT)
        board.stdin.write("\n")
        board.stdin.flush()
        used = float(board.stdout.readline())
        board.kill()
    ratios = [watched / alone for watched, alone in pairs]
    with_viewers, without = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    print(
        f"{len(pairs)} pairs of {_SLICE:g} s: {with_viewers:,.0f} jobs/s with {VIEWERS} viewers, {without:,.0f} without; "
        f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f}); CPU of the board while it looked: "
        f"{100 * used / (len(pairs) * (_SLICE + _SHORTEST)):.1f} % of a core, its start included"
    )


if __name__ == "__main__":
    main()
