"""What each index of a job table costs a job, from its submission to its end.

``python -m benchmarks.indexes [sqlite] [INDEX ...]``: on PostgreSQL where nothing else is said. Two databases with the same
history of 100,000 finished jobs, one of them without the index; 500 jobs are submitted, claimed by the hundred and finished,
one of thirty failing, in the one and the other in turn, ``BENCH_REPEATS`` times (8). CPU is the server's, on SQLite this
process's; the ratio is that of a pair, with the index to without.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from sqlalchemy import create_engine, text

from benchmarks.board import fill
from mljobs import JobStore, jobs, metadata
from tests import postgres

_HISTORY, _JOBS, _CLAIMED = 100_000, 500, 100
_REPEATS = int(os.environ.get("BENCH_REPEATS", "8"))
_DEFINITIONS = {
    "postgresql": "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'ml_jobs' AND indexname LIKE 'ix%'",
    "sqlite": "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'ml_jobs' AND name LIKE 'ix%'",
}


class Table:
    """A job table of its own, what was measured of it last, and who to ask."""

    def __init__(self, url: str) -> None:
        self.store = JobStore(url)
        self.dialect = self.store.engine.dialect.name
        metadata.create_all(self.store.engine)
        fill(self.store, _HISTORY)
        with self.store.engine.begin() as connection:
            if self.dialect == "postgresql":  # it would come when it likes
                connection.execute(text("ALTER TABLE ml_jobs SET (autovacuum_enabled = off)"))
            self.indexes = {row[0]: row[1] for row in connection.execute(text(_DEFINITIONS[self.dialect]))}
        self._server = (
            psycopg.connect(url.replace("+psycopg", ""), autocommit=True) if self.dialect != "sqlite" else None
        )

    def execute(self, statement: str) -> None:
        engine = create_engine(self.store.engine.url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()

    def run(self) -> tuple[float, float]:
        """Bring jobs from submission to end; return microseconds of CPU and bytes of WAL for each."""
        cpu, wal = self._used()
        self.store.submit_many([("train", f"target_{at}", {"lr": 0.1, "seed": at}) for at in range(_JOBS)])
        for _ in range(_JOBS // _CLAIMED):
            claims = self.store.claim(worker="w", limit=_CLAIMED)
            ends = [
                jobs.Outcome.completed(claim, {"f1": 0.5}) if at % 30 else jobs.Outcome.failed(claim, "ValueError: NaN")
                for at, claim in enumerate(claims)
            ]
            self.store.finish_many(ends)
        after, written = self._used()
        return (after - cpu) / _JOBS, (written - wal) / _JOBS

    def _used(self) -> tuple[float, float]:
        if self._server is None:
            return time.process_time() * 1e6, 0
        rows = self._server.execute(
            "SELECT pid, pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8 FROM pg_stat_activity"
            " WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ).fetchall()
        cpu = sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid, _ in rows)
        return cpu / 1000, rows[0][1] if rows else 0

    def close(self) -> None:
        self.store.close()
        if self._server is not None:
            self._server.close()


@contextmanager
def tables(dialect: str) -> Iterator[list[Table]]:
    """Yield two tables in databases of their own."""
    if dialect == "sqlite":
        with tempfile.TemporaryDirectory() as directory:
            yield [Table(f"sqlite:///{Path(directory) / name}.db") for name in ("whole", "without")]
        return
    with postgres.server() as server:
        with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as admin:
            for name in ("whole", "without"):
                admin.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        yield [Table(f"{server.url.rpartition('/')[0]}/{name}") for name in ("whole", "without")]


def main() -> None:
    dialect = "sqlite" if "sqlite" in sys.argv[1:] else "postgresql"
    chosen = [f"ix_ml_jobs_{name}" for name in sys.argv[1:] if name != "sqlite"]
    with tables(dialect) as (whole, without):
        for name, definition in whole.indexes.items():
            if chosen and name not in chosen:
                continue
            without.execute(f"DROP INDEX {name}")
            pairs = []
            for repeat in range(_REPEATS + 1):
                order = (whole, without) if repeat % 2 else (without, whole)
                used = {table: table.run() for table in order}
                pairs.append((used[whole], used[without]))
            without.execute(definition)
            report(name, pairs[1:])
        whole.close()
        without.close()


def report(name: str, pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> None:
    """Print the medians: CPU and WAL of a job with the index, and the ratio to the table without it."""
    ratios = sorted(with_it[0] / without[0] for with_it, without in pairs)
    line = f"{name:26} CPU {statistics.median(one[0] for one, _ in pairs):6.1f} us"
    line += f"  {statistics.median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f})"
    written = [one[1] - other[1] for one, other in pairs]
    if any(written):
        line += f"  WAL {statistics.median(one[1] for one, _ in pairs):6.0f} bytes, {statistics.median(written):+5.0f} by it"
    print(line, flush=True)


if __name__ == "__main__":
    main()
