"""Finish and claim in one statement: what a busy worker does all day costs one round trip, one snapshot, one commit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Boolean, Connection, DateTime, Select, cast, null, select, union_all

from mljobs.jobs._base import Bind, Model, connection_of, is_postgres, per_model, table_of
from mljobs.jobs.claiming import DEFAULT_LEASE, Claim, claim, claims_of, model_of, started, taken_and_picked, told, wish
from mljobs.jobs.finishing import Outcome, answers, as_lists, ended, finish_many, first_of_each, whether_written
from mljobs.model import MlJob
from mljobs.prepared import Prepared


def finish_and_claim(
    session: Bind,
    outcomes: Iterable[Outcome],
    *,
    worker: str,
    kinds: Iterable[str] | None = None,
    limit: int = 1,
    lease: float = DEFAULT_LEASE,
    model: Model = MlJob,
) -> tuple[list[Exception | None], list[Claim]]:
    """Record outcomes, each if its lease still holds the job, and claim the next jobs; both or neither.

    A target whose exclusive job ends here is free for the next call, not yet for this one.

    Args:
        session: The caller's session or connection.
        outcomes: As ``finish_many`` takes them; of ``model``.
        worker: As ``claim`` takes it.
        kinds: Only this one, or these; None for all.
        limit: Claim at most so many, 1 to 10,000.
        lease: Seconds until the claims end unless they are renewed.
        model: The mapped job class.

    Returns:
        What ``finish_many`` returns, and what ``claim`` returns.

    Raises:
        InvalidValueError: An argument is out of range; nothing was written.
    """
    given = list(outcomes)
    which, parameters = wish(model, worker, kinds, limit, lease)
    connection = connection_of(session)
    if not given or parameters["kinds"] == [] or not is_postgres(connection):
        errors = finish_many(session, given)
        return errors, claim(session, worker=worker, kinds=kinds, limit=limit, lease=lease, model=model)
    model_of(outcome.claim for outcome in given)
    rows = _rows(connection, model, which, {**parameters, "limit": limit, **as_lists(first_of_each(given))})
    leases = whether_written(row[:2] for row in rows if row[1] is not None)
    taken, _ = taken_and_picked([(row[0], *row[2:]) for row in rows if row[1] is None])
    claims = claims_of(session, model, taken, worker)
    return answers(session, connection, model, given, leases), claims


def _rows(connection: Connection, model: Model, which: str, parameters: dict[str, Any]) -> list[Any]:
    return _statement(model, which, told(parameters)).rows(connection, parameters)


@per_model
def _statement(model: Model, which: str, limit: int) -> Prepared:
    """Return the rows of ``ended``, and behind a column of NULLs those of ``started``.

    Jobs that end here are running in the statement's snapshot, and those that are picked are queued, so no row is
    written twice.
    """

    def build(dialect: str) -> Select[Any]:
        end = ended(model, dialect).subquery("ends")
        begin = started(model, which, limit, dialect).subquery("begins")
        token, expires_at, *columns = begin.columns
        nothing = [cast(null(), column.type) for column in table_of(model).columns]
        return union_all(  # type: ignore[return-value]
            select(end.c.token, end.c.ended, cast(null(), DateTime(timezone=True)), *nothing),
            select(token, cast(null(), Boolean()), expires_at, *columns),
        )

    return Prepared(build)
