"""advanced-alchemy's repositories work on the record as on any model, and are told what a finished one is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from mljobs import MlJob, MlJobStatus, TerminalStateError
from mljobs._values import utc_now
from tests.backends import Backend, Blocking
from tests.cases import case


@cache
def _repositories() -> tuple[Any, Any]:
    """Return the blocking repository and the one for asyncio."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The declarative_mixin decorator")  # advanced-alchemy 1.12 on SQLAlchemy 2.1
        from advanced_alchemy.repository import SQLAlchemyAsyncRepository, SQLAlchemySyncRepository

    class Jobs(SQLAlchemySyncRepository[MlJob]):
        model_type = MlJob

    class AsyncJobs(SQLAlchemyAsyncRepository[MlJob]):
        model_type = MlJob

    return Jobs, AsyncJobs


@pytest.fixture
def session(backend: Backend) -> Any:
    """A session whose methods block."""
    if isinstance(backend.engine, AsyncEngine):
        made = AsyncSession(backend.engine, expire_on_commit=False)
        yield Blocking(made, backend.wait)
        backend.wait(made.close())
    else:
        with Session(backend.engine, expire_on_commit=False) as blocking:
            yield blocking


@pytest.fixture
def jobs(backend: Backend, session: Any) -> Any:
    """A repository whose methods block."""
    blocking, for_asyncio = _repositories()
    if isinstance(session, Blocking):
        return Blocking(for_asyncio(session=session._target), backend.wait)
    return blocking(session=session)


def _job(target: str = "spam", **values: Any) -> MlJob:
    return MlJob(kind="train", target_name=target, **values)


def test_jobs_are_added_got_listed_changed_and_deleted(jobs: Any, session: Any) -> None:
    from advanced_alchemy.filters import BeforeAfter, CollectionFilter, LimitOffset, OrderBy, SearchFilter

    job = jobs.add(_job(spec={"lr": 0.1}))
    jobs.add_many([_job("ham"), _job("eggs", priority=5)])
    session.commit()
    assert jobs.get(job.id).spec == {"lr": 0.1}
    assert jobs.get_one(target_name="ham").target_name == "ham"
    assert jobs.get_one_or_none(target_name="nobody") is None
    assert jobs.count() == 3
    assert jobs.exists(status="queued")
    assert [found.target_name for found in jobs.get_many(OrderBy("target_name", "asc"), LimitOffset(2, 0))] == [
        "eggs",
        "ham",
    ]
    assert len(jobs.get_many(CollectionFilter("status", ["queued"]), SearchFilter("target_name", "a"))) == 2
    assert jobs.get_many(CollectionFilter("kind", [MlJob(kind="backfill", target_name="x").kind])) == []
    assert len(jobs.get_many(BeforeAfter("created_at", before=utc_now().replace(year=2100), after=None))) == 3
    assert jobs.get_many_and_count(status=MlJobStatus.QUEUED)[1] == 3
    job.start()
    jobs.update(job)
    session.commit()
    assert jobs.get(job.id).status is MlJobStatus.RUNNING
    job.complete({"f1": 0.5})
    jobs.update(job)
    assert jobs.upsert(_job("new")).status is MlJobStatus.QUEUED
    waiting = jobs.get_one(target_name="ham")
    assert jobs.upsert(MlJob(id=waiting.id, kind="train", target_name="ham", priority=9)).priority == 9
    assert jobs.delete(waiting.id).id == waiting.id
    assert jobs.delete_where(target_name="eggs")
    session.commit()
    assert {found.target_name for found in jobs.get_many()} == {"spam", "new"}


def _set_and_update(jobs: Any, job: MlJob) -> object:
    job.progress = 5
    return jobs.update(job)


CHANGES: dict[str, Callable[[Any, MlJob], object]] = {
    "update": _set_and_update,
    "update of another instance": lambda jobs, job: jobs.update(MlJob(id=job.id, kind="train", target_name="other")),
    "update_many": lambda jobs, job: jobs.update_many([MlJob(id=job.id, kind="train", target_name="other")]),
    "upsert": lambda jobs, job: jobs.upsert(MlJob(id=job.id, kind="train", target_name="other")),
    "upsert_many": lambda jobs, job: jobs.upsert_many([MlJob(id=job.id, kind="train", target_name="other")]),
    "delete": lambda jobs, job: jobs.delete(job.id),
    "delete_many": lambda jobs, job: jobs.delete_many([job.id]),
    "delete_where": lambda jobs, job: jobs.delete_where(target_name=job.target_name),
}


def test_a_finished_job_refuses_every_way_to_change_it_by_our_error(jobs: Any, session: Any) -> None:
    for name, change in CHANGES.items():
        with case(name):
            job = _job(name)
            job.start()
            job.complete({"f1": 0.5})
            job_id = jobs.add(job).id
            session.commit()
            with pytest.raises(Exception, match=r"completed|terminal state") as caught:
                change(jobs, job)
            chain: list[BaseException | None] = [caught.value]
            while chain[-1] is not None:
                chain.append(chain[-1].__cause__ or chain[-1].__context__)
            assert any(isinstance(error, TerminalStateError) for error in chain), chain
            session.rollback()
            session.expunge_all()
            assert (jobs.get(job_id).progress, jobs.get(job_id).target_name) == (100, name)
