"""Values at the edges: what each field takes, refuses and turns into, and errors that keep their data."""

from __future__ import annotations

import copy
import pickle
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import insert, literal, select
from sqlalchemy.orm import Session

from mljobs import (
    InvalidTransitionError,
    InvalidValueError,
    JobCancelled,
    JobDecodeError,
    JobNotFound,
    LeaseLostError,
    MlJob,
    MlJobKind,
    MlJobStatus,
    SchemaError,
    TargetLockedError,
    TerminalStateError,
    WaitTimeout,
)
from mljobs._values import from_json_text, from_millis, to_job_id, to_millis, to_utc
from mljobs.errors import shown

ID = UUID("0199f3c2-0000-7000-8000-000000000001")


class Index:
    """A number as NumPy has them."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number


class Array:
    """An array as NumPy has them."""

    def tolist(self) -> list[float]:
        return [0.5, 1.5]


@pytest.mark.parametrize("given", [ID, ID.int, ID.hex, ID.hex.upper(), str(ID), type("U", (UUID,), {})(int=ID.int)])
def test_an_id_is_taken_in_every_form(given: Any) -> None:
    job = MlJob(kind="train", target_name="x", id=given, retry_of=given)
    assert job.id == job.retry_of == ID
    assert type(job.id) is UUID
    assert job.kv_key == ID.hex


@pytest.mark.parametrize(
    "given",
    [
        -1,
        1 << 128,
        "",
        "0x" + "0" * 30,
        "g" * 32,
        ID.hex[:-1],
        "\N{ARABIC-INDIC DIGIT ZERO}" * 32,
        True,
        1.0,
        None,
        b"x",
    ],
)
def test_what_is_no_id_is_refused(given: Any) -> None:
    with pytest.raises(InvalidValueError) as caught:
        to_job_id(given)
    assert caught.value.field == "id"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("exclusive", 1),
        ("progress", 50.0),
        ("progress", True),
        ("progress", "50"),
        ("attempts", -1),
        ("attempts", 32_768),
        ("priority", 40_000),
        ("target_name", None),
        ("error_message", 5),
        ("metrics_json", {}),
        ("spec_json", None),
        ("created_at", None),
        ("created_at", "2026-01-01"),
        ("finished_at", datetime(1969, 12, 31, tzinfo=UTC)),
        ("run_after", datetime.min.replace(tzinfo=timezone(timedelta(hours=14)))),
        ("kind", None),
        ("status", 5),
        ("spec", {1: {2}}),
        ("metrics", "\ud800"),
    ],
)
def test_a_wrong_value_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidValueError) as caught:
        MlJob(**{"kind": "train", "target_name": "x", field: value})
    assert caught.value.field == field
    assert field in str(caught.value)


def test_numbers_and_arrays_of_other_libraries_are_taken() -> None:
    job = MlJob(kind="train", target_name="x", progress=Index(40), spec={"grid": Array()})
    assert (job.progress, type(job.progress), job.spec) == (40, int, {"grid": [0.5, 1.5]})


def test_a_field_and_its_text_are_not_given_both() -> None:
    with pytest.raises(InvalidValueError, match="not both"):
        MlJob(kind="train", target_name="x", spec={}, spec_json="{}")


@pytest.mark.parametrize("missing", ["kind", "target_name"])
def test_what_every_job_has_is_asked_for_at_the_flush(engine: Any, missing: str) -> None:
    values = {"kind": "train", "target_name": "x"}
    del values[missing]
    with Session(engine) as session, pytest.raises(InvalidValueError) as caught:
        session.add(MlJob(**values))
        session.flush()
    assert caught.value.field == missing


def test_times_are_floored_to_the_millisecond_and_kept_in_utc(engine: Any) -> None:
    given = datetime(2026, 1, 2, 3, 4, 5, 999_999, tzinfo=timezone(timedelta(hours=5)))
    job = MlJob(kind="train", target_name="x", created_at=given, run_after=given)
    with Session(engine) as session, session.begin():
        session.add(job)
        session.flush()
        session.expire(job)
        assert job.created_at == job.run_after == datetime(2026, 1, 1, 22, 4, 5, 999_000, tzinfo=UTC)
        assert session.scalars(select(MlJob.created_at_ms)).one() == to_millis(job.created_at) == job.created_at_ms


@pytest.mark.parametrize("millis", [0, 1, 999, 1_764_000_000_001, 253_402_300_799_999])
def test_milliseconds_go_round_exactly(millis: int) -> None:
    assert to_millis(from_millis(millis)) == millis


def test_a_duration_needs_both_ends_in_order() -> None:
    now = datetime.now(UTC)
    job = MlJob(kind="train", target_name="x")
    assert (job.duration_ms, job.started_at_ms, job.finished_at_ms) == (None, 0, 0)
    job.started_at, job.finished_at = now, now - timedelta(seconds=1)
    assert job.duration_ms is None
    job.finished_at = now + timedelta(seconds=1)
    assert job.duration_ms == 1000


def test_text_that_is_not_json_is_an_error_when_it_is_read() -> None:
    job = MlJob(kind="train", target_name="x", spec_json="{", metrics_json="NaN")
    for field in ("spec", "metrics"):
        with pytest.raises(InvalidValueError, match="not JSON"):
            getattr(job, field)
    job.metrics = None
    assert job.metrics_json is None
    assert job.metrics is None
    assert from_json_text("spec_json", None) is None


def test_core_binds_are_checked_too(engine: Any) -> None:
    with engine.connect() as connection:
        for values in (
            {"kind": "nope"},
            {"spec_json": "{"},
            {"target_name": "\x00"},
            {"created_at": datetime(2026, 1, 1)},
        ):
            with pytest.raises(InvalidValueError):
                connection.execute(
                    insert(MlJob).values({"kind": "train", "target_name": "x", "spec_json": "{}"} | values)
                )
        assert (
            connection.execute(select(literal(MlJobKind.TRAIN, MlJob.__table__.c.kind.type))).scalar()
            is MlJobKind.TRAIN
        )


def test_literals_are_rendered_as_the_types_store_them(engine: Any) -> None:
    statement = select(MlJob.id).where(MlJob.kind == "train", MlJob.id == ID, MlJob.target_name == "x'y")
    text = str(statement.compile(engine, compile_kwargs={"literal_binds": True}))
    assert "'train'" in text
    assert "'x''y'" in text


def test_a_wrong_status_is_an_error_that_lists_the_right_ones() -> None:
    assert MlJobKind.from_token("train") is MlJobKind.TRAIN
    assert MlJobStatus.COMPLETED.token == "completed"
    for text in ("Train", " train", "", "trains"):
        with pytest.raises(ValueError, match="train, backfill, feature_refresh, drift_compute"):
            MlJobKind.from_token(text)
    with pytest.raises(InvalidTransitionError):
        MlJob(kind="train", target_name="x").complete()
    with pytest.raises(InvalidValueError):
        MlJob(kind="train", target_name="x").fail(5)  # type: ignore[arg-type]


def test_a_job_copies_pickles_and_shows_itself() -> None:
    job = MlJob(kind="train", target_name="spam", spec={"a": 1})
    for other in (copy.copy(job), copy.deepcopy(job), pickle.loads(pickle.dumps(job))):
        assert other.to_json() == job.to_json()
    assert repr(job) == f"<MlJob {job.id} train queued spam 0%>"


def test_a_naive_time_says_what_to_use() -> None:
    with pytest.raises(InvalidValueError, match=r"timezone\.utc"):
        to_utc("run_after", datetime(2026, 1, 1))


ERRORS = [
    InvalidValueError("progress", 101, "expected 0 to 100"),
    JobDecodeError("status", "unknown token"),
    JobDecodeError(None, "not an object"),
    JobNotFound(ID),
    TerminalStateError(ID, MlJobStatus.FAILED, datetime.now(UTC), {"progress": (1, 2)}),
    TerminalStateError(),
    InvalidTransitionError(ID, MlJobStatus.QUEUED, MlJobStatus.COMPLETED),
    InvalidTransitionError(),
    LeaseLostError(ID, 7),
    TargetLockedError(ID),
    JobCancelled(ID),
    WaitTimeout(ID, 5.0, MlJobStatus.RUNNING),
    SchemaError("not what is expected", ["table x is missing"]),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_the_way_to_another_process(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__


def test_a_value_that_cannot_show_itself_does_not_hide_the_error() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    assert shown(Broken()) == "<Broken>"
    assert len(shown("x" * 1000)) == 80
