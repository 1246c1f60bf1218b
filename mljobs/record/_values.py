"""Checks of values at the record's attributes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from enum import StrEnum
from typing import Any

from mljobs._fields import BY_NAME, FIELDS
from mljobs._values import EPOCH, MAX_MS, from_millis, storable_text, to_job_id, to_member, to_utc
from mljobs.errors import InvalidValueError
from mljobs.states import MlJobStatus

TEXTS = tuple(field.name for field in FIELDS if field.form in {"id", "token", "text", "json"})
"""The fields whose values ``check_text`` judges."""
NUMBERS = tuple(field.name for field in FIELDS if field.form in {"small", "flag"})
"""The fields whose values ``check_number`` judges."""
TIMES = tuple(field.name for field in FIELDS if field.form == "time")
"""The fields whose values ``check_time`` judges."""


def check_text(field: str, value: Any, kinds: type[StrEnum]) -> Any:
    """Return an id, a token, a text or JSON text as the record holds it.

    Args:
        field: One of ``TEXTS``.
        value: What was given.
        kinds: The enum of the column ``kind``.

    Raises:
        InvalidValueError: The field cannot hold it.
    """
    return _CHECKS[BY_NAME[field].form](field, value, kinds)


def _check_id(field: str, value: Any, _kinds: type[StrEnum]) -> Any:
    return None if value is None and BY_NAME[field].nullable else to_job_id(value, field)


def _check_token(field: str, value: Any, kinds: type[StrEnum]) -> Any:
    return to_member(kinds if field == "kind" else MlJobStatus, field, value)


def _check_string(field: str, value: Any, _kinds: type[StrEnum]) -> Any:
    if not isinstance(value, str) and not (value is None and BY_NAME[field].nullable):
        raise InvalidValueError(field, value, "expected a string")
    return value


_CHECKS: dict[str, Callable[[str, Any, type[StrEnum]], Any]] = {
    "id": _check_id,
    "token": _check_token,
    "text": _check_string,
    "json": _check_string,
}


_LIMITS = {field.name: field.limits for field in FIELDS if field.limits is not None}


def check_number(field: str, value: Any) -> Any:
    """Return a number or flag as the record holds it.

    Raises:
        InvalidValueError: Another type, or a number outside the field's limits.
    """
    if BY_NAME[field].form == "flag":
        if not isinstance(value, bool):
            raise InvalidValueError(field, value, "expected True or False")
        return value
    low, high = _LIMITS[field]
    # NumPy's integers have __index__ too
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidValueError(field, value, f"expected an int, {low} to {high}")
    number = value.__index__()
    if not low <= number <= high:
        raise InvalidValueError(field, value, f"expected {low} to {high}")
    return number


def check_time(field: str, value: Any) -> Any:
    """Return a time as the record holds it.

    Raises:
        InvalidValueError: No ``datetime`` with a time zone, or before 1970; or None where every record has one.
    """
    if value is None:
        if not BY_NAME[field].nullable:
            raise InvalidValueError(field, value, "every job has one")
        return None
    moment = to_utc(field, value)
    if moment < EPOCH:
        raise InvalidValueError(field, value, "times start at 1970-01-01 UTC, epoch milliseconds are not negative")
    if field == "run_after" and moment > _LATEST_RUN_AFTER:
        raise InvalidValueError(
            field, value, f"expected {_LATEST_RUN_AFTER:%Y-%m-%d} at the latest, which every zone can read"
        )
    return moment


_LATEST_RUN_AFTER = from_millis(MAX_MS) - timedelta(days=1)
"""Within a day of the year 10000 a server east of UTC writes a date that no driver reads."""


def error_text(error: object) -> str:
    """Return the ``error_message`` for a reason or an exception.

    Raises:
        InvalidValueError: Neither a string nor an exception.
    """
    if isinstance(error, BaseException):
        message = str(error)
        name = type(error).__name__
        return (f"{name}: {message}" if message else name).replace("\x00", "\N{REPLACEMENT CHARACTER}")
    if not isinstance(error, str):
        raise InvalidValueError("error_message", error, "expected a string or an exception")
    return error


def worker_name(name: object) -> str:
    """Return the name of a worker.

    Raises:
        InvalidValueError: Not a string, an empty one, or one that no database can hold.
    """
    if not isinstance(name, str) or not name:
        raise InvalidValueError("worker", name, "expected a name for operators to read")
    return storable_text("worker", name)
