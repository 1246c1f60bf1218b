"""Rows by the bulk route: the same values, errors and transactions as by any other, in every backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from enum import Enum
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import JSON, Connection, create_engine, event, func, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

from mljobs import InvalidValueError, MlJob, MlJobKind, MlJobMixin, MlJobStatus, jobs
from mljobs.db import _copy
from mljobs.db._rows import insert_rows
from mljobs.db._wire import insert_wire, read_wire, wire_of
from mljobs.jobs import table_of
from tests.backends import Backend
from tests.cases import case

TABLE = MlJob.__table__
NAMES = [column.name for column in TABLE.columns]
COLUMNS = list(TABLE.columns)
NOW = datetime(2026, 11, 24, 12, 30, 15, 123000, tzinfo=UTC)


def row(**values: Any) -> tuple[Any, ...]:
    """A finished job's row of Python values."""
    given = {
        "id": uuid4(),
        "kind": MlJobKind.TRAIN,
        "target_name": "spam\t\\N \N{SNOWMAN}",
        "status": MlJobStatus.COMPLETED,
        "progress": 100,
        "created_at": NOW,
        "started_at": NOW,
        "finished_at": None,
        "error_message": None,
        "spec_json": '{"a": 1}\n',
        "metrics_json": None,
        "attempts": 2,
        "priority": -5,
        "run_after": NOW,
        "exclusive": True,
        "retry_of": uuid4(),
        "worker": "gpu-1",
        "lease": None,
        **values,
    }
    return tuple(given[name] for name in NAMES)


def stored(backend: Backend) -> list[tuple[Any, ...]]:
    with Session(backend.outside) as session:
        return [
            tuple(getattr(job, name) for name in NAMES) for job in session.scalars(select(MlJob).order_by(MlJob.id))
        ]


def test_rows_arrive_as_they_are(backend: Backend) -> None:
    rows = sorted((row(), row(error_message="x", metrics_json="[]", retry_of=None)), key=lambda values: values[0])
    assert backend.run(lambda session: insert_rows(session.connection(), TABLE, NAMES, iter(rows))) == 2
    assert stored(backend) == rows


def test_a_generator_that_raises_leaves_nothing_and_the_transaction_can_be_rolled_back(backend: Backend) -> None:
    def half() -> Iterator[tuple[Any, ...]]:
        for _ in range(2500):
            yield row()
        raise LookupError("the source is gone")

    def act(session: Session) -> None:
        with pytest.raises(LookupError, match="the source is gone"):
            insert_rows(session.connection(), TABLE, NAMES, half())
        session.rollback()
        assert insert_rows(session.connection(), TABLE, NAMES, [row()]) == 1

    backend.run(act)
    assert len(stored(backend)) == 1


def test_what_was_inserted_goes_with_the_callers_rollback(backend: Backend) -> None:
    def act(session: Session) -> None:
        session.add(MlJob(kind="train", target_name="before"))
        session.flush()
        insert_rows(session.connection(), TABLE, NAMES, [row()])
        session.rollback()

    backend.run(act)
    assert stored(backend) == []


def test_a_duplicate_key_is_an_integrity_error(backend: Backend) -> None:
    job_id = uuid4()

    def act(session: Session) -> None:
        with pytest.raises(IntegrityError):
            insert_rows(session.connection(), TABLE, NAMES, [row(id=job_id), row(id=job_id)])
        session.rollback()

    backend.run(act)


def test_a_value_that_no_database_can_hold_is_named(backend: Backend) -> None:
    def act(session: Session, field: str, value: object) -> None:
        with pytest.raises(InvalidValueError) as caught:
            insert_rows(session.connection(), TABLE, NAMES, [row(), row(**{field: value})])
        assert (caught.value.field, caught.value.value) == (field, value)
        session.rollback()

    for field, value in (
        ("target_name", "nul\x00"),
        ("target_name", "lone \ud800"),
        ("error_message", "nul\x00"),
        ("spec_json", "{"),
        ("metrics_json", "NaN"),
        ("spec_json", 5),
    ):
        with case(field, value):
            backend.run(act, field, value)
            assert stored(backend) == []


def test_a_connection_that_breaks_is_an_operational_error_and_is_not_used_again(backend: Backend) -> None:
    if backend.dialect == "sqlite":
        return  # there is no connection to lose

    def act(session: Session) -> None:
        connection = session.connection()
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar()

        def broken() -> Iterator[tuple[Any, ...]]:
            yield row()
            with backend.outside.connect() as outside:
                outside.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
            for _ in range(5000):
                yield row()

        with pytest.raises(DBAPIError) as caught:
            insert_rows(connection, TABLE, NAMES, broken())
        assert caught.value.connection_invalidated
        session.rollback()

    backend.run(act)
    assert stored(backend) == []


@pytest.fixture(params=["inside", "public"])
def psycopg(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """psycopg as this version is made inside, and one that is made otherwise."""
    if request.param == "public":
        monkeypatch.setattr(_copy, "_has_known_internals", lambda _: False)


@pytest.mark.usefixtures("psycopg")
def test_wire_rows_are_what_python_values_are(backend: Backend) -> None:
    rows = [row(), row(started_at=datetime(1970, 1, 1, tzinfo=UTC), finished_at=NOW, error_message="", priority=32767)]

    def act(session: Session) -> None:
        connection = session.connection()
        wire = wire_of(connection)
        made = [
            tuple(
                wire.id_in(value.hex)
                if isinstance(value, UUID)
                else wire.time_in(round(value.timestamp() * 1000))
                if isinstance(value, datetime)
                else value
                for value in values
            )
            for values in rows
        ]
        assert insert_wire(connection, TABLE, COLUMNS, made) == 2
        with closing(read_wire(connection, COLUMNS, [])) as parts:
            read = [values for part in parts for values in part]
        assert sorted(read) == sorted(made)
        assert {wire.id_out(values[0]) for values in read} == {values[0].hex for values in rows}
        assert {wire.time_out(values[5]) for values in read} == {round(NOW.timestamp() * 1000)}

    backend.run(act)
    assert stored(backend) == sorted(rows)


@pytest.mark.usefixtures("psycopg")
def test_reading_is_filtered_and_in_parts(backend: Backend) -> None:
    def act(session: Session) -> None:
        connection = session.connection()
        insert_rows(connection, TABLE, NAMES, [row(target_name=f"50% off '{number % 2}' \\") for number in range(25)])
        insert_rows(connection, TABLE, NAMES, [row(kind=MlJobKind.BACKFILL, status=MlJobStatus.FAILED)])
        where = jobs.conditions(MlJob, kind=["train", "drift_compute"], target_prefix="50% off '1'", created_after=NOW)
        parts = list(read_wire(connection, [TABLE.c.target_name], where, chunk=5))
        assert [len(part) for part in parts] == [5, 5, 2]
        assert {values for part in parts for values in part} == {("50% off '1' \\",)}

    backend.run(act)


@pytest.mark.usefixtures("psycopg")
def test_reading_may_end_early(backend: Backend) -> None:
    backend.run(lambda session: insert_rows(session.connection(), TABLE, NAMES, (row() for _ in range(50))))

    def act(session: Session) -> None:
        with closing(read_wire(session.connection(), COLUMNS, [], chunk=3)) as parts:
            assert len(next(parts)) == 3
        session.rollback()
        assert session.scalar(select(func.count()).select_from(TABLE)) == 50

    backend.run(act)


@pytest.mark.usefixtures("psycopg")
def test_an_error_in_the_middle_of_reading_is_the_databases_own(backend: Backend) -> None:
    if backend.dialect == "sqlite":
        return  # divides by zero without a word
    rows = [row(target_name="x" * (7 if number == 1500 else 5)) for number in range(3000)]
    backend.run(lambda session: insert_rows(session.connection(), TABLE, NAMES, rows))

    def act(session: Session) -> None:
        where = [1 / (func.length(TABLE.c.target_name) - 7) < 0]
        with (
            pytest.raises(DBAPIError, match="division by zero"),
            closing(read_wire(session.connection(), COLUMNS, where, chunk=100)) as parts,
        ):
            assert sum(len(part) for part in parts) < 0
        session.rollback()
        with closing(read_wire(session.connection(), COLUMNS, [], chunk=1000)) as parts:
            assert sum(len(part) for part in parts) == 3000

    backend.run(act)


def test_a_translated_schema_and_names_that_need_quotes_are_respected(empty_url: str) -> None:
    class HostBase(DeclarativeBase):
        pass

    class Run(MlJobMixin, HostBase):
        __tablename__ = 'Runs "of" 100%'
        __table_args__ = {"schema": "tenant"}

    engine = create_engine(empty_url, poolclass=NullPool)
    postgres = engine.dialect.name == "postgresql"
    name = "Tenant 7" if postgres else "main"
    if postgres:
        with engine.begin() as connection:
            connection.execute(text('CREATE SCHEMA "Tenant 7"'))
    mapped = engine.execution_options(schema_translate_map={"tenant": name})
    HostBase.metadata.create_all(mapped)
    table = table_of(Run)
    with mapped.begin() as connection:
        assert insert_rows(connection, table, NAMES, [row(), row()]) == 2
        with closing(read_wire(connection, [table.c.id, table.c.kind], [Run.target_name.startswith("spam")])) as parts:
            read = [values for part in parts for values in part]
        assert [kind for _, kind in read] == ["train", "train"]
        columns = [table.c[column] for column in NAMES if column not in {"attempts", "priority", "exclusive"}]
        with closing(read_wire(connection, columns, [])) as parts:
            (first, _), *_ = list(parts)
        wire = wire_of(connection)
        again = (wire.id_in(uuid4().hex), *first[1:])
        assert insert_wire(connection, table, columns, [again]) == 1
        assert connection.execute(select(func.count()).select_from(table)).scalar() == 3


class Flavour(Enum):
    """A host's own."""

    SWEET = "s"
    SOUR = "t"


class FruitBase(DeclarativeBase):
    """Of a host whose columns need more than COPY knows."""

    type_annotation_map = {dict[str, Any]: JSON}


class Fruit(MlJobMixin, FruitBase):
    """A job with such columns."""

    __tablename__ = "fruits"

    extra: Mapped[dict[str, Any]] = mapped_column(default=dict)
    flavour: Mapped[Flavour] = mapped_column(default=Flavour.SOUR)


def test_a_hosts_columns_of_any_type_take_the_way_through_sqlalchemy(empty_url: str) -> None:
    engine = create_engine(empty_url, poolclass=NullPool)
    FruitBase.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        fruits = [Fruit(kind="train", target_name="pear", extra={"a": [1]}, flavour=Flavour.SWEET) for _ in range(3)]
        assert jobs.submit_many(session, fruits, model=Fruit) == 3
    with Session(engine) as session:
        assert {(fruit.flavour, fruit.extra["a"][0]) for fruit in session.scalars(select(Fruit))} == {
            (Flavour.SWEET, 1)
        }


def test_the_statement_begins_the_callers_transaction(engine: Any) -> None:
    begun: list[Connection] = []
    event.listen(engine, "begin", begun.append)
    with engine.connect() as connection:
        insert_rows(connection, TABLE, NAMES, [row()])
        assert connection.in_transaction()
        connection.rollback()
        assert connection.execute(select(func.count()).select_from(TABLE)).scalar() == 0
    assert begun
