"""The results of an import: its counts, and the problem of each line that was not imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

KEPT_PROBLEMS = 100
"""So many problems are kept in memory; the rejects file has all."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A line that was not imported.

    Attributes:
        line: Its number in the file, from 1; of a KV store the number of the key in the order of reading.
        field: The KV key at fault; None where the line as a whole is.
        reason: What is wrong with it.
        key: The key in the KV store; None for a file.
    """

    line: int
    field: str | None
    reason: str
    key: str | None = None

    def __str__(self) -> str:
        place = f"line {self.line}" if self.key is None else f"key {self.key!r}"
        return f"{place}: {self.reason}" if self.field is None else f"{place}: field {self.field!r}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did. Each line that is not blank is counted once.

    Attributes:
        inserted: New records.
        updated: Records that were there, alive, and are now as the file says.
        skipped: Records that were there and stay as they are: equal ones, and live ones under ``"skip"``.
        refused: Records that would have changed a finished one, made an illegal step, or changed a job that a worker
            holds. Nothing was written.
        rejected: Lines that are no record, or that no database can hold.
        rejects: The file with the refused and rejected lines; None where there are none.
        problems: The first hundred of them.
    """

    inserted: int = 0
    updated: int = 0
    skipped: int = 0
    refused: int = 0
    rejected: int = 0
    rejects: Path | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def total(self) -> int:
        """All lines that were read, blank ones left out."""
        return self.inserted + self.updated + self.skipped + self.refused + self.rejected

    @property
    def complete(self) -> bool:
        """Whether nothing was refused or rejected."""
        return not self.refused and not self.rejected

    def __str__(self) -> str:
        parts = ", ".join(
            f"{getattr(self, name):,} {name}" for name in ("inserted", "updated", "skipped", "refused", "rejected")
        )
        return f"{self.total:,} records: {parts}" + (f" (see {self.rejects})" if self.rejects is not None else "")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer is.

    Attributes:
        records: Records, or lines, so far.
        read: Bytes of the input so far; None where nobody counts them.
        size: Bytes of the input in all; None where unknown.
    """

    records: int
    read: int | None = None
    size: int | None = None


OnProgress = Callable[[Progress], object]
"""Is called after each part of a transfer, some thousand records long."""
