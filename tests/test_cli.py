"""The command: what it says, and that errors are one line."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from mljobs import MlJob, MlJobStatus, __version__, schema
from mljobs.cli import _app as application
from mljobs.cli import main
from mljobs.cli._training import SPEC
from mljobs.store._store import JobStore


def run(*arguments: str) -> int:
    """Run the command in this process; return its exit code."""
    with pytest.raises(SystemExit) as caught:
        application.run(list(arguments))
    return int(caught.value.code or 0)


def test_the_demo_trains_and_shows_the_refusals(
    empty_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SPEC, "epochs", 6)  # of 30: the model is as good, and the curve shorter
    assert run("demo", "--url", empty_url) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("completed", "accuracy", "TerminalStateError: job", "UPDATE ml_jobs SET status", "byte for byte"):
        assert part in shown, part
    with JobStore(empty_url) as store:
        (job,) = store.find()
        assert (job.status, job.progress) == (MlJobStatus.COMPLETED, 100)
        assert job.metrics["accuracy"] > 0.9
    assert run("demo", "--url", empty_url) == 0
    schema.verify(empty_url)


def test_up_current_verify_down(empty_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("current", "--url", empty_url) == 0
    assert "no tables" in capsys.readouterr().out
    assert run("upgrade", "--url", empty_url) == 0
    assert run("verify", "--url", empty_url) == 0
    assert run("current", "--url", empty_url) == 0
    assert "(up to date)" in capsys.readouterr().out
    assert run("downgrade", "--yes", "--url", empty_url) == 0
    assert run("verify", "--url", empty_url) == 1
    assert "table ml_jobs is missing" in capsys.readouterr().err


def test_downgrading_asks_first(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("upgrade", "--url", empty_url) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run("downgrade", "--url", empty_url) == 1
    schema.verify(empty_url)


def test_tables_of_other_making_are_stamped(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("current", "--url", url) == 0
    assert "tables whose version your own migrations keep" in capsys.readouterr().out
    assert run("upgrade", "--url", url) == 1
    assert run("stamp", "--url", url) == 0
    assert run("upgrade", "--url", url) == 0


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://u:secret@127.0.0.1:1/x", "127.0.0.1"),
        ("mysql://u:secret@h/x", "expected one of"),
        ("nonsense", "not a database URL"),
        ("sqlite:////nowhere/at/all.db", "unable to open database file"),
    ],
)
def test_an_error_is_one_line_without_the_password(url: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("current", "--url", url) == 1
    error = capsys.readouterr().err
    assert error.startswith("mljobs: ")
    assert error.count("\n") == 1
    assert said in error
    assert "secret" not in error


def test_the_environment_names_the_database(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLJOBS_DATABASE_URL", empty_url)
    assert run("upgrade") == 0
    schema.verify(empty_url)
    with JobStore.from_env() as store:
        assert store.submit("train", "spam").status is MlJobStatus.QUEUED


def test_the_module_runs_as_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mljobs", "--version"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stdout == f"mljobs {__version__}\n"


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "pip install 'mljobs[cli]'" in capsys.readouterr().err


def test_without_scikit_learn_the_demo_says_what_to_install(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert run("demo", "--url", sqlite_url) == 1
    assert "mljobs[demo]" in capsys.readouterr().err
    assert MlJob is not None
