"""What every operation needs: the caller's connection, the tables of a model, the clock, records from rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache, wraps
from types import FunctionType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, cast
from uuid import UUID

from sqlalchemy import (
    Connection,
    Select,
    Table,
    bindparam,
    inspect,
    select,
    update,
)
from sqlalchemy.orm import Mapper, Session, selectin_polymorphic
from typing_extensions import TypeVar

from mljobs._values import to_job_id
from mljobs.db import _binds
from mljobs.db._binds import connection_for, resolve
from mljobs.db._prepared import Prepared
from mljobs.errors import InvalidTransitionError, InvalidValueError, JobNotFound, TerminalStateError
from mljobs.jobs._statements import constant
from mljobs.record._mixin import MlJobMixin
from mljobs.record._models import MlJob
from mljobs.states import MlJobStatus

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement

Bind = _binds.Bind
Model = type[MlJobMixin]
M = TypeVar("M", bound=MlJobMixin, default=MlJob)
"""The class of the jobs that an operation returns: what ``model`` says, else ``MlJob``."""
JobRef = UUID | int | str | MlJobMixin
"""What names a job: its id in any accepted form, or the record."""

_MAX_SECONDS = 10 * 365 * 86_400


_P = ParamSpec("_P")
_R = TypeVar("_R")


def per_model(build: Callable[Concatenate[Model, _P], _R]) -> Callable[Concatenate[Model, _P], _R]:
    """Keep what ``build`` returns for each model and each further argument."""
    return cast("Callable[Concatenate[Model, _P], _R]", cache(build))


# --------------------------------------------------------------------------------------------------- connections


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


# ------------------------------------------------------------------------------------------------------ arguments


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


# -------------------------------------------------------------------------------------------------------- records


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


def record_columns(model: Model) -> list[ColumnElement[Any]]:
    """Return the columns that ``record`` reads, in its order."""
    return list(table_of(model).columns)


@per_model
def _shape(model: Model) -> tuple[Callable[[], Any], tuple[str, ...], int, tuple[Any, ...]]:
    """Return what makes a new instance, its keys in the order of the columns, where its id is, and its identity key."""
    mapper = inspect(model)
    mapper.registry.configure()  # a process that never queried by the ORM has not done so yet
    mapped = mapper.columns
    keys = tuple(
        # A column of a subclass that shares the table is none of the parent's.
        mapper.get_property_by_column(column).key if mapped.contains_column(column) else column.name
        for column in table_of(model).columns
    )
    return mapper.class_manager.new_instance, keys, keys.index("id"), mapper.identity_key_from_primary_key((None,))


def record(model: Model, row: Sequence[Any]) -> Any:
    """Return a detached instance that holds ``row``, as a session would have loaded it."""
    new_instance, keys, at_id, (identity, _, token) = _shape(model)
    job: Any = new_instance()
    job.__dict__.update(zip(keys, row, strict=True))
    job._sa_instance_state.key = (identity, (row[at_id],), token)  # noqa: SLF001 - inspect(job) costs as much as the rest
    return job


def is_plain_record(model: Model) -> bool:
    """Whether ``model`` is the record alone, with nothing of a host's that only the ORM could fill in."""
    return model is MlJob


def loaded(bind: Bind, model: Model, jobs: Sequence[Any]) -> list[Any]:
    """Return ``jobs`` as members of the caller's session, read anew; detached as they are where there is none."""
    if not jobs or (isinstance(bind, Connection) and is_plain_record(model)):
        return list(jobs)
    if isinstance(bind, Connection):
        with session_on(bind) as session:
            found_jobs = loaded(session, model, jobs)
            session.expunge_all()
        return found_jobs
    ids = [job.id for job in jobs]
    statement = select_all(model).where(model.id.in_(ids)).execution_options(populate_existing=True)
    found = {job.id: job for job in bind.scalars(statement)}
    return [found[job_id] for job_id in ids]


def select_all(model: Model) -> Select[Any]:
    """Return the SELECT of jobs with all their columns, those of subclasses too: a detached job loads none later."""
    subclasses = [mapper.class_ for mapper in inspect(model).self_and_descendants if mapper.class_ is not model]
    return select(model).options(selectin_polymorphic(model, subclasses)) if subclasses else select(model)


def session_on(connection: Connection) -> Session:
    """Return a session that leaves the connection's transaction as it is."""
    if not connection.in_transaction():
        connection.begin()
    return Session(connection, join_transaction_mode="rollback_only", expire_on_commit=False)


def refresh(bind: Bind, model: Model, ids: Iterable[UUID]) -> None:
    """Read anew what the caller's session holds of these jobs, after a statement that went past it."""
    if isinstance(bind, Connection):
        return
    mapper = inspect(model)
    held = [job_id for job_id in ids if mapper.identity_key_from_primary_key((job_id,)) in bind.identity_map]
    if held:
        bind.scalars(select(model).where(model.id.in_(held)).execution_options(populate_existing=True)).all()


# ----------------------------------------------------------------------------------------------------- why it failed


@per_model
def _state(model: Model) -> Prepared:
    table = table_of(model)
    columns = (table.c.status, table.c.finished_at, table.c.started_at)
    return Prepared(lambda _: select(*columns).where(table.c.id == bindparam("id", type_=table.c.id.type)))


def state_of(connection: Connection, model: Model, job_id: UUID) -> MlJobStatus:
    """Return the job's status now.

    Raises:
        JobNotFound: No record has this id.
    """
    rows = _state(model).rows(connection, {"id": job_id})
    if not rows:
        raise JobNotFound(job_id)
    status: MlJobStatus = rows[0][0]
    return status


def refusal(
    connection: Connection, model: Model, job_id: UUID, wanted: MlJobStatus
) -> TerminalStateError | InvalidTransitionError | JobNotFound:
    """Return the error that says why the job did not become ``wanted``."""
    return refusal_and_start(connection, model, job_id, wanted)[0]


def refusal_and_start(
    connection: Connection, model: Model, job_id: UUID, wanted: MlJobStatus
) -> tuple[TerminalStateError | InvalidTransitionError | JobNotFound, datetime | None]:
    """Return what ``refusal`` returns, and when the job was started."""
    rows = _state(model).rows(connection, {"id": job_id})
    if not rows:
        return JobNotFound(job_id), None
    status, finished_at, started_at = rows[0]
    if status.is_terminal:
        error = TerminalStateError(job_id, status, finished_at, {"status": (status.token, wanted.token)})
        return error, started_at
    return InvalidTransitionError(job_id, status, wanted), started_at


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are not None: what the caller left out keeps the model's default."""
    return {name: value for name, value in values.items() if value is not None}
