"""What the benchmarks share: a server, interleaved repeats, medians with their spread."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from mljobs import metadata
from tests import postgres

REPEATS = int(os.environ.get("BENCH_REPEATS", "5"))
reported: list[dict[str, list[float]]] = []
"""What was printed so far: of each rival jobs a second, repeat by repeat."""


@contextmanager
def database() -> Iterator[str]:
    """Yield the URL of a PostgreSQL database with the schema; ``MLJOBS_TEST_POSTGRES_URL`` names a server."""
    with postgres.server() as server:
        engine = create_engine(server.url, poolclass=NullPool)
        metadata.drop_all(engine)
        metadata.create_all(engine)
        engine.dispose()
        yield server.url


def clear(url: str, *, keep_finished: bool = False) -> None:
    """Empty the tables, through the retention door, and let the planner know."""
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        if keep_finished:
            connection.execute(text("DELETE FROM ml_jobs WHERE status IN ('queued', 'running')"))
        else:
            connection.execute(text("ALTER TABLE ml_jobs DISABLE TRIGGER ml_jobs_guard_truncate"))
            connection.execute(text("TRUNCATE ml_jobs CASCADE"))
            connection.execute(text("ALTER TABLE ml_jobs ENABLE TRIGGER ml_jobs_guard_truncate"))
        connection.execute(text("VACUUM ANALYZE ml_jobs"))
        connection.execute(text("VACUUM ANALYZE ml_job_leases"))
    engine.dispose()


def compare(rivals: dict[str, Callable[[], float]], repeats: int | None = None) -> dict[str, list[float]]:
    """Run the rivals in turn, ``repeats`` times; each returns operations a second."""
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(REPEATS if repeats is None else repeats):
        for name, run in rivals.items():
            rates[name].append(run())
    return rates


def report(title: str, rates: dict[str, list[float]], target: float | None = None) -> None:
    """Print the median and spread of each, and its ratio to the first, pair by pair."""
    reported.append(rates)
    names = list(rates)
    bound = rates[names[0]]
    print(f"\n{title}")
    for name in names:
        ratios = [rate / other for rate, other in zip(rates[name], bound, strict=True)]
        ratio = statistics.median(ratios)
        goal = (
            ""
            if not name.startswith(("store", "submit_many", "beside 1", "hooks")) or target is None
            else f"   target {target:g}: {'met' if ratio >= target else 'MISSED'}"
        )
        print(
            f"  {name:<34} {statistics.median(rates[name]):>11,.0f}/s  ({min(rates[name]):,.0f} .. {max(rates[name]):,.0f})"
            f"  ratio {ratio:.2f} ({min(ratios):.2f} .. {max(ratios):.2f}){goal}",
            flush=True,
        )


def rate(number: int, act: Callable[[], object]) -> float:
    """Return how many a second, when ``act`` does ``number``."""
    start = time.perf_counter()
    act()
    return number / (time.perf_counter() - start)
