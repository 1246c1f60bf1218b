"""What others have written or given: kinds of a newer release, read-only files, URLs with secrets, expired records."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pydantic
import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import DeclarativeBase, Session

from mljobs import AsyncJobStore, InvalidValueError, JobStore, MlJob, MlJobMixin, ModelError, Worker, jobs
from mljobs.db._engines import async_url, sync_url
from mljobs.guards._companions import companion_names
from mljobs.states import MlJobStatus, UnknownKind
from mljobs.transfer import export_jobs
from mljobs.transfer._arrow import to_arrow
from tests.backends import Backend

# ------------------------------------------------------------------------------------ a rolling deploy with a new kind


def _queue_a_newer_kind(engine: Engine) -> None:
    """Do what a newer release does: its migration lists another kind, and it queues one."""
    with engine.begin() as connection:
        MlJob.__table__.metadata.drop_all(connection)
        ddl = [c for c in MlJob.__table__.constraints if "kind IN" in str(getattr(c, "sqltext", ""))]
        assert len(ddl) == 1
        check: Any = ddl[0]
        before = check.sqltext
        try:
            check.sqltext = text(str(before).replace("'train'", "'train', 'distill'"))
            MlJob.__table__.metadata.create_all(connection)
        finally:
            check.sqltext = before
        if connection.dialect.name == "sqlite":  # the newer guard counts it
            counts = companion_names("ml_jobs")["counts"]
            for status in MlJobStatus:
                connection.execute(text(f"INSERT INTO {counts} VALUES ('distill', '{status}', 0)"))
        jobs.submit_many(connection, [("train", "spam", None)])
        connection.execute(text("UPDATE ml_jobs SET kind = 'distill'"))
        jobs.submit(connection, "train", "eggs")


def test_a_kind_of_a_newer_release_is_not_claimed_and_stops_nobody(backend: Backend) -> None:
    _queue_a_newer_kind(backend.outside)
    store = backend.store()
    kinds = ["train", "backfill", "feature_refresh", "drift_compute"]
    (claim,) = store.claim(worker="w", kinds=kinds, limit=10)
    assert claim.job.target_name == "eggs"
    store.complete(claim)
    found = {job.target_name: job for job in store.find()}
    assert found["spam"].kind == "distill"
    assert isinstance(found["spam"].kind, UnknownKind)
    assert "distill" in repr(found["spam"])
    assert store.get(found["spam"]).kind.token == "distill"
    counts = store.counts()
    assert counts["distill", "queued"] == 1
    assert counts.total() == 2
    assert store.summaries_of([found["spam"]])[0].kind == "distill"
    with Session(backend.outside) as session:
        assert export_jobs(session, file := io.BytesIO()) == 2
        assert b'"kind":"distill"' in file.getvalue()
        assert sorted(to_arrow(session).column("kind").to_pylist()) == ["distill", "train"]
    assert store.cancel(found["spam"]) is True
    assert store.counts()["distill", "cancelled"] == 1


def test_a_worker_of_the_older_release_goes_on(url: str) -> None:
    with JobStore(url) as store:
        _queue_a_newer_kind(store.engine)
        worker = Worker(store)
        done: list[str] = []
        for kind in ("train", "backfill", "feature_refresh", "drift_compute"):
            worker.handles(kind)(lambda run: done.append(run.job.target_name))
        worker.run(until_idle=True)
        assert done == ["eggs"]


def test_a_state_of_a_newer_release_is_an_error_that_names_it() -> None:
    with pytest.raises(InvalidValueError, match=r"'paused'.*upgrade"):
        MlJob.__table__.c.status.type.process_result_value("paused", None)


# ---------------------------------------------------------------------------------------------------- a read-only file


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_a_read_only_sqlite_file_is_read(sqlite_url: str, journal: str) -> None:
    with JobStore(sqlite_url) as store:
        job = store.submit("train", "spam")
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    with create_engine(sqlite_url).connect() as connection:
        connection.exec_driver_sql(f"PRAGMA journal_mode = {journal}")
        connection.engine.dispose()
    with JobStore(f"sqlite:///file:{path}?mode=ro&uri=true") as store:
        assert store.get(job).target_name == "spam"
        assert store.counts().total() == 1
        assert [found.id for found in store.find(status="queued")] == [job.id]
        with pytest.raises(Exception, match="readonly"):
            store.submit("train", "eggs")


async def _read_only(url: str, job: Any) -> str:
    async with AsyncJobStore(url) as store:
        found: str = (await store.get(job)).target_name
        return found


def test_a_read_only_sqlite_file_is_read_by_asyncio(sqlite_url: str) -> None:
    import asyncio

    with JobStore(sqlite_url) as store:
        job = store.submit("train", "spam")
    path = sqlite_url.removeprefix("sqlite:///")
    assert asyncio.run(_read_only(f"sqlite+aiosqlite:///file:{path}?mode=ro&uri=true", job)) == "spam"


# --------------------------------------------------------------------------------------------- secrets in what is given

SECRETS = [
    "postgresql+psycopg://ann:hunter2@db/app?password=hunter3&sslpassword=hunter4",
    "postgresql+psycopg://ann:hunter2@db:port/app",
    "mysql://ann:hunter2@db/app?password=hunter3",
    "postgresql//ann:hunter2@db/app",
    "postgresql://ann:hunter2 @db:x/app?password=hunter3",
    "hunter2",
    "://hunter2@",
    "oracle://db/app?token=hunter2",
    "host=db password=hunter2",
]


@pytest.mark.parametrize("url", SECRETS[1:])
@pytest.mark.parametrize("take", [JobStore, AsyncJobStore, sync_url, async_url])
def test_nothing_secret_of_a_url_is_ever_printed(take: Any, url: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        take(url)
    error: BaseException | None = caught.value
    while error is not None:
        if error is caught.value or not error.__suppress_context__:
            assert "hunter" not in f"{error}{error!r}"
        error = error.__cause__
    assert "hunter" not in str(caught.value.value)


@pytest.mark.parametrize("given", [lambda: create_engine(SECRETS[0]), lambda: create_engine(SECRETS[0]).url])
def test_an_engine_in_the_wrong_place_keeps_its_secrets(given: Any) -> None:
    if isinstance(given(), Engine):
        with pytest.raises(InvalidValueError, match=r"use JobStore\(engine\)") as caught:
            AsyncJobStore(given())
        assert "hunter" not in str(caught.value)
    for field in ("kind", "target_name"):
        with pytest.raises(InvalidValueError) as caught:
            MlJob(**{"kind": "train", "target_name": "spam", "spec_json": "{}", field: given()})
        assert "hunter" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ records out of season


def test_the_id_of_an_expired_and_detached_job_is_taken_from_its_identity(url: str) -> None:
    with JobStore(url) as store, Session(store.engine) as session:
        job = jobs.submit(session, "train", "spam")
        job_id = job.id
        session.commit()
        session.expunge(job)
        assert str(job_id) in repr(job)
        assert store.get(job).id == job_id
        claim = store.claim_one(job, worker="w")
        assert claim.job_id == job_id
        assert store.cancel(job) is True
        assert store.retry(job).retry_of == job_id
        assert store.wait(job, 0).id == job_id


def test_a_class_of_pydantic_is_refused_with_the_way_out() -> None:
    class Base(DeclarativeBase):
        pass

    with pytest.raises(ModelError, match=r"metadata = SQLModel\.metadata"):

        class Run(MlJobMixin, pydantic.BaseModel):  # type: ignore[misc]
            __tablename__ = "runs"
