r"""The language of filters: parse words such as ``status:failed`` or ``spec.lr>0.01`` into terms, and print terms.

A word is a name, an operator and values with commas between them: ``kind:train,backfill``. Quotation marks hold spaces and
commas together, ``\\`` takes the next character as it is, and ``*`` stands for any text. Times have no zone or their own;
without one they are UTC. A span such as ``2h`` or ``1d12h`` beside a time means "so long ago".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from difflib import get_close_matches
from math import isfinite
from typing import Any, Final, Literal
from uuid import UUID

from mljobs._values import MAX_MS, storable_text, to_job_id, to_utc
from mljobs.errors import FilterError, InvalidValueError

Operator = Literal[":", "<", "<=", ">", ">="]
"""How a field is compared; ``:`` is "is one of"."""

Form = Literal["token", "text", "part", "number", "flag", "time", "date", "span", "job", "id", "json"]
"""What the values of a field are: ``part`` is text that the field contains, ``job`` an id, ``id`` a part of one."""

COMPARED: Final = frozenset({"number", "time", "date", "span", "json"})
"""Forms of which one may be more or less than another."""

MOST_KEYS: Final = 100
"""The most keys of a path: each is a subquery of SQLite."""
_UNITS: Final = {"w": 604_800_000, "d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_SPAN = re.compile(r"(?:\d{1,15}(?:\.\d{1,9})?(?:ms|[smhdw]))+")
_SPAN_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])")
_NAME = re.compile(r"[^\W\d]\w*")
_KEY = re.compile(r"[\w\-/@%+]+")
_OPERATOR = re.compile(r":?(<=|>=|<|>)|[:=]")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,400})(?:\.\d{1,400})?(?:[eE][+-]?\d{1,3})?")
_DIGITS = re.compile(r"[0-9a-f]{0,32}(?:\*[0-9a-f]{0,32})?")


@dataclass(frozen=True, slots=True)
class Pattern:
    """Text with gaps for any text: ``Pattern(("spam", ""))`` is what begins with ``spam``.

    Attributes:
        parts: The text between the gaps; one part is the whole text, exactly.
    """

    parts: tuple[str, ...]

    @property
    def exact(self) -> str | None:
        """The text, where there is no gap."""
        return self.parts[0] if len(self.parts) == 1 else None


Value = str | Pattern | int | float | bool | None | datetime | date | timedelta | UUID
"""A token, text, a number, a flag, null, a time, a day, a span or how long ago, an id."""


@dataclass(frozen=True, slots=True)
class Term:
    """One condition of a filter.

    Attributes:
        name: The field: ``kind``, ``created``, ``spec`` or a column of the host's class.
        operator: How it is compared.
        values: With what; any of them will do. With none no job passes.
        path: The keys that lead into ``spec`` or ``metrics``.
        position: Where the word stood in the text that was parsed, from 0; -1 where there was none.
    """

    name: str
    operator: Operator
    values: tuple[Value, ...]
    path: tuple[str, ...] = ()
    position: int = field(default=-1, compare=False)

    @property
    def label(self) -> str:
        """The name with its path, as it is typed: ``spec.lr``."""
        return ".".join([self.name, *map(_written_key, self.path)])

    @property
    def text(self) -> str:
        """The word, as it is typed: ``spec.lr>0.01``."""
        operator = self.operator
        if operator != ":" and not (self.path or self.name in ("progress", "attempts", "priority")):
            operator = f":{operator}"  # type: ignore[assignment]
        return f"{self.label}{operator}{','.join(self._written(value) for value in self.values) or ','}"

    def __str__(self) -> str:
        return self.text

    def _written(self, value: Value) -> str:
        text = written(value)
        return f'"{text}"' if self.path and isinstance(value, Pattern) and _is_literal(text) else text


def written(value: Value) -> str:
    """Return a value as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Pattern):
        return _quoted("*".join(_escaped(part) for part in value.parts))
    if isinstance(value, datetime):
        return written_time(value)
    if isinstance(value, timedelta):
        return written_span(value)
    if isinstance(value, UUID):
        return value.hex
    return _quoted(_escaped(value)) if isinstance(value, str) else str(value)


def written_time(moment: datetime) -> str:
    """Return a time in UTC as short as it can be: ``2026-11-01`` or ``2026-11-01T12:30:00Z``."""
    text = moment.replace(tzinfo=None).isoformat(timespec="milliseconds").removesuffix(".000")
    return text.removesuffix("T00:00:00") if text.endswith("T00:00:00") else f"{text}Z"


def written_span(span: timedelta) -> str:
    """Return a span as short as it can be: ``2h`` or ``1d12h``."""
    left, text = span // timedelta(milliseconds=1), ""
    for unit, size in _UNITS.items():
        if unit != "w" and left >= size:
            text += f"{left // size}{unit}"
            left %= size
    return text or "0s"


def _escaped(text: str) -> str:
    return re.sub(r'([\\"*])', r"\\\1", text)


def _quoted(text: str) -> str:
    return f'"{text}"' if not text or re.search(r"[\s,]", text) or text[0] in "<>=:" else text


def _written_key(key: str) -> str:
    return key if _KEY.fullmatch(key) else f'"{_escaped(key)}"'


def _is_literal(text: str) -> bool:
    return text in _LITERALS or is_number(text)


def is_number(text: str) -> bool:
    """Whether ``text`` is a number as JSON writes it, and one that a double can hold."""
    return bool(_NUMBER.fullmatch(text)) and isfinite(float(text))


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class RawValue:
    """A value as it was typed: the text between its stars, and whether any of it was quoted or escaped."""

    parts: tuple[str, ...]
    marked: bool

    @property
    def text(self) -> str:
        return "*".join(self.parts)


@dataclass(frozen=True, slots=True)
class Word:
    """A word as it was typed, not yet understood."""

    whole: str
    position: int
    text: str
    name: str = ""
    path: tuple[str, ...] = ()
    operator: Operator = ":"
    values: tuple[RawValue, ...] = ()

    def error(self, reason: str, known: Sequence[str] = (), suggestion: str | None = None) -> FilterError:
        """Return the error that points at this word."""
        return FilterError(self.whole, self.position, self.text, reason, known, suggestion)


def words_of(text: str) -> Iterator[Word]:
    """Yield the words of ``text``, split into name, operator and values where that is possible.

    A word without an operator has no name.
    """
    if not isinstance(text, str):
        raise InvalidValueError("filter", text, "expected a Filter, or text such as 'kind:train status:failed'")
    for position, end in _bounds(text):
        word = Word(text, position, text[position:end])
        yield _divided(word)


def _bounds(text: str) -> Iterator[tuple[int, int]]:
    begin, at, quoted = -1, 0, False
    while at < len(text):
        character = text[at]
        if character.isspace() and not quoted:
            if begin >= 0:
                yield begin, at
            begin = -1
        elif begin < 0:
            begin = at
        if character == '"':
            quoted = not quoted
        at += 2 if character == "\\" else 1
    if begin >= 0:
        yield begin, len(text)


def _divided(word: Word) -> Word:
    name = _NAME.match(word.text)
    if name is None:
        return word
    at, path = name.end(), []
    while word.text.startswith(".", at):
        key = _KEY.match(word.text, at + 1)
        if key is not None:
            path.append(key[0])
            at = key.end()
        elif word.text.startswith('"', at + 1):
            close = _closing(word.text, at + 2)
            path.append(_raw_values(word, word.text[at + 1 : close + 1])[0].text)
            at = close + 1
        else:
            return word
    if len(path) > MOST_KEYS:
        raise word.error(f"a path has at most {MOST_KEYS} keys")
    operator = _OPERATOR.match(word.text, at)
    if operator is None:
        return word
    sign: Any = operator[1] or ":"
    values = tuple(_raw_values(word, word.text[operator.end() :]))
    return Word(word.whole, word.position, word.text, name[0], tuple(path), sign, values)


def _closing(text: str, at: int) -> int:
    while at < len(text) and text[at] != '"':
        at += 2 if text[at] == "\\" else 1
    return at


def _raw_values(word: Word, text: str) -> list[RawValue]:
    """Return the values in what follows an operator; a lone comma is the empty list.

    Raises:
        FilterError: A quotation mark is not closed.
    """
    if text == ",":
        return []
    found: list[RawValue] = []
    parts, quoted, marked, at = [""], False, False, 0
    while at < len(text):
        character = text[at]
        if character == "\\" and at + 1 < len(text):
            at += 1
            parts[-1] += text[at]
            marked = True
        elif character == '"':
            quoted, marked = not quoted, True
        elif character == "*":
            parts.append("")
        elif character == "," and not quoted:
            found.append(RawValue(tuple(parts), marked))
            parts, marked = [""], False
        else:
            parts[-1] += character
        at += 1
    if quoted:
        raise word.error("a quotation mark is not closed", (), f'{word.text}"')
    found.append(RawValue(tuple(parts), marked))
    return found


# ------------------------------------------------------------------------------------------------------------- typing


def typed(word: Word, form: Form, known: Sequence[str] = ()) -> Term:
    """Return the term that a word is.

    Args:
        word: With a name.
        form: Of the field that it names.
        known: The tokens of a field of tokens.

    Raises:
        FilterError: An operator or a value that does not fit.
    """
    if word.operator != ":" and form not in COMPARED:
        reason = f"{word.name} cannot be more or less than something"
        raise word.error(reason, (), f"{word.name}:{','.join(value.text for value in word.values)}")
    if word.operator != ":" and len(word.values) != 1:
        raise word.error("a comparison wants one value")
    ask = _Asked(word, known)
    values = tuple(ask.value(form, raw) for raw in word.values)
    return Term(word.name, word.operator, values, word.path, word.position)


@dataclass(frozen=True, slots=True)
class _Asked:
    """Types the values of one word."""

    word: Word
    known: Sequence[str]

    def value(self, form: Form, raw: RawValue) -> Value:
        if not raw.marked and not raw.text:
            raise self.word.error(f"{self.word.name} has no value", self.known)
        make: Mapping[Form, Callable[[RawValue], Value]] = {
            "token": self._token,
            "text": self._pattern,
            "part": self._pattern,
            "number": self._number,
            "flag": self._flag,
            "time": self._time,
            "date": self._date,
            "span": self._span,
            "job": self._job,
            "id": self._id,
            "json": self._json,
        }
        return make[form](raw)

    def _replaced(self, raw: RawValue, other: str) -> str:
        """Return the word with one of its values replaced."""
        values = [other if value is raw else written(Pattern(value.parts)) for value in self.word.values]
        return f"{self.word.name}:{','.join(values)}"

    def _token(self, raw: RawValue) -> Value:
        if raw.text in self.known:
            return raw.text
        near = get_close_matches(raw.text.lower(), self.known, 1, 0.6)
        reason = f"no {self.word.name} is called {raw.text!r}"
        raise self.word.error(reason, self.known, self._replaced(raw, near[0]) if near else None)

    def _pattern(self, raw: RawValue) -> Value:
        try:
            return Pattern(tuple(storable_text(self.word.name, part) for part in raw.parts))
        except InvalidValueError as error:
            raise self.word.error(error.reason) from error

    def _number(self, raw: RawValue) -> Value:
        if raw.marked or not is_number(raw.text):
            raise self.word.error(f"expected a number, not {raw.text!r}", (), None)
        return _as_number(raw.text)

    def _flag(self, raw: RawValue) -> Value:
        if raw.text not in ("true", "false"):
            right = {"yes": "true", "1": "true", "no": "false", "0": "false"}.get(raw.text.lower(), "true")
            raise self.word.error("expected true or false", ("true", "false"), self._replaced(raw, right))
        return raw.text == "true"

    def _time(self, raw: RawValue) -> Value:
        compared = self.word.operator != ":"
        if _SPAN.fullmatch(raw.text):
            if not compared:
                reason = "less or more than so long ago?"
                raise self.word.error(reason, (), f"{self.word.name}:<{raw.text}")
            return self._span(raw)
        try:
            day = date.fromisoformat(raw.text)
            if not compared:
                return day
        except ValueError:
            pass
        moment = self._moment(raw)
        if not compared:
            raise self.word.error("before or after that time?", (), f"{self.word.name}:>{written_time(moment)}")
        return moment

    def _moment(self, raw: RawValue) -> datetime:
        try:
            moment = datetime.fromisoformat(raw.text)
        except ValueError as error:
            reason = "expected a time like 2026-11-01 or 2026-11-01T12:30Z, or a span like 2h or 3d"
            raise self.word.error(reason) from error
        try:
            return to_utc(self.word.name, moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC))
        except InvalidValueError as error:
            raise self.word.error(error.reason) from error

    def _date(self, raw: RawValue) -> Value:
        try:
            return date.fromisoformat(raw.text)
        except ValueError as error:
            raise self.word.error("expected a day like 2026-11-01") from error

    def _span(self, raw: RawValue) -> Value:
        span = span_of(raw.text)
        if span is None:
            raise self.word.error("expected a span like 90s, 2h or 1d12h")
        return span

    def _job(self, raw: RawValue) -> Value:
        try:
            return to_job_id(raw.text)
        except InvalidValueError as error:
            raise self.word.error("expected a whole id of 32 hex digits") from error

    def _id(self, raw: RawValue) -> Value:
        parts = id_parts(raw.text)
        if parts is None:
            raise self.word.error("expected the beginning of an id, or *END, or BEGINNING*END, in hex digits")
        return parts

    def _json(self, raw: RawValue) -> Value:
        if not raw.marked and _is_literal(raw.text):
            return _LITERALS[raw.text] if raw.text in _LITERALS else _as_number(raw.text)
        if self.word.operator != ":":
            raise self.word.error(f"a comparison wants a number, not {raw.text!r}")
        return self._pattern(raw)


_LITERALS: Mapping[str, Value] = {"true": True, "false": False, "null": None}


def _as_number(text: str) -> int | float:
    return float(text) if re.search(r"[.eE]", text) else int(text)


def span_of(text: str) -> timedelta | None:
    """Return the span that ``text`` says, such as ``2h`` or ``1d12h``, to the millisecond; None where it is none."""
    if not _SPAN.fullmatch(text):
        return None
    millis = sum(round(float(number) * _UNITS[unit]) for number, unit in _SPAN_PART.findall(text))
    return timedelta(milliseconds=millis) if millis <= MAX_MS else None


def id_parts(text: str) -> Pattern | None:
    """Return the beginning and the end of an id: ``0199f3``, ``*9d4e``, ``0199f3c2…9d4e``; None where it is no such text."""
    digits = text.lower().replace("…", "*").replace("...", "*").replace("-", "")
    if not digits.strip("*") or not _DIGITS.fullmatch(digits):
        return None
    parts = tuple(digits.split("*"))
    return Pattern(parts[:1] if len(parts) > 1 and not parts[1] else parts)


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that is most like this one; None where none is."""
    near = get_close_matches(name.lower(), known, 1, 0.6)
    return near[0] if near else None
