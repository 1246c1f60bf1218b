"""Errors of the database: which may be over at a later attempt, and their text for a log."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from mljobs._printable import printable
from mljobs.db._texts import is_no_utf8
from mljobs.guards._errors import plan_is_outdated

_NOT_RETRYABLE = ("27", "2F", "38", "39", "54", "55000", "HV")
"""SQLSTATEs that psycopg calls operational and that no wait mends: limits of the program, and what triggers and functions
of the host raise."""
_OPERATIONAL = ("08", "25", "40", "53", "55", "57", "58", "XX")
"""SQLSTATEs that psycopg calls operational or internal. Through SQLAlchemy asyncpg's errors are of no such class."""
_SERIALIZATION = ("40001", "40P01")
"""SQLSTATEs of a transaction that PostgreSQL ended because of another one: it may be run again."""
_UNDEFINED = ("42P01", "42703", "3F000")
"""SQLSTATEs of a table, a column and a schema that is not there."""
_SQLITE_UNDEFINED = ("no such table", "no such column")
_LINE_MAX = 500
CONNECTION_ERRORS = (DBAPIError, PoolTimeout, OSError)
"""What a call to the database raises when it fails; see ``database_is_away``."""


def database_is_away(error: BaseException) -> bool:
    """Whether trying again later may help: no connection, a restart, a standby that is not promoted yet, a deadlock."""
    if isinstance(error, DBAPIError):
        state = str(getattr(error.orig, "sqlstate", ""))
        if state.startswith(_NOT_RETRYABLE):
            return False
        if state.startswith(_OPERATIONAL):
            return True
        if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:  # no such table, say
            return False
        return isinstance(error, OperationalError | InterfaceError | InternalError) or error.connection_invalidated
    return isinstance(error, PoolTimeout | OSError)


def tables_are_missing(error: BaseException) -> bool:
    """Whether the database says that it has no such table, column or schema."""
    original = getattr(error, "orig", None) or error
    state, text = getattr(original, "sqlstate", None), str(original)
    return state in _UNDEFINED or any(words in text for words in _SQLITE_UNDEFINED)


def may_run_again(error: BaseException) -> bool:
    """Whether the transaction met another one, a migration, or a text to be read leniently, and may be run again at once."""
    if not isinstance(error, DBAPIError):
        return False
    return getattr(error.orig, "sqlstate", None) in _SERIALIZATION or plan_is_outdated(error) or is_no_utf8(error.orig)


def is_locked(error: BaseException | None) -> bool:
    """Whether somebody else held the write lock of a SQLite file for longer than the driver waits."""
    if not isinstance(error, DBAPIError):
        return False
    code: int = getattr(error.orig, "sqlite_errorcode", 0)
    return code & 0xFF == sqlite3.SQLITE_BUSY


def first_line(error: BaseException | str) -> str:
    """Return the first line of what an error says, for a line of log."""
    return one_line(str(error).partition("\n")[0])


def one_line(text: str) -> str:
    """Return a text as one line of log: control characters escaped, and of a long one both ends."""
    return printable(shortened(text, _LINE_MAX))


def shortened(text: str, most: int) -> str:
    """Return a text of at most ``most`` characters and a few words; of a longer one both ends."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... {len(text) - 2 * half} characters left out ... {text[-half:]}"
