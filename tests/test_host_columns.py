"""Columns of a host's own go everywhere the record goes: files, Arrow, submissions, response models."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pyarrow as pa
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

from mljobs import (
    InvalidValueError,
    JobStore,
    MlJob,
    MlJobKind,
    MlJobMixin,
    MlJobStatus,
    TerminalStateError,
    jobs,
    kind_column,
)
from mljobs.contrib.pydantic import read_model
from tests.backends import Backend
from tests.databases import Databases

pytestmark = pytest.mark.filterwarnings("ignore:Dialect sqlite.+ does .not. support Decimal")


class Base(DeclarativeBase):
    pass


class Team(Base):
    __tablename__ = "teams"
    id: Mapped[int] = mapped_column(primary_key=True)


class Colour(Enum):
    RED = "r"
    BLUE = "b"


class Kind(StrEnum):
    FIT = "fit"


class Cents(TypeDecorator[Any]):
    """Money, as a class that no line knows."""

    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value.cents

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else Money(value)


class Money:
    def __init__(self, cents: int) -> None:
        self.cents = cents

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Money) and other.cents == self.cents

    def __hash__(self) -> int:
        return hash(self.cents)


NO_NUL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
SMALL = st.integers(-(10**6), 10**6)
MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(9000, 1, 1))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | SMALL | NO_NUL | st.floats(-1e6, 1e6, width=32),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NO_NUL, inner, max_size=2),
    max_leaves=4,
)
SQLITE_JSON = {"type_": sa.JSON(), "dialect_name": "sqlite"}
COLUMNS: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "due": (sa.Date(), st.dates(date(1, 1, 1))),
    "at": (sa.DateTime(), MOMENTS),
    "zoned": (sa.DateTime(timezone=True), MOMENTS.map(lambda moment: moment.replace(tzinfo=UTC))),
    "clock": (sa.Time(), st.times()),
    "span": (sa.Interval(), st.timedeltas(timedelta(days=-9999), timedelta(days=9999))),
    "price": (sa.Numeric(12, 4), st.decimals(-(10**6), 10**6, places=4)),
    "ratio": (sa.Float(), st.floats(allow_nan=False) | st.just(float("inf"))),
    "count": (sa.BigInteger(), st.integers(-(2**63), 2**63 - 1)),
    "flag": (sa.Boolean(), st.booleans()),
    "colour": (sa.Enum(Colour, name="colour"), st.sampled_from(Colour)),
    "size": (sa.Enum("S", "L", name="size"), st.sampled_from(["S", "L"])),
    "key": (sa.Uuid(), st.uuids()),
    "blob": (sa.LargeBinary(), st.binary(max_size=8)),
    "extra": (sa.JSON(), JSON_VALUES.filter(lambda value: value is not None)),
    "doc": (sa.JSON().with_variant(JSONB(), "postgresql"), JSON_VALUES.filter(lambda value: value is not None)),
    "tags": (sa.ARRAY(sa.String()).with_variant(sa.JSON(), "sqlite"), st.lists(NO_NUL, max_size=3)),
    "days": (sa.ARRAY(sa.Integer()).with_variant(sa.JSON(), "sqlite"), st.lists(SMALL | st.none(), max_size=3)),
    "price_of": (Cents(), SMALL.map(Money)),
    "title": (sa.String(40), NO_NUL),
}


@st.composite
def host_classes(draw: st.DrawFn) -> tuple[Any, list[dict[str, Any]]]:
    """Return a class of a host's with columns of random types, and jobs of it."""
    names = draw(st.lists(st.sampled_from(list(COLUMNS)), min_size=4, max_size=9, unique=True))
    base: Any = type("OwnBase", (DeclarativeBase,), {})
    team = type("OwnTeam", (base,), {"__tablename__": "own_teams", "id": mapped_column(sa.Integer, primary_key=True)})
    columns = {name: mapped_column(name.upper(), COLUMNS[name][0], nullable=True) for name in names}
    columns["team_id"] = mapped_column(sa.ForeignKey(team.__table__.c.id), nullable=True)
    model = type("OwnRun", (MlJobMixin, base), {"__tablename__": "own_runs", **columns})
    values = {name: st.none() | COLUMNS[name][1] for name in names}
    of_class = st.fixed_dictionaries({**values, "team_id": st.sampled_from([None, 1])})
    return model, draw(st.lists(of_class, min_size=1, max_size=4))


def _zoned(value: Any) -> Any:
    """Return a time in UTC where the column has a zone: SQLite gives it without."""
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value


def _held(store: JobStore[Any], names: list[str]) -> dict[UUID, dict[str, Any]]:
    return {job.id: {name: _zoned(getattr(job, name)) for name in names} for job in store.find(limit=100)}


def _exported(store: JobStore[Any], **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    store.export_jobs(file, extended=True, **options)
    return io.BytesIO(file.getvalue())


@pytest.fixture
def both(empty_postgres_databases: Databases, tmp_path: Path) -> Iterator[list[sa.Engine]]:
    with empty_postgres_databases.fresh() as postgres_url:
        urls = (f"sqlite:///{tmp_path / 'a.db'}", postgres_url, f"sqlite:///{tmp_path / 'b.db'}")
        engines = [sa.create_engine(url) for url in urls]
        yield engines
        for engine in engines:
            engine.dispose()


@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,  # each costs two tables; which classes they are must not depend on the day
    phases=[Phase.explicit, Phase.generate, Phase.shrink],  # to explain takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(host_classes())
def test_a_host_of_any_column_types_goes_from_database_to_database_without_loss(
    both: list[sa.Engine], drawn: Any
) -> None:
    model, drawn_jobs = drawn
    names = list(drawn_jobs[0])
    given: dict[UUID, dict[str, Any]] = {}
    file: Any = None
    try:
        for engine in both:
            model.metadata.create_all(engine)
            with engine.begin() as connection:
                connection.execute(model.metadata.tables["own_teams"].insert().values(id=1))
            with JobStore(engine, model=model) as store:
                if file is None:
                    rows = [
                        {"kind": "train", "target_name": "t", **{k: v for k, v in job.items() if v is not None}}
                        for job in drawn_jobs
                    ]
                    ids = store.submit_many(rows, ids=True)
                    given = dict(zip(ids, drawn_jobs, strict=True))
                else:
                    assert store.import_jobs(file).inserted == len(drawn_jobs)
                found = _held(store, names)
                assert found == {job_id: {k: _zoned(v) for k, v in job.items()} for job_id, job in given.items()}
                file = _exported(store)
                table = store.to_arrow()
                assert set(names) <= set(table.schema.names)
                nulls = {name: sum(job[name] is None for job in drawn_jobs) for name in names}
                assert {name: table.column(name).null_count for name in names} == nulls
    finally:
        for engine in both:
            model.metadata.drop_all(engine)


# ------------------------------------------------------------------------------------------------------ one wide class


class Run(MlJobMixin, Base):
    __tablename__ = "wide_runs"
    kind: Mapped[Kind] = kind_column(Kind)
    owner: Mapped[str]
    due: Mapped[date | None]
    price: Mapped[Decimal | None] = mapped_column(sa.Numeric(12, 4))
    zoned: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))
    clock: Mapped[time | None]
    span: Mapped[timedelta | None]
    colour: Mapped[Colour | None]
    key: Mapped[UUID | None]
    blob: Mapped[bytes | None] = mapped_column(comment="What it is about.")
    extra: Mapped[Any] = mapped_column(sa.JSON(), nullable=True)
    tags: Mapped[Any] = mapped_column(sa.ARRAY(sa.String()).with_variant(sa.JSON(), "sqlite"), nullable=True)
    paid: Mapped[Any] = mapped_column(Cents(), nullable=True)
    seats: Mapped[int] = mapped_column(default=2)
    places: Mapped[int] = mapped_column(sa.Computed("seats * 2", persisted=True))
    team_id: Mapped[int | None] = mapped_column(sa.ForeignKey("teams.id"))


VALUES: dict[str, Any] = {
    "owner": "ann",
    "due": date(2026, 1, 2),
    "price": Decimal("1.5000"),
    "zoned": datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
    "clock": time(1, 2, 3),
    "span": timedelta(days=2, microseconds=5),
    "colour": Colour.RED,
    "key": uuid4(),
    "blob": b"\xff\x00",
    "extra": {"a": [1, None]},
    "tags": ["x", "y"],
    "paid": Money(7),
}


@pytest.fixture
def wide(backend: Backend) -> Any:
    Base.metadata.create_all(backend.outside)
    return backend.store(model=Run)


def test_own_columns_come_through_every_driver_into_lines_and_back(wide: Any) -> None:
    job = wide.submit("fit", "spam", **VALUES)
    line = json.loads(_exported(wide).getvalue())
    assert list(line)[-1] == "columns"
    assert line["columns"] == {
        **dict.fromkeys(("team_id",)),
        "owner": "ann",
        "due": "2026-01-02",
        "price": "1.5000",
        "zoned": "2026-01-02T03:04:05.000006+00:00",
        "clock": "01:02:03",
        "span": 172_800_000_005,
        "colour": "RED",
        "key": str(VALUES["key"]),
        "blob": "/wA=",
        "extra": '{"a": [1, null]}',
        "tags": ["x", "y"],
        "paid": 7,
        "seats": 2,
    }
    wide.cancel(job)
    file = _exported(wide)
    compared = wide.compare(file)
    assert (compared.equal, compared.total) == (1, 1)
    assert wide.import_jobs(io.BytesIO(file.getvalue())).skipped == 1


def test_null_of_json_is_not_null_of_the_database(wide: Any) -> None:
    ids = wide.submit_many([("fit", "a", None)], ids=True, owner="ann", extra=sa.JSON.NULL)
    ids += wide.submit_many([("fit", "b", None)], ids=True, owner="ann", extra=sa.null())
    texts = [json.loads(line)["columns"]["extra"] for line in _exported(wide, target="a").getvalue().splitlines()]
    texts += [json.loads(line)["columns"]["extra"] for line in _exported(wide, target="b").getvalue().splitlines()]
    assert texts == ["null", None]


@pytest.fixture
def store(engine: sa.Engine) -> Iterator[JobStore[Run]]:
    Base.metadata.create_all(engine)
    with JobStore(engine, model=Run) as store:
        yield store


def _empty(store: JobStore[Run]) -> None:
    Base.metadata.drop_all(store.engine)
    Base.metadata.create_all(store.engine)


def test_lines_that_say_nothing_of_own_columns_get_what_the_caller_says(store: JobStore[Run], tmp_path: Path) -> None:
    store.submit("fit", "spam", owner="ann", seats=9)
    file, rejects = io.BytesIO(), io.BytesIO()
    store.export_jobs(file)
    _empty(store)
    (problem,) = store.import_jobs(io.BytesIO(file.getvalue()), rejects=rejects).problems
    assert "owner" in problem.reason
    assert store.import_jobs(io.BytesIO(file.getvalue()), defaults={"owner": "bob"}).inserted == 1
    (job,) = store.find()
    assert (job.owner, job.seats, job.places) == ("bob", 2, 4)
    kv: dict[str, str] = {}
    store.dump_kv(kv)
    _empty(store)
    assert store.load_kv(kv, defaults={"owner": "carl"}).inserted == 1
    assert store.find()[0].owner == "carl"
    with pytest.raises(InvalidValueError, match="expected columns of your own; there are owner, due"):
        store.import_jobs(io.BytesIO(), defaults={"progress": 1})


def test_a_value_that_its_column_cannot_be_is_rejected_by_name(store: JobStore[Run]) -> None:
    store.submit("fit", "spam", **VALUES)
    text = _exported(store).getvalue()
    _empty(store)
    rejects = io.BytesIO()
    broken = text.replace(b'"colour":"RED"', b'"colour":"GREEN"')
    (problem,) = store.import_jobs(io.BytesIO(broken), rejects=rejects).problems
    assert (problem.field, problem.reason) == ("columns.colour", "expected one of RED, BLUE, got 'GREEN'")
    assert store.import_jobs(io.BytesIO(text.replace(b'"columns":{', b'"columns":{"gone":1,'))).inserted == 1


def test_an_update_brings_own_columns_of_live_jobs_and_leaves_finished_ones(store: JobStore[Run]) -> None:
    live, done = (store.submit("fit", name, owner="ann") for name in ("live", "done"))
    store.cancel(done)
    text = _exported(store).getvalue().replace(b'"owner":"ann"', b'"owner":"bob"')
    result = store.import_jobs(io.BytesIO(text), on_conflict="update")
    assert (result.updated, result.skipped) == (1, 1)
    assert (store.get(live).owner, store.get(done).owner) == ("bob", "ann")


def test_each_record_comes_back_as_the_class_that_it_is(engine: sa.Engine) -> None:
    class Own(DeclarativeBase):
        pass

    class Job(MlJobMixin, Own):
        __tablename__ = "all_jobs"
        flavour: Mapped[str]
        __mapper_args__ = {"polymorphic_on": "flavour", "polymorphic_identity": "job"}

    class Grid(Job):
        points: Mapped[int | None]
        __mapper_args__ = {"polymorphic_identity": "grid"}

    Own.metadata.create_all(engine)
    with JobStore(engine, model=Job) as store:
        with Session(engine) as session, session.begin():
            session.add_all([Job(kind="train", target_name="a"), Grid(kind="train", target_name="b", points=3)])
        file = _exported(store)
        Own.metadata.drop_all(engine)
        Own.metadata.create_all(engine)
        assert store.import_jobs(file).inserted == 2
        found = sorted(store.find(), key=lambda job: job.target_name)
    assert [type(job) for job in found] == [Job, Grid]
    assert found[1].points == 3


def test_arrow_has_own_columns_by_their_types(store: JobStore[Run]) -> None:
    store.submit("fit", "spam", **VALUES)
    store.submit("fit", "ham", owner="bob")
    table = store.to_arrow(
        columns=("target_name", "owner", "id", "price", "zoned", "tags", "colour", "key", "paid", "places")
    )
    types = {field.name: field.type for field in table.schema}
    assert types["price"] == pa.decimal128(12, 4)
    assert types["zoned"] == pa.timestamp("us", "UTC")
    assert types["tags"] == pa.list_(pa.large_string())
    rows = {row.pop("target_name"): row for row in table.to_pylist()}
    wanted = {name: VALUES[name] for name in ("owner", "price", "zoned", "tags")}
    job = {name: value for name, value in rows["spam"].items() if name != "id"}
    assert job == {**wanted, "colour": "RED", "key": str(VALUES["key"]), "paid": 7, "places": 4}
    assert rows["ham"]["colour"] is None
    assert store.to_arrow(columns=("key",), ids="uuid").column("key").type == pa.uuid()
    with pytest.raises(InvalidValueError, match=r"expected each of id, .*team_id once"):
        store.to_arrow(columns=("gone",))


def test_many_jobs_are_submitted_with_fields_of_their_own_and_their_ids_told(store: JobStore[Run]) -> None:
    given: list[Any] = [
        ("fit", "a", {"lr": 1}),
        {"kind": "fit", "target_name": "b", "spec": None, "priority": 9, "run_after": timedelta(hours=1)},
        {"kind": "fit", "target_name": "c", "owner": "bob"},
        Run(kind="fit", target_name="d", owner="carl"),
    ]
    ids = store.submit_many(iter(given), ids=True, owner="ann", priority=3)
    found = [store.get(job_id) for job_id in ids]
    assert [job.target_name for job in found] == ["a", "b", "c", "d"]
    assert [job.owner for job in found] == ["ann", "ann", "bob", "carl"]
    assert [job.priority for job in found] == [3, 9, 3, 0]
    assert found[1].run_after is not None
    assert store.submit_many([("fit", "e", None)], owner="ann") == 1
    assert store.counts().total() == 5


def test_our_own_class_takes_fields_for_many_too(url: str) -> None:
    with JobStore(url) as store:
        ids = store.submit_many([("train", "a", None), {"kind": "train", "target_name": "b"}], ids=True, priority=4)
        assert [store.get(job_id).priority for job_id in ids] == [4, 4]
        with pytest.raises(InvalidValueError, match="MlJob has no such field"):
            store.submit_many([("train", "a", None)], owner="ann")
        with pytest.raises(InvalidValueError, match="or a dict of what submit takes"):
            store.submit_many([("train", "a")])  # type: ignore[list-item]


def test_a_relationship_that_is_given_a_key_is_told_what_to_give(engine: sa.Engine) -> None:
    class Own(DeclarativeBase):
        pass

    class Customer(Own):
        __tablename__ = "customers"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Order(MlJobMixin, Own):
        __tablename__ = "orders"
        customer_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Customer.id))
        customer: Mapped[Customer | None] = relationship()

    Own.metadata.create_all(engine)
    with JobStore(engine, model=Order) as store:
        with pytest.raises(InvalidValueError, match="it is a relationship: give a Customer, or its key as customer_id"):
            store.submit("train", "spam", customer=1)
        assert store.get(store.submit("train", "spam", customer=Customer(id=4))).customer_id == 4


def test_a_host_adds_a_kind_without_repeating_the_built_in_ones(engine: sa.Engine) -> None:
    class Own(DeclarativeBase):
        pass

    class Job(MlJobMixin, Own):
        __tablename__ = "more_jobs"
        kind: Mapped[Kind] = kind_column(Kind, built_in=True)

    Own.metadata.create_all(engine)
    assert [str(kind) for kind in Job.__kinds__] == [*(str(kind) for kind in MlJobKind), "fit"]
    with JobStore(engine, model=Job) as store:
        ids = [store.submit(kind, "a").id for kind in (Kind.FIT, MlJobKind.TRAIN, "backfill")]
        assert [store.get(job_id).kind for job_id in ids] == [Kind.FIT, MlJobKind.TRAIN, "backfill"]
        assert store.counts()[Kind.FIT, "queued"] == 1
        with pytest.raises(InvalidValueError, match="kind"):
            store.submit("tune", "a")

    class Other(StrEnum):
        TRAIN = "training"

    with pytest.raises(InvalidValueError, match="it is the name of the built-in kind 'train', not 'training'"):
        kind_column(Other, built_in=True)


def test_cancelling_twice_is_an_error_of_the_record_and_false_by_id(engine: sa.Engine) -> None:
    with JobStore(engine) as store, Session(engine) as session, session.begin():
        job = session.get_one(MlJob, store.submit("train", "spam").id)
        job.cancel()
        session.flush()
        with pytest.raises(TerminalStateError, match="is cancelled"):
            job.cancel()
        assert jobs.cancel(session, job.id) is False


def test_a_read_model_of_a_hosts_class_is_one_call(store: JobStore[Run]) -> None:
    model = read_model(Run)
    job = store.submit("fit", "spam", **{**VALUES, "paid": None})
    read: Any = model.model_validate(store.get(job))
    assert model.__name__ == "RunRead"
    assert (read.owner, read.colour, read.price, read.status) == (
        "ann",
        Colour.RED,
        Decimal("1.5000"),
        MlJobStatus.QUEUED,
    )
    dumped = json.loads(read.model_dump_json())
    assert (dumped["due"], dumped["colour"], dumped["tags"], dumped["blob"]) == ("2026-01-02", "r", ["x", "y"], "_wA=")
    described = model.model_json_schema()
    assert "owner" in described["required"]
    assert described["properties"]["blob"]["description"] == "What it is about."
    assert read_model(MlJob).model_fields.keys() == model.model_fields.keys() - set(VALUES) - {
        "seats",
        "places",
        "team_id",
    }
