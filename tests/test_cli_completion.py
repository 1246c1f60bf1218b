"""What shells are offered; ``tests/slow/test_shells.py`` types at the shells themselves."""

from __future__ import annotations

import sys

import pytest

from mljobs import JobStore
from mljobs.cli import _app as application
from mljobs.cli import _completing as completing
from tests.test_cli import run
from tests.test_cli_commands import said


def completed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, code: int = 0, shell: str = "bash"
) -> list[str]:
    """Return what a shell is offered for a line."""
    monkeypatch.setenv("_MLJOBS_COMPLETE", shell)
    monkeypatch.setenv("_MLJOBS_LINE", f"mljobs {line}")
    monkeypatch.setattr(sys, "argv", ["mljobs", *line.split(" ")])
    return said(capsys, code=code).splitlines()


def test_the_shell_completes_commands_options_kinds_fields_states_and_ids(
    sqlite_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLJOBS_DATABASE_URL", sqlite_url)
    with JobStore(sqlite_url) as store:
        first, second = (str(store.submit("train", target).id) for target in ("spam", "a $(b) c"))
        store.submit("train", "two\nlines")

    def offers(line: str, *, code: int = 0, shell: str = "bash") -> list[str]:
        return completed(capsys, monkeypatch, line, code, shell)

    assert offers("li") == ["list", "lineage"]
    assert offers("--mod") == ["--model"]
    assert offers("--url x li") == offers("--url=x li") == ["list", "lineage"]
    assert offers("submit b") == ["backfill"]
    assert offers("submit --priority 3 train s") == offers("submit train --exclusive s") == ["spam"]
    assert offers("best a") == ["a\\ \\$\\(b\\)\\ c"]
    assert offers("best a", shell="fish") == ["a $(b) c"]
    assert offers("submit train tw") == offers("submit train x y") == offers("nothing x") == []
    assert offers("list st") == ["status:", "started:"]
    assert offers("list status:fai") == ["failed"]
    assert offers("list status:failed,ca", shell="zsh") == ["status:failed,cancelled"]
    assert offers("list kind:train,b", shell="zsh") == ["kind:train,backfill"]
    assert offers("cancel target:s", shell="zsh") == ["target:spam"]
    assert offers("list spec:", shell="zsh") == []
    assert offers("list --order o") == offers("list --order=o") == ["oldest"]
    assert offers("list --un") == offers("list --unknown=") == []
    assert offers("import --on-conflict ") == ["skip", "update", "error"]
    assert offers("completion z") == ["zsh"]
    assert f"{first}\tqueued train spam" in offers("show 01", shell="zsh")
    assert f"{first}" in offers("wait 01")
    assert offers(f"lineage {second[-6:]}") == [second]
    assert second in offers("retry ")
    assert offers("show 'unfinished") == []
    assert offers("import x", code=1) == offers("--url ", code=1) == offers("list --limit ", code=1) == []
    assert offers("--url sqlite:///nowhere.db show ") == offers("show --url nonsense x") == []


def test_each_argument_is_completed_or_is_a_file_or_free(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        parameter.name
        for name in application.COMMANDS
        for parameter in application.LazyGroup().get_command(None, name).params
        if parameter.param_type_name == "argument"
    }
    assert found - set(completing.VALUES) == {"file", "worker", "revision"}
    for shell, script in completing.SCRIPTS.items():
        assert said(capsys, "completion", shell) == script
    assert run("completion", "tcsh") == 2
    assert "bash, zsh, fish, not for 'tcsh'" in capsys.readouterr().err
