"""Statements that go past SQLAlchemy's results do not go past its listeners, transactions and errors."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, select
from sqlalchemy.exc import DBAPIError, InvalidRequestError, PendingRollbackError, StatementError
from sqlalchemy.types import NullType

from mljobs import JobStore, MlJob, MlJobStatus, jobs
from mljobs.jobs import _base
from mljobs.prepared import Prepared


def test_a_listener_is_told_of_every_statement_from_the_moment_it_listens(engine: Engine) -> None:
    seen: list[str] = []
    with JobStore(engine) as store:
        job = store.submit("train", "spam")
        store.cancel(job.id)

        @event.listens_for(engine, "before_cursor_execute")
        def tell(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            seen.append(statement.split(maxsplit=1)[0])

        other = store.submit("train", "spam")
        store.cancel(other.id)
    assert "INSERT" in seen
    assert "UPDATE" in seen


def test_echo_shows_the_statements(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.echo = True
    with caplog.at_level(logging.INFO, "sqlalchemy.engine"), JobStore(engine) as store:
        store.cancel(store.submit("train", "spam").id)
    assert any("UPDATE ml_jobs" in record.getMessage() for record in caplog.records)


def test_a_statement_is_part_of_the_transaction_that_its_connection_is_in(engine: Engine) -> None:
    with engine.connect() as connection:  # nothing has begun: the first statement begins
        job = jobs.submit(connection, "train", "spam")
        assert connection.in_transaction()
        with connection.begin_nested() as savepoint:
            jobs.cancel(connection, job.id)
            savepoint.rollback()
        connection.commit()
    with engine.connect() as connection:
        assert connection.scalar(select(MlJob.status)) is MlJobStatus.QUEUED
        jobs.cancel(connection, job.id)
        connection.rollback()
    with engine.connect() as connection:
        assert connection.scalar(select(MlJob.status)) is MlJobStatus.QUEUED


def test_a_transaction_that_is_over_takes_no_statement(engine: Engine) -> None:
    with engine.connect() as connection, connection.begin() as transaction:
        transaction.rollback()
        with pytest.raises((InvalidRequestError, PendingRollbackError)):
            jobs.submit(connection, "train", "spam")


def test_an_error_is_wrapped_told_and_leaves_the_connection_usable(engine: Engine) -> None:
    told: list[str] = []
    wrong = Prepared(lambda _: select(MlJob.id).where(MlJob.progress == _missing()))

    @event.listens_for(engine, "handle_error")
    def tell(context: Any) -> None:
        told.append(context.statement)

    with engine.connect() as connection:
        with connection.begin(), pytest.raises(DBAPIError) as caught:
            wrong.rows(connection, {})
        assert "no_such_column" in str(caught.value)
        assert [statement for statement in told if "no_such_column" in statement]
        assert jobs.counts(connection).total() == 0
    if engine.dialect.name == "postgresql":
        _a_lost_connection_is_given_up(engine)


def _missing() -> Any:
    return _base.literal_column("no_such_column")


def _a_lost_connection_is_given_up(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        kill(engine, connection)
        with pytest.raises(DBAPIError) as caught:
            jobs.counts(connection)
        assert caught.value.connection_invalidated
        assert connection.invalidated


def kill(engine: Engine, connection: Connection) -> None:
    driver: Any = connection.connection.driver_connection
    with engine.connect() as other:
        other.exec_driver_sql(f"SELECT pg_terminate_backend({driver.info.backend_pid})")


def test_a_value_that_the_driver_cannot_take_is_an_error_of_sqlalchemy(engine: Engine) -> None:
    prepared = Prepared(lambda _: select(MlJob.id).where(MlJob.progress == _base.bindparam("name", type_=NullType())))
    with engine.connect() as connection, connection.begin(), pytest.raises(StatementError):
        prepared.rows(connection, {"name": object()})
