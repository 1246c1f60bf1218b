"""Checks of the values that the record's attributes are set to."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from enum import StrEnum
from typing import Any

from mljobs._fields import BY_NAME, FIELDS
from mljobs._values import EPOCH, MAX_MS, from_millis, storable_text, to_job_id, to_member, to_utc
from mljobs.errors import InvalidValueError
from mljobs.states import MlJobStatus


def _check_id(field: str, value: Any, _kinds: type[StrEnum]) -> Any:
    return None if value is None and BY_NAME[field].nullable else to_job_id(value, field)


def _check_token(field: str, value: Any, kinds: type[StrEnum]) -> Any:
    return to_member(kinds if field == "kind" else MlJobStatus, field, value)


def _check_string(field: str, value: Any, _kinds: type[StrEnum]) -> Any:
    if not isinstance(value, str) and not (value is None and BY_NAME[field].nullable):
        raise InvalidValueError(field, value, "expected a string")
    return value


_LIMITS = {field.name: field.limits for field in FIELDS if field.limits is not None}


def _check_flag(field: str, value: Any, _kinds: type[StrEnum]) -> Any:
    if not isinstance(value, bool):
        raise InvalidValueError(field, value, "expected True or False")
    return value


def _check_number(field: str, value: Any, _kinds: type[StrEnum]) -> Any:
    low, high = _LIMITS[field]
    # NumPy's integers have __index__ too
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidValueError(field, value, f"expected an int, {low} to {high}")
    number = value.__index__()
    if not low <= number <= high:
        raise InvalidValueError(field, value, f"expected {low} to {high}")
    return number


def _check_time(field: str, value: Any, _kinds: type[StrEnum]) -> Any:
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


_CHECK_OF_FORM: dict[str, Callable[[str, Any, type[StrEnum]], Any]] = {
    "id": _check_id,
    "token": _check_token,
    "text": _check_string,
    "json": _check_string,
    "small": _check_number,
    "flag": _check_flag,
    "time": _check_time,
}
CHECKS = {field.name: _CHECK_OF_FORM[field.form] for field in FIELDS if field.form in _CHECK_OF_FORM}
"""By the name of a field: takes that name, a value and the enum of kinds; returns the value as the record holds it.

Raises:
    InvalidValueError: The field cannot hold it.
"""


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
