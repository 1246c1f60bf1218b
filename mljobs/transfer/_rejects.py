"""The rejects of an import: a file of NDJSON with the lines that were not imported, made with the first of them.

``{"line":12,"field":"status","reason":"unknown token 'done' (...)","raw":"{...}"}``. A line that is not UTF-8 stands in
``raw_base64`` instead; a record of a KV store has its ``key`` too. Of a line that is longer than any record only the
beginning is kept, and how many ``bytes`` it had.
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

from mljobs.errors import InvalidValueError, TransferError
from mljobs.transfer._files import File, is_same_file, name_of, path_of, transfer_errors
from mljobs.transfer._results import KEPT_PROBLEMS, Problem

_NAMELESS: Final = "import"
_SUFFIX: Final = ".rejects.ndjson"
_KEPT_OF_LONG: Final = 1 << 20
"""So many bytes are kept of a line that is rejected unread."""

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
        records: How many there are.

    Raises:
        InvalidValueError: Not a file.
    """

    def __init__(self, file: File | None) -> None:
        if file is not None and not isinstance(file, str | os.PathLike) and not callable(getattr(file, "write", None)):
            raise InvalidValueError("rejects", file, "expected a path or an open file")
        self._place: Any = sys.stderr if file == "-" else file
        self._file: Any = None
        self._close = False
        self._is_device = False
        self.path: Path | None = None
        self.problems: list[Problem] = []
        self.records = 0
        if isinstance(self._place, str | os.PathLike):
            place = Path(self._place)
            self._is_device = place.exists() and not place.is_file()  # a device or a pipe is not ours to remove
            if not self._is_device:
                place.unlink(missing_ok=True)

    def add(self, problem: Problem, raw: bytes) -> None:
        """Keep a line."""
        self._keep(problem)
        self._write(_encode(_described(problem, raw)) + b"\n")

    def add_long(self, problem: Problem, parts: Iterable[bytes]) -> None:
        """Keep the beginning of a line that does not fit in memory; a small archive may hold one without an end."""
        self._keep(problem)
        kept, size = b"", 0
        for part in parts:
            kept += part[: _KEPT_OF_LONG - len(kept)]
            size += len(part)
        described = _described(problem, None) | {"bytes": size, "raw_base64": base64.b64encode(kept).decode()}
        self._write(_encode(described) + b"\n")

    def flush(self) -> None:
        """Hand over to the system what was written.

        Raises:
            TransferError: The disk is full, or the like.
        """
        if self._file is not None:
            with transfer_errors(self._name, self):
                self._file.flush()

    def close(self) -> None:
        """Close the file, unless it is the caller's.

        Raises:
            TransferError: The disk is full, or the like.
        """
        if self._file is not None and self._close:
            with transfer_errors(self._name, self):
                self._file.close()

    @property
    def _name(self) -> str:
        return str(self.path or name_of(self._place))

    def _keep(self, problem: Problem) -> None:
        self.records += 1
        if len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(problem)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._open()
        text = hasattr(self._file, "encoding")
        with transfer_errors(self._name, self):
            self._file.write(data.decode() if text else data)

    def _open(self) -> None:
        if self._place is None:
            self._file, self._close = _new_file(), True
            self.path = Path(self._file.name)
        elif isinstance(self._place, str | os.PathLike):
            self.path = Path(self._place)
            self._file, self._close = (self.path.open("wb") if self._is_device else _created(self.path)), True
        else:
            self._file = self._place


def _created(path: Path) -> IO[bytes]:
    """Open a file that was not there. What somebody has put in its place meanwhile, a link say, is left alone.

    Raises:
        TransferError: Something is there.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.fdopen(os.open(path, flags, 0o666), "wb")
    except FileExistsError as error:
        raise TransferError(str(path), "somebody has put something there since the import began") from error


def _new_file() -> IO[bytes]:
    """Open ``import.rejects.ndjson``, or with the first number between that is not there yet."""
    for number in count():
        with suppress(FileExistsError):
            return Path(f"{_NAMELESS}.{number}{_SUFFIX}" if number else f"{_NAMELESS}{_SUFFIX}").open("xb")
    raise AssertionError("the numbers have ended")


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
