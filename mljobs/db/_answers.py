"""The rows that a statement returned; with psycopg, Python values are made when they are asked for.

A busy worker claims a thousand jobs and looks at two columns of each; the values of all columns would take longer to make
than all else that it does around a job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import psycopg

Row = Any  # a sequence of values


class Conversion(Protocol):
    """What the types of a statement do to what the driver gives."""

    def row(self, raw: Sequence[Any]) -> Row:
        """Return the Python values of a row."""

    def process_of(self, at: int) -> Callable[[Any], Any] | None:
        """Return what makes Python values of one column; None where nothing is to be done."""


class Answer(Protocol):
    """The rows that a statement returned."""

    def __len__(self) -> int:
        """How many rows."""

    def rows(self) -> list[Row]:
        """Return the Python values of all rows."""

    def row(self, at: int) -> Row:
        """Return the Python values of a row."""

    def column(self, at: int) -> list[Any]:
        """Return the Python values of a column, of all rows."""


class RowsAnswer:
    """An answer whose rows the driver has read.

    Args:
        rows: As the driver gives them.
        conversion: Of the statement; None where the rows hold Python values.
    """

    def __init__(self, rows: Sequence[Sequence[Any]], conversion: Conversion | None = None) -> None:
        self._rows = rows
        self._conversion = conversion

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def raw(self) -> Sequence[Sequence[Any]]:
        """The rows as the driver gave them."""
        return self._rows

    def ordered(self, key: Callable[[Sequence[Any]], Any]) -> RowsAnswer:
        """Return the same rows in another order.

        Args:
            key: Takes a row as the driver gave it.
        """
        return RowsAnswer(sorted(self._rows, key=key), self._conversion) if len(self._rows) > 1 else self

    def rows(self) -> list[Row]:
        """Return the Python values of all rows."""
        read = list if self._conversion is None else self._conversion.row
        return [read(row) for row in self._rows]

    def row(self, at: int) -> Row:
        """Return the Python values of a row."""
        return list(self._rows[at]) if self._conversion is None else self._conversion.row(self._rows[at])

    def column(self, at: int) -> list[Any]:
        """Return the Python values of a column, of all rows."""
        process = None if self._conversion is None else self._conversion.process_of(at)
        values = map(itemgetter(at), self._rows)
        return list(values if process is None else map(process, values))


class UnreadAnswer:
    """An answer of psycopg: the text that the server sent, of which a value is made when somebody asks for it.

    Args:
        connection: Whose types make the values.
        result: What the server sent.
        conversion: Of the statement.
    """

    def __init__(self, connection: psycopg.Connection[Any], result: Any, conversion: Conversion) -> None:
        from psycopg.adapt import Transformer  # noqa: PLC0415 - SQLite does without psycopg

        self._result = result
        self._conversion = conversion
        self._transformer = Transformer.from_context(connection)
        self._transformer.set_pgresult(result)

    def __len__(self) -> int:
        return int(self._result.ntuples)

    def rows(self) -> list[Row]:
        """Return the Python values of all rows."""
        return [self.row(at) for at in range(len(self))]

    def row(self, at: int) -> Row:
        """Return the Python values of a row."""
        return self._conversion.row(self._transformer.load_rows(at, at + 1, tuple)[0])

    def column(self, at: int) -> list[Any]:
        """Return the Python values of a column, of all rows."""
        result, process = self._result, self._conversion.process_of(at)
        load = self._transformer.get_loader(result.ftype(at), result.fformat(at)).load
        raw = [result.get_value(row, at) for row in range(result.ntuples)]
        values = {value: load(value) for value in set(raw) if value is not None}  # many columns have few values
        if process is not None:
            values = {value: process(made) for value, made in values.items()}
        return list(map(values.get, raw))
