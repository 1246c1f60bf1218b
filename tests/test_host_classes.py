"""``MlJobMixin`` in a host's own Base: what works."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import (
    CheckConstraint,
    Column,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    create_engine,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    declarative_base,
    declared_attr,
    mapped_column,
    registry,
    relationship,
    sessionmaker,
)
from sqlalchemy.pool import NullPool

from mljobs import (
    InvalidValueError,
    JobStore,
    MlJob,
    MlJobDataclassMixin,
    MlJobMixin,
    TerminalStateError,
    jobs,
    kind_column,
    schema,
)
from mljobs.db._wake import ChangeListener
from mljobs.guards import retention
from tests.host_classes import Kind, dataclass_base, in_schema, own_kinds_and_columns, plain

CONVENTION = {
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


WITH_IX = {**CONVENTION, "ix": "ix_%(column_0_label)s"}


ODD = {**WITH_IX, "ck": "%(table_name)s_%(column_0_name)s_%(constraint_name)s_check"}


class OddKind(StrEnum):
    COLON = ":fit"
    LATER = "x :y"
    ESCAPED = r"a\:b"
    PERCENT = "%(x)s 50%"
    QUOTE = "it's"


@pytest.fixture
def empty(empty_url: str) -> Iterator[Engine]:
    engine = create_engine(empty_url)
    yield engine
    engine.dispose()


def life(engine: Engine, run: Any, **own: Any) -> None:
    """Every operation on a class, in a session, on a connection and by a store; the guard and the codec."""
    run.metadata.create_all(engine)
    kind, *_ = run.__kinds__
    with Session(engine, expire_on_commit=False) as session:
        job: Any = jobs.submit(session, kind, "x", {"a": 1}, model=run, **own)
        (claim,) = jobs.claim(session, worker="w", model=run, kinds=[kind])
        assert claim.job is job
        jobs.set_progress(session, claim, 40)
        assert jobs.renew(session, [claim]).held
        jobs.complete(session, claim, {"m": 1})
        session.commit()
        assert run.from_json(job.to_json(), **own).to_json() == job.to_json()
        again: Any = jobs.retry(session, job, again=True, model=run)
        for name, value in own.items():
            assert getattr(again, name) == value
        session.commit()
        assert jobs.counts(session, model=run).total() == 2
        job_id, again_id = job.id, again.id
        assert [each.id for each in jobs.lineage(session, again, model=run)] == [job_id, again_id]
        with pytest.raises(TerminalStateError):
            job.progress = 3
            session.commit()
        session.rollback()
    with engine.connect() as connection:
        (claim,) = jobs.claim(connection, worker="w", model=run)
        assert type(claim.job) is type(again)
        assert jobs.fail_many(connection, [(claim, "no")]) == [None]
        found: Any = jobs.get(connection, again_id, model=run)
        assert (type(found), found.error_message) == (type(again), "no")
        connection.commit()
        with pytest.raises(TerminalStateError):
            connection.execute(
                run.__table__.update().values(progress=1) if "progress" in run.__table__.c else _raw(run)
            )
    with JobStore(engine, model=run) as store:
        third = store.submit(kind, "y", **own)
        assert store.submit(kind, "y", unless_active=True, **own).id == third.id
        with store.running(third) as running:
            running.metrics = {"m": 2}
        assert store.wait(third, timeout=10).metrics == {"m": 2}
        assert not store.rescue()
        assert store.prune(older_than=timedelta(0), keep_last=1) == 1
        assert store.counts(exact=True).total(status="completed") == store.counts().total(status="completed")
    schema.verify(engine, metadata=run.metadata)


def _raw(run: Any) -> Any:
    return text(f"UPDATE {jobs.table_of(run).name} SET progress = 1")


def convention(names: dict[str, str]) -> Callable[[], Any]:
    def make() -> Any:
        class Base(DeclarativeBase):
            metadata = MetaData(naming_convention=names)

        class Owner(Base):
            __tablename__ = "owners"
            id: Mapped[int] = mapped_column(primary_key=True)

        class Run(MlJobMixin, Base):
            __tablename__ = "runs"
            owner_id: Mapped[int | None] = mapped_column(ForeignKey(Owner.id), index="ix" in names, unique=True)
            kind: Mapped[Kind] = kind_column(Kind)

        checks = {str(each.name) for each in Run.__table__.constraints if isinstance(each, CheckConstraint)}
        assert {"ck_runs_kind", "ck_runs_status", "ck_runs_progress"} <= checks
        return Run, {}

    return make


def single_table() -> Any:
    class Base(DeclarativeBase):
        pass

    class Run(MlJobMixin, Base):
        __tablename__ = "runs"
        flavour: Mapped[str]
        __mapper_args__ = {"polymorphic_on": "flavour", "polymorphic_identity": "run"}

    class Grid(Run):
        points: Mapped[int | None]
        __mapper_args__ = {"polymorphic_identity": "grid"}

    return Run, {}


def joined() -> Any:
    class Base(DeclarativeBase):
        pass

    class Run(MlJobMixin, Base):
        __tablename__ = "runs"
        flavour: Mapped[str]
        __mapper_args__ = {"polymorphic_on": "flavour", "polymorphic_identity": "run"}

    class Grid(Run):
        __tablename__ = "grids"
        id: Mapped[UUID] = mapped_column(ForeignKey("runs.id"), primary_key=True)
        points: Mapped[int]
        __mapper_args__ = {"polymorphic_identity": "grid"}

    return Run, {}


def base_with_an_id_and_times() -> Any:
    class Base(DeclarativeBase):
        id: Mapped[int] = mapped_column(primary_key=True)

        @declared_attr.directive
        def __tablename__(cls) -> str:  # noqa: N805
            return cls.__name__.lower()

    class Timed:
        created_at: Mapped[datetime] = mapped_column(server_default=func.now())
        changed_at: Mapped[datetime | None]

    class Run(MlJobMixin, Timed, Base):
        pass

    return Run, {}


def abstract_parent() -> Any:
    class Base(DeclarativeBase):
        pass

    class Jobs(MlJobMixin, Base):
        __abstract__ = True
        owner_id: Mapped[int]
        __mapper_args__ = {"eager_defaults": True}

    class Run(Jobs):
        __tablename__ = "runs"

    class Other(Jobs):
        __tablename__ = "others"
        kind: Mapped[Kind] = kind_column(Kind)

    assert Other.__leases__ is not Run.__leases__
    return Run, {"owner_id": 1}


def classic_base() -> Any:
    base: Any = declarative_base()

    class Run(MlJobMixin, base):
        __tablename__ = "runs"
        owner_id = Column(Integer, nullable=False)

    return Run, {"owner_id": 3}


def registry_decorator() -> Any:
    mappers = registry()

    @mappers.mapped
    class Run(MlJobMixin):
        __tablename__ = "runs"
        metadata = mappers.metadata

    return Run, {}


def own_constructor() -> Any:
    class Base(DeclarativeBase):
        pass

    class Run(MlJobMixin, Base):
        __tablename__ = "runs"
        owner_id: Mapped[int]

        def __init__(self, owner_id: int = 7, **fields: Any) -> None:
            super().__init__(owner_id=owner_id, **fields)

    return Run, {}


def optimistic_versions() -> Any:
    class Base(DeclarativeBase):
        pass

    class Run(MlJobMixin, Base):
        __tablename__ = "runs"
        version: Mapped[int] = mapped_column()
        __mapper_args__ = {"version_id_col": version}

    return Run, {}


def very_long_name() -> Any:
    class Base(DeclarativeBase):
        pass

    class Run(MlJobMixin, Base):
        __tablename__ = "a_table_whose_name_is_as_long_as_postgresql_lets_names_be"
        __lease_tablename__ = "short"

    return Run, {}


def name_to_be_quoted() -> Any:
    class Base(DeclarativeBase):
        pass

    class Run(MlJobMixin, Base):
        __tablename__ = 'Order "x" jobs'

    return Run, {}


def name_of_63_bytes() -> Any:
    class Base(DeclarativeBase):
        pass

    class Run(MlJobMixin, Base):
        __tablename__ = "é" * 31 + "x"

    assert len(Run.__leases__.name.encode()) <= 63
    return Run, {}


def names_and_kinds_like_parameters() -> Any:
    """A table with a percent sign, kinds with colons and quotes, a column that is called as an argument of ours."""

    class Base(DeclarativeBase):
        pass

    class Run(MlJobMixin, Base):
        __tablename__ = "100%s of runs"
        kind: Mapped[OddKind] = kind_column(OddKind)
        model_name: Mapped[str] = mapped_column("model")

    return Run, {"model_name": "bert"}


def dataclass_mixin_in_a_plain_base_with_a_name_like_a_column() -> Any:
    class Base(DeclarativeBase):
        pass

    class Run(MlJobDataclassMixin, Base):
        __tablename__ = "jobs"
        kind: Mapped[Kind] = kind_column(Kind)

    return Run, {}


HOSTS: list[Callable[[], Any]] = [
    plain, own_kinds_and_columns, single_table, joined, base_with_an_id_and_times, abstract_parent, classic_base,
    registry_decorator, own_constructor, optimistic_versions, very_long_name, name_to_be_quoted, name_of_63_bytes,
    names_and_kinds_like_parameters, dataclass_base, dataclass_mixin_in_a_plain_base_with_a_name_like_a_column,
]  # fmt: skip


@pytest.mark.parametrize("make", HOSTS, ids=lambda make: make.__name__)
def test_a_hosts_class_supports_every_operation(empty: Engine, make: Callable[[], Any]) -> None:
    run, own = make()
    life(empty, run, **own)
    with JobStore(empty, model=run) as store:
        for kind in run.__kinds__:
            assert store.get(store.submit(kind, "each", **own)).kind is kind


@pytest.mark.parametrize("names", [CONVENTION, WITH_IX, ODD], ids=["without ix", "with ix", "odd"])
def test_naming_conventions_leave_our_names_as_they_are(empty: Engine, names: dict[str, str]) -> None:
    run, own = convention(names)()
    life(empty, run, **own)


def test_a_schema_holds_the_table_and_all_beside_it(empty: Engine) -> None:
    in_schema(empty, "ml")

    class Base(DeclarativeBase):
        pass

    class Run(MlJobMixin, Base):
        __tablename__ = "runs"
        __table_args__ = {"schema": "ml"}

    life(empty, Run)
    assert {"runs", "runs_leases"} <= set(inspect(empty).get_table_names(schema="ml"))
    assert not inspect(empty).get_table_names()


@pytest.mark.parametrize("marker", [None, "tenant"])
def test_tenants_in_schemas_of_their_own_never_meet(empty: Engine, marker: str | None) -> None:
    """The same class in several schemas by ``schema_translate_map``: none sees, counts, claims or wakes another's jobs."""
    in_schema(empty, "north", "South-1")

    class Base(DeclarativeBase):
        metadata = MetaData(schema=marker)

    class Run(MlJobMixin, Base):
        __tablename__ = "runs"
        kind: Mapped[Kind] = kind_column(Kind)
        owner_id: Mapped[int]

    north, south = (empty.execution_options(schema_translate_map={marker: name}) for name in ("north", "South-1"))
    life(north, Run, owner_id=1)
    life(south, Run, owner_id=2)
    with JobStore(north, model=Run) as one, JobStore(south, model=Run) as other:
        for store in (one, other):
            store.prune(older_than=timedelta(0))
            assert store.counts().total() == 0
        mine = one.submit("fit", "spam", owner_id=1, exclusive=True)
        assert other.claim(worker="w") == []
        assert other.counts().total() == 0
        assert list(other.find()) == []
        theirs = other.submit("fit", "spam", owner_id=2, exclusive=True, unless_active=True)
        (claim,) = other.claim(worker="w")
        assert claim.job_id == theirs.id
        (held,) = one.claim(worker="w")  # an exclusive target of one tenant is none of another's
        assert held.job_id == mine.id
        one.complete(held)
        other.fail(claim, "no")
        assert one.counts()["fit", "completed"] == other.counts()["fit", "failed"] == 1
        assert other.prune(older_than=timedelta(0)) == 1
        assert one.get(mine).status == "completed"
        assert one.submit_many([Run(kind="embed", target_name="x", owner_id=1)]) == 1
        assert other.counts().total() == 0
    for engine, store_of in ((north, "north"), (south, "South-1")):
        schema.verify(engine, metadata=Base.metadata)
        with engine.connect() as connection, pytest.raises(TerminalStateError):
            connection.execute(Run.__table__.insert().values(**finished(), owner_id=3))
            connection.exec_driver_sql(f'DELETE FROM "{store_of}".runs')


def finished() -> dict[str, Any]:
    now = datetime.now(UTC)
    return {"kind": "fit", "target_name": "x", "status": "failed", "finished_at": now, "spec_json": "{}"}


def test_a_listener_listens_for_the_table_of_its_own_tenant(postgres_url: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    in_schema(engine, "north", "south")
    run, _ = plain()
    north, south = (engine.execution_options(schema_translate_map={None: name}) for name in ("north", "south"))
    for tenant in (north, south):
        run.metadata.create_all(tenant)
    with ChangeListener(north, run.__table__, workers=True) as listener, engine.connect() as other:
        listener.wait(0)
        other.exec_driver_sql("LISTEN mljobs")
        other.commit()
        for tenant in (south, north):
            with JobStore(tenant, model=run) as store:
                store.submit("train", "x")
        driver: Any = other.connection.driver_connection
        heard = [note.payload for note in driver.notifies(timeout=10, stop_after=1)]
        assert heard == ["insert north.runs"]
        listener.wait(10)


def test_relationships_lead_both_ways_and_cascades_stop_at_a_finished_job(empty: Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class User(Base):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        runs: Mapped[list[Any]] = relationship("Run", back_populates="owner", cascade="all, delete-orphan")

    class Run(MlJobMixin, Base):
        __tablename__ = "runs"
        owner_id: Mapped[int] = mapped_column(ForeignKey(User.id))
        owner: Mapped[User] = relationship(back_populates="runs", lazy="joined", innerjoin=True)
        logs: Mapped[list[Any]] = relationship("Log", backref="run", order_by="Log.id", lazy="selectin")
        tags: Mapped[list[Any]] = relationship("Tag", secondary="run_tags")

    class Log(Base):
        __tablename__ = "logs"
        id: Mapped[int] = mapped_column(primary_key=True)
        run_id: Mapped[UUID | None] = mapped_column(ForeignKey(Run.id))

    class Tag(Base):
        __tablename__ = "tags"
        id: Mapped[int] = mapped_column(primary_key=True)

    Table("run_tags", Base.metadata, Column("run", ForeignKey("runs.id")), Column("tag", ForeignKey("tags.id")))
    Base.metadata.create_all(empty)
    with Session(empty) as session:
        user = User(id=1)
        session.add(user)
        job: Any = jobs.submit(session, "train", "x", model=Run, owner=user, logs=[Log(id=1)], tags=[Tag(id=1)])
        user.runs.append(Run(kind="train", target_name="y"))
        session.commit()
        (claim, _) = jobs.claim(session, worker="w", limit=2, model=Run)
        assert claim.job is job
        assert job.logs[0].run is job
        jobs.complete(session, claim)
        job_id = job.id
        session.commit()
        job.logs.append(Log(id=2))  # a host's own rows go on
        job.tags.clear()
        session.commit()
        session.delete(user)
        with pytest.raises(TerminalStateError):
            session.commit()
        session.rollback()
        user.runs.remove(job)  # an orphan would be deleted
        with pytest.raises(TerminalStateError):
            session.commit()
        session.rollback()
        with pytest.raises(InvalidValueError) as caught:
            jobs.submit(session, "train", "x", model=Run)
        assert caught.value.field == "owner_id"
        session.rollback()
    with empty.connect() as connection:  # detached jobs have what the mapping loads with them
        found: Any = jobs.get(connection, job_id, model=Run)
        assert (found.owner.id, [log.id for log in found.logs]) == (1, [1, 2])
    with Session(empty) as session:
        for log in session.scalars(select(Log)):
            session.delete(log)
        session.flush()
        with retention(session, Run):
            session.delete(session.get(User, 1))
        session.commit()
        assert session.scalar(select(func.count()).select_from(Run)) == 0


@pytest.mark.parametrize("make", [single_table, joined], ids=["single", "joined"])
def test_subclasses_share_one_queue_and_come_back_as_what_they_are(
    empty: Engine, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make()
    grid: Any = run.__subclasses__()[0]
    run.metadata.create_all(empty)
    with Session(empty) as session:
        jobs.submit(session, "train", "x", model=run)
        job: Any = jobs.submit(session, "train", "x", {"n": 1}, model=grid, points=9, priority=5)
        assert type(jobs.submit(session, "train", "x", model=grid, points=1, unless_active=True)) is run
        session.commit()
        assert [type(each) for each in jobs.find(session, model=run, order="oldest")] == [run, grid]
        assert [each.id for each in jobs.find(session, model=grid)] == [job.id]
        assert jobs.get(session, job, model=grid) is job
    with empty.connect() as connection:
        assert [type(each) for each in jobs.find(connection, model=run, order="oldest")] == [run, grid]
        claims = jobs.claim(connection, worker="w", limit=2, model=run)
        assert [type(claim.job) for claim in claims] == [grid, run]
        first: Any = claims[0].job
        assert (first.points, first.spec) == (9, {"n": 1})
        assert len(jobs.renew(connection, claims).held) == 2
        assert jobs.complete_many(connection, [(claim, None) for claim in claims]) == [None, None]
        again: Any = jobs.retry(connection, job.id, again=True, model=run)
        assert (type(again), again.points, again.retry_of) == (grid, 9, job.id)
        for operation in (
            lambda: jobs.claim(connection, worker="w", model=grid),
            lambda: jobs.claim_one(connection, again, worker="w", model=grid),
            lambda: jobs.counts(connection, model=grid),
            lambda: jobs.rescue(connection, model=grid),
            lambda: jobs.prune(connection, older_than=timedelta(0), model=grid),
        ):
            with pytest.raises(InvalidValueError, match="in one queue with those of Run") as caught:
                operation()
            assert caught.value.field == "model"
        connection.commit()
        assert jobs.submit_many(connection, [grid(kind="train", target_name="z", points=1)], model=run) == 1
        with pytest.raises(TerminalStateError):
            connection.execute(text("UPDATE runs SET progress = 1"))
    with JobStore(empty, model=run) as store:
        first_look_is_over: list[Any] = []

        class Acting(ChangeListener):
            def wait(self, seconds: float) -> None:
                first_look_is_over or first_look_is_over.append(store.cancel(again))
                super().wait(seconds)

        monkeypatch.setattr(store, "new_listener", lambda: Acting(store.engine, jobs.table_of(run)))
        with closing(store.watch(timeout=10, poll=0.01)) as watch:
            assert {type(next(watch))} == {grid}
    with JobStore(empty, model=grid) as store:
        assert list(store.watch(where=grid.points > 3, timeout=0)) == []


def test_host_tables_may_refer_to_our_own(empty: Engine) -> None:
    """A foreign key to ``ml_jobs`` from another metadata, in one transaction with the job."""
    schema.upgrade(empty)

    class Base(DeclarativeBase):
        pass

    class Upload(Base):
        __tablename__ = "uploads"
        id: Mapped[int] = mapped_column(primary_key=True)
        job_id: Mapped[UUID] = mapped_column(ForeignKey(MlJob.id))
        job: Mapped[MlJob] = relationship(MlJob)

    Base.metadata.create_all(empty)
    with sessionmaker(empty).begin() as session:
        session.add(Upload(id=1, job=jobs.submit(session, "train", "x")))
    with Session(empty) as session:
        upload = session.scalars(select(Upload)).one()
        assert upload.job.target_name == "x"


def test_a_dataclass_is_complete_from_its_fields_alone(empty: Engine) -> None:
    run, _ = dataclass_base()
    job = run(kind="train", target_name="x", owner_id=1)
    assert (job.status, job.progress, job.spec, job.priority, job.exclusive) == ("queued", 0, {}, 0, False)
    assert job.id != run(kind="train", target_name="x", owner_id=1).id
    assert job.created_at.tzinfo is UTC
    job.spec = {"lr": 1}
    assert job.spec_json == '{"lr":1}'
    with pytest.raises(InvalidValueError):
        run(kind="nonsense", target_name="x", owner_id=1)
    assert "owner_id=1" in repr(job)
    run.metadata.create_all(empty)
    with empty.begin() as connection:  # Core has the defaults of the columns
        connection.execute(run.__table__.insert().values(kind="train", target_name="c", spec_json="{}", owner_id=1))
        assert len(jobs.find(connection, model=run)) == 1


def test_a_retry_of_a_dataclass_takes_over_what_its_constructor_asks_for(empty: Engine) -> None:
    class Base(MappedAsDataclass, DeclarativeBase):
        pass

    class User(Base):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Run(MlJobDataclassMixin, Base):
        __tablename__ = "runs"
        owner_id: Mapped[int] = mapped_column(ForeignKey(User.id), init=False)
        owner: Mapped[User] = relationship(User)

    Base.metadata.create_all(empty)
    with Session(empty) as session:
        job: Any = jobs.submit(session, "train", "x", model=Run, owner=User(id=1))
        job.cancel()
        session.commit()
        again: Any = jobs.retry(session, job, again=True, model=Run)
        assert (again.owner_id, again.owner) == (1, job.owner)
        job_id = job.id
        session.commit()
        with pytest.raises(InvalidValueError, match="Run needs it") as caught:
            jobs.submit(session, "train", "x", model=Run)
        assert caught.value.field == "owner"
    with empty.connect() as connection:
        assert jobs.retry(connection, job_id, again=True, another=True, model=Run).owner_id == 1  # type: ignore[attr-defined]
    with JobStore(empty, model=Run) as store:
        assert store.retry(job_id, again=True, another=True).owner_id == 1
        line = MlJob(kind="train", target_name="x").to_json()
        done = store.import_jobs(io.StringIO(line), rejects=io.StringIO())
        assert "missing 1 required" in done.problems[0].reason
        assert "'owner'" in done.problems[0].reason


def test_a_class_defined_twice_on_one_table_goes_on(empty: Engine) -> None:
    """As in a notebook, with ``extend_existing``."""
    mappers = registry()

    def define() -> Any:
        @mappers.mapped
        class Run(MlJobMixin):
            __tablename__ = "runs"
            __table_args__ = {"extend_existing": True}
            metadata = mappers.metadata
            owner_id: Mapped[int | None]

        return Run

    first = define()
    mappers.dispose()
    second = define()
    assert second.__leases__ is first.__leases__
    life(empty, second)
