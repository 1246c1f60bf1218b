"""Workers as processes of their own, as ``mljobs work`` starts them, and what they say."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from mljobs import JobStore
from tests.fork_server import shared
from tests.waiting import PATIENCE

ROOT = Path(__file__).parent.parent


class WorkerProcess:
    """One process that runs ``mljobs work``.

    Args:
        url: Of the database.
        *arguments: Of the command.
        app: Where the worker is.
        **variables: Of the environment.
    """

    def __init__(self, url: str, *arguments: str, app: str = "tests.worker_app:worker", **variables: object) -> None:
        environment = {**os.environ, "MLJOBS_DATABASE_URL": url, **{key: str(it) for key, it in variables.items()}}
        self.process = shared().start("-m", "mljobs", "work", app, *arguments, cwd=ROOT, env=environment)
        self.lines: list[str] = []
        self._said = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(pipe,), daemon=True)
            for pipe in (self.process.stdout, self.process.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            with self._said:
                self.lines.append(line.rstrip("\n"))
                self._said.notify_all()
        pipe.close()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self.process.pid

    def hears(self, part: str, *, times: int = 1) -> str:
        """Wait until it has said a line with this in it, so often; return the last of these."""
        with self._said:
            said = self._said.wait_for(lambda: len(self._with(part)) >= times, PATIENCE)
            assert said, f"never said {part!r}: {self.lines}"
            return self._with(part)[times - 1]

    def _with(self, part: str) -> list[str]:
        return [line for line in self.lines if part in line]

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def stand_still(self, store: JobStore) -> None:
        """Stop it as a machine that is suspended does, outside a transaction: SQLite's lock would stay with it."""
        while True:
            self.send(signal.SIGSTOP)
            self.process.stops()
            if store.engine.dialect.name != "sqlite" or can_write(store):
                return
            self.send(signal.SIGCONT)

    def go(self) -> None:
        """Give it the line that a handler waits for."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def ends(self) -> int:
        """Wait for its end; return the exit code."""
        code = self.process.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.send(signal.SIGKILL)
        self.process.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)
        self.process.close()


def can_write(store: JobStore) -> bool:
    """Whether nobody holds SQLite's lock."""
    with closing(sqlite3.connect(str(store.engine.url.database), timeout=0.5)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        connection.rollback()
        return True
