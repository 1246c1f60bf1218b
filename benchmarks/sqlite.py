"""``python -m benchmarks.sqlite``: each operation on SQLite against raw ``sqlite3`` with the same statements, beside peers.

mljobs, raw ``sqlite3`` and each peer have a file of their own, in one process, and take turns, operation by operation or
batch by batch. ``python -m benchmarks.sqlite submit single`` runs only those parts; ``BENCH_REPEATS`` and ``BENCH_SCALE``
shorten it, ``TMPDIR`` says where the files are. The peers are installed once, into the directory that ``BENCH_ENVIRONMENTS``
names; ``BENCH_RIVALS=none`` leaves them out.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import event
from sqlalchemy.dialects import sqlite
from uuid_utils.compat import uuid7

from benchmarks.bench import reported
from benchmarks.drain.environments import HOME
from mljobs import JobStore, MlJob, Worker, metadata
from mljobs.db._engines import _set_pragmas
from mljobs.db._prepared import Prepared
from mljobs.jobs import _base, _fencing, _finishing, _picking, _starting, _submitting

REPEATS = int(os.environ.get("BENCH_REPEATS", "8"))
SCALE = float(os.environ.get("BENCH_SCALE", "1"))
PEERS = ["huey==3.5.4", "litequeue==0.9", "persist-queue==1.1.0"]
RIVALS = os.environ.get("BENCH_RIVALS", "huey,litequeue,persist-queue").split(",")
SPEC = {"model": "gradient boosting", "depth": 6, "lr": 0.05, "features": ["age", "country", "clicks_7d"]}
SPEC_TEXT = '{"model":"gradient boosting","depth":6,"lr":0.05,"features":["age","country","clicks_7d"]}'
METRICS, METRICS_TEXT = {"auc": 0.97}, '{"auc":0.97}'
COLUMNS = [column.name for column in MlJob.__table__.columns]
PROCESSES, SECONDS = 8, 6.0
TARGET = 0.75

Act = Callable[[], object]


def scaled(number: int) -> int:
    return max(10, int(number * SCALE))


def now_ms() -> int:
    return time.time_ns() // 1_000_000


# ------------------------------------------------------------------------------------------------- the statements of mljobs


class Statement:
    """The very text that mljobs sends, and the order of its parameters."""

    def __init__(self, prepared: Prepared) -> None:
        dialect: Any = sqlite.dialect()
        compiled = prepared._text(dialect, {})
        self.text, self.names, self.fixed = compiled.text, compiled.names, compiled.fixed

    def values(self, **given: Any) -> list[Any]:
        values = {**self.fixed, **given}
        return [values[name] for name in self.names]


LOCK = Statement(_base._write_nothing(MlJob))
LEASE = Statement(_starting.lease_statement(MlJob))
START = Statement(_starting.start_statement(MlJob))
FINISH = Statement(_finishing._FINISH.part(MlJob))
DELETE = Statement(_fencing.delete_statement(MlJob))
INSERT = Statement(_submitting._insertion(MlJob, _submitting._NOT_DEFAULT))
INSERT_MANY = Statement(_submitting._insertion(MlJob, tuple(COLUMNS)))
PICKS = {limit: Statement(_picking.pick_statement(MlJob, "any", limit)) for limit in (1, 100)}


class Raw:
    """What somebody would write who knows the statements: nothing around them but JSON and ids."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, timeout=30)
        _set_pragmas(self.connection, None)

    def insert(self) -> None:
        self.connection.execute(INSERT.text, raw_row())
        self.connection.commit()

    def insert_many(self, rows: Sequence[Sequence[Any]]) -> None:
        self.connection.executemany(INSERT_MANY.text, rows)
        self.connection.commit()

    def claim(self, limit: int) -> list[tuple[str, int, int]]:
        """Return id, token and start of each."""
        execute, now = self.connection.execute, now_ms()
        execute(LOCK.text)
        pick = PICKS[limit]
        picked = execute(pick.text, pick.values(now=now)).fetchall()
        if not picked:
            self.connection.commit()
            return []
        given = LEASE.values(worker="w", now=now, expires=now + 60_000, locks="[[null]]")
        ((token, _),) = execute(LEASE.text, given).fetchall()
        chosen = json.dumps([(row[0], token) for row in picked])
        rows = execute(START.text, START.values(worker="w", now=now, chosen=chosen)).fetchall()
        self.connection.commit()
        return [(row[0], token, now) for row in rows]

    def complete(self, claims: Sequence[tuple[str, int, int]]) -> None:
        execute = self.connection.execute
        leases = json.dumps([[token, at, 1] for token, at in {(token, at) for _, token, at in claims}])
        wanted = json.dumps([[job_id, token, "completed", None, METRICS_TEXT] for job_id, token, _ in claims])
        execute(FINISH.text, FINISH.values(now=now_ms(), wanted=wanted, leases=leases)).fetchall()
        execute(DELETE.text, DELETE.values(leases=leases)).fetchall()
        self.connection.commit()

    def drain(self, batch: int) -> int:
        """Return how many jobs there were."""
        done = 0
        while claims := self.claim(batch):
            self.complete(claims)
            done += len(claims)
        return done


def raw_row(statement: Statement = INSERT) -> list[Any]:
    given = {"id": uuid7().hex, "kind": "train", "target_name": "spam", "status": "queued", "progress": 0}
    given |= {"created_at": now_ms(), "spec_json": SPEC_TEXT, "attempts": 0, "priority": 0, "exclusive": 0}
    return [given.get(name) for name in statement.names]


def check_statements(store: JobStore) -> None:
    """Stop where raw would run other statements than mljobs does."""
    sent: list[str] = []

    def tell(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(store.engine, "before_cursor_execute", tell)
    store.submit("train", "spam", SPEC)
    (claim,) = store.claim(worker="w")
    store.complete(claim, METRICS)
    expected = [one.text for one in (INSERT, LOCK, PICKS[1], LEASE, START, FINISH, DELETE)]
    assert sent == expected, [pair for pair in zip(sent, expected, strict=False) if pair[0] != pair[1]]


# ------------------------------------------------------------------------------------------------------------ peers


def peers(directory: Path) -> dict[str, tuple[Act, Callable[[], bool]]]:
    """Return for each peer what submits a job, and what does the next one; False where there is none."""
    if RIVALS == ["none"]:
        return {}
    place = HOME / "sqlite-peers"
    if not place.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place, *PEERS]
        subprocess.run(command, check=True)
    if str(place) not in sys.path:
        sys.path.append(str(place))
    makers = {"huey": huey_peer, "litequeue": litequeue_peer, "persist-queue": persist_queue_peer}
    return {name: make(directory) for name, make in makers.items() if name in RIVALS}


def huey_peer(directory: Path) -> tuple[Act, Callable[[], bool]]:
    from huey import SqliteHuey  # noqa: PLC0415 - not in this environment

    huey = SqliteHuey("bench", filename=str(directory / "huey.db"), fsync=True, results=False)
    task = huey.task()(lambda **_spec: None)

    def work() -> bool:
        message = huey.dequeue()
        if message is not None:
            huey.execute(message)
        return message is not None

    return lambda: task(**SPEC), work


def litequeue_peer(directory: Path) -> tuple[Act, Callable[[], bool]]:
    from litequeue import LiteQueue  # noqa: PLC0415 - as above

    queue = LiteQueue(str(directory / "litequeue.db"))
    queue.conn.execute("PRAGMA synchronous = FULL")

    def work() -> bool:
        message = queue.pop()
        if message is not None:
            json.loads(message.data)
            queue.done(message.message_id)
        return message is not None

    return lambda: queue.put(json.dumps(SPEC)), work


def persist_queue_peer(directory: Path) -> tuple[Act, Callable[[], bool]]:
    import persistqueue  # noqa: PLC0415 - as above

    queue = persistqueue.SQLiteAckQueue(str(directory / "persist-queue"), auto_commit=True)

    def work() -> bool:
        try:
            item = queue.get(block=False)
        except persistqueue.exceptions.Empty:
            return False
        queue.ack(item)
        return True

    return lambda: queue.put(SPEC), work


# ---------------------------------------------------------------------------------------------------------- measuring


@contextmanager
def place() -> Iterator[Path]:
    with TemporaryDirectory(prefix="mljobs-bench-") as directory:
        yield Path(directory)


def new_file(path: Path) -> Path:
    """Return the path of a database with the schema of mljobs."""
    with JobStore(f"sqlite:///{path}") as store:
        metadata.create_all(store.engine)
    return path


@contextmanager
def both(directory: Path) -> Iterator[tuple[Raw, JobStore]]:
    """Yield raw ``sqlite3`` and a store, each on a file of its own."""
    raw = Raw(new_file(directory / "raw.db"))
    path = new_file(directory / "mljobs.db")
    with JobStore(f"sqlite:///{path}") as listened_to:  # an engine that was listened to stays slower
        check_statements(listened_to)
    with closing(raw.connection), JobStore(f"sqlite:///{path}") as store:
        yield raw, store


def in_turn(title: str, rivals: dict[str, Act], number: int, each: int = 1, target: float | None = TARGET) -> None:
    """Run the rivals in turn, ``number`` times a repeat, and print what came of it, as ratios to the first.

    Args:
        title: What is done.
        rivals: Each does ``each`` jobs.
        number: How often in a repeat.
        each: How many jobs at a time.
        target: The least ratio of mljobs.
    """
    clocks: dict[str, list[float]] = {name: [] for name in rivals}
    costs: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(REPEATS):
        clock, cost = dict.fromkeys(rivals, 0.0), dict.fromkeys(rivals, 0.0)
        for _ in range(number):
            for name, act in rivals.items():
                used, began = time.process_time(), time.perf_counter()
                act()
                clock[name] += time.perf_counter() - began
                cost[name] += time.process_time() - used
        for name in rivals:
            clocks[name].append(clock[name] / number / each * 1e6)
            costs[name].append(cost[name] / number / each * 1e6)
    report(title, clocks, costs, target)


def report(title: str, clocks: dict[str, list[float]], costs: dict[str, list[float]], target: float | None) -> None:
    """Print for each, from microseconds a job: jobs a second, CPU a job, and the ratios to the first by both."""
    reported.append({name: [1e6 / value for value in values] for name, values in clocks.items()})
    print(f"\n{title}: jobs/s; CPU us/job; ratio to the first by the clock; by CPU")
    first = next(iter(clocks))
    for name, values in clocks.items():
        by_clock = [bound / value for bound, value in zip(clocks[first], values, strict=True)]
        by_cost = [bound / value for bound, value in zip(costs[first], costs[name], strict=True)]
        goal = ""
        if target is not None and name.startswith("mljobs"):
            goal = f"  target {target}: {'met' if statistics.median(by_clock) >= target else 'MISSED'}"
        print(
            f"  {name:<28} {1e6 / statistics.median(values):>9,.0f}/s {statistics.median(costs[name]):>8.1f} us   "
            f"{spread(by_clock)}   {spread(by_cost)}{goal}",
            flush=True,
        )


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"


# --------------------------------------------------------------------------------------------------------------- parts


def submit() -> None:
    with place() as directory, both(directory) as (raw, store):
        others = {name: put for name, (put, _) in peers(directory).items()}
        rivals = {"raw": raw.insert, "mljobs: store.submit": lambda: store.submit("train", "spam", SPEC), **others}
        in_turn("submit one by one", rivals, scaled(1000))


def many() -> None:
    each = 1000
    ready = iter([[raw_row(INSERT_MANY) for _ in range(each)] for _ in range(REPEATS * scaled(10))])
    records = iter(
        [
            [MlJob(kind="train", target_name="spam", spec_json=SPEC_TEXT) for _ in range(each)]
            for _ in range(REPEATS * scaled(10))
        ]
    )
    tuples = [("train", "spam", SPEC)] * each
    with place() as directory, both(directory) as (raw, store):
        rivals = {
            "raw executemany, ready rows": lambda: raw.insert_many(next(ready)),
            "mljobs: submit_many, records": lambda: store.submit_many(next(records)),
            "mljobs: submit_many, tuples": lambda: store.submit_many(tuples),
        }
        in_turn(f"submit {each:,} at once", rivals, scaled(10), each)


def single() -> None:
    number = scaled(500)
    with place() as directory, both(directory) as (raw, store):
        others = peers(directory)
        raw.insert_many([raw_row(INSERT_MANY) for _ in range(number * REPEATS)])
        store.submit_many([("train", "spam", SPEC)] * (number * REPEATS))
        for put, _ in others.values():
            for _ in range(number * REPEATS):
                put()

        def by_store() -> None:
            (claim,) = store.claim(worker="w")
            store.complete(claim, METRICS)

        rivals: dict[str, Act] = {"raw": lambda: raw.complete(raw.claim(1)), "mljobs: claim, complete": by_store}
        in_turn(
            "claim and complete one by one", {**rivals, **{name: work for name, (_, work) in others.items()}}, number
        )


def batches() -> None:
    number, each = scaled(25), 100
    with place() as directory, both(directory) as (raw, store):
        raw.insert_many([raw_row(INSERT_MANY) for _ in range(number * each * REPEATS)])
        store.submit_many([("train", "spam", SPEC)] * (number * each * REPEATS))

        def by_store() -> None:
            claims = store.claim(worker="w", limit=each)
            store.complete_many([(claim, METRICS) for claim in claims])

        rivals = {"raw": lambda: raw.complete(raw.claim(each)), "mljobs: claim, complete_many": by_store}
        in_turn(f"claim and complete batches of {each}", rivals, number, each)


def drain() -> None:
    """A worker with one slot and a handler that does nothing; raw in batches of 100; the peers' own loops."""
    number = scaled(4000)
    with place() as directory, both(directory) as (raw, store):
        others = peers(directory)
        clocks: dict[str, list[float]] = {}
        costs: dict[str, list[float]] = {}

        def worker() -> None:
            one = Worker(store, concurrency=1)
            one.handles("train")(lambda _run: None)
            one.run(until_idle=True)

        def until_none(work: Callable[[], bool]) -> None:
            while work():
                pass

        for _ in range(REPEATS):
            raw.insert_many([raw_row(INSERT_MANY) for _ in range(number)])
            store.submit_many([("train", "spam", SPEC)] * number)
            for put, _ in others.values():
                for _ in range(number):
                    put()
            rivals: dict[str, Act] = {"raw, batches of 100": lambda: raw.drain(100), "mljobs: a worker": worker}
            rivals |= {name: lambda work=work: until_none(work) for name, (_, work) in others.items()}
            for name, act in rivals.items():
                used, began = time.process_time(), time.perf_counter()
                act()
                clocks.setdefault(name, []).append((time.perf_counter() - began) / number * 1e6)
                costs.setdefault(name, []).append((time.process_time() - used) / number * 1e6)
        report("drain, no-op jobs", clocks, costs, TARGET)


# ----------------------------------------------------------------------------------------------- eight processes, one file


def processes() -> None:
    """Each process submits, claims and completes one by one, as fast as it can."""
    context = multiprocessing.get_context("spawn")
    for name, loop in (("raw", raw_loop), ("mljobs", store_loop)):
        rates, shares, waits, errors = [], [], [], 0
        for _ in range(max(1, REPEATS // 2)):
            with place() as directory:
                path = new_file(directory / "shared.db")
                barrier, results = context.Barrier(PROCESSES), context.Queue()
                seconds = max(1.0, SECONDS * SCALE)
                running = [
                    context.Process(target=loop, args=(path, seconds, barrier, results)) for _ in range(PROCESSES)
                ]
                for process in running:
                    process.start()
                found = [results.get(timeout=seconds + 120) for _ in running]
                for process in running:
                    process.join()
            done = [jobs for jobs, _, _ in found]
            rates.append(sum(done) / seconds)
            shares.append(min(done) / max(done))
            waits.append(max(longest for _, longest, _ in found))
            errors += sum(failed for _, _, failed in found)
        print(
            f"\n{PROCESSES} processes, {name}: {statistics.median(rates):,.0f} jobs/s, least to greatest share "
            f"{spread(shares)}, longest operation {max(waits):.2f} s, errors {errors}",
            flush=True,
        )


def raw_loop(path: Path, seconds: float, barrier: Any, results: Any) -> None:
    raw = Raw(path)

    def acts() -> Iterator[Act]:
        while True:
            yield raw.insert
            yield lambda: raw.complete(raw.claim(1))

    results.put(repeat(acts(), seconds, barrier))


def store_loop(path: Path, seconds: float, barrier: Any, results: Any) -> None:
    with JobStore(f"sqlite:///{path}") as store:

        def work() -> None:
            for claim in store.claim(worker="w"):
                store.complete(claim, METRICS)

        def acts() -> Iterator[Act]:
            while True:
                yield lambda: store.submit("train", "spam", SPEC)
                yield work

        results.put(repeat(acts(), seconds, barrier))


def repeat(acts: Iterator[Act], seconds: float, barrier: Any) -> tuple[int, float, int]:
    """Return how many pairs of operations were done, the longest operation, and how many failed."""
    barrier.wait(60)
    end, longest, errors = time.monotonic() + seconds, 0.0, 0
    for number in count():
        began = time.monotonic()
        if began >= end:
            return number // 2, longest, errors
        try:
            next(acts)()
        except Exception as error:  # noqa: BLE001 - counted
            errors += 1
            print(error, file=sys.stderr)
        longest = max(longest, time.monotonic() - began)
    raise AssertionError("count() has no end")


# ------------------------------------------------------------------------------------------------- what the guard costs


def guard() -> None:
    """Raw statements on the tables as they are; without triggers; without triggers and CHECKs."""
    number = scaled(500)
    with place() as directory:
        rivals: dict[str, Raw] = {}
        for name in ("all", "no triggers", "no triggers, no CHECKs"):
            raw = rivals[name] = Raw(new_file(directory / f"{name}.db"))
            if name != "all":
                drop_triggers(raw.connection)
            if "CHECK" in name:
                raw.connection.execute("PRAGMA ignore_check_constraints = ON")
            raw.insert_many([raw_row(INSERT_MANY) for _ in range(number * REPEATS * 12)])

        def in_batches(raw: Raw) -> Act:
            return lambda: raw.complete(raw.claim(100))

        in_turn("guard: insert one", {name: raw.insert for name, raw in rivals.items()}, number, target=None)
        one = {name: lambda raw=raw: raw.complete(raw.claim(1)) for name, raw in rivals.items()}
        in_turn("guard: claim and complete one", one, number, target=None)
        hundred = {name: in_batches(raw) for name, raw in rivals.items()}
        in_turn("guard: claim and complete a hundred", hundred, max(2, number // 20), 100, target=None)


def drop_triggers(connection: sqlite3.Connection) -> None:
    for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
        connection.execute(f'DROP TRIGGER "{name}"')


PARTS: dict[str, Callable[[], None]] = {
    "submit": submit,
    "many": many,
    "single": single,
    "batches": batches,
    "drain": drain,
    "processes": processes,
    "guard": guard,
}


def main(names: Sequence[str] = ()) -> None:
    print(f"SQLite {sqlite3.sqlite_version}, Python {sys.version.split()[0]}, {REPEATS} repeats", flush=True)
    for name in names or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main(sys.argv[1:])
