"""Whatever SQLAlchemy lets a host call a session works, or the host is told what to pass."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import flask
import flask_sqlalchemy
import pytest
from psycopg.errors import DeadlockDetected, SerializationFailure
from sqlalchemy import Engine, create_engine, delete, event, make_url, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only, greenlet_spawn

from mljobs import (
    AsyncJobStore,
    InvalidValueError,
    JobMapping,
    JobStore,
    LeaseLostError,
    MlJob,
    MlJobMixin,
    MlJobsError,
    MlJobStatus,
    TerminalStateError,
    jobs,
    on_finished,
)
from mljobs.guards import retention
from mljobs.transfer import export_jobs, import_jobs
from mljobs.transfer._arrow import to_arrow
from tests.backends import Backend, Blocking
from tests.waiting import until


class Base(DeclarativeBase):
    pass


class Bound(MlJobMixin, Base):
    __tablename__ = "bound_jobs"
    owner: Mapped[str] = mapped_column(default="nobody")


@pytest.fixture
def jobsdb(empty_url: str) -> Iterator[Engine]:
    """A database with the table of ``Bound``."""
    engine = create_engine(empty_url)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def main_engine(jobsdb: Engine) -> Iterator[Engine]:
    """Another database, to which nothing may be sent."""
    engine = create_engine("sqlite://")
    sent: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda _c, _cu, statement, *_: sent.append(statement))
    yield engine
    assert sent == []
    engine.dispose()


def _every_operation(session: Any, model: Any) -> None:
    job = jobs.submit(session, "train", "spam", {"lr": 1}, model=model, owner="ann")
    assert jobs.submit(session, "train", "spam", model=model, unless_active=True).id == job.id
    assert jobs.submit_many(session, [("train", "eggs", None)], model=model) == 1
    assert jobs.get(session, job.id, model=model).owner == "ann"
    assert len(jobs.find(session, model=model)) == 2
    assert jobs.counts(session, model=model).total() == 2
    session.commit()
    claim, other = jobs.claim(session, worker="w", limit=2, model=model)
    assert jobs.renew(session, [claim]).held == [claim]
    jobs.set_progress(session, claim, 50)
    jobs.complete(session, claim, {"f1": 1})
    assert jobs.cancel(session, other.job_id, model=model)
    assert jobs.release(session, [other]) == 1
    again = jobs.retry(session, other.job_id, model=model)
    one = jobs.claim_one(session, again, worker="w", model=model)
    jobs.requeue(session, one)
    assert not jobs.rescue(session, max_attempts=3, model=model)
    assert export_jobs(session, file := io.BytesIO(), model=model) == 3
    session.expunge_all()
    assert import_jobs(session, io.BytesIO(file.getvalue()), model=model).skipped == 3
    assert to_arrow(session, model=model).num_rows == 3
    assert len(JobMapping(session, model=model)) == 3
    assert jobs.prune(session, older_than=timedelta(0), keep_last=1, model=model) >= 0
    with retention(session, model):
        session.execute(delete(model).where(model.status == MlJobStatus.CANCELLED))
    session.commit()


def test_every_statement_goes_where_the_model_is_bound(jobsdb: Engine, main_engine: Engine) -> None:
    finished: list[Any] = []
    with Session(main_engine, binds={Bound: jobsdb}) as session, on_finished(finished.append, Bound):
        _every_operation(session, Bound)
    assert {job.status for job in finished} == {MlJobStatus.COMPLETED, MlJobStatus.CANCELLED}


def test_a_store_on_a_sessionmaker_finds_the_engine_of_its_model(jobsdb: Engine, main_engine: Engine) -> None:
    with JobStore(sessionmaker(main_engine, binds={Base: jobsdb}), model=Bound) as store:
        assert store.engine is jobsdb
        job = store.submit("train", "spam", owner="ann")
        store.complete(store.claim_one(job, worker="w"))
        assert store.get(job).status is MlJobStatus.COMPLETED
        assert store.to_arrow().num_rows == 1
    with JobStore(sessionmaker(binds={Base: jobsdb}), model=Bound) as store:
        assert store.counts().total() == 1


def test_a_scoped_session_is_a_session(jobsdb: Engine) -> None:
    scoped = scoped_session(sessionmaker(jobsdb))
    _every_operation(scoped, Bound)
    scoped.remove()


def test_the_session_of_flask_sqlalchemy_uses_the_bind_of_the_model(jobsdb: Engine) -> None:
    db = flask_sqlalchemy.SQLAlchemy()

    class Upload(MlJobMixin, db.Model):  # type: ignore[name-defined, misc]
        __bind_key__ = "jobs"
        owner: Mapped[str] = mapped_column(default="nobody")

    app = flask.Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    app.config["SQLALCHEMY_BINDS"] = {"jobs": jobsdb.url}
    db.init_app(app)
    with app.app_context():
        db.create_all("jobs")
        main_sent: list[str] = []
        event.listen(db.engine, "before_cursor_execute", lambda _c, _cu, statement, *_: main_sent.append(statement))
        _every_operation(db.session, Upload)
        db.session.remove()
        assert main_sent == []
        with pytest.raises(InvalidValueError, match=r"pass its session, `db\.session`"):
            jobs.submit(db, "train", "spam", model=Upload)  # type: ignore[arg-type]
        with pytest.raises(InvalidValueError, match=r"pass its engine, `db\.engine`"):
            JobStore(db, model=Upload)  # type: ignore[arg-type]
        for engine in db.engines.values():
            engine.dispose()


SECRET = "postgresql+psycopg://ann:hunter2@localhost/app?password=hunter3"


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (lambda: create_engine(SECRET), r"with engine\.begin\(\) as connection"),
        (lambda: create_async_engine(SECRET), "run_sync"),
        (lambda: sessionmaker(create_engine(SECRET)), r"with maker\.begin\(\)"),
        (lambda: async_sessionmaker(create_async_engine(SECRET)), r"async with maker\.begin\(\)"),
        (lambda: AsyncSession(create_async_engine(SECRET)), r"session\.run_sync\(jobs\.submit"),
        (lambda: async_scoped_session(async_sessionmaker(), lambda: 1), r"session\.run_sync\(jobs\.submit"),
        (lambda: JobStore(create_engine(SECRET)), r"store\.submit\("),
        (lambda: None, "expected a Session or a Connection"),
        (lambda: SECRET, "expected a Session or a Connection"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_what_is_no_session_is_refused_with_what_to_pass_instead(given: Any, advice: str) -> None:
    with pytest.raises(InvalidValueError, match=advice) as caught:
        jobs.submit(given(), "train", "spam")
    assert "hunter" not in str(caught.value)


def test_the_session_may_be_given_by_name(jobsdb: Engine) -> None:
    with scoped_session(sessionmaker(jobsdb))() as session:
        assert len(jobs.find(session=session, model=Bound)) == 0


# --------------------------------------------------------------- a store in the transaction of a host's connection


def _in_a_transaction(backend: Backend, work: Any, *, commit: bool) -> None:
    """Call ``work(store, run)`` with a store that joins the transaction of a connection, and end that."""
    if isinstance(backend.engine, Engine):
        with backend.engine.connect() as connection:
            work(JobStore(connection), connection.execute)
            (connection.commit if commit else connection.rollback)()
        return

    async def run() -> None:
        async with backend.engine.connect() as connection:
            store = Blocking(AsyncJobStore(connection), await_only)

            async def execute(statement: Any) -> Any:
                return await connection.execute(statement)

            await greenlet_spawn(work, store, lambda statement: await_only(execute(statement)))
            await (connection.commit() if commit else connection.rollback())

    backend.wait(run())


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_store_on_a_connection_is_part_of_its_transaction(backend: Backend, end: str) -> None:
    commit = end == "commit"
    ids: list[Any] = []

    def work(store: Any, execute: Any) -> None:
        job = store.submit("train", "spam")
        ids.append(job.id)
        claim = store.claim_one(job, worker="w")
        store.complete(claim)
        with pytest.raises(TerminalStateError):  # and the transaction goes on
            store.claim_one(job, worker="w")
        with pytest.raises(LeaseLostError):
            store.complete(claim)
        store.submit_many([("train", "eggs", None)] * 3)
        assert execute(select(MlJob.status).where(MlJob.id == job.id)).scalar_one() is MlJobStatus.COMPLETED
        assert store.counts().total() == 4

    _in_a_transaction(backend, work, commit=commit)
    with Session(backend.outside) as session:
        assert len(jobs.find(session)) == (4 if commit else 0)
        if commit:
            assert jobs.get(session, ids[0]).status is MlJobStatus.COMPLETED


def test_what_a_store_on_a_connection_finishes_is_told_when_the_host_commits(backend: Backend) -> None:
    finished: list[Any] = []

    def work(store: Any, _execute: Any) -> None:
        listening.append(store.on_finished(finished.append))
        store.cancel(store.submit("train", "spam"))
        assert finished == []

    for commit in (False, True):
        listening: list[Any] = []
        _in_a_transaction(backend, work, commit=commit)
        listening[0].remove()
        assert [job.status for job in finished] == ([MlJobStatus.CANCELLED] if commit else [])


def test_a_store_of_a_hosts_class_on_a_connection_joins_too(jobsdb: Engine) -> None:
    with jobsdb.connect() as connection:
        for source in (connection, sessionmaker(connection)):
            store = JobStore(source, model=Bound)
            with store.running(store.submit("train", "spam", owner="ann")) as run:
                assert run.job.owner == "ann"  # type: ignore[attr-defined]
                run.progress(10)
            assert store.wait(run.job, 1).status is MlJobStatus.COMPLETED
            with pytest.raises(TerminalStateError):
                store.claim_one(run.job, worker="w")
            assert store.to_arrow().num_rows == 1
            with store.arrow_batches() as reader:
                assert reader.read_all().num_rows == 1
            connection.rollback()
            assert store.counts().total() == 0
            connection.rollback()


# ------------------------------------------------------------------------------- isolation, and closing a store


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("where", ["engine", "database"])
def test_a_store_works_whatever_the_default_isolation_is(postgres_url: str, level: str, where: str) -> None:
    options: dict[str, Any] = {"isolation_level": level} if where == "engine" else {}
    name = make_url(postgres_url).database
    admin = create_engine(postgres_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection, ExitStack() as stack:
        if where == "database":
            connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_isolation = '{level.lower()}'"))
            stack.callback(connection.execute, text(f"ALTER DATABASE {name} RESET default_transaction_isolation"))
        _work_under_contention(postgres_url, level, options)


def _work_under_contention(postgres_url: str, level: str, options: dict[str, Any]) -> None:
    engine = create_engine(postgres_url, **options)
    with engine.connect() as connection:
        assert connection.scalar(text("SHOW transaction_isolation")) == level.lower()
    for store in (JobStore(engine), JobStore(postgres_url), JobStore(sessionmaker(engine))):
        store.submit_many([("train", "spam", None)] * 24)
        errors: list[Exception] = []

        def work(store: JobStore, errors: list[Exception]) -> None:
            try:
                while claims := store.claim(worker="w", limit=3):
                    for claim in claims:
                        store.set_progress(claim, 1)
                        store.rescue(max_attempts=3)
                        store.complete(claim)
            except Exception as error:  # noqa: BLE001 - shown below
                errors.append(error)

        threads = [threading.Thread(target=work, args=(store, errors)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert store.counts(exact=True)["train", "completed"] % 24 == 0
        store.close()
    engine.dispose()


def test_a_statement_that_met_another_one_is_run_again(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    store = JobStore(engine)
    job = store.submit("train", "spam")
    failing = [SerializationFailure("could not serialize access"), DeadlockDetected("deadlock detected")]

    @event.listens_for(Engine, "before_cursor_execute")
    def fail(*_: object) -> None:
        if failing:
            raise OperationalError("SELECT", None, failing.pop())

    try:
        assert store.get(job).id == job.id
        failing.append(SerializationFailure("could not serialize access"))
        with pytest.raises(OperationalError):  # the iterator is used up
            store.summaries_of(iter([job.id]))
    finally:
        event.remove(Engine, "before_cursor_execute", fail)
    assert failing == []
    engine.dispose()


@pytest.mark.alone
def test_closing_a_store_ends_a_watch_and_leaves_no_connection(backend: Backend) -> None:
    store = backend.store()
    store.submit("train", "spam")
    connections = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    if isinstance(backend.engine, Engine):
        ended: list[bool] = []

        def watch() -> None:
            for _ in store.watch(poll=300):
                pass
            ended.append(True)

        with pytest.raises(MlJobsError, match="the store was closed"), ThreadPoolExecutor() as pool:
            watcher, waiter = pool.submit(watch), pool.submit(store.wait, store.find()[0].id, poll=300)
            until(lambda: _listening(backend, store, 2))
            paused = store.watch(poll=0.01)
            store.submit("train", "eggs")
            assert next(paused).target_name == "eggs"
            store.close()
            watcher.result(60)
            assert ended == [True]
            assert list(paused) == []
            waiter.result(60)
    else:

        async def follow() -> None:
            inner = store._target
            watcher = asyncio.create_task(_collect(inner.watch(poll=300)))
            waiter = asyncio.create_task(inner.wait((await inner.find())[0].id, poll=300))
            while not _listening(backend, inner, 2):  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.01)
            await inner.close()
            assert await asyncio.wait_for(watcher, 60) == []
            with pytest.raises(MlJobsError, match="the store was closed"):
                await asyncio.wait_for(waiter, 60)

        backend.wait(follow())
    if backend.dialect == "postgresql":
        with backend.outside.connect() as connection:
            until(lambda: connection.scalar(connections) == 0)


def _listening(backend: Backend, store: Any, watches: int) -> bool:
    listeners = [follower._listener for follower in store._followers]
    connected = all(listener is not None and listener._connection is not None for listener in listeners)
    return len(listeners) == watches and (connected or backend.dialect == "sqlite")


async def _collect(watch: Any) -> list[Any]:
    return [job async for job in watch]
