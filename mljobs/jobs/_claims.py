"""``Claim``: the right to work on a job, under a lease that all jobs of one claim share; and ``Lease``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic
from typing import cast as typed
from uuid import UUID

import msgspec

from mljobs.db._answers import Answer
from mljobs.errors import InvalidValueError
from mljobs.jobs._base import M, Model, owner_of
from mljobs.jobs._records import record


class Lease:
    """One row of the lease table, as this process knows it: shared by the claims that one statement made.

    Attributes:
        model: The mapped class of its jobs.
        token: Names the lease in the record of each of its jobs.
        acquired_at: When it was made, by the database's clock. Two leases may have one token, after a restarted sequence or
            a restored backup, but not one token and one ``acquired_at``.
        open: Ids, as integers, of its jobs that this process has not ended; None where another process may have ended some.
        parted: Whether its jobs ended in several writes. Two of them at the same time may each have seen the jobs of the
            other as still open, and neither then deletes the lease.
    """

    __slots__ = ("acquired_at", "model", "open", "parted", "token")

    def __init__(self, model: Model, token: int, acquired_at: datetime | None, job_ids: Iterable[int] | None) -> None:
        self.model = model
        self.token = token
        self.acquired_at = acquired_at
        self.open = None if job_ids is None else set(job_ids)
        self.parted = False

    def is_left_empty_without(self, job_ids: set[int]) -> bool:
        """Whether no job has this lease any more once these jobs have ended."""
        empty = self.open is not None and self.open <= job_ids
        self.parted = self.parted or not empty
        return empty

    @property
    def may_be_left_over(self) -> bool:
        """Whether it has no job any more, and perhaps no write has deleted it."""
        return self.parted and self.open is not None and not self.open

    def __reduce__(self) -> tuple[Any, ...]:
        alone = self.open is not None and len(self.open) == 1
        return Lease, (self.model, self.token, self.acquired_at, self.open if alone else None)


class Claim(msgspec.Struct, Generic[M], eq=False, gc=False):
    """The right to work on a job until the lease ends.

    Attributes:
        job_id: The id of the claimed job.
        token: The fencing token: grows with every claim, never used twice. The jobs of one claim share it.
        worker: The name that the claim was made under.
        expires_at: When the lease ends unless it is renewed, UTC.
        lease: The lease, shared with the other jobs of the same claim.
    """

    _job: M | UnreadJob
    job_id: UUID
    token: int
    worker: str
    expires_at: datetime
    lease: Lease

    @property
    def job(self) -> M:
        """The record as it was claimed."""
        if isinstance(self._job, UnreadJob):
            self._job = typed("M", self._job.rows.read(self._job.at))
        return self._job

    @property
    def kind(self) -> str:
        """The kind of the job."""
        return self._job.kind

    @property
    def model(self) -> type[M]:
        """The mapped class of the job."""
        return typed("type[M]", self.lease.model)

    @property
    def ended(self) -> bool:
        """Whether this process has recorded the end of this claim already."""
        return self.lease.open is not None and self.job_id.int not in self.lease.open

    def note_end(self) -> None:
        """Note that this claim no longer holds its job."""
        if self.lease.open is not None:
            self.lease.open.discard(self.job_id.int)

    def expiring(self, expires_at: datetime) -> Claim[M]:
        """Return the same claim with another ``expires_at``."""
        return Claim(self._job, self.job_id, self.token, self.worker, expires_at, self.lease)

    def __reduce__(self) -> tuple[Any, ...]:
        return Claim, (self.job, self.job_id, self.token, self.worker, self.expires_at, self.lease)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Claim) and (self.token, self.job_id) == (other.token, other.job_id)

    def __hash__(self) -> int:
        return hash(self.job_id.int)  # hash(job_id) is Python, and several times as slow

    def __repr__(self) -> str:
        return f"<Claim of job {self.job_id} by {self.worker}, token {self.token}, until {self.expires_at}>"


class ClaimedRows(msgspec.Struct, gc=False):
    """The rows that a claim has read, from which records are made when they are asked for.

    Attributes:
        model: The mapped job class.
        answer: The rows.
        columns: Where the record is in a row.
    """

    model: Model
    answer: Answer
    columns: slice

    def read(self, at: int) -> Any:
        """Return the record in a row."""
        return record(self.model, self.answer.row(at)[self.columns])


class UnreadJob(msgspec.Struct, gc=False):
    """The record of a claimed job before it is asked for: a busy worker often needs only its id and kind.

    Attributes:
        rows: The rows of its claim.
        at: The number of its row.
        kind: The token of its kind.
    """

    rows: ClaimedRows
    at: int
    kind: str


@dataclass(frozen=True, slots=True)
class Renewal(Generic[M]):
    """What became of claims whose leases were to be renewed.

    Attributes:
        held: Still held, with their new ``expires_at``.
        lost: Gone: rescued, released or requeued. Stop working; nothing that these workers write will be accepted.
        cancelled: Still held, but the job has been cancelled. Stop working, then ``release``.
    """

    held: list[Claim[M]]
    lost: list[Claim[M]]
    cancelled: list[Claim[M]]


def note_ends(claims: Iterable[Claim[Any]]) -> None:
    """Note that these claims no longer hold their jobs."""
    given = list(claims)
    ended = {claim.job_id.int for claim in given}
    for lease in {claim.lease for claim in given}:
        if lease.open is not None:
            lease.open -= lease.open & ended  # in place: other threads end other claims of it


def model_of(claims: Iterable[Claim[Any]]) -> Model:
    """Return the one job class of these claims.

    Raises:
        InvalidValueError: They are of several.
    """
    leases = {claim.lease for claim in claims}
    models: set[Model] = {owner_of(lease.model) for lease in leases}
    if len(models) != 1:
        raise InvalidValueError("claims", models, "one call takes claims of one model")
    return models.pop()
