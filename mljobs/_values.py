"""Conversions and checks of values, without a database and without SQLAlchemy."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, TypeVar
from uuid import UUID

import msgspec

from mljobs.errors import InvalidValueError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MAX_MS = 253_402_300_799_999
"""9999-12-31T23:59:59.999Z, the last millisecond that a ``datetime`` can hold, in epoch milliseconds."""
MAX_PROGRESS = 100
MAX_SMALLINT = 32_767
MIN_SMALLINT = -32_768
ID_DIGITS = 32
DASHED_ID_LENGTH = 36

_E = TypeVar("_E", bound=StrEnum)
_MILLISECOND = timedelta(milliseconds=1)


def to_millis(moment: datetime) -> int:
    """Return epoch milliseconds, floored. Integer arithmetic: ``timestamp() * 1000`` is wrong for many values."""
    return (moment - EPOCH) // _MILLISECOND


def from_millis(millis: int) -> datetime:
    """Return the UTC time at ``millis`` milliseconds after the epoch, exactly."""
    return EPOCH + timedelta(0, millis // 1000, millis % 1000 * 1000)  # by position: two thirds of the time


def utc_now() -> datetime:
    """Return the present time in UTC, floored to the millisecond, as every time in a record is."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def to_utc(field: str, value: object) -> datetime:
    """Return ``value`` in UTC, floored to the millisecond.

    Raises:
        InvalidValueError: Not a ``datetime``, or one without a time zone.
    """
    if not isinstance(value, datetime):
        raise InvalidValueError(field, value, "expected a datetime with a time zone")
    if value.utcoffset() is None:
        raise InvalidValueError(field, value, "it has no time zone; use datetime.now(timezone.utc)")
    try:
        moment = value if value.tzinfo is UTC else value.astimezone(UTC)
    except OverflowError as error:
        raise InvalidValueError(field, value, "in UTC it lies outside the years 1 to 9999") from error
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def to_job_id(value: object, field: str = "id") -> UUID:
    """Return the id that ``value`` stands for.

    Args:
        value: A ``UUID``, an int (0 <= n < 2**128), 32 hex digits, or the same with the dashes that psql prints.
        field: The name to report in an error.

    Raises:
        InvalidValueError: Anything else.
    """
    if type(value) is UUID:
        return value
    if isinstance(value, UUID):  # a subclass (asyncpg's): keep one type in the identity map
        return UUID(int=value.int)
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < 1 << 128:
            return UUID(int=value)
        raise InvalidValueError(field, value, "an id has 128 bits: 0 <= id < 2**128")
    if isinstance(value, str):
        digits = value
        if len(value) == DASHED_ID_LENGTH and all(value[at] == "-" for at in (8, 13, 18, 23)):
            digits = value.replace("-", "")
        if len(digits) == ID_DIGITS and digits.isascii() and digits.isalnum():
            try:
                return UUID(bytes=bytes.fromhex(digits))  # int(..., 16) would take 0x too
            except ValueError:
                pass
    raise InvalidValueError(field, value, "expected a UUID, an int or 32 hex digits")


def to_member(enum: type[_E], field: str, value: object) -> _E:
    """Return the member of ``enum`` that ``value``, a member or a token, stands for.

    Raises:
        InvalidValueError: No such token.
    """
    if type(value) is enum:
        return value
    members: Any = enum._value2member_map_  # to call the enum takes longer
    member: _E | None = members.get(value) if isinstance(value, str) else None
    if member is not None:
        return member
    raise InvalidValueError(field, value, f"expected one of {', '.join(member.value for member in enum)}")


def to_json_text(field: str, value: object) -> str:
    """Return ``value`` as compact JSON text. NumPy scalars and arrays are written as the numbers they hold.

    Raises:
        InvalidValueError: JSON has no way to write it (NaN and infinities included).
    """
    try:
        text = _encode(value)
        if not text.isascii():
            text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValueError(field, value, f"JSON cannot hold it: {error}") from error
    if _NUL_ESCAPE in text:
        _refuse_nul(field, text)
    return text


_NUL_ESCAPE = r"\u0000"


def _refuse_nul(field: str, text: str) -> None:
    """Refuse JSON text with U+0000 in any string or key.

    Raises:
        InvalidValueError: It names the place of the first, e.g. ``$.labels[2]``.
    """
    if _NUL_ESCAPE in text.replace("\\\\", ""):  # an escaped backslash may stand before the rest of it
        place = _place_of_nul(json.loads(text), "$")
        raise InvalidValueError(field, text, f"it holds U+0000 at {place}, which PostgreSQL cannot read by key")


def _place_of_nul(value: object, place: str) -> str | None:
    if isinstance(value, str):
        return place if "\x00" in value else None
    if isinstance(value, list):
        within = ((item, f"{place}[{at}]") for at, item in enumerate(value))
    elif isinstance(value, dict):
        bad_key = next((key for key in value if "\x00" in key), None)
        if bad_key is not None:
            return f"key {bad_key!r} of {place}"
        within = ((item, f"{place}.{key}") for key, item in value.items())
    else:
        return None
    return next((found for item, at in within if (found := _place_of_nul(item, at))), None)


def from_json_text(field: str, text: str | None) -> Any:
    """Return what the JSON ``text`` holds, ``None`` for ``None``.

    Raises:
        InvalidValueError: It is not JSON. The text is opaque to mljobs, so an instance may hold anything until a flush.
    """
    if text is None:
        return None
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidValueError(field, text, f"not JSON text: {error}") from error


def _as_json_value(value: object) -> object:
    tolist = getattr(value, "tolist", None)
    if callable(tolist):
        return tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _encoder() -> Callable[[object], str]:
    """Return what writes compact JSON; as ``JSONEncoder.encode`` does, which makes its encoder in C anew for each value."""
    made = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_as_json_value)
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return made.encode
    # Without a table of what is open: of a value that holds itself the recursion limit tells.
    parts = make(None, _as_json_value, json.encoder.encode_basestring, None, ":", ",", False, False, False)
    return lambda value: "".join(parts(value, 0))


_encode = _encoder()


def _refuse_constant(token: str) -> object:
    raise ValueError(f"{token} is not JSON")


def storable_text(field: str, value: object) -> str:
    """Return ``value`` if every database can store it as text.

    Raises:
        InvalidValueError: Not a string, or one with a NUL or a lone surrogate.
    """
    if not isinstance(value, str):
        raise InvalidValueError(field, value, "expected a string")
    if "\x00" in value:
        raise InvalidValueError(field, value, "PostgreSQL cannot store NUL (U+0000) in text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidValueError(field, value, "it holds a lone surrogate, which UTF-8 cannot encode") from error
    return value


_check_json = msgspec.json.Decoder(msgspec.Raw).decode


def storable_json(field: str, value: object) -> str:
    """Return ``value`` if it is JSON text (RFC 8259) that every database can store.

    Raises:
        InvalidValueError: Not a string, not JSON, or nested deeper than the databases allow (about 1,000 levels).
    """
    if not isinstance(value, str):
        raise InvalidValueError(field, value, "expected JSON text as a string")
    try:
        _check_json(value)
    except (ValueError, RecursionError) as error:
        raise InvalidValueError(field, value, f"not JSON text: {error}") from error
    if _NUL_ESCAPE in value:
        _refuse_nul(field, value)
    return value


_MAX_SECONDS = 10 * 365 * 86_400


def check_lease(lease: float) -> float:
    """Return ``lease`` if it is a sensible number of seconds.

    Raises:
        InvalidValueError: It is not.
    """
    if isinstance(lease, bool) or not isinstance(lease, int | float) or not 0 < lease <= _MAX_SECONDS:
        raise InvalidValueError("lease", lease, "expected seconds, above 0 and at most ten years")
    return lease


def check_seconds(field: str, value: float, *, above_zero: bool = False, longest: float | None = None) -> float:
    """Return ``value`` if it is a number of seconds.

    Args:
        field: Its name, for the error.
        value: What was given.
        above_zero: Whether 0 is refused too.
        longest: The most that is taken; None for no limit.

    Raises:
        InvalidValueError: It is not.
    """
    fits = not isinstance(value, bool) and isinstance(value, int | float) and value >= 0
    if not fits or (above_zero and value == 0) or (longest is not None and value > longest):
        limit = "" if longest is None else f" and at most {longest:.0f}"
        raise InvalidValueError(field, value, f"expected seconds {'above' if above_zero else 'of at least'} 0{limit}")
    return value


def check_count(field: str, value: int, highest: int, *, lowest: int = 1) -> int:
    """Return ``value`` if it is an int from ``lowest`` to ``highest``.

    Raises:
        InvalidValueError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise InvalidValueError(field, value, f"expected an int, {lowest} to {highest}")
    return value
