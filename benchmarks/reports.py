"""What a running job's reports cost, and what it costs that workers are seen; small and large specs, both databases.

Run ``python -m benchmarks.reports``. 1,000 running jobs of one worker. Each round runs all parts in turn, so that what else
the machine does meets all alike; the ratio is the median over the rounds, with the least and greatest.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.engine import Connection

from mljobs import JobStore, schema
from mljobs._values import utc_now
from mljobs.jobs import WorkerInfo
from mljobs.jobs._holding import Report
from mljobs.jobs._workers import register_worker, update_worker
from tests import postgres

JOBS, ROUNDS, BIG = 1_000, 15, 100_000
METRICS = '{"loss":0.25,"epoch":4,"accuracy":0.91}'


@contextmanager
def stores(dialect: str) -> Iterator[Callable[[str], JobStore]]:
    opened: list[JobStore] = []

    def open_store(url: str) -> JobStore:
        schema.upgrade(url)
        opened.append(JobStore(url))
        return opened[-1]

    with tempfile.TemporaryDirectory() as directory:
        if dialect == "sqlite":
            yield lambda name: open_store(f"sqlite:///{Path(directory) / name}.db")
        else:
            with postgres.server() as server:
                admin = create_engine(server.url, isolation_level="AUTOCOMMIT")

                def make(name: str) -> JobStore:
                    with admin.connect() as connection:
                        connection.execute(text(f"CREATE DATABASE {name}"))
                    return open_store(admin.url.set(database=name).render_as_string(False))

                yield make
                for store in opened:
                    store.close()
                admin.dispose()
        for store in opened:
            store.close()


def running(store: JobStore, size: int) -> list[Any]:
    """Return the claims of running jobs whose spec has so many bytes; of random hex, which compresses by half at most."""
    import random  # noqa: PLC0415

    source = random.Random(1)
    pad = max(size - 20, 1)
    store.submit_many(("train", f"t{n}", {"data": source.randbytes(pad // 2 + 1).hex()[:pad]}) for n in range(JOBS))
    claims: list[Any] = []
    while len(claims) < JOBS:
        claims += store.claim(worker="w", limit=JOBS - len(claims), lease=3600)
    return claims


def wal(connection: Connection) -> int:
    found: int = connection.execute(
        text("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint")
    ).scalar_one()
    return found


def measured(parts: dict[str, Callable[[int], object]], store_of: dict[str, JobStore], *, postgres_: bool) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    written: dict[str, list[int]] = {name: [] for name in parts}
    for number in range(ROUNDS):
        for name, part in parts.items():
            if postgres_:
                with store_of[name].engine.connect() as connection:
                    before = wal(connection)
            begun = time.perf_counter()
            part(number)
            seconds[name].append(time.perf_counter() - begun)
            if postgres_:
                with store_of[name].engine.connect() as connection:
                    written[name].append(wal(connection) - before)
    first = next(iter(parts))
    for name, found in seconds.items():
        ratios = [one / base for one, base in zip(found, seconds[first], strict=True)]
        log = f", {median(written[name]) / 1000:,.0f} kB of WAL" if postgres_ else ""
        print(
            f"  {name}: {median(found) * 1000:.1f} ms, ratio {median(ratios):.2f} "
            f"({min(ratios):.2f} .. {max(ratios):.2f}){log}"
        )


def measure(dialect: str, open_store: Callable[[str], JobStore]) -> None:
    print(f"{dialect}: a second's reports of {JOBS:,} running jobs, in one statement")
    small, big = open_store("small"), open_store("big")
    claims = {"small": running(small, 100), "big": running(big, BIG)}
    parts: dict[str, Callable[[int], object]] = {}
    of: dict[str, JobStore] = {}
    for size, store in (("small", small), ("big", big)):
        own = claims[size]

        def progress(number: int, store: JobStore = store, own: list[Any] = own) -> None:
            assert not any(store.report_many([Report(claim, number % 100) for claim in own]))

        def metrics(number: int, store: JobStore = store, own: list[Any] = own) -> None:
            assert not any(store.report_many([Report(claim, number % 100, METRICS) for claim in own]))

        label = "100 bytes" if size == "small" else "100 kB"
        parts[f"progress, specs of {label}"] = progress
        parts[f"progress and metrics, specs of {label}"] = metrics
        of |= {name: store for name in parts if name not in of}
    measured(parts, of, postgres_=dialect == "postgresql")
    print(f"{dialect}: a heartbeat of {JOBS:,} running jobs")
    own = claims["small"]
    now = utc_now()
    with small.connect() as bind:
        worker = register_worker(bind, WorkerInfo("w", "host", 1, ("train",), 4, "1.0", now, now))

    def heartbeat(_: int) -> None:
        small.renew(own, lease=3600)

    def seen(number: int) -> None:
        heartbeat(number)
        with small.connect(atomic=False) as bind:
            assert update_worker(bind, worker)

    beats: dict[str, Callable[[int], object]] = {"leases": heartbeat, "leases, and the worker is seen": seen}
    measured(beats, dict.fromkeys(beats, small), postgres_=dialect == "postgresql")


def main() -> None:
    for dialect in ("postgresql", "sqlite"):
        with stores(dialect) as open_store:
            measure(dialect, open_store)


if __name__ == "__main__":
    main()
