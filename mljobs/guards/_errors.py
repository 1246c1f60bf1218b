"""Translate what a driver raises into our own errors, by the name of the constraint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING
from uuid import UUID
from weakref import ref

from sqlalchemy import event
from sqlalchemy.engine import Engine

from mljobs.errors import (
    TRUNCATED,
    InvalidTransitionError,
    InvalidValueError,
    JobExistsError,
    MlJobsError,
    TargetLockedError,
    TerminalStateError,
)
from mljobs.guards._beside import tables_beside
from mljobs.guards._companions import (
    TERMINAL_CONSTRAINT,
    TERMINAL_MESSAGE,
    TRANSITION_CONSTRAINT,
    TRANSITION_MESSAGE,
    short_name,
)
from mljobs.states import MlJobStatus

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.engine import ExceptionContext

_job_tables: list[ref[Table]] = []


def remember_table(table: Table) -> None:
    """Note a job table, so that errors about it are distinguished from those about a host's tables."""
    if not any(known() is table for known in [*_job_tables]):
        _job_tables.append(ref(table, _job_tables.remove))


def known_tables() -> list[Table]:
    """Return the job tables of this process."""
    # A copy first: other threads define classes meanwhile, and iterating over a WeakSet would then fail.
    return [table for known in [*_job_tables] if (table := known()) is not None]


def exclusive_index(table_name: str) -> str:
    """Return the name of the unique index on the targets of running exclusive jobs."""
    return short_name(f"uq_{table_name}_exclusive")


def translate_error(error: BaseException | None) -> MlJobsError | None:
    """Return our error for what a driver raised when ring 3 refused a write; ``None`` for any other error.

    For hosts that work on a raw DBAPI connection; engines are translated without being asked.

    Args:
        error: An exception of psycopg, asyncpg, sqlite3 or aiosqlite, or SQLAlchemy's wrapper around one.
    """
    for seen in _causes(error):
        constraint, detail = _diagnosis(seen)
        fields = dict(part.partition("=")[::2] for part in (detail or "").split())
        job_id = UUID(fields["id"]) if "id" in fields else None
        status = MlJobStatus(fields["status"]) if "status" in fields else None
        if constraint == TERMINAL_CONSTRAINT:
            if fields.get("action") == "truncate":
                return TerminalStateError(action=TRUNCATED)
            return TerminalStateError(job_id, status)
        if constraint == TRANSITION_CONSTRAINT:
            wanted = fields.get("wanted")
            known = MlJobStatus(wanted) if wanted in MlJobStatus.tokens() else None
            return InvalidTransitionError(job_id, status, known)
        if _is_second_holder(seen):
            return TargetLockedError(None)
        if _is_too_long(seen):
            return InvalidValueError("target_name", "...", _TOO_LONG)
    return None


def _is_too_long(error: BaseException) -> bool:
    """Whether PostgreSQL cannot index the name of a target."""
    index = _source(error, "constraint_name") or ""
    return getattr(error, "sqlstate", None) == _LIMIT_EXCEEDED and any(
        _source(error, "table_name") == table.name
        and index in {each.name for each in table.indexes if "target_name" in each.columns}
        for table in known_tables()
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and what SQLAlchemy or a driver's facade has wrapped in it."""
    while error is not None:
        yield error
        error = getattr(error, "orig", None) or error.__cause__


def _source(error: BaseException, name: str) -> str | None:
    """Return a field of PostgreSQL's report: psycopg keeps them on ``.diag``, asyncpg on the error."""
    found: str | None = getattr(getattr(error, "diag", error), name, None)
    return found


def _diagnosis(error: BaseException) -> tuple[str | None, str | None]:
    """Return the constraint that a driver's error names, and its detail."""
    constraint = _source(error, "constraint_name")
    if constraint in _CONSTRAINTS:
        return constraint, _detail(error)
    message = error.args[0] if error.args else None  # all that SQLite tells, and PostgreSQL of a foreign table
    return (_MESSAGES.get(message.partition("\n")[0]), None) if isinstance(message, str) else (None, None)


def _detail(error: BaseException) -> str | None:
    return _source(error, "message_detail") or _source(error, "detail")


def _is_second_holder(error: BaseException) -> bool:
    """Whether a second exclusive job was to run on one target."""
    if getattr(error, "sqlstate", None) == _UNIQUE_VIOLATION:
        table, constraint = _source(error, "table_name"), _source(error, "constraint_name")
        return any(table == known.name and constraint == exclusive_index(known.name) for known in known_tables())
    columns = _sqlite_unique(error)
    return columns is not None and columns in {
        f"{table.name}.target_name, {table.name}.exclusive" for table in known_tables()
    }


def _sqlite_unique(error: BaseException) -> str | None:
    """Return the columns that SQLite names for a key that is there already."""
    message = error.args[0] if error.args else None
    if not isinstance(message, str) or not message.startswith(_SQLITE_UNIQUE):
        return None
    return message.removeprefix(_SQLITE_UNIQUE)


def duplicate_id_error(error: BaseException | None) -> JobExistsError | None:
    """Return our error for a record whose id is there already; ``None`` for any other error.

    Only the operations ask. Everywhere else it stays an ``IntegrityError``, which hosts and their tools know.

    Args:
        error: What SQLAlchemy or a driver raised.
    """
    for seen in _causes(error):
        if _is_second(seen):
            found = _KEY_VALUE.search(_detail(seen) or "")
            return JobExistsError(UUID(found[1]) if found else None)
    return None


def _is_second(error: BaseException) -> bool:
    """Whether an id was to be there twice in a job table, as a driver tells it."""
    if getattr(error, "sqlstate", None) == _UNIQUE_VIOLATION:
        return any(
            table.name == _source(error, "table_name")
            # The detail has the value if the role may read the table; its words are in the server's language.
            and (
                _KEY_VALUE.search(_detail(error) or "") is not None
                or _source(error, "constraint_name") in {table.primary_key.name, f"{table.name}_pkey"}
            )
            for table in known_tables()
        )
    return _sqlite_unique(error) in {f"{table.name}.id" for table in known_tables()}


_UNIQUE_VIOLATION = "23505"
_KEY_VALUE = re.compile(r"\(id\)=\(([0-9a-f-]{36})\)")
_SQLITE_UNIQUE = "UNIQUE constraint failed: "
_LOST_STATEMENT = ("26000", "42P05")  # a prepared statement that is not there, or is there already
_POOLER = (
    "mljobs: is this a pooler in transaction mode? Prepared statements do not survive there: with psycopg give the engine "
    'connect_args={"prepare_threshold": None}; asyncpg needs PgBouncer 1.21 or later with max_prepared_statements. '
    "See docs/pgbouncer.md."
)
_UNDEFINED_TABLE = "42P01"
_LIMIT_EXCEEDED = "54000"
_TOO_LONG = "it is longer than PostgreSQL can index: a name of a target has about 2,600 bytes at most there"
_READ_ONLY_TRANSACTION = "25006"
_NOT_SUPPORTED = "0A000"
_REVALIDATE = "RevalidateCachedQuery"
"""PostgreSQL's function that says "cached plan must not change result type"; the words are of the server's language."""
_OUTDATED_IN_ASYNCPG = "InvalidCachedStatementError"
_SQLITE_UNDEFINED = "no such table: "
_NO_TABLE = "mljobs: there is no table {}: run `mljobs upgrade`, or your own migrations"
_CONSTRAINTS = frozenset({TERMINAL_CONSTRAINT, TRANSITION_CONSTRAINT})
_MESSAGES = {TERMINAL_MESSAGE: TERMINAL_CONSTRAINT, TRANSITION_MESSAGE: TRANSITION_CONSTRAINT}


@event.listens_for(Engine, "handle_error")
def _translate(context: ExceptionContext) -> MlJobsError | None:
    error = context.sqlalchemy_exception
    if error is not None and getattr(context.original_exception, "sqlstate", None) in _LOST_STATEMENT:
        error.add_note(_POOLER)
    if error is not None and (missing := _missing_table(context.original_exception)):
        error.add_note(_NO_TABLE.format(missing))
    if plan_is_outdated(context.original_exception) or _became_read_only(context):
        context.is_disconnect = True  # on this connection, and on those like it, no later attempt would do better
    if getattr(context.original_exception, "sqlstate", None) == _LIMIT_EXCEEDED and error is not None:
        error.add_note(f"mljobs: {_TOO_LONG}")  # above 8 kB PostgreSQL does not say which index
    return translate_error(context.original_exception)


def plan_is_outdated(error: BaseException | None) -> bool:
    """Whether a statement was refused, unrun, because a migration has changed the type of a column since it was prepared.

    Args:
        error: What SQLAlchemy or a driver raised.
    """
    return any(
        _source(seen, "source_function") == _REVALIDATE or type(seen).__name__ == _OUTDATED_IN_ASYNCPG
        for seen in _causes(error)
        if getattr(seen, "sqlstate", None) == _NOT_SUPPORTED
    )


def _became_read_only(context: ExceptionContext) -> bool:
    """Whether a write met a server that was made read-only, a standby after a failover say, where none was asked for."""
    if getattr(context.original_exception, "sqlstate", None) != _READ_ONLY_TRANSACTION:
        return False
    connection = context.connection
    return connection is None or not connection.get_execution_options().get("postgresql_readonly")


def _missing_table(error: BaseException) -> str | None:
    """Return the job table, or the table of its leases or workers, that a driver says is not there."""
    if getattr(error, "sqlstate", None) != _UNDEFINED_TABLE and not str(error).startswith(_SQLITE_UNDEFINED):
        return None
    message = str(error).partition("\n")[0]
    names = (each.name for table in known_tables() for each in (table, *tables_beside(table)))
    return next((name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message)), None)
