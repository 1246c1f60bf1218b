"""``Handler``: the function that a kind of job calls, and its policy for failures."""

from __future__ import annotations

import functools
import inspect
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, get_type_hints

from mljobs._values import check_count
from mljobs.errors import GiveUp, InvalidValueError
from mljobs.store._run import Run

Function = Callable[[Run], Any]
Backoff = Callable[[int], float]
"""Takes which retry it is, from 1; returns the seconds to wait before it."""

_RETRIES_MAX = 1000


ErrorTypes = type[BaseException] | tuple[type[BaseException], ...]


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """Which failures may be retried; picklable, so that it is asked where the exception is.

    Attributes:
        retry_on: Only these; None for all.
        give_up_on: Never these, nor ``GiveUp``.
    """

    retry_on: ErrorTypes | None = None
    give_up_on: ErrorTypes = ()

    def may_retry(self, error: BaseException) -> bool:
        """Whether this failure may be retried."""
        if isinstance(error, (GiveUp, self.give_up_on)):
            return False
        return self.retry_on is None or isinstance(error, self.retry_on)


@dataclass(frozen=True, slots=True)
class Handler:
    """What one kind of job calls.

    Attributes:
        kind: The kind.
        function: Takes the ``Run``; what it returns becomes the metrics.
        is_async: Whether it is a coroutine function.
        retries: How many new records a failure may lead to, one after the other.
        backoff: How long each waits.
        policy: Which failures lead to one.
    """

    kind: StrEnum
    function: Function
    is_async: bool
    retries: int
    backoff: Backoff
    policy: FailurePolicy = FailurePolicy()

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__qualname__", repr(self.function))


def exponential(first: float, longest: float, *, factor: float = 2.0, jitter: float = 0.1) -> Backoff:
    """Return a backoff that grows: ``exponential(10, 600)`` waits about 10, 20, 40 ... and at most 600 seconds.

    Args:
        first: Seconds before the first retry.
        longest: Seconds at most.
        factor: How much longer each wait is.
        jitter: How far a wait may be off by chance, as a part of it, so that many failures do not come back at once.

    Raises:
        InvalidValueError: An argument is out of range.
    """
    if not is_number(longest) or longest < 0:
        raise InvalidValueError("longest", longest, "expected seconds of at least 0")
    if not is_number(first) or not 0 <= first <= longest:
        raise InvalidValueError("first", first, f"expected seconds from 0 to longest ({longest!r})")
    if not is_number(factor) or factor < 1:
        raise InvalidValueError("factor", factor, "expected at least 1")
    if not is_number(jitter) or not 0 <= jitter < 1:
        raise InvalidValueError("jitter", jitter, "expected a part of the wait, at least 0 and below 1")

    def seconds(retry: int) -> float:
        try:
            wait = min(first * factor ** (retry - 1), longest)
        except OverflowError:
            wait = longest
        return min(wait * random.uniform(1 - jitter, 1 + jitter), longest)  # noqa: S311 - no secret

    return seconds


def make_handler(
    kind: StrEnum,
    function: Any,
    retries: int,
    backoff: float | Backoff,
    policy: FailurePolicy,
) -> Handler:
    """Return the handler.

    Raises:
        InvalidValueError: What was given cannot work; said now, before the first job fails of it.
    """
    check_count("retries", retries, _RETRIES_MAX, lowest=0)
    return Handler(kind, function, _checked(function), retries, _as_backoff(backoff), policy)


def make_policy(retry_on: Any, give_up_on: Any) -> FailurePolicy:
    """Return which failures may be retried.

    Args:
        retry_on: An exception class, or several; None for all.
        give_up_on: An exception class, or several; empty for none.

    Raises:
        InvalidValueError: Something is no exception class.
    """
    only = None if retry_on is None else _as_error_types("retry_on", retry_on)
    return FailurePolicy(only, _as_error_types("give_up_on", give_up_on))


def _as_error_types(field: str, value: Any) -> tuple[type[BaseException], ...]:
    types = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(each, type) and issubclass(each, BaseException) for each in types):
        raise InvalidValueError(field, value, "expected an exception class, or several")
    return types


def is_number(value: object) -> bool:
    """Whether this is a finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _as_backoff(backoff: float | Backoff) -> Backoff:
    if callable(backoff):
        try:
            inspect.signature(backoff).bind(1)
        except TypeError as error:
            why = f"it has to take one argument, which retry it is: {error}"
            raise InvalidValueError("backoff", backoff, why) from error
        except ValueError:  # a builtin that does not tell
            pass
        return backoff
    if not is_number(backoff) or backoff < 0:
        raise InvalidValueError(
            "backoff", backoff, "expected seconds of at least 0, or a function such as exponential(10, 600)"
        )
    return lambda _: float(backoff)


def _checked(function: Any) -> bool:
    """Return whether this is a coroutine function.

    Raises:
        InvalidValueError: It cannot be called with one run, or would do nothing when it is.
    """

    def refuse(why: str) -> InvalidValueError:
        return InvalidValueError("handler", function, why)

    if not callable(function) or isinstance(function, type):
        raise refuse("expected a function that takes the run")
    called = function
    while isinstance(called, functools.partial):
        called = called.func
    if not inspect.isroutine(called):
        called = getattr(called, "__call__", called)  # noqa: B004
    if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
        raise refuse("it is a generator: calling it would run nothing")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin that does not tell
        return False
    try:
        signature.bind(None)
    except TypeError as error:
        raise refuse(f"it has to take one argument, the run: {error}") from error
    _check_annotation(called, signature, refuse)
    return inspect.iscoroutinefunction(called)


def _check_annotation(function: Any, signature: inspect.Signature, refuse: Callable[[str], InvalidValueError]) -> None:
    """Refuse a parameter that says it wants something else, such as the job or its spec."""
    first = next(iter(signature.parameters.values()), None)
    if first is None:
        return
    try:
        wanted = get_type_hints(function).get(first.name, Any)
    except Exception:  # noqa: BLE001 - an annotation that cannot be read says nothing
        return
    if (
        wanted is not Any
        and isinstance(wanted, type)
        and not issubclass(Run, wanted)
        and not getattr(wanted, "_is_protocol", False)
    ):
        raise refuse(f"its parameter {first.name!r} is a {wanted.__name__}, but it is given a Run")
