"""``python -m benchmarks.arrow``: a table of jobs as Arrow, against COPY parsed into Python rows, and against others.

Each reads the same jobs of about 400 bytes, in the same run, in turn. ``BENCH_JOBS`` and ``BENCH_REPEATS`` shorten it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import adbc_driver_postgresql.dbapi
import pandas as pd
import polars as pl
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from benchmarks.bench import clear, compare, database, rate, report
from mljobs import JobStore, MlJob
from mljobs.db._wire import read_wire
from mljobs.transfer._arrow import to_arrow
from tests.sample_history import fill

JOBS = int(os.environ.get("BENCH_JOBS", "200000"))
MORE = int(os.environ.get("BENCH_MORE", "2000000"))


def speed(url: str) -> None:
    engine = create_engine(url, poolclass=NullPool)
    plain = url.replace("+psycopg", "")
    columns = list(MlJob.__table__.columns)

    def rows() -> float:
        def read() -> None:
            with engine.connect() as connection:
                for _ in read_wire(connection, columns, []):
                    pass

        return rate(JOBS, read)

    def arrow(**options: object) -> float:
        def read() -> None:
            with engine.connect() as connection:
                assert len(to_arrow(connection, **options)) == JOBS

        return rate(JOBS, read)

    def adbc() -> float:
        def read() -> None:
            with adbc_driver_postgresql.dbapi.connect(plain) as connection, connection.cursor() as cursor:
                cursor.execute("SELECT * FROM ml_jobs")
                assert len(cursor.fetch_arrow_table()) == JOBS

        return rate(JOBS, read)

    def records() -> float:
        def read() -> None:
            with Session(engine) as session:
                assert len(session.scalars(select(MlJob)).all()) == JOBS

        return rate(JOBS, read)

    report(
        f"{JOBS:,} jobs read",
        compare(
            {
                "COPY parsed into rows": rows,
                "to_arrow": arrow,
                "to_arrow, ids='uuid'": lambda: arrow(ids="uuid"),
                "to_arrow, four columns": lambda: arrow(columns=["id", "status", "target_name", "finished_at"]),
                "to_arrow, metrics spread": lambda: arrow(spread=("metrics",)),
                "ADBC, a connection of its own": adbc,
                "pandas.read_sql": lambda: rate(JOBS, lambda: pd.read_sql(select(MlJob), engine)),
                "polars, connectorx": lambda: rate(
                    JOBS, lambda: pl.read_database_uri("SELECT * FROM ml_jobs", plain, engine="connectorx")
                ),
                "records of the ORM": records,
            }
        ),
    )


def memory(url: str, jobs: int) -> None:
    code = f"from benchmarks.arrow import drain; drain({url!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(f"  arrow_batches, {jobs:>9,} jobs: {done.stdout.strip()} MiB at most", flush=True)


def drain(url: str) -> None:
    with JobStore(url) as store, store.arrow_batches(spread=("metrics",)) as reader:
        for _ in reader:
            pass
    status = Path("/proc/self/status").read_text()  # ru_maxrss would tell the peak of the parent, too
    print(int(status.partition("VmHWM:")[2].split()[0]) // 1024)


def main() -> None:
    with database() as url:
        engine = create_engine(url, poolclass=NullPool)
        clear(url)
        fill(engine, JOBS)
        speed(url)
        print("\nmemory of a process that reads all, metrics spread")
        memory(url, JOBS)
        clear(url)
        fill(engine, MORE)
        memory(url, MORE)
        engine.dispose()


if __name__ == "__main__":
    main()
