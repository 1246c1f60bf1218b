"""``MlJobRead`` shows any record that the database can hold, as JSON that anybody can read."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy import Engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session

from mljobs import MlJob, MlJobMixin, kind_column
from mljobs._values import from_millis
from mljobs.contrib.pydantic import MlJobRead


class Kind(StrEnum):
    TUNE = "tune"


class Base(DeclarativeBase):
    pass


class Run(MlJobMixin, Base):
    __tablename__ = "runs"
    kind: Mapped[Kind] = kind_column(Kind)
    owner: Mapped[str]


class RunRead(MlJobRead):
    kind: Kind
    owner: str


MOMENT = datetime(2026, 11, 24, 13, 12, 56, 41_000, tzinfo=UTC)


def _full() -> MlJob:
    return MlJob(
        kind="train",
        target_name="spam",
        spec={"lr": 0.1},
        status="failed",
        progress=40,
        created_at=MOMENT,
        started_at=MOMENT + timedelta(seconds=1),
        finished_at=MOMENT + timedelta(seconds=3, milliseconds=5),
        error_message="boom",
        metrics={"f1": 0.5},
        attempts=2,
        priority=-3,
        run_after=MOMENT,
        exclusive=True,
        retry_of=7,
        worker="gpu-1",
    )


def test_every_field_is_shown_times_as_iso_utc_and_milliseconds_json_parsed() -> None:
    job = _full()
    shown = json.loads(MlJobRead.model_validate(job).model_dump_json())
    assert shown == {
        "id": str(job.id),
        "kind": "train",
        "target_name": "spam",
        "status": "failed",
        "is_terminal": True,
        "progress": 40,
        "created_at": "2026-11-24T13:12:56.041Z",
        "started_at": "2026-11-24T13:12:57.041Z",
        "finished_at": "2026-11-24T13:12:59.046Z",
        "created_at_ms": 1795525976041,
        "started_at_ms": 1795525977041,
        "finished_at_ms": 1795525979046,
        "duration_ms": 2005,
        "error_message": "boom",
        "spec": {"lr": 0.1},
        "metrics": {"f1": 0.5},
        "attempts": 2,
        "priority": -3,
        "run_after": "2026-11-24T13:12:56.041Z",
        "exclusive": True,
        "retry_of": "00000000-0000-0000-0000-000000000007",
        "worker": "gpu-1",
    }
    assert set(shown) >= {column.key for column in MlJob.__table__.c} - {"spec_json", "metrics_json", "lease"}


def test_what_is_shown_can_be_read_back(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(_full())
        session.commit()
        read = MlJobRead.model_validate(session.query(MlJob).one())
    assert MlJobRead.model_validate_json(read.model_dump_json()) == read
    assert MlJobRead.model_validate(read.model_dump()) == read
    with pytest.raises(ValidationError):
        read.progress = 3


def test_a_time_in_another_zone_is_shown_in_utc() -> None:
    read = MlJobRead.model_validate(_full())
    moved = read.model_copy(update={"created_at": MOMENT.astimezone(timezone(timedelta(hours=5)))})
    assert json.loads(moved.model_dump_json())["created_at"] == "2026-11-24T13:12:56.041Z"
    with pytest.raises(ValidationError, match="timezone"):
        MlJobRead.model_validate({**read.model_dump(), "created_at": datetime(2026, 1, 1)})


def test_a_host_adds_its_kinds_and_columns_by_inheritance() -> None:
    run = Run(kind="tune", target_name="x", owner="me")
    read = RunRead.model_validate(run)
    assert (read.kind, read.owner, read.status) == (Kind.TUNE, "me", "queued")
    assert MlJobRead.model_validate(run).kind == "tune"
    assert RunRead.model_json_schema()["title"] == "RunRead"


def test_the_schema_is_fit_for_openapi() -> None:
    schema = MlJobRead.model_json_schema(mode="serialization")
    fields = schema["properties"]
    assert schema["$defs"]["MlJobStatus"]["enum"] == ["queued", "running", "completed", "failed", "cancelled"]
    assert fields["id"]["format"] == "uuid"
    assert (fields["created_at"]["type"], fields["created_at"]["format"]) == ("string", "date-time")
    assert {branch.get("format", branch["type"]) for branch in fields["finished_at"]["anyOf"]} == {"date-time", "null"}
    assert fields["created_at_ms"]["type"] == "integer"
    assert (fields["progress"]["minimum"], fields["progress"]["maximum"]) == (0, 100)
    assert "type" not in fields["spec"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(value=json_values, millis=st.integers(0, 253_402_300_799_999))
def test_any_record_is_shown_as_json_in_utf8(value: Any, millis: int) -> None:
    job = MlJob(kind="train", target_name="x", spec_json=json.dumps(value), created_at=from_millis(millis))
    body = MlJobRead.model_validate(job).model_dump_json().encode()
    shown = json.loads(body, parse_constant=pytest.fail)
    assert shown["created_at_ms"] == millis
    assert datetime.fromisoformat(shown["created_at"]) == from_millis(millis)
    if not any("\ud800" <= letter <= "\udfff" for letter in json.dumps(value, ensure_ascii=False)):
        assert shown["spec"] == value


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('"\\ud800"', "?"),
        ('{"\\udfff":["\\ud83d\\ude00"]}', {"?": ["\N{GRINNING FACE}"]}),
        ("1e999", None),
        ("[-1e999, 1]", [None, 1]),
        ('{"a":1,"a":2}', {"a": 2}),
        (str(10**40), 10**40),
    ],
)
def test_json_text_that_no_answer_could_hold_does_not_make_the_answer_fail(text: str, shown: Any) -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    app = FastAPI()

    @app.get("/", response_model=MlJobRead)
    def read() -> MlJob:
        return MlJob(kind="train", target_name="x", spec_json=text)

    response = TestClient(app).get("/")
    assert response.status_code == 200
    assert response.json()["spec"] == shown


def test_without_pydantic_the_error_names_the_extra() -> None:
    code = "import sys; sys.modules['pydantic'] = None; import mljobs.contrib.pydantic"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'mljobs[web]'" in done.stderr.splitlines()[-1]
