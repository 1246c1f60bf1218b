"""``python -m benchmarks.watching [JOBS]``: what a look of ``store.watch`` costs while a million jobs come in five minutes.

A fresh database, on SQLite and on PostgreSQL, holds so many jobs (1,000,000 where nothing is said) that were created and
finished in the last five minutes, 260 that wait and 40 that run. Measured in turn, each in a process of its own: one look as
it was before (whole records of five minutes); the first look of a watch; its next looks, 100 jobs having finished before
each; looks before which nothing has changed; the same for a watch with a filter that no job passes; and 20 watches, ten of
them each with a filter of its own: their first look and such looks before which nothing has changed. Memory is the peak of
the process, less that of one that only connects. ``BENCH_REPEATS`` changes how often (8). The clock stands still, so that
the jobs stay within the five minutes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, or_, text

from benchmarks.bench import database
from benchmarks.board import fill
from mljobs import JobStore, MlJob, metadata
from mljobs._values import from_millis, to_millis, utc_now
from mljobs.jobs._filters import selection
from mljobs.jobs._reading import fetch
from mljobs.store import _change_reader
from mljobs.store._change_reader import ChangeReader
from mljobs.store._following import Read
from mljobs.store._watching import Watch
from tests.watches import yielded_by

REPEATS = int(os.environ.get("BENCH_REPEATS", "8"))
LOOKS, CHANGED, WATCHES = 10, 100, 20
SPAN = timedelta(seconds=290)
TICK = os.sysconf("SC_CLK_TCK")


class Place:
    """A connection to the database, and what it has cost."""

    def __init__(self, url: str) -> None:
        self.connection = create_engine(url).connect()
        postgres = self.connection.dialect.name == "postgresql"
        self._server = self.connection.scalar(text("SELECT pg_backend_pid()")) if postgres else None
        self.connection.rollback()

    def used(self) -> float:
        """Return the seconds of CPU that this process and the server's have used."""
        if self._server is None:
            return time.process_time()
        fields = Path(f"/proc/{self._server}/stat").read_text().rpartition(")")[2].split()
        return time.process_time() + (int(fields[11]) + int(fields[12])) / TICK

    def cost(self, acts: list[Callable[[], Any]]) -> tuple[float, float]:
        """Return the milliseconds that each takes: the median by the clock, the mean of CPU."""
        before, took = self.used(), []
        for act in acts:
            begin = time.perf_counter()
            act()
            took.append(1000 * (time.perf_counter() - begin))
        return statistics.median(took), 1000 * (self.used() - before) / len(acts)

    def look(self, watch: Watch, since: float | None = None) -> int:
        """Return how many jobs one look yields; a look of another watch will do that began at ``since`` or later."""

        def read(step: Read) -> Any:
            answer = step.operation(self.connection)
            self.connection.rollback()
            return answer

        return len(yielded_by(watch.look(time.monotonic() if since is None else since), read))


def as_before(connection: Connection, now: datetime) -> dict[Any, Any]:
    """Read as a look did before: the whole records of all that run, or were created or finished in five minutes."""
    since, table = now - timedelta(minutes=5), MlJob.__table__
    lately = or_(table.c.status == "running", table.c.created_at >= since, table.c.finished_at >= since)
    jobs = sorted(fetch(connection, MlJob, [lately]), key=lambda job: (job.finished_at or job.created_at, job.id))
    return {job.id: (job.status, job.progress, job.attempts) for job in jobs}


def finish(place: Place, now: datetime) -> None:
    """Let some jobs be done."""
    with JobStore(place.connection.engine.url) as store:
        done = [
            MlJob(kind="train", target_name="t", status="cancelled", created_at=now, finished_at=now)
            for _ in range(CHANGED)
        ]
        store.submit_many(done)


def measure(what: str, url: str, now: datetime) -> dict[str, Any]:
    """Return what something costs, in this process."""
    place = Place(url)
    _change_reader.utc_now = lambda: now  # type: ignore[attr-defined]
    costs: dict[str, tuple[float, float]] = {}
    if what == "before":
        costs["before"] = place.cost([lambda: len(as_before(place.connection, now))])
    chosen = {"now": None, "narrow": "target:none"}
    if what in chosen:
        watch = Watch(ChangeReader(MlJob, threading.Lock), selection(MlJob, chosen[what], None, {}))
        costs["first"] = place.cost([lambda: place.look(watch)])
        clock, cpu = [], 0.0
        for _ in range(LOOKS):
            finish(place, now)
            took, used = place.cost([lambda: place.look(watch)])
            clock.append(took)
            cpu += used / LOOKS
        costs["changed"] = statistics.median(clock), cpu
        costs["quiet"] = place.cost([lambda: place.look(watch)] * LOOKS * 5)
        costs = costs if what == "now" else {f"narrow {name}": cost for name, cost in costs.items()}
    if what == "watches":
        reader = ChangeReader(MlJob, threading.Lock)
        watches = [
            Watch(reader, selection(MlJob, f"kind:train target:t,x{at}" if at % 2 else None, None, {}))
            for at in range(WATCHES)
        ]
        begun = time.monotonic()
        costs["joined"] = place.cost([lambda: [place.look(watch, begun) for watch in watches]])

        def look() -> None:
            begun = time.monotonic()
            for watch in watches:
                place.look(watch, begun)

        costs["watches"] = place.cost([look] * LOOKS)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would tell the peak of the parent, too
    return {"costs": costs, "memory": int(status.partition("VmHWM:")[2].split()[0]) // 1024}


NAMES = {
    "before": "one look as before",
    "first": "the first look",
    "changed": f"a look, {CHANGED} jobs changed",
    "quiet": "a look, nothing changed",
    "narrow first": "the first look, a filter",
    "narrow changed": f"{CHANGED} jobs changed, none passes",
    "narrow quiet": "nothing changed, a filter",
    "joined": f"the first look of {WATCHES} watches",
    "watches": f"{WATCHES} watches look once",
}


def run(url: str, jobs: int) -> None:
    """Fill a database and print what looks at it cost."""
    with JobStore(url) as store:
        now = utc_now()  # to fill it takes minutes, too
        fill(store, jobs, apart=SPAN / timedelta(milliseconds=1) / jobs)
        dialect = store.engine.dialect.name
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    memory: dict[str, list[int]] = {}
    for _ in range(REPEATS):
        for what in ("nothing", "before", "now", "narrow", "watches"):
            command = [sys.executable, "-m", "benchmarks.watching", what, url, str(to_millis(now))]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            memory.setdefault(what, []).append(told["memory"])
            for name, cost in told["costs"].items():
                costs[name].append(cost)
    print(f"\n{dialect}, {jobs:,} jobs in five minutes: ms by the clock and of CPU, server included")
    for name, measured in costs.items():
        shown = [
            f"{statistics.median(values):>10,.2f} ({min(values):,.2f} .. {max(values):,.2f})"
            for values in zip(*measured, strict=True)
        ]
        ratio = statistics.median(old[0] / new[0] for old, new in zip(costs["before"], measured, strict=True))
        print(f"  {NAMES[name]:<28}{shown[0]:<36}{shown[1]:<36} before is {ratio:,.1f} times as long")
    least = statistics.median(memory["nothing"])
    peaks = {what: statistics.median(values) - least for what, values in memory.items() if what != "nothing"}
    print("  peak of memory, MiB: " + ", ".join(f"{what} {peak:,.0f}" for what, peak in peaks.items()), flush=True)


def main() -> None:
    if len(sys.argv) > 3:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], from_millis(int(sys.argv[3])))))
        return
    jobs = int(sys.argv[1].replace("_", "")) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as directory:
        url = f"sqlite:///{Path(directory) / 'jobs.db'}"
        engine = create_engine(url)
        metadata.create_all(engine)
        engine.dispose()
        run(url, jobs)
    with database() as url:
        run(url, jobs)


if __name__ == "__main__":
    main()
