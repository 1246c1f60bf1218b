"""How fast finished records are compared and digested, next to an export of them: ``python -m benchmarks.audit``.

Records of about 660 bytes, finished on 30 days, their ids in no order within a day. Each database in turn; by the clock,
and by the CPU time of this process.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
from sqlalchemy import create_engine

from benchmarks.bench import compare, database, rate, report
from benchmarks.codec import sample
from mljobs import JobStore, metadata
from mljobs.record._kv import encode

RECORDS = int(float(os.environ.get("BENCH_SCALE", "1")) * 200_000)
DAY_MS = 86_400_000


def write_lines(path: Path) -> None:
    with path.open("wb") as file:
        for at in range(RECORDS):
            record = sample(at)
            finished_at = record.finished_at + at * 30 // RECORDS * DAY_MS
            file.write(encode(msgspec.structs.replace(record, finished_at=finished_at)).encode() + b"\n")


def measure(name: str, url: str, work: Path) -> None:
    write_lines(work / "jobs.ndjson")
    with JobStore(url) as store:
        store.import_jobs(work / "jobs.ndjson")
        with store.engine.connect() as connection:
            connection.exec_driver_sql("ANALYZE ml_jobs")
            connection.commit()
        store.export_jobs(work / "exported.ndjson")
        lines = [str(line) for line in store.digest()]
        assert store.check_digest(lines).same
        acts: dict[str, Callable[[], object]] = {
            "export": lambda: store.export_jobs(work / "again.ndjson"),
            "compare": lambda: store.compare(work / "exported.ndjson"),
            "digest": store.digest,
            "check_digest": lambda: store.check_digest(lines),
        }
        used: dict[str, list[float]] = {act: [] for act in acts}
        rates = compare({act: partial(_rate, run, used[act]) for act, run in acts.items()})
    report(f"{name}, {RECORDS:,} records, by the clock", rates)
    report(f"{name}, {RECORDS:,} records, by CPU time", used)


def _rate(act: Callable[[], object], used: list[float]) -> float:
    """Return how many records a second; keep how many in a second of this process's CPU time."""
    start = time.process_time()
    found = rate(RECORDS, act)
    used.append(RECORDS / (time.process_time() - start))
    return found


def main() -> None:
    """Measure on SQLite and on PostgreSQL."""
    with tempfile.TemporaryDirectory() as directory:
        url = f"sqlite:///{directory}/jobs.db"
        engine = create_engine(url)
        metadata.create_all(engine)
        engine.dispose()
        measure("SQLite", url, Path(directory))
        with database() as url:
            measure("PostgreSQL", url, Path(directory))


if __name__ == "__main__":
    main()
