"""``python -m benchmarks.lifecycle``: each operation against raw psycopg running the same statements, in the same run.

``python -m benchmarks.lifecycle submit claims`` runs only those parts; ``BENCH_REPEATS`` and ``BENCH_SCALE`` shorten it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from uuid_utils.compat import uuid7

from benchmarks.bench import clear, compare, database, rate, report
from mljobs import JobStore, MlJob
from mljobs.db._prepared import Prepared
from mljobs.jobs import _finishing, _holding
from mljobs.jobs._claiming import _claim_statement
from mljobs.jobs._submitting import _NOT_DEFAULT, _insertion

SCALE = float(os.environ.get("BENCH_SCALE", "1"))
SPEC = {"model": "gradient boosting", "depth": 6, "lr": 0.05, "features": ["age", "country", "clicks_7d"]}
SPEC_TEXT = '{"model":"gradient boosting","depth":6,"lr":0.05,"features":["age","country","clicks_7d"]}'
COLUMNS = [column.name for column in MlJob.__table__.columns]
TYPES = [
    "uuid", "text", "text", "text", "int2", "timestamptz", "timestamptz", "timestamptz", "text", "text", "text",
    "int2", "int2", "timestamptz", "bool", "uuid", "text", "int8",
]  # fmt: skip


def scaled(number: int) -> int:
    return max(10, int(number * SCALE))


def address(url: str) -> str:
    return url.replace("+psycopg", "")


def sql(prepared: Prepared, store: JobStore) -> str:
    """Return the very text that the store sends."""
    return prepared._text(store.engine.dialect, {}).text


def claimed(rows: list[Any]) -> list[dict[str, Any]]:
    """Return id, lease and start of each job in the rows of a claim."""
    at = 2  # behind the number of picked jobs and the end of the leases
    started, lease = at + COLUMNS.index("started_at"), at + COLUMNS.index("lease")
    return [{"id": r[at], "token": r[lease], "acquired_at": r[started]} for r in rows if r[at] is not None]


def under_leases(jobs: list[dict[str, Any]], *, ends: bool, **values: Any) -> dict[str, Any]:
    """Return the parameters of a write: each job gets the same values."""
    leases = {job["token"]: job["acquired_at"] for job in jobs}
    return {
        "wanted_id": [job["id"] for job in jobs],
        "wanted_token": [job["token"] for job in jobs],
        "leases_token": list(leases),
        "leases_acquired_at": list(leases.values()),
        "leases_empty": [ends] * len(leases),
        **{f"wanted_{name}": [value] * len(jobs) for name, value in values.items()},
    }


def row() -> tuple[Any, ...]:
    now = datetime.now(UTC)
    return (
        uuid7(),
        "train",
        "spam",
        "queued",
        0,
        now,
        None,
        None,
        None,
        SPEC_TEXT,
        None,
        0,
        0,
        None,
        False,
        None,
        None,
        None,
    )


def submit(url: str) -> None:
    number = scaled(2000)
    with JobStore(url) as store, psycopg.connect(address(url), autocommit=True) as raw:
        insertion = sql(_insertion(MlJob, _NOT_DEFAULT), store)

        def by_raw() -> float:
            clear(url)
            return rate(
                number, lambda: [raw.execute(insertion, dict(zip(COLUMNS, row(), strict=True))) for _ in range(number)]
            )

        def by_store() -> float:
            clear(url)
            return rate(number, lambda: [store.submit("train", "spam", SPEC) for _ in range(number)])

        def by_session() -> float:
            clear(url)

            def add() -> None:
                with Session(store.engine) as session, session.begin():
                    session.add(MlJob(kind="train", target_name="spam", spec=SPEC))

            return rate(number, lambda: [add() for _ in range(number)])

        rivals = {"raw psycopg, autocommit": by_raw, "store.submit": by_store, "session.add + commit": by_session}
        report(f"submit one, {number} times", compare(rivals), 0.65)


def submit_many(url: str) -> None:
    number = scaled(100_000)
    with JobStore(url) as store, psycopg.connect(address(url)) as raw:
        rows = [row() for _ in range(number)]
        records = [MlJob(kind="train", target_name="spam", spec_json=SPEC_TEXT) for _ in range(number)]
        tuples = [("train", "spam", SPEC)] * number

        def by_raw() -> float:
            clear(url)

            def copy() -> None:
                with (
                    raw.cursor() as cursor,
                    cursor.copy(f"COPY ml_jobs ({', '.join(COLUMNS)}) FROM STDIN (FORMAT binary)") as pipe,
                ):
                    pipe.set_types(TYPES)
                    for values in rows:
                        pipe.write_row(values)
                raw.commit()

            return rate(number, copy)

        def by(source: list[Any]) -> Callable[[], float]:
            def run() -> float:
                clear(url)
                return rate(number, lambda: store.submit_many(source))

            return run

        rivals = {
            "raw binary COPY of ready rows": by_raw,
            "submit_many(records)": by(records),
            "submit_many(tuples)": by(tuples),
        }
        report(f"submit many, {number:,}", compare(rivals), 0.7)


def _store_worker(store: JobStore, batch: int, rounds: int) -> None:
    for _ in range(rounds):
        claims = store.claim(worker="w", limit=batch)
        if batch == 1:
            store.complete(claims[0], {"auc": 0.97})
        else:
            store.complete_many([(claim, {"auc": 0.97}) for claim in claims])


def _raw_claims(raws: Sequence[psycopg.Connection[Any]], store: JobStore, batch: int, rounds: int) -> None:
    """Claim and complete, in a thread for each connection."""
    dialect = store.engine.dialect
    claim = _claim_statement(MlJob, "any", batch)._text(dialect, {})
    finish = _finishing._FINISH.statement(MlJob)._text(dialect, {})
    idle = iter(raws)

    def work() -> None:
        raw = next(idle)
        for _ in range(rounds):
            given = {"worker": "w", "lease": timedelta(seconds=60), "limit": batch}
            rows = raw.execute(claim.text, {**claim.fixed, **given}).fetchall()
            done = {"status": "completed", "error": None, "metrics": '{"auc":0.97}'}
            finished = under_leases(claimed(rows), ends=True, **done)
            raw.execute(finish.text, {**finish.fixed, **finished}).fetchall()

    _in_threads(work, len(raws))


def _in_threads(work: Callable[[], None], threads: int) -> None:
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def claims(url: str, cases: Sequence[tuple[int, int, int]] | None = None) -> None:
    """Claim and complete: batches of so many, in so many threads, so many jobs."""
    every = (
        (1, 1, scaled(1000)),
        (1, 2, scaled(1000)),
        (1, 4, scaled(1000)),
        (1, 8, scaled(1000)),
        (10, 1, scaled(5000)),
        (100, 1, scaled(20_000)),
        (100, 2, scaled(20_000)),
    )
    with JobStore(url, pool_size=10) as store, ExitStack() as kept:
        # Kept from one run to the next, as the store keeps its own.
        raws = [kept.enter_context(psycopg.connect(address(url), autocommit=True)) for _ in range(8)]
        clear(url, keep_finished=True)
        for batch, threads, number in every if cases is None else cases:
            rounds = max(1, number // batch // threads)
            jobs_in_all = rounds * batch * threads

            def fill(jobs_in_all: int = jobs_in_all) -> None:
                clear(url, keep_finished=True)
                store.submit_many([("train", f"t{n % 100}", SPEC) for n in range(jobs_in_all)])
                with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                    connection.execute(text("ANALYZE ml_jobs"))

            def by_raw(batch: int = batch, rounds: int = rounds, threads: int = threads, n: int = jobs_in_all) -> float:
                fill(n)
                return rate(n, lambda: _raw_claims(raws[:threads], store, batch, rounds))

            def by_store(
                batch: int = batch, rounds: int = rounds, threads: int = threads, n: int = jobs_in_all
            ) -> float:
                fill(n)
                return rate(n, lambda: _in_threads(lambda: _store_worker(store, batch, rounds), threads))

            title = f"claim + complete, batches of {batch}, {threads} threads"
            target = 0.75 if batch == 1 else 0.8
            report(title, compare({"raw psycopg, same statements": by_raw, "store": by_store}), target)


def flat(url: str) -> None:
    """Throughput beside a million finished rows, against beside none; both in turn, on two tables' worth of history."""
    million = scaled(1_000_000)
    number = scaled(20_000)
    results: dict[str, list[float]] = {"beside 0 finished": [], f"beside {million:,} finished": []}
    with JobStore(url) as store:
        for _ in range(3):
            for name, history in zip(results, (0, million), strict=True):
                clear(url)
                old = datetime(2026, 1, 1, tzinfo=UTC)
                store.submit_many(
                    MlJob(kind="train", target_name=f"t{n % 1000}", status="completed", progress=100, created_at=old,
                          started_at=old, finished_at=old, spec_json=SPEC_TEXT)
                    for n in range(history)
                )  # fmt: skip
                store.submit_many([("train", f"t{n % 100}", SPEC) for n in range(number)])
                with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                    connection.execute(text("VACUUM ANALYZE ml_jobs"))
                    connection.execute(text("CHECKPOINT"))
                results[name].append(rate(number, lambda: _store_worker(store, 100, number // 100)))
                if history:
                    started = datetime.now(UTC)
                    counts = store.counts()
                    took = (datetime.now(UTC) - started).total_seconds() * 1000
                    print(f"  counts(): {took:.1f} ms, {counts.total():,} jobs, exact={counts.exact}")
    report("claim + complete in batches of 100", results, 0.95)


def life(url: str) -> None:
    number = scaled(300)
    with JobStore(url) as store, psycopg.connect(address(url), autocommit=True) as raw:
        insertion, claiming, progress, finish = (
            sql(prepared, store)
            for prepared in (
                _insertion(MlJob, _NOT_DEFAULT),
                _claim_statement(MlJob, "ids", 1),
                _holding._REPORT.statement(MlJob),
                _finishing._FINISH.statement(MlJob),
            )
        )

        def one_raw() -> None:
            values = row()
            raw.execute(insertion, dict(zip(COLUMNS, values, strict=True)))
            picked = {"worker": "w", "lease": timedelta(seconds=60), "ids": [values[0]]}
            jobs = claimed(raw.execute(claiming, picked).fetchall())
            for step in range(10):
                raw.execute(progress, under_leases(jobs, ends=False, progress=step * 10, metrics=None)).fetchall()
            done = {"status": "completed", "error": None, "metrics": '{"auc":0.97}'}
            raw.execute(finish, under_leases(jobs, ends=True, **done)).fetchall()

        def one_store() -> None:
            job = store.submit("train", "spam", SPEC)
            claim = store.claim_one(job, worker="w")
            for step in range(10):
                store.set_progress(claim, step * 10)
            store.complete(claim, {"auc": 0.97})

        def lives(one: Callable[[], None]) -> Callable[[], float]:
            def run() -> float:
                clear(url)
                return rate(number, lambda: [one() for _ in range(number)])

            return run

        rivals = {"raw psycopg, same statements": lives(one_raw), "store": lives(one_store)}
        report(f"create + 10 progress values + finish, {number} times", compare(rivals))


def heartbeats(url: str) -> None:
    number = scaled(10_000)
    with JobStore(url) as store:
        clear(url)
        store.submit_many([("train", "t", {}) for _ in range(number)])
        held = store.claim(worker="w", limit=min(number, 10_000))
        with psycopg.connect(address(url), autocommit=True) as raw:
            statement = _holding._renewal_statement(MlJob, True)._text(store.engine.dialect, {})
            jobs = [{"id": c.job_id, "token": c.token, "acquired_at": c.lease.acquired_at} for c in held]

            def by_raw() -> float:
                given = {**statement.fixed, **under_leases(jobs, ends=False), "lease": timedelta(seconds=60)}
                return rate(number, lambda: raw.execute(statement.text, given).fetchall())

            def by_store() -> float:
                return rate(number, lambda: store.renew(held))

            report(f"heartbeat of {number:,} leases, one statement", compare({"raw": by_raw, "store.renew": by_store}))


def notify(url: str) -> None:
    """What NOTIFY costs 8 concurrent submitters: nobody sleeps, a worker sleeps, and a trigger that always notifies."""
    number = scaled(500)
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")

    def always(*, on: bool) -> None:
        with engine.connect() as connection:
            connection.execute(text("DROP TRIGGER IF EXISTS always ON ml_jobs"))
            connection.execute(
                text(
                    "CREATE OR REPLACE FUNCTION always() RETURNS trigger LANGUAGE plpgsql "
                    "AS $$ BEGIN PERFORM pg_notify('other', ''); RETURN NULL; END $$"
                )
            )
            wake = "DISABLE" if on else "ENABLE"
            connection.execute(text(f"ALTER TABLE ml_jobs {wake} TRIGGER ml_jobs_wake_insert"))
            if on:
                connection.execute(
                    text("CREATE TRIGGER always AFTER INSERT ON ml_jobs FOR EACH STATEMENT EXECUTE FUNCTION always()")
                )

    def trigger(*, enabled: bool) -> None:
        with engine.connect() as connection:
            verb = "ENABLE" if enabled else "DISABLE"
            connection.execute(text(f"ALTER TABLE ml_jobs {verb} TRIGGER ml_jobs_wake_insert"))

    with JobStore(url, pool_size=10) as store:

        def eight() -> float:
            def work() -> None:
                for _ in range(number):
                    store.submit("train", "spam", SPEC)

            return rate(number * 8, lambda: _in_threads(work, 8))

        def none() -> float:
            clear(url)
            trigger(enabled=False)
            try:
                return eight()
            finally:
                trigger(enabled=True)

        def awake() -> float:
            clear(url)
            return eight()

        def asleep() -> float:
            from mljobs.db._wake import ChangeListener  # noqa: PLC0415

            clear(url)
            with ChangeListener(store.engine, MlJob.__table__, workers=True) as listener:
                listener.wait(0)
                return eight()

        def every() -> float:
            clear(url)
            always(on=True)
            try:
                return eight()
            finally:
                always(on=False)

        rivals = {
            "no trigger": none,
            "trigger, nobody sleeps": awake,
            "trigger, a worker sleeps": asleep,
            "a trigger that always notifies": every,
        }
        report("submit with 8 threads: what NOTIFY costs", compare(rivals))
    engine.dispose()


PARTS: dict[str, Callable[[str], None]] = {
    "submit": submit,
    "submit_many": submit_many,
    "claims": claims,
    "life": life,
    "heartbeats": heartbeats,
    "notify": notify,
    "flat": flat,
}


def main(names: list[str]) -> None:
    with database() as url:
        for name in names or PARTS:
            PARTS[name](url)


if __name__ == "__main__":
    main(sys.argv[1:])
