"""``python -m benchmarks``: in two minutes how fast mljobs is, beside its drivers alone and beside other job systems.

It runs parts of the other benchmarks (`lifecycle`, `drain`, `sqlite`), each shortened, and prints one table. ``--svg PATH``
draws it; ``--peers`` adds the job systems that pip installs, each into an environment of its own that is kept.
"""

from __future__ import annotations

import argparse
import os
import platform
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psycopg

from benchmarks import bench, lifecycle, sqlite
from benchmarks.chart import OURS, RAW, Row, chart, table
from benchmarks.drain.__main__ import Bench
from benchmarks.sqlite_drain import BATCH, by_statements, by_worker, drained

PARTS = ("submit", "many", "single", "batches", "drain")
PEERS = ("pgqueuer", "procrastinate")  # on PostgreSQL; those on SQLite are in `sqlite`
ROWS = {
    "submit": "submit, one by one",
    "many": "submit_many",
    "single": "claim + complete, one by one",
    "batches": f"claim + complete, batches of {BATCH}",
}


def row(database: str, what: str) -> Row:
    """Return what was reported last; of several ways that mljobs has, the last one."""
    rates: dict[str, list[float]] = {}
    for name, found in bench.reported[-1].items():
        if name.startswith(("raw", "beside")):
            rates[RAW] = found
        elif name.startswith(("store", "submit_many", "mljobs")):
            rates[OURS] = found
        elif not name.startswith("session"):
            rates[name] = found
    return Row(database, what, rates)


def on_postgres(parts: list[str], url: str) -> Iterator[Row]:
    """Yield what the benchmarks of the store find on a database with the schema, which is emptied."""
    cases = {"single": (1, 1, lifecycle.scaled(2500)), "batches": (BATCH, 1, lifecycle.scaled(20_000))}
    runs: dict[str, Callable[[], None]] = {
        "submit": lambda: lifecycle.submit(url),
        "many": lambda: lifecycle.submit_many(url),
        **{name: lambda case=case: lifecycle.claims(url, cases=[case]) for name, case in cases.items()},
    }
    for part in parts:
        runs[part]()
        yield row("PostgreSQL", ROWS[part])


def on_sqlite(parts: list[str]) -> Iterator[Row]:
    """Yield the same of SQLite."""
    for part in parts:
        sqlite.PARTS[part]()
        yield row("SQLite", ROWS[part])


# -------------------------------------------------------------------------------------------------------------- drains


def drain_postgres(server: str, peers: list[str], number: int, repeats: int) -> Iterator[Row]:
    """Yield how fast workers get through no-op jobs, in one process and in two."""
    drains = Bench(server, [OURS, RAW, *peers])
    for processes in (1, 2):
        rates: dict[str, list[float]] = {name: [] for name in drains.commands}
        for _ in range(repeats):
            for name, found in rates.items():
                slow = 10 if name == "procrastinate" else 1
                found.append(drains.drain(name, processes, "batch", max(BATCH, number // slow))[0])
        yield Row("PostgreSQL", f"drain, {processes} process{'es' * (processes - 1)}", rates)


def drain_sqlite(number: int, repeats: int) -> Iterator[Row]:
    """Yield the same of SQLite."""
    sqlite.SCALE *= 5  # the start of a worker is a part of it
    sqlite.drain()
    yield row("SQLite", "drain, 1 process")
    rates: dict[str, list[float]] = {OURS: [], RAW: []}
    for _ in range(repeats):
        for name, work in ((OURS, by_worker), (RAW, by_statements)):
            rates[name].append(drained(work, 2, number))
    yield Row("SQLite", "drain, 2 processes", rates)


# ------------------------------------------------------------------------------------------------------------ in all


@contextmanager
def servers(url: str | None) -> Iterator[str]:
    """Yield the URL of a PostgreSQL database with the schema."""
    if url is not None:
        yield url
        return
    with bench.database() as started:
        yield started


def measure(asked: argparse.Namespace) -> Iterator[Row]:
    """Yield what was asked for."""

    def scaled(number: int) -> int:
        return max(BATCH, int(number * asked.scale))

    parts = [part for part in PARTS if part in asked.parts]
    operations = [part for part in parts if part != "drain"]
    repeats = max(1, asked.repeats // 2)
    if "postgresql" in asked.databases:
        with servers(asked.server) as url:
            yield from on_postgres(operations, url)
            if "drain" in parts:
                yield from drain_postgres(url, [*PEERS] if asked.peers else [], scaled(100_000), repeats)
    if "sqlite" in asked.databases:
        yield from on_sqlite(operations)
        if "drain" in parts:
            yield from drain_sqlite(scaled(40_000), repeats)


def versions(rows: list[Row]) -> str:
    """Return what the figures were measured with."""
    of = {"PostgreSQL": f"psycopg {psycopg.__version__}", "SQLite": f"SQLite {sqlite3.sqlite_version}"}
    used = [of[database] for database in dict.fromkeys(row.database for row in rows)]
    return ", ".join(
        [f"{datetime.now(UTC):%Y-%m-%d}", *used, f"Python {platform.python_version()}", f"{os.cpu_count()} cores"]
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--databases", nargs="+", default=["postgresql", "sqlite"])
    parser.add_argument("--peers", action="store_true", help="other job systems too")
    parser.add_argument("--scale", type=float, default=0.12, help="how many jobs: a part of what the others take")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--server", metavar="URL", help="a database with the schema, which is emptied")
    parser.add_argument("--svg", type=Path, metavar="PATH", help="where to draw the table")
    asked = parser.parse_args(arguments)
    bench.REPEATS = sqlite.REPEATS = asked.repeats
    lifecycle.SCALE = sqlite.SCALE = asked.scale
    sqlite.RIVALS = sqlite.RIVALS if asked.peers else ["none"]
    rows = list(measure(asked))
    print(f"\n{table(rows)}\n\n{versions(rows)}")
    if asked.svg is not None:
        asked.svg.write_text(chart(rows, versions(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
