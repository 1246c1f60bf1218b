"""The terms of a filter as English, for people."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final

from mljobs._values import ID_DIGITS
from mljobs.jobs._words import Operator, Pattern, Term, Value, written, written_span

_COMPARISONS: Final[Mapping[Operator, str]] = {
    ":": "",
    "<": "below ",
    "<=": "at most ",
    ">": "above ",
    ">=": "at least ",
}
_TIMES: Final[Mapping[Operator, str]] = {":": "on ", "<": "before ", "<=": "until ", ">": "after ", ">=": "since "}
_AGES: Final[Mapping[Operator, str]] = {
    ":": "",
    "<": "less than ",
    "<=": "at most ",
    ">": "more than ",
    ">=": "at least ",
}
_BEGINNINGS: Final[Mapping[str, str]] = {
    "kind": "of kind",
    "status": "that are",
    "target": "on target",
    "worker": "run by",
    "error": "whose error contains",
    "took": "that took",
    "waited": "that waited",
    "retry_of": "that retry",
    "id": "with an id",
}


def said(term: Term) -> str:
    """Return a term in words: ``with spec.lr above 0.01``."""
    beginning = _BEGINNINGS.get(term.name, f"with {term.label}")
    if term.name in ("created", "started", "finished"):
        beginning = term.name
    if not term.values:
        return f"{beginning} nothing"
    return f"{beginning} {' or '.join(_said_value(term, value) for value in term.values)}"


def _said_value(term: Term, value: Value) -> str:
    if isinstance(value, datetime):
        return f"{_TIMES[term.operator]}{value:%Y-%m-%d %H:%M} UTC"
    if isinstance(value, timedelta):
        ago = "" if term.name in ("took", "waited") else " ago"
        return f"{_AGES[term.operator]}{written_span(value)}{ago}"
    if isinstance(value, Pattern):
        return _said_pattern(term, value)
    comparison = "on " if term.name in ("created", "started", "finished") else _COMPARISONS[term.operator]
    return f"{comparison}{written(value)}"


def _said_pattern(term: Term, pattern: Pattern) -> str:
    if pattern.exact is not None:
        return (
            f"beginning with {pattern.exact}"
            if term.name == "id" and len(pattern.exact) < ID_DIGITS
            else written(pattern)
        )
    if len(pattern.parts) == 2:
        begin, end = (written(Pattern((part,))) for part in pattern.parts)
        if not pattern.parts[1]:
            return f"beginning with {begin}" if pattern.parts[0] else "anything"
        if not pattern.parts[0]:
            return f"ending with {end}"
    return f"like {written(pattern)}"
