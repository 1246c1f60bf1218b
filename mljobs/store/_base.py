"""What ``JobStore`` and ``AsyncJobStore`` have in common: a method for each operation, and when it is run again."""

from __future__ import annotations

import asyncio
import random
import time
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial, wraps
from inspect import Parameter, Signature, signature, unwrap
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError, UnboundExecutionError

from mljobs.db._failures import is_locked, may_run_again
from mljobs.errors import InvalidValueError, MlJobsError, TerminalStateError
from mljobs.events import EventSource
from mljobs.jobs import Bind, Model

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.orm import Session

P = ParamSpec("P")
R = TypeVar("R")
M_co = TypeVar("M_co", covariant=True)

COMMITTED_ERRORS = (TerminalStateError,)
"""After these a transaction is committed all the same: the job was cancelled, and its lease has been given back."""

_MOST_ATTEMPTS = 12
_FIRST_PAUSE = 0.01  # seconds, at most; twice as long before each further attempt
_LONGEST_PAUSE = 0.5
_SESSION = "a store makes sessions of its own: call jobs.submit(session, ...) in yours, or JobStore(session.get_bind())"
_ADVICE = {
    "Engine": "use JobStore(engine)",
    "AsyncEngine": "use AsyncJobStore(engine)",
    "Connection": "use JobStore(connection)",
    "AsyncConnection": "use AsyncJobStore(connection)",
    "sessionmaker": "it binds the model to no engine: use JobStore(sessionmaker(engine))",
    "async_sessionmaker": "it binds the model to no engine: use AsyncJobStore(async_sessionmaker(engine))",
    "Session": _SESSION,
    "scoped_session": _SESSION,
    "AsyncSession": _SESSION,
    "async_scoped_session": _SESSION,
    "SQLAlchemy": "pass its engine, `db.engine`, or `db.engines[...]`",
}
"""By the name of a class: what to make a store of instead."""


class Store(EventSource):
    """Jobs in a database: what ``JobStore`` and ``AsyncJobStore`` have in common.

    Attributes:
        model: The mapped job class.
    """

    model: Any

    def __reduce__(self) -> Any:
        name = type(self).__name__
        raise TypeError(f"a {name} has connections and cannot be pickled: make one in the other process, {name}(url)")

    @property
    @abstractmethod
    def sync_url(self) -> URL:
        """Where a blocking store on the same database connects."""


class BlockingRunner(Protocol[M_co]):
    """What a method that ``store_method`` returns needs of its store."""

    @property
    def model(self) -> type[M_co]: ...

    def operate(self, arguments: Iterable[Any], *, atomic: bool) -> AbstractContextManager[Bind]: ...

    def lock_pauses(self, arguments: Iterable[Any]) -> Iterator[float]: ...


class AsyncRunner(Protocol[M_co]):
    """What a method that ``async_store_method`` returns needs of its store."""

    @property
    def model(self) -> type[M_co]: ...

    def operate(
        self, operation: Callable[[Bind], R], arguments: Iterable[Any], *, atomic: bool
    ) -> Coroutine[Any, Any, R]: ...

    def lock_pauses(self, arguments: Iterable[Any]) -> Iterator[float]: ...


def store_method(
    operation: Callable[Concatenate[Bind, P], R],
    *,
    atomic: bool | str = False,
    committed_errors: tuple[type[MlJobsError], ...] = (),
) -> Callable[Concatenate[BlockingRunner[Any], P], R]:
    """Return the method of ``JobStore`` that runs an operation.

    Args:
        operation: From ``mljobs.jobs``.
        atomic: Whether it has several statements, which are committed together; or the argument on which that depends.
        committed_errors: After one of these the transaction is committed, then the error is raised.
    """
    takes_model, operation = _takes_model(operation), unwrap(operation)  # the session is the store's own
    named, always = _when_atomic(atomic)

    @wraps(operation)
    def run(self: BlockingRunner[Any], *args: P.args, **kw: P.kwargs) -> R:
        if takes_model:
            kw.setdefault("model", self.model)
        arguments = (*args, *kw.values())
        attempts: _Attempts | None = None
        while True:
            try:
                with self.operate(arguments, atomic=bool(kw.get(named)) if named else always) as bind:
                    try:
                        return operation(bind, *args, **kw)
                    except committed_errors as refused:
                        error = refused
            except DBAPIError as failure:
                attempts = attempts or _Attempts(self, arguments)
                if (pause := attempts.pause_after(failure)) is None:
                    raise
                time.sleep(pause)
            else:
                raise error

    run.__signature__ = method_signature(operation)  # type: ignore[attr-defined]
    return cast("Callable[Concatenate[BlockingRunner[Any], P], R]", run)


def async_store_method(
    operation: Callable[Concatenate[Bind, P], R],
    *,
    atomic: bool | str = False,
    committed_errors: tuple[type[MlJobsError], ...] = (),
) -> Callable[Concatenate[AsyncRunner[Any], P], Coroutine[Any, Any, R]]:
    """Return the method of ``AsyncJobStore`` that runs an operation; see ``store_method``."""
    takes_model, operation = _takes_model(operation), unwrap(operation)  # the session is the store's own
    named, always = _when_atomic(atomic)

    @wraps(operation)
    async def run(self: AsyncRunner[Any], *args: P.args, **kw: P.kwargs) -> R:
        if takes_model:
            kw.setdefault("model", self.model)
        call = partial(_result_or_error, operation, committed_errors, args, kw)
        arguments = (*args, *kw.values())
        attempts: _Attempts | None = None
        while True:
            try:
                result, error = await self.operate(call, arguments, atomic=bool(kw.get(named)) if named else always)
            except DBAPIError as failure:
                attempts = attempts or _Attempts(self, arguments)
                if (pause := attempts.pause_after(failure)) is None:
                    raise
                await asyncio.sleep(pause)
            else:
                if error is not None:
                    raise error
                return result  # type: ignore[return-value]

    run.__signature__ = method_signature(operation)  # type: ignore[attr-defined]
    return cast("Callable[Concatenate[AsyncRunner[Any], P], Coroutine[Any, Any, R]]", run)


def has_iterator(arguments: Iterable[Any]) -> bool:
    """Whether one of the arguments is an iterator, which the first attempt uses up."""
    for value in arguments:  # noqa: SIM110 - `any` is a generator more
        if hasattr(value, "__next__"):
            return True
    return False


class _Attempts:
    """How often, and after which pauses, an operation that failed is run again."""

    def __init__(self, store: Any, arguments: Iterable[Any]) -> None:
        self._store = store
        self._locked: Iterator[float] = store.lock_pauses(arguments)
        self._met_another = _pauses(arguments)

    def pause_after(self, failure: DBAPIError) -> float | None:
        """Return how many seconds to wait before it is run again; None where it is not."""
        if is_locked(failure):
            return next(self._locked, None)
        return next(self._met_another, None) if _may_run_again(self._store, failure) else None


def _pauses(arguments: Iterable[Any]) -> Iterator[float]:
    """Yield how many seconds to wait before each new attempt of a transaction that conflicted with another one."""
    if has_iterator(arguments):
        return
    for attempt in range(_MOST_ATTEMPTS):
        yield random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt))  # noqa: S311 - spread, no secret


def _may_run_again(store: object, failure: DBAPIError) -> bool:
    """Whether the transaction may be run again. A host's own transaction is over when its connection breaks."""
    in_a_hosts = getattr(store, "_joined", None) is not None
    return may_run_again(failure) and not (in_a_hosts and failure.connection_invalidated)


def bind_of(session: Any, model: Model) -> object:
    """Return the engine or connection to which a new session binds the model; None where there is none."""
    try:
        return session.get_bind(inspect(model, raiseerr=False))
    except UnboundExecutionError:
        return None


def read_committed(session: Session, model: Model) -> None:
    """Begin the transaction of a host's new session in READ COMMITTED, for which the operations are written."""
    if session.get_bind(inspect(model)).dialect.name == "postgresql":
        session.connection({"mapper": inspect(model)}, {"isolation_level": "READ COMMITTED"})


def source_error(source: object, expected: str) -> InvalidValueError:
    """Return the error for a source that no store can be made of. It shows the class only: an engine shows its URL."""
    known = (_ADVICE[base.__name__] for base in type(source).__mro__ if base.__name__ in _ADVICE)
    return InvalidValueError("source", type(source).__name__, next(known, expected))


def method_signature(operation: Callable[..., Any]) -> Signature:
    """Return the signature of a store's method, for ``help``: that of its operation without ``session`` and ``model``."""
    parameters = list(signature(operation).parameters.values())[1:]
    itself = Parameter("self", Parameter.POSITIONAL_ONLY)
    return Signature([itself, *(one for one in parameters if one.name != "model")])


def _takes_model(operation: Callable[..., Any]) -> bool:
    return "model" in signature(operation).parameters


def _when_atomic(atomic: bool | str) -> tuple[str | None, bool]:  # noqa: FBT001 - as the caller was given it
    """Return the argument on which it depends whether an operation is atomic, if there is one; else whether it is."""
    return (atomic, False) if isinstance(atomic, str) else (None, atomic)


def _result_or_error(
    operation: Callable[..., R], errors: tuple[type[MlJobsError], ...], args: Any, kw: dict[str, Any], bind: Bind
) -> tuple[R | None, MlJobsError | None]:
    try:
        return operation(bind, *args, **kw), None
    except errors as error:
        return None, error
