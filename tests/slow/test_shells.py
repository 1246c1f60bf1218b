"""Completion in the shells themselves: keys typed at a terminal. Needs bash, zsh and fish: ``apt-get install zsh fish``."""

from __future__ import annotations

import os
import pty
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mljobs import JobStore
from mljobs.cli._completing import SCRIPTS

STARTS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--private", "--interactive", "--no-config"],
}
SETS_UP = {
    "bash": "source {script}",
    "zsh": "bindkey -e; autoload -U compinit; compinit -u -D; source {script}",
    "fish": "source {script}",
}
HOSTILE = "x\\$(touch pwned)`touch pwned`'\"; touch pwned #"
PROGRAM = """#!/bin/sh
[ -n "$_MLJOBS_COMPLETE" ] && exec {python} -m mljobs "$@"
printf '%s\\n' "$@" > words.part
mv words.part words
"""


class Shell:
    """A shell with the script in it, whose ``mljobs`` completes, and otherwise writes its arguments into a file."""

    def __init__(self, name: str, directory: Path, url: str) -> None:
        self.directory = directory
        (directory / "programs").mkdir()
        program = directory / "programs" / "mljobs"
        program.write_text(PROGRAM.format(python=sys.executable))
        program.chmod(0o755)
        script = directory / "script"
        script.write_text(SCRIPTS[name])
        process, self._terminal = pty.fork()
        if not process:
            os.chdir(directory)
            paths = f"{directory / 'programs'}:{os.environ['PATH']}"
            os.environ.update(PATH=paths, MLJOBS_DATABASE_URL=url, TERM="xterm", HOME=str(directory))
            os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent.parent)
            os.execvp(STARTS[name][0], STARTS[name])
        self.type(f"{SETS_UP[name].format(script=script)}\r")
        assert self.words("mljobs begun\r") == ["begun"]

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def words(self, keys: str) -> list[str]:
        """Return the arguments that the line has become."""
        self.type(keys)
        written = self.directory / "words"
        shown = ""
        end = time.monotonic() + 60
        while not written.exists():
            assert time.monotonic() < end, shown
            shown += self._read()
        found = written.read_text().split("\n")[:-1]
        written.unlink()
        return found

    def shows(self, keys: str, *wanted: str) -> None:
        """Wait until the screen shows all of these."""
        self.type(keys)
        shown = ""
        end = time.monotonic() + 60
        while not all(word in shown for word in wanted):
            assert time.monotonic() < end, shown
            shown += self._read()

    def _read(self) -> str:
        ready, _, _ = select.select([self._terminal], [], [], 0.1)
        return os.read(self._terminal, 65536).decode("utf-8", "replace") if ready else ""

    def close(self) -> None:
        self.type("\x03\rexit\r")
        os.close(self._terminal)


@pytest.fixture(params=list(STARTS))
def shell(request: pytest.FixtureRequest, sqlite_url: str, tmp_path: Path) -> Iterator[Shell]:
    started = Shell(request.param, tmp_path, sqlite_url)
    yield started
    started.close()


def test_a_shell_completes_commands_options_kinds_states_targets_and_ids(shell: Shell, sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        first = str(store.submit("train", "spam").id)
        second = str(store.submit("backfill", "a name with spaces").id)
        store.submit("train", HOSTILE)
    assert shell.words("mljobs lin\t\r") == ["lineage"]
    assert shell.words("mljobs list --sca\t\r") == ["list", "--scan"]
    assert shell.words("mljobs submit bac\ta\t\r") == ["submit", "backfill", "a name with spaces"]
    assert shell.words("mljobs list statu\tfai\t\r") == ["list", "status:failed"]
    assert shell.words("mljobs list status:failed,ca\t\r") == ["list", "status:failed,cancelled"]
    assert shell.words("mljobs list --order=ol\t\r") == ["list", "--order=oldest"]
    assert shell.words("mljobs list --order ol\t\r") == ["list", "--order", "oldest"]
    assert shell.words(f"mljobs show {first[:-2]}\t\r")[1] == first
    assert shell.words(f"mljobs show {second[-6:]}\t\r") == ["show", second]
    assert shell.words("mljobs best x\t\r") == ["best", HOSTILE]
    assert shell.words("mljobs --url nowhere show 01\t\r")[2:] == ["show", "01"]
    shell.shows("mljobs show \t\t\t", first[-20:], second[-20:])  # fish shortens the beginning
    assert not (shell.directory / "pwned").exists()


def test_a_shell_completes_files_where_a_file_is_meant(shell: Shell) -> None:
    (shell.directory / "history.ndjson").touch()
    assert shell.words("mljobs import hist\t\r") == ["import", "history.ndjson"]
    assert shell.words("mljobs list hist\t\r") == ["list", "hist"]
