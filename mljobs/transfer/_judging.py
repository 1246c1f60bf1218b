"""Decide what an import does with a record whose id exists already. Pure functions of rows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

from mljobs.errors import InvalidValueError, shown
from mljobs.states import MlJobStatus
from mljobs.transfer._rows import KEYS, NAMES, OWN, PROGRESS, SHARED, STARTED, STATUS, Row

OnConflict = Literal["skip", "update", "error"]
"""What to do with a record that is there already, alive: leave it, change it along a legal edge, or stop."""

_CHOICES: Final = ("skip", "update", "error")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a row.

    Attributes:
        act: ``skip``, ``update`` or ``refuse``.
        field: With ``refuse``, the key at fault.
        reason: With ``refuse``, why.
    """

    act: Literal["skip", "update", "refuse"]
    field: str | None = None
    reason: str = ""


SKIP: Final = Verdict("skip")
UPDATE: Final = Verdict("update")


def check_on_conflict(value: str) -> str:
    """Return ``value`` if it is a choice.

    Raises:
        InvalidValueError: It is none.
    """
    if value not in _CHOICES:
        raise InvalidValueError("on_conflict", value, f"expected one of {', '.join(_CHOICES)}")
    return value


def requeued(row: Row) -> Row:
    """Return a running record as RedDB queues it again on restart: progress 0, not started."""
    values = list(row)
    values[STATUS], values[PROGRESS], values[STARTED] = MlJobStatus.QUEUED.value, 0, None
    return tuple(values)


def differences(there: Row, given: Row, own: Collection[str]) -> list[int]:
    """Return the places where two rows of one id differ.

    Args:
        there: What the database holds.
        given: What the line says.
        own: Which of our own keys the line holds; the others say nothing.
    """
    places = [*range(SHARED), *(at for at, name in enumerate(OWN, SHARED) if name in own)]
    return [at for at in places if there[at] != given[at]]


def judge(there: Row, given: Row, own: Collection[str], on_conflict: str) -> Verdict:
    """Return what to do with a record whose id is there already.

    A finished record is never overwritten, whatever was asked for: an equal one is skipped, another is refused.

    Args:
        there: What the database holds.
        given: What the line says.
        own: Which of our own keys the line holds.
        on_conflict: ``skip`` or ``update``.
    """
    changed = differences(there, given, own)
    if not changed:
        return SKIP
    present, wanted = MlJobStatus(there[STATUS]), MlJobStatus(given[STATUS])
    if present.is_terminal:
        at = STATUS if STATUS in changed else changed[0]
        return Verdict("refuse", _key(at), f"the job is {present.token} and cannot change: {_change(there, given, at)}")
    if on_conflict != "update":
        return SKIP
    if wanted is not present and not present.can_become(wanted):
        return Verdict("refuse", "status", f"the job is {present.token} and cannot become {wanted.token}")
    return UPDATE


def _key(at: int) -> str:
    return KEYS[at] if at < SHARED else NAMES[at]


def _change(there: Row, given: Row, at: int) -> str:
    old, new = there[at], given[at]
    if all(value is None or isinstance(value, str | bool) for value in (old, new)) or at == PROGRESS:
        return f"{_key(at)} {shown(old)} -> {shown(new)}"
    return f"another {_key(at)}"  # times and ids are in the driver's form here, which tells a reader nothing
