"""Finish and claim in one statement: what a busy worker does all day costs one round trip, one snapshot, one commit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import ARRAY, BigInteger, Boolean, cast, null, select, union_all

from mljobs.db._prepared import Prepared
from mljobs.jobs._base import NULL, Bind, Model, connection_of, is_postgres, per_model
from mljobs.jobs._claiming import (
    DEFAULT_LEASE,
    Claim,
    claim,
    claims_of,
    model_of,
    started,
    taken_and_picked,
    told,
    wish,
)
from mljobs.jobs._finishing import Outcome, answers, ended, finish_many, first_of_each, parameters_of, whether_written
from mljobs.record._models import MlJob


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
    connection = connection_of(session, model)
    if not given or parameters["kinds"] == [] or not is_postgres(connection):
        errors = finish_many(session, given)
        return errors, claim(session, worker=worker, kinds=kinds, limit=limit, lease=lease, model=model)
    model_of(outcome.claim for outcome in given)
    distinct = first_of_each(given)
    statement = _statement(model, which, told({"limit": limit}), len(distinct) == 1)
    rows, values = statement.fetched(connection, {**parameters, "limit": limit, **parameters_of(distinct)})
    leases = whether_written(row[-2:] for row in rows if row[-2] is not None)
    taken, _ = taken_and_picked([row for row in rows if row[-2] is None], values)
    claims = claims_of(session, model, taken, worker, values)
    return answers(session, connection, model, given, leases), claims


@per_model
def _statement(model: Model, which: str, limit: int, single: bool) -> Prepared:  # noqa: FBT001 - private
    """Return the rows of ``started``, and those of ``ended`` with what they tell behind NULLs.

    Jobs that end here are running in the statement's snapshot, and those that are picked are queued, so no row is
    written twice.
    """

    def build(dialect: str) -> Any:
        first, *others = started(model, which, limit, dialect)
        # As short as can be: psycopg reads a text of more than 4096 characters anew each time.
        nothing = [NULL] * len(first.selected_columns)
        ends = [select(*nothing, *end.selected_columns) for end in ended(model, dialect, single=single)]
        none = cast(null(), Boolean()).label("ended"), cast(null(), ARRAY(BigInteger())).label("tokens")
        return union_all(first.add_columns(*none), *(other.add_columns(NULL, NULL) for other in others), *ends)

    return Prepared(build)
