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
    """Yield the lines of an input in batches.

    A byte order mark at the beginning is skipped. A carriage return before the line feed is left, for JSON takes it.

    Args:
        read: Returns at most so many bytes, none at the end.
        on_long_line: Is given the number and the parts of a line that is longer than ``longest``, to be read at once.
        longest: In bytes.
    """
    number, lines, size = 1, list[bytes](), 0
    rest: list[bytes] = []  # of a line whose end has not been read yet
    kept = 0
    block = _without_bom(read)
    while block:
        *whole, last = block.split(b"\n")
        if whole:
            whole[0] = b"".join((*rest, whole[0]))
            rest, kept = [], 0
            lines += whole
            size += len(block)
            if len(lines) >= BATCH_LINES or size >= BATCH_BYTES:
                yield Batch(number, lines)
                number, lines, size = number + len(lines), [], 0
        rest.append(last)
        kept += len(last)
        if kept > longest or (kept > SURE_LINE and not _begins_as_record(rest)):
            if lines:
                yield Batch(number, lines)
                number, lines, size = number + len(lines), [], 0
            long_line = _LongLine(rest, read)
            on_long_line(number, iter(long_line))
            number += 1
            rest, kept, block = [], 0, long_line.after
            continue
        block = read(BLOCK)
    if kept:
        lines.append(b"".join(rest))
    if lines:
        yield Batch(number, lines)


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


class _LongLine:
    """The parts of a line that is not kept in memory; ``after`` is what was read behind its end."""

    def __init__(self, parts: list[bytes], read: Read) -> None:
        self._parts = parts
        self._read = read
        self.after = b""

    def __iter__(self) -> Iterator[bytes]:
        yield from self._parts
        while block := self._read(BLOCK):
            part, end, self.after = block.partition(b"\n")
            yield part
            if end:
                self.after = self.after or self._read(BLOCK)
                return
