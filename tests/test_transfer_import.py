"""Import from NDJSON: what is wrong is rejected by itself, a finished record is never overwritten."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import threading
from itertools import product
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import (
    AsyncJobStore,
    InvalidValueError,
    JobExistsError,
    JobStore,
    MlJob,
    MlJobsError,
    MlJobStatus,
    export_jobs,
    import_jobs,
)
from mljobs._values import storable_json, storable_text
from mljobs.transfer import Imported
from mljobs.transfer import _importing as importing
from mljobs.transfer import _lines as lines
from mljobs.transfer import _writing as writing
from mljobs.transfer._rows import NAMES, SHARED
from tests.backends import Backend
from tests.cases import case
from tests.host_application import HostBase, TrainingRun
from tests.leases import expire_leases
from tests.transfer_jobs import NOW, VECTORS, job, put, queued, stored


def ndjson(*jobs: MlJob | bytes | str) -> io.BytesIO:
    parts = [
        one if isinstance(one, bytes) else (one if isinstance(one, str) else one.to_json()).encode() for one in jobs
    ]
    return io.BytesIO(b"".join(part + b"\n" for part in parts))


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------------------------- import


def test_an_equal_finished_record_is_skipped_and_another_refused(backend: Backend, store: Any) -> None:
    one = job()
    put(backend, one)
    other = job(id=one.id, metrics_json="{}")
    before = stored(backend)
    for on_conflict in ("skip", "update"):
        done = store.import_jobs(ndjson(one, other), on_conflict=on_conflict)
        assert (done.skipped, done.refused, done.total) == (1, 1, 2)
        (problem,) = done.problems
        assert (problem.line, problem.field) == (2, "metrics")
        assert "is completed and cannot change" in problem.reason
        kept = json.loads(Path("import.rejects.ndjson").read_text())
        assert kept == {"line": 2, "field": "metrics", "reason": problem.reason, "raw": other.to_json()}
    assert stored(backend) == before


def test_every_difference_of_a_finished_record_is_seen(backend: Backend, store: Any) -> None:
    one = job(attempts=2, priority=1)
    put(backend, one)
    extended = io.BytesIO()
    store.export_jobs(extended, extended=True)
    line = json.loads(extended.getvalue())
    changes = {
        "created_at": 1,
        "error": "x",
        "finished_at": 0,
        "kind": "backfill",
        "metrics": None,
        "progress": 99,
        "spec": "{ }",
        "started_at": 5,
        "status": "failed",
        "target": "Spam",
        "attempts": 3,
        "exclusive": True,
        "priority": 0,
        "retry_of": uuid4().hex,
        "run_after": 0,
        "worker": "gpu-1",
    }
    assert {*changes, "id"} == line.keys()
    data = [json.dumps({**line, key: value}) for key, value in changes.items()]
    done = store.import_jobs(ndjson(*data), on_conflict="update")
    assert (done.refused, done.total) == (len(changes), len(changes))
    assert [problem.field for problem in done.problems] == list(changes)
    plain = {key: value for key, value in line.items() if key not in NAMES[SHARED:]}
    assert store.import_jobs(ndjson(json.dumps(plain))).skipped == 1  # a line says nothing of keys that it lacks


def test_update_moves_along_legal_edges_only(url: str) -> None:
    with JobStore(url) as store:
        for old, new in product(MlJobStatus, repeat=2):
            with case(old, new):
                one = job(status=old)
                other = job(id=one.id, status=new, progress=50, target_name="other")
                with Session(store.engine) as session, session.begin():
                    session.add(one)
                    session.flush()
                    session.expunge(one)
                done = store.import_jobs(ndjson(other), on_conflict="update")
                legal = not old.is_terminal and (old is new or old.can_become(new))
                assert (done.updated, done.refused) == ((1, 0) if legal else (0, 1))
                assert store.get(one.id).to_json() == (other if legal else one).to_json()


def test_skip_leaves_a_live_record_as_it_is(backend: Backend, store: Any) -> None:
    one = queued()
    put(backend, one)
    assert store.import_jobs(ndjson(job(id=one.id))).skipped == 1
    assert stored(backend)[one.id] == one.to_json()


def test_update_keeps_what_a_line_does_not_say(backend: Backend, store: Any) -> None:
    one = queued(priority=5, attempts=2, exclusive=True)
    put(backend, one)
    line = {**json.loads(queued(id=one.id, target_name="x").to_json()), "priority": 7}
    assert store.import_jobs(ndjson(json.dumps(line)), on_conflict="update").updated == 1
    now = store.get(one.id)
    assert (now.target_name, now.priority, now.attempts, now.exclusive) == ("x", 7, 2, True)


def test_a_job_that_a_worker_holds_is_not_changed_under_it(backend: Backend, store: Any) -> None:
    one = store.submit("train", "spam")
    (claim,) = store.claim(worker="anna")
    other = job(id=one.id, created_at=one.created_at)
    for _ in range(2):
        done = store.import_jobs(ndjson(other), on_conflict="update")
        assert (done.refused, done.updated) == (1, 0)
        assert "is held by worker 'anna'" in done.problems[0].reason
        expire_leases(backend.outside)  # the second time: it may yet renew
    store.complete(claim, {"mine": 1})
    assert store.get(one.id).metrics == {"mine": 1}


def test_error_stops_at_the_first_existing_record_and_nothing_is_imported(backend: Backend, store: Any) -> None:
    one = job()
    put(backend, one)
    with pytest.raises(JobExistsError, match="of line 2 exists already") as caught:
        store.import_jobs(ndjson(job(), one, job()), on_conflict="error")
    assert caught.value.job_id == one.id
    assert stored(backend).keys() == {one.id}
    twice = job()
    with pytest.raises(JobExistsError, match="of line 2"):
        store.import_jobs(ndjson(twice, twice), on_conflict="error")
    assert stored(backend).keys() == {one.id}
    assert store.import_jobs(ndjson(twice, b"x"), on_conflict="error").inserted == 1


def test_error_names_the_first_line_not_the_first_row(backend: Backend, store: Any) -> None:
    there = sorted((job() for _ in range(4)), key=lambda one: one.id)
    put(backend, *there)
    with pytest.raises(JobExistsError, match="of line 1 exists already") as caught:
        store.import_jobs(ndjson(*reversed(there)), on_conflict="error")
    assert caught.value.job_id == there[-1].id


def test_running_records_are_queued_again_when_asked(backend: Backend, store: Any) -> None:
    one = queued(status="running", started_at=NOW, progress=40)
    assert store.import_jobs(ndjson(one)).inserted == 1
    assert store.get(one.id).status is MlJobStatus.RUNNING
    two = queued(status="running", started_at=NOW, progress=40, target_name="two")
    for done in (Imported(inserted=1), Imported(skipped=1)):
        assert store.import_jobs(ndjson(two), requeue_running=True, on_conflict="update") == done
    now = store.get(two.id)
    assert (now.status, now.progress, now.started_at) == (MlJobStatus.QUEUED, 0, None)
    assert store.import_jobs(ndjson(one), requeue_running=True, on_conflict="update").updated == 1
    assert {claim.job_id for claim in store.claim(worker="w", limit=5)} == {one.id, two.id}


def test_a_bad_line_is_kept_and_does_not_stop_the_run(backend: Backend, store: Any) -> None:
    good = [job() for _ in range(3)]
    bad = [
        (b"\xff{}", None, "not UTF-8"),
        (b'{"x": "\xff", ' + good[0].to_json().encode()[1:], None, "not UTF-8"),
        (b"[1, 2]", None, "expected an object"),
        (b"{", None, "not JSON"),
        (good[0].to_json().replace("completed", "done").encode(), "status", "unknown token 'done'"),
        (good[0].to_json().replace('"target":"spam"', '"target":"\\u0000"').encode(), "target", "NUL"),
        (good[0].to_json().replace('"spec":"{}"', '"spec":"{"').encode(), "spec", "not JSON"),
        (good[0].to_json().replace('"spec":"{}"', '"spec":"NaN"').encode(), "spec", "not JSON"),
        (b'{"priority":"high",' + job().to_json().encode()[1:], "priority", "Expected `int`"),
        (b'{"retry_of":"zz",' + job().to_json().encode()[1:], "retry_of", "length >= 32"),
        (b'{"run_after":-1,' + job().to_json().encode()[1:], "run_after", ">= 0"),
        (good[0].to_json().encode() * 2, None, "not JSON"),
    ]
    data = [
        good[0].to_json().encode(),
        *(line for line, _, _ in bad),
        good[1].to_json().encode(),
        good[2].to_json().encode(),
    ]
    Path("in.ndjson").write_bytes(b"\n".join(data))
    done = store.import_jobs("in.ndjson")
    assert (done.inserted, done.rejected, done.total) == (3, len(bad), len(bad) + 3)
    assert not done.complete
    assert done.rejects == Path("in.ndjson.rejects.ndjson")
    assert str(done).endswith(f"{len(bad)} rejected (see in.ndjson.rejects.ndjson)")
    for number, (text, (line, field, reason)) in enumerate(
        zip(done.rejects.read_text().splitlines(), bad, strict=True), start=2
    ):
        kept = json.loads(text)
        assert (kept["line"], kept["field"]) == (number, field)
        assert reason in kept["reason"]
        raw = kept["raw"].encode() if "raw" in kept else base64.b64decode(kept["raw_base64"])
        assert raw == line
    assert store.import_jobs("in.ndjson", rejects="elsewhere").skipped == 3
    assert len(Path("elsewhere").read_bytes().splitlines()) == len(bad)
    opened = io.StringIO()
    done = store.import_jobs("in.ndjson", rejects=opened)
    assert len(opened.getvalue().splitlines()) == len(bad)
    assert done.rejects is None
    assert not Path("in.ndjson.rejects.ndjson").exists() or Path("in.ndjson.rejects.ndjson").stat().st_size


def test_the_rejects_of_an_earlier_run_do_not_outlive_their_cause(full: JobStore) -> None:
    Path("in.ndjson").write_text("x\n")
    assert full.import_jobs("in.ndjson").rejected == 1
    assert Path("in.ndjson.rejects.ndjson").exists()
    Path("in.ndjson").write_text("\n")
    assert full.import_jobs("in.ndjson").total == 0
    assert not Path("in.ndjson.rejects.ndjson").exists()


def test_what_a_line_ends_with_and_begins_with_does_not_matter(backend: Backend, store: Any) -> None:
    one, two, three = job(), job(), job()
    data = (
        b"\xef\xbb\xbf"
        + one.to_json().encode()
        + b"\r\n\r\n \t \n"
        + two.to_json().encode()
        + b"\r\n  "
        + three.to_json().encode()
    )
    assert store.import_jobs(io.BytesIO(data)) == Imported(inserted=3)
    assert stored(backend) == {each.id: each.to_json() for each in (one, two, three)}


def test_records_in_other_forms_that_reddb_reads_are_read(backend: Backend, store: Any) -> None:
    one = job(progress=100)
    loose = json.dumps(
        {
            "x": [1, {"y": None}],
            **dict(reversed(json.loads(one.to_json()).items())),
            "progress": 250.7,
            "id": one.id.hex.upper(),
        },
        ensure_ascii=True,
    )
    assert store.import_jobs(ndjson(loose)).inserted == 1
    assert stored(backend) == {one.id: one.to_json()}
    assert store.import_jobs(ndjson(loose, one)).skipped == 2


def test_of_one_id_the_first_line_counts(backend: Backend, store: Any) -> None:
    one = queued()
    loose = json.dumps(json.loads(one.to_json()))
    later = job(id=one.id, status="cancelled", target_name="later")
    done = store.import_jobs(ndjson(loose, one, later, one, job(id=one.id)), on_conflict="update")
    assert (done.inserted, done.skipped, done.updated, done.refused) == (1, 1, 1, 2)
    assert stored(backend)[one.id] == later.to_json()
    assert [problem.line for problem in done.problems] == [4, 5]
    done = store.import_jobs(ndjson(*(job(id=UUID(int=5)) for _ in range(3))))
    assert (done.inserted, done.skipped) == (1, 2)


def test_very_long_lines_are_kept_without_being_in_memory(
    backend: Backend, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK", 1000)
    monkeypatch.setattr(importing, "batches", lambda read, on_long: lines.batches(read, on_long, longest=5000))
    fits, after, last = job(spec_json='"' + "x" * 4000 + '"'), job(), job()
    long = b'{"spec": "' + b"\xff\x00y" * 5000
    data = b"\n".join([fits.to_json().encode(), long, after.to_json().encode(), long, long, last.to_json().encode()])
    done = store.import_jobs(io.BytesIO(data))
    assert (done.inserted, done.rejected) == (3, 3)
    kept = [json.loads(text) for text in Path("import.rejects.ndjson").read_text().splitlines()]
    assert [each["line"] for each in kept] == [2, 4, 5]
    assert all(base64.b64decode(each["raw_base64"]) == long for each in kept)
    assert stored(backend).keys() == {fits.id, after.id, last.id}
    assert store.import_jobs(io.BytesIO(long)).rejected == 1


def test_a_line_of_megabytes_is_a_record_like_any_other(backend: Backend, store: Any) -> None:
    one = job(spec_json=json.dumps({"blob": "x" * 3_000_000}))
    assert store.import_jobs(ndjson(one, job())).inserted == 2
    assert stored(backend)[one.id] == one.to_json()


def test_what_only_the_database_refuses_is_rejected_alone(backend: Backend, store: Any) -> None:
    with backend.outside.begin() as connection:
        connection.exec_driver_sql("CREATE UNIQUE INDEX host_own ON ml_jobs (target_name) WHERE kind = 'backfill'")
    jobs = [job(target_name=f"t{number % 8}", kind="backfill" if number < 12 else "train") for number in range(30)]
    done = store.import_jobs(ndjson(*jobs))
    assert (done.inserted, done.rejected) == (26, 4)
    assert [problem.line for problem in done.problems] == [9, 10, 11, 12]
    assert all("the database refuses it" in problem.reason for problem in done.problems)
    assert stored(backend).keys() == {one.id for number, one in enumerate(jobs) if not 8 <= number < 12}
    again = store.import_jobs(ndjson(*jobs))
    assert (again.skipped, again.rejected) == (26, 4)


def _mutated(random: Random, lines_of_all: list[bytes]) -> bytes:
    line = random.choice(lines_of_all)
    at = random.randrange(len(line))
    return random.choice(
        [
            line,
            line,
            line[:at],
            line[:at] + bytes([line[at] ^ 1 << random.randrange(8)]) + line[at + 1 :],
            line[:at]
            + random.choice([b"\xff", b"\xc0\x80", b"\x00", b"\\u0000", b"\\ud800", b"\xef\xbb\xbf"])
            + line[at:],
            line + b"\r",
            b" " + line + b"  ",
            random.choice([b"", b"  \t", b"\x0c", b"null", b"[]", b"{}", b"\xc2\xa0"]),
            re.sub(rb'("progress": ?)\d+', rb"\g<1>" + random.choice([b"1e1", b"5.5", b"-0.0", b"1e400", b"-1"]), line),
            re.sub(rb'("spec": ?)"', rb"\g<1>" + random.choice([b'5,"spec":"', b"null,", b'" ']), line),
        ]
    ).replace(b"\n", b" ")


@pytest.mark.parametrize("seed", range(3))
def test_an_import_takes_what_from_json_takes_line_by_line(url: str, seed: int) -> None:
    """Other bytes than anybody writes: cut, flipped, with keys twice; held against the ORM, one record at a time."""
    random = Random(seed)
    vectors = [json.loads(each)["raw"].encode(errors="surrogatepass") for each in VECTORS.read_text().splitlines()]
    vectors = [each for each in vectors if each.strip()]
    vectors += [job(id=number, target_name="\u6f22").to_json().encode() for number in range(10)]
    all_lines = [b"", *(_mutated(random, vectors) for _ in range(400))]
    expected: dict[UUID, MlJob] = {}
    bad = set()
    for number, line in enumerate(all_lines, start=1):
        if not line.strip(b" \t\r"):
            continue
        try:
            one = MlJob.from_json(line)
            storable_json("spec", one.spec_json)
            storable_json("metrics", "0" if one.metrics_json is None else one.metrics_json)
            storable_text("target", one.target_name)
            storable_text("error", one.error_message or "")
        except MlJobsError:
            bad.add(number)
            continue
        there = expected.setdefault(one.id, one)
        if there.is_terminal and there.to_json() != one.to_json():
            bad.add(number)
    engine = create_engine(url, poolclass=NullPool)
    with Session(engine) as session, session.begin():
        rejects = io.BytesIO()
        import_jobs(session, io.BytesIO(b"\n".join(all_lines)), rejects=rejects)
        assert {json.loads(each)["line"] for each in rejects.getvalue().splitlines()} == bad
        assert {one.id: one.to_json() for one in session.scalars(select(MlJob))} == {
            one.id: one.to_json() for one in expected.values()
        }
        out = io.BytesIO()
        export_jobs(session, out)
        assert sorted(out.getvalue().decode().split("\n")) == sorted(
            ["", *(one.to_json() for one in expected.values())]
        )
    assert len(expected) > 20
    assert len(bad) > 50
    engine.dispose()


def test_an_update_that_only_the_database_refuses_does_not_stop_the_run(backend: Backend, store: Any) -> None:
    with backend.outside.begin() as connection:
        connection.exec_driver_sql("CREATE UNIQUE INDEX host_own ON ml_jobs (target_name) WHERE kind = 'backfill'")
    jobs = [queued(target_name=f"t{number}", kind="backfill") for number in range(9)]
    put(backend, *jobs)
    lines_of_all = [json.loads(one.to_json()) | {"progress": 7} for one in jobs]
    lines_of_all[4]["target"] = "t0"
    done = store.import_jobs(ndjson(*map(json.dumps, lines_of_all)), on_conflict="update")
    assert (done.updated, done.rejected) == (8, 1)
    assert [problem.line for problem in done.problems] == [5]
    assert "the database refuses it" in done.problems[0].reason
    assert [json.loads(stored(backend)[one.id])["progress"] for one in jobs] == [7] * 4 + [0] + [7] * 4


def test_an_import_goes_on_where_row_security_forbids_copy(postgres_url: str) -> None:
    owner = create_engine(postgres_url, poolclass=NullPool)
    with owner.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE ml_jobs ENABLE ROW LEVEL SECURITY")
        connection.exec_driver_sql("ALTER TABLE ml_jobs FORCE ROW LEVEL SECURITY")
        connection.exec_driver_sql("CREATE POLICY everybody ON ml_jobs USING (true) WITH CHECK (true)")
        connection.exec_driver_sql("CREATE ROLE transfer_tenant")
        connection.exec_driver_sql("GRANT SELECT, INSERT, UPDATE ON ml_jobs, ml_job_leases TO transfer_tenant")
    one, other = job(run_after=NOW, retry_of=uuid4(), priority=3), queued()
    try:
        with Session(owner) as session, session.begin():
            session.connection().exec_driver_sql("SET LOCAL ROLE transfer_tenant")
            assert import_jobs(session, ndjson(one, other)).inserted == 2
        with Session(owner) as session:
            assert {each.id: each.to_json() for each in session.scalars(select(MlJob))} == {
                each.id: each.to_json() for each in (one, other)
            }
    finally:
        with owner.begin() as connection:
            connection.exec_driver_sql("DROP OWNED BY transfer_tenant")
            connection.exec_driver_sql("DROP ROLE transfer_tenant")
        owner.dispose()


@pytest.mark.parametrize("way", ["path", "open"])
def test_rejects_never_replace_what_is_imported(full: JobStore, way: str) -> None:
    content = b"x\n" + job().to_json().encode() + b"\n"
    name = Path("import.rejects.ndjson")
    name.write_bytes(content)
    with name.open("rb") as opened, pytest.raises(InvalidValueError, match="is the file that is imported") as caught:
        if way == "path":
            full.import_jobs(name, rejects=f"../{Path.cwd().name}/{name}")
        else:
            full.import_jobs(opened, rejects=name)
    assert caught.value.field == "rejects"
    assert name.read_bytes() == content


def test_an_input_without_a_name_leaves_alone_what_another_has_left(
    full: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = Path("import.rejects.ndjson")
    left.write_bytes(b"x\n")
    assert full.import_jobs(io.BytesIO(b"")).rejects is None
    with left.open("rb") as opened:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(opened))
        assert full.import_jobs("-").rejects == Path("import.1.rejects.ndjson")
    assert full.load_kv({f"{7:032x}": "y"}).rejects == Path("import.2.rejects.ndjson")
    assert [path.read_text().count('"raw"') for path in sorted(Path().glob("import.*"))] == [1, 1, 0]
    assert left.read_bytes() == b"x\n"


def test_an_interrupted_import_can_be_run_again_and_ends_the_same(
    backend: Backend, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BATCH_LINES", 10)
    monkeypatch.setattr(lines, "BLOCK", 2000)
    jobs = [job(target_name=f"t{number}") for number in range(60)]
    Path("in.ndjson").write_bytes(ndjson(*jobs[:30], b"bad", *jobs[30:]).getvalue())

    def stop(progress: Any) -> None:
        if progress.records >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.import_jobs("in.ndjson", progress=stop)
    assert 20 <= len(stored(backend)) < 60
    seen = []
    done = store.import_jobs("in.ndjson", progress=seen.append)
    assert (done.inserted + done.skipped, done.rejected) == (60, 1)
    assert stored(backend) == {one.id: one.to_json() for one in jobs}
    assert len(seen) > 3
    assert seen[-1].records == 61
    assert seen[-1].read == seen[-1].size == Path("in.ndjson").stat().st_size
    assert len(Path("in.ndjson.rejects.ndjson").read_bytes().splitlines()) == 1


def test_in_a_session_it_is_part_of_the_callers_transaction(backend: Backend) -> None:
    one, two = job(), queued()
    put(backend, two)
    later = job(id=two.id, status="cancelled")

    def undone(session: Session) -> None:
        session.add(job(target_name="before"))
        assert import_jobs(session, ndjson(one, b"x")).inserted == 1
        assert import_jobs(session, ndjson(one, later), on_conflict="update").updated == 1
        session.rollback()

    backend.run(undone)
    assert stored(backend).keys() == {two.id}

    def kept(session: Session) -> None:
        held = session.get_one(MlJob, two.id)
        assert import_jobs(session, ndjson(one, later, one), on_conflict="update").total == 3
        assert held.status is MlJobStatus.CANCELLED
        with pytest.raises(JobExistsError):
            import_jobs(session, ndjson(job(), one), on_conflict="error")
        file = io.BytesIO()
        assert export_jobs(session, file) == 2
        assert one.to_json().encode() in file.getvalue()

    backend.run(kept)
    assert stored(backend).keys() == {one.id, two.id}


def test_a_connection_will_do(url: str) -> None:
    engine = create_engine(url, poolclass=NullPool)
    one = job()
    with engine.begin() as connection:
        assert import_jobs(connection, ndjson(one)).inserted == 1
    with engine.connect() as connection:
        file = io.BytesIO()
        assert export_jobs(connection, file) == 1
    assert file.getvalue().decode() == one.to_json() + "\n"


def test_two_imports_at_once_lose_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BATCH_LINES", 50)
    monkeypatch.setattr(lines, "BLOCK", 4000)
    jobs = [job(target_name=f"t{number}") for number in range(1000)]
    orders = [jobs, jobs[::-1], jobs[500:] + jobs[:500]]
    results: list[Imported] = []

    def run(order: list[MlJob], number: int) -> None:
        with JobStore(url) as store:
            results.append(store.import_jobs(ndjson(*order), rejects=f"rejects-{number}"))

    threads = [threading.Thread(target=run, args=(order, number)) for number, order in enumerate(orders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each.inserted for each in results) == 1000
    assert sum(each.skipped for each in results) == 2000
    with JobStore(url) as store:
        assert store.counts(exact=True).total() == 1000


def test_a_deadlock_is_tried_again_and_other_errors_are_not() -> None:
    class Refused(Exception):
        sqlstate = "40P01"

    from sqlalchemy.exc import OperationalError

    deadlock = OperationalError("COPY", None, Refused())
    assert importing.Import.try_again(deadlock, 0)
    assert not importing.Import.try_again(deadlock, 4)
    assert not importing.Import.try_again(LookupError(), 0)
    behind = OperationalError("COPY", None, Exception())
    behind.__cause__ = Refused()
    assert writing.may_pass(behind)


def test_a_hosts_own_class_gets_its_columns_from_the_orm(empty_url: str) -> None:
    engine = create_engine(empty_url, poolclass=NullPool)
    HostBase.metadata.create_all(engine)
    with JobStore(engine, model=TrainingRun) as store:
        one = store.submit("train", "spam", {"a": 1}, note="mine", priority=3)
        bad = job().to_json().replace('"target":"spam"', '"target":5')
        other = job()
        done = store.import_jobs(
            ndjson(other, bad, queued(id=one.id, target_name="new", created_at=one.created_at), other),
            on_conflict="update",
        )
        assert (done.inserted, done.updated, done.rejected, done.skipped) == (1, 1, 1, 1)
        now = store.get(one.id)
        assert (now.target_name, now.note, now.priority) == ("new", "mine", 3)
        assert store.get(other.id).flavour == "run"
        assert store.get(other.id).to_json() == other.to_json()
        store.export_jobs("runs.ndjson", extended=True)
        assert store.import_jobs("runs.ndjson").skipped == 2
    with Session(engine) as session, session.begin():
        assert import_jobs(session, ndjson(job()), model=TrainingRun).inserted == 1
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE UNIQUE INDEX host_own ON training_runs (target_name) WHERE kind = 'backfill'"
        )
        twice = [job(kind="backfill"), job(kind="backfill"), job()]
        done = import_jobs(connection, ndjson(*twice), model=TrainingRun)
        assert (done.inserted, done.rejected) == (2, 1)
        assert len(connection.exec_driver_sql("SELECT 1 FROM training_runs").all()) == 5
    engine.dispose()


@pytest.mark.parametrize(
    ("options", "field"), [({"on_conflict": "replace"}, "on_conflict"), ({"rejects": 5}, "rejects")]
)
def test_a_choice_that_does_not_exist_is_named(full: JobStore, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        full.import_jobs(io.BytesIO(), **options)
    assert caught.value.field == field


def test_an_async_import_and_export_leave_the_loop_free(postgres_url: str) -> None:
    import asyncio

    async def main() -> int:
        turns = 0

        async def tick() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async with AsyncJobStore(postgres_url.replace("+psycopg", "+asyncpg")) as store:
            await store.submit_many(("train", "t", {}) for _ in range(10_000))
            ticking = asyncio.create_task(tick())
            await store.export_jobs("jobs.ndjson")
            ticking.cancel()
        return turns

    assert asyncio.run(main()) >= 10
