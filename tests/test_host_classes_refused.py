"""``MlJobMixin`` in a host's own Base: what is refused where the class is defined."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import (
    Column,
    DateTime,
    Engine,
    ForeignKey,
    Integer,
    Table,
    create_engine,
    delete,
    event,
    func,
    select,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    mapped_column,
    relationship,
    validates,
)
from sqlalchemy.pool import NullPool

import mljobs
from mljobs import (
    AsyncJobStore,
    InvalidValueError,
    JobStore,
    MlJob,
    MlJobDataclassMixin,
    MlJobMixin,
    MlJobsError,
    ModelError,
    TerminalStateError,
    Worker,
    jobs,
    kind_column,
)
from mljobs._values import utc_now
from mljobs.guards import retention
from mljobs.record._declaring import NAMES_IN_STATEMENTS
from mljobs.types import PlainText
from tests.backends import Backend, Blocking
from tests.host_classes import Kind, dataclass_base, in_schema, own_kinds_and_columns, plain


@pytest.fixture
def empty(empty_url: str) -> Iterator[Engine]:
    engine = create_engine(empty_url, poolclass=NullPool)
    yield engine
    engine.dispose()


# -------------------------------------------------------------------------------------------------- what is refused


class _Base(DeclarativeBase):
    pass


class _WithId(DeclarativeBase):
    id: Mapped[int] = mapped_column(primary_key=True)


class _Dataclasses(MappedAsDataclass, DeclarativeBase):
    pass


class _Timed:
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class _Leases(_Base):
    __tablename__ = "taken_leases"
    id: Mapped[int] = mapped_column(primary_key=True)


def _define(*bases: type, **body: Any) -> Any:
    annotations = body.pop("annotations", {})
    name = f"Refused{len(_Base.metadata.tables)}x{id(body)}"
    return type(name, bases, {"__tablename__": name.lower(), "__annotations__": annotations, **body})


class Colour(Enum):
    RED = "red"


class Empty(StrEnum):
    pass


class Long(StrEnum):
    LONG = "x" * 33


def _refused_parent() -> Any:
    class Base(DeclarativeBase):
        pass

    return type("Parent", (MlJobMixin, Base), {"__tablename__": "parents"})


class _Validating:
    @validates("progress")
    def check(self, _name: str, value: int) -> int:
        return value


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a base whose id comes first": (
        lambda: _define(_WithId, MlJobMixin),
        r"its column id is Integer\(\).* put ours first, class \w+\(MlJobMixin, ...\)",
    ),
    "a concrete subclass": (
        lambda: type("Sub", (_refused_parent(),), {"__tablename__": "subs", "__mapper_args__": {"concrete": True}}),
        r"it takes no columns from Parent: define class Sub\(MlJobMixin, YourBase\)",
    ),
    "a mixin whose created_at comes first": (
        lambda: _define(_Timed, MlJobMixin, _Base),
        "its column created_at is DateTime.* put ours first",
    ),
    "kinds without kind_column": (
        lambda: _define(MlJobMixin, _Base, annotations={"kind": Mapped[Kind]}),
        r"write kind: Mapped\[Kind\] = kind_column\(Kind\)",
    ),
    "kinds without kind_column, as a string": (
        lambda: _define(MlJobMixin, _Base, annotations={"kind": "Mapped[Kind]"}),
        r"write kind: Mapped\[Kind\] = kind_column\(Kind\)",
    ),
    "a key of several columns": (
        lambda: _define(MlJobMixin, _Base, tenant=mapped_column(Integer, primary_key=True)),
        r"its primary key is \(id, tenant\), but leases refer to id alone",
    ),
    "a column that hides what the record knows": (
        lambda: _define(MlJobMixin, _Base, metrics=mapped_column(Integer)),
        "its attribute metrics would hide the record's own",
    ),
    "a relationship that hides what the record does": (
        lambda: _define(MlJobMixin, _Base, start=relationship(_Leases)),
        "its attribute start would hide",
    ),
    "a column of another name": (
        lambda: _define(MlJobMixin, _Base, target_name=mapped_column("target", PlainText("target_name"))),
        "its column target_name is called 'target'",
    ),
    "a column of another type": (
        lambda: _define(MlJobMixin, _Base, progress=mapped_column(DateTime)),
        "its column progress is DateTime",
    ),
    "a table without the columns": (
        lambda: _define(
            MlJobMixin, _Base, __tablename__=None, __table__=Table("bare", _Base.metadata, Column("id", Integer))
        ),
        "its __table__ has no column kind: give a __tablename__ instead",
    ),
    "a lease table that is there already": (
        lambda: _define(MlJobMixin, _Base, __tablename__="taken"),
        "another class has table taken_leases.* set __lease_tablename__",
    ),
    "a table that is called as a part of a statement": (
        lambda: _define(MlJobMixin, _Base, __tablename__="Wanted"),
        "statements of mljobs call a part of theirs Wanted: give the table another __tablename__",
    ),
    "a lease table that is called so": (
        lambda: _define(MlJobMixin, _Base, __lease_tablename__="held"),
        "call a part of theirs held: give the table another __lease_tablename__",
    ),
    "an unlogged table": (
        lambda: _define(MlJobMixin, _Base, __table_args__={"prefixes": ["UNLOGGED"]}),
        "its table is UNLOGGED: a crash of PostgreSQL's server empties it, finished records included",
    ),
    "a temporary table": (
        lambda: _define(MlJobMixin, _Base, __table_args__={"prefixes": ["TEMPORARY"]}),
        "its table is TEMP: it ends with the connection that made it",
    ),
    "a validator of its own for a column of the record": (
        lambda: _define(MlJobMixin, _Base, check=validates("note", "target_name")(lambda _self, _name, value: value)),
        r"check validates target_name.* SQLAlchemy takes one: listen with @event.listens_for\(\w+\.target_name",
    ),
    "a mixin with such a validator": (
        lambda: _define(_Validating, MlJobMixin, _Base),
        "check validates progress",
    ),
    "a dataclass": (
        lambda: _define(MlJobMixin, _Dataclasses),
        "it is a dataclass: inherit from MlJobDataclassMixin in the place of MlJobMixin",
    ),
    "a column in our own table": (
        lambda: type("Mine", (MlJob,), {"__annotations__": {"note": Mapped[int | None]}}),
        "it adds note to the table of MlJob, which our migrations make",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_class_that_cannot_hold_a_record_is_refused_where_it_is_defined(case: str) -> None:
    define, reason = REFUSED[case]
    with pytest.raises(ModelError, match=reason) as caught:
        define()
    assert isinstance(caught.value, TypeError)
    assert caught.value.model.__name__ in str(caught.value)
    assert "note" not in MlJob.__table__.c


def test_every_name_that_statements_give_to_their_parts_is_refused() -> None:
    named = re.compile(r'\b(?:alias|cte|subquery|render_derived|parameter_table)\(\s*(?:name=)?"(\w+)"')
    found = {
        name
        for room in ("jobs", "db", "transfer", "store")
        for path in (Path(mljobs.__file__).parent / room).glob("*.py")
        for name in named.findall(path.read_text())
    }
    assert len(found) > 15
    assert found <= NAMES_IN_STATEMENTS


def test_a_host_may_validate_its_own_columns_and_listen_to_the_records() -> None:
    class Base(DeclarativeBase):
        pass

    class Run(MlJobMixin, Base):
        __tablename__ = "runs"

        note: Mapped[str | None]

        @validates("note")
        def check(self, _name: str, value: str) -> str:
            return value.strip()

    @event.listens_for(Run.target_name, "set")
    def no_blank(_job: Run, value: str, *_: Any) -> None:
        if " " in str(value):
            raise ValueError("no blanks")

    assert Run(kind="train", target_name="x", note=" a ").note == "a"
    with pytest.raises(ValueError, match="no blanks"):
        Run(kind="train", target_name="a b")
    with pytest.raises(InvalidValueError):
        Run(kind="train", target_name=7)  # type: ignore[arg-type]


def test_a_cascade_may_delete_finished_jobs_of_another_class_on_postgresql_only(empty: Engine) -> None:
    """As docs/guard.md says: there retention is of the transaction, on SQLite of the table."""

    class Base(DeclarativeBase):
        pass

    class Parent(MlJobMixin, Base):
        __tablename__ = "parents"

    class Child(MlJobMixin, Base):
        __tablename__ = "children"

        parent_id: Mapped[UUID] = mapped_column(ForeignKey("parents.id", ondelete="CASCADE"))

    Base.metadata.create_all(empty)
    with Session(empty) as session:
        parent = Parent(kind="train", target_name="a", status="cancelled", finished_at=utc_now())
        session.add(parent)
        session.flush()
        session.add(
            Child(kind="train", target_name="b", status="cancelled", finished_at=utc_now(), parent_id=parent.id)
        )
        session.commit()
        if empty.dialect.name == "sqlite":
            session.connection().exec_driver_sql("PRAGMA foreign_keys = ON")  # before the driver begins a transaction
            with pytest.raises(TerminalStateError), retention(session, Parent):
                session.execute(delete(Parent))
            return
        with retention(session, Parent):
            session.execute(delete(Parent))
        session.commit()
        assert session.scalar(select(func.count()).select_from(Child)) == 0


@pytest.mark.parametrize("enum", [Colour, Empty, Long, str, None, "fit"])
def test_kinds_that_are_none_are_refused(enum: Any) -> None:
    with pytest.raises(InvalidValueError) as caught:
        kind_column(enum)
    assert caught.value.field == "kind"


def test_our_own_table_takes_subclasses_without_columns() -> None:
    class Quiet(MlJob):
        def hello(self) -> str:
            return self.target_name

    assert Quiet(kind="train", target_name="x").hello() == "x"


@pytest.mark.parametrize("make", [plain, own_kinds_and_columns, dataclass_base], ids=lambda make: make.__name__)
def test_a_field_that_a_class_does_not_have_is_refused(empty: Engine, make: Callable[[], Any]) -> None:
    run, own = make()
    run.metadata.create_all(empty)
    with Session(empty) as session, pytest.raises(InvalidValueError, match="Run has no such field") as caught:
        jobs.submit(session, next(iter(run.__kinds__)), "x", model=run, nonsense=3, **own)
    assert (caught.value.field, caught.value.value) == ("nonsense", 3)


def test_a_value_that_a_hosts_column_needs_is_asked_for_by_name(empty: Engine) -> None:
    run, _ = own_kinds_and_columns()
    run.metadata.create_all(empty)

    def submit(bind: Any) -> Any:
        return jobs.submit(bind, "fit", "x", model=run)

    def submit_many(bind: Any) -> Any:
        return jobs.submit_many(bind, [("fit", "x", {})], model=run)

    for operation in (submit, submit_many):
        with Session(empty) as session, pytest.raises(InvalidValueError, match="Run needs it") as caught:
            operation(session)
        assert (caught.value.field, caught.value.value) == ("owner_id", None)
        with empty.connect() as connection, pytest.raises(MlJobsError, match="owner_id"):
            operation(connection)


def test_tenants_work_with_every_driver(backend: Backend) -> None:
    """Through each driver, sync and async; a store and a worker serve one tenant."""
    in_schema(backend.outside, "north")
    engine: Any = backend.engine
    if backend.dialect == "sqlite":
        in_schema(getattr(engine, "sync_engine", engine), "north")

    class Base(DeclarativeBase):
        pass

    class Run(MlJobDataclassMixin, Base):
        __tablename__ = "runs"
        owner_id: Mapped[int]

    Base.metadata.create_all(backend.outside.execution_options(schema_translate_map={None: "north"}))
    tenant = engine.execution_options(schema_translate_map={None: "north"})
    store: Any = (
        Blocking(AsyncJobStore(tenant, model=Run), backend.wait) if backend.is_async else JobStore(tenant, model=Run)
    )
    job = store.submit("train", "x", {"a": 1}, owner_id=3)
    assert store.submit_many([Run(kind="train", target_name="y", owner_id=4)]) == 1
    claims = store.claim(worker="w", limit=5)
    assert [claim.job.owner_id for claim in claims] == [3, 4]
    assert len(store.renew(claims).held) == 2
    assert store.set_progress_many([(claim, 50) for claim in claims]) == [None, None]
    assert store.complete_many([(claim, {"m": 1}) for claim in claims]) == [None, None]
    assert store.get(job.id).metrics == {"m": 1}
    assert store.counts()["train", "completed"] == 2
    assert store.retry(job.id, again=True).owner_id == 3
    errors, more = store.finish_and_claim([], worker="w")
    assert (errors, len(more)) == ([], 1)
    store.requeue(more[0])
    assert store.prune(older_than=timedelta(0)) == 2
    store.close()


def test_a_worker_serves_a_hosts_class_of_one_tenant(empty: Engine) -> None:
    in_schema(empty, "north", "south")
    run, _ = own_kinds_and_columns()
    stores = []
    for name in ("north", "south"):
        tenant = empty.execution_options(schema_translate_map={None: name})
        run.metadata.create_all(tenant)
        stores.append(JobStore(tenant, model=run))
    north, south = stores
    worker = Worker(north, poll=0.05, grace=20)
    worker.handles("fit")(lambda running: {"owner": running.job.owner_id})
    mine, theirs = (store.submit("fit", "x", owner_id=at) for at, store in enumerate(stores, 1))
    worker.run(until_idle=True)
    assert north.get(mine).metrics == {"owner": 1}
    assert south.get(theirs).status == "queued"
    for store in stores:
        store.close()
