"""Every error that mljobs raises on purpose.

::

    MlJobsError
     |- InvalidValueError      (also ValueError)   a field was given a value it cannot hold
     |   |- FilterError                            a word of a filter is not understood
     |   +- AmbiguousIdError                       several jobs have an id that begins or ends so
     |- JobDecodeError         (also ValueError)   KV JSON that is not a job record
     |- JobNotFound            (also LookupError)  no record has this id
     |- TerminalStateError                         the record has finished; it never changes again
     |- InvalidTransitionError                     this state may not follow that one
     |- TargetLockedError                          another job holds the exclusive target
     |- StartRefusedError                          a claim met a job that cannot be started
     |- JobExistsError                             a record with this id is there, and none was expected
     |- JobHeldError                               a worker holds the job; only that worker writes it
     |- GiveUp                                     a handler's failure that no retry would mend
     |- LeaseLostError                             the worker no longer holds the job; nothing was written
     |- JobCancelled                               the job that this code runs was cancelled
     |- WaitTimeout            (also TimeoutError) the job has not finished in time
     |- TransferError          (also OSError)      a file could not be read or written to its end
     |- ModelError             (also TypeError)    a class with MlJobMixin cannot hold a record
     +- SchemaError                                the database is not what this version expects

Each carries its data as attributes, so that callers never parse a message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from inspect import signature
from typing import Any
from uuid import UUID

from sqlalchemy.exc import DontWrapMixin

from mljobs._printable import printable
from mljobs.states import MlJobStatus

_SHOWN = 80
_DATABASE_URL = re.compile(r"((?:postgres|postgresql|sqlite|mysql|mariadb|oracle|mssql)[+\w]*://)[^\s'\"]*[^\s'\"/)>]")
"""What an engine or a URL shows of itself; there may be a password in it."""


def shown(value: object) -> str:
    """Return a value as a message shows it: its ``repr``, a time as one reads it, cut to a sensible length."""
    try:
        if isinstance(value, datetime):
            text = value.isoformat(" ", "milliseconds" if value.microsecond % 1000 == 0 else "auto")
        else:
            text = repr(value.value) if isinstance(value, StrEnum) else repr(value)
    except Exception:  # noqa: BLE001 - a broken __repr__ must not hide the error that is being reported
        text = f"<{type(value).__name__}>"
    text = _DATABASE_URL.sub(r"\1...", text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


class MlJobsError(DontWrapMixin, Exception):
    """Root of all errors of mljobs. ``DontWrapMixin``: SQLAlchemy passes it on as it is, never as ``StatementError``.

    A subclass keeps each argument as an attribute of the same name; so its errors can be pickled and copied.
    """

    def __reduce__(self) -> str | tuple[Any, ...]:
        taken = signature(type(self).__init__).parameters.values()
        names = [each.name for each in taken if each.kind is each.POSITIONAL_OR_KEYWORD][1:]
        return (type(self), tuple(getattr(self, name) for name in names)) if names else super().__reduce__()


class InvalidValueError(MlJobsError, ValueError):
    """A field was given a value that it cannot hold.

    Attributes:
        field: The field's name, e.g. ``"progress"``.
        value: What was given.
        reason: Why it is refused.
    """

    def __init__(self, field: str, value: object, reason: str) -> None:
        self.field = field
        self.value = value
        self.reason = reason
        super().__init__(f"field {field!r} cannot be {shown(value)}: {reason}")


class FilterError(InvalidValueError):
    """A word of a filter that is not understood; nothing was asked of the database.

    Attributes:
        text: The whole filter.
        position: Where the word begins in it, from 0.
        word: The word.
        known: What could stand there: names of fields, or tokens.
        suggestion: A word that may have been meant; None where nothing is near.
    """

    def __init__(  # noqa: PLR0917 - unpickled by position
        self,
        text: str,
        position: int,
        word: str,
        reason: str,
        known: Sequence[str] = (),
        suggestion: str | None = None,
    ) -> None:
        super().__init__("filter", text, reason)
        self.text = text
        self.position = position
        self.word = word
        self.known = tuple(known)
        self.suggestion = suggestion
        repair = f"; did you mean {printable(suggestion)}?" if suggestion else ""
        there_is = f" (there are {', '.join(self.known)})" if self.known else ""
        self.args = (f"filter word {shown(word)}, character {position + 1}: {printable(reason)}{repair}{there_is}",)

    @property
    def repaired(self) -> str | None:
        """The whole filter with the suggestion in the word's place."""
        if self.suggestion is None:
            return None
        return self.text[: self.position] + self.suggestion + self.text[self.position + len(self.word) :]


class AmbiguousIdError(InvalidValueError):
    """Several jobs have an id that begins or ends so.

    Attributes:
        text: What was given.
        candidates: Their ids, the latest first; at most ten or so.
    """

    def __init__(self, text: str, candidates: Sequence[UUID]) -> None:
        shown_ids = ", ".join(str(one) for one in candidates[:3])
        more = "" if len(candidates) <= 3 else ", ..."
        super().__init__(
            "id", text, f"several jobs have it: {shown_ids}{more}; give more digits, the end tells them apart"
        )
        self.text = text
        self.candidates = tuple(candidates)


class JobDecodeError(MlJobsError, ValueError):
    """KV JSON that is not a job record.

    Attributes:
        field: The KV key at fault, e.g. ``"status"``; ``None`` when the text as a whole is at fault.
        reason: What is wrong with it.
    """

    def __init__(self, field: str | None, reason: str) -> None:
        self.field = field
        self.reason = reason
        super().__init__(f"field {field!r}: {reason}" if field is not None else reason)


class JobNotFound(MlJobsError, LookupError):
    """No record has this id.

    Attributes:
        job_id: The id that was asked for.
    """

    def __init__(self, job_id: UUID) -> None:
        self.job_id = job_id
        super().__init__(f"job {job_id} does not exist")


TRUNCATED = "be truncated"
"""The action of a TRUNCATE, which no single job is message for."""
_TRUNCATE = (
    "TRUNCATE of the job table is refused: it holds finished jobs, or the transaction's snapshot may be too old to tell. "
    "Old records go by prune. A test empties its tables by a rollback or by mljobs.testing.empty: docs/testing.md"
)


class TerminalStateError(MlJobsError):
    """The record has finished, and a finished record never changes.

    Attributes:
        job_id: The record; ``None`` where the database did not say (SQLite's triggers cannot).
        status: Its final state; ``None`` where the database did not say.
        finished_at: When it finished; ``None`` where unknown.
        changes: What the refused write would have changed, ``{field: (old, new)}``.
    """

    def __init__(
        self,
        job_id: UUID | None = None,
        status: MlJobStatus | None = None,
        finished_at: datetime | None = None,
        changes: Mapping[str, tuple[object, object]] | None = None,
        action: str = "change",
    ) -> None:
        self.job_id = job_id
        self.status = status
        self.finished_at = finished_at
        self.changes = dict(changes or {})
        self.action = action
        subject = f"job {job_id}" if job_id is not None else "the job"
        state = f"is {status.token}" if status is not None else "is in a terminal state"
        since = f" (since {finished_at:%Y-%m-%d %H:%M:%S} UTC)" if finished_at is not None else ""
        detail = "; ".join(f"{field} {shown(old)} -> {shown(new)}" for field, (old, new) in self.changes.items())
        message = f"{subject} {state}{since} and cannot {action}" + (f": {detail}" if detail else "")
        super().__init__(_TRUNCATE if action == TRUNCATED else message)


class InvalidTransitionError(MlJobsError):
    """A state that may not follow the present one.

    Attributes:
        job_id: The record; ``None`` where the database did not say.
        status: Its state; ``None`` where the database did not say.
        wanted: The state that was asked for; ``None`` where the database did not say.
        advice: What to do, where there is something.
    """

    def __init__(
        self,
        job_id: UUID | None = None,
        status: MlJobStatus | None = None,
        wanted: MlJobStatus | None = None,
        advice: str | None = None,
    ) -> None:
        self.job_id = job_id
        self.status = status
        self.wanted = wanted
        self.advice = advice
        subject = f"job {job_id}" if job_id is not None else "the job"
        if status is None or wanted is None:
            super().__init__(f"{subject} cannot take this state from the one it is in")
        else:
            text = f"{subject} is {status.token} and cannot become {wanted.token}"
            super().__init__(text if advice is None else f"{text}; {advice}")


class TargetLockedError(MlJobsError):
    """Another exclusive job has the target that this one must have to itself.

    Attributes:
        job_id: The job that has to wait; None where the database did not say.
    """

    def __init__(self, job_id: UUID | None = None) -> None:
        self.job_id = job_id
        subject = "the job" if job_id is None else f"job {job_id}"
        super().__init__(f"{subject} has to wait: its target is held by another exclusive job")


class StartRefusedError(MlJobsError):
    """A claim met a job that cannot be started: its row cannot be read as the class, or the database refuses the write.

    Nothing was claimed. The job stays queued: a worker of a newer release may know what this one cannot read. Claim the
    others with ``skip=[error.job_id]``.

    Attributes:
        job_id: The job.
        reason: What the driver, the ORM or the database said.
        column: The column whose value cannot be read; None where it is the write that is refused.
    """

    def __init__(self, job_id: UUID, reason: str, column: str | None = None) -> None:
        self.job_id = job_id
        self.reason = reason
        self.column = column
        where = "" if column is None else f"column {column} cannot be read: "
        super().__init__(f"job {job_id} cannot be started and stays queued: {where}{reason}")


class JobExistsError(MlJobsError):
    """A record with this id is there already, and a new one was to be added.

    Attributes:
        job_id: The record; None where several were added at once and the database does not say which it was.
        place: Where the second one came from, e.g. ``"line 12"``; None where the program made it.
    """

    def __init__(self, job_id: UUID | None, place: str | None = None) -> None:
        self.job_id = job_id
        self.place = place
        subject = "one of these jobs" if job_id is None else f"job {job_id}"
        super().__init__(
            f"{subject}{'' if place is None else f' of {place}'} exists already: its id would be a duplicate"
        )


class JobHeldError(MlJobsError):
    """A worker holds the job, so nobody else may write or delete its record.

    Attributes:
        job_id: The job.
        worker: Who holds it.
        expires_at: When the lease ends unless it is renewed; afterwards ``rescue`` frees the job.
    """

    def __init__(self, job_id: UUID, worker: str, expires_at: datetime) -> None:
        self.job_id = job_id
        self.worker = worker
        self.expires_at = expires_at
        super().__init__(
            f"job {job_id} is held by worker {shown(worker)} until {expires_at:%Y-%m-%d %H:%M:%S} UTC; "
            "let it end, or cancel or rescue the job"
        )


class LeaseLostError(MlJobsError):
    """The lease behind a write is gone: expired and rescued, or released. Nothing was written.

    Attributes:
        job_id: The job that was held.
        token: The fencing token that no longer holds it.
    """

    def __init__(self, job_id: UUID, token: int) -> None:
        self.job_id = job_id
        self.token = token
        super().__init__(f"job {job_id} is no longer held by lease {token}; nothing was written, stop working on it")


class GiveUp(MlJobsError):
    """Raised by a handler whose failure no retry would mend: ``raise GiveUp("C must be positive")``.

    The job fails with this reason, whatever ``retries`` its handler has.
    """


class JobCancelled(MlJobsError):
    """The job that this code runs was cancelled; raised at the next check so that the work stops.

    Attributes:
        job_id: The cancelled job.
    """

    def __init__(self, job_id: UUID) -> None:
        self.job_id = job_id
        super().__init__(f"job {job_id} was cancelled")


class WaitTimeout(MlJobsError, TimeoutError):
    """The job has not finished in the given time. It goes on.

    Attributes:
        job_id: The job that was waited for.
        timeout: How long, in seconds.
        status: Its state when the time was up.
    """

    def __init__(self, job_id: UUID, timeout: float, status: MlJobStatus) -> None:
        self.job_id = job_id
        self.timeout = timeout
        self.status = status
        super().__init__(f"job {job_id} is still {status.token} after {timeout:g} s")


class ModelError(MlJobsError, TypeError):
    """A class with ``MlJobMixin`` cannot hold a record as it is defined.

    Attributes:
        model: The class.
        reason: Why, and what to do.
    """

    def __init__(self, model: type[Any], reason: str) -> None:
        self.model = model
        self.reason = reason
        super().__init__(f"class {model.__name__} cannot hold a job record: {reason}")


class TransferError(MlJobsError, OSError):
    """A file could not be read or written to its end: a full disk, a broken pipe, a damaged archive.

    Attributes:
        file: Its name.
        reason: What went wrong.
        records: How many records were read or written before.
    """

    def __init__(self, file: str, reason: str, records: int = 0) -> None:
        self.file = file
        self.reason = reason
        self.records = records
        super().__init__(f"{file}: {reason} (after {records:,} records)")


class SchemaError(MlJobsError):
    """The database is not what this version of mljobs expects.

    Attributes:
        problems: One sentence for each difference.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.message = message
        self.problems = tuple(problems)
        super().__init__("\n  - ".join((message, *self.problems)))
