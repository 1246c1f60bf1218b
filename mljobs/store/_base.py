"""What both stores have in common: the binding of an operation, and what a worker asks of either."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from functools import partial, wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from mljobs.errors import MlJobsError, TerminalStateError
from mljobs.events import EventSource
from mljobs.jobs import Bind, Model

if TYPE_CHECKING:
    from sqlalchemy import URL

P = ParamSpec("P")
R = TypeVar("R")

LEASE_GIVEN_BACK = (TerminalStateError,)
"""How a finish says that the job was cancelled meanwhile; the lease that it gave back stays given back."""


class Store(EventSource):
    """Jobs in a database: what ``JobStore`` and ``AsyncJobStore`` have in common.

    Attributes:
        model: The mapped job class.
    """

    model: Model

    @property
    @abstractmethod
    def sync_url(self) -> URL:
        """Where a blocking store on the same database connects."""


class _Connects(Protocol):
    model: Model

    def connect(self, *, atomic: bool = ...) -> AbstractContextManager[Bind]: ...


class _Runs(Protocol):
    model: Model

    def run(self, operation: Callable[[Bind], R], *, atomic: bool = ...) -> Coroutine[Any, Any, R]: ...


def store_method(
    operation: Callable[Concatenate[Bind, P], R],
    *,
    atomic: bool | str = False,
    committed_errors: tuple[type[MlJobsError], ...] = (),
) -> Callable[Concatenate[_Connects, P], R]:
    """Return the method of ``JobStore`` that runs an operation.

    Args:
        operation: From ``mljobs.jobs``.
        atomic: Whether it is several statements that are committed together; the name of the argument that makes it so.
        committed_errors: After one of these the transaction is committed, then the error is raised.
    """
    takes_model = _takes_model(operation)

    @wraps(operation)
    def run(self: _Connects, *args: P.args, **kw: P.kwargs) -> R:
        if takes_model:
            kw.setdefault("model", self.model)
        with self.connect(atomic=_is_atomic(atomic, kw)) as bind:
            try:
                return operation(bind, *args, **kw)
            except committed_errors as refused:
                error = refused
        raise error

    return cast("Callable[Concatenate[_Connects, P], R]", run)


def async_store_method(
    operation: Callable[Concatenate[Bind, P], R],
    *,
    atomic: bool | str = False,
    committed_errors: tuple[type[MlJobsError], ...] = (),
) -> Callable[Concatenate[_Runs, P], Coroutine[Any, Any, R]]:
    """Return the method of ``AsyncJobStore`` that runs an operation; see ``store_method``."""
    takes_model = _takes_model(operation)

    @wraps(operation)
    async def run(self: _Runs, *args: P.args, **kw: P.kwargs) -> R:
        if takes_model:
            kw.setdefault("model", self.model)
        call = partial(_result_or_error, lambda bind: operation(bind, *args, **kw), committed_errors)
        result, error = await self.run(call, atomic=_is_atomic(atomic, kw))
        if error is not None:
            raise error
        return cast("R", result)

    return cast("Callable[Concatenate[_Runs, P], Coroutine[Any, Any, R]]", run)


def _takes_model(operation: Callable[..., Any]) -> bool:
    return "model" in signature(operation).parameters


def _is_atomic(atomic: bool | str, arguments: dict[str, Any]) -> bool:  # noqa: FBT001 - as the caller was given it
    return bool(arguments.get(atomic)) if isinstance(atomic, str) else atomic


def _result_or_error(
    operation: Callable[[Bind], R], errors: tuple[type[MlJobsError], ...], bind: Bind
) -> tuple[R | None, MlJobsError | None]:
    try:
        return operation(bind), None
    except errors as error:
        return None, error
