"""What happened to users of other systems does not happen here: docs/field.md names the reports."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib.util import find_spec
from typing import Any
from uuid import uuid4

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, Index, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

import mljobs.alembic_plugin  # noqa: F401 - Alembic before 1.18 finds no plugin by itself
from mljobs import (
    AsyncJobStore,
    InvalidValueError,
    JobStore,
    LeaseLostError,
    MlJob,
    MlJobMixin,
    MlJobStatus,
    Run,
    Worker,
    jobs,
)
from mljobs.db._failures import database_is_away
from tests.leases import expire_leases
from tests.slow.chaos.proxy import Proxy


class Base(DeclarativeBase):
    pass


class Training(MlJobMixin, Base):
    """A host's class, with a rule of its own: one live job for each owner."""

    __tablename__ = "field_trainings"
    owner: Mapped[str | None] = mapped_column()
    __table_args__ = (
        Index(
            "uq_field_owner",
            "owner",
            unique=True,
            sqlite_where=text("status IN ('queued', 'running')"),
            postgresql_where=text("status IN ('queued', 'running')"),
        ),
    )


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as store:
        yield store


@pytest.fixture
def trainings(empty_url: str) -> Iterator[Engine]:
    """A database with the host's class."""
    engine = create_engine(empty_url)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


# ------------------------------------------------------------------------------------------------ migrations meanwhile


def test_a_column_that_changes_its_type_under_a_store_costs_no_call(postgres_url: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    Base.metadata.create_all(engine)

    def alter(kind: str) -> None:
        with engine.begin() as connection:
            connection.execute(text(f"ALTER TABLE field_trainings ALTER COLUMN owner TYPE {kind}"))

    with JobStore(postgres_url, model=Training) as store:
        job = store.submit("train", "spam", owner="ann")
        for kind in ("varchar(50)", "text"):
            for _ in range(7):  # from the fifth on psycopg has it prepared
                assert store.get(job.id).owner == "ann"
                assert len(store.find()) == 1
            alter(kind)
        (claim,) = store.claim(worker="w")
        assert claim.job.owner == "ann"

    async def awaited() -> None:
        async with AsyncJobStore(make_url(postgres_url).set(drivername="postgresql+asyncpg"), model=Training) as store:
            for kind in ("varchar(60)", "text"):
                assert (await store.get(job.id)).owner == "ann"
                alter(kind)
            assert (await store.get(job.id)).owner == "ann"

    asyncio.run(awaited())


def test_a_transaction_of_the_hosts_is_not_run_again_by_us(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    Base.metadata.create_all(engine)
    with engine.connect() as connection:
        store = JobStore(connection, model=Training)
        job = store.submit("train", "spam", owner="ann")
        for _ in range(7):
            store.get(job)
        connection.commit()
        with create_engine(postgres_url, poolclass=NullPool).begin() as other:
            other.execute(text("ALTER TABLE field_trainings ALTER COLUMN owner TYPE varchar(50)"))
        with pytest.raises(DBAPIError, match="cached plan"):
            store.get(job)
        connection.rollback()
        assert store.get(job).owner == "ann"
    engine.dispose()


def test_our_checks_are_no_difference_to_an_alembic_that_compares_checks(trainings: Engine) -> None:
    named = ["alembic.ext.checkconstraint_byname"] if find_spec("alembic.ext") else []
    options = {"autogenerate_plugins": ["alembic.autogenerate.*", "mljobs", *named], "compare_type": True}
    with trainings.connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


# ------------------------------------------------------------------------------------------------------- other servers


def test_a_server_that_was_read_only_for_a_while_is_written_to_by_new_connections(
    postgres_url: str, postgres_admin: Engine
) -> None:
    database = make_url(postgres_url).database

    def read_only(setting: str) -> None:
        with postgres_admin.connect() as admin:
            admin.exec_driver_sql(f"ALTER DATABASE {database} SET default_transaction_read_only = {setting}")

    with JobStore(postgres_url) as store:
        read_only("on")
        with pytest.raises(InternalError) as caught:
            store.submit("train", "spam")
        assert database_is_away(caught.value)
        read_only("off")
        assert store.submit("train", "spam").status is MlJobStatus.QUEUED  # not on the connection that saw the standby


def test_a_transaction_that_was_asked_to_be_read_only_keeps_its_connection(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    with engine.connect().execution_options(postgresql_readonly=True) as connection:
        with pytest.raises(InternalError) as caught:
            jobs.submit(connection, "train", "spam")
        assert not caught.value.connection_invalidated
        connection.rollback()
        assert len(jobs.find(connection)) == 0
    engine.dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_task_that_is_cancelled_anywhere_leaves_no_transaction_open(postgres_url: str, driver: str) -> None:
    async def main() -> None:
        engine = create_async_engine(make_url(postgres_url).set(drivername=f"postgresql+{driver}"), pool_size=2)
        store = AsyncJobStore(engine)

        async def life() -> None:
            job = await store.submit("train", uuid4().hex, unless_active=True)
            await store.complete(await store.claim_one(job, worker="w"))
            await store.rescue(max_attempts=3)

        for step in range(25):
            task = asyncio.create_task(life())
            for _ in range(step):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await life()
        await store.close()
        async with engine.connect() as connection:
            open_ones = (
                "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%' AND datname = current_database()"
            )
            end = time.monotonic() + 30
            while (await connection.execute(text(open_ones))).scalar_one():  # until the server has seen what was closed
                assert time.monotonic() < end
                await asyncio.sleep(0.02)
        await engine.dispose()

    asyncio.run(main())


def test_a_worker_whose_network_is_silent_ends_when_it_is_told_to(postgres_url: str) -> None:
    with (
        Proxy(make_url(postgres_url).port or 5432) as proxy,
        JobStore(make_url(postgres_url).set(port=proxy.port)) as far,
    ):
        worker = Worker(far, lease=2, poll=0.05)
        worker.handles("train")(lambda run: None)
        thread = threading.Thread(target=worker.run)
        thread.start()
        far.wait(far.submit("train", "spam"), timeout=60)
        proxy.stall()
        worker.stop()
        thread.join(60)
        assert not thread.is_alive()
        proxy.heal()


# ------------------------------------------------------------------------------------------------------- leases, sweeps


def test_a_new_worker_under_the_name_of_a_dead_one_does_not_keep_its_jobs_from_being_rescued(store: JobStore) -> None:
    lost, held = store.submit("train", "spam"), store.submit("train", "eggs")
    dead = store.claim_one(lost, worker="pod-0")
    expire_leases(store.engine)
    alive = store.claim_one(held, worker="pod-0", lease=60)
    assert store.rescue(max_attempts=5).requeued == [lost.id]
    assert store.renew([alive]).held == [alive]
    with pytest.raises(LeaseLostError):
        store.complete(dead)


def test_a_retry_that_a_hosts_own_index_refuses_does_not_stop_the_others(trainings: Engine) -> None:
    store = JobStore(trainings, model=Training)
    for owner in ("ann", "bob", "cyd"):
        store.fail(store.claim_one(store.submit("train", owner, owner=owner), worker="w"), "no")
    live = store.submit("train", "another of his", owner="bob")
    batch = store.retry_batch("status:failed")
    assert {store.get(job_id).owner for job_id in batch.jobs} == {"ann", "cyd"}
    ((refused, error),) = batch.errors.items()
    assert (store.get(refused).owner, type(error).__name__) == ("bob", "IntegrityError")
    with Session(trainings) as session:
        for job in jobs.find(session, "status:queued", model=Training):
            jobs.cancel(session, job, model=Training)
        session.flush()
        jobs.submit(session, "train", "again", owner="ann", model=Training)
        batch = jobs.retry_batch(session, "status:cancelled", model=Training)
        session.commit()
    assert (len(batch.jobs), len(batch.errors)) == (2, 1)
    assert store.get(live).status is MlJobStatus.CANCELLED
    store.close()


# --------------------------------------------------------------------------------------------------------------- values


def test_a_name_of_a_target_that_postgresql_cannot_index_is_named(postgres_url: str) -> None:
    with JobStore(postgres_url) as store:
        for name in (uuid4().hex * 64, "".join(uuid4().hex for _ in range(90))):  # the first can be compressed
            if name.startswith(name[:32] * 2):
                assert store.submit("train", name).target_name == name
                continue
            with pytest.raises(InvalidValueError, match=r"target_name.*longer than PostgreSQL can index"):
                store.submit("train", name)
            with pytest.raises(InvalidValueError, match="target_name"):
                store.submit_many([("train", name, None)])
        with pytest.raises(OperationalError) as caught:  # PostgreSQL does not say which index
            store.submit("train", "".join(uuid4().hex for _ in range(500)))
        assert "a name of a target has about 2,600 bytes" in "".join(caught.value.__notes__)
        assert store.counts().total() == 1


UNREADABLE = {
    "too large": '{"f1": 1e999}',
    "too small": '{"f1": 1e-999}',
    "too many digits": '{"f1": ' + "9" * 5000 + "}",
    "a pair": '{"f1": 0.6, "note": "\\ud83d\\ude00 \\\\ud800"}',
}


def test_json_that_no_client_can_read_costs_no_query_of_others(store: JobStore) -> None:
    with store.engine.begin() as connection:
        for name, value in UNREADABLE.items():
            job = jobs.submit(connection, "train", "spam")
            jobs.claim_one(connection, job, worker=name)
            raw = f"'{value}'" if connection.dialect.name == "sqlite" else f"'{value}'::json"
            connection.exec_driver_sql(f"UPDATE ml_jobs SET metrics_json = {raw} WHERE worker = '{name}'")
        connection.exec_driver_sql("UPDATE ml_jobs SET status = 'completed', lease = NULL")
    store.submit("train", "spam")
    best = [job.worker for job in store.best("spam", metric="f1")]
    assert best.index("a pair") >= 0
    assert [job.worker for job in store.find("metrics.f1>0.55 metrics.f1<1")] == ["a pair"]
    assert len(store.find("metrics.note:none")) == 0
    assert len(store.find("target:spam")) == len(UNREADABLE) + 1
    with Session(store.engine) as session:
        assert len(session.query(MlJob.metric("f1")).all()) == len(UNREADABLE) + 1


def test_a_spec_that_cannot_be_parsed_fails_its_job_and_no_other(store: JobStore) -> None:
    bad, good = store.submit("train", "bad"), store.submit("train", "good", {"rows": 1})
    with store.engine.begin() as connection:
        spec = '{"rows": ' + "9" * 5000 + "}"  # more digits than Python reads
        connection.execute(text("UPDATE ml_jobs SET spec_json = :spec WHERE target_name = 'bad'"), {"spec": spec})
    worker = Worker(store, poll=0.05)

    @worker.handles("train")
    def train(run: Run) -> Any:
        return run.spec

    assert worker.run(until_idle=True).jobs == {"completed": 1, "failed": 1}
    assert "spec_json" in str(store.get(bad).error_message)
    assert store.get(good).metrics == {"rows": 1}
    assert store.prune(older_than=timedelta(days=1)) == 0
