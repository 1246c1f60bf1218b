"""Make records of rows: detached ones, or members of the caller's session."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import Connection, Select, inspect, select
from sqlalchemy.orm import Session, selectin_polymorphic

from mljobs.jobs._base import Bind, Model, per_model, table_of
from mljobs.record._models import MlJob

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement


def record_columns(model: Model) -> list[ColumnElement[Any]]:
    """Return the columns that ``record`` reads, in its order."""
    return list(table_of(model).columns)


@per_model
def _shape(model: Model) -> tuple[Callable[[], Any], tuple[str, ...], int, tuple[Any, ...]]:
    """Return what makes a new instance, its keys in the order of the columns, where its id is, and its identity key."""
    mapper = inspect(model)
    mapper.registry.configure()  # the first query by the ORM would, but there may have been none
    mapped = mapper.columns
    keys = tuple(
        # The parent maps no column of a subclass that shares its table.
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


def is_ml_job(model: Model) -> bool:
    """Whether ``model`` is ``MlJob`` itself, for which no ORM is needed: a host's class may have defaults and events."""
    return model is MlJob


def loaded(bind: Bind, model: Model, jobs: Sequence[Any]) -> list[Any]:
    """Return ``jobs`` as members of the caller's session, read again; for a connection as they are, detached."""
    if not jobs or (isinstance(bind, Connection) and is_ml_job(model)):
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
    """Read again the jobs that the caller's session holds, after a statement that the session does not know of."""
    if isinstance(bind, Connection):
        return
    mapper = inspect(model)
    held = [job_id for job_id in ids if mapper.identity_key_from_primary_key((job_id,)) in bind.identity_map]
    if held:
        bind.scalars(select(model).where(model.id.in_(held)).execution_options(populate_existing=True)).all()
