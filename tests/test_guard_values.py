"""The database refuses what no client could read, whoever writes it; what is written through mljobs says why."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, create_engine, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session
from sqlalchemy.pool import NullPool

from mljobs import InvalidValueError, JobStore, MlJob, MlJobMixin
from mljobs.db._texts import _warn
from tests.backends import Backend
from tests.cases import case

_numbers = count(1)
NUL = r"\u0000"


def _insert(engine: Engine, **values: str) -> None:
    row = {
        "id": f"'{next(_numbers):032x}'",
        "kind": "'train'",
        "target_name": "'t'",
        "status": "'queued'",
        "progress": "0",
        "created_at": "now()" if engine.dialect.name == "postgresql" else "0",
        "spec_json": "'{}'",
        **values,
    }
    with engine.begin() as connection:
        names = ", ".join(f'"{name}"' for name in row)
        connection.exec_driver_sql(f"INSERT INTO ml_jobs ({names}) VALUES ({', '.join(row.values())})")


TIMES = ("created_at", "started_at", "finished_at", "run_after")
IN_POSTGRESQL = ["'infinity'", "'-infinity'", "'10000-01-01 UTC'", "'1969-12-31 23:59:59.999 UTC'", "'0044-03-15 BC'"]
IN_SQLITE = ["-1", "253402300800000", "1.5", "'tomorrow'", "x'00'", "9e999"]


def test_a_time_that_no_client_reads_is_refused(engine: Engine) -> None:
    postgresql = engine.dialect.name == "postgresql"
    readable = ("'1970-01-01 UTC'", "'9999-12-31 23:59:59.999 UTC'") if postgresql else ("0", "253402300799999")
    for name in TIMES:
        for value in IN_POSTGRESQL if postgresql else IN_SQLITE:
            with case(name, value), pytest.raises(DBAPIError, match=r"ck_ml_jobs_times|times lie in the years"):
                _insert(engine, **{name: value})
        for value in readable:
            with case(name, value):
                _insert(engine, **{name: value})


def test_an_update_is_refused_as_an_insert_is(engine: Engine) -> None:
    _insert(engine)
    far = "'infinity'" if engine.dialect.name == "postgresql" else "'never'"
    for change in (
        f"run_after = {far}",
        f"spec_json = '\"{NUL}\"'",
        f"metrics_json = '[{{\"{NUL}\": 1}}]'",
        "attempts = -1",
    ):
        with engine.begin() as connection, pytest.raises(DBAPIError), connection.begin_nested():
            connection.exec_driver_sql(f"UPDATE ml_jobs SET {change}")


IN_SQLITE_ONLY = {
    "id": ["x'" + "30" * 32 + "'", "'" + "A" * 32 + "'", "1"],
    "retry_of": ["x'" + "30" * 32 + "'", "'zz'", "7"],
    "kind": ["x'747261696e'"],
    "status": ["x'717565756564'"],
    "target_name": ["x'74'"],
    "error_message": ["x'00'"],
    "worker": ["x'41'"],
    "spec_json": ["x'7b7d'", "'{}' || char(0)", "'{}' || char(0) || 'x'"],
    "metrics_json": ["x'7b7d'", "'[]' || char(0)"],
    "progress": ["'half'", "1.5"],
    "attempts": ["'x'", "32768", "1.5", "-1"],
    "priority": ["'x'", "32768", "-32769", "0.5"],
    "exclusive": ["'x'", "2", "-1", "0.5"],
    "lease": ["'x'", "1.5"],
}


def test_a_value_of_another_storage_class_is_refused_by_sqlite(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, poolclass=NullPool)
    for name, values in IN_SQLITE_ONLY.items():
        for value in values:
            with case(name, value), pytest.raises(DBAPIError, match=r"CHECK|JSON"):
                _insert(engine, **{name: value, **({"status": "'running'"} if name == "lease" else {})})


HOLD_NUL = [f'"{NUL}"', f'{{"label": "a{NUL}b"}}', f'{{"{NUL}": 1}}', f'["\\\\{NUL}"]']
HOLD_SURROGATES = [
    r'"\ud800"', r'{"path": "/data/\udcff.csv"}', r'{"\uDBFF": 1}', r'["\ud800\ud800\udc00"]', r'"\ud83d\ude00\uDE00"',
    r'"\ud800\\\udc00"', r'"\ud800\\udc00"', r'"\ud800\ud83d\ude00\udc00"',
]  # fmt: skip
HOLD_NONE = [
    r'"\\u0000"', r'{"a": "\\\\u0000"}', r'"\u0001"', r'"u0000"', '"\\\\"', r'"\ud83d\ude00\uD83D\uDE00"', r'"\\ud800"',
    r'"\ud7ff\ue000"',
]  # fmt: skip


@pytest.mark.parametrize("name", ["spec_json", "metrics_json"])
def test_json_that_postgresql_cannot_read_by_key_is_refused_by_the_database(engine: Engine, name: str) -> None:
    for value in [*HOLD_NUL, *HOLD_SURROGATES]:
        json.loads(value)
        with pytest.raises(IntegrityError):
            _insert(engine, **{name: f"'{value}'"})
    for value in HOLD_NONE:
        _insert(engine, **{name: f"'{value}'"})
    with JobStore(engine) as store:
        assert len(store.find(limit=100)) == len(HOLD_NONE)
        assert len(store.find("spec.lr>0.1 metrics.f1<1")) == 0


def test_a_nul_in_json_is_refused_where_it_is_written_by_the_path_of_its_key(backend: Backend) -> None:
    def by_the_orm(session: Session, value: Any) -> None:
        session.add(MlJob(kind="train", target_name="x", spec_json=json.dumps(value)))
        with pytest.raises(InvalidValueError):
            session.flush()
        session.rollback()

    store = backend.store()
    for value, place in (
        ({"label": "a\x00b"}, "$.label"),
        ({"a": [1, {"b": "\x00"}]}, "$.a[1].b"),
        ({"a": {"x\x00": 1}}, r"key 'x\x00' of $.a"),
        ("\x00", "at $,"),
    ):
        with case(value):
            with pytest.raises(InvalidValueError) as refused:
                store.submit("train", "spam", value)
            assert (refused.value.field, place in str(refused.value)) == ("spec", True)
            store.submit("train", "spam")
            (claim,) = store.claim(worker="w")
            with pytest.raises(InvalidValueError) as refused:
                store.complete(claim, value)
            assert (refused.value.field, place in str(refused.value)) == ("metrics", True)
            with pytest.raises(InvalidValueError):
                store.submit_many([MlJob(kind="train", target_name="x", spec_json=json.dumps(value))])
            backend.run(by_the_orm, value)


def test_a_lone_surrogate_in_json_is_refused_where_it_is_written(sqlite_url: str) -> None:
    spec = {"path": os.fsdecode(b"/data/\xff.csv")}
    with JobStore(sqlite_url) as store:
        for job in (MlJob(kind="train", target_name="x", spec_json=json.dumps(spec)), ("train", "x", spec)):
            with pytest.raises(InvalidValueError, match="surrogate"):
                store.submit_many([job])


def test_an_import_rejects_the_line_that_postgresql_cannot_read_by_key_and_takes_the_others(
    engine: Engine, tmp_path: Any
) -> None:
    good, bad = MlJob(kind="train", target_name="a"), MlJob(kind="train", target_name="b")
    line = json.loads(bad.to_json())
    file = tmp_path / "jobs.ndjson"
    texts = [good.to_json()] + [
        json.dumps({**line, "id": uuid4().hex, key: value})
        for key in ("spec", "metrics")
        for value in [*HOLD_NUL, *HOLD_SURROGATES]
    ]
    file.write_text("\n".join(texts) + "\n")
    with JobStore(engine) as store:
        done = store.import_jobs(file)
        assert (done.inserted, done.rejected) == (1, len(texts) - 1)
        assert {problem.field for problem in done.problems} == {"spec", "metrics"}


BROKEN = "CAST(x'7370e96d' AS TEXT)"
"""Latin-1, as a program in C may write it: not UTF-8."""


@pytest.mark.parametrize("column", ["target_name", "spec_json"])
def test_a_text_that_is_no_utf8_stops_no_reader_and_no_worker_and_its_row_is_named(
    sqlite_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, column: str
) -> None:
    with JobStore(sqlite_url) as store:
        store.submit_many([MlJob(id=at, kind="train", target_name="t") for at in range(300)])
        with store.engine.begin() as connection:
            broken = f"CAST(x'22' || {BROKEN} || x'22' AS TEXT)" if column == "spec_json" else BROKEN
            connection.exec_driver_sql(f"UPDATE ml_jobs SET {column} = {broken} WHERE id = '{260:032x}'")

    def fresh(use: Callable[[JobStore], Any]) -> Any:
        _warn.cache_clear()
        with JobStore(sqlite_url) as store:  # which meets the text for the first time
            return use(store)

    file = tmp_path / "jobs.ndjson"
    assert fresh(lambda store: store.export_jobs(file, extended=True)) == 300
    assert [int(json.loads(line)["id"], 16) for line in file.read_text().splitlines()] == list(range(300))
    assert fresh(lambda store: len(store.find(limit=1000))) == 300
    query = caplog.messages[-1].partition("find it by ")[2]
    with create_engine(sqlite_url).connect() as connection:
        assert connection.exec_driver_sql(query).scalars().all() == [f"{260:032x}"]
    claims = fresh(lambda store: store.claim(worker="w", limit=300))
    assert sorted(claim.job_id.int for claim in claims) == list(range(300))
    fresh(lambda store: store.complete_many([(claim, None) for claim in claims]))
    assert fresh(lambda store: store.compare(file)).unfinished == 300
    assert fresh(lambda store: store.digest(before=date(9999, 1, 1)))[0].finished == 300


def test_a_text_that_is_no_utf8_is_read_at_the_second_attempt_in_a_session_of_a_host(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, poolclass=NullPool)
    _insert(engine, target_name=BROKEN)
    with Session(engine) as session, pytest.raises(OperationalError, match="UTF-8") as failed:
        session.scalars(select(MlJob)).all()
    assert "read with U+FFFD" in str(failed.value.__notes__)
    with Session(engine) as session:
        assert session.scalars(select(MlJob.target_name)).all() == ["sp\ufffdm"]


def test_a_text_that_is_no_utf8_beside_the_record_hides_no_other_row(sqlite_url: str) -> None:
    class Base(DeclarativeBase):
        pass

    class Noted(MlJobMixin, Base):
        __tablename__ = "noted"
        note: Mapped[str | None]

    with JobStore(sqlite_url) as store, JobStore(sqlite_url, model=Noted) as noted:
        Base.metadata.create_all(noted.engine)
        noted.submit("train", "spam", note="a note")
        _insert(store.engine, error_message=f"'it was ' || {BROKEN}")
        with store.engine.begin() as connection:
            connection.exec_driver_sql(f"UPDATE noted SET note = {BROKEN}")
            values = f"{BROKEN}, 'host', 1, '[]', 1, '0', 'running', 0, 0"
            connection.exec_driver_sql(f"INSERT INTO ml_job_workers VALUES ({values})")
    for read in (
        lambda store: [worker.name for worker in store.workers(gone=True)],
        lambda store: [job.note for job in JobStore(store.engine, model=Noted).find()],
        lambda store: [claim.job.note for claim in JobStore(store.engine, model=Noted).claim(worker="w")],
    ):
        with JobStore(sqlite_url) as store:
            assert read(store) == ["sp\ufffdm"]
    engine = create_engine(sqlite_url, poolclass=NullPool)
    with engine.connect() as connection, pytest.raises(OperationalError, match="UTF-8"):
        connection.execute(text("SELECT error FROM ml_jobs_overview")).all()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT error FROM ml_jobs_overview")).scalars().all() == ["it was sp\ufffdm"]


def test_values_of_another_type_beside_the_record_are_refused(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, poolclass=NullPool)
    for values in (
        "x'77', 'h', 1, '[]', 1",
        "'w', x'68', 1, '[]', 1",
        "'w', 'h', 'one', '[]', 1",
        "'w', 'h', 1, '[]', 1.5",
    ):
        with case(values), engine.connect() as connection, pytest.raises(IntegrityError, match="ck_mljobs_types"):
            connection.exec_driver_sql(f"INSERT INTO ml_job_workers VALUES ({values}, '0', 'running', 0, 0)")
    for values in ("x'77', 0, 0, NULL", "'w', 0, 0, x'68'"):
        with case(values), engine.connect() as connection, pytest.raises(IntegrityError, match="ck_mljobs_types"):
            connection.exec_driver_sql(
                f"INSERT INTO ml_job_leases (worker, acquired_at, expires_at, target_lock) VALUES ({values})"
            )


def test_a_run_after_that_a_zone_cannot_read_is_refused(postgres_url: str) -> None:
    url = f"{postgres_url}?options=-ctimezone%3DAsia/Tokyo"
    latest = datetime(9999, 12, 30, 23, 59, 59, 999_000, tzinfo=UTC)
    with JobStore(url) as store:
        for moment in (datetime.max.replace(tzinfo=UTC), datetime.max.replace(tzinfo=timezone(timedelta(hours=9)))):
            with pytest.raises(InvalidValueError, match="run_after"):
                store.submit("train", "spam", run_after=moment)
        store.submit("train", "spam", run_after=latest)
        assert [job.run_after for job in store.find()] == [latest]


def test_the_exclusive_index_is_no_hindrance_to_jobs_that_wait(engine: Engine) -> None:
    with JobStore(engine) as store:
        for _ in range(3):
            store.submit("train", "spam", exclusive=True)
        assert len(store.claim(worker="w", limit=3)) == 1
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM ml_jobs WHERE status = 'queued'")).scalar() == 2


def test_json_is_judged_the_same_in_a_session_where_a_backslash_escapes_in_every_string(postgres_url: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    names = "id, kind, target_name, status, progress, created_at, spec_json"
    insert = f"INSERT INTO ml_jobs ({names}) VALUES (gen_random_uuid(), 'train', 't', 'queued', 0, now(), %s::json)"
    with engine.begin() as connection:
        connection.exec_driver_sql("SET standard_conforming_strings = off")
        for spec in [*HOLD_NONE, r'"\u00e9"']:
            connection.exec_driver_sql(insert, (spec,))
        for spec in [*HOLD_NUL, *HOLD_SURROGATES]:
            with pytest.raises(IntegrityError, match="lone surrogate"), connection.begin_nested():
                connection.exec_driver_sql(insert, (spec,))
