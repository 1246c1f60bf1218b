"""What was not imported, kept for repair: a file of NDJSON that comes into being with the first such line.

``{"line":12,"field":"status","reason":"unknown token 'done' (...)","raw":"{...}"}``. A line that is not UTF-8 stands in
``raw_base64`` instead; a record of a KV store has its ``key`` too.
"""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from mljobs.errors import InvalidValueError
from mljobs.transfer._files import File, is_same_file, path_of
from mljobs.transfer._results import KEPT_PROBLEMS, Problem

_NAMELESS: Final = "import"
_SUFFIX: Final = ".rejects.ndjson"

_encode = msgspec.json.Encoder().encode


def rejects_file(file: File | None, chosen: File | None) -> File | None:
    """Return where the rejects of an input go: where the caller says, else beside it; None if it has no name.

    Raises:
        InvalidValueError: That is the input itself, which would be lost.
    """
    path = None if file is None else path_of(file)
    beside = None if path is None else Path(f"{path}{_SUFFIX}")
    place = beside if chosen is None else chosen
    if file is not None and place is not None and place != "-" and is_same_file(file, place):
        raise InvalidValueError("rejects", place, "it is the file that is imported; name another one")
    return place


class Rejects:
    """The rejects of one import. What an earlier one left in a file of this name is dropped.

    Args:
        file: A path, a file that is open for writing, "-" for standard error, or None for a file in the present directory
            that was not there: without a name nobody knows whether an older one is of the same input.

    Attributes:
        path: Where they lie; None while there are none, and for an open file.
        problems: The first hundred.

    Raises:
        InvalidValueError: Not a file.
    """

    def __init__(self, file: File | None) -> None:
        if file is not None and not isinstance(file, str | os.PathLike) and not callable(getattr(file, "write", None)):
            raise InvalidValueError("rejects", file, "expected a path or an open file")
        self._place: Any = sys.stderr if file == "-" else file
        self._file: Any = None
        self._close = False
        self.path: Path | None = None
        self.problems: list[Problem] = []
        if isinstance(self._place, str | os.PathLike):
            with suppress(FileNotFoundError):
                _regular(Path(self._place)).unlink()

    def add(self, problem: Problem, raw: bytes) -> None:
        """Keep a line."""
        self._keep(problem)
        self._write(_encode(_described(problem, raw)) + b"\n")

    def add_long(self, problem: Problem, parts: Iterable[bytes]) -> None:
        """Keep a line that does not fit in memory, part by part."""
        self._keep(problem)
        head = _encode(_described(problem, None))
        self._write(head[:-1] + b',"raw_base64":"')
        left = b""
        for part in parts:
            whole = left + part
            cut = len(whole) - len(whole) % 3  # three bytes are four digits, so the parts join
            self._write(base64.b64encode(whole[:cut]))
            left = whole[cut:]
        self._write(base64.b64encode(left) + b'"}\n')

    def flush(self) -> None:
        """Hand over to the system what was written."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Close the file, unless it is the caller's."""
        if self._file is not None and self._close:
            self._file.close()

    def _keep(self, problem: Problem) -> None:
        if len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(problem)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            if self._place is None:
                self._file, self._close = _new_file(), True
                self.path = Path(self._file.name)
            elif isinstance(self._place, str | os.PathLike):
                self.path = Path(self._place)
                self._file, self._close = self.path.open("wb"), True
            else:
                self._file = self._place
        text = hasattr(self._file, "encoding")
        self._file.write(data.decode() if text else data)


def _new_file() -> IO[bytes]:
    """Open ``import.rejects.ndjson``, or with the first number between that is not there yet."""
    for number in count():
        with suppress(FileExistsError):
            return Path(f"{_NAMELESS}.{number}{_SUFFIX}" if number else f"{_NAMELESS}{_SUFFIX}").open("xb")
    raise AssertionError("the numbers have ended")


def _regular(path: Path) -> Path:
    if path.exists() and not path.is_file():  # a device or a pipe is not ours to remove
        raise FileNotFoundError(path)
    return path


def _described(problem: Problem, raw: bytes | None) -> dict[str, Any]:
    described: dict[str, Any] = {"line": problem.line, "field": problem.field, "reason": problem.reason}
    if problem.key is not None:
        described["key"] = problem.key.encode(errors="backslashreplace").decode()  # it need not be UTF-8
    if raw is not None:
        try:
            described["raw"] = raw.removesuffix(b"\r").decode()
        except UnicodeDecodeError:
            described["raw_base64"] = base64.b64encode(raw).decode()
    return described
