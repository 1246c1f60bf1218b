"""Export to NDJSON: RedDB's bytes, whole files or none."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import stat
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import (
    InvalidValueError,
    JobStore,
    MlJob,
    MlJobsError,
    TransferError,
    export_jobs,
)
from mljobs.record import _kv as codec_module
from mljobs.transfer import Imported
from mljobs.transfer import _files as files_module
from mljobs.transfer._rows import NAMES
from tests.backends import Backend
from tests.fork_server import ForkServer
from tests.transfer_jobs import NOW, empty, job, put, queued

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def rows_in(backend: Backend) -> list[tuple[Any, ...]]:
    with Session(backend.outside) as session:
        return [
            tuple(getattr(one, name) for name in NAMES) for one in session.scalars(select(MlJob).order_by(MlJob.id))
        ]


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------------------------- export


def test_an_export_holds_the_bytes_of_to_json(backend: Backend, store: Any) -> None:
    jobs = [
        job(target_name='"\\\t\N{SNOWMAN}\U0001f4a9\x7f', error_message="", spec_json=' {"a":\t[1, 2.50]}\n'),
        queued(),
        job(status="failed", error_message="boom\n", metrics_json=None, started_at=None),
    ]
    put(backend, *jobs)
    assert store.export_jobs("jobs.ndjson") == 3
    assert sorted(Path("jobs.ndjson").read_bytes().splitlines(keepends=True)) == sorted(
        one.to_json().encode() + b"\n" for one in jobs
    )


def test_an_empty_table_makes_an_empty_file(backend: Backend, store: Any) -> None:
    assert store.export_jobs("jobs.ndjson") == 0
    assert Path("jobs.ndjson").read_bytes() == b""
    assert store.import_jobs("jobs.ndjson").total == 0


def test_the_filters_are_those_of_find(backend: Backend, store: Any) -> None:
    jobs = [
        job(kind=kind, status=status, target_name=target, created_at=NOW + timedelta(hours=hours), error_message=error)
        for hours, (kind, status, target, error) in enumerate(
            [
                ("train", "completed", "a/1", None),
                ("train", "failed", "a/2", "Out of MEMORY"),
                ("backfill", "failed", "b", "disk"),
                ("drift_compute", "cancelled", "A/1", None),
            ]
        )
    ]
    put(backend, *jobs)
    for filters in (
        {"kind": "train"},
        {"kind": ["train", "backfill"], "status": "failed"},
        {"target": "a/1"},
        {"target_prefix": "a/"},
        {"created_after": NOW + timedelta(hours=1), "created_before": NOW + timedelta(hours=3)},
        {"finished_after": NOW, "finished_before": NOW + timedelta(days=1)},
        {"error_contains": "memory"},
        {"kind": []},
    ):
        file = io.BytesIO()
        found = {one.id.hex for one in store.find(**filters)}
        assert store.export_jobs(file, **filters) == len(found), filters
        assert {json.loads(line)["id"] for line in file.getvalue().splitlines()} == found, filters


@pytest.mark.parametrize(
    ("filters", "field"), [({"limit": 5}, "limit"), ({"kind": "fit"}, "kind"), ({"created_after": 5}, "created_after")]
)
def test_a_filter_that_does_not_exist_or_fit_is_named_and_no_file_is_made(
    sqlite_url: str, filters: dict[str, Any], field: str
) -> None:
    with JobStore(sqlite_url) as store, pytest.raises(InvalidValueError) as caught:
        store.export_jobs("jobs.ndjson", **filters)
    assert caught.value.field == field
    assert not Path("jobs.ndjson").exists()


def test_an_extended_export_and_its_import_lose_nothing(backend: Backend, store: Any) -> None:
    first = job(target_name="\N{SNOWMAN}", spec_json='"\\ud83d\\ude00 \U0001f600"')
    jobs = [
        first,
        queued(
            priority=-32768,
            run_after=NOW + timedelta(days=1),
            exclusive=True,
            retry_of=first.id,
            attempts=3,
            worker="gpu-1",
        ),
        job(started_at=EPOCH, finished_at=EPOCH, created_at=EPOCH, attempts=32767, priority=32767),
        job(status="cancelled", started_at=None, finished_at=EPOCH, run_after=EPOCH),
        job(retry_of=uuid4(), spec_json="[1.0, 1e2]", metrics_json="null", error_message=" "),
        queued(status="running", started_at=NOW, progress=7, attempts=1),
        job(created_at=datetime(9999, 12, 31, 23, 59, 59, 999000, tzinfo=UTC)),
    ]
    put(backend, *jobs)
    before = rows_in(backend)
    assert len(before) == len(jobs)
    store.export_jobs("jobs.ndjson.gz", extended=True)
    empty(backend)
    assert store.import_jobs("jobs.ndjson.gz") == Imported(inserted=len(jobs))
    assert rows_in(backend) == before
    again = store.import_jobs("jobs.ndjson.gz", on_conflict="update")
    assert again == Imported(skipped=len(jobs))
    with gzip.open("jobs.ndjson.gz") as file:
        for line in file:
            assert codec_module.encode(codec_module.decode(line)) + "\n" in {one.to_json() + "\n" for one in jobs}


def test_what_happens_meanwhile_is_not_in_an_export(backend: Backend, store: Any) -> None:
    store.submit_many(("train", "t", {}) for _ in range(2500))
    file = io.BytesIO()

    assert store.export_jobs(file, progress=lambda _: put(backend, job())) == 2500
    assert store.counts(exact=True).total() > 2500


def test_a_session_that_is_exporting_says_so_instead_of_waiting_for_itself(postgres_url: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    with Session(engine) as session, session.begin():
        session.add_all([queued(), queued()])
    with Session(engine) as session:
        with pytest.raises(InvalidValueError, match="is reading records") as caught:
            export_jobs(session, io.BytesIO(), progress=lambda _: session.scalar(select(MlJob.id).limit(1)))
        assert caught.value.field == "session"
        assert export_jobs(session, io.BytesIO()) == len(session.scalars(select(MlJob)).all()) == 2
    engine.dispose()


@pytest.mark.parametrize("name", ["jobs.ndjson", "jobs.ndjson.gz", "jobs.ndjson.zst"])
def test_a_path_is_compressed_by_its_name(full: JobStore, name: str) -> None:
    assert full.export_jobs(name) == full.export_jobs(Path("plain")) == 2500
    start = Path(name).read_bytes()[:4]
    assert {".gz": start[:2] == b"\x1f\x8b", ".zst": start == b"\x28\xb5\x2f\xfd"}.get(
        Path(name).suffix, start[:1] == b"{"
    )
    assert full.import_jobs(Path(name)).skipped == 2500
    with Path(name).open("rb") as opened:  # as it is; known by its first bytes
        assert full.import_jobs(opened).skipped == 2500
    assert full.import_jobs(io.BytesIO(Path(name).read_bytes())).skipped == 2500
    Path(name).rename("renamed")
    assert full.import_jobs("renamed").skipped == 2500


def test_equal_exports_are_equal_files(full: JobStore) -> None:
    full.export_jobs("a.gz")
    full.export_jobs("b.gz")
    assert Path("a.gz").read_bytes() == Path("b.gz").read_bytes()


def test_open_files_are_taken_as_they_are_and_left_open(full: JobStore) -> None:
    full.export_jobs("jobs.ndjson")
    expected = Path("jobs.ndjson").read_bytes()
    ways: list[Any] = [
        partial(Path("b").open, "wb"),
        partial(Path("b").open, "wb", buffering=0),
        partial(Path("b").open, "w", encoding="utf-8", newline=""),
        partial(gzip.open, "b.gz", "wb"),
        io.BytesIO,
        io.StringIO,
    ]
    for way in ways:
        with way() as file:
            assert full.export_jobs(file) == 2500
            if isinstance(file, io.BytesIO | io.StringIO):
                value = file.getvalue()
                assert (value.encode() if isinstance(value, str) else value) == expected
                file.seek(0)
                assert full.import_jobs(file).skipped == 2500
            assert not file.closed
        if not isinstance(file, io.BytesIO | io.StringIO | gzip.GzipFile):
            assert Path("b").read_bytes() == expected
    with gzip.open("b.gz", "rb") as file, Path("b").open(encoding="utf-8") as text:
        assert full.import_jobs(file).skipped == 2500
        assert full.import_jobs(text).skipped == 2500


def test_a_file_that_writes_less_than_it_is_given_gets_it_all(full: JobStore) -> None:
    class Slow(io.RawIOBase):
        def __init__(self) -> None:
            self.got = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.got += data[:1000]
            return len(data[:1000])

    slow, whole = Slow(), io.BytesIO()
    full.export_jobs(slow)
    full.export_jobs(whole)
    assert bytes(slow.got) == whole.getvalue()


@pytest.mark.parametrize("name", ["jobs.ndjson", "jobs.ndjson.gz", "jobs.ndjson.zst"])
def test_an_export_that_breaks_off_leaves_what_was_there(full: JobStore, name: str) -> None:
    Path(name).write_text("what was there")

    def stop(_: object) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        full.export_jobs(name, progress=stop)
    assert Path(name).read_text() == "what was there"
    assert [path.name for path in Path().iterdir() if path.suffix == ".part"] == []


def test_a_crash_leaves_no_half_file_under_the_name(full: JobStore, python: ForkServer, tmp_path: Path) -> None:
    program = (
        "import os, sys; from mljobs import JobStore\n"
        "JobStore(sys.argv[1]).export_jobs('jobs.ndjson', progress=lambda _: os._exit(9))"
    )
    assert python.run("-c", program, str(full.engine.url), cwd=tmp_path).returncode == 9
    assert not Path("jobs.ndjson").exists()


def test_a_replaced_file_keeps_its_mode_and_a_link_stays_a_link(full: JobStore) -> None:
    Path("real").write_text("")
    Path("real").chmod(0o640)
    Path("link").symlink_to("real")
    full.export_jobs("link")
    assert Path("link").is_symlink()
    assert stat.S_IMODE(Path("real").stat().st_mode) == 0o640
    assert len(Path("real").read_bytes().splitlines()) == 2500


def test_a_full_disk_is_an_error_with_the_files_name_and_errno(full: JobStore) -> None:
    with pytest.raises(TransferError, match=r"/dev/full: No space left on device \(after 0 records\)") as caught:
        full.export_jobs("/dev/full")
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value, MlJobsError)
    with pytest.raises(TransferError, match=r"/dev/full: No space left on device"):
        full.export_jobs("/dev/full", target="t7")  # fits a buffer


def test_a_text_file_that_cannot_encode_a_record_is_an_error(full: JobStore) -> None:
    full.submit("train", "漢")
    with Path("latin").open("w", encoding="latin-1") as file, pytest.raises(TransferError, match="open it as utf-8"):
        full.export_jobs(file)


@pytest.mark.parametrize("name", ["jobs.ndjson", "jobs.ndjson.gz", "jobs.ndjson.zst"])
def test_a_disk_that_fills_up_leaves_no_file(full: JobStore, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_full_device(path: Path, part: Path, there: object) -> Any:
        part.touch()
        return Path("/dev/full").open("wb")

    monkeypatch.setattr(files_module, "_created", on_full_device)
    with pytest.raises(TransferError, match="No space left on device"):
        full.export_jobs(name)
    assert [path.name for path in Path().iterdir() if not path.name.startswith("jobs.db")] == []


def test_a_broken_pipe_raises_an_error_that_names_it(full: JobStore) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as file, pytest.raises(TransferError, match="Broken pipe"):
        full.export_jobs(file)


def test_a_dash_names_the_standard_streams(
    full: JobStore, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert full.export_jobs("-") == 2500
    out = capsysbinary.readouterr().out
    assert out.count(b"\n") == 2500
    for data in (out, gzip.compress(out)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert full.import_jobs("-").skipped == 2500
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"x\n")))
    done = full.import_jobs("-")
    assert (done.rejected, done.rejects) == (1, Path("import.rejects.ndjson"))
    assert json.loads(Path("import.rejects.ndjson").read_text())["raw"] == "x"


@pytest.mark.parametrize("wrong", [5, None, b"jobs.ndjson", object()])
def test_what_is_no_file_is_refused(full: JobStore, wrong: Any) -> None:
    with pytest.raises(InvalidValueError, match="expected a path"):
        full.export_jobs(wrong)
    with pytest.raises(InvalidValueError, match="expected a path"):
        full.import_jobs(wrong)


def test_what_cannot_be_opened_is_named(full: JobStore) -> None:
    with pytest.raises(FileNotFoundError, match=r"'nowhere/jobs\.ndjson'"):
        full.export_jobs("nowhere/jobs.ndjson")
    with pytest.raises(FileNotFoundError, match=r"'nothing\.gz'"):
        full.import_jobs("nothing.gz")
    with pytest.raises(IsADirectoryError):
        full.import_jobs(".")


@pytest.mark.parametrize("name", ["jobs.ndjson.gz", "jobs.ndjson.zst"])
def test_a_damaged_archive_is_an_error_and_earlier_records_may_stay(full: JobStore, name: str) -> None:
    full.export_jobs(name)
    whole = Path(name).read_bytes()
    Path(name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TransferError, match=name):
        full.import_jobs(name)
    Path(name).write_bytes(whole[:40] + bytes(100) + whole[140:])
    with pytest.raises(TransferError, match=name):
        full.import_jobs(name)
    Path(name).write_bytes(b'{"not": "compressed"}\n')
    with pytest.raises(TransferError, match=name):
        full.import_jobs(name)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_empty_file_is_no_archive(full: JobStore, suffix: str) -> None:
    Path("jobs" + suffix).touch()
    with pytest.raises(TransferError, match=f"jobs{suffix}: "):
        full.import_jobs("jobs" + suffix)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_open_archive_is_known_by_its_first_bytes_whatever_opened_it(full: JobStore, suffix: str) -> None:
    number = full.export_jobs("jobs.ndjson" + suffix)
    packed = Path("jobs.ndjson" + suffix).read_bytes()

    class ByteByByte:
        def __init__(self) -> None:
            self.left = io.BytesIO(packed)

        def read(self, _: int = -1) -> bytes:
            return self.left.read(1)

    with tempfile.SpooledTemporaryFile() as spooled, Path("jobs.ndjson" + suffix).open("rb", buffering=0) as raw:
        spooled.write(packed)
        spooled.seek(0)
        for file in (io.BytesIO(packed), spooled, raw, ByteByByte()):
            done = full.import_jobs(file)  # type: ignore[arg-type]
            assert (done.skipped, done.total) == (number, number)


def test_without_the_extra_zstd_says_what_to_install(full: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("backports.zstd", "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mljobs\[zstd\]'"):
        full.export_jobs("jobs.ndjson.zst")
    assert [path.name for path in Path().iterdir() if not path.name.startswith("jobs.db")] == []
