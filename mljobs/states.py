"""The kinds and states of a job, and the one table of legal transitions.

Everything that knows a state derives from this file: the ORM hooks, the ``CHECK`` and trigger text, the CLI help, the
graph in the docs and the property tests. The tokens are RedDB's (``MlJobKind`` and ``MlJobStatus`` in its ML job record).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Self


class Token(StrEnum):
    """A string enum whose values are the tokens that the database and the KV JSON hold."""

    @property
    def token(self) -> str:
        """The stored text, e.g. ``"train"``."""
        return str(self.value)

    @classmethod
    def from_token(cls, text: str) -> Self:
        """Return the member that ``text`` names, exactly.

        Args:
            text: A token as RedDB writes it: lower case, no surrounding space.

        Raises:
            ValueError: No member has this token; the message lists those that do.
        """
        member = cls._value2member_map_.get(text)
        if not isinstance(member, cls):
            raise ValueError(f"unknown token {text!r} ({', '.join(cls.tokens())})")  # noqa: TRY004 - the value is wrong
        return member

    @classmethod
    def tokens(cls) -> tuple[str, ...]:
        """All tokens, in the order of definition."""
        return tuple(member.value for member in cls)


class UnknownKind(str):
    """The token of a kind that this release does not know: a newer one, or another application, has queued the job.

    Such a job can be shown, counted and exported. No job can be given such a kind.
    """

    __slots__ = ()

    @property
    def token(self) -> str:
        """The stored text."""
        return str(self)

    @property
    def value(self) -> str:
        """The stored text, as of a member of an enum."""
        return str(self)


class MlJobKind(Token):
    """What a job does."""

    TRAIN = "train"
    """Fit a model."""
    BACKFILL = "backfill"
    """Re-embed existing rows."""
    FEATURE_REFRESH = "feature_refresh"
    """Materialise a feature log."""
    DRIFT_COMPUTE = "drift_compute"
    """Compare live data with the data of the training."""


class MlJobStatus(Token):
    """Where a job is in its life."""

    QUEUED = "queued"
    """Entered by submitting or requeueing; left when a worker claims it or someone cancels it; may last for ever."""
    RUNNING = "running"
    """Entered by a claim; left by its worker's outcome, a cancel, or a rescue once its lease has expired."""
    COMPLETED = "completed"
    """Entered by the worker that holds the lease; never left."""
    FAILED = "failed"
    """Entered by the worker that holds the lease, or by a rescue that gives up; never left."""
    CANCELLED = "cancelled"
    """Entered by anyone while the job is queued or running; never left."""

    @property
    def is_terminal(self) -> bool:
        """Whether a record in this state can never change again."""
        return not TRANSITIONS[self]

    def can_become(self, other: MlJobStatus) -> bool:
        """Whether ``other`` may follow this state. No state follows itself."""
        return other in TRANSITIONS[self]


TRANSITIONS: Mapping[MlJobStatus, frozenset[MlJobStatus]] = MappingProxyType(
    {
        MlJobStatus.QUEUED: frozenset({MlJobStatus.RUNNING, MlJobStatus.CANCELLED, MlJobStatus.FAILED}),
        MlJobStatus.RUNNING: frozenset(
            {MlJobStatus.COMPLETED, MlJobStatus.FAILED, MlJobStatus.CANCELLED, MlJobStatus.QUEUED}
        ),
        MlJobStatus.COMPLETED: frozenset(),
        MlJobStatus.FAILED: frozenset(),
        MlJobStatus.CANCELLED: frozenset(),
    }
)
"""From each state, the states that may follow it."""

TERMINAL: tuple[MlJobStatus, ...] = tuple(status for status in MlJobStatus if status.is_terminal)
"""The final states: completed, failed, cancelled."""

ACTIVE: tuple[MlJobStatus, ...] = tuple(status for status in MlJobStatus if not status.is_terminal)
"""The states that can still change: queued, running."""
