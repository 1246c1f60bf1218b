"""What no guard can stop is noticed: by ``compare`` with an earlier export, and by a digest that was kept."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
from datetime import UTC, date, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection, create_engine, func, select, text
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.pool import NullPool

from mljobs import InvalidValueError, JobStore, MlJob, MlJobMixin, compare, export_jobs, import_jobs
from mljobs.transfer import Compared, Difference, DigestLine, check_digest, digest, pruned_note, read_digest
from mljobs.transfer import _alongside as alongside
from mljobs.transfer import _comparing as comparing
from tests.backends import Backend
from tests.cases import case
from tests.test_cli import run

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
ENDS = ("completed", "failed", "cancelled")


def finished(number: int, **values: Any) -> MlJob:
    """A job that finished on one of three days."""
    moment = NOON + timedelta(days=number % 3, milliseconds=number)
    given: dict[str, Any] = {
        "kind": "train",
        "target_name": f"t/{number}",
        "status": ENDS[number % 3],
        "created_at": moment,
        "started_at": moment,
        "finished_at": moment,
        "spec_json": f'{{"n": {number}}}',
        "metrics_json": '{"f1": 0.5}',
        **values,
    }
    return MlJob(**given)


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put(url: str, *jobs: MlJob) -> list[UUID]:
    engine = create_engine(url, poolclass=NullPool)
    with Session(engine, expire_on_commit=False) as session, session.begin():
        session.add_all(jobs)
    return [job.id for job in jobs]


def past_the_guard(url: str, *statements: str) -> None:
    """Do what a superuser can, and on SQLite whoever can write the file."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        _without_triggers(connection)
        for statement in statements:
            assert connection.execute(text(statement)).rowcount == 1


def _without_triggers(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        return
    for (name,) in connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'trigger'").all():
        connection.exec_driver_sql(f'DROP TRIGGER "{name}"')


def literal(url: str, job_id: UUID) -> str:
    return f"'{job_id}'" if url.startswith("postgresql") else f"'{job_id.hex}'"


def edits(url: str, ids: list[UUID]) -> tuple[str, ...]:
    """Alter one record, remove another, and put a third back in the queue."""
    altered, removed, reopened = (literal(url, job_id) for job_id in ids[:3])
    return (
        f"UPDATE ml_jobs SET metrics_json = '{{\"f1\": 0.9}}' WHERE id = {altered}",
        f"DELETE FROM ml_jobs WHERE id = {removed}",
        f"UPDATE ml_jobs SET status = 'queued', finished_at = NULL, metrics_json = NULL WHERE id = {reopened}",
    )


# ------------------------------------------------------------------------------------------------------------ compare


def test_an_untouched_table_equals_its_export(url: str) -> None:
    put(url, *(finished(number) for number in range(10)), MlJob(kind="train", target_name="queued"))
    with JobStore(url) as store:
        for name, extended in product(("jobs.ndjson", "jobs.ndjson.gz", "jobs.ndjson.zst"), (False, True)):
            with case(name, extended):
                store.export_jobs(name, extended=extended)
                done = store.compare(name)
                assert done == Compared(equal=10, unfinished=1)
                assert done.same
                assert done.total == 11
                assert str(done).startswith("11 records: 10 equal, 0 different")


def test_what_a_superuser_or_an_editor_of_the_file_did_is_named(backend: Backend, store: Any) -> None:
    url = backend.outside.url.render_as_string(hide_password=False)
    ids = put(url, *(finished(number) for number in range(9)))
    store.export_jobs("jobs.ndjson")
    past_the_guard(url, *edits(url, ids))
    told: list[Difference] = []
    done = store.compare("jobs.ndjson", on_difference=told.append)
    assert (done.equal, set(done.different), done.missing) == (6, {ids[0], ids[2]}, (ids[1],))
    assert (done.different_count, done.missing_count) == (2, 1)
    assert not done.same
    by_id = {difference.id: difference for difference in told}
    assert by_id[ids[0]].keys == ("metrics",)
    assert set(by_id[ids[2]].keys) == {"finished_at", "metrics", "status"}
    assert str(by_id[ids[1]]) == f"missing {ids[1]}"


def test_our_own_columns_are_compared_where_the_file_has_them(url: str) -> None:
    ids = put(url, finished(0, priority=3), finished(1))
    with JobStore(url) as store:
        store.export_jobs("kv.ndjson")
        store.export_jobs("own.ndjson", extended=True)
        past_the_guard(url, f"UPDATE ml_jobs SET worker = 'somebody' WHERE id = {literal(url, ids[0])}")
        assert store.compare("kv.ndjson").same
        assert store.compare("own.ndjson").different == (ids[0],)
        both = Path("kv.ndjson").read_bytes() + Path("own.ndjson").read_bytes()
        assert store.compare(io.BytesIO(both)).different == (ids[0],)


def test_what_was_pruned_is_told_apart_from_what_is_missing(url: str) -> None:
    ids = put(url, *(finished(number) for number in range(6)), finished(0, finished_at=None))
    with JobStore(url) as store:
        store.export_jobs("jobs.ndjson")
        assert store.prune(older_than=NOON + timedelta(hours=1)) == 3
        past_the_guard(url, f"DELETE FROM ml_jobs WHERE id = {literal(url, ids[1])}")
        done = store.compare("jobs.ndjson", finished_before=NOON + timedelta(hours=1))
        assert (done.equal, done.pruned, done.missing) == (3, 3, (ids[1],))
        assert store.compare("jobs.ndjson").missing_count == 4
        with pytest.raises(InvalidValueError, match="time zone"):
            store.compare("jobs.ndjson", finished_before=datetime(2026, 1, 1))


def test_a_line_that_is_no_record_is_told_and_nothing_passes_for_equal(url: str) -> None:
    put(url, finished(0))
    with JobStore(url) as store:
        store.export_jobs("jobs.ndjson")
        lines = Path("jobs.ndjson").read_bytes() + b"\n{}\nnonsense\n"
        done = store.compare(io.BytesIO(lines))
    assert (done.equal, done.unreadable) == (1, 2)
    assert [problem.line for problem in done.problems] == [3, 4]
    assert not done.same


def test_of_very_many_differences_the_first_are_kept_and_all_are_counted(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "KEPT_IDS", 3)
    put(url, *(finished(number) for number in range(8)))
    with JobStore(url) as store:
        store.export_jobs("jobs.ndjson")
        lines = Path("jobs.ndjson").read_text().replace('"target":"t/', '"target":"u/')
        told: list[Difference] = []
        done = store.compare(io.StringIO(lines), on_difference=told.append)
    assert done.different_count == len(told) == 8
    assert done.different == tuple(difference.id for difference in told[:3])
    assert {difference.keys for difference in told} == {("target",)}


def test_the_order_of_the_file_and_what_stands_between_in_the_table_make_no_difference(url: str) -> None:
    with JobStore(url) as store:
        jobs = [finished(at) if at % 5 else MlJob(kind="train", target_name="live") for at in range(1500)]
        store.submit_many(jobs)
        store.export_jobs("all.ndjson", "status:completed,failed,cancelled")
        lines = Path("all.ndjson").read_bytes().splitlines(keepends=True)
        assert len(lines) == 1200
        gone, altered = {job.id.hex for job in jobs[500:1000]}, jobs[1251].id
        with store.engine.begin() as connection:
            _without_triggers(connection)
            connection.exec_driver_sql(f"UPDATE ml_jobs SET progress = 7 WHERE id = {literal(url, altered)}")
            listed = ", ".join(literal(url, job.id) for job in jobs[500:1000])
            connection.exec_driver_sql(f"DELETE FROM ml_jobs WHERE id IN ({listed})")
        some = random.Random(1)
        missing = sum(json.loads(line)["id"] in gone for line in lines)
        for order in (lines, lines[::-1], some.sample(lines, 1200), lines[300:] + lines[:300]):
            Path("now.ndjson").write_bytes(b"".join(order))
            seen = store.compare("now.ndjson")
            assert (seen.equal, seen.different, seen.missing_count) == (1200 - missing - 1, (altered,), missing)
            told: list[Difference] = []
            store.compare("now.ndjson", on_difference=told.append)
            assert [one.line for one in told] == sorted(one.line for one in told)
        there = [line for line in lines if json.loads(line)["id"] not in gone | {altered.hex}]
        Path("twice.ndjson").write_bytes(b"".join(line for line in there[:300] for _ in range(2)))
        assert store.compare("twice.ndjson").equal == 600
        part = [line for at, line in enumerate(lines) if at % 7 == 0 and json.loads(line)["id"] not in gone]
        Path("part.ndjson").write_bytes(b"".join(part))
        assert store.compare("part.ndjson").total == len(part)
        assert store.compare("part.ndjson").missing == ()


def test_a_file_in_another_order_is_compared_beside_the_table_again_where_they_meet(
    backend: Backend, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alongside, "_PART", 5)
    monkeypatch.setattr(alongside, "_LOST", 1)
    monkeypatch.setattr(comparing, "_PART", 5)
    found_again: list[Any] = []
    start = alongside.TableLines.start
    monkeypatch.setattr(
        alongside.TableLines, "start", lambda self, after: (found_again.append(after), start(self, after))
    )
    url = backend.outside.url.render_as_string(hide_password=False)
    ids = put(url, *(finished(number) for number in range(60)))
    store.export_jobs("jobs.ndjson")
    lines = Path("jobs.ndjson").read_bytes().splitlines(keepends=True)
    rotated = b"".join(lines[40:] + lines[:40])
    assert store.compare(io.BytesIO(rotated)) == Compared(equal=60)
    assert found_again[0] is None
    assert UUID(str(found_again[1])) in ids


def test_the_first_millisecond_of_1970_equals_the_zero_that_reddb_writes(url: str) -> None:
    put(url, finished(0, started_at=datetime(1970, 1, 1, tzinfo=UTC)))
    with JobStore(url) as store:
        for extended in (False, True):
            store.export_jobs("jobs.ndjson", extended=extended)
            assert store.compare("jobs.ndjson") == Compared(equal=1)


def test_a_comparison_is_a_function_on_a_session_too(url: str) -> None:
    put(url, finished(0))
    with JobStore(url) as store:
        store.export_jobs("jobs.ndjson")
    parts: list[int] = []
    with Session(create_engine(url, poolclass=NullPool)) as session:
        assert compare(session, "jobs.ndjson", progress=lambda so_far: parts.append(so_far.records)).equal == 1
    assert parts == [1]


def test_a_restored_backup_is_noticed(tmp_path: Path, sqlite_url: str) -> None:
    ids = put(sqlite_url, *(finished(number) for number in range(3)), MlJob(kind="train", target_name="later"))
    shutil.copy(tmp_path / "jobs.db", tmp_path / "backup.db")
    with JobStore(sqlite_url) as store:
        store.complete(store.claim_one(ids[3], worker="w"), {"f1": 1.0})
        new = put(sqlite_url, finished(4))
        store.export_jobs("jobs.ndjson")
        kept = [str(line) for line in store.digest(before=date(2100, 1, 1))]
    shutil.copy(tmp_path / "backup.db", tmp_path / "jobs.db")
    for leftover in ("jobs.db-wal", "jobs.db-shm"):
        (tmp_path / leftover).unlink(missing_ok=True)
    with JobStore(sqlite_url) as store:
        done = store.compare("jobs.ndjson")
        checked = store.check_digest(kept)
    assert (done.equal, done.different, done.missing) == (3, (ids[3],), tuple(new))
    assert len(checked.missing) == 2
    assert not checked.same


# ------------------------------------------------------------------------------------------------------------- digest


def days_of(lines: list[DigestLine]) -> list[tuple[Any, Any]]:
    return [(line.day, line.finished) for line in lines]


def test_a_line_for_each_day_the_same_on_every_database_and_driver(backend: Backend, store: Any) -> None:
    url = backend.outside.url.render_as_string(hide_password=False)
    jobs = [
        finished(number, id=UUID(int=1000 - number), error_message="\N{SNOWMAN}\n" if number == 4 else None)
        for number in range(8)
    ]
    put(url, *jobs, finished(0, id=UUID(int=7), finished_at=None), MlJob(kind="train", target_name="queued"))
    lines = store.digest()
    assert days_of(lines) == [("2026-11-20", 3), ("2026-11-21", 3), ("2026-11-22", 2), (None, 1)]
    assert lines[-1].chain == "aef186f3ff27d33f3eb41ee4733a16e5cc4b4947daafc8718ac0f8f99f55ba77"
    assert store.check_digest(map(str, lines)).same


def test_the_hash_is_that_of_the_lines_of_an_export_in_the_order_of_ids(url: str) -> None:
    put(url, *(finished(number * 3, id=UUID(int=number * 67 % 300)) for number in range(300)))
    with JobStore(url) as store:
        store.export_jobs("jobs.ndjson")
        lines = sorted(Path("jobs.ndjson").read_bytes().splitlines(True), key=lambda line: json.loads(line)["id"])
        (line,) = store.digest()
    assert line.sha256 == hashlib.sha256(b"".join(lines)).hexdigest()
    content = json.dumps({"day": line.day, "finished": 300, "sha256": line.sha256}, separators=(",", ":"))
    assert line.chain == hashlib.sha256(b"0" * 64 + content.encode()).hexdigest()


def test_a_table_without_rowid_has_the_same_digest_and_is_compared(sqlite_url: str) -> None:
    class HostBase(DeclarativeBase):
        pass

    class Run(MlJobMixin, HostBase):
        __tablename__ = "runs"
        __table_args__ = {"sqlite_with_rowid": False}

    ids = put(sqlite_url, *(finished(number, id=UUID(int=99 - number)) for number in range(9)))
    engine = create_engine(sqlite_url, poolclass=NullPool)
    HostBase.metadata.create_all(engine)
    with Session(engine) as session:
        export_jobs(session, "jobs.ndjson")
        assert import_jobs(session, "jobs.ndjson", model=Run).inserted == len(ids)
        assert digest(session, model=Run) == digest(session)
        assert compare(session, "jobs.ndjson", model=Run).equal == len(ids)


def test_days_that_were_altered_emptied_or_added_to_are_named(backend: Backend, store: Any) -> None:
    url = backend.outside.url.render_as_string(hide_password=False)
    ids = put(url, *(finished(number) for number in range(9)), finished(0, finished_at=NOON - timedelta(days=5)))
    kept = [str(line) for line in store.digest()]
    assert store.check_digest(kept).equal == ["2026-11-15", "2026-11-20", "2026-11-21", "2026-11-22"]
    past_the_guard(url, *edits(url, ids))
    put(url, finished(0, finished_at=NOON - timedelta(days=3)))
    checked = store.check_digest(kept)
    assert checked.equal == ["2026-11-15"]
    assert checked.different == ["2026-11-20"]
    assert checked.missing == ["2026-11-21", "2026-11-22"]
    assert checked.added == ["2026-11-17"]
    assert str(checked) == "days: 1 equal, 1 different, 2 missing, 1 added, 0 pruned"


def test_a_record_before_the_first_day_of_a_digest_is_added(url: str) -> None:
    put(url, finished(0))
    with JobStore(url) as store:
        kept = [str(line) for line in store.digest()]
        put(url, finished(0, finished_at=NOON - timedelta(days=99)))
        assert store.check_digest(kept).added == ["2026-08-13"]


def test_a_second_line_of_a_day_makes_no_alteration_good(url: str) -> None:
    put(url, finished(0))
    with JobStore(url) as store:
        kept = [str(line) for line in store.digest()]
        again = json.loads(kept[0])
        before = again.pop("chain")
        past_the_guard(url, "UPDATE ml_jobs SET progress = 7")
        again["sha256"] = json.loads(str(store.digest()[0]))["sha256"]
        content = json.dumps(again, separators=(",", ":"))
        again["chain"] = hashlib.sha256(before.encode() + content.encode()).hexdigest()
        kept.append(json.dumps(again, separators=(",", ":")))
        assert store.check_digest(kept).different == ["2026-11-20"]


def test_a_pruned_day_is_told_apart_by_a_note_in_the_chain(url: str) -> None:
    put(url, *(finished(number) for number in range(6)))
    with JobStore(url) as store:
        kept = [str(line) for line in store.digest()]
        limit = NOON + timedelta(hours=1)
        store.prune(older_than=limit)
        assert store.check_digest(kept).missing == ["2026-11-20"]
        kept.append(str(pruned_note(kept, limit)))
        checked = store.check_digest(kept)
        assert (checked.pruned, checked.same) == (["2026-11-20"], True)
        past_the_guard(url, "UPDATE ml_jobs SET progress = 7 WHERE target_name = 't/1'")
        assert store.check_digest(kept).different == ["2026-11-21"]


def test_a_digest_is_continued_and_today_waits_until_it_is_over(url: str) -> None:
    put(url, finished(0), finished(1), finished(2, finished_at=datetime.now(UTC) + timedelta(days=1)))
    with JobStore(url) as store:
        first = store.digest(before=date(2026, 11, 21))
        assert days_of(first) == [("2026-11-20", 1)]
        kept = [str(line) for line in first]
        assert days_of(store.digest(kept)) == [("2026-11-21", 1)]
        kept += map(str, store.digest(kept))
        assert store.digest(kept) == []
        assert [line.day for line in read_digest([*kept, ""])] == ["2026-11-20", "2026-11-21"]
        assert store.check_digest(kept).same
    put(url, finished(0, finished_at=None))
    with Session(create_engine(url, poolclass=NullPool)) as session:
        assert days_of(digest(session, kept, undated=True)) == [(None, 1)]
        kept += map(str, digest(session, kept, undated=True))
        assert check_digest(session, kept).equal == ["2026-11-20", "2026-11-21", None]


def test_a_line_that_was_altered_removed_or_moved_breaks_the_chain(url: str) -> None:
    put(url, *(finished(number) for number in range(6)))
    with JobStore(url) as store:
        kept = [str(line) for line in store.digest()]
        tampered = [kept[0].replace('"finished":2', '"finished":3'), *kept[1:]]
        for lines, number in ((tampered, 1), (kept[1:], 1), ([kept[0], kept[2]], 2), ([kept[1], kept[0], kept[2]], 1)):
            with pytest.raises(InvalidValueError, match=f"chain is broken at line {number}"):
                store.check_digest(lines)
        for nonsense in ("{", '{"day":"2026-13-01","finished":1,"sha256":"","chain":""}', '{"other":1}'):
            with pytest.raises(InvalidValueError, match="line 4 is no line of a digest"):
                store.check_digest([*kept, nonsense])
        assert store.check_digest([]).same


def test_days_are_found_and_read_by_index(url: str) -> None:
    put(url, *(finished(number) for number in range(30)))
    statements: list[str] = []
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET enable_seqscan = off")
            connection.exec_driver_sql("ANALYZE ml_jobs")
        table = MlJob.__table__
        day = (table.c.finished_at >= NOON, table.c.finished_at < NOON + timedelta(days=1))
        for statement in (select(func.min(table.c.finished_at)).where(*day), select(table.c.id).where(*day)):
            explain = "EXPLAIN " if connection.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
            compiled = statement.compile(connection, compile_kwargs={"literal_binds": True})
            plan = connection.exec_driver_sql(explain + str(compiled)).all()
            statements.append(" ".join(str(part) for row in plan for part in row))
    assert all("ix_ml_jobs_finished" in plan for plan in statements)


def test_a_digest_sorts_in_more_memory_and_leaves_the_setting_as_it_was(postgres_url: str) -> None:
    put(postgres_url, *(finished(number) for number in range(3)))
    engine = create_engine(postgres_url, poolclass=NullPool)
    seen: list[str] = []
    with engine.connect() as connection:

        def setting() -> str:
            return str(connection.exec_driver_sql("SELECT current_setting('work_mem')").scalar())

        for own, inside in (("5MB", "64MB"), ("1GB", "1GB")):
            connection.exec_driver_sql(f"SET work_mem = '{own}'")
            digest(connection, on_line=lambda _: seen.append(setting()))
            assert set(seen) == {inside}
            assert setting() == own
            seen.clear()


# ------------------------------------------------------------------------------------------------------ on the command


def test_the_commands_end_with_1_where_something_differs(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    ids = put(url, *(finished(number) for number in range(9)))
    assert run("export", "jobs.ndjson.gz", "--url", url, "-q") == 0
    assert run("digest", "kept.ndjson", "--url", url) == 0
    assert capsys.readouterr().err == "3 days\n"
    assert run("compare", "jobs.ndjson.gz", "--url", url) == 0
    assert "9 equal" in capsys.readouterr().err
    assert run("digest", "--check", "kept.ndjson", "--url", url) == 0
    assert capsys.readouterr() == ("", "checked days: 3 equal, 0 different, 0 missing, 0 added, 0 pruned\n")
    past_the_guard(url, *edits(url, ids))
    assert run("compare", "jobs.ndjson.gz", "--url", url, "-q") == 1
    shown = capsys.readouterr()
    assert f"different {ids[0]} (metrics)\n" in shown.out
    assert f"missing {ids[1]}\n" in shown.out
    assert "6 equal, 2 different, 1 missing" in shown.err
    assert run("digest", "--check", "kept.ndjson", "--url", url) == 1
    assert capsys.readouterr().out == "different 2026-11-20\nmissing 2026-11-21\nmissing 2026-11-22\n"


def test_the_digest_goes_to_standard_output_or_on_in_its_file(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(url, finished(0), finished(1))
    assert run("digest", "--url", url, "-q") == 0
    shown = capsys.readouterr().out
    assert run("digest", "kept.ndjson", "--url", url, "-q", "--before", "2026-11-21") == 0
    assert run("digest", "kept.ndjson", "--url", url, "-q") == 0
    assert Path("kept.ndjson").read_text() == shown
    assert run("digest", "kept.ndjson", "--pruned-before", "2026-11-21", "--url", url) == 0
    assert json.loads(Path("kept.ndjson").read_text().splitlines()[-1])["pruned_before"] == "2026-11-21T00:00:00Z"
    assert run("digest", "--check", "kept.ndjson", "--url", url, "-q") == 0
    assert run("digest", "--pruned-before", "2026-11-21", "--url", url) == 1
    assert "in which file" in capsys.readouterr().err
    assert run("digest", "--before", "soon", "--url", url) == 1
    assert "expected a day" in capsys.readouterr().err
