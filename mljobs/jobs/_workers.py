"""The table of workers: each worker has one row in it. Register, update and list them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from mljobs._values import utc_now
from mljobs.guards._companions import schema_of
from mljobs.guards._overview import SILENT_SECONDS
from mljobs.jobs._base import Bind, Model, connection_of, is_postgres, table_of
from mljobs.jobs._statements import moments, now_of
from mljobs.record._models import MlJob
from mljobs.states import MlJobStatus

SILENT_AFTER = timedelta(seconds=SILENT_SECONDS)
_KEPT = timedelta(days=1)
_NAMES_TRIED = 1000


class WorkerState(StrEnum):
    """What a worker does: it claims jobs, it lets its last ones end, or it is there no more."""

    RUNNING = "running"
    STOPPING = "stopping"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker, as it is in the table.

    Attributes:
        name: Its name, which its claims carry; no two that run have the same.
        host: Where it runs.
        pid: Its process there.
        kinds: What it has handlers for.
        concurrency: How many handlers may run at a time.
        version: Of mljobs.
        started_at: When it began, UTC.
        last_seen_at: When it last said that it is there, UTC.
        state: Running, stopping or gone.
        jobs: The ids of the running jobs that it holds.
        silent: Whether it was not seen for 60 seconds without having said that it ends; it is gone then.
    """

    name: str
    host: str
    pid: int
    kinds: tuple[str, ...]
    concurrency: int
    version: str
    started_at: datetime
    last_seen_at: datetime
    state: WorkerState = WorkerState.RUNNING
    jobs: tuple[UUID, ...] = ()
    silent: bool = False


def workers(session: Bind, *, gone: bool = False, model: Model = MlJob) -> list[WorkerInfo]:
    """Return the workers and what each holds, the oldest first; none where the database has no table of them.

    Args:
        session: The caller's session or connection.
        gone: Whether to return those too that have ended, or were not seen for 60 seconds; kept for a day.
        model: The mapped job class.
    """
    connection = connection_of(session, model)
    if not has_worker_table(connection, model):
        return []
    jobs, table = table_of(model), model.__workers__
    rows = connection.execute(sa.select(*table.c, now_of(connection.dialect.name).label("now")), moments()).all()
    running = sa.select(jobs.c.worker, jobs.c.id).where(
        jobs.c.status == MlJobStatus.RUNNING, jobs.c.worker.in_([row.name for row in rows])
    )
    held: dict[str, list[UUID]] = {}
    for name, job_id in connection.execute(running.order_by(jobs.c.started_at, jobs.c.id)) if rows else ():
        held.setdefault(name, []).append(job_id)
    found = [_info(row, held.get(row.name, ())) for row in rows]
    return sorted(
        (worker for worker in found if gone or worker.state is not WorkerState.GONE),
        key=lambda worker: (worker.started_at, worker.name),
    )


def _info(row: Any, held: Sequence[UUID]) -> WorkerInfo:
    state = WorkerState(row.state) if row.state in set(WorkerState) else WorkerState.GONE
    silent = state is not WorkerState.GONE and row.last_seen_at < row.now - SILENT_AFTER
    return WorkerInfo(
        name=row.name,
        host=row.host,
        pid=row.pid,
        kinds=_kinds_of(row.kinds),
        concurrency=row.concurrency,
        version=row.version,
        started_at=row.started_at,
        last_seen_at=row.last_seen_at,
        state=WorkerState.GONE if silent else state,
        jobs=tuple(held),
        silent=silent,
    )


def _kinds_of(text: str) -> tuple[str, ...]:
    """Return the kinds of a worker's row; none of a row that somebody else wrote: it must not hide the others."""
    try:
        kinds = json.loads(text)
    except ValueError:
        return ()
    return tuple(kind for kind in kinds if isinstance(kind, str)) if isinstance(kinds, list) else ()


def has_worker_table(connection: sa.Connection, model: Model) -> bool:
    """Whether the database has the table of workers; one of an older release has not."""
    table = model.__workers__
    return sa.inspect(connection).has_table(table.name, schema=schema_of(connection, table))


def register_worker(session: Bind, worker: WorkerInfo, *, model: Model = MlJob) -> WorkerInfo:
    """Write down that a worker runs, and remove those that are gone for a day.

    Args:
        session: The caller's session or connection.
        worker: As it wants to be known.
        model: The mapped job class.

    Returns:
        As it is known: where another worker of its name runs, with a number behind the name.
    """
    connection, table = connection_of(session, model), model.__workers__
    for number in range(1, _NAMES_TRIED):
        known = worker if number == 1 else replace(worker, name=f"{worker.name}-{number}")
        row = connection.execute(_registration(connection, model, known), moments()).one_or_none()
        if row is not None:
            connection.execute(sa.delete(table).where(table.c.last_seen_at < utc_now() - _KEPT))
            return replace(known, started_at=row.started_at, last_seen_at=row.started_at)
    return worker


def _registration(connection: sa.Connection, model: Model, worker: WorkerInfo) -> Any:
    table, now = model.__workers__, now_of(connection.dialect.name)
    values = {
        "name": worker.name,
        "host": worker.host,
        "pid": worker.pid,
        "kinds": json.dumps(worker.kinds, ensure_ascii=False),  # as the view looks for them
        "concurrency": worker.concurrency,
        "version": worker.version,
        "state": WorkerState.RUNNING.value,
        "started_at": now,
        "last_seen_at": now,
    }
    insert = pg_insert if is_postgres(connection) else sqlite_insert
    free = sa.or_(table.c.state == WorkerState.GONE.value, table.c.last_seen_at < utc_now() - SILENT_AFTER)
    return (
        insert(table)
        .values(values)
        .on_conflict_do_update(index_elements=[table.c.name], set_=values, where=free)
        .returning(table.c.started_at)
    )


def update_worker(
    session: Bind, worker: WorkerInfo, state: WorkerState = WorkerState.RUNNING, *, model: Model = MlJob
) -> bool:
    """Write down that a worker is still there, in one statement.

    Args:
        session: The caller's session or connection.
        worker: What ``register_worker`` returned.
        state: What it does now.
        model: The mapped job class.

    Returns:
        Whether its row was there; somebody else may have taken the name when it was silent.
    """
    connection, table = connection_of(session, model), model.__workers__
    own = (table.c.name == worker.name, table.c.started_at == worker.started_at, table.c.pid == worker.pid)
    values = {"last_seen_at": now_of(connection.dialect.name), "state": state.value}
    found = connection.execute(sa.update(table).where(*own).values(values).returning(table.c.name), moments())
    return found.one_or_none() is not None
