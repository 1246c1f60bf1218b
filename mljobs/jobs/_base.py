"""What every operation needs: the caller's connection, the tables of a model, the job that is meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from types import FunctionType
from typing import Any, Concatenate, ParamSpec, cast
from uuid import UUID

from sqlalchemy import (
    Connection,
    Table,
    inspect,
    update,
)
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
"""The class of the jobs that an operation returns: what ``model`` says, else ``MlJob``."""
JobRef = UUID | int | str | MlJobMixin
"""What names a job: its id in any accepted form, or the record."""


_P = ParamSpec("_P")
_R = TypeVar("_R")


def per_model(build: Callable[Concatenate[Model, _P], _R]) -> Callable[Concatenate[Model, _P], _R]:
    """Keep what ``build`` returns for each model and each further argument."""
    return cast("Callable[Concatenate[Model, _P], _R]", cache(build))


def accept_any_session(names: dict[str, Any], public: Iterable[str]) -> None:
    """Let the public operations of a room take whatever a host calls a session; inside, ``resolve`` has been called.

    Args:
        names: The room's names, ``globals()``.
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
    """Return the connection of the caller's transaction on the model's database, with what its session holds written to it.

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
    """Whether this is PostgreSQL; SQLite is the other one.

    Raises:
        InvalidValueError: Neither.
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


@per_model
def _write_nothing(model: Model) -> Prepared:
    leases = model.__leases__
    return Prepared(lambda _: update(leases).values(worker=leases.c.worker).where(leases.c.token < constant(0)))


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
    """Return the class that the job table of ``model`` belongs to: of a subclass its parent, of any other itself."""
    table = table_of(model)
    owners = [mapper.class_ for mapper in inspect(model).iterate_to_root() if mapper.local_table is table]
    owner: Model = owners[-1]
    return owner


@per_model
def whole_table_of(model: Model) -> Table:
    """Return the table that holds the record of ``model``, and of nothing else.

    Raises:
        InvalidValueError: ``model`` is not a mapped job class; or a subclass, whose table holds jobs that are none of it.
    """
    table = table_of(model)
    owner = owner_of(model)
    if owner is not model:
        reason = f"its jobs are in one queue with those of {owner.__name__}: give that, and choose by kind"
        raise InvalidValueError("model", model, reason)
    return table


def id_of(job: JobRef) -> UUID:
    """Return the id that ``job`` names.

    Raises:
        InvalidValueError: It names none.
    """
    if not isinstance(job, MlJobMixin):
        return to_job_id(job)
    identity = inspect(job).identity  # is there when a commit has expired the job, and its session is closed
    return job.id if identity is None else identity[0]


def model_and_id(job: JobRef, model: type[M]) -> tuple[type[M], UUID]:
    """Return the class and the id of the job that is meant: a record is of its own class, whatever the default says.

    Args:
        job: The job or its id.
        model: What the caller said, or the default ``MlJob``.

    Raises:
        InvalidValueError: It names none, or is of another class than the caller said.
    """
    if isinstance(job, MlJobMixin) and not (isinstance(job, model) or issubclass(model, type(job))):
        if model is not MlJob:
            raise InvalidValueError("job", job, f"it is a {type(job).__name__}, and the model is {model.__name__}")
        return cast("type[M]", type(job)), id_of(job)
    return model, id_of(job)


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are not None: what the caller left out keeps the model's default."""
    return {name: value for name, value in values.items() if value is not None}
