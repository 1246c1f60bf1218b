"""Each error is what it should be over HTTP, in every framework, and says what a client may know."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import mljobs
from mljobs import (
    AmbiguousIdError,
    FilterError,
    GiveUp,
    InvalidTransitionError,
    InvalidValueError,
    JobCancelled,
    JobDecodeError,
    JobExistsError,
    JobHeldError,
    JobNotFound,
    LeaseLostError,
    MlJob,
    MlJobsError,
    MlJobStatus,
    ModelError,
    SchemaError,
    StartRefusedError,
    TargetLockedError,
    TerminalStateError,
    TransferError,
    WaitTimeout,
)
from mljobs.contrib.problems import MEANINGS, MEDIA_TYPE, body_of, problem, schema, status_of
from tests.cases import case

JOB = UUID("0199f3c2-0000-7000-8000-000000000001")
MOMENT = datetime(2026, 11, 23, 20, 14, 5, 7000, tzinfo=UTC)
RUNNING = MlJobStatus.RUNNING
EXAMPLES: list[tuple[MlJobsError, int, dict[str, Any]]] = [
    (MlJobsError("boom"), 500, {}),
    (
        InvalidValueError("progress", 101, "expected 0 to 100"),
        422,
        {"field": "progress", "value": 101, "reason": "expected 0 to 100"},
    ),
    (JobDecodeError("status", "unknown token"), 422, {"field": "status", "reason": "unknown token"}),
    (
        FilterError("kind:x", 0, "kind:x", "unknown kind"),
        422,
        {"field": "filter", "value": "kind:x", "reason": "unknown kind", "position": 0, "word": "kind:x"},
    ),
    (
        AmbiguousIdError("01", [JOB, JOB]),
        422,
        {"field": "id", "value": "01", "reason": AmbiguousIdError("01", [JOB, JOB]).reason},
    ),
    (JobNotFound(JOB), 404, {"job_id": str(JOB)}),
    (
        TerminalStateError(JOB, MlJobStatus.COMPLETED, MOMENT, {"progress": (100, 50)}),
        409,
        {
            "job_id": str(JOB),
            "job_status": "completed",
            "finished_at": "2026-11-23T20:14:05.007Z",
            "changes": {"progress": {"from": 100, "to": 50}},
        },
    ),
    (TerminalStateError(), 409, {}),
    (
        InvalidTransitionError(JOB, MlJobStatus.QUEUED, MlJobStatus.COMPLETED),
        409,
        {"job_id": str(JOB), "job_status": "queued", "wanted_status": "completed"},
    ),
    (StartRefusedError(JOB, "no such member", "role"), 500, {"job_id": str(JOB), "column": "role"}),
    (TargetLockedError(JOB), 409, {"job_id": str(JOB)}),
    (JobExistsError(JOB, "line 12"), 409, {"job_id": str(JOB), "place": "line 12"}),
    (
        JobHeldError(JOB, "w1", MOMENT),
        409,
        {"job_id": str(JOB), "worker": "w1", "expires_at": "2026-11-23T20:14:05.007Z"},
    ),
    (LeaseLostError(JOB, 7), 409, {"job_id": str(JOB), "token": 7}),
    (GiveUp("C must be positive"), 422, {}),
    (JobCancelled(JOB), 409, {"job_id": str(JOB)}),
    (WaitTimeout(JOB, 2.5, RUNNING), 504, {"job_id": str(JOB), "timeout_seconds": 2.5, "job_status": "running"}),
    (ModelError(int, "it has no table"), 500, {}),
    (TransferError("jobs.ndjson", "no space left on device", 7), 500, {}),
    (SchemaError("no table ml_jobs", ["column spec_json is text"]), 503, {}),
]
MEMBERS = {"type", "title", "status", "detail"}


def _of_ours(kind: type[MlJobsError]) -> Iterator[type[MlJobsError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__.startswith("mljobs."):
            yield from _of_ours(child)


def _with_errors() -> set[str]:
    """Return the modules that define errors of ours. To import all modules would load every framework there is."""
    root = Path(mljobs.__file__).parent
    classes = [
        (path.relative_to(root.parent).with_suffix("").as_posix().replace("/", "."), name, re.findall(r"\w+", bases))
        for path in root.rglob("*.py")
        for name, bases in re.findall(r"^ *class (\w+)\(([^)]*)\)", path.read_text(), re.MULTILINE)
    ]
    ours = {"MlJobsError"}
    while more := {name for _, name, bases in classes if ours & set(bases)} - ours:
        ours |= more
    return {module for module, name, _ in classes if name in ours}


def test_every_error_of_the_package_has_a_line_of_its_own_and_an_example_here() -> None:
    for module in _with_errors():
        import_module(module)
    found = set(_of_ours(MlJobsError))
    assert found == set(MEANINGS), "give each error a line in mljobs/problems.py, with its status and why"
    assert found == {type(error) for error, _, _ in EXAMPLES}
    assert len({meaning.name for meaning in MEANINGS.values()}) == len(MEANINGS)
    assert all(meaning.why and meaning.title for meaning in MEANINGS.values())


@pytest.mark.parametrize(("error", "status", "data"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_a_problem_has_the_members_of_the_rfc_and_the_data_of_the_error(
    error: MlJobsError, status: int, data: dict[str, Any]
) -> None:
    found = json.loads(body_of(error, instance="/jobs/1"))
    assert found == problem(error, instance="/jobs/1")
    assert found["status"] == status == status_of(error) == status_of(type(error))
    assert found["type"].startswith("urn:mljobs:")
    assert found.pop("instance") == "/jobs/1"
    assert set(found) == MEMBERS | set(data)
    assert {name: found[name] for name in data} == data
    if status < 500 or status == 504:
        assert found["detail"] == str(error)
    assert set(schema()["required"]) <= set(found)


def test_an_error_that_a_host_derives_is_what_its_parent_is() -> None:
    class OutOfQuota(InvalidValueError):
        """Of the host."""

    assert status_of(OutOfQuota) == 422
    assert problem(OutOfQuota("gpus", 9, "you have 4"))["field"] == "gpus"


def test_what_the_application_did_wrong_is_no_fault_of_the_client_and_no_secret_leaves() -> None:
    for error in (
        InvalidValueError("url", "postgresql://me:hunter2@db/x", "not a database URL"),
        InvalidValueError("session", object(), "expected a Session"),
        SchemaError("table hunter2 is missing", ["hunter2"]),
        MlJobsError("hunter2"),
    ):
        body = body_of(error).decode()
        assert "hunter2" not in body
        assert json.loads(body)["status"] in (500, 503)
        assert set(json.loads(body)) == MEMBERS


def test_the_applications_own_faults_are_logged_and_the_clients_are_not(caplog: pytest.LogCaptureFixture) -> None:
    body_of(JobNotFound(JOB), instance="/x")
    assert not caplog.records
    body_of(SchemaError("no table ml_jobs"), instance="/x")
    assert "no table ml_jobs" in caplog.text
    assert "/x" in caplog.text


@pytest.mark.parametrize(
    "value",
    [
        "\ud800",
        "x" * 100_000,
        float("nan"),
        float("inf"),
        {1, 2},
        b"\xff",
        object(),
        None,
        [1],
        {"lr": {1, 2}},
        {},
        MOMENT,
        RUNNING,
        10**30,
        2.5,
    ],
)
def test_whatever_value_was_refused_the_problem_is_valid_json_and_short(value: object) -> None:
    body = body_of(InvalidValueError("spec", value, "no"), instance="/\udcff")
    json.loads(body, parse_constant=pytest.fail)
    body.decode("utf-8")
    assert len(body) < 3000


# ------------------------------------------------------------------------------------------------------ in frameworks


Answer = tuple[int, str, bytes]
Ask = Callable[[], Answer]


@contextmanager
def _starlette(raises: Callable[[], Any]) -> Iterator[Ask]:
    from starlette.applications import Starlette
    from starlette.routing import Route
    from starlette.testclient import TestClient

    from mljobs.contrib.starlette import install

    app = Starlette(routes=[Route("/fail", lambda _request: raises())])
    install(app)
    with TestClient(app) as client:
        yield lambda: _answer(client.get("/fail"))


@contextmanager
def _fastapi(raises: Callable[[], Any]) -> Iterator[Ask]:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from mljobs.contrib.fastapi import install

    app = FastAPI()
    install(app)

    @app.get("/fail")
    def fail() -> None:
        raises()

    with TestClient(app) as client:
        yield lambda: _answer(client.get("/fail"))


@contextmanager
def _flask(raises: Callable[[], Any]) -> Iterator[Ask]:
    from flask import Flask

    from mljobs.contrib.flask import install

    app = Flask("app")
    install(app)

    @app.get("/fail")
    def fail() -> None:
        raises()

    def ask() -> Answer:
        response = app.test_client().get("/fail")
        return response.status_code, response.headers["content-type"], response.data

    yield ask


@contextmanager
def _litestar(raises: Callable[[], Any]) -> Iterator[Ask]:
    from litestar import Litestar, get
    from litestar.testing import TestClient

    from mljobs.contrib.litestar import MlJobsPlugin

    @get("/fail", sync_to_thread=False)
    def fail() -> None:
        raises()

    with TestClient(Litestar([fail], plugins=[MlJobsPlugin()])) as client:
        yield lambda: _answer(client.get("/fail"))


def _answer(response: Any) -> Answer:
    return response.status_code, response.headers["content-type"], response.content


FRAMEWORKS = {"starlette": _starlette, "fastapi": _fastapi, "flask": _flask, "litestar": _litestar}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_framework_answers_an_error_with_its_status_and_its_problem(framework: str) -> None:
    errors = [error for error, _, _ in EXAMPLES]
    each = iter(errors)

    def raises() -> None:
        raise next(each)

    with FRAMEWORKS[framework](raises) as ask:
        for error in errors:
            with case(error):
                status, content_type, body = ask()
                assert status == status_of(error)
                assert content_type == MEDIA_TYPE
                assert json.loads(body) == problem(error, instance="/fail")


def test_openapi_tells_of_problems() -> None:
    from fastapi import FastAPI

    from mljobs.contrib.fastapi import responses
    from mljobs.contrib.pydantic import MlJobRead

    app = FastAPI()

    @app.get("/jobs/{job_id}", response_model=MlJobRead, responses=responses(404, 409, 418))
    def read(job_id: UUID) -> MlJob:
        raise NotImplementedError

    told = app.openapi()["paths"]["/jobs/{job_id}"]["get"]["responses"]
    assert told["404"]["description"] == "No such job"
    assert told["409"]["content"][MEDIA_TYPE]["schema"] == schema()
    assert told["418"]["description"] == "I'm a Teapot"


def test_a_websocket_is_refused_before_it_is_accepted_and_closed_after() -> None:
    from starlette.applications import Starlette
    from starlette.routing import WebSocketRoute
    from starlette.testclient import TestClient, WebSocketDenialResponse
    from starlette.websockets import WebSocket, WebSocketDisconnect

    from mljobs.contrib.starlette import install

    async def before(_websocket: WebSocket) -> None:
        raise JobNotFound(UUID(int=1))

    async def after(websocket: WebSocket) -> None:
        await websocket.accept()
        if websocket.path_params["what"] == "job":
            raise JobNotFound(UUID(int=1))
        raise SchemaError("a table is missing")

    app = Starlette(routes=[WebSocketRoute("/before", before), WebSocketRoute("/after/{what}", after)])
    install(app)
    client = TestClient(app)
    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/before"):
        pass
    assert refused.value.status_code == 404
    for what, code, reason in (("job", 1008, "job-not-found"), ("schema", 1011, "database-not-ready")):
        with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect(f"/after/{what}") as socket:
            socket.receive_text()
        assert (closed.value.code, closed.value.reason) == (code, f"urn:mljobs:{reason}")


def test_a_number_too_large_to_be_written_is_shortened_in_the_error() -> None:
    error = InvalidValueError("priority", 10**5000, "too large")
    assert problem(error)["value"] == json.loads(body_of(error))["value"] == "<int>"
