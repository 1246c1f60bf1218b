"""Write many rows by savepoints, so that a row which the database refuses does not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from mljobs.errors import MlJobsError

_NO_PRIVILEGE = "42501"


def row_by_row(
    bind: Session | Connection, rows: Sequence[Any], sweep: Callable[[Sequence[Any]], None]
) -> Iterator[tuple[Any, Exception]]:
    """Sweep all rows at once; if the database refuses, one by one, yielding those that it refuses."""
    error = _attempt(bind, rows, sweep)
    if error is None:
        return
    if len(rows) == 1:
        yield rows[0], error
        return
    for row in rows:
        error = _attempt(bind, [row], sweep)
        if error is not None:
            yield row, error


def _attempt(
    bind: Session | Connection, rows: Sequence[Any], sweep: Callable[[Sequence[Any]], None]
) -> Exception | None:
    savepoint: Any = bind.begin_nested()
    try:
        sweep(rows)
    except (DBAPIError, MlJobsError) as error:
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            raise
        savepoint.rollback()
        if getattr(getattr(error, "orig", None), "sqlstate", None) == _NO_PRIVILEGE:
            raise  # no matter of this row: the role may do it to none
        return error
    except BaseException:
        savepoint.rollback()
        raise
    savepoint.commit()
    return None
