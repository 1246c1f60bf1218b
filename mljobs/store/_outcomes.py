"""``follow``: what becomes of some jobs, until all have finished. The logic only; ``mljobs.store._display`` shows it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic
from uuid import UUID

from sqlalchemy import select

from mljobs._printable import span_text
from mljobs.errors import InvalidValueError, JobNotFound
from mljobs.jobs import Bind, Filter, JobRef, Model, Where
from mljobs.jobs._base import M, connection_of, id_of, table_of
from mljobs.jobs._filters import Selection, selection
from mljobs.jobs._reading import fetch
from mljobs.record._html import numbers_of, values_of
from mljobs.states import MlJobStatus
from mljobs.store._following import Read, check_waiting

MOST: Final = 10_000
_AT_ONCE: Final = 1_000
_METRICS_SHOWN: Final = 6


@dataclass(frozen=True, slots=True)
class Running:
    """A job that runs, as a progress display shows it."""

    target_name: str
    progress: int
    metrics: Mapping[str, int | float]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far some jobs are.

    Attributes:
        counts: How many are in each state.
        running: Those that run, the farthest first.
        seconds: Since the following began.
    """

    counts: Mapping[MlJobStatus, int]
    running: Sequence[Running] = ()
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """How many jobs there are."""
        return sum(self.counts.values())

    @property
    def done(self) -> int:
        """How many have finished."""
        return sum(number for status, number in self.counts.items() if status.is_terminal)

    def __str__(self) -> str:
        have = ", ".join(f"{self.counts[status]:,} {status}" for status in MlJobStatus if self.counts.get(status))
        return f"{self.done:,} of {self.total:,} jobs: {have}" if self.total else "no jobs"


@dataclass(frozen=True, slots=True)
class Followed(Sequence[M], Generic[M]):
    """What became of the jobs that were followed.

    Attributes:
        jobs: The jobs, in the order of the ids that were given; of a filter, the oldest first. In the place of a failed job
            that is retried stands its last retry.
        complete: Whether all have finished; False where the time was up, or the store was closed.
        seconds: How long they were followed.
    """

    jobs: tuple[M, ...] = ()
    complete: bool = True
    seconds: float = 0.0
    counts: Mapping[MlJobStatus, int] = field(default_factory=dict)

    def __getitem__(self, index: Any) -> Any:
        return self.jobs[index]

    def __iter__(self) -> Iterator[M]:
        return iter(self.jobs)

    def __len__(self) -> int:
        return len(self.jobs)

    def in_state(self, *states: str) -> list[M]:
        """Return the jobs in one of these states."""
        return [job for job in self.jobs if job.status in states]

    def __repr__(self) -> str:
        return f"<Followed {Snapshot(self.counts)}>"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the outcomes: titles and rows of text.

        There is a column for each key of the specs whose values differ, and for each number of the metrics; six at most.
        """
        specs = [values_of(job.spec_json) for job in self.jobs]
        differing = [
            key
            for key in dict.fromkeys(key for found in specs for key in found)
            if len({str(found.get(key)) for found in specs}) > 1
        ][:_METRICS_SHOWN]
        numbers = [numbers_of(job.metrics_json) for job in self.jobs]
        keys = list(dict.fromkeys(key for found in numbers for key in found))[:_METRICS_SHOWN]
        failed = any(job.error_message for job in self.jobs)
        asked = [f"spec.{key}" for key in differing]
        titles = ["id", "target", *asked, "status", "took", *keys, *(["error"] if failed else [])]
        rows = []
        for job, spec, found in zip(self.jobs, specs, numbers, strict=True):
            took = "" if job.duration_ms is None else span_text(job.duration_ms / 1000)
            error = [job.error_line or ""] if failed else []
            values = [_short(found.get(key, "")) for key in keys]
            wanted = [_short(spec.get(key, "")) for key in differing]
            rows.append([job.id.hex[-8:], job.target_name, *wanted, str(job.status), took, *values, *error])
        return titles, rows


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


FollowedSteps = Generator["Read | float | Snapshot", Any, "Followed[Any]"]
Followable = Filter | str | Iterable[JobRef] | None
"""A filter or its text; or jobs, or their ids; None with filters by keyword."""


def following(
    model: Model, jobs: Followable, where: Where | None, fields: Mapping[str, Any]
) -> tuple[Model, Selection | list[UUID]]:
    """Return which jobs are to be followed.

    Raises:
        InvalidValueError: Nothing says which, or two things do.
    """
    if jobs is None or isinstance(jobs, Filter | str):
        asked = selection(model, jobs, where, fields)
        if not asked:
            raise InvalidValueError("jobs", jobs, "expected ids, or a filter: which jobs are to be followed?")
        return model, asked
    if where is not None or fields:
        raise InvalidValueError("jobs", "ids", "with ids there is no filter beside them")
    return model, list(dict.fromkeys(id_of(job) for job in jobs))


def followed_steps(chosen: tuple[Model, Selection | list[UUID]], timeout: float | None, poll: float) -> FollowedSteps:
    """Yield how far the jobs are, until all have finished or the time is up; return what became of them."""
    check_waiting(timeout, poll)
    begun = time.monotonic()
    model, asked = chosen
    wanted: list[UUID] = asked if isinstance(asked, list) else (yield Read(lambda bind: _ids_of(bind, asked)))
    if len(wanted) > MOST:
        raise InvalidValueError("jobs", len(wanted), f"at most {MOST:,} jobs are followed at once")
    states: dict[UUID, Any] = yield Read(lambda bind: _states(bind, model, wanted))
    missing = next((job_id for job_id in wanted if job_id not in states), None)
    if missing is not None and asked is wanted:
        raise JobNotFound(missing)
    latest: dict[UUID, UUID] = {}
    yield from _to_retries(states, latest, list(states), model)
    while True:
        seconds = time.monotonic() - begun
        live = [job_id for job_id, row in states.items() if not row.status.is_terminal]
        yield _snapshot(states.values(), seconds)
        left = poll if timeout is None else timeout - seconds
        if not live or left <= 0:
            break
        yield min(poll, left)
        fresh: dict[UUID, Any] = yield Read(lambda bind, live=live: _states(bind, model, live))  # type: ignore[misc]
        for job_id in live:
            if job_id in fresh:
                states[job_id] = fresh[job_id]
            else:  # deleted meanwhile
                del states[job_id]
        yield from _to_retries(states, latest, list(fresh), model)
    found = yield Read(lambda bind: _jobs(bind, model, list(states)))
    last = [_last_of(job_id, latest) for job_id in wanted]
    jobs = tuple(found[job_id] for job_id in last if job_id in found)
    counts = Counter(job.status for job in jobs)
    return Followed(jobs, all(job.is_terminal for job in jobs), time.monotonic() - begun, counts)


def _to_retries(
    states: dict[UUID, Any], latest: dict[UUID, UUID], ids: Sequence[UUID], model: Model
) -> Generator[Read, Any, None]:
    """Put in the place of each failed job of these the one that retries it, unless that is followed already.

    Args:
        states: By id, of the jobs that are followed; changed in place.
        latest: By the id of a job, that of its retry; changed in place.
        ids: Of the jobs to look at.
        model: The mapped job class.
    """
    failed = [job_id for job_id in ids if states[job_id].status is MlJobStatus.FAILED]
    while failed:
        retries = yield Read(lambda bind, failed=failed: _retries(bind, model, failed))  # type: ignore[misc]
        new = {old: retry.id for old, retry in retries.items() if retry.id not in states}
        for old, job_id in new.items():
            latest[old] = job_id
            del states[old]
            states[job_id] = retries[old]
        failed = [job_id for job_id in new.values() if states[job_id].status is MlJobStatus.FAILED]


def _last_of(job_id: UUID, latest: Mapping[UUID, UUID]) -> UUID:
    while job_id in latest:
        job_id = latest[job_id]
    return job_id


def _snapshot(rows: Iterable[Any], seconds: float) -> Snapshot:
    listed = list(rows)
    running = [
        Running(row.target_name, row.progress, numbers_of(row.metrics_json))
        for row in listed
        if row.status is MlJobStatus.RUNNING
    ]
    running.sort(key=lambda job: -job.progress)
    return Snapshot(Counter(row.status for row in listed), running, seconds)


def _ids_of(bind: Bind, chosen: Selection) -> list[UUID]:
    table = table_of(chosen.model)
    statement = select(table.c.id).where(*chosen.conditions()).order_by(table.c.created_at, table.c.id).limit(MOST + 1)
    return list(connection_of(bind, chosen.model).scalars(statement))


def _states(bind: Bind, model: Model, ids: Sequence[UUID]) -> dict[UUID, Any]:
    found = {row.id: row for row in _rows(bind, model, "id", ids)}
    return {job_id: found[job_id] for job_id in ids if job_id in found}


def _retries(bind: Bind, model: Model, ids: Sequence[UUID]) -> dict[UUID, Any]:
    """Return the latest retry of each of these jobs, by the id of what it retries."""
    return {row.retry_of: row for row in sorted(_rows(bind, model, "retry_of", ids), key=_age)}


def _age(row: Any) -> tuple[Any, UUID]:
    return row.created_at, row.id


def _rows(bind: Bind, model: Model, by: str, ids: Sequence[UUID]) -> list[Any]:
    table, connection = table_of(model), connection_of(bind, model)
    columns = [table.c[name] for name in _COLUMNS]
    found: list[Any] = []
    for start in range(0, len(ids), _AT_ONCE):
        found += connection.execute(select(*columns).where(table.c[by].in_(ids[start : start + _AT_ONCE])))
    return found


_COLUMNS: Final = ("id", "status", "progress", "target_name", "metrics_json", "retry_of", "created_at")


def _jobs(bind: Bind, model: Model, ids: Sequence[UUID]) -> dict[UUID, Any]:
    table = table_of(model)
    found = {}
    for start in range(0, len(ids), _AT_ONCE):
        found.update({job.id: job for job in fetch(bind, model, [table.c.id.in_(ids[start : start + _AT_ONCE])])})
    return found
