"""The tutorial's files are built and its commands run as they stand there, and its page does what it says."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.waiting import until

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
FILES = dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', PAGE, re.DOTALL))
COMMANDS = [block.splitlines() for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)]
INSTALLING = ("python3 -m venv", ". venv", "pip install")
SERVING = ("uvicorn", "mljobs work")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Reader:
    """What somebody sees who follows the page in a directory of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = _free_port()
        self.servers: dict[str, subprocess.Popen[str]] = {}
        self.done: list[str] = []
        for name, text in FILES.items():
            (directory / name).write_text(text)

    def run(self, command: str, shown: list[str]) -> None:
        """Run a command of the page; what it shows there has to be what it says."""
        self.done.append(command)
        command = command.replace("8000", str(self.port))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path}
        if command.startswith(SERVING):
            output = (self.directory / f"{command.split()[0]}.log").open("w")
            self.servers[command.split()[0]] = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {command}"],
                cwd=self.directory,
                env=environment,
                stdout=output,
                stderr=output,
                text=True,
            )
            output.close()
            return
        done = subprocess.run(
            command, shell=True, cwd=self.directory, env=environment, capture_output=True, text=True, check=False
        )
        for line in shown:
            assert line in done.stdout + done.stderr
        if not shown:
            assert done.returncode == 0, done.stderr

    def follow(self, job_id: str, seen: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Read the stream that the page's progress bar reads; return the job as it was at the end."""
        job: dict[str, Any] = {}
        with httpx.stream("GET", f"{self.url}/jobs/{job_id}/events", timeout=60) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line.startswith("data:"):
                    job = json.loads(line.removeprefix("data:"))
                    seen(job)
        return job

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_up(self) -> None:
        with httpx.Client(timeout=30) as client:

            def page() -> str:
                try:
                    return client.get(self.url).text
                except httpx.ConnectError:
                    return ""

            assert "EventSource" in until(page)

    def close(self) -> None:
        for server in self.servers.values():
            server.send_signal(signal.SIGTERM)
        for server in self.servers.values():
            server.wait(60)


@contextmanager
def _reader(directory: Path) -> Iterator[Reader]:
    reader = Reader(directory)
    try:
        yield reader
    finally:
        reader.close()


def test_whoever_follows_the_tutorial_gets_a_live_progress_bar(tmp_path: Path) -> None:
    commands = [
        (line.removeprefix("$ "), [shown for shown in block if not shown.startswith("$ ")])
        for block in COMMANDS
        for line in block
        if line.startswith("$ ")
    ]
    (last, refusal) = commands.pop()
    with _reader(tmp_path) as reader:
        for command, shown in commands:
            if not command.startswith(INSTALLING):
                reader.run(command, shown)
        assert set(reader.servers) == {"uvicorn", "mljobs"}
        reader.wait_until_up()

        made = httpx.post(f"{reader.url}/models", json={"name": "spam", "epochs": 12})
        assert (made.status_code, made.json()["status"]) == (201, "queued")
        shown_progress: list[int] = []
        job = reader.follow(made.json()["id"], lambda job: shown_progress.append(job["progress"]))
        assert (job["status"], job["metrics"]) == ("completed", {"loss": 0.54})
        assert shown_progress == sorted(shown_progress)
        assert len(set(shown_progress)) > 2  # a bar that moves
        again = httpx.post(f"{reader.url}/jobs/{job['id']}/cancel")
        assert (again.status_code, again.json()["type"]) == (409, "urn:mljobs:terminal-state")

        long = httpx.post(f"{reader.url}/models", json={"name": "ham", "epochs": 1000}).json()

        def cancel(job: dict[str, Any]) -> None:
            if job["status"] == "running" and job["progress"] == 0:
                assert httpx.post(f"{reader.url}/jobs/{job['id']}/cancel").status_code == 200

        assert reader.follow(long["id"], cancel)["status"] == "cancelled"
        reader.run(last, refusal)
        assert reader.done[-1] == "python change.py"


def test_what_the_tutorial_has_installed_is_what_its_files_import() -> None:
    assert set(FILES) == {"training.py", "app.py", "page.html", "change.py"}
    extras = re.search(r"mljobs\[([\w,]+)\]", PAGE)
    assert extras is not None
    assert set(extras[1].split(",")) == {"async", "cli", "web"}


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".py")])
def test_the_tutorials_files_compile(name: str) -> None:
    compile(FILES[name], name, "exec")
