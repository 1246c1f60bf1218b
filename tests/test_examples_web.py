"""The example applications do what their users would have them do, on SQLite and PostgreSQL."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import JobStore, MlJob, jobs
from mljobs.contrib.problems import MEDIA_TYPE
from mljobs.db._engines import async_url
from tests.cases import case
from tests.fork_server import ForkServer
from tests.waiting import until

ROOT = Path(__file__).parent.parent
SITE = ROOT / "examples" / "django_asgi"


@contextmanager
def _fastapi_sync(url: str) -> Iterator[Any]:
    from fastapi.testclient import TestClient

    from examples.fastapi_app.sync_app import create_app

    with TestClient(create_app(url)) as client:
        yield client


@contextmanager
def _fastapi_async(url: str) -> Iterator[Any]:
    from fastapi.testclient import TestClient

    from examples.fastapi_app.async_app import create_app

    with TestClient(create_app(async_url(url).render_as_string(hide_password=False), poll=0.01)) as client:
        yield client


@contextmanager
def _flask(url: str) -> Iterator[Any]:
    import httpx

    from examples.flask_app.app import create_app, db

    app = create_app(url)
    with httpx.Client(transport=httpx.WSGITransport(app=app), base_url="http://testserver") as client:
        yield client
    with app.app_context():
        db.engine.dispose()


@contextmanager
def _litestar(url: str) -> Iterator[Any]:
    from litestar.testing import TestClient

    from examples.litestar_app.app import create_app

    with TestClient(create_app(async_url(url).render_as_string(hide_password=False))) as client:
        yield client


@contextmanager
def _django(url: str, python: ForkServer, log: Path) -> Iterator[Any]:
    """Django has one set of settings in a process, so it gets a process of its own: migrated and served as in its README."""
    import httpx

    done = python.run("manage.py", "migrate", "--verbosity", "0", cwd=SITE, env={"DATABASE_URL": url})
    assert done.returncode == 0, done.stderr
    with TemporaryDirectory() as directory:  # the path of a socket may have a hundred characters
        path = f"{directory}/socket"
        serving = ["-m", "uvicorn", "project.asgi:application", "--uds", path, "--log-level", "warning"]
        environment = {**os.environ, "DATABASE_URL": url, "POLL": "0.01"}
        server = python.start(*serving, cwd=SITE, env=environment, output=log)
        try:
            until(lambda: server.poll() is not None or _answers(path))
            assert server.poll() is None, log.read_text()
            with httpx.Client(
                transport=httpx.HTTPTransport(uds=path), base_url="http://localhost", timeout=30
            ) as client:
                yield client
        finally:
            server.send_signal(SIGTERM)
            server.wait(30)
            server.close()


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as asking:
        return asking.connect_ex(path) == 0


APPS = {"fastapi-sync": _fastapi_sync, "fastapi-async": _fastapi_async, "flask": _flask, "litestar": _litestar}


@pytest.fixture
def outside(empty_url: str) -> Iterator[JobStore]:
    """Another process on the same database."""
    with JobStore(empty_url) as store:
        yield store


def _upload(client: Any, path: str = "emails.csv") -> dict[str, Any]:
    response = client.post("/uploads", json={"path": path, "spec": {"lr": 0.1}})
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    return made


def _rows(store: JobStore) -> int:
    """Return how many uploads there are, and make sure that each has a job."""
    with store.connect() as bind:
        tables = set(inspect(bind).get_table_names())
        uploads = "uploads_upload" if "uploads_upload" in tables else "uploads"
        count = int(bind.execute(text(f"SELECT count(*) FROM {uploads}")).scalar_one())
    assert store.counts(exact=True).total() == count
    return count


def a_job_is_submitted_with_its_business_row(client: Any, outside: JobStore) -> None:
    made = _upload(client)
    job = made["job"]
    assert (made["path"], job["status"], job["spec"], job["target_name"]) == (
        "emails.csv",
        "queued",
        {"lr": 0.1},
        "emails.csv",
    )
    assert outside.get(job["id"]).spec == {"lr": 0.1}
    assert _rows(outside) == 1


def a_job_that_is_refused_takes_its_business_row_along(client: Any, outside: JobStore) -> None:
    before = _rows(outside)
    response = client.post("/uploads", json={"path": "a\x00b", "spec": {}})  # no text of PostgreSQL or ours
    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.json()["field"] == "target_name"
    assert _rows(outside) == before


def progress_and_outcome_are_read_as_the_worker_writes_them(client: Any, outside: JobStore) -> None:
    job_id = _upload(client)["job"]["id"]
    claim = outside.claim_one(job_id, worker="w")
    outside.set_progress(claim, 40)
    seen = client.get(f"/jobs/{job_id}").json()
    assert (seen["status"], seen["progress"], seen["is_terminal"], seen["finished_at"]) == ("running", 40, False, None)
    outside.complete(claim, {"f1": 0.93})
    seen = client.get(f"/jobs/{job_id}").json()
    assert (seen["status"], seen["progress"], seen["metrics"]) == ("completed", 100, {"f1": 0.93})
    assert seen["finished_at"].endswith("Z")
    assert seen["duration_ms"] == seen["finished_at_ms"] - seen["started_at_ms"]


def a_cancel_is_final_and_a_second_one_is_a_conflict(client: Any, outside: JobStore) -> None:
    job_id = _upload(client)["job"]["id"]
    response = client.post(f"/jobs/{job_id}/cancel")
    assert (response.status_code, response.json()["status"]) == (200, "cancelled")
    assert outside.get(job_id).status == "cancelled"
    response = client.post(f"/jobs/{job_id}/cancel")
    assert response.status_code == 409
    assert response.headers["content-type"] == MEDIA_TYPE
    problem = response.json()
    assert problem["type"] == "urn:mljobs:terminal-state"
    assert (problem["job_id"], problem["job_status"]) == (job_id, "cancelled")
    assert problem["instance"] == f"/jobs/{job_id}/cancel"


def a_job_that_does_not_exist_is_not_found(client: Any, _outside: JobStore) -> None:
    for response in (client.get(f"/jobs/{uuid4()}"), client.post(f"/jobs/{uuid4()}/cancel")):
        assert (response.status_code, response.json()["type"]) == (404, "urn:mljobs:job-not-found")


STORIES = [
    a_job_is_submitted_with_its_business_row,
    a_job_that_is_refused_takes_its_business_row_along,
    progress_and_outcome_are_read_as_the_worker_writes_them,
    a_cancel_is_final_and_a_second_one_is_a_conflict,
    a_job_that_does_not_exist_is_not_found,
]


@pytest.mark.parametrize("name", APPS)
def test_an_application_does_what_its_users_would_have_it_do(name: str, empty_url: str, outside: JobStore) -> None:
    with APPS[name](empty_url) as client:
        for story in STORIES:
            with case(story.__name__):
                story(client, outside)


def _progress_is_streamed(client: Any, outside: JobStore, stream: str) -> None:
    job_id = _upload(client)["job"]["id"]
    claim = outside.claim_one(job_id, worker="w")
    seen: list[tuple[str, int]] = []
    with client.stream("GET", stream.format(job_id)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if not line.startswith("data:"):
                continue
            job = json.loads(line.removeprefix("data:"))
            seen.append((job["status"], job["progress"]))
            if seen[-1] == ("running", 0):
                outside.set_progress(claim, 70)
            elif seen[-1] == ("running", 70):
                outside.complete(claim)
    assert seen == [("running", 0), ("running", 70), ("completed", 100)]
    missing = client.get(stream.format(uuid4()))
    assert (missing.status_code, missing.headers["content-type"]) == (404, MEDIA_TYPE)


# ------------------------------------------------------------------------------------------------------------- Django


def test_a_django_site_does_the_same_with_both_orms_in_one_transaction(
    empty_url: str, outside: JobStore, python: ForkServer, tmp_path: Path
) -> None:
    with _django(empty_url, python, tmp_path / "log") as client:
        for story in STORIES:
            with case(story.__name__):
                story(client, outside)
        _progress_is_streamed(client, outside, "/stream/{}")  # Starlette's, next to Django


def test_both_orms_share_djangos_transaction(empty_url: str, python: ForkServer) -> None:
    script = str(ROOT / "tests" / "django_transactions.py")
    done = python.run(script, cwd=SITE, env={"DATABASE_URL": empty_url})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 10, done.stdout


def test_the_django_sites_own_tests_pass_in_the_test_database_that_django_makes(
    empty_url: str, python: ForkServer
) -> None:
    if empty_url.startswith("sqlite"):  # once as somebody starts it, for then Django imports first
        environment = {**os.environ, "DATABASE_URL": empty_url, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "manage.py", "test"]
        done = subprocess.run(command, cwd=SITE, env=environment, capture_output=True, text=True, check=False)
    else:
        done = python.run("manage.py", "test", cwd=SITE, env={"DATABASE_URL": empty_url})
    assert done.returncode == 0, done.stderr
    assert "Ran 3 tests" in done.stderr


# ------------------------------------------------------------------------------------------------------------ FastAPI


def test_fastapi_streams_progress_until_the_job_has_finished(empty_url: str, outside: JobStore) -> None:
    with _fastapi_async(empty_url) as client:
        _progress_is_streamed(client, outside, "/jobs/{}/events")


def test_fastapi_answers_200_for_a_refused_commit_unless_the_dependency_has_function_scope(url: str) -> None:
    from fastapi.testclient import TestClient

    from examples.fastapi_app.trap import create_app

    engine = create_engine(url, poolclass=NullPool)
    store = JobStore(url)

    def meanwhile(job_id: UUID) -> None:
        store.cancel(job_id)

    client = TestClient(create_app(engine, meanwhile), raise_server_exceptions=False)
    trapped, safe = store.submit("train", "trapped"), store.submit("train", "safe")
    answer = client.post(f"/trapped/{trapped.id}")
    assert (answer.status_code, answer.json()) == (200, 50)  # the lie
    assert store.get(trapped.id).progress == 0
    answer = client.post(f"/safe/{safe.id}")
    assert (answer.status_code, answer.headers["content-type"]) == (409, MEDIA_TYPE)
    assert store.get(safe.id).progress == 0
    store.close()


def test_what_the_database_refuses_by_raw_sql_in_a_hosts_session_is_a_conflict_too(url: str) -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from mljobs.contrib.fastapi import install

    engine = create_engine(url, poolclass=NullPool)
    with Session(engine) as session, session.begin():
        job = jobs.submit(session, "train", "spam")
        job.cancel()
        digits = job.id.hex
    app = FastAPI()
    install(app)

    @app.post("/raw/{path}")
    def raw(path: str) -> None:
        with Session(engine) as session, session.begin():
            if path == "text":
                session.execute(text("UPDATE ml_jobs SET progress = 1"))
            elif path == "core":
                session.execute(MlJob.__table__.update().values(progress=1))
            else:
                session.connection().exec_driver_sql("DELETE FROM ml_jobs")

    client = TestClient(app)
    for path in ("text", "core", "driver"):
        response = client.post(f"/raw/{path}")
        assert (response.status_code, response.json()["type"]) == (409, "urn:mljobs:terminal-state"), response.text
        if engine.dialect.name == "postgresql":
            assert UUID(response.json()["job_id"]).hex == digits


# ----------------------------------------------------------------------------------------------------------- Litestar


def test_litestar_answers_201_for_a_refused_commit_unless_the_handler_commits(url: str) -> None:
    from litestar.testing import TestClient

    from examples.litestar_app.trap import create_app

    engine = create_engine(url, poolclass=NullPool)
    store = JobStore(url)

    def meanwhile(job_id: UUID) -> None:
        store.cancel(job_id)

    trapped, safe = store.submit("train", "trapped"), store.submit("train", "safe")
    with TestClient(create_app(engine, meanwhile)) as client:
        answer = client.post(f"/trapped/{trapped.id}")
        assert (answer.status_code, answer.json()) == (201, 50)  # the lie
        answer = client.post(f"/safe/{safe.id}")
        assert (answer.status_code, answer.headers["content-type"]) == (409, MEDIA_TYPE)
    assert [store.get(job.id).progress for job in (trapped, safe)] == [0, 0]
    store.close()
