"""A history as a busy team makes one: ninety days of jobs on forty targets, some of them running, waiting, stuck."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Connection, Engine, insert, update

from mljobs import MlJob, MlJobLease
from mljobs._values import utc_now
from mljobs.db._rows import insert_rows

DAYS = 90
ACTIVE = 400
"""The last so many jobs have not finished, unless a small history is to have fewer."""


class Job(NamedTuple):
    """A row of ``ml_jobs``, in the order of its columns."""

    id: UUID
    kind: str
    target_name: str
    status: str
    progress: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error_message: str | None
    spec_json: str
    metrics_json: str | None
    attempts: int
    priority: int
    run_after: datetime | None
    exclusive: bool
    retry_of: UUID | None

    @property
    def metrics(self) -> Any:
        return json.loads(self.metrics_json or "null")

    @property
    def spec(self) -> Any:
        return json.loads(self.spec_json)

    @property
    def duration(self) -> int | None:
        """Milliseconds."""
        if self.started_at is None or self.finished_at is None:
            return None
        return (self.finished_at - self.started_at) // timedelta(milliseconds=1)


class Lease(NamedTuple):
    """A row of ``ml_job_leases``, and the job that names it."""

    job_id: UUID
    worker: str
    acquired_at: datetime
    expires_at: datetime
    target_lock: str | None


TARGETS = [
    *(("train", f"spam-{number}") for number in range(20)),
    *(("backfill", f"embeddings_v{number}") for number in range(8)),
    *(("feature_refresh", f"features/{number}") for number in range(8)),
    *(("drift_compute", f"drift-{number}") for number in range(4)),
]
ERRORS = [
    "CUDA out of memory\nTraceback (most recent call last):\n  train.py, line {}",
    "ConnectionResetError: peer {}",
    "ValueError: Input contains NaN\n  column {}",
    "killed by signal 9",
    "",
]
_DIGITS = 128


def history(number: int, now: datetime, seed: int = 7, *, active: int = ACTIVE) -> Iterator[Job]:
    """Yield ``number`` jobs, the oldest first; the same for the same arguments."""
    pick = random.Random(seed)
    failed: list[Job] = []
    held: set[str] = set()
    for at in range(number):
        age = timedelta(days=DAYS) * (number - at) / number
        created = _floored(now - age + timedelta(milliseconds=pick.randrange(1000)) - timedelta(minutes=1))
        kind, target = TARGETS[min(int(pick.expovariate(0.12)), len(TARGETS) - 1)]
        job = Job(
            id=UUID(int=int(created.timestamp() * 1000) << 80 | 7 << 76 | 2 << 62 | pick.getrandbits(62)),
            kind=kind,
            target_name=target,
            status="queued",
            progress=0,
            created_at=created,
            started_at=None,
            finished_at=None,
            error_message=None,
            spec_json=json.dumps(
                {"algorithm": pick.choice(["logreg", "sgd", "forest"]), "lr": pick.choice([0.1, 0.01])}
            ),
            metrics_json=None,
            attempts=0,
            priority=pick.choice([0, 0, 0, 5, 10]),
            run_after=None,
            exclusive=pick.random() < 0.1,
            retry_of=None,
        )
        if failed and pick.random() < 0.03:
            job = job._replace(retry_of=failed[pick.randrange(max(0, len(failed) - 20), len(failed))].id)
        if at < number - active:
            job = _finished(job, pick)
            if job.status == "failed":
                failed.append(job)
        else:
            job = _active(job, pick, now)
            if job.status == "running" and job.exclusive:  # one at a time on a target
                job = job._replace(exclusive=job.target_name not in held)
                held.add(job.target_name)
        yield job


def _floored(moment: datetime) -> datetime:
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def _finished(job: Job, pick: random.Random) -> Job:
    draw = pick.random()
    started = _floored(job.created_at + timedelta(seconds=pick.expovariate(1 / 20)))
    span = timedelta(milliseconds=int(1000 * min(pick.lognormvariate(2.5, 1), 300)))
    if draw < 0.015:  # cancelled before it began
        return job._replace(status="cancelled", finished_at=started)
    job = job._replace(started_at=started, finished_at=started + span, attempts=1 + (pick.random() < 0.05))
    if draw < 0.02:
        return job._replace(status="cancelled", progress=pick.randrange(100))
    if draw < 0.07:
        error = pick.choice(ERRORS).format(pick.randrange(5))
        return job._replace(status="failed", progress=pick.randrange(100), error_message=error)
    f1: Any = round(pick.betavariate(8, 2), 4)
    if pick.random() < 0.02:
        f1 = pick.choice(["n/a", None, True, [0.5]])
    metrics = {"f1": f1, "rows": pick.randrange(1000)} if pick.random() < 0.9 else None
    return job._replace(status="completed", progress=100, metrics_json=None if metrics is None else json.dumps(metrics))


def _active(job: Job, pick: random.Random, now: datetime) -> Job:
    draw = pick.random()
    if draw < 0.15:
        started = _floored(now - timedelta(seconds=1 + pick.expovariate(1 / 60)))
        return job._replace(status="running", started_at=started, attempts=1, progress=pick.randrange(100))
    if draw < 0.25:
        return job._replace(run_after=_floored(now + timedelta(minutes=pick.randrange(1, 600))))
    return job


def leases(jobs: list[Job], now: datetime, seed: int = 7) -> list[Lease]:
    """Return a lease for nearly every running job, some of them expired, and one of a job that was cancelled."""
    pick = random.Random(seed)
    locked: set[str] = set()
    found = []
    for job in jobs:
        if job.status != "running" or job.started_at is None or pick.random() < 0.1 or job.target_name in locked:
            continue
        expires = now + timedelta(seconds=pick.randrange(10, 60))
        if pick.random() < 0.2:
            expires = now - timedelta(seconds=pick.randrange(1, 600))
        if job.exclusive:
            locked.add(job.target_name)
        lock = job.target_name if job.exclusive else None
        found.append(Lease(job.id, f"gpu-{pick.randrange(4)}", job.started_at, expires, lock))
    stopped = next(job for job in reversed(jobs) if job.status == "cancelled" and job.started_at is not None)
    lock = stopped.target_name if stopped.exclusive else None
    found.append(Lease(stopped.id, "gpu-9", stopped.started_at or now, now + timedelta(seconds=30), lock))
    return found


@cache  # two databases may hold the same
def _rows(number: int, active: int) -> tuple[list[Job], list[Lease], datetime]:
    now = utc_now()
    jobs = list(history(number, now, active=active))
    return jobs, leases(jobs, now), now


def fill(engine: Engine, number: int, active: int = ACTIVE) -> tuple[list[Job], list[Lease], datetime]:
    """Fill the tables with a history, gather statistics, and return what they hold and the moment it is told at."""
    jobs, held, now = _rows(number, active)
    with engine.begin() as connection:
        insert_rows(connection, MlJob.__table__, list(Job._fields), jobs)
        _insert_leases(connection, held)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        gather(connection)
    return jobs, held, now


def _insert_leases(connection: Connection, held: list[Lease]) -> None:
    """Insert leases, and have their jobs name them; the last is of a finished job, which names none."""
    for lease in held[:-1]:
        values = {name: value for name, value in lease._asdict().items() if name != "job_id"}
        token = connection.execute(insert(MlJobLease).values(values).returning(MlJobLease.token)).scalar_one()
        running = update(MlJob.__table__).where(MlJob.id == lease.job_id)
        connection.execute(running.values(lease=token, worker=lease.worker))
    values = {name: value for name, value in held[-1]._asdict().items() if name != "job_id"}
    connection.execute(insert(MlJobLease).values(values))


def gather(connection: Connection) -> None:
    """Let the planner know what the tables hold; outside a transaction."""
    vacuum = "VACUUM " if connection.dialect.name == "postgresql" else ""
    for table in ("ml_jobs", "ml_job_leases"):
        connection.exec_driver_sql(f"{vacuum}ANALYZE {table}")


def fixed(now: datetime) -> str:
    """Return ``now`` as PostgreSQL reads it."""
    return f"timestamptz '{now.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}+00'"
