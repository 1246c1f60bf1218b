"""Terms of a filter as SQL: what each field is in a job table, and the condition that a term stands for.

Every value is a bound parameter, but for states and kinds, whose tokens are known: a partial index serves
``status = 'failed'``, never ``status = ?``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum, StrEnum
from operator import ge, gt, le, lt
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Mapper
from sqlalchemy.types import TypeEngine

from mljobs._values import ID_DIGITS, to_member
from mljobs.errors import InvalidValueError
from mljobs.jobs._base import Model, per_model, table_of
from mljobs.jobs._expressions import Glob, JsonNumber, JsonText, JsonWord, Number
from mljobs.jobs._statements import constant, in_active_state
from mljobs.jobs._words import Form, Operator, Pattern, Term, Value, written
from mljobs.record._sql import epoch_millis
from mljobs.states import ACTIVE, TERMINAL, MlJobStatus

_DAY: Final = timedelta(days=1)
_BEYOND_BIGINT: Final = 2**63

_COMPARE: Mapping[Operator, Callable[[Any, Any], Any]] = {"<": lt, "<=": le, ">": gt, ">=": ge}
_TURNED: Mapping[Operator, Operator] = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", ":": ":"}
"""Less long ago is later."""


@dataclass(frozen=True, slots=True)
class Field:
    """What can be asked of a job.

    Attributes:
        name: As it is typed.
        form: What its values are.
        example: A word.
        help: One sentence.
        column: The attribute of the class; None where there is no single one.
    """

    name: str
    form: Form
    example: str
    help: str
    column: str | None = None


_FIELDS: Final = (
    Field("kind", "token", "kind:train,backfill", "Of one of these kinds.", "kind"),
    Field("status", "token", "status:failed,cancelled", "In one of these states.", "status"),
    Field("target", "text", "target:spam*", "Works on this target; * stands for any text.", "target_name"),
    Field("worker", "text", "worker:gpu-*", "Run by this worker; * stands for any text.", "worker"),
    Field(
        "error", "part", 'error:"out of memory"', "The error contains this text, ASCII case ignored.", "error_message"
    ),
    Field("created", "time", "created:<2h", "Submitted less long ago than this, or after a time.", "created_at"),
    Field("started", "time", "started:>2026-11-01", "Started after this time, or less long ago.", "started_at"),
    Field("finished", "time", "finished:2026-11-01", "Finished on this day (UTC), or after a time.", "finished_at"),
    Field("run_after", "time", "run_after:>2026-12-01", "Is not to start before a time after this.", "run_after"),
    Field("took", "span", "took:>2h", "Longer from start to finish than this."),
    Field("waited", "span", "waited:>10m", "Longer from submission to start than this."),
    Field("progress", "number", "progress>=50", "Percent done.", "progress"),
    Field("attempts", "number", "attempts>1", "How many times it was started.", "attempts"),
    Field("priority", "number", "priority>0", "Higher is claimed first.", "priority"),
    Field("exclusive", "flag", "exclusive:true", "Has its target to itself.", "exclusive"),
    Field("retry_of", "job", "retry_of:ID", "Retries this job.", "retry_of"),
    Field("id", "id", "id:0199f3", "The id begins so; id:*9d4e ends so.", "id"),
    Field("spec", "json", "spec.lr>0.01", "A value in the spec; keys are joined by dots.", "spec_json"),
    Field("metrics", "json", "metrics.f1>=0.9", "A value in the metrics.", "metrics_json"),
)


@per_model
def fields_of(model: Model) -> Mapping[str, Field]:
    """Return what can be asked of jobs of a class, by name: the record's own fields, then the host's columns."""
    table = table_of(model)
    found = {field.name: field for field in _FIELDS}
    mapper: Mapper[Any] = sa.inspect(model)
    record = {field.column for field in _FIELDS} | {"lease"}
    for attribute in mapper.column_attrs:
        column = attribute.columns[0]
        form = _form_of(getattr(column, "type", None))
        if attribute.key in record or attribute.key in found or form is None or not table.c.contains_column(column):
            continue
        found[attribute.key] = Field(
            attribute.key, form, f"{attribute.key}:VALUE", f"A {form} of your own.", attribute.key
        )
    return found


def _form_of(kind: TypeEngine[Any] | None) -> Form | None:
    try:
        python = kind.python_type if kind is not None else None
    except NotImplementedError:
        return None
    if python is None:
        return None
    forms: tuple[tuple[type, Form], ...] = (
        (Enum, "token"),
        (str, "text"),
        (bool, "flag"),
        (int, "number"),
        (float, "number"),
        (Decimal, "number"),
        (datetime, "time"),
        (date, "date"),
        (UUID, "job"),
    )
    return next((form for parent, form in forms if issubclass(python, parent)), None)


def tokens_of(model: Model, field: Field) -> tuple[str, ...]:
    """Return the tokens that a field may hold; none where it is no field of tokens."""
    if field.form != "token":
        return ()
    if field.name == "kind":
        return tuple(kind.value for kind in model.__kinds__)
    if field.name == "status":
        return tuple(status.value for status in MlJobStatus)
    members: type[Enum] = _column(model, field).type.python_type
    return tuple(_token(member) for member in members)


def _token(member: Enum) -> str:
    return str(member.value) if isinstance(member, StrEnum) else member.name


def _column(model: Model, field: Field) -> Any:
    return getattr(model, str(field.column))


# ------------------------------------------------------------------------------------------------------- conditions


def condition_of(term: Term, model: Model, now: datetime) -> sa.ColumnElement[bool]:
    """Return the condition that a term stands for.

    Args:
        term: Of the filter.
        model: The mapped job class.
        now: What "2 hours ago" is counted from.

    Raises:
        InvalidValueError: No such field, or a value that it cannot hold.
    """
    known = fields_of(model)
    field = known.get(term.name)
    if field is None:
        raise InvalidValueError(term.name, term.values, f"no such filter; there are {', '.join(known)}")
    if field.form == "token" and field.name in ("kind", "status"):
        enum = model.__kinds__ if field.name == "kind" else MlJobStatus
        members = [to_member(enum, field.name, value) for value in term.values]
        if len(members) == 1:
            # As the partial indexes say it: SQLite compares word by word.
            if members[0] in ACTIVE:
                return sa.and_(*in_active_state(table_of(model), MlJobStatus(members[0])))
            one: sa.ColumnElement[bool] = table_of(model).c[field.name] == constant(members[0])
            return one
        if set(members) == set(TERMINAL):
            members = list(TERMINAL)  # in the order of the index
        found: sa.ColumnElement[bool] = _column(model, field).in_(members)
        return found
    make = _MAKERS[field.form]
    return sa.or_(sa.false(), *[make(term, field, model, value, now) for value in term.values])


def _token_is(term: Term, field: Field, model: Model, value: Value, _now: datetime) -> Any:
    column = _column(model, field)
    text = value.exact if isinstance(value, Pattern) else value
    members: type[Enum] = column.type.python_type
    for member in members:
        if text in (_token(member), member.value):
            return column == member
    raise InvalidValueError(term.name, value, f"expected one of {', '.join(tokens_of(model, field))}")


def _text_is(_term: Term, field: Field, model: Model, value: Value, _now: datetime) -> Any:
    return _matches(_column(model, field), value)


def _matches(column: Any, value: Value) -> Any:
    pattern = value if isinstance(value, Pattern) else Pattern((str(value),))
    if pattern.exact is not None:
        return column == pattern.exact
    return Glob(column, sa.literal(_like(pattern), sa.Text()), sa.literal(_glob(pattern), sa.Text()))


def _contains(_term: Term, field: Field, model: Model, value: Value, _now: datetime) -> Any:
    pattern = value if isinstance(value, Pattern) else Pattern((str(value),))
    around = Pattern(("", *pattern.parts, ""))
    return _column(model, field).ilike(sa.literal(_like(around), sa.Text()), escape="/")


def _like(pattern: Pattern) -> str:
    escaped = [part.replace("/", "//").replace("%", "/%").replace("_", "/_") for part in pattern.parts]
    return "%".join(escaped)


def _glob(pattern: Pattern) -> str:
    return "*".join("".join(f"[{c}]" if c in "*?[" else c for c in part) for part in pattern.parts)


def _compared(term: Term, field: Field, model: Model, value: Value, _now: datetime) -> Any:
    column = _column(model, field)
    wanted: Any = value
    if isinstance(value, int) and not isinstance(value, bool):  # of any size, whatever the column and the drivers hold
        wanted = sa.literal(max(-_BEYOND_BIGINT, min(value, _BEYOND_BIGINT - 1)), sa.BigInteger())
    return column == wanted if term.operator == ":" else _COMPARE[term.operator](column, wanted)


def _flag_is(_term: Term, field: Field, model: Model, value: Value, _now: datetime) -> Any:
    return _column(model, field).is_(bool(value))


def _time_is(term: Term, field: Field, model: Model, value: Value, now: datetime) -> Any:
    column = _column(model, field)
    naive = isinstance(column.type, sa.DateTime) and not column.type.timezone

    def moment(at: datetime) -> datetime:
        return at.replace(tzinfo=None) if naive else at

    if isinstance(value, timedelta):
        since = _before(now, value)
        return _COMPARE[_TURNED[term.operator]](column, moment(since))
    if isinstance(value, datetime):
        return _COMPARE[term.operator](column, moment(value)) if term.operator != ":" else column == moment(value)
    if not isinstance(value, date):
        raise InvalidValueError(term.name, value, "expected a time, a day or a span")
    begin = datetime(value.year, value.month, value.day, tzinfo=UTC)
    return sa.and_(column >= moment(begin), column < moment(_after(begin, _DAY)))


def _before(now: datetime, span: timedelta) -> datetime:
    try:
        return now - span
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)


def _after(moment: datetime, span: timedelta) -> datetime:
    try:
        return moment + span
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)


def _span_is(term: Term, field: Field, model: Model, value: Value, _now: datetime) -> Any:
    if not isinstance(value, timedelta):
        raise InvalidValueError(term.name, value, "expected a timedelta")
    begin, end = (model.started_at, model.finished_at) if field.name == "took" else (model.created_at, model.started_at)
    millis = epoch_millis(end) - epoch_millis(begin)
    wanted = value // timedelta(milliseconds=1)
    met = millis == wanted if term.operator == ":" else _COMPARE[term.operator](millis, wanted)
    return sa.and_(end >= begin, met)


def _job_is(_term: Term, field: Field, model: Model, value: Value, _now: datetime) -> Any:
    return _column(model, field) == (UUID(value.exact) if isinstance(value, Pattern) and value.exact else value)


def _id_is(term: Term, field: Field, model: Model, value: Value, _now: datetime) -> Any:
    if not isinstance(value, Pattern):
        raise InvalidValueError(term.name, value, "expected a beginning or an end of an id")
    column = _column(model, field)
    begin, end = value.parts[0], value.parts[1] if len(value.parts) > 1 else ""
    if len(begin) == ID_DIGITS and not end:
        return column == UUID(begin)
    found = []
    if begin:
        lowest, highest = (UUID(begin.ljust(ID_DIGITS, digit)) for digit in "0f")
        found.append(sa.and_(column >= lowest, column <= highest))
    if end:
        found.append(sa.func.replace(sa.cast(column, sa.String), "-", "").like(sa.literal(f"%{end}", sa.Text())))
    return sa.and_(*found)


def _json_is(term: Term, field: Field, model: Model, value: Value, _now: datetime) -> Any:
    column = _column(model, field)
    path = [sa.literal(list(term.path), sa.ARRAY(sa.Text())), *(sa.literal(key, sa.Text()) for key in term.path)]
    if isinstance(value, bool) or value is None:
        return JsonWord(column, *path) == sa.literal(written(value), sa.Text())
    if isinstance(value, int | float):
        at = JsonNumber(column, *path)
        number = sa.literal(value, Number())
        return at == number if term.operator == ":" else _COMPARE[term.operator](at, number)
    pattern = value if isinstance(value, Pattern) else Pattern((str(value),))
    if pattern.parts == ("", ""):  # a lone star: there is something
        return JsonWord(column, *path) != sa.literal("null", sa.Text())
    return _matches(JsonText(column, *path), pattern)


_MAKERS: Mapping[Form, Callable[[Term, Field, Model, Value, datetime], Any]] = {
    "token": _token_is,
    "text": _text_is,
    "part": _contains,
    "number": _compared,
    "flag": _flag_is,
    "time": _time_is,
    "date": _compared,
    "span": _span_is,
    "job": _job_is,
    "id": _id_is,
    "json": _json_is,
}
