"""Retention is off however its block is left, and nobody but the block ever finds it on."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, delete, event, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from mljobs import InvalidValueError, JobStore, MlJob, MlJobMixin, TerminalStateError, jobs, schema
from mljobs.guards import retention
from tests.backends import Backend
from tests.cases import case

ALL_FINISHED = delete(MlJob).where(MlJob.is_terminal)


def _finish(session: Session) -> None:
    session.add(MlJob(kind="train", target_name="spam", status="completed", progress=100))


def _is_off(bind: Engine | Session) -> None:
    """Assert that a plain DELETE of a finished record is refused, in the transaction of a session too."""
    if isinstance(bind, Engine):
        with Session(bind) as session:
            _is_off(session)
        return
    with pytest.raises(TerminalStateError), bind.begin_nested():
        bind.execute(text("DELETE FROM ml_jobs WHERE status = 'completed'"))


def _commits(session: Session) -> None:
    with retention(session, MlJob):
        session.commit()
        with pytest.raises(TerminalStateError), session.begin_nested():
            session.execute(ALL_FINISHED)


def _rolls_back(session: Session) -> None:
    with retention(session, MlJob):
        session.execute(ALL_FINISHED)
        session.rollback()


def _raises(session: Session) -> None:
    with pytest.raises(LookupError), retention(session, MlJob):
        session.execute(ALL_FINISHED)
        raise LookupError


def _is_interrupted(session: Session) -> None:
    with pytest.raises(KeyboardInterrupt), retention(session, MlJob):
        session.execute(ALL_FINISHED)
        raise KeyboardInterrupt


def _fails_in_the_database(session: Session) -> None:
    with pytest.raises(Exception, match="nowhere"), retention(session, MlJob):
        session.execute(text("SELECT * FROM nowhere"))


def _fails_in_a_savepoint_of_its_own(session: Session) -> None:
    with pytest.raises(Exception, match="nowhere"), retention(session, MlJob):
        session.begin_nested()
        session.execute(text("SELECT * FROM nowhere"))


def _nests(session: Session) -> None:
    with retention(session, MlJob):
        with retention(session, MlJob):
            pass
        with session.begin_nested() as savepoint:
            session.execute(ALL_FINISHED)
            savepoint.rollback()


def _closes_the_session(session: Session) -> None:
    with retention(session, MlJob):
        session.close()


def _commits_past_the_session(session: Session) -> None:
    with pytest.raises(Exception, match=r"(?i)savepoint"), retention(session, MlJob):
        session.connection().exec_driver_sql("COMMIT")


WAYS_OUT: list[Callable[[Session], None]] = [
    _commits,
    _rolls_back,
    _raises,
    _is_interrupted,
    _fails_in_the_database,
    _fails_in_a_savepoint_of_its_own,
    _nests,
    _closes_the_session,
    _commits_past_the_session,
]


def test_retention_is_off_however_the_block_is_left(backend: Backend) -> None:
    def block(session: Session, leave: Callable[[Session], None]) -> None:
        leave(session)
        if leave is not _commits_past_the_session:
            _is_off(session)  # for the rest of the transaction too
        session.rollback()

    backend.run(_finish)
    before = _guard(backend.outside)
    for leave in WAYS_OUT:
        with case(leave.__name__):
            backend.run(block, leave)
            _is_off(backend.outside)
            assert len(backend.run(lambda session: session.scalars(select(MlJob)).all())) == 1
            assert _guard(backend.outside) == before
    schema.verify(backend.outside)


def _guard(engine: Engine) -> Any:
    """Return what the catalog has of triggers and their functions, and the rows that say whether retention is on."""
    statements = (
        ("SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2", "SELECT * FROM ml_jobs_guard ORDER BY 1")
        if engine.dialect.name == "sqlite"
        else (
            "SELECT t::text, p::text FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid ORDER BY t.oid",
            "SELECT s::text FROM pg_db_role_setting s ORDER BY 1",
        )
    )
    with engine.connect() as connection:
        return [connection.exec_driver_sql(statement).all() for statement in statements]


def test_what_the_block_deletes_is_gone_and_retention_off_in_the_same_transaction(backend: Backend) -> None:
    def block(session: Session) -> None:
        with retention(session, MlJob):
            for job in session.scalars(select(MlJob)):
                session.delete(job)
        _finish(session)
        session.flush()
        with pytest.raises(TerminalStateError), session.begin_nested():
            session.execute(ALL_FINISHED)

    backend.run(_finish)
    backend.run(block)
    assert len(backend.run(lambda session: session.scalars(select(MlJob)).all())) == 1


def test_retention_takes_sessions_and_says_so(engine: Engine) -> None:
    with (
        engine.connect() as connection,
        pytest.raises(InvalidValueError, match=r"of a connection Session\(connection\)"),
        retention(connection, MlJob),  # type: ignore[arg-type]
    ):
        pass
    session: Any = scoped_session(sessionmaker(engine))
    with retention(session, MlJob):
        session.execute(delete(MlJob))
    session.remove()


def test_nobody_else_finds_retention_on_whatever_the_block_commits(engine: Engine) -> None:
    with Session(engine) as session:
        _finish(session)
        session.commit()
        with pytest.raises(Exception, match=r"(?i)savepoint"), retention(session, MlJob):
            session.connection().exec_driver_sql("COMMIT")
            _is_off(create_engine(engine.url, poolclass=NullPool))
    _is_off(engine)


def test_a_trigger_of_a_host_that_leaves_a_delete_out_leaves_no_retention_on_in_sqlite(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TRIGGER keep BEFORE DELETE ON ml_jobs BEGIN SELECT RAISE(IGNORE); END")
    with Session(engine) as session:
        _finish(session)
        session.commit()
        with retention(session, MlJob):
            session.execute(ALL_FINISHED)
        session.commit()
        assert jobs.prune(session, older_than=timedelta(0)) == 0
        session.commit()
        schema.verify(engine)
        with pytest.raises(Exception, match=r"(?i)savepoint"), retention(session, MlJob):
            session.execute(ALL_FINISHED)
            session.connection().exec_driver_sql("COMMIT")
    schema.verify(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER keep")
    _is_off(engine)


def test_an_update_stays_refused_while_retention_is_on(backend: Backend) -> None:
    backend.run(_finish)

    def block(session: Session) -> None:
        with retention(session, MlJob), pytest.raises(TerminalStateError), session.begin_nested():
            session.execute(text("UPDATE ml_jobs SET progress = 1"))

    backend.run(block)


def test_a_connection_without_transactions_is_refused(backend: Backend) -> None:
    backend.run(_finish)
    apart: Any = backend.engine.execution_options(isolation_level="AUTOCOMMIT")

    def block(session: Session) -> None:
        with pytest.raises(InvalidValueError, match="AUTOCOMMIT"), retention(session, MlJob):
            raise AssertionError
        with pytest.raises(InvalidValueError, match="AUTOCOMMIT"):
            jobs.prune(session, older_than=timedelta(0))

    if isinstance(apart, AsyncEngine):

        async def run() -> None:
            async with AsyncSession(apart) as session:
                await session.run_sync(block)

        backend.wait(run())
    else:
        with Session(apart) as session:
            block(session)
    _is_off(backend.outside)


def test_a_prune_that_the_database_refuses_leaves_retention_off(backend: Backend) -> None:
    backend.run(_finish)
    with backend.outside.begin() as connection:
        job = "uuid" if backend.dialect == "postgresql" else "CHAR(32)"
        connection.exec_driver_sql(f"CREATE TABLE keeps (job {job} REFERENCES ml_jobs (id))")
        connection.exec_driver_sql("INSERT INTO keeps SELECT id FROM ml_jobs")

    def prune(session: Session) -> None:
        if backend.dialect == "sqlite":
            session.execute(text("PRAGMA foreign_keys = ON"))
        assert jobs.prune(session, older_than=timedelta(0)) == 0
        _is_off(session)

    backend.run(prune)
    _is_off(backend.outside)


def test_retention_that_a_crash_left_on_in_sqlite_is_turned_off_by_the_next_block(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, poolclass=NullPool)
    with Session(engine) as session:
        _finish(session)
        session.execute(text("UPDATE ml_jobs_guard SET open = 1 WHERE name = 'retention'"))
        session.commit()
        with retention(session, MlJob):
            pass
        session.commit()
    _is_off(engine)


@pytest.mark.parametrize("kind", [timedelta(seconds=-1), timedelta(days=-1)])
def test_a_prune_of_a_negative_span_is_refused(engine: Engine, kind: timedelta) -> None:
    with JobStore(engine) as store, pytest.raises(InvalidValueError, match="negative"):
        store.prune(older_than=kind)


def test_a_prune_on_postgresql_goes_by_the_clock_of_the_database(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    with Session(engine) as session:
        session.add(MlJob(kind="train", target_name="spam", status="failed", finished_at=MlJob().created_at))
        session.commit()
    with JobStore(engine) as store:
        ahead = MlJob().created_at + timedelta(days=9)
        monkeypatch.setattr("mljobs.jobs._pruning.utc_now", lambda: ahead)
        assert store.prune(older_than=timedelta(days=1)) == 0


class AttachedBase(DeclarativeBase):
    """Of a host that keeps its jobs in an attached database."""


class AttachedJob(MlJobMixin, AttachedBase):
    __tablename__ = "ml_jobs"
    __table_args__ = {"schema": "other"}


def test_retention_in_an_attached_database_is_of_that_table_alone(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, poolclass=NullPool)
    event.listen(engine, "connect", lambda driver, _: driver.execute(f"ATTACH '{sqlite_url[10:]}.2' AS other"))
    AttachedBase.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all(
            [AttachedJob(kind="train", target_name="a", status="failed"), MlJob(kind="train", target_name="b")]
        )
        _finish(session)
        session.commit()
        with retention(session, AttachedJob):
            session.execute(delete(AttachedJob))
            with pytest.raises(TerminalStateError), session.begin_nested():
                session.execute(ALL_FINISHED)
        session.commit()
        assert session.scalars(select(AttachedJob)).all() == []
        assert len(session.scalars(select(MlJob)).all()) == 2


def test_an_error_of_the_hosts_own_in_the_block_is_not_swallowed(engine: Engine) -> None:
    with Session(engine) as session, pytest.raises(IntegrityError), retention(session, MlJob):
        session.execute(text("INSERT INTO ml_jobs (id) VALUES (NULL)"))


def _commits_past_the_block(session: Session, leave: type[Exception] | None) -> None:
    with retention(session, AttachedJob):
        session.connection().exec_driver_sql("COMMIT")
        if leave is not None:
            raise leave


def test_retention_in_an_attached_database_that_the_driver_has_committed_is_turned_off_again(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, poolclass=NullPool)
    event.listen(engine, "connect", lambda driver, _: driver.execute(f"ATTACH '{sqlite_url[10:]}.2' AS other"))
    AttachedBase.metadata.create_all(engine)
    for leave in (LookupError, None):
        with Session(engine) as session, pytest.raises(Exception, match=r"(?i)savepoint"), session.begin():
            _commits_past_the_block(session, leave)
        with engine.connect() as connection:
            found = connection.exec_driver_sql("SELECT open FROM other.ml_jobs_guard WHERE name = 'retention'")
            assert found.scalar() == 0
