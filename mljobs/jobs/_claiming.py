"""Claim jobs and hold them: the record is history, the lease is the present.

Whoever claims a job holds a :class:`Claim`. Its token, which grows with every claim and never comes back, is part of the
condition of every later write, so a worker that lost its lease can write nothing, however late it wakes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Connection,
    Integer,
    Select,
    SmallInteger,
    String,
    Text,
    and_,
    any_,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    null,
    or_,
    select,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from mljobs._values import to_json_text, to_member
from mljobs.db._prepared import Prepared
from mljobs.errors import InvalidValueError, LeaseLostError, TargetLockedError, TerminalStateError
from mljobs.jobs._base import (
    NULL,
    Bind,
    JobRef,
    Model,
    any_of,
    check_count,
    check_lease,
    connection_of,
    constant,
    expiry_of,
    is_postgres,
    loaded,
    lock_sqlite,
    moments,
    named,
    now_of,
    owner_of,
    per_model,
    plain,
    record,
    refresh,
    refusal,
    state_of,
    table_of,
    unnested,
    whole_table_of,
)
from mljobs.record._models import MlJob
from mljobs.record._values import worker_name
from mljobs.states import MlJobStatus
from mljobs.types import JobId

DEFAULT_LEASE = 60.0
"""Seconds that a claim lasts without renewal."""
MAX_BATCH = 10_000
"""The most jobs that one statement claims, renews or finishes."""
_PROGRESS_MAX = 100
_ATTEMPTS_MAX = 32_767
_ROUNDS = 20
_TOLD_MAX = 128


class Claim:
    """The right to work on a job until the lease ends.

    Attributes:
        token: The fencing token: grows with every claim, never used twice.
        worker: The name that the claim was made under.
        expires_at: When the lease ends unless it is renewed, UTC.
        job_id: The id of the claimed job.
    """

    __slots__ = ("_job", "expires_at", "job_id", "token", "worker")

    def __init__(self, job: MlJob | Unread, token: int, worker: str, expires_at: datetime) -> None:
        self._job = job
        self.job_id = job.id
        self.token = token
        self.worker = worker
        self.expires_at = expires_at

    @property
    def job(self) -> MlJob:
        """The record as it was claimed."""
        if isinstance(self._job, Unread):
            self._job = self._job.read()
        return self._job

    @property
    def kind(self) -> str:
        """The kind of the job."""
        return self._job.kind

    @property
    def model(self) -> Model:
        """The mapped class of the job."""
        return self._job.reader.model if isinstance(self._job, Unread) else type(self._job)

    def until(self, expires_at: datetime) -> Claim:
        """Return the same claim with another end."""
        return Claim(self.job, self.token, self.worker, expires_at)

    def __reduce__(self) -> tuple[Any, ...]:
        return Claim, (self.job, self.token, self.worker, self.expires_at)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Claim) and (self.token, self.job_id) == (other.token, other.job_id)

    def __hash__(self) -> int:
        return hash(self.token)

    def __repr__(self) -> str:
        return f"<Claim of job {self.job_id} by {self.worker}, token {self.token}, until {self.expires_at}>"


@dataclass(frozen=True, slots=True)
class Reader:
    """What makes records of the rows of one statement: token, end of the lease, record.

    Attributes:
        model: The mapped job class.
        columns: Where in a row the record is.
        at_kind: Where its kind is.
        values: Makes Python values of what the driver gives.
    """

    model: Model
    columns: slice
    at_kind: int
    values: Callable[[Sequence[Any]], Sequence[Any]]


class Unread:
    """A job that nobody has asked for yet, in its row: a busy worker often needs no more than its id and kind."""

    __slots__ = ("id", "reader", "row")

    def __init__(self, reader: Reader, row: Sequence[Any], job_id: UUID) -> None:
        self.reader = reader
        self.row = row
        self.id = job_id

    @property
    def kind(self) -> str:
        """The token of its kind."""
        kind: str = self.row[self.reader.at_kind]
        return kind

    def read(self) -> MlJob:
        """Return the record."""
        job: MlJob = record(self.reader.model, self.reader.values(self.row)[self.reader.columns])
        return job


@dataclass(frozen=True, slots=True)
class Report:
    """What a running job has come to.

    Attributes:
        claim: What ``claim`` returned.
        progress: Percent, 0 to 100; None keeps what the record holds.
        metrics_json: JSON text; None keeps what the record holds.
    """

    claim: Claim
    progress: int | None = None
    metrics_json: str | None = None

    @classmethod
    def of(cls, claim: Claim, *, progress: int | None = None, metrics: Any = None) -> Report:
        """Return a report with its values checked.

        Raises:
            InvalidValueError: A value is not one that its field can hold.
        """
        text = None if metrics is None else to_json_text("metrics", metrics)
        return cls(claim, None if progress is None else _percent(progress), text)


@dataclass(frozen=True, slots=True)
class Renewal:
    """What became of leases that were to be renewed.

    Attributes:
        held: Still held, with their new ``expires_at``.
        lost: Gone: rescued, released or requeued. Stop working; nothing that these workers write will be accepted.
        cancelled: Still held, but the job has been cancelled. Stop working, then ``release``.
    """

    held: list[Claim]
    lost: list[Claim]
    cancelled: list[Claim]


def claim(
    session: Bind,
    *,
    worker: str,
    kinds: Iterable[str] | None = None,
    limit: int = 1,
    lease: float = DEFAULT_LEASE,
    model: Model = MlJob,
) -> list[Claim]:
    """Start queued jobs that nobody holds, the highest priority first, then the oldest.

    Each becomes running with progress 0 and one more attempt. Jobs whose ``run_after`` lies ahead wait; of an exclusive
    target one job runs at a time, and the jobs behind it do not wait for it.

    Args:
        session: The caller's session or connection; the claim is part of its transaction.
        worker: A name for operators to read, e.g. ``"host-1234"``.
        kinds: Only this one, or these; None for all.
        limit: At most so many, 1 to 10,000.
        lease: Seconds until the claims end unless they are renewed.
        model: The mapped job class.

    Returns:
        The claims, in the order of the queue; empty when there is nothing to do.

    Raises:
        InvalidValueError: An argument is out of range.
    """
    which, parameters = wish(model, worker, kinds, limit, lease)
    if parameters["kinds"] == []:
        return []
    return _claim(session, model, which, parameters, limit)


def wish(
    model: Model, worker: str, kinds: Iterable[str] | None, limit: int, lease: float
) -> tuple[str, dict[str, Any]]:
    """Return which statement claims what ``claim`` was asked for, and its parameters.

    Raises:
        InvalidValueError: An argument is out of range.
    """
    whole_table_of(model)
    if isinstance(kinds, str):
        kinds = [kinds]
    tokens = None if kinds is None else sorted({to_member(model.__kinds__, "kinds", kind).value for kind in kinds})
    parameters = {"worker": worker_name(worker), "kinds": tokens, **moments(check_lease(lease))}
    check_count("limit", limit, MAX_BATCH)
    if tokens is None:  # kinds that were named are always asked for: a newer release may queue others
        return "any", parameters
    if len(tokens) == 1:
        return "kind", {**parameters, "kind": tokens[0]}
    return "kinds", parameters


def claim_one(
    session: Bind,
    job: JobRef,
    *,
    worker: str,
    lease: float = DEFAULT_LEASE,
    model: Model = MlJob,
) -> Claim:
    """Start this job, if it is queued and its target is free; ``run_after`` is not asked.

    Args:
        session: The caller's session or connection; the claim is part of its transaction.
        job: The job or its id.
        worker: A name for operators to read.
        lease: Seconds until the claim ends unless it is renewed.
        model: The mapped job class.

    Raises:
        JobNotFound: No record has this id.
        TerminalStateError: It has finished.
        InvalidTransitionError: It is running already.
        TargetLockedError: It is exclusive, and another job holds its target.
    """
    model, job_id = named(job, model)
    whole_table_of(model)
    parameters = {"worker": worker_name(worker), "ids": [job_id], **moments(check_lease(lease))}
    claims = _claim(session, model, "ids", parameters, 1)
    if claims:
        return claims[0]
    connection = connection_of(session, model)
    if state_of(connection, model, job_id) is MlJobStatus.QUEUED:
        raise TargetLockedError(job_id)
    raise refusal(connection, model, job_id, MlJobStatus.RUNNING)


def renew(session: Bind, claims: Iterable[Claim], *, lease: float = DEFAULT_LEASE) -> Renewal:
    """Extend the leases that are still held, all in one statement.

    Args:
        session: The caller's session or connection.
        claims: Any number, of one model.
        lease: Seconds from now.

    Returns:
        Which are held on, which were lost, and which jobs were cancelled meanwhile.
    """
    held = {claim.token: claim for claim in claims}
    parameters = moments(check_lease(lease))
    if not held:
        return Renewal([], [], [])
    model = model_of(held.values())
    connection = connection_of(session, model)
    rows = _renewal(model).rows(connection, {**parameters, "tokens": list(held)})
    renewal, requeued = _sorted(held, rows)
    if requeued:
        _release(model).rows(connection, {"tokens": requeued})
    return renewal


def look(session: Bind, claims: Iterable[Claim]) -> Renewal:
    """Say which leases are held, lost and cancelled, as ``renew`` does, and extend none.

    Args:
        session: The caller's session or connection.
        claims: Any number, of one model.
    """
    held = {claim.token: claim for claim in claims}
    if not held:
        return Renewal([], [], [])
    model = model_of(held.values())
    rows = _look(model).rows(connection_of(session, model), {"tokens": list(held)})
    renewal, _ = _sorted(held, rows)
    return renewal


def _sorted(held: dict[int, Claim], rows: Iterable[Sequence[Any]]) -> tuple[Renewal, list[int]]:
    """Sort leases by what rows of token, end and status tell; return also the tokens of jobs that nobody works on."""
    renewal = Renewal([], [], [])
    requeued = []
    for token, expires_at, status in rows:
        claim = held.pop(token)
        if status is MlJobStatus.RUNNING:
            renewal.held.append(claim.until(expires_at))
        elif status.is_terminal:
            renewal.cancelled.append(claim.until(expires_at))
        else:
            renewal.lost.append(claim)
            if status is MlJobStatus.QUEUED:  # somebody put the job back by hand; let the next worker have it
                requeued.append(token)
    renewal.lost.extend(held.values())
    return renewal, requeued


def release(session: Bind, claims: Iterable[Claim]) -> int:
    """Give leases back without an outcome, once the work on cancelled jobs has stopped.

    The lease of a job that is still running ends too, and then no timer rescues that job: requeue it instead.

    Returns:
        How many were still held.
    """
    tokens = {claim.token: claim for claim in claims}
    if not tokens:
        return 0
    model = model_of(tokens.values())
    return len(_release(model).rows(connection_of(session, model), {"tokens": list(tokens)}))


def set_progress(session: Bind, claim: Claim, progress: int) -> None:
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


def set_progress_many(session: Bind, progress: Iterable[tuple[Claim, int]]) -> list[LeaseLostError | Any | None]:
    """Record the progress of many running jobs in one statement, each if its lease still holds it.

    Args:
        session: The caller's session or connection.
        progress: Pairs of claim and percent.

    Returns:
        For each pair, in order, None or the error that ``set_progress`` would raise.
    """
    return report_many(session, [Report(claim, _percent(value)) for claim, value in progress])


def report(session: Bind, claim: Claim, *, progress: int | None = None, metrics: Any = None) -> None:
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


def report_many(session: Bind, reports: Iterable[Report]) -> list[LeaseLostError | Any | None]:
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
    latest = {report.claim.token: report for report in given}
    rows = _report_rows(connection, model, list(latest.values()))
    done = {token for token, updated in rows if updated is not None}
    held = {token for token, _ in rows}
    errors: list[Any] = []
    for claim in [report.claim for report in given]:
        if claim.token in done:
            errors.append(None)
        else:
            errors.append(explain(connection, model, claim, held=claim.token in held, wanted=MlJobStatus.RUNNING))
    refresh(session, model, [report.claim.job_id for report in given])
    return errors


def explain(connection: Connection, model: Model, claim: Claim, *, held: bool, wanted: MlJobStatus) -> Exception:
    """Return why a write under ``claim`` found nothing to change."""
    if held:
        error = refusal(connection, model, claim.job_id, wanted)
        if isinstance(error, TerminalStateError):
            return error
    return LeaseLostError(claim.job_id, claim.token)


def model_of(claims: Iterable[Claim]) -> Model:
    """Return the one job class of these claims.

    Raises:
        InvalidValueError: They are of several.
    """
    models: set[Model] = {owner_of(model) for model in {claim.model for claim in claims}}
    if len(models) != 1:
        raise InvalidValueError("claims", models, "one call takes claims of one model")
    return models.pop()


def _percent(value: int) -> int:
    number: Any = value
    if not isinstance(number, int) and hasattr(number, "__index__"):
        number = number.__index__()  # NumPy's integers
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise InvalidValueError("progress", value, f"expected an int, 0 to {_PROGRESS_MAX}")
    return min(number, _PROGRESS_MAX)


# ---------------------------------------------------------------------------------------------------- the statements


def _claim(session: Bind, model: Model, which: str, parameters: dict[str, Any], limit: int) -> list[Claim]:
    connection = connection_of(session, model)
    postgres = is_postgres(connection)
    if not postgres:
        lock_sqlite(connection, model)
    taken: list[Taken] = []
    # A picked job whose exclusive target was taken in the same moment gets no lease: pick again in its place.
    for _ in range(_ROUNDS):
        attempt = {**parameters, "limit": limit - len(taken)}
        if postgres:
            rows, values = _claim_statement(model, which, told(attempt)).fetched(connection, attempt)
            now_taken, picked = taken_and_picked(rows, values)
        else:
            now_taken, picked, values = *_claim_sqlite(connection, model, which, attempt), list
        taken += now_taken
        if len(now_taken) == picked or len(taken) == limit:
            break
    return claims_of(session, model, taken, parameters["worker"], values)


Taken = tuple[int, Any, Sequence[Any]]
"""A claim: token, end of the lease, and a row as ``_Reader`` takes it."""


def claims_of(
    session: Bind, model: Model, taken: list[Taken], worker: str, values: Callable[[Sequence[Any]], Sequence[Any]]
) -> list[Claim]:
    """Return claims in the order of the queue; their records are members of the caller's session, if it is one."""
    order = _queue_order(model)
    taken.sort(key=order)
    columns = _whole(model)
    if isinstance(session, Connection) and plain(model):
        reader, at_id = Reader(model, columns, _at(model, "kind"), values), _at(model, "id")
        return [Claim(Unread(reader, row, row[at_id]), token, worker, end) for token, end, row in taken]
    jobs = loaded(session, model, [record(model, values(row)[columns]) for _, _, row in taken])
    return [Claim(job, token, worker, end) for job, (token, end, _) in zip(jobs, taken, strict=True)]


@per_model
def _whole(model: Model) -> slice:
    """Return where in a row the record is: behind the token and the end of the lease."""
    return slice(2, 2 + len(table_of(model).columns))


@per_model
def _at(model: Model, column: str) -> int:
    """Return where in a row this column is."""
    return 2 + [column.name for column in table_of(model).columns].index(column)


@per_model
def _queue_order(model: Model) -> Callable[[Taken], Any]:
    priority, created, job_id = (_at(model, name) for name in ("priority", "created_at", "id"))

    def order(taken: Taken) -> Any:
        row = taken[2]
        return -row[priority], row[created], row[job_id].int  # UUIDs compare in Python, and slowly

    return order


def taken_and_picked(
    rows: Sequence[Sequence[Any]], values: Callable[[Sequence[Any]], Sequence[Any]]
) -> tuple[list[Taken], int]:
    """Return the claims in the rows of ``started``, and how many jobs were picked for them."""
    leases: dict[Any, int] = {}
    records: list[Sequence[Any]] = []
    expires_at, picked = None, 0
    for row in rows:
        token = row[0]
        if token is None:
            records.append(row)
        elif row[1] is None:
            picked += token
        else:
            if expires_at is None:  # one statement, one moment
                expires_at = values(row)[1]
            leases[row[2]] = token
    return [(leases[row[2]], expires_at, row) for row in records], picked


def _claim_sqlite(
    connection: Connection, model: Model, which: str, parameters: dict[str, Any]
) -> tuple[list[Taken], int]:
    picked = _pick_statement(model, which, told(parameters)).rows(connection, parameters)
    taken: list[Taken] = []
    for job_id, target_lock in picked:
        own = {**parameters, "id": job_id, "target_lock": target_lock}
        for token, expires_at in _lease_statement(model).rows(connection, own):
            (job,) = _start_statement(model).rows(connection, own)
            taken.append((token, expires_at, (token, expires_at, *job)))
    return taken, len(picked)


def _picked(model: Model, which: str, limit: int, dialect: str) -> Select[Any]:
    jobs, leases = table_of(model).alias("j"), model.__leases__
    holders = leases.alias("h")
    condition = [
        jobs.c.status == constant(MlJobStatus.QUEUED),
        # A queued job has no lease, unless somebody put it back by hand while a worker held it.
        ~exists().where(holders.c.job_id == jobs.c.id),
        ~and_(jobs.c.exclusive, exists().where(leases.c.target_lock == jobs.c.target_name)),
    ]
    if which == "ids":
        condition.append(any_of(jobs.c.id, "ids", JobId(), dialect))
    else:
        condition.append(or_(jobs.c.run_after.is_(None), jobs.c.run_after <= now_of(dialect)))
    if which == "kind":  # has an index of its own: a few training jobs behind a million of backfill are found at once
        condition.append(type_coerce(jobs.c.kind, String()) == bindparam("kind", type_=String()))
    elif which == "kinds":
        condition.append(any_of(type_coerce(jobs.c.kind, String()), "kinds", String(), dialect))
    return (
        select(jobs.c.id, case((jobs.c.exclusive, jobs.c.target_name), else_=null()).label("target_lock"))
        .where(*condition)
        .order_by(jobs.c.priority.desc(), jobs.c.created_at, jobs.c.id)
        .limit(constant(limit) if limit else bindparam("limit", type_=Integer()))
    )


def told(parameters: dict[str, Any]) -> int:
    """Return the limit that the statement itself says; 0 for one that is too rare to have a statement of its own.

    With the limit as a parameter, a prepared plan would have to reckon with a tenth of the queue.
    """
    limit: int = parameters["limit"]
    return limit if limit <= _TOLD_MAX else 0


_LEASE_COLUMNS = ("job_id", "worker", "acquired_at", "expires_at", "target_lock")


def started(model: Model, which: str, limit: int, dialect: str) -> list[Select[Any]]:
    """PostgreSQL: pick, lease and start in one statement; rows of the record, of its lease, and of a count.

    A record has no token and no end; a lease has both and the id of its job; the last row tells, in the place of the
    token, how many jobs were picked. None of these is joined to another: the planner, which knows nothing of how many there
    will be, would read the whole table for it, or compare five hundred with five hundred.

    Returns:
        What a UNION ALL joins, the rows with types first: PostgreSQL gives these types to the NULLs of the others.
    """
    jobs, leases = table_of(model), model.__leases__
    picked = _picked(model, which, limit, dialect).with_for_update(skip_locked=True, key_share=True).cte("picked")
    source = select(
        picked.c.id,
        bindparam("worker", type_=Text()),
        now_of(dialect),
        expiry_of(dialect),
        picked.c.target_lock,
    ).order_by(picked.c.target_lock)  # two claims that take several targets wait for each other in one order
    leased = (
        pg_insert(leases)
        .from_select(_LEASE_COLUMNS, source)
        .on_conflict_do_nothing()
        .returning(leases.c.token, leases.c.job_id, leases.c.expires_at)
        .cte("leased")
    )
    begun = (
        update(jobs)
        .where(jobs.c.id == any_(func.array(select(leased.c.job_id).scalar_subquery(), type_=ARRAY(JobId()))))
        .values(_started(model, dialect))
        .returning(*jobs.columns)
        .cte("started")
    )
    token, end = (cast(null(), leases.c[name].type).label(name) for name in ("token", "expires_at"))
    number = cast(func.count(), leases.c.token.type)
    nothing = [NULL] * len(begun.columns)
    return [
        select(token, end, *begun.columns),
        select(leased.c.token, leased.c.expires_at, leased.c.job_id, *nothing[1:]),
        select(number, NULL, *nothing).select_from(picked),
    ]


@per_model
def _claim_statement(model: Model, which: str, limit: int) -> Prepared:
    return Prepared(lambda dialect: union_all(*started(model, which, limit, dialect)))


@per_model
def _pick_statement(model: Model, which: str, limit: int) -> Prepared:
    return Prepared(lambda dialect: _picked(model, which, limit, dialect))


@per_model
def _lease_statement(model: Model) -> Prepared:
    leases = model.__leases__
    values = {
        "job_id": bindparam("id", type_=JobId()),
        "worker": bindparam("worker", type_=Text()),
        "acquired_at": now_of("sqlite"),
        "expires_at": expiry_of("sqlite"),
        "target_lock": bindparam("target_lock", type_=Text()),
    }
    statement = sqlite_insert(leases).values(values).on_conflict_do_nothing()
    return Prepared(lambda _: statement.returning(leases.c.token, leases.c.expires_at))


@per_model
def _start_statement(model: Model) -> Prepared:
    jobs = table_of(model)
    statement = update(jobs).where(jobs.c.id == bindparam("id", type_=JobId()))
    return Prepared(lambda dialect: statement.values(_started(model, dialect)).returning(*jobs.columns))


def _started(model: Model, dialect: str) -> dict[str, Any]:
    attempts = table_of(model).c.attempts
    return {
        "status": constant(MlJobStatus.RUNNING),
        "progress": constant(0),
        "started_at": now_of(dialect),
        "worker": bindparam("worker", type_=Text()),
        "attempts": case((attempts < constant(_ATTEMPTS_MAX), attempts + constant(1)), else_=attempts),
    }


@per_model
def _renewal(model: Model) -> Prepared:
    def build(dialect: str) -> Any:
        jobs, leases = table_of(model), model.__leases__
        status = select(jobs.c.status).where(jobs.c.id == leases.c.job_id).scalar_subquery()
        statement = update(leases).values(expires_at=expiry_of(dialect))
        if dialect == "postgresql":
            ordered = ordered_leases(model, dialect)
            statement = statement.where(leases.c.token == ordered.c.token)
        else:
            statement = statement.where(any_of(leases.c.token, "tokens", BigInteger(), dialect))
        return statement.returning(leases.c.token, leases.c.expires_at, status.label("status"))

    return Prepared(build)


def ordered_leases(model: Model, dialect: str) -> Any:
    """Lock the leases named by ``tokens`` in one order, so that two statements of one worker never deadlock."""
    leases = model.__leases__.alias("o")
    return (
        select(leases.c.token)
        .where(any_of(leases.c.token, "tokens", BigInteger(), dialect))
        .order_by(leases.c.token)
        .with_for_update()
        .cte("ordered")
    )


@per_model
def _look(model: Model) -> Prepared:
    jobs, leases = table_of(model), model.__leases__
    return Prepared(
        lambda dialect: (
            select(leases.c.token, leases.c.expires_at, jobs.c.status)
            .join(jobs, jobs.c.id == leases.c.job_id)
            .where(any_of(leases.c.token, "tokens", BigInteger(), dialect))
        )
    )


@per_model
def _release(model: Model) -> Prepared:
    leases = model.__leases__
    return Prepared(
        lambda dialect: (
            delete(leases).where(any_of(leases.c.token, "tokens", BigInteger(), dialect)).returning(leases.c.token)
        )
    )


def _report_rows(connection: Connection, model: Model, reports: Sequence[Report]) -> list[tuple[int, UUID | None]]:
    """Return ``(token, id of the job that was written)`` for each lease that is still held."""
    if is_postgres(connection):
        metrics = [report.metrics_json for report in reports]
        columns = {
            "tokens": [report.claim.token for report in reports],
            "ids": [report.claim.job_id for report in reports],
            "progress": [report.progress for report in reports],
            # unnest fills the shorter list up with NULLs
            "metrics": metrics if metrics.count(None) < len(metrics) else [],
        }
        return [(row[0], row[1]) for row in _report_statement(model).rows(connection, columns)]
    lock_sqlite(connection, model)
    rows: list[tuple[int, UUID | None]] = []
    for report in reports:
        own = {
            "token": report.claim.token,
            "id": report.claim.job_id,
            "progress": report.progress,
            "metrics": report.metrics_json,
        }
        for (token,) in _held_statement(model).rows(connection, own):
            written = _one_report_statement(model).rows(connection, own)
            rows.append((token, report.claim.job_id if written else None))
    return rows


def _reported(model: Model, dialect: str, progress: Any, metrics: Any) -> dict[str, Any]:
    """Return what a report sets. A column that it says nothing of keeps its value, a big text without being written anew."""
    jobs = table_of(model)
    text_of_metrics = cast(metrics, jobs.c.metrics_json.type) if dialect == "postgresql" else metrics
    return {
        "progress": func.coalesce(progress, jobs.c.progress),
        "metrics_json": func.coalesce(text_of_metrics, jobs.c.metrics_json),
    }


@per_model
def _report_statement(model: Model) -> Prepared:
    def build(dialect: str) -> Select[Any]:
        jobs, leases = table_of(model), model.__leases__
        wanted = unnested("wanted", tokens=BigInteger(), ids=JobId(), progress=SmallInteger(), metrics=Text())
        # KEY SHARE: the heartbeat may move expires_at meanwhile, nobody may take the lease away.
        held = (
            select(leases.c.token, wanted.c.ids, wanted.c.progress, wanted.c.metrics)
            .join(wanted, and_(leases.c.token == wanted.c.tokens, leases.c.job_id == wanted.c.ids))
            .with_for_update(read=True, key_share=True, of=leases)
            .cte("held")
        )
        written = (
            update(jobs)
            .where(jobs.c.id == held.c.ids, jobs.c.status == constant(MlJobStatus.RUNNING))
            .values(_reported(model, dialect, held.c.progress, held.c.metrics))
            .returning(jobs.c.id)
            .cte("written")
        )
        return select(held.c.token, written.c.id).select_from(held.outerjoin(written, written.c.id == held.c.ids))

    return Prepared(build)


@per_model
def _held_statement(model: Model) -> Prepared:
    leases = model.__leases__
    token, job_id = bindparam("token", type_=BigInteger()), bindparam("id", type_=JobId())
    return Prepared(lambda _: select(leases.c.token).where(leases.c.token == token, leases.c.job_id == job_id))


@per_model
def _one_report_statement(model: Model) -> Prepared:
    jobs = table_of(model)
    statement = update(jobs).where(
        jobs.c.id == bindparam("id", type_=JobId()), jobs.c.status == constant(MlJobStatus.RUNNING)
    )
    progress, metrics = bindparam("progress", type_=SmallInteger()), bindparam("metrics", type_=Text())
    return Prepared(lambda dialect: statement.values(_reported(model, dialect, progress, metrics)).returning(jobs.c.id))
