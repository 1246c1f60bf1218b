"""The error that says why a job did not take a state."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Select, bindparam, select

from mljobs.errors import InvalidTransitionError, JobNotFound, TerminalStateError
from mljobs.jobs._base import Model, prepared, table_of
from mljobs.states import MlJobStatus


@prepared
def _state(model: Model, _dialect: str) -> Select[Any]:
    table = table_of(model)
    columns = (table.c.status, table.c.finished_at, table.c.started_at)
    return select(*columns).where(table.c.id == bindparam("id", type_=table.c.id.type))


def state_of(connection: Connection, model: Model, job_id: UUID) -> MlJobStatus:
    """Return the job's status now.

    Raises:
        JobNotFound: No record has this id.
    """
    rows = _state(model).rows(connection, {"id": job_id})
    if not rows:
        raise JobNotFound(job_id)
    status: MlJobStatus = rows[0][0]
    return status


def refusal_and_start(
    connection: Connection, model: Model, job_id: UUID, wanted: MlJobStatus
) -> tuple[TerminalStateError | InvalidTransitionError | JobNotFound, datetime | None]:
    """Return the error that says why the job did not become ``wanted``, and when the job was started."""
    rows = _state(model).rows(connection, {"id": job_id})
    if not rows:
        return JobNotFound(job_id), None
    status, finished_at, started_at = rows[0]
    if status.is_terminal:
        error = TerminalStateError(job_id, status, finished_at, {"status": (status.token, wanted.token)})
        return error, started_at
    return InvalidTransitionError(job_id, status, wanted), started_at
