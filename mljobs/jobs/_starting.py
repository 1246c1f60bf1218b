"""A claim on SQLite: pick jobs, make their leases, start them, one statement after the other under the write lock."""

from __future__ import annotations

from itertools import count
from typing import Any

import sqlalchemy as sa

from mljobs.db._answers import Answer
from mljobs.jobs._base import Model, per_model, prepared, table_of
from mljobs.jobs._picking import pick_statement
from mljobs.jobs._statements import SQLITE, Stored, expiry_of, now_of, parameter_table, table_parameters
from mljobs.jobs._transitions import start_values
from mljobs.types import JobId

LEASE_COLUMNS = ("worker", "acquired_at", "expires_at", "target_lock")
"""What a claim writes into a lease."""


def start_in_turn(
    connection: sa.Connection, model: Model, which: str, parameters: dict[str, Any]
) -> tuple[Answer, int]:
    """Pick jobs, make their leases and start them; return the records of those started, and how many were picked.

    Args:
        connection: It has the write lock, so no target can be taken meanwhile.
        model: The mapped job class.
        which: What to pick, see ``claim_parameters``.
        parameters: What ``claim_parameters`` returned, and ``limit``.
    """
    # Values as SQLite stores them: they are sent back to it.
    picked: Any = pick_statement(model, which, parameters["limit"]).answer(connection, parameters)
    if not picked:
        return picked, 0
    chosen: dict[str, str | None] = {}
    locks: set[str | None] = set()
    for job_id, exclusive, target, *_ in picked.raw:
        lock = target if exclusive else None
        if lock is None or lock not in locks:
            chosen[job_id] = lock
            locks.add(lock)
    own = {**parameters, **table_parameters("locks", SQLITE, target_lock=list(locks))}
    leased: Any = lease_statement(model).answer(connection, own)
    tokens = {lock: token for token, lock in leased.raw}
    of_jobs = list(map(tokens.__getitem__, chosen.values()))
    own |= table_parameters("chosen", SQLITE, id=Stored(chosen), token=of_jobs)
    started: Any = start_statement(model).answer(connection, own)
    at_id, in_order = place_of(model, "id"), dict(zip(chosen, count()))
    return started.ordered(lambda row: in_order[row[at_id]]), len(picked)


@per_model
def place_of(model: Model, column: str) -> int:
    """Return the position of a column in the record."""
    return [column.name for column in table_of(model).columns].index(column)


def lease_values(dialect: str, target_lock: Any) -> tuple[Any, ...]:
    """Return the values of ``LEASE_COLUMNS``."""
    return sa.bindparam("worker", type_=sa.Text()), now_of(dialect), expiry_of(dialect), target_lock


@prepared
def lease_statement(model: Model, dialect: str) -> sa.Insert:
    """SQLite: make the leases, one for each of the ``locks``."""
    leases = model.__leases__
    locks = parameter_table("locks", dialect, target_lock=sa.Text())
    rows = sa.select(*lease_values(dialect, locks.c.target_lock))
    insert = sa.insert(leases).from_select(LEASE_COLUMNS, rows)
    return insert.returning(leases.c.token, leases.c.target_lock)


@prepared
def start_statement(model: Model, dialect: str) -> sa.Update:
    """SQLite: start the ``chosen`` jobs."""
    jobs = table_of(model)
    chosen = parameter_table("chosen", dialect, id=JobId(), token=sa.BigInteger())
    update = sa.update(jobs).where(jobs.c.id == chosen.c.id)
    return update.values(start_values(jobs, dialect, chosen.c.token)).returning(*jobs.columns)
