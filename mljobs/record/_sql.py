"""Expressions for queries of records that mean the same on both databases."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from mljobs.errors import InvalidValueError
from mljobs.types import UtcMillis


class epoch_millis(FunctionElement[int]):
    """Epoch milliseconds of a ``UtcMillis`` column, as an integer, on both databases."""

    type = sa.BigInteger()
    inherit_cache = True
    name: Literal["epoch_millis"] = "epoch_millis"


@compiles(epoch_millis)
def _millis_of_integer(element: epoch_millis, compiler: SQLCompiler, **kw: Any) -> str:
    return compiler.process(element.clauses, **kw)


@compiles(epoch_millis, "postgresql")
def _millis_of_timestamp(element: epoch_millis, compiler: SQLCompiler, **kw: Any) -> str:
    return f"CAST(EXTRACT(EPOCH FROM {compiler.process(element.clauses, **kw)}) * 1000 AS BIGINT)"


class _Bucket(FunctionElement[datetime]):
    inherit_cache = True
    name: Literal["time_bucket"] = "time_bucket"


@compiles(_Bucket)
def _bucket_of_integer(element: _Bucket, compiler: SQLCompiler, **kw: Any) -> str:
    moment, seconds = (compiler.process(part, **kw) for part in element.clauses)
    return f"({moment} - {moment} % ({seconds} * 1000))"


@compiles(_Bucket, "postgresql")
def _bucket_of_timestamp(element: _Bucket, compiler: SQLCompiler, **kw: Any) -> str:
    moment, seconds = (compiler.process(part, **kw) for part in element.clauses)
    return f"to_timestamp(floor(extract(epoch FROM {moment}) / {seconds}) * {seconds})"


def time_bucket(moment: Any, width: timedelta) -> sa.ColumnElement[datetime]:
    """Return the expression for the beginning of the hour, day or other span that a time lies in, on both databases.

    Args:
        moment: A time of a record, e.g. ``MlJob.finished_at``.
        width: A whole number of seconds. Spans are counted from 1970-01-01 UTC, so days begin at midnight UTC.

    Raises:
        InvalidValueError: ``width`` is not a whole number of seconds above 0.

    Example:
        ``hour = time_bucket(MlJob.finished_at, timedelta(hours=1))``
    """
    if not isinstance(width, timedelta) or width < timedelta(seconds=1) or width.microseconds:
        raise InvalidValueError("width", width, "expected a timedelta of whole seconds, at least one")
    seconds = sa.literal_column(str(width.days * 86_400 + width.seconds), sa.BigInteger())
    bucket = _Bucket(moment, seconds)
    bucket.type = UtcMillis("time_bucket")
    return bucket


class _JsonNumber(FunctionElement[float | None]):
    type: sa.types.TypeEngine[float | None] = sa.Double()
    inherit_cache = True
    name: Literal["json_number"] = "json_number"


@compiles(_JsonNumber)
def _number_of_text(element: _JsonNumber, compiler: SQLCompiler, **kw: Any) -> str:
    column, key = (compiler.process(part, **kw) for part in element.clauses)
    # Of a key that stands there twice the last one counts, as for every JSON parser.
    return (
        f"(SELECT CAST(value AS REAL) FROM json_each({column}) WHERE key = {key}"  # noqa: S608 - compiled parts
        " AND type IN ('integer', 'real') ORDER BY id DESC LIMIT 1)"
    )


@compiles(_JsonNumber, "postgresql")
def _number_of_json(element: _JsonNumber, compiler: SQLCompiler, **kw: Any) -> str:
    column, key = (compiler.process(part, **kw) for part in element.clauses)
    number = f"CAST({column} ->> {key} AS DOUBLE PRECISION)"
    return f"CASE WHEN json_typeof({column} -> {key}) = 'number' AND {column} ->> {key} ~ '{_FITS}' THEN {number} END"


_FITS = r"^-?([0-9]{1,250}(\.[0-9]{1,250})?|[0-9]{1,17}(\.[0-9]{1,30})?[eE][-+]?([0-9]{1,2}|1[0-9]{2}|2[0-8][0-9]))$"
"""Numbers that DOUBLE PRECISION holds: a cast of any other would end the whole query."""


def json_number(column: Any, key: str) -> sa.ColumnElement[float | None]:
    """Return the expression for the number under a key of a JSON column, NULL where there is none, on both databases.

    A text or ``null`` under the key, which a plain cast would stumble over, counts as no number.
    """
    return _JsonNumber(column, sa.cast(sa.literal(key, sa.Text()), sa.Text()))


class _FirstLine(FunctionElement[str | None]):
    type: sa.types.TypeEngine[Any] = sa.Text()
    inherit_cache = True
    name: Literal["first_line"] = "first_line"


@compiles(_FirstLine)
def _first_line_by_instr(element: _FirstLine, compiler: SQLCompiler, **kw: Any) -> str:
    column = compiler.process(element.clauses, **kw)
    end = f"coalesce(nullif(instr({column}, char(10)), 0) - 1, length({column}))"
    return f"substr({column}, 1, {end})"


@compiles(_FirstLine, "postgresql")
def _first_line_by_split(element: _FirstLine, compiler: SQLCompiler, **kw: Any) -> str:
    return f"split_part({compiler.process(element.clauses, **kw)}, chr(10), 1)"


def first_line_of(column: Any) -> sa.ColumnElement[str | None]:
    """Return the expression for the first line of a text, on both databases."""
    return _FirstLine(column)
