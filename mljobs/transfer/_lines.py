"""Lines from a stream of bytes, in batches, numbered; memory is bounded whatever the input is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

BLOCK: Final = 1 << 20
BATCH_LINES: Final = 5_000
BATCH_BYTES: Final = 8 << 20
MAX_LINE: Final = 1 << 30
"""A longer line, in bytes, is rejected unread: no database holds such a record, and memory has an end."""
SURE_LINE: Final = 64 << 20
"""A longer line, in bytes, is rejected unread if it does not begin as a record does: a small archive may expand to it."""

_BOM: Final = b"\xef\xbb\xbf"

Read = Callable[[int], bytes]
OnLongLine = Callable[[int, Iterator[bytes]], None]


@dataclass(frozen=True, slots=True)
class Batch:
    """Some lines of an input.

    Attributes:
        first: The number of the first, from 1.
        lines: Without their line feeds.
        keys: The key of each in the KV store that it came from; None for a file.
    """

    first: int
    lines: list[bytes]
    keys: list[str] | None = None


def batches(read: Read, on_long_line: OnLongLine, *, longest: int = MAX_LINE) -> Iterator[Batch]:
    """Yield the lines of an input in batches; see ``Lines``.

    Args:
        read: Returns at most so many bytes, none at the end.
        on_long_line: Is given the number and the parts of a line that is longer than ``longest``, to be read at once.
        longest: In bytes.
    """
    number, lines, size = 1, list[bytes](), 0
    source = Lines(read, longest=longest)
    while block := source.block():
        if isinstance(block, LongLine):
            if lines:
                yield Batch(number, lines)
                number, lines, size = number + len(lines), [], 0
            on_long_line(number, iter(block))
            number += 1
            continue
        lines += lines_of(block)
        size += len(block)
        if len(lines) >= BATCH_LINES or size >= BATCH_BYTES:
            yield Batch(number, lines)
            number, lines, size = number + len(lines), [], 0
    if lines:
        yield Batch(number, lines)


class Lines:
    """An input that is cut at its lines, or anywhere.

    A byte order mark at the beginning is skipped. A carriage return before the line feed is left, for JSON takes it.

    Args:
        read: Returns at most so many bytes, none at the end.
        longest: In bytes; a longer line is never in memory as a whole.
    """

    def __init__(self, read: Read, *, longest: int = MAX_LINE) -> None:
        self._read = read
        self._longest = longest
        self._left = _without_bom(read)

    def some(self, size: int) -> bytes:
        """Return what was put back, else at most so many bytes; none at the end."""
        left, self._left = self._left, b""
        return left or self._read(size)

    def take(self, size: int) -> bytes:
        """Return so many bytes; fewer at the end only."""
        data = self.some(size)
        while len(data) < size and (more := self._read(size - len(data))):
            data += more
        data, self._left = data[:size], data[size:]
        return data

    def put_back(self, data: bytes) -> None:
        """Return bytes that come once more."""
        self._left = data + self._left

    def block(self) -> bytes | LongLine:
        """Return some lines, each with its line feed but for the last of all; none at the end; or one that is too long."""
        rest: list[bytes] = []  # of a line whose end has not been read yet
        kept = 0
        while part := self.some(BLOCK):
            end = part.rfind(b"\n") + 1
            if end:
                self._left = part[end:]
                return b"".join((*rest, part[:end]))
            rest.append(part)
            kept += len(part)
            if kept > self._longest or (kept > SURE_LINE and not _begins_as_record(rest)):
                return LongLine(rest, self)
        return b"".join(rest)


def lines_of(block: bytes) -> list[bytes]:
    """Return the lines of a block, without their line feeds."""
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def _begins_as_record(parts: list[bytes]) -> bool:
    return next((start for part in parts if (start := part[:BLOCK].lstrip())), b"").startswith(b"{")


def _without_bom(read: Read) -> bytes:
    block = read(BLOCK)
    while block and len(block) < len(_BOM) and _BOM.startswith(block):
        more = read(BLOCK)
        if not more:
            break
        block += more
    return block.removeprefix(_BOM) or read(BLOCK)


class LongLine:
    """The parts of a line that is not kept in memory; read them before what follows it."""

    def __init__(self, parts: list[bytes], lines: Lines) -> None:
        self._parts = parts
        self._lines = lines

    def __iter__(self) -> Iterator[bytes]:
        yield from self._parts
        while block := self._lines.some(BLOCK):
            part, end, after = block.partition(b"\n")
            yield part
            if end:
                self._lines.put_back(after)
                return
