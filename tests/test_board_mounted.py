"""The examples that mount the board do what they say, in each framework."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from starlette.testclient import TestClient

from mljobs import JobStore, MlJobStatus
from mljobs.board import Access, create_app
from mljobs.db._engines import async_url
from tests.boards import FORM, history
from tests.served import served

TEAM = {"X-Team": "ml"}


@contextmanager
def _client(name: str, url: str) -> Iterator[Any]:
    module = import_module(f"examples.board_mounted.{name}")
    app = module.create_app(async_url(url) if name == "fastapi_app" else url)
    if name == "flask_app":
        with httpx.Client(transport=httpx.WSGITransport(app=app), base_url="http://testserver") as client:
            yield client
        app.extensions["mljobs"].close()
    else:
        with TestClient(app, follow_redirects=False) as client:
            yield client


@pytest.mark.parametrize("name", ["fastapi_app", "litestar_app", "django_app", "flask_app"])
def test_the_board_works_where_it_is_mounted(name: str, sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        made = history(store)
        with _client(name, sqlite_url) as client:
            assert client.get("/").json() == {"board": "/jobs/"}
            page = client.get("/jobs/")
            assert page.status_code == 200
            assert 'aria-valuenow="40"' in page.text
            links = set(re.findall(r'(?:href|src|action)="(/[^"]*)"', page.text))
            assert links
            assert all(link.startswith("/jobs/") for link in links)
            for link in (
                "/jobs/jobs",
                f"/jobs/jobs/{made.failed.id}",
                "/jobs/overview",
                "/jobs/static/board.css",
                "/jobs/api/jobs",
            ):
                assert client.get(link).status_code == 200, link
            assert "actions/cancel" not in client.get(f"/jobs/jobs/{made.queued.id}").text
            mine = client.get(f"/jobs/jobs/{made.queued.id}", headers=TEAM).text
            token = re.search(r'name="token" value="([^"]+)"', mine)
            assert token is not None
            body = f"id={made.queued.id}&token={token[1]}"
            assert client.post("/jobs/actions/cancel", content=body, headers=FORM).status_code == 403
            done = client.post("/jobs/actions/cancel", content=body, headers={**FORM, **TEAM})
            assert (done.status_code, done.headers["location"]) == (303, f"/jobs/jobs/{made.queued.id}")
        assert store.get(made.queued.id).status is MlJobStatus.CANCELLED


def test_the_api_answers_as_its_document_says(sqlite_url: str) -> None:
    import requests
    from schemathesis import openapi  # here, not in every test process: it takes seconds

    with JobStore(sqlite_url) as store:
        history(store)
        app = create_app(store, authorize=lambda _: Access.ACT)
        with served(app) as url, requests.Session() as session:  # one connection for all
            document = httpx.get(f"{url}/api/openapi.json").json()
            document["paths"].pop("/events")  # which has no end
            for operation in openapi.from_dict(document).get_all_operations():
                _ask_each(operation.ok().as_strategy(), f"{url}/api", session)


def _ask_each(strategy: Any, base_url: str, session: Any) -> None:
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    @given(case=strategy)
    @settings(
        max_examples=5,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        case.call_and_validate(
            base_url=base_url, session=session, excluded_checks=[positive_data_acceptance]
        )  # a filter has a grammar

    ask()
