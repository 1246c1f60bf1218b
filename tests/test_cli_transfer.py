"""``mljobs export`` and ``mljobs import``: streams, summary, exit code, bar."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mljobs.cli import _transfer as transfer
from mljobs.store._store import JobStore
from tests.fork_server import ForkServer
from tests.test_cli import run
from tests.transfer_jobs import job


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def filled(url: str) -> str:
    """A database with 30 queued jobs."""
    with JobStore(url) as store:
        store.submit_many(("train" if number % 3 else "backfill", f"t/{number}", {}) for number in range(30))
    return url


def test_what_is_exported_is_imported(filled: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", "jobs.ndjson.gz", "--extended", "--url", filled) == 0
    assert capsys.readouterr().err == "exported 30 records\n"
    assert run("import", "jobs.ndjson.gz", "--url", filled) == 0
    assert capsys.readouterr().err == "imported 30 records: 0 inserted, 0 updated, 30 skipped, 0 refused, 0 rejected\n"
    assert run("import", "jobs.ndjson.gz", "--url", filled, "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert run("import", "jobs.ndjson.gz", "--url", filled, "--on-conflict", "error") == 1
    assert "exists already" in capsys.readouterr().err


def test_filters_and_standard_output(filled: str, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    options = ("--kind", "backfill", "--status", "queued", "--target-prefix", "t/", "--created-after", "2020-01-01")
    assert run("export", "--url", filled, *options) == 0
    shown = capsysbinary.readouterr()
    assert {json.loads(line)["kind"] for line in shown.out.splitlines()} == {"backfill"}
    assert len(shown.out.splitlines()) == 10
    assert shown.err == b"exported 10 records\n"
    assert run("export", "--url", filled, "--created-before", "2020-01-01T00:00:00+01:00", "-q") == 0
    assert capsysbinary.readouterr() == (b"", b"")
    for options in (("--created-after", "yesterday"), ("--kind", "fit")):
        assert run("export", "out", "--url", filled, *options) == 1
        assert b"cannot be" in capsysbinary.readouterr().err
    assert not Path("out").exists()


def test_bad_lines_end_with_1_a_summary_and_the_rejects(
    filled: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = job()
    data = "\n".join([one.to_json(), "x", job(id=one.id, progress=3).to_json(), "y"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    assert run("import", "--url", filled, "--quiet") == 1
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == (
        "imported 4 records: 1 inserted, 0 updated, 0 skipped, 1 refused, 2 rejected (see import.rejects.ndjson)"
    )
    assert [line.split(":")[0] for line in shown[1:]] == ["  line 2", "  line 3", "  line 4"]
    kept = [json.loads(line) for line in Path("import.rejects.ndjson").read_text().splitlines()]
    assert [each["raw"] for each in kept] == ["x", data.splitlines()[2], "y"]
    Path("in.ndjson").write_text("z\n")
    assert run("import", "in.ndjson", "--url", filled, "--rejects", "-") == 1
    assert json.loads(capsys.readouterr().err.splitlines()[0])["raw"] == "z"
    assert run("import", "in.ndjson", "--url", filled, "--rejects", "there") == 1
    assert Path("there").exists()
    assert not Path("in.ndjson.rejects.ndjson").exists()


def test_running_records_are_queued_again_when_asked(filled: str) -> None:
    one = job(status="running", finished_at=None, metrics_json=None, progress=5)
    Path("in.ndjson").write_text(one.to_json() + "\n")
    assert run("import", "in.ndjson", "--url", filled, "--requeue-running") == 0
    with JobStore(filled) as store:
        assert store.get(one.id).status == "queued"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("import", "nothing.ndjson"), "nothing.ndjson: No such file or directory"),
        (("import", "."), ".: Is a directory"),
        (("export", "nowhere/x"), "nowhere/x: No such file or directory"),
        (("export", "/dev/full"), "/dev/full: No space left on device (after 0 records)"),
        (("import", "broken.gz"), "broken.gz: Not a gzipped file (b'no')"),
        (("import", "broken.gz", "--on-conflict", "replace"), "expected one of skip, update, error"),
    ],
)
def test_an_error_is_one_line(
    filled: str, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.gz").write_text("no")
    assert run(*arguments, "--url", filled) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert shown.startswith("mljobs: ")
    assert said in shown


def test_a_reader_that_goes_away_is_an_error(sqlite_url: str, python: ForkServer, tmp_path: Path) -> None:
    with JobStore(sqlite_url) as store:
        store.submit_many(("train", "x" * 100, {}) for _ in range(5000))
    process = python.start("-m", "mljobs", "export", "--url", sqlite_url, cwd=tmp_path, env=os.environ)
    process.stdout.read(10)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 1
    process.close()
    assert said.startswith("mljobs: standard stream: Broken pipe (after ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("arguments", [("export", "out.ndjson"), ("import", "in.ndjson"), ("import", "-")])
def test_on_a_terminal_a_bar_appears_after_a_second(
    filled: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (job().to_json() + "\n").encode()
    Path("in.ndjson").write_bytes(data)
    for seconds, expected in ((0.5, False), (1.5, True)):
        terminal = io.StringIO()
        moments = iter([100.0, 100.0 + seconds])
        monkeypatch.setattr(transfer, "monotonic", lambda moments=moments, last=100.0 + seconds: next(moments, last))
        console = Console(file=terminal, force_terminal=True, width=100)
        monkeypatch.setattr("rich.console.Console", lambda console=console, **_: console)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert run(*arguments, "--url", filled) == 0
        assert (f"{arguments[0]}ing" in terminal.getvalue()) is expected


def test_where_nobody_looks_there_is_no_bar(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    real = JobStore.export_jobs

    def export_jobs(self: JobStore, *args: Any, **kw: Any) -> int:
        given.append(kw["progress"])
        return real(self, *args, **kw)

    monkeypatch.setattr(JobStore, "export_jobs", export_jobs)
    assert run("export", "out", "--url", filled) == 0
    assert given == [None]
