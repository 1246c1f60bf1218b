"""Hold claimed jobs: renew their leases, record their progress, give them back without an outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa

from mljobs._values import MAX_PROGRESS, check_lease, to_json_text
from mljobs.errors import InvalidValueError
from mljobs.jobs._base import Bind, M, Model, connection_of, prepared, table_of
from mljobs.jobs._claiming import DEFAULT_LEASE
from mljobs.jobs._claims import Claim, Renewal, model_of
from mljobs.jobs._fencing import (
    FencedWrite,
    explain,
    holds,
    lease_parameters,
    standing_leases,
    wanted_parameters,
    wanted_table,
)
from mljobs.jobs._records import refresh
from mljobs.jobs._statements import POSTGRES, expiry_of, in_rows, moments
from mljobs.jobs._transitions import report_values
from mljobs.states import MlJobStatus

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Report:
    """The progress and metrics of a running job.

    Attributes:
        claim: What ``claim`` returned.
        progress: Percent, 0 to 100; None keeps what the record holds.
        metrics_json: JSON text; None keeps what the record holds.
    """

    claim: Claim[Any]
    progress: int | None = None
    metrics_json: str | None = None

    @classmethod
    def of(cls, claim: Claim[Any], *, progress: int | None = None, metrics: Any = None) -> Report:
        """Return a report with its values checked.

        Raises:
            InvalidValueError: A value is not one that its field can hold.
        """
        text = None if metrics is None else to_json_text("metrics", metrics)
        return cls(claim, None if progress is None else _percent(progress), text)


def renew(session: Bind, claims: Iterable[Claim[M]], *, lease: float = DEFAULT_LEASE) -> Renewal[M]:
    """Extend the leases that are still held, and say which claims are held, lost and cancelled, in one statement.

    Args:
        session: The caller's session or connection.
        claims: Any number, of one model.
        lease: Seconds from now.

    Returns:
        The claims by what became of them.
    """
    parameters = moments(check_lease(lease))
    held = list(dict.fromkeys(claims))
    if not held:
        return Renewal([], [], [])
    model = model_of(held)
    connection = connection_of(session, model)
    renewal, abandoned = _renewal(connection, model, held, parameters, extend=True)
    if abandoned:  # by hand the job was put back or deleted, which leaves its lease: give its target to the next worker
        _release(connection, model, abandoned)
    return renewal


def look(session: Bind, claims: Iterable[Claim[M]]) -> Renewal[M]:
    """Say which claims are held, lost and cancelled, as ``renew`` does, and extend no lease.

    Args:
        session: The caller's session or connection.
        claims: Any number, of one model.
    """
    held = list(dict.fromkeys(claims))
    if not held:
        return Renewal([], [], [])
    model = model_of(held)
    renewal, _ = _renewal(connection_of(session, model), model, held, {}, extend=False)
    return renewal


def release(session: Bind, claims: Iterable[Claim[Any]]) -> int:
    """Give claims back without an outcome, once the work on cancelled jobs has stopped.

    A job that is still running loses its lease too, and then no ``rescue`` finds it: requeue such a job instead.

    Returns:
        How many were still held.
    """
    given = list(dict.fromkeys(claims))
    if not given:
        return 0
    model = model_of(given)
    return _release(connection_of(session, model), model, given)


def set_progress(session: Bind, claim: Claim[Any], progress: int) -> None:
    """Record the progress of the running job, if this lease still holds it.

    Args:
        session: The caller's session or connection.
        claim: What ``claim`` returned.
        progress: Percent; may go back; above 100 counts as 100.

    Raises:
        InvalidValueError: Not an int of at least 0.
        LeaseLostError: The lease is gone; nothing was written.
        TerminalStateError: The job was cancelled; nothing was written.
    """
    for error in set_progress_many(session, [(claim, progress)]):
        if error is not None:
            raise error


def set_progress_many(session: Bind, progress: Iterable[tuple[Claim[Any], int]]) -> list[Any]:
    """Record the progress of many running jobs in one statement, each if its lease still holds it.

    Args:
        session: The caller's session or connection.
        progress: Pairs of claim and percent.

    Returns:
        For each pair, in order, None or the error that ``set_progress`` would raise.
    """
    return report_many(session, [Report(claim, _percent(value)) for claim, value in progress])


def report(session: Bind, claim: Claim[Any], *, progress: int | None = None, metrics: Any = None) -> None:
    """Record progress and metrics of the running job, if this lease still holds it.

    Args:
        session: The caller's session or connection.
        claim: What ``claim`` returned.
        progress: Percent; may go back; above 100 counts as 100. None keeps what the record holds.
        metrics: What came out so far, any JSON-able value, in place of what was reported before. None keeps that.

    Raises:
        InvalidValueError: A value is not one that its field can hold; nothing was written.
        LeaseLostError: The lease is gone; nothing was written.
        TerminalStateError: The job was cancelled; nothing was written.
    """
    for error in report_many(session, [Report.of(claim, progress=progress, metrics=metrics)]):
        if error is not None:
            raise error


def report_many(session: Bind, reports: Iterable[Report]) -> list[Any]:
    """Record progress and metrics of many running jobs in one statement, each if its lease still holds it.

    Args:
        session: The caller's session or connection.
        reports: Of one model; of several for one claim the last is written.

    Returns:
        For each report, in order, None or the error that ``report`` would raise.
    """
    given = list(reports)
    if not given:
        return []
    model = model_of(report.claim for report in given)
    connection = connection_of(session, model)
    latest = {report.claim: report for report in given}
    claims = newest_by_job(latest, _itself)
    dialect = connection.dialect.name
    values: dict[str, list[Any]] = {
        "progress": [latest[claim].progress for claim in claims],
        "metrics": [latest[claim].metrics_json for claim in claims],
    }
    parameters = wanted_parameters(dialect, claims, **values) | lease_parameters(dialect, claims)
    written = _REPORT.run(connection, model, parameters)
    done = {claim for claim in claims if claim in written}
    errors = [
        None if report.claim in done else explain(connection, model, report.claim, written, MlJobStatus.RUNNING)
        for report in given
    ]
    refresh(session, model, [report.claim.job_id for report in given])
    return errors


def newest_by_job(given: Iterable[_T], claim_of: Callable[[_T], Claim[Any]]) -> list[_T]:
    """Return one item for each job, in the order of the ids, so that two writes never deadlock.

    Of several for one job that with the newest claim, for only this one can hold the job; of equal claims the first.

    Args:
        given: Claims, or objects that have one.
        claim_of: Returns the claim.
    """
    newest: dict[int, _T] = {}
    for one in given:
        claim = claim_of(one)
        job_id = claim.job_id.int  # UUIDs are hashed and compared in Python, and slowly
        known = newest.setdefault(job_id, one)
        if known is not one and _age(claim) > _age(claim_of(known)):
            newest[job_id] = one
    return list(map(newest.__getitem__, sorted(newest)))


def _itself(claim: Claim[Any]) -> Claim[Any]:
    return claim


def _age(claim: Claim[Any]) -> Any:
    return claim.lease.acquired_at, claim.token


def _percent(value: int) -> int:
    number: Any = value
    if not isinstance(number, int) and hasattr(number, "__index__"):
        number = number.__index__()  # NumPy's integers
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise InvalidValueError("progress", value, f"expected an int, 0 to {MAX_PROGRESS}")
    return min(number, MAX_PROGRESS)


# ---------------------------------------------------------------------------------------------------- the statements


def _renewal(
    connection: sa.Connection, model: Model, claims: Sequence[Claim[Any]], parameters: dict[str, Any], *, extend: bool
) -> tuple[Renewal[Any], list[Claim[Any]]]:
    """Return what became of these claims; and the lost ones whose lease is still there, without this job."""
    dialect = connection.dialect.name
    asked = {**parameters, **wanted_parameters(dialect, claims), **lease_parameters(dialect, claims)}
    if dialect == POSTGRES:
        rows = _renewal_statement(model, extend).rows(connection, asked)
    else:
        leases = (_extend_statement if extend else _standing_statement)(model)
        rows = [(*row, None, None, None) for row in leases.rows(connection, asked)]
        rows += [(token, None, *rest) for token, *rest in _lost_statement(model).rows(connection, asked)]
    ends = {row[0]: row[1] for row in rows if row[1] is not None}
    differing = {(row[0], row[2]): row[3:] for row in rows if row[1] is None}
    renewal, abandoned = Renewal([], [], []), []
    for claim in claims:
        status, started_at = differing.get((claim.token, claim.job_id), (MlJobStatus.RUNNING, None))
        if claim.token not in ends:
            renewal.lost.append(claim)
        elif (claim.token, claim.job_id) not in differing:
            renewal.held.append(claim.expiring(ends[claim.token]))
        elif claim.ended:
            renewal.lost.append(claim)
        elif status is not None and status.is_terminal and started_at == claim.lease.acquired_at:
            renewal.cancelled.append(claim.expiring(ends[claim.token]))
        else:
            renewal.lost.append(claim)
            abandoned.append(claim)
    return renewal, abandoned


def _release(connection: sa.Connection, model: Model, claims: Sequence[Claim[Any]]) -> int:
    """Take these jobs out of their leases; return how many claims were still held."""
    dialect = connection.dialect.name
    newest = newest_by_job(claims, _itself)
    written = _RELEASE.run(
        connection, model, {**wanted_parameters(dialect, newest), **lease_parameters(dialect, claims)}
    )
    held = 0
    for claim in claims:
        held += claim in written or (claim.token in written.tokens and not claim.ended)
        claim.note_end()
    return held


@prepared
def _renewal_statement(model: Model, extend: bool, dialect: str) -> sa.CompoundSelect[Any]:  # noqa: FBT001 - private
    """PostgreSQL: the leases that stand and their ends, extended or not; and the claims of ``_lost``."""
    stand = _ends_of_standing(model, dialect)
    if extend:
        renewed = _extend(model, dialect).cte("renewed")
        stand = sa.select(renewed.c.token, renewed.c.expires_at)
    token, *others = _lost(model, dialect).subquery("lost").c
    nothing = [sa.cast(sa.null(), column.type).label(column.name) for column in others]
    no_end = sa.cast(sa.null(), model.__leases__.c.expires_at.type)
    return sa.union_all(stand.add_columns(*nothing), sa.select(token, no_end, *others))


def _ends_of_standing(model: Model, dialect: str) -> sa.Select[Any]:
    """Return the leases that stand, and their ends."""
    leases, held = model.__leases__, standing_leases(model, dialect).subquery("held")
    return sa.select(leases.c.token, leases.c.expires_at).join(held, held.c.token == leases.c.token)


def _extend(model: Model, dialect: str) -> sa.Update:
    """Extend the leases that stand, locked in the order of their tokens, so that two renewals never deadlock."""
    leases, held = model.__leases__, standing_leases(model, dialect).subquery("held")
    locked = leases.alias("o")
    tokens = sa.select(locked.c.token).join(held, held.c.token == locked.c.token).order_by(locked.c.token)
    if dialect == POSTGRES:
        tokens = tokens.with_for_update(of=locked)
    update = sa.update(leases).where(in_rows(leases.c.token, tokens, dialect)).values(expires_at=expiry_of(dialect))
    return update.returning(leases.c.token, leases.c.expires_at)


def _lost(model: Model, dialect: str) -> sa.Select[Any]:
    """Return token and id of the claims whose record names another lease or none, with its status and start."""
    jobs = table_of(model)
    wanted = wanted_table(dialect)

    def of_job(column: str) -> Any:
        return sa.select(jobs.c[column]).where(jobs.c.id == wanted.c.id).scalar_subquery()

    return sa.select(
        wanted.c.token, wanted.c.id, of_job("status").label("status"), of_job("started_at").label("started_at")
    ).where(of_job("lease").is_distinct_from(wanted.c.token))


# On SQLite the parts of a renewal run in turn.
_extend_statement = prepared(_extend)
_standing_statement = prepared(_ends_of_standing)
_lost_statement = prepared(_lost)


def _report_update(_: Model, jobs: Any, held: Any, dialect: str) -> sa.Update:
    wanted = wanted_table(dialect, progress=sa.SmallInteger(), metrics=sa.Text())
    values = report_values(jobs, dialect, wanted.c.progress, wanted.c.metrics)
    return sa.update(jobs).where(*holds(jobs, wanted, held, dialect)).values(values)


def _release_update(_: Model, jobs: Any, held: Any, dialect: str) -> sa.Update:
    wanted = wanted_table(dialect)
    return sa.update(jobs).where(*holds(jobs, wanted, held, dialect)).values(lease=sa.null())


_REPORT = FencedWrite(_report_update, ends=False)
_RELEASE = FencedWrite(_release_update, ends=True)
