"""For tests of applications: fresh databases, jobs in any state, a worker that runs what is queued.

``pytest_plugins = ["mljobs.testing"]`` in ``conftest.py`` brings the fixtures. The functions need no pytest.
PYTEST_DONT_REWRITE: so a ``conftest.py`` may import from here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, create_engine, delete, select, true, update
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import schema
from mljobs._values import utc_now
from mljobs.db._copies import copy_of
from mljobs.guards import retention
from mljobs.jobs import Model, table_of
from mljobs.jobs._base import M, connection_of
from mljobs.record._models import MlJob
from mljobs.states import MlJobStatus
from mljobs.store._store import JobStore
from mljobs.worker._inline import run_jobs
from mljobs.worker._worker import Worker

__all__ = ["add_job", "advance", "clock", "copy_of", "empty", "jobs_model", "jobs_source", "jobs_template", "make_job"]
__all__ += ["rolled_back", "run_jobs", "run_queued", "store"]


@contextmanager
def rolled_back(engine: Engine) -> Iterator[Connection]:
    """Yield a connection whose transaction is rolled back at the end, for stores and sessions that commit savepoints."""
    with engine.connect() as connection:
        with JobStore(connection).connect():  # begins it, on SQLite too, whose driver would wait for the first write
            pass
        yield connection
        connection.rollback()


def empty(bind: Engine | Connection, *models: Model) -> None:
    """Delete all jobs, leases and workers; finished jobs by the way that retention opens, for TRUNCATE is refused.

    Args:
        bind: Where they are.
        *models: The mapped job classes; none for ``MlJob``.
    """
    with Session(bind) as session, session.begin():
        for model in models or (MlJob,):
            for beside in (model.__leases__, model.__workers__):
                session.execute(delete(beside))
            with retention(session, model):
                session.execute(delete(model).execution_options(synchronize_session=False))


def make_job(status: str = "queued", model: type[M] = MlJob, **fields: Any) -> M:  # type: ignore[assignment]
    """Return a record in any state, with the times that belong to it, for ``session.add`` or ``store.submit_many``.

    It was submitted an hour ago, and one that has finished ran for a minute, unless ``fields`` say when. A running one was
    started by hand: no worker holds it, and no rescue takes it.

    Args:
        status: Its state.
        model: The mapped job class.
        **fields: Fields of the record, and columns of your own.
    """
    state, made = MlJobStatus(status), fields.get("created_at") or utc_now() - timedelta(hours=1)
    values: dict[str, Any] = {"kind": next(iter(model.__kinds__)), "target_name": "test", "created_at": made}
    if state is not MlJobStatus.QUEUED:
        values |= {"started_at": made, "attempts": 1, "worker": "test"}
    if state.is_terminal:
        values["finished_at"] = (fields.get("started_at") or made) + timedelta(minutes=1)
    if state is MlJobStatus.FAILED:
        values["error_message"] = "failed"
    values["progress"] = 100 if state is MlJobStatus.COMPLETED else 0
    return model(status=state, **values | fields)


def advance(store: JobStore[Any], **by: float) -> None:
    """Bring nearer what lies ahead: the ``run_after`` of queued jobs, the end of leases. No test turns the database's clock.

    Args:
        store: Where the jobs are.
        **by: How much, as ``timedelta`` takes it: ``hours=1``.
    """
    jobs, leases = table_of(store.model), store.model.__leases__
    with store.connect() as bind:
        connection = connection_of(bind, store.model)
        for key, moved, condition in (
            (jobs.c.id, jobs.c.run_after, (jobs.c.status == MlJobStatus.QUEUED) & jobs.c.run_after.is_not(None)),
            (leases.c.token, leases.c.expires_at, true()),
        ):
            for row, at in connection.execute(select(key, moved).where(condition)).all():
                connection.execute(update(moved.table).where(key == row).values({moved: at - timedelta(**by)}))


if TYPE_CHECKING or find_spec("pytest"):
    import pytest

    @pytest.fixture(scope="session")
    def jobs_model() -> Model:
        """Return the mapped job class."""
        return MlJob

    @pytest.fixture(scope="session")
    def jobs_template(jobs_model: Model, tmp_path_factory: pytest.TempPathFactory) -> str:
        """Return the URL of the database that each test gets a copy of."""
        url = f"sqlite:///{tmp_path_factory.mktemp('jobs') / 'template.db'}"
        if jobs_model is MlJob:
            schema.upgrade(url)
        else:
            table_of(jobs_model).metadata.create_all(create_engine(url, poolclass=NullPool))
        return url

    @pytest.fixture
    def jobs_source(jobs_template: str) -> Iterator[str | Connection]:
        """Yield what the store is made from: a URL, or the connection of ``rolled_back``."""
        with copy_of(jobs_template) as url:
            yield url

    @pytest.fixture
    def store(jobs_source: str | Connection, jobs_model: Model) -> Iterator[JobStore[Any]]:
        """Yield a store on the database of this test."""
        with JobStore(jobs_source, model=jobs_model) as made:
            yield made

    @pytest.fixture
    def run_queued(store: JobStore[Any], jobs_worker: Worker[Any]) -> Callable[..., dict[str, int]]:
        """Return ``run_jobs`` for this store, and the worker that your fixture ``jobs_worker`` returns."""
        return partial(run_jobs, store, jobs_worker)

    @pytest.fixture
    def clock(store: JobStore[Any]) -> Callable[..., None]:
        """Return ``advance`` for this store."""
        return partial(advance, store)

    @pytest.fixture
    def add_job(store: JobStore[Any]) -> Callable[..., Any]:
        """Return a function that adds what ``make_job`` returns, and reads it again."""
        return lambda status="queued", **fields: _added(store, make_job(status, store.model, **fields))


def _added(store: JobStore[Any], job: Any) -> Any:
    store.submit_many([job])
    return store.get(job.id)
