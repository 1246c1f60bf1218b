"""``digest`` and ``check_digest``: one line for each day's finished records, to be kept where nobody can alter it.

A line is a JSON object. ``sha256`` is taken over the records that finished on that day (UTC), each as RedDB writes it and
with a line feed, in the order of their ids; so it is the same on both databases. ``chain`` is taken over the ``chain`` of
the line before and this line without its own, so no earlier line can be altered, removed or put in between unnoticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Final, Literal

import msgspec
from sqlalchemy import ColumnElement, Connection, bindparam, func, select

from mljobs._values import to_utc, utc_now
from mljobs.db._wire import Reader, more_sort_memory, sorted_reader, wire_of
from mljobs.errors import InvalidValueError
from mljobs.jobs import Bind, Model, table_of
from mljobs.jobs._base import connection_of, is_postgres
from mljobs.record._models import MlJob
from mljobs.states import TERMINAL
from mljobs.transfer._encoding import line_maker
from mljobs.transfer._results import OnProgress, Progress
from mljobs.transfer._rows import ID, SHARED, STATUS, Row, columns_of

_PART: Final = 250
_FINISHED: Final = frozenset(status.value for status in TERMINAL)
_DAY: Final = timedelta(days=1)
_FIRST_DAY: Final = date(1970, 1, 1)
_CHAIN_START: Final = "0" * 64
"""What stands before the first line of a chain."""


class DigestLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One line: of a day, or a note that older records were pruned.

    Attributes:
        day: The day of ``finished_at`` in UTC, as 2026-11-24; None for finished records without that time, which an import
            may have brought; unset in a note.
        finished: How many records have finished on it; unset in a note.
        sha256: Over these records, 64 hex digits; unset in a note.
        pruned_before: In a note: records that finished before this time were deleted on purpose.
        chain: Over the line before and this one; 64 hex digits.
    """

    day: str | msgspec.UnsetType | None = msgspec.UNSET
    finished: int | msgspec.UnsetType = msgspec.UNSET
    sha256: str | msgspec.UnsetType = msgspec.UNSET
    pruned_before: datetime | msgspec.UnsetType = msgspec.UNSET
    chain: str = ""

    def __str__(self) -> str:
        return _encode(self).decode()


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(DigestLine).decode


@dataclass(frozen=True, slots=True)
class _Content:
    """What the table holds of a day."""

    finished: int = 0
    sha256: str = ""

    def line(self, day: date | None, before: str) -> DigestLine:
        return _chained(DigestLine(day=_name(day), finished=self.finished, sha256=self.sha256), before)


def _name(day: date | None) -> str | None:
    return None if day is None else day.isoformat()


def _chained(line: DigestLine, before: str) -> DigestLine:
    content = _encode(msgspec.structs.replace(line, chain=""))
    return msgspec.structs.replace(line, chain=hashlib.sha256(before.encode() + content).hexdigest())


def read_digest(lines: Iterable[str | bytes]) -> list[DigestLine]:
    """Return the lines of a digest; blank ones are skipped.

    Raises:
        InvalidValueError: A line is none of a digest, or the chain is broken at it; the error names its number.
    """
    found: list[DigestLine] = []
    before = _CHAIN_START
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = _decode(text)
            if isinstance(line.day, str):
                date.fromisoformat(line.day)
        except (msgspec.MsgspecError, ValueError) as error:
            raise InvalidValueError("digest", text, f"line {number} is no line of a digest: {error}") from error
        if _chained(line, before).chain != line.chain:
            reason = f"the chain is broken at line {number}: it, or one before, was altered, removed or put in between"
            raise InvalidValueError("digest", str(line), reason)
        before = line.chain
        found.append(line)
    return found


def pruned_note(lines: Iterable[str | bytes], finished_before: datetime) -> DigestLine:
    """Return the line that says in a digest that older records were deleted on purpose; append it.

    Args:
        lines: The digest so far.
        finished_before: Records that had finished before this time were pruned.

    Raises:
        InvalidValueError: The digest is none, or ``finished_before`` is no time with a zone.
    """
    so_far = read_digest(lines)
    note = DigestLine(pruned_before=to_utc("finished_before", finished_before))
    return _chained(note, so_far[-1].chain if so_far else _CHAIN_START)


def digest(
    session: Bind,
    /,
    lines: Iterable[str | bytes] = (),
    *,
    before: date | None = None,
    undated: bool | None = None,
    on_line: Callable[[DigestLine], object] | None = None,
    progress: OnProgress | None = None,
    model: Model = MlJob,
) -> list[DigestLine]:
    """Return a line for each day on which records have finished, in order, up to yesterday.

    Days are found by the index of ``finished_at`` and read one after the other, in constant memory.

    Args:
        session: The caller's session or connection.
        lines: An earlier digest, to be continued: only the days after its last are read.
        before: Only days before this one; None for today in UTC by this machine's clock. Today is not over yet.
        undated: Whether a last line is of the records that are finished without ``finished_at``, if there are any; to find
            them the whole table is read. None: only where ``lines`` is empty.
        on_line: Is called with each line as it is made.
        progress: Is called after every few hundred records.
        model: The mapped job class.

    Raises:
        InvalidValueError: ``lines`` is no digest, or its chain is broken.
    """
    so_far = read_digest(lines)
    reader = _Days(session, model, progress)
    last = max((line.day for line in so_far if isinstance(line.day, str)), default=None)
    start = _FIRST_DAY if last is None else date.fromisoformat(last) + _DAY
    with_undated = undated or (undated is None and not so_far)
    chain = so_far[-1].chain if so_far else _CHAIN_START
    made: list[DigestLine] = []
    for day, content in reader.days(start, before or utc_now().date(), undated=with_undated):
        made.append(content.line(day, chain))
        chain = made[-1].chain
        if on_line is not None:
            on_line(made[-1])
    return made


DayState = Literal["equal", "different", "missing", "added", "pruned"]


@dataclass(frozen=True, slots=True)
class DigestCheck:
    """How the days of a digest stand in the table; None among them is for records without ``finished_at``.

    Attributes:
        equal: Days whose records are all as they were.
        different: Days with as many records, of which at least one was altered; and days that stand in the digest twice,
            with different sums.
        missing: Days with fewer records than the digest says, and no note that they were pruned.
        added: Days with more records than the digest says, or that it does not know: an import brought them, or a hand.
        pruned: Days with fewer records, before the time of a note.
    """

    equal: list[str | None] = field(default_factory=list)
    different: list[str | None] = field(default_factory=list)
    missing: list[str | None] = field(default_factory=list)
    added: list[str | None] = field(default_factory=list)
    pruned: list[str | None] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether every day is as it was, but for pruned ones."""
        return not (self.different or self.missing or self.added)

    def __str__(self) -> str:
        counts = (
            f"{len(getattr(self, name)):,} {name}" for name in ("equal", "different", "missing", "added", "pruned")
        )
        return "days: " + ", ".join(counts)


def check_digest(
    session: Bind, /, lines: Iterable[str | bytes], *, progress: OnProgress | None = None, model: Model = MlJob
) -> DigestCheck:
    """Compute the days of a digest anew, and say which differ.

    Args:
        session: The caller's session or connection.
        lines: The digest: an open file, or its lines.
        progress: Is called after every few hundred records.
        model: The mapped job class.

    Raises:
        InvalidValueError: ``lines`` is no digest, or its chain is broken.
    """
    listed = read_digest(lines)
    expected: dict[str | None, _Content] = {}
    twice: set[str | None] = set()
    notes: list[datetime] = []
    for line in listed:
        if isinstance(line.pruned_before, datetime):
            notes.append(line.pruned_before)
        elif (
            isinstance(line.finished, int)
            and isinstance(line.sha256, str)
            and not isinstance(line.day, msgspec.UnsetType)
        ):
            content = _Content(line.finished, line.sha256)
            # No run writes a day again; only the records without one are read again where that is asked for.
            if line.day is not None and expected.get(line.day, content) != content:
                twice.add(line.day)
            expected[line.day] = content
    limit = max(notes, default=None)
    days: set[date | None] = {None if day is None else date.fromisoformat(day) for day in expected}
    after_last = max((day for day in days if day is not None), default=_FIRST_DAY - _DAY) + _DAY
    # With those before and between, which the digest does not know.
    found = dict(_Days(session, model, progress).days(_FIRST_DAY, after_last, undated=None in days))
    result = DigestCheck()
    for day in sorted({*days, *found}, key=lambda day: day or date.max):
        state = _state(day, expected.get(_name(day), _Content()), found.get(day, _Content()), limit)
        if _name(day) in twice:
            state = "different"
        if state is not None:
            getattr(result, state).append(_name(day))
    return result


def _state(day: date | None, expected: _Content, found: _Content, limit: datetime | None) -> DayState | None:
    if found.finished == expected.finished:
        if not found.finished:  # something that has not finished has the time of that day
            return None
        return "equal" if found.sha256 == expected.sha256 else "different"
    if found.finished > expected.finished:
        return "added"
    return "pruned" if limit is not None and (day is None or _midnight(day) < limit) else "missing"


class _Days:
    """Reads the finished records day by day."""

    def __init__(self, session: Bind, model: Model, progress: OnProgress | None) -> None:
        self._connection: Connection = connection_of(session, model)
        is_postgres(self._connection)
        self._table = table_of(model)
        self._columns = columns_of(model)[:SHARED]
        self._lines = line_maker(wire_of(self._connection), extended=False)
        self._progress = progress
        self._records = 0
        finished_at = self._table.c.finished_at
        start, end = (bindparam(name, None, type_=finished_at.type) for name in ("start", "end"))
        self._in_span = [finished_at >= start, finished_at < end]
        self._first = select(func.min(finished_at)).where(*self._in_span)

    def days(self, start: date, end: date, *, undated: bool) -> Iterator[tuple[date | None, _Content]]:
        """Yield each day on which something has finished, and what the table holds of it.

        Args:
            start: The first day.
            end: The day after the last.
            undated: Whether what has finished without a day comes last, under None.
        """
        with more_sort_memory(self._connection):
            rows_of = self._rows_by_id(*self._in_span)
            day = self._first_day(start, end)
            while day is not None and day < end:
                content = self._content(rows_of(_span(day, day + _DAY)))
                if content.finished:
                    yield day, content
                day += _DAY
                # The day after mostly has records too: it is looked for only behind one that has none.
                if not content.finished:
                    day = self._first_day(day, end)
            if undated:
                status, finished_at = self._table.c.status, self._table.c.finished_at
                content = self._content(self._rows_by_id(status.in_(TERMINAL), finished_at.is_(None))({}))
                if content.finished:
                    yield None, content

    def _first_day(self, start: date, end: date) -> date | None:
        """Return the first day from ``start``, before ``end``, on which anything has ``finished_at``; by index."""
        moment: datetime | None = self._connection.execute(self._first, _span(start, end)).scalar()
        return None if moment is None else moment.date()

    def _content(self, parts: Iterator[list[Row]]) -> _Content:
        total, sha256 = 0, hashlib.sha256()
        for rows in parts:
            finished = [row for row in rows if row[STATUS] in _FINISHED]  # a third of the time that SQLite takes for it
            sha256.update(self._lines(finished))
            total += len(finished)
            self._records += len(finished)
            if self._progress is not None:
                self._progress(Progress(self._records))
        return _Content(total, sha256.hexdigest())

    def _rows_by_id(self, *where: ColumnElement[bool]) -> Reader:
        return sorted_reader(self._connection, self._columns, where, self._columns[ID], _PART)


def _span(start: date, end: date) -> dict[str, datetime]:
    return {"start": _midnight(start), "end": _midnight(end)}


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)
