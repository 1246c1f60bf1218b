"""What a claim does about a job that cannot be started, and about a target that another claim is taking."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from mljobs.db._failures import database_is_away, first_line, may_run_again
from mljobs.errors import MlJobsError, StartRefusedError, TargetLockedError
from mljobs.jobs._base import Model, table_of

ROUNDS = 20
"""How often a claim picks again where others take what it has picked."""
_LOCK_NOT_AVAILABLE = "55P03"

T = TypeVar("T")


def unless_target_taken(connection: sa.Connection, execute: Callable[[], T]) -> T:
    """Run a claim again if somebody started an exclusive job of a picked target by hand in the same moment.

    The database refuses the second job of the target, and so the whole statement; the next attempt sees the first job. In a
    longer transaction each attempt has a savepoint, so that what was done before stays.
    """
    for left in reversed(range(ROUNDS)):
        try:
            with _savepoint(connection):
                return execute()
        except TargetLockedError:
            if not left:
                raise
    raise AssertionError("the last round returns or raises")


def without_waiting(which: str, run: Callable[[str], T]) -> T:
    """Run a claim; if the lock of a target could not be had in time, run it without exclusive jobs."""
    try:
        return run(which)
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
            raise
    return run(f"{which} shared")


def start_refusal(
    connection: sa.Connection,
    model: Model,
    error: Exception,
    pick: Callable[[], Sequence[UUID]],
    attempt: Callable[[Sequence[UUID]], object],
) -> StartRefusedError | None:
    """Return the error that names the job for which a claim failed; None where it failed for another reason.

    The jobs that the claim would have picked are halved again and again; each half is started and undone.

    Args:
        connection: In a transaction, unless each statement is one.
        model: The mapped job class.
        error: What the claim raised.
        pick: Returns the ids of the jobs that the claim would have started.
        attempt: Starts these jobs.
    """
    if isinstance(error, MlJobsError) or database_is_away(error) or may_run_again(error):
        return None
    with _undone(connection):
        ids = pick()

    def failure(part: Sequence[UUID]) -> Exception | None:
        try:
            with _undone(connection):
                attempt(part)
        except Exception as failed:
            if getattr(failed, "connection_invalidated", False):
                raise
            return failed
        return None

    if failure([]) is not None:  # a missing column or privilege: no job could be started
        return None
    found = _first_refused(ids, failure)
    if found is None:
        return None
    job_id, refused = found
    return StartRefusedError(job_id, first_line(refused), _unreadable_column(connection, model, job_id))


def _first_refused(
    ids: Sequence[UUID], failure: Callable[[Sequence[UUID]], Exception | None]
) -> tuple[UUID, Exception] | None:
    error = failure(ids) if ids else None
    if error is None:
        return None
    if len(ids) > 1:
        half = len(ids) // 2
        return _first_refused(ids[:half], failure) or _first_refused(ids[half:], failure)
    # A target that is taken, a deadlock: the job may well be started later.
    later = isinstance(error, MlJobsError) or database_is_away(error) or may_run_again(error)
    return None if later else (ids[0], error)


def _unreadable_column(connection: sa.Connection, model: Model, job_id: UUID) -> str | None:
    """Return the column whose value cannot be read, or names no class; None where it is the write that fails."""
    table = table_of(model)

    def value_of(column: sa.Column[Any]) -> Any:
        with _undone(connection):
            return connection.execute(sa.select(column).where(table.c.id == job_id)).scalar()

    for column in table.columns:
        try:
            value_of(column)
        except Exception:  # noqa: BLE001 - whatever a type of the host's raises
            return column.name
    mapper = sa.inspect(model)
    discriminator = mapper.polymorphic_on
    if isinstance(discriminator, sa.Column) and value_of(discriminator) not in mapper.polymorphic_map:
        return discriminator.name
    return None


def _savepoint(connection: sa.Connection) -> AbstractContextManager[Any]:
    return nullcontext() if _commits_by_itself(connection) else connection.begin_nested()


@contextmanager
def _undone(connection: sa.Connection) -> Generator[None]:
    """Undo what the block does: by a savepoint, or by a transaction where each statement is one."""
    if _commits_by_itself(connection):
        connection.exec_driver_sql("BEGIN")
        try:
            yield
        finally:
            connection.exec_driver_sql("ROLLBACK")
    else:
        savepoint = connection.begin_nested()
        try:
            yield
        finally:
            savepoint.rollback()


def _commits_by_itself(connection: sa.Connection) -> bool:
    """Whether each statement of this connection is a transaction of its own."""
    return connection.dialect.name == "postgresql" and bool(
        getattr(connection.connection.dbapi_connection, "autocommit", False)
    )
