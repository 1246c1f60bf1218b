"""Read a table beside a file, in the order in which the database has its rows: nearly always that of the file.

To look each id up takes as long again as to read. A range is read at once, so that the connection can be free between two:
on SQLite so many rows from a rowid on, on PostgreSQL so many pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, Text, bindparam, cast, func, literal_column, select
from sqlalchemy.types import UserDefinedType

from mljobs.db._wire import wire_reader
from mljobs.guards._companions import qualified_name
from mljobs.states import TERMINAL
from mljobs.transfer._encoding import line_maker
from mljobs.transfer._lines import lines_of
from mljobs.transfer._rows import ID, SHARED, STATUS, Row, without_host_part

if TYPE_CHECKING:
    from sqlalchemy import Column, Connection

    from mljobs.db._wire import Wire

_LOST: Final = 8
"""After so many parts of the table without a line of the file the orders have parted."""
_ATTEMPTS: Final = 3
_WORTH: Final = 5_000
"""So many matches are worth another attempt."""
OWN_KEY: Final = b'"attempts":'
"""In a line of an extended export."""

_PART: Final = 250
_BYTES: Final = 4 << 20
"""About so many bytes of lines are one range, and may be kept in memory."""
_LONGEST_RANGE: Final = 8_192
_TID_RANGES_SINCE: Final = (14,)
_FINISHED: Final = frozenset(status.value for status in TERMINAL)
_PAGE: Final = "(ctid::text::point)[0]::bigint"


class _Tid(UserDefinedType[str]):
    """PostgreSQL's place of a row: page and number."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        return "TID"


def has_order(connection: Connection, column: Column[Any]) -> bool:
    """Whether the database can read a range of the rows of this column's table in their order."""
    dialect = connection.dialect
    if dialect.name == "postgresql":
        return (dialect.server_version_info or ()) >= _TID_RANGES_SINCE
    return bool(column.table.dialect_options["sqlite"]["with_rowid"])


class TableLines:
    """The finished records of a table as an export writes them.

    Args:
        connection: The caller's.
        columns: What a line holds, as ``columns_of`` has them.
        make_lines: Returns the lines of some rows, each with its line feed.
    """

    def __init__(
        self, connection: Connection, columns: Sequence[Column[Any]], make_lines: Callable[[list[Row]], bytes]
    ) -> None:
        self._connection = connection
        self._id = columns[ID]
        self._make_lines = make_lines
        if connection.dialect.name == "postgresql":
            self._ranges_after = self._pages
            tid: Any = literal_column("ctid")
            first, end = (cast(cast(bindparam(name, None, type_=Text()), Text), _Tid) for name in ("first", "end"))
            self._read = wire_reader(connection, columns, [tid >= first, tid < end], _PART)
        else:
            self._ranges_after = self._rowids
            rowid: Any = literal_column("rowid", BigInteger())
            after, length = (bindparam(name, None, type_=BigInteger()) for name in ("after", "length"))
            self._read = wire_reader(connection, columns, [rowid > after], _PART, order_by=rowid, limit=length)
        self._length = 16
        """Of the next range: pages, or parts of so many rows."""
        self.start(None)

    def start(self, after: Any) -> None:
        """Begin at the first row, for None; or about at that of an id."""
        self._range: Iterator[list[Row]] = iter(())
        self._kept: list[list[Row]] = []
        self._bytes = 0
        self._ranges = self._ranges_after(after)

    def next(self) -> tuple[bytes, int]:
        """Return some lines, each with its line feed, and how many; none at the end."""
        while True:
            rows = self._kept.pop(0) if self._kept else next(self._range, None)
            if rows is None:
                following = next(self._ranges, None)
                if following is None:
                    return b"", 0
                self._range = following
                continue
            finished = [row for row in rows if row[STATUS] in _FINISHED]
            lines = self._make_lines(finished)
            self._bytes += len(lines)
            if lines:
                return lines, len(finished)

    def settle(self) -> None:
        """Read the present range to its end, which leaves the connection to another statement."""
        self._kept += self._range

    def _adapt(self) -> None:
        """Let the next range be longer or shorter, by how long the lines of the last were."""
        self._length = max(1, self._length // 2) if self._bytes > _BYTES else min(_LONGEST_RANGE, self._length * 2)
        self._bytes = 0

    def _place_of(self, expression: str, job_id: Any) -> Any:
        found = select(literal_column(expression, BigInteger())).select_from(self._id.table)
        return self._connection.execute(found.where(self._id == job_id)).scalar()

    def _pages(self, after: Any) -> Iterator[Iterator[list[Row]]]:
        name = qualified_name(self._connection, self._id.table)
        size = func.pg_relation_size(name) / func.current_setting("block_size").cast(BigInteger())
        end = int(self._connection.execute(select(size)).scalar_one())
        page = 0 if after is None else self._place_of(_PAGE, after) or 0
        while page < end:
            following = page + self._length
            yield self._read({"first": f"({page},0)", "end": f"({following},0)"})
            page = following
            self._adapt()

    def _rowids(self, after: Any) -> Iterator[Iterator[list[Row]]]:
        rowid = -(1 << 63) if after is None else self._place_of("rowid", after) or 0
        while rowid is not None:
            number, last = 0, None

            def counted(given: dict[str, Any]) -> Iterator[list[Row]]:
                nonlocal number, last
                for rows in self._read(given):
                    number, last = number + len(rows), rows[-1][ID]
                    yield rows

            length = self._length * _PART
            yield counted({"after": rowid, "length": length})
            rowid = None if number < length else self._place_of("rowid", last)
            self._adapt()


class Alongside:
    """Reads a table beside a file for as long as both have the same order.

    Args:
        connection: The caller's.
        columns: Of the table, as ``columns_of`` has them.
        wire: The form that the driver gives.
    """

    def __init__(self, connection: Connection, columns: Sequence[Column[Any]], wire: Wire) -> None:
        self._connection = connection
        self._columns = columns
        self._wire = wire
        self._table: TableLines | None = None
        self._ahead, self._ahead_number = b"", 0
        """Lines of the table that come next, and how many."""
        self._attempts = _ATTEMPTS if has_order(connection, columns[ID]) else 0
        self._lost = False
        self._is_exact = True
        """Whether lines are of the record alone."""
        self._matched = 0
        """Since the table was last started."""

    @property
    def seeks(self) -> bool:
        """Whether the orders have parted, and ``find_again`` may bring them together."""
        return self._lost and self._attempts > 0

    def next_lines(self) -> tuple[bytes, int]:
        """Return what a file of the same order has next, and how many lines that is; nothing where it may have another."""
        if self._lost or self._table is None or not self._is_exact:
            return b"", 0
        if not self._ahead:
            self._ahead, self._ahead_number = self._table.next()
        return self._ahead, self._ahead_number

    def pass_lines(self) -> None:
        """Go on behind ``next_lines``: the file has them too."""
        self._matched += self._ahead_number
        self._ahead = b""

    def compare(self, lines: list[bytes]) -> list[int]:
        """Return the places of the lines that the table does not have next; they may be elsewhere, or differ."""
        if self._lost or not self._attempts:
            return list(range(len(lines)))
        extended = OWN_KEY in lines[0]
        if self._table is None:
            columns = self._columns if extended else self._columns[:SHARED]
            self._table = TableLines(self._connection, columns, line_maker(self._wire, extended=extended))
        if extended:
            without = [without_host_part(line) for line in lines]
            self._is_exact, lines = without == lines, without
        others = self._search(self._table, lines)
        if others:
            self._table.settle()
        return others

    def _search(self, table: TableLines, lines: list[bytes]) -> list[int]:
        others: list[int] = []
        ahead = lines_of(self._ahead)
        at, without, before = 0, 0, self._matched
        while at < len(lines):
            ahead = ahead or lines_of(table.next()[0])
            number = min(len(ahead), len(lines) - at)
            if not number or without > _LOST:
                self._lost = True
                break
            if ahead[:number] == lines[at : at + number]:
                ahead = ahead[number:]
                at, without, self._matched = at + number, 0, self._matched + number
                continue
            here = {line: place for place, line in enumerate(ahead)}
            found = [place for place in range(at, at + number) if lines[place] in here]
            if found:
                matched = {*found}
                others += [place for place in range(at, found[-1]) if place not in matched]
                ahead = ahead[max(here[lines[place]] for place in found) + 1 :]
                at, without, self._matched = found[-1] + 1, 0, self._matched + len(found)
            elif number < len(ahead):  # too few to say that the table is elsewhere
                self._lost = self._matched == before
                break
            else:
                ahead, without = [], without + 1
        self._ahead, self._ahead_number = b"".join(line + b"\n" for line in ahead), len(ahead)
        return [*others, *range(at, len(lines))]

    def settle(self) -> None:
        """Leave the connection to other statements."""
        if self._table is not None:
            self._table.settle()

    def find_again(self, job_id: Any) -> None:
        """Go on beside a record that both have, if the orders had parted.

        Args:
            job_id: Of the record, in the driver's form; None where none is known.
        """
        if not self._lost or self._table is None or job_id is None:
            return
        self._attempts = _ATTEMPTS if self._matched > _WORTH else self._attempts - 1
        self._matched, self._ahead, self._lost = 0, b"", False
        self._table.start(self._wire.id_out(job_id))
