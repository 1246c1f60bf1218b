r"""A job record as KV JSON, and back. Pure functions: no database, no clock.

The format is RedDB's, byte for byte: one compact object, its keys in alphabetical order, and in strings only ``"``,
``\`` and U+0000 to U+001F escaped. Source: RedDB MlJob.

``decode`` first tries one typed pass of msgspec, which takes the records that ``encode`` writes. Whatever that pass
refuses goes to ``_decode_exactly``, which settles the rest of the format and finds the words for an error. Both read
with the same parser, so they agree on what is JSON; a property test holds them together.
"""

from __future__ import annotations

import re
from decimal import Decimal
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, Final, NoReturn, TypeVar
from uuid import UUID

import msgspec

from mljobs._values import ID_DIGITS, MAX_MS, MAX_PROGRESS, from_millis
from mljobs.errors import InvalidValueError, JobDecodeError, shown
from mljobs.states import MlJobKind, MlJobStatus

_E = TypeVar("_E", bound=StrEnum)

_MAX_INT: Final = 2**63 - 1
_EXPONENT_DIGITS: Final = 17
_SHOWN_DIGITS: Final = 40
_BOM: Final = "\ufeff"

_FIELDS: Final = {"error": "error_message", "metrics": "metrics_json", "spec": "spec_json", "target": "target_name"}
"""The ORM field behind each KV key that holds free text."""

_TYPES: Final = {'"': "a string", "{": "an object", "[": "an array", "t": "a boolean", "f": "a boolean", "n": "null"}
"""What a JSON value is, by its first character; any other character begins a number."""


class KvRecord(msgspec.Struct, frozen=True, gc=False):
    """A job record as the KV JSON holds it; the fields stand in the order of its keys. Source: RedDB MlJob.

    Nothing is checked at construction: ``decode`` gives only valid records, and the model checks its own.

    Attributes:
        created_at: Epoch milliseconds, 0 to 253402300799999.
        error: Why the job failed; ``None`` unless it did.
        finished_at: Epoch milliseconds; 0 while it has not finished.
        id: The job's id.
        kind: A member of the enum of kinds that was asked for.
        metrics: Opaque text, as written; ``None`` where there is none.
        progress: Percent, 0 to 100.
        spec: Opaque text, as written.
        started_at: Epoch milliseconds; 0 while it has not started.
        status: Where the job is in its life.
        target: The name of what the job works on.
    """

    created_at: int
    error: str | None
    finished_at: int
    id: UUID
    kind: StrEnum
    metrics: str | None
    progress: int
    spec: str
    started_at: int
    status: MlJobStatus
    target: str


_Millis = Annotated[int, msgspec.Meta(ge=0, le=MAX_MS)]


class _Line(msgspec.Struct, gc=False, kw_only=True):
    """What the typed pass takes. In the order of the keys, which msgspec then finds without a search."""

    created_at: _Millis
    error: str | None = None
    finished_at: _Millis
    # Not UUID: msgspec would take the form with dashes as well, which RedDB refuses.
    id: Annotated[str, msgspec.Meta(min_length=ID_DIGITS, max_length=ID_DIGITS)]
    # Not the enum: it differs from call to call.
    kind: str
    metrics: str | None = None
    progress: Annotated[int, msgspec.Meta(ge=0, le=MAX_PROGRESS)]
    spec: str
    started_at: _Millis
    status: MlJobStatus
    target: str


_encode = msgspec.json.Encoder(uuid_format="hex").encode
_decode_line = msgspec.json.Decoder(_Line).decode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_string = msgspec.json.Decoder(str).decode

_REFUSALS = (ValueError, KeyError, RecursionError, msgspec.MsgspecError)
"""What the typed pass raises for text that it does not take. Nesting ends in a RecursionError, not in a crash."""


def encode(record: KvRecord) -> str:
    """Return the record as KV JSON, byte for byte what RedDB writes.

    Args:
        record: Its fields as ``KvRecord`` describes them.

    Raises:
        InvalidValueError: A text holds a lone surrogate, which UTF-8 cannot encode; it names the ORM field.
    """
    try:
        return _encode(record).decode()
    except UnicodeEncodeError as error:
        for key, field in _FIELDS.items():
            text = getattr(record, key)
            if text is not None and _has_lone_surrogate(text):
                raise InvalidValueError(field, text, "it holds a lone surrogate, which UTF-8 cannot encode") from error
        raise


def decode(raw: str | bytes | bytearray | memoryview, kinds: type[StrEnum] = MlJobKind) -> KvRecord:
    """Return the record that KV JSON holds.

    Accepts what RedDB accepts: keys in any order, unknown keys, the last of duplicate keys, an id in upper case,
    numbers with a fraction or an exponent (cut toward zero), a progress above 100 (read as 100), ``error`` and
    ``metrics`` missing or of another type (read as ``None``). On purpose stricter, where RedDB wraps or overlooks:
    negative numbers (-0 is zero), times after the year 9999, raw control characters in strings, a sign in the id.
    Source: RedDB MlJob.

    Args:
        raw: One JSON object, as text or UTF-8. Unknown keys may nest some hundred levels deep.
        kinds: The enum of kinds whose tokens are accepted.

    Raises:
        JobDecodeError: ``raw`` is not a record; it names the key, if one is at fault, and the reason.
    """
    if type(raw) is not str and type(raw) is not bytes:
        raw = _as_text_or_bytes(raw)
    try:
        if isinstance(raw, bytes) and not raw.isascii():
            raw.decode()  # msgspec overlooks invalid UTF-8 in what it skips
        line = _decode_line(raw)
        return KvRecord(
            line.created_at,
            line.error,
            line.finished_at,
            msgspec.convert(line.id, UUID),  # a third of the time of UUID(hex)
            _members(kinds)[line.kind],
            line.metrics,
            line.progress,
            line.spec,
            line.started_at,
            line.status,
            line.target,
        )
    except _REFUSALS:
        return _decode_exactly(raw, kinds)


def duration_ms(started_at: int, finished_at: int) -> int | None:
    """Return how long the job ran, in milliseconds; ``None`` unless both ends are set and in order.

    Args:
        started_at: Epoch milliseconds, 0 where unset.
        finished_at: Epoch milliseconds, 0 where unset.

    Source: RedDB MlJob.
    """
    return finished_at - started_at if started_at and finished_at >= started_at else None


def values_of(record: KvRecord) -> dict[str, Any]:
    """Return the values of the attributes that a KV record holds."""
    return {
        "id": record.id,
        "kind": record.kind,
        "target_name": record.target,
        "status": record.status,
        "progress": record.progress,
        "created_at": from_millis(record.created_at),
        "started_at": from_millis(record.started_at) if record.started_at else None,
        "finished_at": from_millis(record.finished_at) if record.finished_at else None,
        "error_message": record.error,
        "spec_json": record.spec,
        "metrics_json": record.metrics,
    }


# -------------------------------------------------------------------------------------------------- the exact path


def _decode_exactly(raw: str | bytes, kinds: type[StrEnum]) -> KvRecord:
    """Do what ``decode`` does, value by value from the text of each: every rule, and every error's words."""
    values = _parse(raw)
    return KvRecord(
        created_at=_millis(values, "created_at"),
        error=_optional_string(values, "error"),
        finished_at=_millis(values, "finished_at"),
        id=_id(values),
        kind=_token(values, "kind", kinds),
        metrics=_optional_string(values, "metrics"),
        progress=min(_integer(values, "progress"), MAX_PROGRESS),
        spec=_string(values, "spec"),
        started_at=_millis(values, "started_at"),
        status=_token(values, "status", MlJobStatus),
        target=_string(values, "target"),
    )


@cache
def _members(enum: type[_E]) -> dict[str, _E]:
    """Return the members by token. Not ``enum(text)``: a host's ``_missing_`` may let in more than the tokens."""
    return {member.value: member for member in enum}


def _as_text_or_bytes(raw: object) -> str | bytes:
    if isinstance(raw, (str, bytes)):
        return raw
    if isinstance(raw, (bytearray, memoryview)):
        try:
            return bytes(raw)
        except ValueError as error:
            raise JobDecodeError(None, f"the memory cannot be read: {error}") from error
    raise JobDecodeError(None, f"expected JSON as str or bytes, got {type(raw).__name__}")


def _parse(raw: str | bytes) -> dict[str, str]:
    """Return the JSON text of each key's value. The numbers stay text: no float rounds them, no digit limit bites."""
    try:
        text = raw if isinstance(raw, str) else raw.decode()
    except UnicodeDecodeError as error:
        raise JobDecodeError(None, f"not UTF-8: {error.reason} (byte {error.start})") from error
    if text.startswith(_BOM):
        raise JobDecodeError(None, "not JSON: it begins with a byte order mark; read the file as utf-8-sig")
    try:
        return {key: bytes(value).decode() for key, value in _decode_object(text).items()}
    except UnicodeEncodeError as error:
        raise JobDecodeError(None, f"not Unicode: lone surrogate (character {error.start})") from error
    except msgspec.ValidationError as error:
        raise JobDecodeError(None, f"expected an object, got {_type_of(text.lstrip())}") from error
    except RecursionError as error:
        raise JobDecodeError(None, "nested too deeply") from error
    except (ValueError, msgspec.MsgspecError) as error:
        raise JobDecodeError(None, f"not JSON: {_syntax_error(text, error)}") from error


_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)


def _syntax_error(text: str, error: Exception) -> str:
    # msgspec calls a lone surrogate near the end of the text "Input data was truncated".
    for match in _ESCAPE.finditer(text):
        if match["lone"]:
            return f"lone surrogate {match[0]} (character {match.start()})"
    return str(error).removeprefix("JSON is malformed: ")


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _type_of(value: str) -> str:
    return _TYPES.get(value[:1], "a number")


def _mistyped(key: str, expected: str, value: str | None) -> NoReturn:
    raise JobDecodeError(key, "missing" if value is None else f"expected {expected}, got {_type_of(value)}")


def _string(values: dict[str, str], key: str) -> str:
    value = values.get(key)
    if value is None or value[0] != '"':
        _mistyped(key, "a string", value)
    return _decode_string(value)


def _optional_string(values: dict[str, str], key: str) -> str | None:
    value = values.get(key)
    return _decode_string(value) if value is not None and value[0] == '"' else None


def _token(values: dict[str, str], key: str, enum: type[_E]) -> _E:
    text = _string(values, key)
    members: dict[str, _E] = _members(enum)
    if text not in members:
        raise JobDecodeError(key, f"unknown token {shown(text)} ({', '.join(members)})")
    return members[text]


def _id(values: dict[str, str]) -> UUID:
    text = _string(values, "id")
    if re.fullmatch(r"[0-9a-fA-F]{32}", text) is None:
        raise JobDecodeError("id", f"expected 32 hex digits, got {shown(text)}")
    return UUID(text)


def _millis(values: dict[str, str], key: str) -> int:
    millis = _integer(values, key)
    if millis > MAX_MS:
        raise JobDecodeError(key, f"{millis} ms lies after 9999-12-31T23:59:59.999Z ({MAX_MS})")
    return millis


def _integer(values: dict[str, str], key: str) -> int:
    """Return the number cut toward zero: 0 to 2**63 - 1. By ``Decimal``, for a float would round 17 digits."""
    value = values.get(key)
    if value is None or value[0] not in "-0123456789":
        _mistyped(key, "a number", value)
    mantissa, _, exponent = value.lower().partition("e")
    number = Decimal(f"{mantissa}e{_exponent(exponent)}")
    if not number:
        return 0
    if number < 0:
        raise JobDecodeError(key, f"{_cut(value)} is negative")
    if number >= _MAX_INT + 1:  # before int(), which would fill the memory with 1e999999999
        raise JobDecodeError(key, f"{_cut(value)} does not fit in 64 bits")
    return int(number)


def _exponent(text: str) -> int:
    """Return an exponent that ``Decimal`` takes: one of 18 digits outweighs any mantissa that fits in memory."""
    digits = text.lstrip("+-").lstrip("0")
    size = int(digits or "0") if len(digits) < _EXPONENT_DIGITS else 10**_EXPONENT_DIGITS
    return -size if text.startswith("-") else size


def _cut(number: str) -> str:
    return number if len(number) <= _SHOWN_DIGITS else f"{number[:_SHOWN_DIGITS]}..."
