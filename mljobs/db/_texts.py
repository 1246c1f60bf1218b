"""Read texts that are no UTF-8. SQLite stores any bytes; Python's driver then refuses the whole result.

No CHECK can tell: SQLite has no function that does, and to look at each byte costs more than the write. So such a text is
read with U+FFFD in the place of what is wrong. For that the driver has to call Python for each text; hence it begins when
the first such text is met, for the engine that has met it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.engine import Engine

from mljobs._fields import FIELDS
from mljobs._logging import logger_of
from mljobs.guards._beside import tables_beside
from mljobs.guards._errors import known_tables

if TYPE_CHECKING:
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.pool import Pool

log = logger_of(__name__)

_COLUMN = re.compile(r"column '(.*?)' with text")
_NO_UTF8 = "Could not decode to UTF-8"
_AROUND = 8
_NOTE = "mljobs: this text was written past every driver of Python; from now on it is read with U+FFFD, so run it again"
_COLUMNS = [field.name for field in FIELDS if field.form in ("text", "json")]
_lenient_pools: WeakSet[Pool] = WeakSet()


def is_no_utf8(error: BaseException | None) -> bool:
    """Whether SQLite's driver has met a text that is no UTF-8."""
    return str(error).startswith(_NO_UTF8)


@event.listens_for(Engine, "handle_error")
def _read_leniently(context: ExceptionContext) -> None:
    connection, error = context.connection, context.sqlalchemy_exception
    if not is_no_utf8(context.original_exception) or connection is None or error is None:
        return
    if not _is_ours(str(context.original_exception)):
        return
    error.add_note(_NOTE)
    _be_lenient(connection.connection.dbapi_connection)
    pool = connection.engine.pool
    if pool not in _lenient_pools:
        _lenient_pools.add(pool)
        event.listen(pool, "checkout", _be_lenient)


def _is_ours(message: str) -> bool:
    """Whether a column of a job table, of one beside it, or of the view was met; of a fetch no statement is told."""
    found = _COLUMN.search(message)
    column = found[1] if found else message
    if column == "error" or any(name in column for name in _COLUMNS):
        return True
    tables = [each for jobs in known_tables() for each in (jobs, *tables_beside(jobs))]
    return any(column in (one.name, f"{one.table.name}_{one.name}") for table in tables for one in table.c)


def _be_lenient(dbapi_connection: Any, *_: object) -> None:
    driver = getattr(dbapi_connection, "driver_connection", dbapi_connection)
    if driver.text_factory is str:
        driver.text_factory = _decoded


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        _warn(raw[max(0, error.start - _AROUND) : error.end + _AROUND])
        return raw.decode(errors="replace")


@lru_cache(maxsize=1000)
def _warn(part: bytes) -> None:
    """Say once how to find the row."""
    places = " + ".join(f"coalesce(instr(CAST({name} AS BLOB), x'{part.hex()}'), 0)" for name in _COLUMNS)
    log.warning(
        "a text is no UTF-8, and is read with U+FFFD; of a record, find it by SELECT id FROM ml_jobs WHERE %s > 0",
        places,
    )
