"""Finished jobs of one transaction, kept until it commits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, inspect, select
from sqlalchemy.orm import Session, with_polymorphic

from mljobs.events._delivering import Origin, Store
from mljobs.record._mixin import MlJobMixin
from mljobs.states import TERMINAL

_CHUNK = 1000
NAMELESS = ""  # a savepoint of which SQLAlchemy does not tell the name


def finished_among(connection: Connection, model: type[MlJobMixin], ids: Sequence[UUID]) -> list[Any]:
    """Return the jobs among these that have finished, detached, in the order of ``ids``."""
    found: dict[UUID, Any] = {}
    entity: Any = with_polymorphic(model, "*") if inspect(model).polymorphic_on is not None else model
    # A session of its own: the host's would be changed by what is loaded into it.
    with Session(connection, join_transaction_mode="rollback_only", expire_on_commit=False, autoflush=False) as session:
        for first in range(0, len(ids), _CHUNK):
            some = ids[first : first + _CHUNK]
            for job in session.scalars(select(entity).where(entity.id.in_(some), entity.status.in_(TERMINAL))):
                found[job.id] = job
        session.expunge_all()
    return [found[job_id] for job_id in ids if job_id in found]


class Pending:
    """Finished jobs of one transaction, by the savepoint in which they finished."""

    def __init__(self) -> None:
        self.store: Store | None = None
        self.delivered_by_store = False
        self._levels: list[tuple[object, dict[UUID, Any]]] = [(None, {})]

    @property
    def origin(self) -> Origin:
        """The session or store through which they finished."""
        return Origin(store=self.store)

    def enter(self, savepoint: object) -> None:
        """Keep what follows with this savepoint."""
        if self._find(savepoint) is None:
            self._levels.append((savepoint, {}))

    def add(self, jobs: Iterable[Any]) -> None:
        """Keep these with the innermost savepoint."""
        for job in jobs:
            if all(job.id not in pending for _, pending in self._levels):
                self._levels[-1][1][job.id] = job

    def release(self, savepoint: object) -> None:
        """Give what was kept with a savepoint, and those inside it, to what is around it."""
        at = self._find(savepoint)
        if at is not None:
            for _, pending in self._levels[at:]:
                self._levels[at - 1][1].update(pending)
            del self._levels[at:]

    def forget(self, savepoint: object) -> None:
        """Forget what was kept with a savepoint, and those inside it; nothing was with one that is not known."""
        at = self._find(savepoint)
        if at is not None:
            del self._levels[at:]
        elif self.knows(NAMELESS):
            self.take()

    def knows(self, savepoint: object) -> bool:
        """Whether anything may be kept with this savepoint."""
        return self._find(savepoint) is not None

    def _find(self, savepoint: object) -> int | None:
        return next((at for at, (level, _) in enumerate(self._levels) if level == savepoint and at > 0), None)

    def take(self) -> list[Any]:
        """Return all that was kept, and keep it no more."""
        jobs = [job for _, pending in self._levels for job in pending.values()]
        self._levels = [(None, {})]
        return jobs
