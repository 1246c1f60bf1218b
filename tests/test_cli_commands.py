"""The commands on jobs: what they print for people and for programs, how they end, and what they refuse."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import String, create_engine, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from mljobs import JobStore, MlJob, MlJobMixin, MlJobStatus
from mljobs._values import utc_now
from mljobs.cli import _app as application
from mljobs.cli import _following as following
from mljobs.cli import _output as output
from mljobs.cli._screen import Screen
from mljobs.contrib.pydantic import MlJobRead
from mljobs.jobs import WorkerInfo, WorkerState
from mljobs.jobs._workers import register_worker, update_worker
from tests.cases import case
from tests.fork_server import ForkServer
from tests.test_cli import run

DOCS = Path(__file__).parent.parent / "docs" / "cli.md"


MAKES_ITS_OWN = {
    "board", "completion", "current", "demo", "downgrade", "import", "stamp", "upgrade", "verify", "work", "compare",
}  # fmt: skip
"""Commands that need no tables, or make them; the schema's are in ``test_cli``."""
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "submit": ("train", "spam"), "show": ("abcd",), "wait": ("abcd",), "lineage": ("abcd",), "compare-runs": ("abcd",),
    "watch": ("--timeout", "0s"), "cancel": ("--all", "--yes"), "retry": ("--all", "--yes"),
    "best": ("spam", "--metric", "f1"), "prune": ("--older-than", "1d"),
}  # fmt: skip


class Base(DeclarativeBase):
    pass


class CommandedRun(MlJobMixin, Base):
    """A host's class."""

    __tablename__ = "commanded_runs"
    owner: Mapped[str] = mapped_column(String(20), default="nobody")
    tries: Mapped[int | None]
    urgent: Mapped[bool | None]


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLJOBS_DATABASE_URL", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def filled(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobStore]:
    """A database, named by the environment, with jobs in every state."""
    with filling(url, monkeypatch) as store:
        yield store


@pytest.fixture
def filled_sqlite(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobStore]:
    """The same for what has nothing to do with the database."""
    with filling(sqlite_url, monkeypatch) as store:
        yield store


@contextmanager
def filling(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobStore]:
    monkeypatch.setenv("MLJOBS_DATABASE_URL", url)
    with JobStore(url) as store:
        for number, (kind, target) in enumerate(
            [("train", "spam"), ("train", "spam_v2"), ("train", "ham"), ("backfill", "e")]
        ):
            store.submit(kind, target, {"lr": number / 10, "deep": {"on": True}, "same": 1})
        done, failed, running = store.claim(worker="gpu-1", kinds=["train"], limit=3)
        store.complete(done, {"f1": 0.91})
        store.fail(failed, "CUDA out of memory\nTraceback \x1b[31m...")
        store.set_progress(running, 40)
        yield store


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "is_terminal", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def only(store: JobStore, words: str) -> str:
    (job,) = store.find(words, scan=True)
    return str(job.id)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert run(*arguments) == code
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- the help


@pytest.mark.parametrize("name", application.COMMANDS)
def test_every_command_has_help_with_an_example_and_a_line_in_the_docs(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = said(capsys, name, "--help")
    assert "Example:\n" in shown
    assert f"$ mljobs {name}" in shown
    assert "--url" in shown
    assert "--model" in shown
    assert f"| `mljobs {name}" in DOCS.read_text()
    command: Any = application.LazyGroup().get_command(None, name)
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_help_and_version_load_neither_the_database_library_nor_pydantic(tmp_path: Path) -> None:
    code = """
import sys
from mljobs.cli import main
for words in ("--version", "--help", "list --help", "watch --help", "export --help", "completion zsh"):
    sys.argv = ["mljobs", *words.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, words
    assert not {"sqlalchemy", "pydantic"} & set(sys.modules), words
sys.argv = ["mljobs", "list", "kind:train", "--limit", "5"]
try:
    main()
except SystemExit as end:
    assert end.code == 1  # there is no file
assert "pydantic" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("mljobs: field 'url'")
    assert "Example:" in done.stdout


def test_the_help_lists_every_command_in_its_panel(capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "--help")
    for panel in ("Jobs:", "Workers:", "Tables:", "Files:"):
        assert panel in shown
    for name in application.COMMANDS:
        assert f"\n  {name} " in shown


WRONG_USAGE = [
    (["lst"], "did you mean list?"),
    (["list", "--nope"], "see mljobs list --help"),
    (["list", "staus:failed"], "did you mean status:failed?"),
    (["list", "--order", "best"], "newest or oldest"),
    (["submit", "train"], "see mljobs submit --help"),
    (["show"], "see mljobs show --help"),
    (["cancel"], "or --all to cancel every one"),
    (["cancel", "status:queued"], "say --yes"),
    (["retry", "9d4e", "kind:train"], "do not go together"),
    (["watch", "9d4e", "kind:train"], "do not go together"),
    (["prune", "--older-than", "soon"], "expected a span"),
    (["stats", "--over", "soon"], "expected a span"),
    (["list", "--json", "--fields", "nope"], "there is no field 'nope'"),
    (["work"], "which worker?"),
    (["list", "--fields", " ,"], "expected names with commas between"),
    (["list", "--fields"], "see mljobs list --help"),
    (["list", "--limit", "x"], "see mljobs list --help"),
    (["list", "--limit", "0"], "greater than or equal to 1"),
    (["list", "-L", "-3"], "greater than or equal to 1"),
    (["stats", "--over", "0s"], "expected a span above 0"),
    (["watch", "--interval", "0"], "greater than or equal to 0.1"),
    (["board", "--port", "99999"], "less than or equal to 65535"),
    (["best", "spam"], "Missing option '--metric'"),
    (["wait"], "see mljobs wait --help"),
]


def test_wrong_usage_is_one_line_that_says_what_to_do_and_exit_code_2(
    filled_sqlite: JobStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, error in WRONG_USAGE:
        with case(*arguments):
            monkeypatch.setattr("sys.stdin", io.StringIO(""))
            assert run(*arguments) == 2
            line = capsys.readouterr().err.splitlines()[-1]
            assert line.startswith("mljobs: ")
            assert error in line
            assert filled_sqlite.counts().total(status="cancelled") == 0


# ---------------------------------------------------------------------------------------------------------- submitting


def test_submit_prints_the_id_and_reads_the_spec_from_anywhere(
    filled: JobStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = said(
        capsys, "submit", "train", "new", "--spec", '{"lr": 1e-3}', "--priority", "5", "--run-after", "2h"
    ).strip()
    job = filled.get(job_id)
    assert (job.spec_json, job.priority) == ('{"lr": 1e-3}', 5)
    assert job.run_after is not None
    assert said(capsys, "submit", "train", "new", "--unless-active").strip() == job_id
    Path("spec.json").write_text('{"from": "file"}')
    made = json.loads(said(capsys, "submit", "train", "other", "--spec", "@spec.json", "--json", "--exclusive"))
    assert (made["spec"], made["exclusive"]) == ({"from": "file"}, True)
    monkeypatch.setattr("sys.stdin", io.StringIO("[1]"))
    assert filled.get(said(capsys, "submit", "train", "third", "--spec", "-").strip()).spec == [1]
    assert run("submit", "train", "x", "--spec", "{") == 1
    assert "not JSON" in capsys.readouterr().err
    assert run("submit", "fit", "x") == 1
    assert "expected one of train" in capsys.readouterr().err
    assert run("submit", "train", "x", "--spec", "@nowhere.json") == 1
    assert capsys.readouterr().err == "mljobs: nowhere.json: No such file or directory\n"


# ---------------------------------------------------------------------------------------------------------- listing


def test_json_has_the_fields_of_the_read_model_one_object_a_line(
    filled: JobStore, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in said(capsys, "list", "--json").splitlines()]
    assert len(lines) == 4
    for line, job in zip(lines, filled.find(), strict=True):
        assert line == MlJobRead.model_validate(job).model_dump(mode="json")
        assert list(line) == list(MlJobRead.model_fields)
    (line,) = said(capsys, "list", "--json", "--fields", "id,spec.deep.on,metrics.f1", "status:completed").splitlines()
    assert json.loads(line) == {"id": only(filled, "status:completed"), "spec.deep.on": True, "metrics.f1": 0.91}
    shown = json.loads(said(capsys, "show", only(filled, "status:failed"), "--json"))
    assert shown["error_message"].startswith("CUDA out of memory\n")


def test_without_a_terminal_a_list_is_lines_with_tabs_uncut_and_escaped(
    filled: JobStore, capsys: pytest.CaptureFixture[str]
) -> None:
    filled.submit("train", "tab\there\nand \x1b[2J" + "x" * 200)
    rows = [line.split("\t") for line in said(capsys, "list").splitlines()]
    assert [len(row) for row in rows] == [11] * 5
    assert rows[0][3] == "tab\\there\\nand \\x1b[2J" + "x" * 200
    assert rows[0][0] == str(filled.find()[0].id)
    assert said(capsys, "list", "--fields", "target_name", "kind:backfill") == "e\n"
    assert [row.split("\t")[1] for row in said(capsys, "list", "error:out of memory").splitlines()] == ["failed"]
    assert said(capsys, "list", "error:out of", "status:failed,running").count("\n") == 1
    assert said(capsys, "list", "status:failed target:spam_v2").count("\n") == 1
    assert run("list", "--limit", "2") == 0
    assert capsys.readouterr().err == ""


def test_a_list_goes_on_where_the_one_before_ended(
    filled: JobStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mljobs.jobs import _paging

    monkeypatch.setattr(_paging, "WINDOWS", (2,))
    assert run("list", "spec.lr:0") == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("looked at 2 jobs and no further: --scan looks at all, --after ")
    cursor = shown.err.split("--after ")[1].split()[0]
    assert said(capsys, "list", "spec.lr:0", "--after", cursor).split("\t")[0] == only(filled, "status:completed")
    assert said(capsys, "list", "spec.lr:0", "--scan").split("\t")[0] == only(filled, "status:completed")


@pytest.mark.usefixtures("on_a_terminal")
def test_on_a_terminal_a_list_is_a_table_with_whole_ids_that_fits(
    filled: JobStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in ("100", "80", "60", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("NO_COLOR", "1")
        shown = said(capsys, "list")
        assert max(map(len, shown.splitlines())) <= int(columns)
        for job in filled.find():
            assert str(job.id) in shown
            assert str(job.status) in shown
        assert "\x1b" not in shown
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("COLUMNS", "100")
    assert "\x1b[31m" in said(capsys, "list")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in said(capsys, "list")
    assert "fields" not in said(capsys, "list", "--fields", "id,status,error_message")
    assert run("list", "kind:drift_compute") == 0
    assert capsys.readouterr().err == "no jobs of kind drift_compute\n"
    assert run("list", "--limit", "1") == 0
    assert "there are more: --limit 4, or --after " in capsys.readouterr().err


def test_a_table_gives_up_columns_before_it_cuts_an_id() -> None:
    columns = [output.Column("ID"), output.Column("NAME", least=4), output.Column("N", right=True, rank=2)]
    rows = [["a" * 10, "b" * 30, "7"], ["c" * 10, "日本語日本語", "12345"]]
    assert output.laid_out(columns, rows, 60)[1] == f"{'a' * 10}  {'b' * 30}      7"
    assert all(output.cells(line) <= 25 for line in output.laid_out(columns, rows, 25))
    assert output.laid_out(columns, rows, 18)[0].split() == ["ID", "NAME"]
    assert output.laid_out(columns, rows, 12) == [
        "a" * 10, "  name bbbb…", "c" * 10, "  name 日本…"
    ]  # fmt: skip
    assert [output.span(seconds) for seconds in (None, 0.44, 59.7, 250, 7500, 200_000)] == [
        "", "0.4s", "1m00s", "4m10s", "2h05m", "2d07h"
    ]  # fmt: skip
    assert output.escaped("a\x1b\u202e\n") == "a\\x1b\\u202e\\n"


# ---------------------------------------------------------------------------------------------------------- showing


@pytest.mark.usefixtures("on_a_terminal")
def test_show_tells_a_jobs_life_and_its_other_tries(filled: JobStore, capsys: pytest.CaptureFixture[str]) -> None:
    failed = only(filled, "status:failed")
    again = filled.retry(failed)
    shown = said(capsys, "show", failed[-6:])
    for part in (
        "spam_v2",
        failed,
        "failed",
        "gpu-1",
        '"lr": 0.1',
        "CUDA out of memory\n",
        "\\x1b[31m",
        "other tries",
        str(again.id),
    ):
        assert part in shown, part
    assert "40%" in said(capsys, "show", only(filled, "status:running"))
    assert "0.91" in said(capsys, "show", only(filled, "status:completed"))
    assert str(again.id) in said(capsys, "lineage", failed)


def test_lineage_shows_all_tries_from_any_of_them(filled: JobStore, capsys: pytest.CaptureFixture[str]) -> None:
    failed = only(filled, "status:failed")
    again = filled.retry(failed)
    for name in (failed, str(again.id)):
        assert [line.split("\t")[0] for line in said(capsys, "lineage", name).splitlines()] == [failed, str(again.id)]
    lines = said(capsys, "lineage", failed, "--json").splitlines()
    assert [json.loads(line)["retry_of"] for line in lines] == [None, failed]
    assert said(capsys, "lineage", failed, "--fields", "status") == "failed\nqueued\n"
    assert said(capsys, "show", failed, "--fields", "status,kind") == "status\tfailed\nkind\ttrain\n"


@pytest.mark.parametrize("command", ["show", "lineage", "cancel", "retry", "wait"])
@pytest.mark.usefixtures("filled_sqlite")
def test_an_id_that_no_job_has_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "ffff0000") == 1
    assert "no job has an id that begins so" in capsys.readouterr().err


def test_runs_are_compared_by_what_differs(filled: JobStore, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [str(job.id) for job in filled.find("kind:train", order="oldest")]
    shown = said(capsys, "compare-runs", *ids)
    assert shown.splitlines()[0].split("\t") == ["id", *ids]
    assert "spec.lr\t0.0\t0.1\t0.2" in shown
    assert "metrics.f1\t0.91\t\t" in shown
    assert "same" not in shown
    assert "spec.same\t1\t1\t1" in said(capsys, "compare-runs", "--all", *ids)
    assert [json.loads(line)["id"] for line in said(capsys, "compare-runs", "--json", *ids).splitlines()] == ids


@pytest.mark.usefixtures("on_a_terminal")
def test_people_see_runs_beside_each_other(filled: JobStore, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [str(job.id) for job in filled.find("kind:train", order="oldest")]
    shown = said(capsys, "compare-runs", *ids)
    assert f"[1] {ids[0]} completed train spam" in shown
    assert "spec.lr" in shown
    shown = said(capsys, "best", "spam", "--metric", "f1")
    assert ids[0] in shown
    assert "0.91" in shown
    assert run("best", "spam", "--metric", "nope") == 0
    assert "no completed job on spam" in capsys.readouterr().err


def test_best_prints_the_best_first(filled: JobStore, capsys: pytest.CaptureFixture[str]) -> None:
    best = only(filled, "status:completed")
    assert said(capsys, "best", "spam", "--metric", "f1").split("\t")[:2] == [best, "0.91"]
    assert json.loads(said(capsys, "best", "spam", "--metric", "f1", "--json"))["id"] == best
    assert said(capsys, "best", "spam", "--metric", "f1", "metrics.f1<0.5") == ""


# ------------------------------------------------------------------------------------------------------ stats, workers


def test_stats_and_workers_in_three_forms(
    filled: JobStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [json.loads(line) for line in said(capsys, "stats", "--json").splitlines()]
    assert [(kind["kind"], kind["queued"], kind["running"], kind["failed"]) for kind in kinds] == [
        ("backfill", 1, 0, 0), ("train", 0, 1, 1)
    ]  # fmt: skip
    assert len(said(capsys, "stats").splitlines()[1].split("\t")) == 12
    assert said(capsys, "stats", "--fields", "kind,queued") == "backfill\t1\ntrain\t0\n"
    (worker,) = [json.loads(line) for line in said(capsys, "workers", "--json").splitlines()]
    assert (worker["worker"], worker["held"], worker["silent"]) == ("gpu-1", 1, 0)
    assert worker["jobs"][0]["id"] == only(filled, "status:running")
    assert said(capsys, "workers").startswith("gpu-1\t1\t0\t")
    monkeypatch.setattr(output, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "110")
    assert "QUEUED" in said(capsys, "stats")
    assert "gpu-1" in said(capsys, "workers")
    filled.cancel(only(filled, "status:running"))
    assert "cancelled, stopping" in said(capsys, "workers")


def register(store: JobStore, name: str, state: WorkerState = WorkerState.RUNNING) -> None:
    """Write down a worker, as one that runs does."""
    now = utc_now()
    with store.connect() as bind:
        known = register_worker(bind, WorkerInfo(name, "node7", 41, ("train",), 4, "1.0", now, now))
        update_worker(bind, known, state)


def test_workers_are_seen_busy_idle_stopping_silent_and_gone(
    filled: JobStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    register(filled, "gpu-1")
    register(filled, "idle-1")
    register(filled, "leaving", WorkerState.STOPPING)
    register(filled, "ended", WorkerState.GONE)
    filled.claim(worker="by hand", limit=1)
    shown = [json.loads(line) for line in said(capsys, "workers", "--json").splitlines()]
    assert [(one["worker"], one["state"], one["held"], one["host"]) for one in shown] == [
        ("gpu-1", "busy", 1, "node7"), ("idle-1", "idle", 0, "node7"), ("leaving", "stopping", 0, "node7"),
        ("by hand", "busy", 1, None),
    ]  # fmt: skip
    assert (shown[0]["kinds"], shown[0]["concurrency"], shown[1]["since"], shown[1]["jobs"]) == (["train"], 4, None, [])
    assert said(capsys, "workers", "--gone", "--fields", "worker,state").endswith("by hand\tbusy\n")
    assert "ended\tgone\n" in said(capsys, "workers", "--gone", "--fields", "worker,state")
    with filled.engine.begin() as connection:
        connection.execute(update(MlJob.__workers__).values(last_seen_at=utc_now() - timedelta(hours=1)))
    assert "gpu-1\tsilent\n" in said(capsys, "workers", "--fields", "worker,state")
    monkeypatch.setattr(output, "is_terminal", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    for columns in ("150", "80", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        table = said(capsys, "workers")
        assert max(map(len, table.splitlines())) <= int(columns)
        assert "gpu-1" in table
        assert "silent" in table
    with filled.engine.begin() as connection:
        cascade = " CASCADE" if connection.dialect.name == "postgresql" else ""
        connection.exec_driver_sql(f"DROP TABLE ml_job_workers{cascade}")
    assert said(capsys, "workers", "--fields", "worker,held,state") == "by hand\t1\tbusy\ngpu-1\t1\tbusy\n"


def test_rescue_says_what_it_did(filled: JobStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "rescue") == "requeued 0, failed 0, released 0\n"
    done = json.loads(said(capsys, "rescue", "--json", "--kind", "train", "--max-attempts", "2"))
    assert done == {"requeued": [], "failed": [], "released": [], "errors": {}}
    assert filled.counts().total(status="running") == 1


# ------------------------------------------------------------------------------------------------------------ the many


def test_what_acts_on_many_looks_first_and_can_be_run_again(
    filled: JobStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(capsys, "cancel", "kind:train", "--dry-run") == "would cancel 1 job (train 1)\n"
    assert json.loads(said(capsys, "cancel", "--all", "-n", "--json")) == {
        "would": "cancel", "jobs": 2, "kinds": {"train": 1, "backfill": 1}
    }  # fmt: skip
    assert filled.counts().total(status="cancelled") == 0
    assert said(capsys, "cancel", "kind:train", "--yes") == "cancelled 1 job\n"
    assert run("cancel", "kind:train", "--yes") == 0
    assert "nothing to cancel" in capsys.readouterr().err
    assert said(capsys, "retry", "kind:train", "-y") == "retried 2 jobs\n"
    assert json.loads(said(capsys, "retry", "kind:train", "--yes", "--json")) == {"retried": 0, "refused": 0}
    assert said(capsys, "prune", "--older-than", "0s", "--keep-last", "1", "-n") == "would delete 0 finished jobs\n"
    assert said(capsys, "prune", "--older-than", "0s", "status:failed", "--dry-run") == "would delete 1 finished jobs\n"
    assert said(capsys, "prune", "--older-than", "0s", "status:failed", "--yes") == "deleted 1 job\n"
    assert json.loads(said(capsys, "prune", "--older-than", "1d", "--json", "--yes")) == {"deleted": 0}
    assert json.loads(said(capsys, "prune", "--older-than", "1d", "--json", "-n")) == {"would": "delete", "jobs": 0}
    assert filled.counts().total(status="failed") == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert run("cancel", "--all") == 1
    shown = capsys.readouterr()
    assert "this would cancel 3 jobs" in shown.err
    assert "nothing was done" in shown.err
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(output, "is_terminal", lambda: True)
    assert run("cancel", "--all") == 0
    assert "STATUS" in capsys.readouterr().out
    assert filled.counts().total(status="queued") == 0


def test_a_few_are_named_by_id_and_one_that_cannot_be_does_not_stop_the_others(
    filled: JobStore, capsys: pytest.CaptureFixture[str]
) -> None:
    queued, failed, running = (only(filled, f"status:{one}") for one in ("queued", "failed", "running"))
    assert said(capsys, "cancel", queued, "--dry-run") == f"{queued} would be cancelled\n"
    assert said(capsys, "cancel", queued, failed) == f"{queued} cancelled\n{failed} has finished already\n"
    assert json.loads(said(capsys, "cancel", queued, "--json")) == {"id": queued, "cancelled": False}
    assert run("retry", running, failed, "--priority", "3") == 1
    shown = capsys.readouterr()
    assert "is running and cannot become queued" in shown.err
    again = filled.get(shown.out.strip())
    done = only(filled, "status:completed")
    assert run("retry", done) == 1
    capsys.readouterr()
    assert filled.get(said(capsys, "retry", done, "--again", "--spec", "[2]").strip()).spec == [2]
    assert (str(again.retry_of), again.priority) == (failed, 3)
    made = json.loads(said(capsys, "retry", queued, "--json"))
    assert filled.get(made["retry"]).retry_of == UUID(queued)


# ---------------------------------------------------------------------------------------------------- watch and wait


def test_wait_says_how_jobs_ended_by_its_exit_code(
    filled: JobStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done, failed, running, queued = (
        only(filled, f"status:{one}") for one in ("completed", "failed", "running", "queued")
    )
    assert said(capsys, "wait", done).startswith(f"{done} completed after ")
    assert "failed after" in said(capsys, "wait", done, failed, code=3)
    assert run("wait", running, "--timeout", "0s") == 5
    assert capsys.readouterr().err.count("\n") == 1
    filled.cancel(queued)
    assert json.loads(said(capsys, "wait", queued, "--json", code=4))["status"] == "cancelled"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{done}\n"))
    assert said(capsys, "wait", "-").startswith(done)


def test_watch_without_a_terminal_prints_a_line_for_each_change(
    filled: JobStore, capsys: pytest.CaptureFixture[str]
) -> None:
    done, failed, running = (only(filled, f"status:{one}") for one in ("completed", "failed", "running"))
    assert run("watch", done, failed, "--exit-status") == 3
    shown = capsys.readouterr()
    assert f"{failed}\ttrain\tspam_v2\tfailed after" in shown.out
    assert "1 completed, 1 failed" in shown.err
    assert run("watch", failed) == 0
    capsys.readouterr()
    assert run("watch", running, "--timeout", "0s") == 5
    assert capsys.readouterr().out == f"{running}\ttrain\tham\trunning\t40%\n"
    assert run("watch", "kind:train", "--timeout", "0s", "--json") == 5
    assert json.loads(capsys.readouterr().out)["progress"] == 40
    queued = only(filled, "status:queued")
    filled.cancel(queued)
    assert run("watch", queued, "--exit-status") == 4


def test_a_screen_with_two_hundred_running_jobs_stays_readable(url: str) -> None:
    with JobStore(url) as store:
        store.submit_many([("train", f"a rather long target name {number}", {}) for number in range(200)])
        claims = store.claim(worker="gpu-box-17", limit=200)
        store.set_progress(claims[0], 50)
        watched = following._Following(store, None, None)
        watched.look()
        for room, height in ((79, 24), (39, 24), (119, 50)):
            lines = watched.lines(room, height)
            assert len(lines) <= height
            assert max(output.cells(line) for line in lines) <= room
            assert any("more" in line for line in lines)
            assert lines[-1] == "200 running"
        store.complete(claims[1], {"loss": 0.5})
        store.fail(claims[2], "x\ny")
        changed = watched.look()
        assert Counter(job.status for job in changed)[MlJobStatus.COMPLETED] == 1
        assert watched.outcomes == {"completed": 1, "failed": 1}
        named = following._Following(store, [claims[1].job_id, claims[2].job_id, claims[0].job_id], None)
        named.look()
        assert any("failed after" in line and line.endswith(": x") for line in named.lines(100, 24))
        assert not named.ended


def test_a_bar_tells_what_is_known_of_a_run() -> None:
    assert following._last_metric('{"loss": 0.18123, "note": "x"}') == "loss 0.1812"
    for text in (None, "[]", "{", '{"a": "b"}'):
        assert following._last_metric(text) == ""
    assert following.exit_code(Counter(completed=2)) == 0
    assert following.exit_code(Counter(cancelled=1)) == 4


def test_a_drawing_replaces_the_one_before(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(live=True) as screen:
        screen.draw(lambda _columns, _rows: ["one", "two"])
        screen.draw(lambda _columns, _rows: ["three"])
    shown = capsys.readouterr().out
    assert "\x1b[2A\rthree\x1b[K\n\x1b[J" in shown
    assert shown.startswith("\x1b[?25l")
    assert shown.endswith("\x1b[?25h")
    with Screen(live=False) as screen:
        screen.draw(lambda _columns, _rows: ["never"])
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("on_a_terminal")
def test_following_on_a_terminal_draws_and_ends_with_a_line_of_outcomes(
    filled: JobStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("watch", only(filled, "status:completed"), only(filled, "status:failed")) == 0
    shown = capsys.readouterr()
    assert "completed after" in shown.out
    assert shown.err == "1 completed, 1 failed\n"


def test_ctrl_c_ends_a_watch_with_its_outcomes_and_a_wait_with_130(
    filled: JobStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(following.time, "sleep", interrupt)
    assert run("watch") == 0
    assert "nothing has finished" in capsys.readouterr().err
    assert run("watch", only(filled, "status:running")) == 130
    assert capsys.readouterr().err == "mljobs: interrupted\n"


def test_ctrl_c_ends_a_long_statement_of_sqlite(sqlite_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A signal that comes while SQLite works is seen by Python before the statement has ended."""
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"

    def search(self: JobStore, *_: object, **__: object) -> None:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with self.engine.connect() as connection:
            connection.exec_driver_sql(endless)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(JobStore, "find", search)
        assert run("list", "--url", sqlite_url) == 130
    assert capsys.readouterr().err == "mljobs: interrupted\n"


# ---------------------------------------------------------------------------------------------------------- settings


def test_a_worker_finds_the_database_that_the_command_was_told_of(
    python: ForkServer, sqlite_url: str, tmp_path: Path
) -> None:
    (tmp_path / "told.py").write_text(
        "from mljobs import JobStore, Worker\n\n"
        "worker = Worker(JobStore.from_env())\n"
        "worker.handles('train')(lambda run: {'f1': 1})\n"
    )
    for how in ("project file", "option"):
        with JobStore(sqlite_url) as store:
            job = store.submit("train", how)
        url = f'url = "{sqlite_url}"\n' if how == "project file" else ""
        (tmp_path / "pyproject.toml").write_text(f'[tool.mljobs]\n{url}worker = "told:worker"\n')
        options = [] if how == "project file" else ["--url", sqlite_url]
        done = python.run("-m", "mljobs", "work", "--until-idle", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        with JobStore(sqlite_url) as store:
            assert store.get(job).metrics == {"f1": 1}


def test_a_class_of_ones_own_is_named_once_in_the_project_file(
    empty_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = create_engine(empty_url)
    Base.metadata.create_all(engine)
    project = Path("pyproject.toml")
    project.write_text(f'[tool.mljobs]\nurl = "{empty_url}"\nmodel = "tests.test_cli_commands:CommandedRun"\n')
    monkeypatch.setitem(sys.modules, "tests.test_cli_commands", sys.modules[__name__])
    job_id = said(
        capsys, "submit", "train", "spam", "--set", "owner=ann", "--set", "tries=3", "--set", "urgent=true"
    ).strip()
    shown = json.loads(said(capsys, "list", "owner:ann", "tries>2", "--json"))
    assert (shown["id"], shown["owner"], shown["tries"], shown["urgent"]) == (job_id, "ann", 3, True)
    assert said(capsys, "list", "owner:bob") == ""
    assert "the guard stands" in said(capsys, "verify")
    for wrong in ("owner", "nope=1", "tries=many"):
        assert run("submit", "train", "x", "--set", wrong) == 2
    capsys.readouterr()
    assert run("upgrade") == 1
    assert "your own migrations" in capsys.readouterr().err
    Base.metadata.drop_all(engine)
    assert run("list") == 1
    assert "'alembic upgrade head' makes the tables of tests.test_cli_commands:CommandedRun" in capsys.readouterr().err
    project.write_text('[tool.mljobs]\nworkers = "x"\n')
    assert run("list") == 1
    assert "expected text under url, model, schema, worker" in capsys.readouterr().err
    project.write_text("[tool.mljobs")
    assert run("list") == 1
    assert "not TOML" in capsys.readouterr().err
    project.write_text('[tool.mljobs]\nmodel = "nowhere:Run"\n')
    assert run("list") == 1
    assert "there is no module 'nowhere'" in capsys.readouterr().err
    engine.dispose()


def test_options_stand_before_the_command_or_after_it(sqlite_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--url", sqlite_url, "submit", "train", "spam")
    assert said(capsys, "list", "--url", sqlite_url, "--fields", "target_name") == "spam\n"
    assert run("list", "--model", "json:dumps", "--url", sqlite_url) == 1
    assert "expected a mapped class" in capsys.readouterr().err


@pytest.mark.parametrize("command", [name for name in application.COMMANDS if name not in MAKES_ITS_OWN])
def test_without_tables_each_command_says_in_a_line_what_makes_them(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.db").touch()
    assert run(command, *ARGUMENTS.get(command, ()), "--url", "sqlite:///empty.db") == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("mljobs: no such table: ml_job")
    assert "'mljobs upgrade' makes the tables" in shown.err
    assert shown.err.count("\n") == 1
    Path("nothing.db").write_text("not a database" * 100)
    assert run(command, *ARGUMENTS.get(command, ()), "--url", "sqlite:///nothing.db") == 1
    assert capsys.readouterr().err == "mljobs: sqlite:///nothing.db: file is not a database\n"


def test_a_file_that_may_only_be_read_is_read_and_a_change_is_refused_in_a_line(
    filled_sqlite: JobStore, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--url", f"sqlite:///file:{filled_sqlite.engine.url.database}?mode=ro&uri=true")
    for command in ("list", "stats", "workers"):
        assert said(capsys, command, *where)
    for words in (("submit", "train", "x"), ("cancel", "--all", "--yes"), ("retry", "--all", "--yes")):
        assert run(*words, *where) == 1
        shown = capsys.readouterr().err
        assert shown.endswith("attempt to write a readonly database\n")
        assert shown.count("\n") == 1


def test_a_function_that_makes_no_worker_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("work", "json:dumps") == 1
    assert capsys.readouterr().err.startswith("mljobs: field 'worker' cannot be 'json:dumps': it is a function")


def test_a_file_that_is_not_there_is_not_made_by_looking(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 1
    assert "'mljobs upgrade' makes it" in capsys.readouterr().err
    assert not Path("mljobs.db").exists()
    Path("empty.db").touch()
    assert run("list", "--url", "sqlite:///empty.db") == 1
    assert "'mljobs upgrade' makes the tables" in capsys.readouterr().err


def test_a_schema_of_postgresql_is_named_by_an_option(postgres_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine = create_engine(postgres_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA tenant")
    engine.dispose()
    where = ("--url", postgres_url, "--schema", "tenant")
    assert run("upgrade", *where) == 0
    capsys.readouterr()
    job_id = said(capsys, "submit", "train", "spam", *where).strip()
    assert said(capsys, "list", "--fields", "id", *where).strip() == job_id
    assert said(capsys, "list", "--url", postgres_url) == ""
    assert "(up to date)" in said(capsys, "current", *where)
    assert run("list", "--schema", "a;b", "--url", postgres_url) == 1


def test_a_reader_that_goes_away_ends_a_list_without_a_word(
    sqlite_url: str, python: ForkServer, tmp_path: Path
) -> None:
    with JobStore(sqlite_url) as store:
        store.submit_many([("train", "x" * 500, {}) for _ in range(2000)])
    listing = ["list", "--limit", "2000", "--url", sqlite_url]
    reading = python.start("-m", "mljobs", *listing, cwd=tmp_path, env=os.environ)
    reading.stdout.read(10)
    reading.stdout.close()
    assert reading.stderr.read() == ""
    assert reading.wait(60) == 1
    reading.close()
