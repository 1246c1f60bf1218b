"""What an import takes and keeps has an end, whatever is handed to it; and what was exported is always taken."""

from __future__ import annotations

import base64
import errno
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from mljobs import JobStore, TransferError
from mljobs.transfer import _lines as lines
from mljobs.transfer import _rejects as rejects
from tests.backends import Backend
from tests.transfer_jobs import job, put, stored


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_an_export_writes_its_import_takes_however_long_a_record_is(
    backend: Backend, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK", 1000)
    monkeypatch.setattr(lines, "SURE_LINE", 2000)
    long = job(spec_json=json.dumps({"blob": "x" * 9000}))
    put(backend, long)
    store.export_jobs("jobs.ndjson.gz")
    assert store.import_jobs("jobs.ndjson.gz").skipped == 1
    other = job(spec_json=json.dumps({"blob": "y" * 9000}))
    assert store.import_jobs(io.BytesIO(other.to_json().encode())).inserted == 1
    assert stored(backend)[other.id] == other.to_json()


def test_an_archive_that_expands_without_end_to_no_record_is_kept_in_part(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK", 1000)
    monkeypatch.setattr(lines, "SURE_LINE", 2000)
    monkeypatch.setattr(rejects, "_KEPT_OF_LONG", 100)
    last = job()
    Path("bomb.ndjson.gz").write_bytes(gzip.compress(b"\0" * 1_000_000 + b"\n" + last.to_json().encode()))
    with JobStore(sqlite_url) as store:
        done = store.import_jobs("bomb.ndjson.gz")
    assert (done.inserted, done.rejected) == (1, 1)
    kept = json.loads(Path("bomb.ndjson.gz.rejects.ndjson").read_text())
    assert kept["bytes"] == 1_000_000
    assert base64.b64decode(kept["raw_base64"]) == b"\0" * 100


@pytest.mark.parametrize("planted", ["link", "file"])
def test_what_somebody_puts_in_the_place_of_the_rejects_meanwhile_is_left_alone(
    sqlite_url: str, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK", 100)
    monkeypatch.setattr(lines, "BATCH_LINES", 1)
    precious = Path("precious")
    precious.write_text("precious")
    place = Path("rejects.ndjson")
    place.symlink_to(precious)  # what was there before is replaced, the link and not what it leads to

    def plant(_: object) -> None:
        if not place.exists():
            place.symlink_to(precious) if planted == "link" else place.write_text("precious")

    with JobStore(sqlite_url) as store, pytest.raises(TransferError, match=r"rejects\.ndjson: somebody has put"):
        store.import_jobs(
            io.BytesIO(job().to_json().encode() + b"\n" * 300 + b"nonsense\n"), rejects=place, progress=plant
        )
    assert precious.read_text() == place.read_text() == "precious"


class Full(io.BytesIO):
    """A file on a full disk."""

    def write(self, _data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", [Full(), "/dev/full"], ids=["file", "device"])
def test_a_full_disk_under_the_rejects_is_a_transfer_error(sqlite_url: str, place: Any) -> None:
    with JobStore(sqlite_url) as store, pytest.raises(TransferError, match="No space left on device") as caught:
        store.import_jobs(io.BytesIO(b"nonsense\n"), rejects=place)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.records == 1


def test_rejects_go_to_a_device_and_to_a_file_that_is_there(sqlite_url: str) -> None:
    Path("old.ndjson").write_text("old")
    with JobStore(sqlite_url) as store:
        for place in ("/dev/null", "old.ndjson"):
            assert store.import_jobs(io.BytesIO(b"nonsense\n"), rejects=place).rejected == 1
    assert json.loads(Path("old.ndjson").read_text())["line"] == 1


@pytest.mark.parametrize("extended", ["", ',"worker":"w"'])
def test_a_line_whose_json_holds_the_character_nul_is_rejected_and_an_escaped_backslash_is_none(
    url: str, extended: str
) -> None:
    texts = ['{"a":"\\u0000"}', '{"\\u0000":1}', '["\\\\\\u0000"]', '{"a":"\\\\u0000"}']
    given = [
        job(spec_json=text if at == 1 else "{}", metrics_json=None if at == 1 else text)
        for at, text in enumerate(texts)
    ]
    data = b"".join(one.to_json().encode()[:-1] + extended.encode() + b"}\n" for one in given)
    with JobStore(url) as store:
        done = store.import_jobs(io.BytesIO(data))
        assert (done.inserted, done.rejected) == (1, 3)
        assert [(problem.line, problem.field) for problem in done.problems] == [
            (1, "metrics"),
            (2, "spec"),
            (3, "metrics"),
        ]
        assert store.get(given[3].id).metrics == {"a": "\\u0000"}
