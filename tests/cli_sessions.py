"""``python -m tests.cli_sessions``: record the sessions of docs/cli.md anew, in tmux, on a history of 100,000 jobs.

Each command runs in a terminal of 100 columns; what the terminal shows then (``capture-pane``) stands in the page. What
never ends by itself is stopped by Ctrl-C. Needs tmux and ``mljobs[board,demo]``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sqlalchemy import create_engine

from mljobs import JobStore, schema
from mljobs._values import utc_now
from mljobs.jobs import WorkerInfo
from mljobs.jobs._workers import register_worker
from tests.sample_history import fill

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
TITLE = "## What it looks like\n"
INTRODUCTION = """
Recorded by `python -m tests.cli_sessions` at 100 columns on a history of 100,000 jobs.

"""
COMMANDS = (
    "mljobs current",
    "mljobs verify",
    "mljobs list --limit 6",
    "mljobs list status:failed error:'CUDA out of memory' 'spec.lr>0.05' --limit 4",
    "mljobs list staus:failed",
    "mljobs list --json --limit 1 --fields id,status,spec.lr",
    "mljobs show {failed}",
    "mljobs lineage {failed}",
    "mljobs submit drift_compute prices --spec '{{\"window\": 30}}'",
    "mljobs watch",
    'mljobs wait {failed}; echo "exit code $?"',
    "mljobs retry status:failed error:'CUDA out of memory' 'created:<2d' --dry-run",
    "mljobs retry {failed} --json",
    "mljobs cancel status:queued target:'spam*' --dry-run",
    "mljobs compare-runs {runs}",
    "mljobs best spam-1 --metric f1 --limit 4",
    "mljobs stats",
    "mljobs workers",
    "mljobs rescue",
    "mljobs work jobs:worker --kind drift_compute --until-idle 2>&1 | tail -3",
    "mljobs board --port 0",
    "mljobs prune --older-than 30d --keep-last 10 --dry-run",
    "mljobs export recent.ndjson 'finished:<2d'",
    "mljobs compare recent.ndjson",
    "mljobs import recent.ndjson",
    "mljobs digest digest.txt; tail -2 digest.txt",
    "mljobs upgrade --url sqlite:///other.db",
    "mljobs stamp --url sqlite:///other.db",
    "mljobs downgrade --yes --url sqlite:///other.db",
    "mljobs demo --url sqlite:///demo.db 2>&1 | tail -12",
    "mljobs completion fish",
)
ENDLESS = ("mljobs watch", "mljobs board")
WORKER = """
from mljobs import JobStore, Worker
worker = Worker(JobStore.from_env())
@worker.handles("drift_compute")
def compute(run):
    return {"drift": 0.02}
"""
SESSION = "mljobs-docs"
MOST = 20
"""Lines of a session that are shown."""


def tmux(*arguments: str) -> str:
    return subprocess.run(["tmux", *arguments], check=True, capture_output=True, text=True).stdout


def record(command: str) -> str:
    """Return what the terminal shows of a command."""
    tmux("send-keys", "-t", SESSION, "clear", "Enter")
    time.sleep(0.5)
    tmux("send-keys", "-t", SESSION, "-l", f"{command}\n")
    stop = time.monotonic() + (10 if command.startswith(ENDLESS) else 120)
    while True:
        time.sleep(0.5)
        lines = [line.rstrip() for line in tmux("capture-pane", "-p", "-J", "-t", SESSION).rstrip().split("\n")]
        if lines[-1] == "$" and len(lines) > 1:
            shown = lines[:-1] if lines[0].startswith("$ ") else [f"$ {command}", *lines[:-1]]
            return "\n".join([*shown[:MOST], "..."] if len(shown) > MOST + 1 else shown)
        if time.monotonic() > stop:
            tmux("send-keys", "-t", SESSION, "C-c")
            stop += 60


def prepared(url: str) -> dict[str, str]:
    """Let workers be there, and return the ends of some ids."""
    with JobStore(url) as store:
        store.cancel_many("status:running worker:gpu-*")  # the history's own, which nobody renews
        for name, number in (("gpu-a1", 2), ("gpu-b2", 0)):
            now = utc_now()
            with store.connect() as bind:
                register_worker(bind, WorkerInfo(name, f"node-{name[-1]}", 4711, ("train",), 4, "0.1.0", now, now))
            for percent, claim in enumerate(store.claim(worker=name, limit=number, lease=3600) if number else (), 2):
                store.set_progress(claim, percent * 20)
        failed = store.find("status:failed error:CUDA*", limit=1).jobs[0]
        runs = store.find("status:completed target:spam-1", limit=3).jobs
        return {"failed": failed.id.hex[-6:], "runs": " ".join(run.id.hex[-6:] for run in runs)}


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        url = f"sqlite:///{directory}/jobs.db"
        engine = create_engine(url)
        schema.upgrade(engine)
        fill(engine, 100_000)
        engine.dispose()
        Path(directory, "jobs.py").write_text(WORKER)
        names = prepared(url)
        tmux("new-session", "-d", "-s", SESSION, "-x", "100", "-y", "60", "bash --norc --noprofile")
        try:
            where = (
                f"export MLJOBS_DATABASE_URL={url} PS1='$ ' PATH={Path(sys.executable).parent}:$PATH; cd {directory}"
            )
            tmux("send-keys", "-t", SESSION, "-l", f"{where}\n")
            shown = [record(command.format(**names)).replace(directory, "") for command in COMMANDS]
        finally:
            tmux("kill-session", "-t", SESSION)
    text = "\n".join(f"```text\n{part}\n```" for part in shown)
    page = PAGE.read_text().partition(TITLE)[0]
    PAGE.write_text(f"{page}{TITLE}{INTRODUCTION}{text}\n")


if __name__ == "__main__":
    main()
