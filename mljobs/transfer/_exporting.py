"""``export_jobs``: the table as NDJSON."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Unpack

from sqlalchemy import Column, ColumnElement, Connection
from sqlalchemy.util import await_only

from mljobs.db._wire import read_wire, wire_of
from mljobs.jobs import Bind, Filter, Filters, Model, Where, conditions
from mljobs.jobs._base import connection_of, is_postgres
from mljobs.record._host_columns import host_columns
from mljobs.record._models import MlJob
from mljobs.transfer._encoding import line_maker
from mljobs.transfer._files import File, writing
from mljobs.transfer._host_values import HostValues
from mljobs.transfer._results import OnProgress, Progress
from mljobs.transfer._rows import ID, SHARED, Row, columns_of

_PART: Final = 250
"""Rows at once: as many as stay in the processor's cache from row to line."""


def export_jobs(
    session: Bind,
    /,
    file: File,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    extended: bool = False,
    progress: OnProgress | None = None,
    model: Model = MlJob,
    **fields: Unpack[Filters],
) -> int:
    """Write records as NDJSON, one a line, byte for byte as RedDB writes them, in constant memory.

    All are of one moment, in the order in which the database has them.

    Args:
        session: The caller's session or connection.
        file: A path, ``"-"`` for standard output, or an open file, binary or text. A path that ends in ``.gz`` or
            ``.zst`` is compressed. Under a path the file appears when it is whole.
        filter: A :class:`~mljobs.Filter`, or its text; None for all jobs.
        where: SQLAlchemy expressions of one's own beside it.
        extended: Write our own columns too, under keys that RedDB ignores, and those of a host's class under
            ``columns``; the import of such a file is lossless.
        progress: Is called after every few hundred records.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.

    Returns:
        How many.

    Raises:
        InvalidValueError: No such filter, or a value that it cannot take; or ``file`` is no file.
        TransferError: The file cannot be written to its end.
        OSError: The path cannot be opened.
    """
    chosen = conditions(model, filter, where=where, **fields)
    rows_of = rows_reader(session, chosen, extended=extended, model=model)
    with closing(rows_of.parts()) as parts, writing(file) as sink:
        for rows in parts:
            sink.write(rows_of.lines(rows))
            sink.records += len(rows)
            if progress is not None:
                progress(Progress(sink.records))
    return sink.records


@dataclass(frozen=True, slots=True)
class RowsReader:
    """The records that pass some filters, in parts.

    Attributes:
        parts: Begins to read; close what it returns, for the connection is busy until then.
        lines: Returns the lines of some rows, each with its line feed.
        id_of: Returns the 32 hex digits of a row.
    """

    parts: Callable[[], Generator[list[Row], None, None]]
    lines: Callable[[list[Row]], bytes]
    id_of: Callable[[Row], str]


def rows_reader(session: Bind, where: Sequence[ColumnElement[bool]], *, extended: bool, model: Model) -> RowsReader:
    """Return what reads the records for which all of ``where`` holds."""
    connection = connection_of(session, model)
    is_postgres(connection)
    columns = columns_of(model) if extended else columns_of(model)[:SHARED]
    host = HostValues(model) if extended and host_columns(model) else None
    wire = wire_of(connection, copied=host is None)
    beside = [] if host is None else host.expressions(connection.dialect)
    return RowsReader(
        partial(_parts, connection, columns, where, beside),
        line_maker(wire, extended=extended, host=host),
        lambda row: wire.id_out(row[ID]),
    )


def _parts(
    connection: Connection,
    columns: Sequence[Column[Any]],
    where: Sequence[ColumnElement[bool]],
    beside: Sequence[ColumnElement[Any]],
) -> Generator[list[Row], None, None]:
    with closing(read_wire(connection, columns, where, _PART, beside=beside)) as parts:
        for rows in parts:
            yield rows
            if connection.dialect.is_async:
                await_only(asyncio.sleep(0))  # let others run: rows may be there as fast as they are asked for
