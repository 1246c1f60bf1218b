"""How fast processes together get through the jobs of one SQLite file; a part of ``python -m benchmarks``."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks import sqlite
from mljobs import JobStore, Worker

BATCH = 100


def drained(work: Callable[[Path, Any], None], processes: int, number: int) -> float:
    """Return how many jobs a second so many processes do."""
    context = multiprocessing.get_context("spawn")
    with sqlite.place() as directory:
        path = sqlite.new_file(directory / "jobs.db")
        with JobStore(f"sqlite:///{path}") as store:
            store.submit_many([("train", f"t{at % 100}", {"lr": 0.1}) for at in range(number)])
        ready = context.Barrier(processes + 1)
        running = [context.Process(target=work, args=(path, ready)) for _ in range(processes)]
        for process in running:
            process.start()
        ready.wait(60)
        began = time.perf_counter()
        ready.wait(600)  # for the last one's last job
        seconds = time.perf_counter() - began
        for process in running:
            process.join()
    return number / seconds


def by_worker(path: Path, ready: Any) -> None:
    with JobStore(f"sqlite:///{path}") as store:
        worker = Worker(store, concurrency=1)
        worker.handles("train")(lambda _run: None)
        ready.wait()
        worker.run(until_idle=True)
        ready.wait()


def by_statements(path: Path, ready: Any) -> None:
    raw = sqlite.Raw(path)
    with closing(raw.connection):
        ready.wait()
        raw.drain(BATCH)
        ready.wait()
