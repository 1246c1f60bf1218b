"""What handlers did, in a file outside the database: one line for each begin and each end, never changed.

``O_APPEND`` and one write for a line: lines of many processes do not mix, and what was written stays when its process is
killed. Times are of the machine's monotonic clock, which all its processes share.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Call:
    """One call of a handler.

    Attributes:
        job: Its id, as hex.
        token: The lease under which it ran.
        process: Where.
        begun: Nanoseconds.
        ended: Nanoseconds; None where it did not come to its end.
    """

    job: str
    token: int
    process: int
    begun: int
    ended: int | None


class Ledger:
    """The file, open for appending."""

    def __init__(self, path: str | Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def begin(self, job: str, token: int) -> None:
        """Say that a handler was called."""
        self._write("B", job, token)

    def end(self, job: str, token: int) -> None:
        """Say that it did what it had to do."""
        self._write("E", job, token)

    def _write(self, word: str, job: str, token: int) -> None:
        os.write(self._file, f"{word} {job} {token} {os.getpid()} {time.monotonic_ns()}\n".encode())


def read(path: Path) -> tuple[dict[tuple[str, int], Call], list[str]]:
    """Return the calls by job and token, and what is wrong with the file."""
    calls: dict[tuple[str, int], Call] = {}
    wrong: list[str] = []
    for line in path.read_text().splitlines():
        word, job, token, process, moment = line.split()
        key, at = (job, int(token)), int(moment)
        if word == "B":
            if key in calls:
                wrong.append(f"job and token {key} were used for two calls: {calls[key]} and {line}")
            calls[key] = Call(*key, int(process), at, None)
        elif key not in calls or calls[key].ended is not None:
            wrong.append(f"an end without its begin: {line}")
        else:
            calls[key] = Call(*key, int(process), calls[key].begun, at)
    return calls, wrong
