"""What every operation needs: the caller's connection, the tables of a model, the id of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, wraps
from types import FunctionType
from typing import Any, Concatenate, ParamSpec, cast
from uuid import UUID

from sqlalchemy import Connection, Table, Update, inspect, update
from sqlalchemy.orm import Mapper, Session
from typing_extensions import TypeVar

from mljobs._values import to_job_id
from mljobs.db import _binds
from mljobs.db._binds import connection_for, resolve
from mljobs.db._prepared import Prepared
from mljobs.errors import InvalidValueError
from mljobs.jobs._statements import constant
from mljobs.record._mixin import MlJobMixin
from mljobs.record._models import MlJob

Bind = _binds.Bind
Model = type[MlJobMixin]
M = TypeVar("M", bound=MlJobMixin, default=MlJob)
"""The class of the jobs that an operation returns: the argument ``model``, ``MlJob`` by default."""
JobRef = UUID | int | str | MlJobMixin
"""What names a job: its id in any accepted form, or the record."""


_P = ParamSpec("_P")
_R = TypeVar("_R")


def per_model(build: Callable[Concatenate[Model, _P], _R]) -> Callable[Concatenate[Model, _P], _R]:
    """Return ``build`` with a cache: it is called once for each model and each set of further arguments."""
    return cast("Callable[Concatenate[Model, _P], _R]", cache(build))


def prepared(build: Callable[..., Any]) -> Callable[..., Prepared]:
    """Return a function that returns the statement for a model and further arguments.

    Args:
        build: Takes the model, the further arguments, and the dialect's name; returns the Core statement.
    """
    return per_model(lambda model, *more: Prepared(lambda dialect: build(model, *more, dialect)))


def accept_any_session(names: dict[str, Any], public: Iterable[str]) -> None:
    """Let the public operations of a package take any ``Bind``: each is called with what ``resolve`` returns.

    Args:
        names: The package's names, ``globals()``.
        public: Which of them are public. An operation is a function whose first parameter is ``session``.
    """
    for name in public:
        value = names[name]
        if isinstance(value, FunctionType) and value.__code__.co_varnames[:1] == ("session",):
            names[name] = _resolving(value)


def _resolving(operation: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(operation)
    def run(*args: Any, **kw: Any) -> Any:
        if args:
            return operation(resolve(args[0]), *args[1:], **kw)
        if "session" in kw:
            kw["session"] = resolve(kw["session"])
        return operation(**kw)

    return run


def connection_of(bind: Bind, model: Model) -> Connection:
    """Return the connection of the caller's transaction on the model's database; a session is flushed first.

    Raises:
        InvalidValueError: Neither a session nor a connection.
    """
    if isinstance(bind, Connection):
        return bind
    resolved = resolve(bind)
    if isinstance(resolved, Session):
        resolved.flush()
    return connection_for(resolved, owner_of(model))


def is_postgres(connection: Connection) -> bool:
    """Whether this is PostgreSQL; False for SQLite.

    Raises:
        InvalidValueError: It is neither.
    """
    name = connection.dialect.name
    if name == "postgresql":
        return True
    if name != "sqlite":
        raise InvalidValueError("dialect", name, "mljobs knows postgresql and sqlite")
    return False


def lock_sqlite(connection: Connection, model: Model) -> None:
    """Take SQLite's write lock now: what is read after it cannot change before the transaction ends."""
    _write_nothing(model).answer(connection, {})


@prepared
def _write_nothing(model: Model, _dialect: str) -> Update:
    leases = model.__leases__
    return update(leases).values(worker=leases.c.worker).where(leases.c.token < constant(0))


@per_model
def table_of(model: Model) -> Table:
    """Return the table that holds the record of ``model``.

    Raises:
        InvalidValueError: ``model`` is not a mapped job class.
    """
    mapper = inspect(model, raiseerr=False)
    if isinstance(mapper, Mapper) and issubclass(model, MlJobMixin):
        for table in mapper.tables:  # a joined subclass has one of its own beside it
            if isinstance(table, Table) and "spec_json" in table.c:
                return table
    raise InvalidValueError("model", model, "expected a mapped class with MlJobMixin")


@per_model
def owner_of(model: Model) -> Model:
    """Return the class that the job table of ``model`` was made for: ``model``, or the parent whose table it shares."""
    table = table_of(model)
    owners = [mapper.class_ for mapper in inspect(model).iterate_to_root() if mapper.local_table is table]
    owner: Model = owners[-1]
    return owner


@per_model
def own_table_of(model: Model) -> Table:
    """Return the table that holds the record of ``model``, if it is made for this class.

    Raises:
        InvalidValueError: ``model`` is not a mapped job class; or it shares the table of its parent, whose jobs are no jobs
            of ``model``.
    """
    table = table_of(model)
    owner = owner_of(model)
    if owner is not model:
        reason = f"its jobs are in one queue with those of {owner.__name__}: give that, and choose by kind"
        raise InvalidValueError("model", model, reason)
    return table


def id_of(job: JobRef) -> UUID:
    """Return the id of a record, or the id itself.

    Raises:
        InvalidValueError: It is no id.
    """
    if not isinstance(job, MlJobMixin):
        return to_job_id(job)
    identity = inspect(job).identity  # known even where a commit has expired the job and its session is closed
    return job.id if identity is None else identity[0]


def model_and_id(job: JobRef, model: type[M]) -> tuple[type[M], UUID]:
    """Return the class and the id of a job: of a record its own class, where the caller has left ``model`` out.

    Args:
        job: The job or its id.
        model: The class that the caller gave; the default is ``MlJob``.

    Raises:
        InvalidValueError: It is no id, or a record of another class than the caller gave.
    """
    if isinstance(job, MlJobMixin) and not (isinstance(job, model) or issubclass(model, type(job))):
        if model is not MlJob:
            raise InvalidValueError("job", job, f"it is a {type(job).__name__}, and the model is {model.__name__}")
        return cast("type[M]", type(job)), id_of(job)
    return model, id_of(job)
