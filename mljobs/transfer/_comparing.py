"""``compare``: compare the finished records of a file with those of the table, for changes that no guard can stop."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from sqlalchemy import Connection

from mljobs._values import to_millis, to_utc
from mljobs.db._wire import Wire, wire_of
from mljobs.jobs import Bind, Model
from mljobs.jobs._base import connection_of, is_postgres
from mljobs.record._models import MlJob
from mljobs.states import TERMINAL
from mljobs.transfer._alongside import OWN_KEY, Alongside
from mljobs.transfer._encoding import line_maker
from mljobs.transfer._files import File, reading
from mljobs.transfer._judging import differences
from mljobs.transfer._lines import BATCH_BYTES, Lines, LongLine, lines_of
from mljobs.transfer._results import KEPT_PROBLEMS, OnProgress, Problem, Progress
from mljobs.transfer._rows import (
    CREATED,
    FINISHED,
    ID,
    KEYS,
    NAMES,
    SHARED,
    STARTED,
    STATUS,
    RejectedLineError,
    Row,
    columns_of,
    own_keys,
    row_maker,
    rows_by_id,
    without_host_part,
)

KEPT_IDS: Final = 1000
"""So many ids of each kind are kept in memory; ``on_difference`` is called for all."""

_FINISHED_TOKENS: Final = frozenset(status.value for status in TERMINAL)
_BLANK: Final = b" \t\r"
_ID: Final = re.compile(rb'"id":"([0-9a-f]{32})"')
"""The id in a line of an export. No text in it can hold these quotes, for they would be escaped."""
_PART: Final = 1000
"""Lines to look up at once: as many as stay in the processor's cache, and enough for a statement to be worth it."""

Numbered = list[tuple[int, bytes]]
"""Lines, each with its number in the file, from 1."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A finished record of the file that the table does not have as it is there.

    Attributes:
        id: Of the record.
        what: ``"different"``, ``"missing"`` or ``"pruned"``.
        keys: With ``"different"``, the keys of the line whose values are others; never the values.
        line: Its number in the file, from 1.
    """

    id: UUID
    what: Literal["different", "missing", "pruned"]
    keys: tuple[str, ...] = ()
    line: int = 0

    def __str__(self) -> str:
        return f"{self.what} {self.id}" + (f" ({', '.join(self.keys)})" if self.keys else "")


@dataclass(frozen=True, slots=True)
class Compared:
    """How the finished records of a file stand in the table. Each line that is not blank is counted once.

    Attributes:
        equal: How many are there and say the same.
        different: Ids of those that say something else, in the order of the file; the first thousand.
        missing: Ids of those that are not there; the first thousand.
        different_count: How many are different.
        missing_count: How many are missing.
        pruned: How many are not there because they had finished before ``finished_before``.
        unfinished: How many records of the file had not finished when it was written; they are not compared.
        unreadable: How many lines are no record.
        problems: The first hundred of these.
    """

    equal: int = 0
    different: tuple[UUID, ...] = ()
    missing: tuple[UUID, ...] = ()
    different_count: int = 0
    missing_count: int = 0
    pruned: int = 0
    unfinished: int = 0
    unreadable: int = 0
    problems: tuple[Problem, ...] = ()

    @property
    def total(self) -> int:
        """All lines that were read, blank ones left out."""
        finished = self.equal + self.different_count + self.missing_count + self.pruned
        return finished + self.unfinished + self.unreadable

    @property
    def same(self) -> bool:
        """Whether every finished record of the file is in the table as the file says, but for pruned ones."""
        return not (self.different_count or self.missing_count or self.unreadable)

    def __str__(self) -> str:
        counts = {
            "equal": self.equal,
            "different": self.different_count,
            "missing": self.missing_count,
            "pruned": self.pruned,
            "not finished then": self.unfinished,
            "unreadable": self.unreadable,
        }
        return f"{self.total:,} records: " + ", ".join(f"{number:,} {name}" for name, number in counts.items())


OnDifference = Callable[[Difference], object]
"""Is called for each record that is different, missing or pruned, in the order of the file."""


def compare(
    session: Bind,
    /,
    file: File,
    *,
    finished_before: datetime | None = None,
    on_difference: OnDifference | None = None,
    progress: OnProgress | None = None,
    model: Model = MlJob,
) -> Compared:
    """Compare the finished records of a file that ``export_jobs`` wrote earlier with those of the table.

    A finished record never changes, so each must be there, byte for byte as the file says. What the file does not say,
    our own columns in an export without ``extended``, is not compared; nor are a host's own, which may change. Reads the
    table by primary key, some thousand ids at a time: memory stays the same at any length.

    Args:
        session: The caller's session or connection.
        file: A path, ``"-"`` for standard input, or an open file. A compressed one is known by its name (``.gz``,
            ``.zst``) or by its first bytes.
        finished_before: Records that are not there count as pruned if they had finished before this time (one without
            ``finished_at``: was created). None: they are missing.
        on_difference: Is called for each record that is different, missing or pruned.
        progress: Is called after every few hundred lines.
        model: The mapped job class.

    Raises:
        InvalidValueError: ``file`` is no file, or ``finished_before`` no time with a zone.
        TransferError: The file cannot be read to its end.
        OSError: The file cannot be opened.
    """
    limit = None if finished_before is None else to_millis(to_utc("finished_before", finished_before))
    connection = connection_of(session, model)
    is_postgres(connection)
    comparison = _Comparison(connection, model, limit, on_difference)
    with reading(file) as source:
        lines = Lines(source.read)
        while comparison.add(lines):
            source.records = comparison.lines
            if progress is not None:
                progress(Progress(comparison.lines, source.position(), source.size))
        comparison.finish()
    return comparison.result


@dataclass(slots=True)
class _Found:
    """The records of one kind: how many, and the ids of the first."""

    count: int = 0
    ids: list[UUID] = field(default_factory=list)

    def add(self, job_id: UUID) -> None:
        self.count += 1
        if len(self.ids) < KEPT_IDS:
            self.ids.append(job_id)


class _Comparison:
    """Counts what is found, batch by batch."""

    def __init__(
        self, connection: Connection, model: Model, limit: int | None, on_difference: OnDifference | None
    ) -> None:
        self._connection = connection
        self._wire: Wire = wire_of(connection)
        self._columns = columns_of(model)
        self._limit = limit
        self._on_difference = on_difference
        self._beside_the_table = Alongside(connection, self._columns, self._wire)
        self._met_own_keys = False
        self._make = row_maker(self._wire, model.__kinds__, on_own_keys=self._note_own_keys)
        self._equal = self._unfinished = self._unreadable_count = 0
        self._found: dict[str, _Found] = {what: _Found() for what in ("different", "missing", "pruned")}
        self._problems: list[Problem] = []
        self._others: Numbered = []
        """Lines to be looked up by their ids."""
        self._others_bytes = 0
        self.lines = 0

    @property
    def result(self) -> Compared:
        different, missing = self._found["different"], self._found["missing"]
        return Compared(
            equal=self._equal,
            different=tuple(different.ids),
            missing=tuple(missing.ids),
            different_count=different.count,
            missing_count=missing.count,
            pruned=self._found["pruned"].count,
            unfinished=self._unfinished,
            unreadable=self._unreadable_count,
            problems=tuple(self._problems),
        )

    def _note_own_keys(self) -> None:
        self._met_own_keys = True

    def finish(self) -> None:
        """Look up what is left, and leave the connection to other statements."""
        self._look_up()
        self._beside_the_table.settle()

    def add(self, lines: Lines) -> bool:
        """Compare some lines; return False at the end of the file."""
        expected, number = self._beside_the_table.next_lines()
        if expected:
            # Byte by byte: to split lines, or only to count them, takes a fifth of the time in which a row becomes one.
            data = lines.take(len(expected))
            if data == expected:
                self._beside_the_table.pass_lines()
                self._equal += number
                self.lines += number
                return True
            lines.put_back(data)
        block = lines.block()
        if isinstance(block, LongLine):
            self._look_up()
            self.lines += 1
            self._unreadable(Problem(self.lines, None, "too long to be a record"))
            for _ in block:  # the reading goes on behind its end
                pass
        elif block:
            self._add_one_by_one(lines_of(block))
            if len(self._others) >= _PART or self._others_bytes >= BATCH_BYTES or self._beside_the_table.seeks:
                self._look_up()
        return bool(block)

    def _add_one_by_one(self, lines: list[bytes]) -> None:
        others = self._beside_the_table.compare(lines)
        self._equal += len(lines) - len(others)
        self._others += [(self.lines + 1 + at, lines[at]) for at in others]
        self._others_bytes += sum(len(lines[at]) for at in others)
        self.lines += len(lines)

    def _unreadable(self, problem: Problem) -> None:
        """Count a line that is no record."""
        self._unreadable_count += 1
        if len(self._problems) < KEPT_PROBLEMS:
            self._problems.append(problem)

    def _look_up(self) -> None:
        """Compare by their ids the lines that the table does not have where the file has them."""
        lines, self._others, self._others_bytes = self._others, [], 0
        if not lines:
            return
        self._beside_the_table.settle()
        last_id: Any = None
        for start in range(0, len(lines), _PART):
            others, last_id = self._not_equal_as_text(lines[start : start + _PART])
            self._compare_rows(others)
        self._beside_the_table.find_again(last_id)

    def _not_equal_as_text(self, lines: Numbered) -> tuple[Numbered, Any]:
        """Count the lines that an export would write so now; return the others, and an id that is there.

        Nearly all lines are of these, and to write a row costs a third of reading a line.
        """
        extended = OWN_KEY in lines[0][1]
        columns = self._columns if extended else self._columns[:SHARED]
        found = [_ID.search(line) for _, line in lines]
        ids = [None if match is None else self._wire.id_in(match[1].decode()) for match in found]
        there = list(rows_by_id(self._connection, columns, [job_id for job_id in ids if job_id is not None]).values())
        texts = line_maker(self._wire, extended=extended)(there).split(b"\n")
        written = {row[ID]: text for row, text in zip(there, texts, strict=False) if row[STATUS] in _FINISHED_TOKENS}
        others = [
            (number, line)
            for (number, line), job_id in zip(lines, ids, strict=True)
            if written.get(job_id) != (without_host_part(line) if extended else line)
        ]
        self._equal += len(lines) - len(others)
        return others, next((job_id for job_id in reversed(ids) if job_id in written), None)

    def _compare_rows(self, lines: Numbered) -> None:
        """Compare lines value by value."""
        self._met_own_keys = False
        finished: list[tuple[int, bytes, Row]] = []
        for number, line in lines:
            try:
                row = self._make(line)
            except RejectedLineError as error:
                if line.strip(_BLANK):
                    self._unreadable(Problem(number, error.field, error.reason))
                continue
            if row[STATUS] in _FINISHED_TOKENS:
                finished.append((number, line, row))
            else:
                self._unfinished += 1
        there = rows_by_id(self._connection, self._columns, [row[ID] for _, _, row in finished])
        for number, line, row in finished:
            self._judge(number, line, row, there.get(row[ID]))

    def _judge(self, number: int, line: bytes, row: Row, present: Row | None) -> None:
        keys: list[str] = []
        what: Literal["different", "missing", "pruned"]
        if present is None:
            what = "pruned" if self._is_past(row) else "missing"
        else:
            own = own_keys(line) if self._met_own_keys else frozenset[str]()
            places = [
                place for place in differences(present, row, own) if own or not self._is_epoch(present, row, place)
            ]
            keys = [KEYS[place] if place < SHARED else NAMES[place] for place in places]
            if not keys:  # what differs is what the line does not say
                self._equal += 1
                return
            what = "different"
        difference = Difference(UUID(hex=self._wire.id_out(row[ID])), what, tuple(keys), number)
        self._found[what].add(difference.id)
        if self._on_difference is not None:
            self._on_difference(difference)

    def _is_epoch(self, present: Row, row: Row, place: int) -> bool:
        """Whether a time is 1970-01-01 itself, where RedDB's format writes 0 for "not yet" as well."""
        return place in (STARTED, FINISHED) and row[place] is None and present[place] == self._wire.time_in(0)

    def _is_past(self, row: Row) -> bool:
        if self._limit is None:
            return False
        ended = row[CREATED] if row[FINISHED] is None else row[FINISHED]
        return self._wire.time_out(ended) < self._limit
