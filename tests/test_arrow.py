"""Jobs as Arrow: the same through every driver, with the types that pandas, polars and DuckDB want."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import duckdb
import pyarrow as pa
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from mljobs import InvalidValueError, JobStore, MlJob, MlJobStatus
from mljobs._fields import NAMES
from mljobs._values import from_millis
from mljobs.transfer._arrow import arrow_batches, reader_of, to_arrow
from tests.backends import Backend
from tests.cases import case
from tests.host_application import HostBase, Team, TrainingRun

COLUMNS = [name for name in NAMES if name != "lease"]
MOMENT = datetime(2026, 2, 28, 23, 59, 59, 999_000, tzinfo=UTC)
METRICS: list[Any] = [
    {"f1": 0.5, "rows": 10, "note": "fine", "ok": True, "mixed": 1, "deep": {"a": [1, 2]}, "none": None, "big": 10**18},
    {"f1": 1, "rows": None, "note": 'a "quoted" \u00e9', "ok": False, "mixed": "one", "late": -1.5e-3},
    {"f1": 2.5, "a.b": 1, "": 2},
    None,
    [1, 2],
    7,
    {},
]


def _add(session: Session) -> list[Any]:
    """Add jobs with values at the edges; return what each holds."""
    jobs = [
        MlJob(
            kind="train" if at % 2 else "drift_compute",
            target_name=f"t{at}\u00e9",
            status="completed",
            progress=100,
            spec={"lr": at / 10},
            metrics=metrics,
            created_at=MOMENT + timedelta(milliseconds=at),
            started_at=from_millis(0),
            finished_at=from_millis(253_402_300_799_999) if at else None,
            error_message="one\ntwo" if at == 2 else None,
            priority=-32_768 + at,
            exclusive=at == 3,
        )
        for at, metrics in enumerate(METRICS)
    ]
    jobs.append(MlJob(kind="train", target_name="again", retry_of=jobs[0].id, run_after=MOMENT, created_at=MOMENT))
    session.add_all(jobs)
    session.flush()
    held = [{name: getattr(job, name) for name in COLUMNS} for job in jobs]
    session.commit()
    return held


def _by_id(table: pa.Table) -> dict[UUID, dict[str, Any]]:
    return {UUID(str(row["id"])): row for row in table.to_pylist()}


def _in_json(value: Any) -> Any:
    if isinstance(value, UUID):
        return str(value)
    return str(value) if isinstance(value, str) else value


def test_every_value_comes_through_every_driver_as_it_is(backend: Backend) -> None:
    held = backend.run(_add)
    table = backend.run(to_arrow)
    rows = _by_id(table)
    assert len(rows) == len(held)
    for job in held:
        assert rows[job["id"]] == {name: _in_json(value) for name, value in job.items()}


def test_the_types_are_those_that_frames_want(backend: Backend) -> None:
    backend.run(_add)
    schema = backend.run(to_arrow).schema
    assert schema.names == COLUMNS
    token, moment = pa.dictionary(pa.int8(), pa.string()), pa.timestamp("ms", "UTC")
    for name, wanted in {
        "id": pa.string(),
        "kind": token,
        "status": token,
        "created_at": moment,
        "finished_at": moment,
        "run_after": moment,
        "progress": pa.int16(),
        "exclusive": pa.bool_(),
        "spec_json": pa.large_string(),
        "retry_of": pa.string(),
    }.items():
        assert schema.field(name).type == wanted, name
    assert not schema.field("id").nullable
    assert schema.field("finished_at").nullable


def test_an_empty_answer_has_the_same_columns(backend: Backend) -> None:
    empty = backend.run(to_arrow)
    spread = backend.run(partial(to_arrow, spread=("spec", "metrics")))
    batches = backend.run(lambda session: arrow_batches(session, spread=("metrics",)).read_all())
    backend.run(_add)
    assert empty.schema == spread.schema == batches.schema == backend.run(to_arrow).schema
    assert len(empty) == len(batches) == 0
    assert len(backend.run(partial(to_arrow, status="queued", target="nobody"))) == 0


def test_metrics_are_spread_into_columns_of_their_types(backend: Backend) -> None:
    held = backend.run(_add)
    table = backend.run(partial(to_arrow, spread=("metrics",)))
    types = {
        "f1": pa.float64(),
        "rows": pa.float64(),
        "note": pa.large_string(),
        "ok": pa.bool_(),
        "mixed": pa.large_string(),
        "deep": pa.large_string(),
        "none": pa.null(),
        "big": pa.float64(),
        "late": pa.float64(),
        "a.b": pa.float64(),
        "": pa.float64(),
    }
    assert set(table.schema.names) - set(COLUMNS) == {f"metrics.{key}" for key in types}
    rows = _by_id(table)
    for key, wanted in types.items():
        assert table.schema.field(f"metrics.{key}").type == wanted, key
        for job, metrics in zip(held, METRICS, strict=False):
            value = metrics.get(key) if isinstance(metrics, dict) else None
            if key in ("mixed", "deep") and value is not None:
                value = json.dumps(value, separators=(",", ":"))
            assert rows[job["id"]][f"metrics.{key}"] == value, key
    assert rows[held[4]["id"]]["metrics_json"] == "[1,2]"


def test_the_reader_gives_the_same_in_batches(backend: Backend) -> None:
    backend.run(_add)
    options: dict[str, Any] = {"columns": ["id", "status", "finished_at"], "spread": ["metrics", "spec"]}

    def read(session: Session) -> tuple[pa.Table, list[int]]:
        reader = arrow_batches(session, batch=3, **options)
        batches = list(reader)
        return pa.Table.from_batches(batches, reader.schema), [len(batch) for batch in batches]

    table, sizes = backend.run(read)
    whole = backend.run(partial(to_arrow, **options))
    assert sizes == [3, 3, 2]
    assert table.schema.names[:3] == ["id", "status", "finished_at"]
    assert set(table.schema.names) == set(whole.schema.names)
    names = table.schema.names
    assert _by_id(table.select(names)) == _by_id(whole.select(names))


def test_a_reader_that_is_left_early_frees_its_connection(backend: Backend) -> None:
    backend.run(_add)

    def read(session: Session) -> int:
        with reader_of(session, batch=1) as reader:
            first = len(reader.read_next_batch())
        return first + len(to_arrow(session))

    assert backend.run(read) == 1 + len(METRICS) + 1


def test_the_stores_have_it_too(backend: Backend) -> None:
    store = backend.store()
    job = store.submit("train", "spam", {"lr": 0.1})
    store.submit("train", "ham")
    store.complete(store.claim_one(job, worker="w"), {"f1": 0.5})
    table = store.to_arrow(status="completed", spread=("metrics",))
    assert table.column("metrics.f1").to_pylist() == [0.5]
    assert table.column("id").to_pylist() == [str(job.id)]
    if not backend.is_async:
        with store.arrow_batches(batch=1, spread=("metrics",)) as reader:
            assert sum(len(batch) for batch in reader) == 2
        with store.arrow_batches(batch=1) as reader:
            reader.read_next_batch()
        assert store.get(job).status is MlJobStatus.COMPLETED


def test_a_reader_of_a_store_sees_one_state_from_beginning_to_end(url: str) -> None:
    with JobStore(url) as store, JobStore(url) as other:
        job = store.submit("train", "spam")
        with store.arrow_batches(spread=("metrics",)) as reader:
            other.complete(other.claim_one(job, worker="w"), {"f1": 0.5})
            table = reader.read_all()
        assert table.column("status").to_pylist() == ["queued"]
        assert "metrics.f1" not in table.schema.names


def test_a_key_that_comes_between_the_two_readings_is_refused_not_lost(postgres_url: str) -> None:
    with JobStore(postgres_url) as store, JobStore(postgres_url) as other:
        job = store.submit("train", "spam")
        with store.connect() as bind:
            reader = arrow_batches(bind, spread=("metrics",))
            other.complete(other.claim_one(job, worker="w"), {"f1": 0.5})
            with pytest.raises(InvalidValueError, match=r"metrics\.f1.*REPEATABLE READ"):
                reader.read_all()


def test_ids_may_be_arrows_own_uuids(backend: Backend) -> None:
    held = backend.run(_add)
    table = backend.run(partial(to_arrow, ids="uuid", columns=("id", "retry_of")))
    assert table.schema.field("id").type == pa.uuid()
    assert {row["id"]: row["retry_of"] for row in table.to_pylist()} == {job["id"]: job["retry_of"] for job in held}


def test_what_is_asked_wrongly_is_named(engine: Engine) -> None:
    for options, message in [
        ({"columns": ["nothing"]}, "'columns' cannot be 'nothing'"),
        ({"columns": ["id", "id"]}, "once at most"),
        ({"columns": []}, "'columns' cannot be .*expected at least one"),
        ({"nothing": 1}, "'nothing' cannot be 1: no such filter; there are kind, "),
        ({"spread": ["spec_json"]}, "'spread' cannot be 'spec_json'"),
        ({"ids": "int"}, "'string' or 'uuid'"),
        ({"status": "done"}, "expected one of queued"),
        ({"model": int}, "mapped class"),
    ]:
        with case(options), Session(engine) as session:
            with pytest.raises(InvalidValueError, match=message):
                to_arrow(session, **options)
            with pytest.raises(InvalidValueError, match=r"batch.*expected an int"):
                arrow_batches(session, batch=0)


def test_objects_whose_keys_are_data_are_not_spread_without_end(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(MlJob(kind="train", target_name="spam", metrics={str(at): at for at in range(1001)}))
        with pytest.raises(InvalidValueError, match="more than 1,000 keys"):
            to_arrow(session, spread=("metrics",))


def test_a_text_that_no_column_can_hold_stays_json(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(MlJob(kind="train", target_name="spam"))
        session.flush()
        # The record and the guard refuse it; a superuser, or an editor of the file, can have written it all the same.
        off = "SET LOCAL session_replication_role = replica"
        session.execute(text(off if engine.dialect.name == "postgresql" else "PRAGMA ignore_check_constraints = ON"))
        json_type = "json" if engine.dialect.name == "postgresql" else "text"
        statement = text(f"UPDATE ml_jobs SET metrics_json = CAST(:metrics AS {json_type})")
        session.execute(statement, {"metrics": '{"a":"\\ud800","b":1e999,"c":"\\u00e9"}'})
        (row,) = to_arrow(session, spread=("metrics",)).to_pylist()
    assert (row["metrics.a"], row["metrics.b"], row["metrics.c"]) == ('"\\ud800"', float("inf"), "\u00e9")


def test_a_hosts_own_table_is_read_with_its_kinds_and_columns(engine: Engine) -> None:
    HostBase.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(TrainingRun(kind="train", target_name="spam", note="theirs", team=Team()))
        session.flush()
        table = to_arrow(session, model=TrainingRun)
    assert table.column("kind").to_pylist() == ["train"]
    assert table.schema.names == [*COLUMNS, "flavour", "note", "team_id"]
    (row,) = table.select(["note", "flavour"]).to_pylist()
    assert row == {"note": "theirs", "flavour": "run"}


def test_data_frames_read_the_types(engine: Engine) -> None:
    import polars as pl

    with Session(engine) as session:
        held = _add(session)
        table = to_arrow(session, spread=("metrics",))
    pandas = table.to_pandas()
    assert str(pandas["status"].dtype) == "category"
    assert str(pandas["created_at"].dtype) == "datetime64[ms, UTC]"
    assert pandas["metrics.f1"].max() == 2.5
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    assert frame.schema["created_at"] == pl.Datetime("ms", "UTC")
    assert frame.schema["status"] in (pl.Categorical, pl.Enum([status.value for status in MlJobStatus]))
    assert frame.filter(pl.col("metrics.f1") > 1).height == 1
    jobs = table  # noqa: F841 - DuckDB finds it by its name
    assert duckdb.sql("SELECT max(\"metrics.f1\"), count(*) FROM jobs WHERE status = 'completed'").fetchall() == [
        (2.5, len(held) - 1)
    ]
