"""Statements that go past SQLAlchemy's results do not go past its listeners, transactions and errors."""

from __future__ import annotations

import logging
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import JSON, Connection, Engine, Float, Numeric, bindparam, event, literal_column, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError, InvalidRequestError, PendingRollbackError, StatementError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import NullType

from mljobs import JobStore, MlJob, MlJobMixin, MlJobStatus, jobs
from mljobs.db import _prepared
from mljobs.db._prepared import Prepared, _Compiled
from mljobs.jobs import _claiming


class Grade(Enum):
    GOOD = "good"


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


def test_a_claim_is_compiled_once_for_all_numbers_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(_prepared, "_Compiled", lambda *given: compiled.append(given) or _Compiled(*given))
    dialect = postgresql.psycopg.dialect()
    limits = (3, 7, 512, 1000)
    texts = [_claiming._claim_statement(MlJob, "any skip", limit)._text(dialect, {}).text for limit in limits]
    found = [match[1] for text in texts if (match := re.search(r"LIMIT (\S+)", text))]
    assert found == ["3", "7", "512", "%(limit)s::INTEGER"]  # the last is too rare for a text of its own
    assert len(compiled) == 2


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


def test_an_error_is_wrapped_and_leaves_the_connection_usable(engine: Engine) -> None:
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
    return literal_column("no_such_column")


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
    prepared = Prepared(lambda _: select(MlJob.id).where(MlJob.progress == bindparam("name", type_=NullType())))
    with engine.connect() as connection, connection.begin(), pytest.raises(StatementError):
        prepared.rows(connection, {"name": object()})


@pytest.mark.parametrize("listened", [False, True])
def test_a_claim_reads_columns_of_any_type_that_a_host_has_added(empty_url: str, *, listened: bool) -> None:
    class Base(DeclarativeBase):
        pass

    class Fit(MlJobMixin, Base):
        __tablename__ = "fits"
        ratio: Mapped[float] = mapped_column(default=0.5)
        price: Mapped[Decimal] = mapped_column(Numeric(10, 2), default=Decimal("1.50"))
        rounded: Mapped[float] = mapped_column(Numeric(10, 2, asdecimal=False), default=1.5)
        exact: Mapped[Decimal] = mapped_column(Float(asdecimal=True), default=Decimal("0.5"))
        took: Mapped[timedelta] = mapped_column(default=timedelta(minutes=3))
        day: Mapped[date] = mapped_column(default=date(2026, 11, 25))
        grade: Mapped[Grade] = mapped_column(default=Grade.GOOD)
        more: Mapped[dict[str, int]] = mapped_column(JSON, default={"a": 1})
        raw: Mapped[bytes] = mapped_column(default=b"\x00\x01")
        owner: Mapped[UUID] = mapped_column(default=UUID(int=7))
        unset: Mapped[float | None]

    names = [column.key for column in Fit.__table__.columns]
    with JobStore(empty_url, model=Fit) as store:
        Base.metadata.create_all(store.engine)
        if listened:
            event.listen(store.engine, "before_cursor_execute", lambda *_: None)
        submitted = store.submit("train", "spam")
        (claim,) = store.claim(worker="w")
        claimed, got = claim.job, store.get(submitted.id)
        for name in set(names) - {"status", "attempts", "started_at", "worker", "lease"}:
            values = [getattr(job, name) for job in (submitted, claimed, got)]
            assert values[1:] == values[:1] * 2, name
            assert len({type(value) for value in values}) == 1, name
        store.complete(claim)
        assert store.retry(got, again=True).price == Decimal("1.50")


def test_the_records_of_a_claim_of_many_are_read_when_somebody_asks_from_any_thread_and_when_the_store_is_closed(
    url: str,
) -> None:
    with JobStore(url) as store:
        store.submit_many([("train", f"t{number}", {"n": number}) for number in range(60)])
        claims = store.claim(worker="w", limit=60, lease=3600)
        assert [claim.kind for claim in claims] == ["train"] * 60
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda claim: claim.job, claims * 3))
    assert [job.spec["n"] for job in read] == list(range(60)) * 3
    assert {(job.id, job.attempts, job.worker, job.lease) for job in read} == {
        (claim.job_id, 1, "w", claim.token) for claim in claims
    }
    assert {job.started_at for job in read} == {claims[0].lease.acquired_at}
    copies = pickle.loads(pickle.dumps(claims))
    assert [(copy, copy.job.spec, copy.expires_at) for copy in copies] == [
        (claim, claim.job.spec, claim.expires_at) for claim in claims
    ]


_TEXTS = [
    "",
    "NULL",
    "null",
    '"',
    "\\",
    '\\"',
    "{a,b}",
    "a, b",
    " x ",
    "\n\t",
    "é漢🙂",
    "'; --",
    "%s %(x)s $1",
    '{"k": "\\u0041"}',
]


def test_texts_of_a_batch_are_stored_as_they_are(url: str) -> None:
    with JobStore(url) as store:
        store.submit_many([("train", "t", None)] * len(_TEXTS) * 2)
        claims = store.claim(worker="w", limit=len(_TEXTS) * 2)
        failures = list(zip(claims, _TEXTS, strict=False))
        results = list(zip(claims[len(_TEXTS) :], _TEXTS, strict=True))
        outcomes = [jobs.Outcome.failed(claim, reason) for claim, reason in failures]
        outcomes += [jobs.Outcome.completed(claim, [text]) for claim, text in results]
        assert store.finish_many(outcomes) == [None] * len(outcomes)
        assert [store.get(claim.job_id).error_message for claim, _ in failures] == _TEXTS
        assert [store.get(claim.job_id).metrics for claim, _ in results] == [[text] for text in _TEXTS]
