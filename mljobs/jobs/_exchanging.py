"""Record outcomes and claim in one statement: one round trip, one snapshot and one commit for a busy worker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mljobs.jobs._base import Bind, JobRef, M, Model, connection_of, is_postgres
from mljobs.jobs._claiming import (
    DEFAULT_LEASE,
    claim,
    claim_by_parameters,
    claim_parameters,
    claim_rows,
    claims_of,
    lease_period,
    raise_refusal,
)
from mljobs.jobs._claims import Claim, model_of
from mljobs.jobs._fencing import one_statement, read_answer
from mljobs.jobs._finishing import Outcome, answers, finish_many, finish_update, one_for_each_job, outcome_parameters
from mljobs.jobs._picking import with_limit
from mljobs.jobs._refusing import unless_target_taken, without_waiting
from mljobs.record._models import MlJob


def finish_and_claim(
    session: Bind,
    outcomes: Iterable[Outcome],
    *,
    worker: str,
    kinds: Iterable[str] | None = None,
    limit: int = 1,
    lease: float = DEFAULT_LEASE,
    skip: Iterable[JobRef] = (),
    lock_timeout: float | None = None,
    model: type[M] = MlJob,  # type: ignore[assignment]
) -> tuple[list[Exception | None], list[Claim[M]]]:
    """Record outcomes, each if its lease still holds the job, and claim the next jobs; both or neither.

    A target whose exclusive job ends here is free for the next call, not yet for this one.

    Args:
        session: The caller's session or connection.
        outcomes: As ``finish_many`` takes them; of ``model``.
        worker: As ``claim`` takes it.
        kinds: Only this one, or these; None for all.
        limit: Claim at most so many, 1 to 10,000.
        lease: Seconds until the claims end unless they are renewed.
        skip: As ``claim`` takes it.
        lock_timeout: As ``claim`` takes it.
        model: The mapped job class.

    Returns:
        What ``finish_many`` returns, and what ``claim`` returns.

    Raises:
        InvalidValueError: An argument is out of range; nothing was written.
        StartRefusedError: One job cannot be started; nothing was claimed. Roll back: on SQLite the outcomes have been
            written.
    """
    given = list(outcomes)
    skipped = list(skip)
    which, parameters = claim_parameters(model, worker, kinds, limit, lease, skipped, lock_timeout)
    connection = connection_of(session, model)
    if not given and parameters["kinds"] != []:
        return [], claim_by_parameters(session, model, which, parameters, limit)
    if parameters["kinds"] == [] or not is_postgres(connection):
        errors = finish_many(session, given)
        more: dict[str, Any] = {"skip": skipped, "lock_timeout": lock_timeout}
        return errors, claim(session, worker=worker, kinds=kinds, limit=limit, lease=lease, model=model, **more)
    model_of(outcome.claim for outcome in given)
    distinct = one_for_each_job(given)
    parameters |= {"limit": limit, **outcome_parameters(connection.dialect.name, distinct)}

    def run(which: str) -> tuple[list[Claim[Any]], Any]:
        answer = _statement(model, which, limit).answer(connection, parameters)
        first = answer.row(0)
        return claims_of(session, model, answer, lease_period(model, first), worker), read_answer(first[-2:])

    try:
        claims, written = without_waiting(which, lambda which: unless_target_taken(connection, lambda: run(which)))
    except Exception as error:  # noqa: BLE001 - is raised again
        raise_refusal(session, connection, model, which, parameters, error)
    return answers(session, model, given, distinct, written), claims


def _rows(model: Model, which: str, limit: Any, dialect: str) -> Any:
    """Return the rows of ``claim_rows``, each with the row of ``one_statement``.

    No row is written twice: in the statement's snapshot a job that ends is running, and a job that is picked is queued.
    """
    finished = one_statement(model, finish_update, ends=True).subquery("finished")
    return claim_rows(model, which, limit, dialect, finished)


_statement = with_limit(_rows)
