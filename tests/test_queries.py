"""Every question of docs/queries.md has one answer: by SQL, by SQLAlchemy, and worked out in plain Python."""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, create_engine, func, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import InvalidValueError, MlJob, metadata
from mljobs._values import EPOCH, to_millis
from mljobs.record._sql import time_bucket
from tests.cases import case
from tests.sample_history import TARGETS, Job, Lease, fill, fixed

PAGE = Path(__file__).parent.parent / "docs" / "queries.md"
JOBS = 12_000, 100
"""How many jobs, and how many of them have not finished: on a day fewer than have."""
TIMES = 5
"""PostgreSQL plans as if it held so many times as many: of 25,000 jobs it reads all for one question."""
SAMPLE_ID = "01a20de7-e815-7721-b9be-b3e65909217e"


@dataclass
class Question:
    """A section of the page."""

    number: int
    title: str
    sql: str
    python: str
    indexes: list[str] = field(default_factory=list)


def questions() -> list[Question]:
    found = []
    for part in re.split(r"^## (?=\d+\. )", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        number, title = part.partition("\n")[0].split(". ", 1)
        (sql,) = re.findall(r"```sql\n(.*?)```", part, re.DOTALL)[:1]
        (python,) = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
        index = re.search(r"^Index: (.*)$", part, re.MULTILINE)
        assert index or "\nReads everything: " in part, title
        found.append(Question(int(number), title, sql, python, re.findall(r"`(\w+)`", index[1]) if index else []))
    return found


QUESTIONS = questions()


@dataclass
class Place:
    """A database with a history, and what it holds."""

    engine: Engine
    jobs: list[Job]
    leases: list[Lease]
    now: datetime
    retried: UUID
    names: dict[str, Any]

    def statement(self, question: Question) -> Any:
        exec(question.python.replace(SAMPLE_ID, str(self.retried)), self.names)
        return self.names["statement"]

    def sql(self, question: Question) -> Any:
        asked = question.sql.replace("now()", fixed(self.now)).replace(SAMPLE_ID, str(self.retried))
        return text(re.sub(r":(?=:)|(?<=:):", r"\\:", asked))


def _place(engine: Engine) -> Place:
    metadata.create_all(engine)
    jobs, leases, now = fill(engine, *JOBS)
    setup = re.search(r"share these names:\n\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert setup is not None
    names: dict[str, Any] = {"moment": now}
    exec(setup[1].replace("datetime.now(UTC)", "moment"), names)
    # One that is a retry, and was retried in its turn.
    of = {job.retry_of for job in jobs}
    retried = next(job.id for job in jobs if job.retry_of is not None and job.id in of)
    return Place(engine, jobs, leases, now, retried, names)


@pytest.fixture(scope="module")
def postgres(postgres_admin: Engine) -> Iterator[Place]:
    with postgres_admin.connect() as connection:
        connection.execute(text("DROP DATABASE IF EXISTS mljobs_queries"))
        connection.execute(text("CREATE DATABASE mljobs_queries"))
    yield _place(create_engine(postgres_admin.url.set(database="mljobs_queries"), poolclass=NullPool))
    with postgres_admin.connect() as connection:
        connection.execute(text("DROP DATABASE mljobs_queries WITH (FORCE)"))


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return _place(create_engine(f"sqlite:///{tmp_path_factory.mktemp('queries') / 'jobs.db'}", poolclass=NullPool))


# ------------------------------------------------------------------------------------------------- answers in Python

Rows = list[tuple[Any, ...]]
ANSWERS: dict[int, Callable[[Place], Rows]] = {}


def answers(number: int) -> Callable[[Callable[[Place], Rows]], Callable[[Place], Rows]]:
    def keep(function: Callable[[Place], Rows]) -> Callable[[Place], Rows]:
        ANSWERS[number] = function
        return function

    return keep


def _by_start(jobs: Iterable[Job]) -> list[Job]:
    return sorted(jobs, key=lambda job: (job.started_at or EPOCH, job.id))


def _running(place: Place) -> list[Job]:
    return _by_start(job for job in place.jobs if job.status == "running")


def _queued(place: Place) -> list[Job]:
    return [job for job in place.jobs if job.status == "queued"]


def _due(place: Place, job: Job) -> bool:
    return job.run_after is None or job.run_after <= place.now


def _since(place: Place, **ago: float) -> datetime:
    return place.now - timedelta(**ago)


def _ended_since(place: Place, **ago: float) -> list[Job]:
    return [job for job in place.jobs if job.finished_at is not None and job.finished_at >= _since(place, **ago)]


def _percentile(values: list[int], share: float) -> int:
    return sorted(values)[math.ceil(len(values) * share - 1e-9) - 1]


def _number(job: Job, key: str) -> float | None:
    value = job.metrics.get(key) if isinstance(job.metrics, dict) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _scored(place: Place, kind: str, target: str | None = None) -> list[tuple[Job, float]]:
    found = []
    for job in place.jobs:
        if job.kind == kind and job.status == "completed" and target in (None, job.target_name):
            score = _number(job, "f1")
            if score is not None:
                found.append((job, score))
    return found


@answers(1)
def _(place: Place) -> Rows:
    held = {lease.job_id: lease for lease in place.leases}
    return [
        (job.id, job.kind, job.target_name, job.progress, job.started_at)
        + ((held[job.id].worker, held[job.id].expires_at) if job.id in held else (None, None))
        for job in _running(place)
    ]


@answers(2)
def _(place: Place) -> Rows:
    jobs = {job.id: job for job in _running(place)}
    stuck = [lease for lease in place.leases if lease.expires_at < place.now and lease.job_id in jobs]
    return [
        (lease.job_id, jobs[lease.job_id].target_name, jobs[lease.job_id].attempts, lease.worker, lease.expires_at)
        for lease in sorted(stuck, key=lambda lease: (lease.expires_at, lease.job_id))
    ]


@answers(3)
def _(place: Place) -> Rows:
    rows = []
    for job in _running(place):
        if job.progress and job.started_at:
            elapsed = (place.now - job.started_at).total_seconds()
            rows.append(
                (job.id, job.target_name, job.progress, math.floor(elapsed * (100 - job.progress) / job.progress + 0.5))
            )
    return sorted(rows, key=lambda row: (row[3], row[0]))


@answers(4)
def _(place: Place) -> Rows:
    last: dict[str, list[int]] = defaultdict(list)
    for job in reversed(place.jobs):
        if job.status == "completed" and len(last[job.target_name]) < 20 and job.duration is not None:
            last[job.target_name].append(job.duration)
    rows: Rows = []
    for job in _running(place):
        usual = sum(last[job.target_name]) / len(last[job.target_name]) / 1000
        if job.started_at and (place.now - job.started_at).total_seconds() > 2 * usual:
            rows.append((job.id, job.target_name, job.started_at, usual))
    return rows


@answers(5)
def _(place: Place) -> Rows:
    due = [job for job in _queued(place) if _due(place, job)]
    return [
        (kind, sum(job.kind == kind for job in due), min(job.created_at for job in due if job.kind == kind))
        for kind in sorted({job.kind for job in due})
    ]


@answers(6)
def _(place: Place) -> Rows:
    locked = {lease.target_lock for lease in place.leases}
    free = [job for job in _queued(place) if _due(place, job) and not (job.exclusive and job.target_name in locked)]
    free.sort(key=lambda job: (-job.priority, job.created_at, job.id))
    return [(job.id, job.kind, job.target_name, job.priority, job.created_at) for job in free[:10]]


@answers(7)
def _(place: Place) -> Rows:
    locks = {lease.target_lock: lease.worker for lease in place.leases if lease.target_lock}
    rows: Rows = []
    for job in sorted(_queued(place), key=lambda job: (job.created_at, job.id)):
        worker = locks.get(job.target_name) if job.exclusive else None
        if worker or not _due(place, job):
            rows.append((job.id, job.target_name, job.run_after, worker))
    return rows


@answers(8)
def _(place: Place) -> Rows:
    number = Counter((job.target_name, job.kind) for job in place.jobs if job.status in ("queued", "running"))
    rows = [(*pair, jobs) for pair, jobs in number.items() if jobs > 1]
    return sorted(rows, key=lambda row: (-row[2], row[0], row[1]))


@answers(9)
def _(place: Place) -> Rows:
    number = Counter((job.kind, job.status) for job in place.jobs if job.created_at >= _since(place, days=1))
    return sorted((*pair, jobs) for pair, jobs in number.items())


@answers(10)
def _(place: Place) -> Rows:
    number: dict[datetime, list[int]] = defaultdict(lambda: [0, 0])
    for job in _ended_since(place, days=1):
        assert job.finished_at is not None
        hour = number[job.finished_at.replace(minute=0, second=0, microsecond=0)]
        hour[0] += job.status == "completed"
        hour[1] += job.status == "failed"
    return [(hour, *two) for hour, two in sorted(number.items())]


@answers(11)
def _(place: Place) -> Rows:
    took: dict[tuple[str, datetime], list[int]] = defaultdict(list)
    for job in _ended_since(place, days=7):
        if job.status == "completed" and job.finished_at and job.duration is not None:
            midnight = job.finished_at.replace(hour=0, minute=0, second=0, microsecond=0)
            took[job.target_name, midnight].append(job.duration)
    return [
        (*pair, len(spans), _percentile(spans, 0.5), _percentile(spans, 0.95)) for pair, spans in sorted(took.items())
    ]


@answers(12)
def _(place: Place) -> Rows:
    waits: dict[str, list[int]] = defaultdict(list)
    for job in place.jobs:
        if job.created_at >= _since(place, days=1) and job.started_at and not job.run_after and job.attempts == 1:
            waits[job.kind].append((job.started_at - job.created_at) // timedelta(milliseconds=1))
    return [(kind, _percentile(ms, 0.5), _percentile(ms, 0.95)) for kind, ms in sorted(waits.items())]


@answers(13)
def _(place: Place) -> Rows:
    number: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for job in _ended_since(place, days=7):
        number[job.target_name][0] += 1
        number[job.target_name][1] += job.status == "failed"
    rows = [(target, jobs, failed, 100 * failed / jobs) for target, (jobs, failed) in number.items()]
    return sorted(rows, key=lambda row: (-row[3], row[0]))[:10]


@answers(14)
def _(place: Place) -> Rows:
    found: dict[str, list[datetime]] = defaultdict(list)
    for job in place.jobs:
        if job.status == "failed" and job.created_at >= _since(place, days=7):
            found[(job.error_message or "").partition("\n")[0]].append(job.created_at)
    rows = [(reason, len(times), max(times)) for reason, times in found.items()]
    return sorted(rows, key=lambda row: (row[1], row[2]), reverse=True)[:10]


@answers(15)
def _(place: Place) -> Rows:
    failed = [job for job in reversed(place.jobs) if job.status == "failed"]
    failed.sort(key=lambda job: (job.created_at, job.id), reverse=True)
    return [(job.id, job.target_name, job.finished_at, job.error_message, job.spec_json) for job in failed[:10]]


@answers(16)
def _(place: Place) -> Rows:
    best = sorted(_scored(place, "train", "spam-3"), key=lambda pair: (-pair[1], pair[0].id))[:10]
    return [(job.id, score, job.spec["algorithm"], job.spec["lr"]) for job, score in best]


@answers(17)
def _(place: Place) -> Rows:
    runs = [pair for pair in _scored(place, "train", "spam-3") if pair[0].created_at >= _since(place, days=7)]
    runs.sort(key=lambda pair: (pair[0].finished_at or EPOCH, pair[0].id))
    scores = [score for _, score in runs]
    changes = [None, *(after - before for before, after in pairwise(scores))]
    return [(job.finished_at, score, change) for (job, score), change in zip(runs, changes, strict=True)]


@answers(18)
def _(place: Place) -> Rows:
    best: dict[str, tuple[float, Job]] = {}
    for job, score in _scored(place, "train"):
        have = best.get(job.target_name)
        if have is None or (-score, job.id) < (-have[0], have[1].id):
            best[job.target_name] = (score, job)
    return [(target, job.id, score) for target, (score, job) in sorted(best.items())]


@answers(19)
def _(place: Place) -> Rows:
    jobs = {job.id: job for job in place.jobs}
    retries: dict[UUID | None, list[UUID]] = defaultdict(list)
    for job in place.jobs:
        retries[job.retry_of].append(job.id)
    line, waiting = set(), [place.retried]
    while waiting:
        job = jobs[waiting.pop()]
        if job.id not in line:
            line.add(job.id)
            waiting += retries[job.id] + ([job.retry_of] if job.retry_of else [])
    family = sorted((jobs[job_id] for job_id in line), key=lambda job: (job.created_at, job.id))
    return [(job.id, job.retry_of, job.status, job.created_at, job.error_message) for job in family]


@answers(20)
def _(place: Place) -> Rows:
    old = [job for job in place.jobs if job.finished_at and job.finished_at < _since(place, days=85)]
    return [
        (
            kind,
            sum(job.kind == kind for job in old),
            min(job.finished_at for job in old if job.kind == kind and job.finished_at),
        )
        for kind in sorted({job.kind for job in old})
    ]


# ------------------------------------------------------------------------------------------------------ the comparison


def _comparable(value: Any) -> Any:
    """Return a value as both databases and Python would tell it."""
    if isinstance(value, datetime):
        return to_millis(value)
    if isinstance(value, timedelta):
        return value // timedelta(milliseconds=1)
    if isinstance(value, float | Decimal):
        return round(float(value), 6)
    if isinstance(value, UUID):
        return value.hex
    if isinstance(value, dict):  # what psycopg reads from a json column
        return json.dumps(value)
    return str(value) if isinstance(value, str) else value


def _comparable_rows(rows: Iterable[Iterable[Any]]) -> Rows:
    return [tuple(_comparable(value) for value in row) for row in rows]


def test_there_are_twenty_questions_each_with_an_answer_worked_out_here() -> None:
    assert [question.number for question in QUESTIONS] == list(range(1, 21)) == sorted(ANSWERS)


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_every_question_has_one_answer_however_it_is_asked(database: str, request: pytest.FixtureRequest) -> None:
    place: Place = request.getfixturevalue(database)
    for question in QUESTIONS:
        wanted = _comparable_rows(ANSWERS[question.number](place))
        assert wanted, question.title
        with Session(place.engine) as session:
            by_sqlalchemy = _comparable_rows(session.execute(place.statement(question)))
            assert by_sqlalchemy == wanted, question.title
            if database == "postgres":
                assert _comparable_rows(session.execute(place.sql(question))) == wanted, question.title


def scans(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the nodes of a PostgreSQL plan that read a table or an index."""
    if "Relation Name" in plan or "Index Name" in plan:
        yield plan
    for part in plan.get("Plans", ()):
        yield from scans(part)


def test_no_question_reads_the_whole_table_where_an_index_should_serve(postgres: Place) -> None:
    more = f"""
        UPDATE pg_class SET reltuples = {TIMES} * reltuples WHERE oid = 'ml_jobs'::regclass
            OR oid IN (SELECT indexrelid FROM pg_index WHERE indrelid = 'ml_jobs'::regclass)
    """
    with postgres.engine.connect() as connection:
        connection.exec_driver_sql(more)  # until this connection's transaction is rolled back
        for question in QUESTIONS:
            compiled = postgres.statement(question).compile(connection, compile_kwargs={"literal_binds": True})
            for asked in (str(postgres.sql(question)).replace("\\:", ":"), str(compiled).replace("%%", "%")):
                plan = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {asked}").scalar()[0]["Plan"]
                found = list(scans(plan))
                if question.indexes:
                    whole = [
                        node for node in found if node["Node Type"] == "Seq Scan" and node["Relation Name"] == "ml_jobs"
                    ]
                    assert not whole, (question.title, plan)
                    used = {node["Index Name"] for node in found if "Index Name" in node}
                    assert used & set(question.indexes), (question.title, used)


def test_sqlite_reads_no_more_than_an_index_either(sqlite: Place) -> None:
    with sqlite.engine.connect() as connection:
        for question in QUESTIONS:
            compiled = sqlite.statement(question).compile(connection, compile_kwargs={"literal_binds": True})
            lines = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}")]
            if question.indexes:
                whole = [line for line in lines if re.fullmatch(r"SCAN (ml_jobs|ml_jobs_\d|j)( AS \w+)?", line)]
                assert not whole, (question.title, lines)


# ------------------------------------------------------------------------------------------- what the questions use


def test_a_metric_is_a_number_or_none_on_an_instance_and_in_a_query(engine: Engine) -> None:
    with Session(engine) as session:
        for text_of_metrics, number in (
            ('{"f1":0.5}', 0.5),
            ('{"f1":1}', 1.0),
            ('{"f1":-1e3}', -1000.0),
            ('{"f1":"0.5"}', None),
            ('{"f1":true}', None),
            ('{"f1":null}', None),
            ('{"f1":[1]}', None),
            ('{"f1":1,"f1":2}', 2.0),
            ('{"f2":1}', None),
            ("[1]", None),
            ("7", None),
            ("null", None),
            (None, None),
        ):
            with case(text_of_metrics):
                job = MlJob(kind="train", target_name="spam", metrics_json=text_of_metrics)
                session.add(job)
                session.commit()
                assert job.metric("f1") == number
                assert session.query(MlJob.metric("f1")).filter(MlJob.id == job.id).scalar() == number


def test_a_metric_may_have_any_key(engine: Engine) -> None:
    for key in ('a"b', "a.b", "$", "0", "é", "a'b", "a%b", "a:b", "[0]", ""):
        with Session(engine) as session:
            job = MlJob(kind="train", target_name="spam", metrics={key: 4})
            session.add(job)
            session.flush()
            assert session.query(MlJob.metric(key)).filter(MlJob.id == job.id).scalar() == 4.0, key
            assert job.metric(key) == 4.0


def test_the_first_line_of_an_error_is_the_same_on_an_instance_and_in_a_query(engine: Engine) -> None:
    for message in ("one\ntwo\nthree", "one", "", "\ntwo", None):
        with Session(engine) as session:
            job = MlJob(kind="train", target_name="spam", error_message=message)
            session.add(job)
            session.flush()
            assert session.query(MlJob.error_line).filter(MlJob.id == job.id).scalar() == job.error_line
            assert job.error_line == (None if message is None else message.split("\n")[0])


def test_a_bucket_holds_the_time_and_begins_where_it_should(engine: Engine) -> None:
    widths = (timedelta(hours=1), timedelta(days=1), timedelta(days=1, seconds=1))
    moments = (EPOCH, datetime(2026, 2, 28, 23, 59, 59, 999_000, tzinfo=UTC))
    for width, moment in [(each, moment) for each in widths for moment in (*moments, EPOCH + each)]:
        with case(width, moment), Session(engine) as session:
            job = MlJob(kind="train", target_name="spam", created_at=moment)
            session.add(job)
            session.flush()
            begin = session.query(time_bucket(MlJob.created_at, width)).filter(MlJob.id == job.id).scalar()
            assert begin <= moment < begin + width
            assert (begin - EPOCH) % width == timedelta(0)


def test_times_differ_by_a_timedelta_and_move_by_one(engine: Engine) -> None:
    start = datetime(2026, 2, 28, 23, 59, 59, 999_000, tzinfo=UTC)
    span = timedelta(days=1, milliseconds=1)
    with Session(engine) as session:
        values = {"created_at": start, "started_at": start, "finished_at": start + span, "status": "completed"}
        session.add(MlJob(kind="train", target_name="spam", **values))
        session.flush()
        took = MlJob.finished_at - MlJob.started_at
        assert session.query(took).scalar() == span
        assert session.query(func.max(took)).scalar() == span
        assert session.query(MlJob.started_at - MlJob.run_after).scalar() is None
        assert session.query(MlJob.created_at + span).scalar() == start + span
        assert session.query(MlJob.finished_at - span).scalar() == start
        assert session.query(start - MlJob.finished_at).scalar() == -span
        assert session.query(MlJob).filter(took >= span, took < span + timedelta(milliseconds=1)).count() == 1
        assert session.query(MlJob).filter(MlJob.created_at + timedelta(hours=25) > MlJob.finished_at).count() == 1


@pytest.mark.parametrize("width", [timedelta(0), timedelta(seconds=-5), timedelta(milliseconds=1500), 60])
def test_a_bucket_of_no_sensible_width_is_refused(width: Any) -> None:
    with pytest.raises(InvalidValueError, match="width"):
        time_bucket(MlJob.created_at, width)


def test_a_token_is_text_of_the_statement_and_checked(engine: Engine) -> None:
    with Session(engine) as session:
        session.add_all([MlJob(kind="train", target_name=target) for _, target in TARGETS[:3]])
        session.commit()
        query = session.query(MlJob).filter(
            MlJob.status == "queued", MlJob.kind.in_({"train"}), MlJob.kind != "backfill"
        )
        assert query.count() == 3
        assert session.query(MlJob).filter(MlJob.status.in_([])).count() == 0
        assert session.query(MlJob).filter(MlJob.status.not_in(("queued",))).count() == 0
        assert (
            session.query(MlJob).filter_by(status="queued").update({"priority": 5}, synchronize_session="evaluate") == 3
        )
    with pytest.raises(InvalidValueError, match=r"cannot be 'done': expected one of queued, running"):
        MlJob.status == "done"  # noqa: B015
    with pytest.raises(InvalidValueError, match="expected one of queued, running"):
        MlJob.status.in_(["done"])


def test_sqlites_partial_index_serves_a_plain_comparison(sqlite: Place) -> None:
    seen: list[str] = []
    with Session(sqlite.engine) as session:
        driver: Any = session.connection().connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        driver.set_trace_callback(seen.append)
        session.query(MlJob).filter(MlJob.status == "failed").order_by(MlJob.created_at.desc()).limit(1).all()
        driver.set_trace_callback(None)
        plan = session.execute(text("EXPLAIN QUERY PLAN " + seen[-1].replace(":", "\\:"))).all()
    assert "ix_ml_jobs_failed" in str(plan)
