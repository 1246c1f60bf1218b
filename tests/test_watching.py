"""What a watch reads and remembers: late commits, clocks that differ, few columns, few rows, bounded memory.

A look is called by hand here, and the clock is the test's, so that nothing waits.
"""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from datetime import datetime, timedelta
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, create_engine, delete, event, insert, update
from sqlalchemy.orm import Session

from mljobs import AsyncJobStore, JobStore, MlJob, jobs
from mljobs._values import utc_now
from mljobs.jobs._filters import selection
from mljobs.store import _change_reader, _watching
from mljobs.store._change_reader import ChangeReader
from mljobs.store._following import Locked, Read
from mljobs.store._watching import Watch
from tests.waiting import until
from tests.watches import answered, yielded_by

TABLE = MlJob.__table__
MINUTE = timedelta(minutes=1)


class Looks:
    """A watch whose looks are called.

    Args:
        engine: Where.
        filter: Of the watch.
        beside: A watch with which it shares the reader.
        where: Of the watch.
        **fields: Of the filter.
    """

    def __init__(
        self,
        engine: Engine,
        filter: str | None = None,  # noqa: A002 - as in a store
        beside: Looks | None = None,
        where: Any = None,
        **fields: Any,
    ) -> None:
        reader = ChangeReader(MlJob, threading.Lock) if beside is None else beside.watch.reader
        self.watch = Watch(reader, selection(MlJob, filter, where, fields))
        self._engine = engine
        self.look()

    def read(self, step: Read) -> Any:
        """Return the answer of the database."""
        with self._engine.begin() as connection:
            return step.operation(connection)

    def look(self, since: float | None = None) -> list[MlJob]:
        """Return what one look yields.

        Args:
            since: A look of another watch that began then or later will do; None for none.
        """
        return yielded_by(self.watch.look(time.monotonic() if since is None else since), self.read)

    def seen(self) -> list[tuple[str, str]]:
        """Return target and state of what one look yields."""
        return [(job.target_name, str(job.status)) for job in self.look()]

    @property
    def remembered(self) -> int:
        """How many ids and states its reader holds."""
        reader = self.watch.reader
        return sum(map(len, (reader._created, reader._finished, reader._active, reader._changes)))


class Clock:
    """The clock of the watch, which tests set."""

    def __init__(self) -> None:
        self.now = utc_now()

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(_change_reader, "utc_now", made)
    return made


def add(connection: Connection, name: str, created_at: datetime, **values: Any) -> Any:
    """Insert a job and return its id."""
    job = MlJob(kind="train", target_name=name)
    values = {"id": job.id, "kind": "train", "target_name": name, "spec_json": "{}", "created_at": created_at, **values}
    connection.execute(insert(TABLE).values(status="queued", progress=0).values(values))
    return job.id


def _set(engine: Engine, job_id: Any, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(update(TABLE).where(TABLE.c.id == job_id).values(**values))


# ------------------------------------------------------------------------------------------- transactions that stay open


def _create_late(engine: Engine) -> Iterator[None]:
    job = MlJob(kind="train", target_name="late")  # its time is taken, and nothing is written
    yield
    with Session(engine) as session:
        session.add(job)
        session.flush()
        yield
        session.commit()


def _finish_late(engine: Engine) -> Iterator[None]:
    with engine.connect() as connection:
        job_id = add(connection, "late", utc_now() - 60 * MINUTE)
        connection.commit()
        yield
        jobs.cancel(connection, job_id)
        yield
        connection.commit()


def _live_late(engine: Engine) -> Iterator[None]:
    with engine.connect() as connection:
        job = MlJob(kind="train", target_name="late")
        yield
        with connection.begin_nested():  # a subtransaction, whose id no snapshot holds
            jobs.submit_many(connection, [job])
            jobs.complete(connection, jobs.claim_one(connection, job.id, worker="w"))
        yield
        connection.commit()


INTERLEAVED = [sorted(chosen) for chosen in combinations(range(5), 3)]
"""At which of five steps the late transaction takes its time, writes and commits; another job is done at the others."""


@pytest.mark.parametrize("life", [_create_late, _finish_late, _live_late])
def test_a_commit_that_comes_late_is_seen_once_at_the_next_look(
    postgres_url: str, life: Callable[[Engine], Iterator[None]]
) -> None:
    engine = create_engine(postgres_url)
    with JobStore(postgres_url) as store:
        for places in INTERLEAVED:
            looks, late, found = Looks(engine), life(engine), list[list[str]]()
            for step in range(5):
                if step in places:
                    next(late, None)
                else:
                    store.cancel(store.submit("train", "other"))
                found.append([name for name, _ in looks.seen()])
            assert found == [
                ["late"] if step == places[-1] else [] if step in places else ["other"] for step in range(5)
            ], places
    engine.dispose()


@pytest.fixture
def busy(sqlite_url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A database with so many jobs in the last five minutes that a look, whose slices have three, reads a part of them."""
    for name in ("_SLICE", "_MOST"):
        monkeypatch.setattr(_change_reader, name, 3)
    engine = create_engine(sqlite_url)
    with engine.begin() as connection:
        for number in range(60):
            add(connection, "before", clock.now - timedelta(seconds=5 * number))
    yield engine
    engine.dispose()


def test_what_is_late_is_seen_once_among_many_that_are_not(busy: Engine, clock: Clock) -> None:
    looks, found = Looks(busy), list[str]()
    for number in range(40):
        clock.now += timedelta(seconds=5)
        with busy.begin() as connection:
            for _ in range(4):
                add(connection, "new", clock.now)
            if number == 10:
                for minutes in (1, 2, 3, 4):
                    late = clock.now - minutes * MINUTE
                    add(connection, f"{minutes} late", late)
                    add(connection, f"{minutes} ended late", late - 60 * MINUTE, status="failed", finished_at=late)
        seen = [name for name, _ in looks.seen()]
        assert seen.count("new") == 4
        found += [name for name in seen if name != "new"]
    assert sorted(found) == sorted(f"{minutes} {what}" for minutes in (1, 2, 3, 4) for what in ("late", "ended late"))


@pytest.mark.parametrize("ended", [2 * MINUTE, 3 * MINUTE], ids=["after it was created", "before"])
def test_a_job_that_is_met_again_where_it_was_late_is_not_said_again(
    busy: Engine, clock: Clock, ended: timedelta
) -> None:
    with busy.begin() as connection:
        for number in range(60):
            moment = clock.now - timedelta(seconds=5 * number)
            add(connection, "before", moment, status="failed", finished_at=moment)
    looks, created_at = Looks(busy), clock.now - 2.5 * MINUTE
    with busy.begin() as connection:
        job_id = add(connection, "late", created_at, status="running", started_at=clock.now)
    assert looks.seen() == [("late", "running")]
    _set(busy, job_id, status="failed", finished_at=clock.now - ended)
    assert looks.seen() == [("late", "failed")]
    for _ in range(9):
        clock.now += timedelta(seconds=10)
        assert looks.look() == []


def test_a_look_that_pauses_says_each_change_once(busy: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_change_reader, "_CHANGES_AT_ONCE", 1)
    looks = Looks(busy)
    with busy.begin() as connection:
        ids = [add(connection, str(number), clock.now) for number in range(9)]
    assert looks.seen() == [(str(number), "queued") for number in range(9)]
    for job_id in ids:
        _set(busy, job_id, status="failed", finished_at=clock.now)
    assert looks.seen() == [(str(number), "failed") for number in range(9)]
    assert looks.look() == []


def test_what_is_a_little_late_or_by_a_clock_that_is_slow_is_seen_at_the_next_look(busy: Engine, clock: Clock) -> None:
    looks, written = Looks(busy), clock.now
    for _ in range(20):
        clock.now += timedelta(seconds=20)  # ahead of who submits, more and more
        written += timedelta(seconds=15)
        with busy.begin() as connection:
            add(connection, "slow", written)
        assert [name for name, _ in looks.seen()] == ["slow"]
    with busy.begin() as connection:
        add(connection, "fast", clock.now + 60 * MINUTE)
    assert [name for name, _ in looks.seen()] == ["fast"]
    for milliseconds in (900, 500):
        with busy.begin() as connection:
            add(connection, "late", clock.now - timedelta(milliseconds=milliseconds))
        assert [name for name, _ in looks.seen()] == ["late"]


ACTS = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 290)),
    st.tuples(st.just("add finished"), st.integers(0, 290)),
    st.tuples(st.sampled_from(["claim", "requeue", "progress"]), st.integers(0, 9)),
    st.tuples(st.just("finish"), st.integers(0, 9), st.integers(0, 290)),
    st.tuples(st.just("wait"), st.integers(0, 100)),
    st.tuples(st.just("look"), st.integers(0, 3)),
)


class World:
    """Some jobs as they are."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self.engine, self.clock = engine, clock
        self.jobs: list[Any] = []
        self.states: dict[Any, tuple[str, int, int]] = {}

    def act(self, act: tuple[Any, ...]) -> None:
        name, *numbers = act
        late = self.clock.now - timedelta(seconds=numbers[-1] if numbers else 0)
        with self.engine.begin() as connection:
            if name.startswith("add"):
                values = {"status": "failed", "finished_at": late} if name == "add finished" else {}
                job_id = add(connection, "x", late, **values)
                self.jobs.append(job_id)
                self.states[job_id] = (values.get("status", "queued"), 0, 0)
            elif name not in ("wait", "look") and self.jobs:
                self._change(connection, name, self.jobs[numbers[0] % len(self.jobs)], late)

    def _change(self, connection: Connection, name: str, job_id: Any, late: datetime) -> None:
        status, progress, attempts = self.states[job_id]
        if name == "claim" and status == "queued":
            after = ("running", progress, attempts + 1)
        elif name == "requeue" and status == "running":
            after = ("queued", progress, attempts)
        elif name == "progress" and status == "running":
            after = (status, (progress + 7) % 100, attempts)
        elif name == "finish" and status in ("queued", "running"):
            after = ("cancelled", progress, attempts)
        else:
            return
        self.states[job_id] = after
        values = dict(zip(("status", "progress", "attempts"), after, strict=True))
        ended = {"finished_at": late} if name == "finish" else {}
        connection.execute(update(TABLE).where(TABLE.c.id == job_id).values(**values, **ended))


class Listener:
    """A watch, and what it has said of each job since it began."""

    def __init__(self, world: World, looks: Looks) -> None:
        self._world, self._looks = world, looks
        self._first = dict(world.states)
        self._said: dict[Any, list[tuple[str, int, int]]] = {}

    @property
    def reader(self) -> ChangeReader:
        """What it takes changes from."""
        return self._looks.watch.reader

    def look(self, since: float | None = None) -> list[MlJob]:
        """Return what one look yields, and note it."""
        jobs = self._looks.look(since)
        for job in jobs:
            self._said.setdefault(job.id, []).append((str(job.status), job.progress, job.attempts))
        return jobs

    def check(self) -> None:
        """The last state of each job was said, and none twice in turn."""
        for job_id, state in self._world.states.items():
            said = [self._first.get(job_id), *self._said.get(job_id, [])]
            assert all(one != other for one, other in pairwise(said))
            assert said[-1] == state, (state, said)


def test_whatever_comes_in_whatever_order_the_last_state_is_said_and_none_twice(
    sqlite_url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"_SLICE": 2, "_MOST": 3, "_AT_ONCE": 2, "_CHANGES_AT_ONCE": 3, "_CHANGES_KEPT": 4, "_QUICK": 60.0}
    for name, value in small.items():
        monkeypatch.setattr(_change_reader, name, value)
    monkeypatch.setattr(_watching, "_AT_ONCE", 2)
    engine = create_engine(sqlite_url)

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(ACTS, max_size=8), st.lists(ACTS, max_size=20))
    def check(before: list[tuple[Any, ...]], acts: list[tuple[Any, ...]]) -> None:
        clock.now += timedelta(days=1)  # the jobs of the example before are out of sight
        world = World(engine, clock)
        for act in before:
            world.act(act)
        looks = Looks(engine)
        listeners = [Listener(world, looks)]
        for act in acts:
            world.act(act)
            clock.now += timedelta(seconds=act[1] if act[0] == "wait" else 1)
            if act == ("look", 3):
                listeners.append(Listener(world, Looks(engine, beside=looks)))
            elif act[0] in ("look", "claim"):
                listeners[act[1] % len(listeners)].look()
        for _ in range(2 * len(world.jobs) + 4):
            clock.now += timedelta(seconds=1)
            readers: set[ChangeReader] = set()
            for listener in listeners:  # the first of each reader looks, and the others take what it has found
                listener.look(0.0 if listener.reader in readers else None)
                readers.add(listener.reader)
        for listener in listeners:
            listener.look()
            listener.check()
            assert listener.look() == []

    check()
    engine.dispose()


# --------------------------------------------------------------------------------------------------- what is yielded


def test_a_job_that_leaves_the_filter_is_yielded_once_more_and_is_new_when_it_comes_back(url: str) -> None:
    engine = create_engine(url)
    with JobStore(url) as store:
        looks, running = Looks(engine, "status:queued"), Looks(engine, status="running")
        job = store.submit("train", "a")
        assert (looks.seen(), running.seen()) == ([("a", "queued")], [])
        claim = store.claim_one(job, worker="w")
        assert (looks.seen(), running.seen()) == ([("a", "running")], [("a", "running")])
        store.set_progress(claim, 5)
        assert (looks.seen(), running.seen()) == ([], [("a", "running")])
        store.requeue(claim)
        assert (looks.seen(), running.seen()) == ([("a", "queued")], [("a", "queued")])
        store.requeue(store.claim_one(job, worker="w"))  # begun and put back between two looks
        assert (looks.seen(), running.seen()) == ([("a", "queued")], [])
        store.complete(store.claim_one(job, worker="w"))
        assert (looks.seen(), running.seen()) == ([("a", "completed")], [])
        assert (looks.seen(), running.seen()) == ([], [])
    engine.dispose()


def test_jobs_are_yielded_in_the_order_in_which_they_changed_and_as_they_are_then(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_watching, "_AT_ONCE", 1)
    engine = create_engine(sqlite_url)
    with JobStore(sqlite_url) as store:
        ids = store.submit_many([("train", name, None) for name in ("a", "b", "c")], ids=True)
        looks, moment = Looks(engine), utc_now()
        for number, job_id in enumerate(reversed(ids)):
            _set(engine, job_id, status="cancelled", finished_at=moment + timedelta(seconds=number))
        assert [name for name, _ in looks.seen()] == ["c", "b", "a"]
        first, second = (store.submit("train", name) for name in ("d", "e"))
        steps, found, answer = looks.watch.look(time.monotonic()), list[tuple[str, str]](), None
        while len(found) < 2:
            step = steps.send(answer)
            answer = answered(step, looks.read) if isinstance(step, Read | Locked) else None
            if isinstance(step, MlJob):
                found.append((step.target_name, str(step.status)))
                store.cancel(second)
        assert found == [(first.target_name, "queued"), ("e", "cancelled")]
        assert list(steps) == looks.look() == []
    engine.dispose()


def test_who_takes_his_time_with_a_job_misses_none(sqlite_url: str, clock: Clock) -> None:
    engine = create_engine(sqlite_url)
    looks = Looks(engine)
    with engine.begin() as connection:
        ended = {"status": "failed", "finished_at": clock.now + 2 * MINUTE}
        add(connection, "meanwhile", clock.now + MINUTE, **ended)
    clock.now += 60 * MINUTE
    assert looks.seen() == [("meanwhile", "failed")]
    engine.dispose()


@pytest.mark.parametrize("minutes", [-4, 4, 60])
def test_the_clock_of_who_submits_may_differ(sqlite_url: str, clock: Clock, minutes: int) -> None:
    engine = create_engine(sqlite_url)
    looks = Looks(engine)
    with engine.begin() as connection:
        add(connection, "a", clock.now + minutes * MINUTE)
    assert looks.seen() == [("a", "queued")]
    clock.now += timedelta(seconds=10)
    with engine.begin() as connection:
        add(connection, "b", clock.now)
    assert looks.seen() == [("b", "queued")]
    for moved in (5.5 * MINUTE, timedelta(0), -2 * MINUTE, timedelta(0)):  # it is set back
        clock.now += moved
        assert looks.seen() == []
    engine.dispose()


def test_an_import_of_what_finished_long_ago_is_not_yielded(
    sqlite_url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = create_engine(sqlite_url)
    looks, hour = Looks(engine), clock.now - 60 * MINUTE
    with engine.begin() as connection:
        add(connection, "old", hour, status="failed", finished_at=hour)
        add(connection, "ended before it was created", clock.now, status="failed", finished_at=hour)
        add(connection, "old and running", hour, status="running", started_at=hour)
    assert looks.seen() == [("old and running", "running"), ("ended before it was created", "failed")]
    assert looks.seen() == []
    monkeypatch.setattr(_change_reader, "_QUEUED_KEPT", 1)
    monkeypatch.setattr(_watching, "_FINISHED_KEPT", 2)
    with engine.begin() as connection:
        for _ in range(9):
            add(connection, "x", clock.now, status="failed", finished_at=hour)
    assert len(looks.look()) == 9
    assert len(looks.watch._yielded) == 3  # the one that runs, and two that have finished
    engine.dispose()


# ----------------------------------------------------------------------------------------------------- what it costs


@contextmanager
def sent(engine: Engine) -> Iterator[list[tuple[str, Any]]]:
    """Yield the statements that an engine sends in the block, with their parameters."""
    statements: list[tuple[str, Any]] = []

    def note(_1: Any, _2: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    yield statements
    event.remove(engine, "before_cursor_execute", note)


def test_no_look_reads_the_table_or_whole_records_of_what_did_not_change(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_change_reader, "_SLICE", 10)
    engine = create_engine(url)
    with JobStore(url) as store, engine.begin() as connection:
        long_ago = utc_now() - 6000 * MINUTE
        old = [
            {"created_at": long_ago + number * MINUTE, "finished_at": long_ago + number * MINUTE, "status": "failed"}
            for number in range(1500)
        ]
        store.submit_many([MlJob(kind="train", target_name="x", **values) for values in old])
        store.submit_many([("train", "x", None)] * 30)
        claims = store.claim(worker="w", limit=10)
        connection.exec_driver_sql("ANALYZE")
    with sent(engine) as statements, JobStore(url) as store:
        for looks in (Looks(engine), Looks(engine, "kind:train target:x status:running,completed")):
            jobs_before = len(statements)
            store.submit("train", "x")
            store.complete(claims.pop())
            assert looks.look()
            assert looks.look() == []
            whole = [text for text, _ in statements[jobs_before:] if "spec_json" in text]
            assert len(whole) == 1
            assert re.search(r"\.id IN \(", whole[0])
    with engine.connect() as connection:
        explain = "EXPLAIN QUERY PLAN "
        if engine.dialect.name == "postgresql":  # so small a table is sooner read whole than by twenty ids
            explain = "EXPLAIN "
            connection.exec_driver_sql("SET enable_seqscan = off")
        assert len(statements) > 12
        for statement, parameters in statements:
            plan = [str(row[-1]) for row in connection.exec_driver_sql(explain + statement, parameters)]
            assert not [line for line in plan if re.search(r"Seq Scan on ml_jobs|SCAN ml_jobs$", line)], plan
    engine.dispose()


def test_what_a_watch_remembers_is_bounded(sqlite_url: str, clock: Clock) -> None:
    engine = create_engine(sqlite_url)
    looks, most = Looks(engine), 0
    for _ in range(40):
        clock.now += MINUTE
        with engine.begin() as connection:
            for number in range(5):
                ended = {"status": "failed", "finished_at": clock.now} if number else {}
                add(connection, "x", clock.now, **ended)
        assert len(looks.look()) == 5
        most = max(most, looks.remembered)
        assert len(looks.watch._yielded) <= 8
    assert most <= 5 * 8 + 8  # the jobs of seven minutes; of those that are queued the state too
    clock.now += 20 * MINUTE
    looks.look()
    looks.look()
    assert looks.remembered == len(looks.watch._yielded) == 0
    engine.dispose()


def test_of_many_queued_jobs_the_latest_are_remembered(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_change_reader, "_QUEUED_KEPT", 3)
    engine = create_engine(sqlite_url)
    with JobStore(sqlite_url) as store:
        looks = Looks(engine)
        ids = store.submit_many([("train", str(number), None) for number in range(9)], ids=True)
        assert len(looks.look()) == 9
        assert len(looks.watch._yielded) == len(looks.watch.reader._active) == 3
        store.claim_one(ids[0], worker="w")
        store.cancel(ids[1])
        assert looks.seen() == [("0", "running"), ("1", "cancelled")]
        with engine.begin() as connection:
            connection.execute(delete(TABLE).where(TABLE.c.status == "queued"))
        assert looks.look() == []
        assert len(looks.watch._yielded) == len(looks.watch.reader._active) == 1  # the one that runs
        with engine.begin() as connection:
            connection.execute(delete(MlJob.__leases__))
            connection.execute(delete(TABLE).where(TABLE.c.status == "running"))
        assert looks.look() == []
        assert len(looks.watch._yielded) == len(looks.watch.reader._active) == 0
    engine.dispose()


def test_jobs_begun_by_hand_are_looked_for_less_often_where_that_takes_long(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = create_engine(sqlite_url)
    with JobStore(sqlite_url) as store, engine.begin() as connection:
        by_hand, leased = (add(connection, name, utc_now() - 60 * MINUTE) for name in ("by hand", "leased"))
        connection.commit()
        looks = Looks(engine)
        monkeypatch.setattr(_change_reader, "_QUICK", -1.0)
        monkeypatch.setattr(_change_reader, "_REST", 1e9)
        assert looks.look() == []
        _set(engine, by_hand, status="running")
        claim = store.claim_one(leased, worker="w")
        assert looks.seen() == [("leased", "running")]
        looks.watch.reader._by_hand_after = 0.0
        assert looks.seen() == [("by hand", "running")]
        store.set_progress(claim, 5)
        _set(engine, by_hand, progress=7)
        assert sorted(looks.seen()) == [("by hand", "running"), ("leased", "running")]
    engine.dispose()


# ------------------------------------------------------------------------------------------------- one reader for all


def test_one_look_serves_all_watches_and_each_asks_for_its_own_filter(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    with JobStore(sqlite_url) as store, sent(engine) as statements:
        first = Looks(engine)
        begun = time.monotonic()
        others = [Looks(engine, text, beside=first) for text in ("", "kind:backfill", "status:queued")]
        job = store.submit("train", "a")
        assert first.seen() == [("a", "queued")]
        statements.clear()
        assert [[job.target_name for job in looks.look(begun)] for looks in others] == [["a"], [], ["a"]]
        asked, whole = ([text for text, _ in statements if ("spec_json" in text) is whole] for whole in (False, True))
        assert (len(asked), len(whole)) == (2, 2)
        assert not [text for text in asked if "finished_at" in text]  # the reader read nothing
        claim = store.claim_one(job, worker="w")
        assert [others[2].seen(), others[1].seen(), first.seen()] == [[("a", "running")], [], [("a", "running")]]
        statements.clear()
        store.set_progress(claim, 5)
        assert first.seen() == [("a", "running")]
        statements.clear()
        assert first.look(begun) == []
        assert statements == []
    engine.dispose()


def test_what_passes_by_a_change_of_something_else_is_yielded_while_it_is_active(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    with JobStore(sqlite_url) as store:
        job_id = store.submit("train", "a").id
        looks = Looks(engine, where=TABLE.c.priority > 3)
        for priority, seen in ((5, [("a", "queued")]), (0, []), (4, [("a", "queued")]), (6, [])):
            _set(engine, job_id, priority=priority)
            assert looks.seen() == seen
    engine.dispose()


def test_what_was_there_before_a_watch_began_is_not_new_to_it_however_late_another_meets_it(
    busy: Engine, clock: Clock
) -> None:
    first, found = Looks(busy), list[str]()
    with busy.begin() as connection:
        add(connection, "late", clock.now - 2 * MINUTE)
    assert first.look() == []
    second = Looks(busy, beside=first)
    with busy.begin() as connection:
        add(connection, "later", clock.now - 2 * MINUTE)
    for _ in range(12):
        clock.now += timedelta(seconds=10)
        found += [name for name, _ in second.seen()]
    assert found == ["later"]
    assert sorted(job.target_name for job in first.look(0.0)) == ["late", "later"]


def test_a_watch_that_is_far_behind_holds_up_nobody_and_loses_nothing(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_change_reader, "_CHANGES_KEPT", 5)
    engine = create_engine(sqlite_url)
    with JobStore(sqlite_url) as store:
        first = Looks(engine)
        slow, slower = (Looks(engine, beside=first) for _ in range(2))
        for number in range(12):
            store.submit("train", str(number))
            assert first.seen() == [(str(number), "queued")]
            assert len(first.watch.reader._changes) <= 5
        assert set(first.watch.reader._takers) == {first.watch}
        assert slow.watch.reader is not slower.watch.reader
        last, before, *_ = store.find().jobs
        store.claim_one(before, worker="w")
        store.cancel(last)
        assert first.seen() == [("10", "running"), ("11", "cancelled")]
        expected = [*((str(number), "queued") for number in range(10)), ("10", "running"), ("11", "cancelled")]
        assert sorted(slow.seen()) == sorted(slower.seen()) == sorted(expected)
        assert slow.look() == slower.look() == []
    engine.dispose()


def test_a_look_that_fails_loses_nothing_that_others_wait_for(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = create_engine(sqlite_url)
    with JobStore(sqlite_url) as store:
        ids = store.submit_many([("train", name, None) for name in "abcd"], ids=True)
        first = Looks(engine)
        second = Looks(engine, beside=first)
        for number, job_id in enumerate(ids[:3]):
            store.cancel(job_id)
            store.claim_one(store.submit("train", f"new {number}"), worker="w")
            reads = iter(range(number))  # the first read fails, then the second, then the third

            def failing(step: Read, reads: Iterator[int] = reads) -> Any:
                if next(reads, None) is None:
                    raise ConnectionError
                return Looks.read(first, step)

            with pytest.raises(ConnectionError):
                yielded_by(first.watch.look(time.monotonic()), failing)
            assert sorted(second.seen()) == [("abc"[number], "cancelled"), (f"new {number}", "running")]
            assert second.look() == []
    engine.dispose()


def test_a_job_that_a_failed_look_met_is_remembered_as_queued(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    with JobStore(sqlite_url) as store:
        first = Looks(engine)
        queued = Looks(engine, "status:queued", beside=first)
        job = store.submit("train", "spam")
        reads = iter(range(1))  # the read of what runs and is new; the next one, of the queued ones, fails

        def failing(step: Read) -> Any:
            if next(reads, None) is None:
                raise ConnectionError
            return first.read(step)

        with pytest.raises(ConnectionError):
            yielded_by(first.watch.look(time.monotonic()), failing)
        assert queued.seen() == [("spam", "queued")]
        store.claim_one(job, worker="w")
        assert queued.seen() == [("spam", "running")]  # it passes no more
    engine.dispose()


def test_closing_the_store_ends_a_watch_that_has_not_begun(sqlite_url: str) -> None:
    store = JobStore(sqlite_url)
    before = store.watch(poll=0.01)
    store.close()
    assert list(before) == []
    assert list(store.watch(poll=0.01, timeout=0)) == []  # a store may be used again
    store.close()

    async def run() -> None:
        async with AsyncJobStore(sqlite_url) as awaited:
            before = awaited.watch(poll=0.01)
            await awaited.close()
            assert [job async for job in before] == []

    asyncio.run(run())


def test_the_reader_is_made_for_the_first_watch_of_a_store_and_gone_with_the_last(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        shared = store._reader
        kept = weakref.ref(shared.get())
        assert kept() is None
        seen: list[list[str]] = []

        def watch() -> None:
            names = []
            for job in store.watch(poll=0.001):
                names.append(job.target_name)
                if job.target_name == "last":
                    break
            seen.append(names)

        with ThreadPoolExecutor() as pool:
            watching = [pool.submit(watch) for _ in range(3)]
            until(lambda: (reader := shared.get()) is shared.get() and len(reader._takers) == 3)
            for name in ("first", "last"):
                store.submit("train", name)
            for one in watching:
                one.result(60)
        assert seen == [["first", "last"]] * 3
        gc.collect()  # an exception that a thread raised may hold its frame
        made = shared._made
        assert made is not None
        assert made() is None


def test_tasks_share_one_reader_too_and_a_cancelled_one_holds_up_no_other(sqlite_url: str) -> None:
    async def names(store: AsyncJobStore) -> list[str]:
        found = []
        async with aclosing(store.watch(poll=0.001)) as watch:
            async for job in watch:
                found.append(job.target_name)
                if job.target_name == "last":
                    break
        return found

    async def check() -> None:
        async with AsyncJobStore(sqlite_url) as store:
            watching = [asyncio.create_task(names(store)) for _ in range(3)]
            reader = store._reader.get()
            while len(reader._takers) < 3:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0)
            async with reader.lock:  # the others wait for it while one is cancelled
                await store.submit("train", "first")
                while len(reader.lock.lock._waiters or ()) < 3:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                watching.pop().cancel()
            await store.submit("train", "last")
            assert await asyncio.wait_for(asyncio.gather(*watching), 60) == [["first", "last"]] * 2

    asyncio.run(check())
