"""``Filter``: a typed choice of jobs, with one language for code, command and web."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from math import isfinite
from typing import Any, Final, Self, TypedDict, Unpack, cast
from uuid import UUID

from sqlalchemy import ColumnElement

from mljobs._values import storable_text, to_utc, utc_now
from mljobs.errors import FilterError, InvalidValueError
from mljobs.jobs._base import JobRef, Model, id_of
from mljobs.jobs._conditions import Field, condition_of, fields_of, tokens_of
from mljobs.jobs._sentences import said
from mljobs.jobs._words import (
    MOST_KEYS,
    Operator,
    Pattern,
    Term,
    Value,
    Word,
    id_parts,
    nearest,
    typed,
    words_of,
)
from mljobs.record._models import MlJob
from mljobs.states import MlJobStatus

Compared = str | int | float | bool | None | tuple[Operator, int | float]
"""What a value in JSON is to be: itself, or ``(">=", 0.9)``."""
Where = ColumnElement[bool] | Iterable[ColumnElement[bool]]
"""SQLAlchemy expressions of the caller's own, combined with AND."""


class Filters(TypedDict, total=False):
    """The filters by keyword. A column of the host's own class is one too, by its name.

    Attributes:
        kind: One kind or several.
        status: One state or several.
        target: The whole ``target_name``, or several; ``*`` means itself here.
        target_prefix: Its beginning.
        worker: The whole name of the worker, or several.
        worker_prefix: Its beginning.
        error_contains: A part of ``error_message``, ASCII case ignored.
        created_after: Created at this time or later; a ``timedelta`` is so long ago.
        created_before: Created earlier than this time.
        started_after: Started at this time or later.
        started_before: Started earlier than this time.
        finished_after: Finished at this time or later.
        finished_before: Finished earlier than this time.
        retry_of: The job that it retries.
        id: An id, its beginning, ``*END`` or ``BEGINNING*END``.
        spec: By path, such as ``"lr"`` or ``"optimizer.name"``: the value, or an operator and a number.
        metrics: As ``spec``.
    """

    kind: str | Iterable[str] | None
    status: str | Iterable[str] | None
    target: str | Iterable[str] | None
    target_prefix: str | None
    worker: str | Iterable[str] | None
    worker_prefix: str | None
    error_contains: str | None
    created_after: datetime | timedelta | None
    created_before: datetime | timedelta | None
    started_after: datetime | timedelta | None
    started_before: datetime | timedelta | None
    finished_after: datetime | timedelta | None
    finished_before: datetime | timedelta | None
    retry_of: JobRef | None
    id: UUID | str | None
    spec: Mapping[str, Compared] | None
    metrics: Mapping[str, Compared] | None


FILTERS: Final = tuple(Filters.__annotations__)
"""The names of the filters by keyword."""


@dataclass(frozen=True, slots=True, init=False)
class Filter:
    """A choice of jobs: those for which each term holds. Without terms, all.

    ``str(filter)`` is the text that ``parse`` reads back without loss. There is no negation: name what is wanted.

    Args:
        *terms: Terms of other filters.
        **fields: See :class:`Filters`; columns of the host's own class beside them.

    Attributes:
        terms: The conditions.

    Raises:
        InvalidValueError: A value is not one that its field can hold.

    Example:
        ``Filter(kind="train", status=["failed", "cancelled"], created_after=timedelta(hours=2))``
    """

    terms: tuple[Term, ...]

    def __init__(self, *terms: Term, **fields: Unpack[Filters]) -> None:
        made = [term for name, value in fields.items() if value is not None for term in _terms_of(name, value)]
        object.__setattr__(self, "terms", (*terms, *made))

    @classmethod
    def parse(cls, text: str, model: Model = MlJob) -> Self:
        """Return the filter that ``text`` says: ``kind:train status:failed target:spam* spec.lr>0.01 created:<2h``.

        Args:
            text: Words with spaces between them.
            model: The mapped job class, whose kinds and columns are known.

        Raises:
            FilterError: A word is not understood; it points at the first.
        """
        filter_, problems = cls.read(text, model)
        if problems:
            raise problems[0]
        return filter_

    @classmethod
    def read(cls, text: str, model: Model = MlJob) -> tuple[Self, list[FilterError]]:
        """Return the filter that the understood words of ``text`` say, and an error for each of the others.

        Args:
            text: Words with spaces between them.
            model: The mapped job class, whose kinds and columns are known.
        """
        known = fields_of(model)
        terms: list[Term] = []
        problems: list[FilterError] = []
        words = words_of(text)
        while True:
            try:
                terms.append(_understood(next(words), model, known))
            except StopIteration:
                return cls(*terms), problems
            except FilterError as error:
                problems.append(error)
                if error.reason.startswith("a quotation mark"):  # it runs to the end of the text
                    return cls(*terms), problems

    @staticmethod
    def fields(model: Model = MlJob) -> tuple[Field, ...]:
        """Return what can be asked, each with an example and a sentence."""
        return tuple(fields_of(model).values())

    def conditions(self, model: Model = MlJob, *, now: datetime | None = None) -> list[ColumnElement[bool]]:
        """Return the filter as SQL, to be combined with AND; values are bound parameters.

        Args:
            model: The mapped job class.
            now: What "2 hours ago" is counted from; None for the present.

        Raises:
            InvalidValueError: A field or a value that the class does not have.
        """
        moment = utc_now() if now is None else to_utc("now", now)
        return [condition_of(term, model, moment) for term in self.terms]

    def without(self, term: Term) -> Self:
        """Return the filter without this term."""
        return type(self)(*(one for one in self.terms if one != term))

    def __and__(self, other: Filter) -> Self:
        return type(self)(*self.terms, *other.terms)

    def __bool__(self) -> bool:
        return bool(self.terms)

    def __str__(self) -> str:
        return " ".join(term.text for term in self.terms)

    def words(self) -> str:
        """Return the filter as a sentence: ``jobs that are failed, of kind train, created less than 2h ago``."""
        if not self.terms:
            return "all jobs"
        return (", " if len(self.terms) > 1 else " ").join(["jobs", *map(said, self.terms)])


@dataclass(frozen=True, slots=True)
class Selection:
    """A filter and the caller's own expressions, for one class of jobs."""

    filter: Filter
    where: tuple[ColumnElement[bool], ...]
    model: Model

    def conditions(self) -> list[ColumnElement[bool]]:
        """Return all conditions, with times counted from now."""
        return [*self.filter.conditions(self.model), *self.where]

    def __bool__(self) -> bool:
        return bool(self.filter) or bool(self.where)


def selection(
    model: Model,
    filter: Filter | str | None,  # noqa: A002 - as users say it
    where: Where | None,
    fields: Mapping[str, Any],
) -> Selection:
    """Return what a caller selects by a filter, its text, expressions and keywords, all of which hold.

    Raises:
        InvalidValueError: One of them cannot be.
    """
    if filter is None:
        chosen = Filter()
    elif isinstance(filter, Filter):
        chosen = filter
    else:
        chosen = Filter.parse(filter, model)
    expressions = () if where is None else (where,) if isinstance(where, ColumnElement) else tuple(where)
    for expression in expressions:
        if not isinstance(expression, ColumnElement):
            raise InvalidValueError("where", expression, "expected SQLAlchemy expressions such as MlJob.priority > 0")
    known = fields_of(model)
    unknown: dict[str, Any] = {term.name: term.values for term in chosen.terms if term.name not in known}
    unknown |= {name: value for name, value in fields.items() if name not in known and name not in FILTERS}
    for name, value in unknown.items():
        raise InvalidValueError(
            name, value, f"no such filter; there are {', '.join(dict.fromkeys((*FILTERS, *known)))}"
        )
    chosen &= Filter(**cast("Filters", dict(fields)))
    return Selection(chosen, expressions, model)


def conditions(
    model: Model = MlJob,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    **fields: Unpack[Filters],
) -> list[ColumnElement[bool]]:
    """Return the conditions that filters stand for, to be combined with AND.

    Args:
        model: The mapped job class.
        filter: A :class:`Filter`, or its text.
        where: SQLAlchemy expressions of one's own beside it.
        **fields: See :class:`Filters`.

    Raises:
        InvalidValueError: A value is not one that its field can hold.
    """
    return selection(model, filter, where, fields).conditions()


# ------------------------------------------------------------------------------------------------------ from words


def _understood(word: Word, model: Model, known: Mapping[str, Field]) -> Term:
    field = known.get(word.name)
    if field is None:
        raise _unknown(word, model, known)
    if (field.form == "json") != bool(word.path):
        if field.form == "json":
            raise word.error(f"which key of the {word.name}?", (), f"{word.name}.KEY{word.text[len(word.name) :]}")
        raise word.error(f"{word.name} has no keys; spec and metrics have")
    return typed(word, field.form, tokens_of(model, field))


def _unknown(word: Word, model: Model, known: Mapping[str, Field]) -> FilterError:
    if word.text[:1] in "-!" or word.text.upper() in ("NOT", "AND", "OR"):
        return word.error("all words must hold and none can be negated; name what is wanted, with commas for or")
    if not word.name:
        return word.error("expected name:value", tuple(known), _meant_by_bare(word.text, model, known))
    rest = word.text[len(word.name) :]
    near = nearest(word.name, (*known, *_ALIASES))
    if near is not None:
        suggestion = _ALIASES.get(near, near) + rest
    elif word.operator != ":" or word.path:
        suggestion = f"spec.{word.text}"
    else:
        suggestion = None
    return word.error(f"there is no field {word.name!r}", tuple(known), suggestion)


_ALIASES: Final[Mapping[str, str]] = {
    "target_name": "target",
    "state": "status",
    "duration": "took",
    "wait": "waited",
    "created_at": "created",
    "started_at": "started",
    "finished_at": "finished",
    "error_message": "error",
    "metric": "metrics",
    "retry": "retry_of",
}


def _meant_by_bare(text: str, model: Model, known: Mapping[str, Field]) -> str | None:
    """Return the word that text without an operator may stand for."""
    for name in ("status", "kind"):
        near = nearest(text, tokens_of(model, known[name]))
        if near is not None:
            return f"{name}:{near}"
    parts = id_parts(text)
    if parts is not None and len("".join(parts.parts)) >= 4:
        return f"id:{text}"
    return f"target:{text}" if text and '"' not in text else None


# --------------------------------------------------------------------------------------------------- from keywords


def _terms_of(name: str, value: Any) -> list[Term]:
    """Return the terms that a keyword stands for.

    Raises:
        InvalidValueError: A value of another type.
    """
    if name in ("spec", "metrics"):
        return [_json_term(name, path, wanted) for path, wanted in dict(value).items()]
    field, _, side = name.rpartition("_")
    if field in ("created", "started", "finished"):
        return [_time_term(field, side, name, value)]
    if side == "prefix" and field in ("target", "worker"):
        return [Term(field, ":", (Pattern((storable_text(name, value), "")),))]
    if name == "error_contains":
        return [Term("error", ":", (Pattern((storable_text(name, value),)),))]
    return [Term(name, ":", tuple(_VALUES.get(name, _own)(name, one) for one in _several(name, value)))]


def _time_term(field: str, side: str, name: str, value: Any) -> Term:
    if isinstance(value, timedelta):
        return Term(field, "<=" if side == "after" else ">", (_span(name, value),))
    return Term(field, ">=" if side == "after" else "<", (to_utc(name, value),))


def _id(name: str, value: Any) -> Value:
    parts = id_parts(value.hex if isinstance(value, UUID) else storable_text(name, value))
    if parts is None:
        raise InvalidValueError(name, value, "expected a beginning or *END of an id, in hex digits")
    return parts


def _exactly(name: str, value: Any) -> Value:
    return Pattern((storable_text(name, value),))


def _several(name: str, value: Any) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        if not isinstance(value, str) and name in ("kind", "status", "target", "worker"):
            raise InvalidValueError(name, value, "expected one or several as text")
        return [value]
    return list(value)


def _token(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidValueError(name, value, "expected a token")
    if name == "status" and value not in MlJobStatus._value2member_map_:
        raise InvalidValueError(name, value, f"expected one of {', '.join(MlJobStatus)}")
    return str(value)


def _span(name: str, value: timedelta) -> timedelta:
    if value < timedelta(0):
        raise InvalidValueError(name, value, "that lies ahead; expected how long ago")
    return value // timedelta(milliseconds=1) * timedelta(milliseconds=1)


def _own(name: str, value: Any) -> Value:
    if isinstance(value, Enum):
        return str(value.value) if isinstance(value, str) else value.name
    if isinstance(value, datetime):
        return to_utc(name, value)
    if isinstance(value, str):
        return Pattern((storable_text(name, value),))
    return cast("Value", value)


_VALUES: Final[Mapping[str, Callable[[str, Any], Value]]] = {
    "kind": _token,
    "status": _token,
    "target": _exactly,
    "worker": _exactly,
    "retry_of": lambda _name, value: id_of(value),
    "id": _id,
}


def _json_term(name: str, path: str, wanted: Any) -> Term:
    operator: Operator = ":"
    if isinstance(wanted, tuple):
        operator, wanted = wanted
        if operator not in (":", "<", "<=", ">", ">="):
            raise InvalidValueError(f"{name}.{path}", operator, "expected one of <, <=, >, >=")
        if isinstance(wanted, bool) or not isinstance(wanted, int | float):
            raise InvalidValueError(f"{name}.{path}", wanted, "expected a number to compare with")
    if isinstance(wanted, int | float) and not (abs(wanted) < _BEYOND_DOUBLE and isfinite(wanted)):
        raise InvalidValueError(f"{name}.{path}", wanted, "expected a number that a double can hold")
    value = Pattern((storable_text(name, wanted),)) if isinstance(wanted, str) else wanted
    keys = tuple(storable_text(name, path).split("."))
    if len(keys) > MOST_KEYS:
        raise InvalidValueError(name, f"{path[:60]}…", f"expected a path of at most {MOST_KEYS} keys")
    return Term(name, operator, (value,), keys)


_BEYOND_DOUBLE: Final = 2**1023
