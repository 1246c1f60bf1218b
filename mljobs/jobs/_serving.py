"""Which index serves which terms of a filter, in which order; docs/operations.md has the table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Final, Literal

from sqlalchemy import ColumnElement

from mljobs._values import ID_DIGITS, utc_now
from mljobs.jobs._conditions import condition_of
from mljobs.jobs._filters import Filter, Selection
from mljobs.jobs._words import Pattern, Term
from mljobs.states import ACTIVE, TERMINAL, MlJobStatus

Conditions = list[ColumnElement[bool]]
"""To be combined with AND."""
Reach = Literal["index", "range", "kind", "none"]
"""How a term is found: an index serves it in the order of creation (or it names few jobs), an index serves it in another
order, an index serves it among the finished jobs, or each job has to be looked at."""

_ID_SELECTIVE: Final = 8
"""Digits that an id begins with, from which on few jobs share them: UUIDv7s of one minute have eight in common."""
_BRANCHES: Final = 20
_ENDED: Final = (MlJobStatus.FAILED, MlJobStatus.CANCELLED)
_AT_WORK: Final = Term("status", ":", ACTIVE)
_FINISHED: Final = Term("status", ":", TERMINAL)


@dataclass(frozen=True, slots=True)
class Range:
    """Conditions that an index serves in an order that is not wanted: worth it where few jobs pass.

    Attributes:
        conditions: The conditions.
        alternatives: The same as one or several, of which each job passes at most one and an index serves each.
    """

    conditions: Conditions
    alternatives: list[Conditions]


@dataclass(frozen=True, slots=True)
class Divided:
    """The conditions of a selection, by how jobs that pass them are found.

    Attributes:
        served: By one index, in the order that is wanted.
        ranges: By an index, if few pass.
        looked_at: By looking at each job.
    """

    served: Conditions
    ranges: list[Range]
    looked_at: Conditions


def reach_of(term: Term) -> Reach:
    """Return how the jobs that pass a term are found."""
    values = set(term.values)
    patterns = [value for value in term.values if isinstance(value, Pattern)]
    in_order = {
        "created": True,
        "retry_of": True,
        "kind": not values,  # which no job passes
        "status": values <= set(ACTIVE) or (len(values) == 1 and values <= set(_ENDED)),
        "target": all(pattern.exact is not None for pattern in patterns),
        "id": all(len(pattern.parts[0]) == ID_DIGITS for pattern in patterns),
    }
    if in_order.get(term.name, False):
        return "index"
    if term.name == "kind":
        return "kind"
    ranges = {
        "finished": True,
        "id": all(len(pattern.parts[0]) >= _ID_SELECTIVE for pattern in patterns),
        "status": values == set(_ENDED),
        "target": len(patterns) == 1 and patterns[0].parts[1:] == ("",) and patterns[0].parts[0] != "",
    }
    return "range" if ranges.get(term.name, False) else "none"


def divided(chosen: Selection, *, by_end: bool = False) -> Divided:
    """Return the conditions of a selection by how jobs that pass them are found.

    Args:
        chosen: The filter and the caller's own expressions.
        by_end: Whether jobs are wanted in the order of end, not of creation.
    """
    now = utc_now()

    def conditions(*terms: Term) -> Conditions:
        return [condition_of(term, chosen.model, now) for term in terms]

    found: dict[Reach, list[Term]] = {"index": [], "range": [], "kind": [], "none": []}
    for term in chosen.filter.terms:
        found[reach_of(term)].append(term)
    in_order, kinds, looked_at = found["index"], found["kind"], found["none"]
    states = [set(term.values) for term in chosen.filter.terms if term.name == "status"]
    finished = any(values <= set(TERMINAL) for values in states)
    if any(values <= set(ACTIVE) for values in states):  # few, or sorted anyway
        in_order, kinds = [*in_order, *kinds], []
    elif any(term.name in ("target", "id", "retry_of") for term in in_order):
        looked_at, kinds = [*looked_at, *kinds], []
    elif finished and len(kinds) == 1 and len(kinds[0].values) == 1 and not any(map(_leads, in_order)):
        in_order, kinds = [*in_order, *kinds, _FINISHED], []
        looked_at = [term for term in looked_at if term != _FINISHED]
    of_state = [_FINISHED] if finished else [_FINISHED, _AT_WORK]
    ranges = [
        Range(conditions(term), [conditions(*pair) for pair in product(_split(term), of_state)]) for term in kinds
    ]
    if by_end:
        ends = [term for term in found["range"] if term.name == "finished"]
        found["range"] = [term for term in found["range"] if term.name != "finished"]
        if in_order:
            ranges.append(Range(conditions(*in_order), [conditions(*in_order)]))
        in_order = ends
    ranges += [Range(conditions(term), [conditions(each) for each in _split(term)]) for term in found["range"]]
    return Divided(conditions(*in_order), ranges, [*conditions(*looked_at), *chosen.where])


def _split(term: Term) -> list[Term]:
    """Return a term for each value."""
    return [replace(term, values=(value,)) for value in dict.fromkeys(term.values)]


def _leads(term: Term) -> bool:
    """Whether an index that begins with the term serves it, and so none that begins with the kind."""
    return term.name != "created" and reach_of(term) == "index"


def branches(chosen: Selection) -> list[Selection]:
    """Return a selection as alternatives, each of which an index serves in the order of creation; none where it has none.

    ``status:failed,cancelled target:a,b`` has four, ``kind:train`` two: what has finished, and what is at work.
    """
    terms = chosen.filter.terms
    choices = []
    for term in terms:
        at_work = term.name == "status" and set(term.values) <= set(ACTIVE)
        choices.append(_split(term) if term.name in ("kind", "status", "target") and not at_work else [term])
    if any(term.name == "kind" for term in terms) and not any(term.name == "status" or _leads(term) for term in terms):
        choices.append([_FINISHED, _AT_WORK])
    if chosen.where or not 1 < prod(map(len, choices)) <= _BRANCHES:
        return []
    found = [Selection(Filter(*one), (), chosen.model) for one in product(*choices)]
    return [] if any(one.ranges or one.looked_at for one in map(divided, found)) else found
