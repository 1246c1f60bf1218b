"""A visitor who sends what no browser sends, and a host whose parts fail: each is answered, and told no more than it may."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount
from starlette.testclient import TestClient

from mljobs import JobStore, MlJobStatus
from mljobs.board import Access, _hub, create_app
from tests.boards import FORM, Made, client, ended, history, send
from tests.cases import case

UNKNOWN = "0" * 32
ODD = [
    "/target?name=%00", "/targets?q=%00", "/targets?after=%00", "/targets?q=%ed%a0%80", "/jobs?q=target:%00",
    "/jobs?after=broken", "/jobs?before=broken", "/jobs?after=WyJuIiwxLCJ4Il0", "/jobs?sort=sideways", "/jobs?limit=-1",
    "/jobs?limit=99999999999999999999", "/jobs?q=priority%3E99999999999999999999999", "/jobs?q=attempts%3E1e308",
    "/jobs?q=created:9999-12-31", "/jobs?q=finished:0001-01-01&sort=last_finished", "/jobs?q=took:%3E9999999999d",
    "/jobs?q=status:queued&sort=first_finished", "/compare?id=%00", "/overview?span=x", "/events", "/events?view=x",
    "/poll?view=now&last=zzz", f"/poll?view=job&id={UNKNOWN}", "/poll?view=overview&span=x", f"/jobs/{UNKNOWN}",
    f"/jobs/{UNKNOWN}/spec.json", "/jobs/x/spec.json", "/api/target?name=%00", "/api/jobs?after=x", "/api/jobs?limit=0",
    "/api/stats?hours=721", "/api/compare?id=x", "/api/jobs.ndjson?limit=10001", f"/api/jobs/{UNKNOWN}/chain",
]  # fmt: skip


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as made:
        yield made


@pytest.fixture
def made(store: JobStore) -> Made:
    return history(store)


def test_odd_addresses_and_methods_are_answered_and_break_nothing(store: JobStore, made: Made) -> None:
    board = client(store)  # which raises what the board does not catch
    for path in ODD:
        assert board.get(path).status_code in (200, 404, 422), path
    for path in ("/", "/jobs", "/static/board.css", "/api/jobs", "/events?view=now"):
        answer = board.head(path)
        assert (answer.status_code, answer.content) == (200, b""), path
    if store.engine.dialect.name == "sqlite":  # a method that is not served does not reach the database
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
            for path in ("/", "/actions/cancel", "/api/jobs", "/static/board.css"):
                assert board.request(method, path).status_code == 405, (method, path)
    assert store.get(made.queued.id).status is MlJobStatus.QUEUED


def test_odd_bodies_are_refused_and_a_deep_spec_comes_back_as_it_was(store: JobStore, made: Made) -> None:
    board = client(store)
    json_type = {"Content-Type": "application/json"}
    begin = '{"kind":"train","target_name":'
    for body in (
        "[]", "null", f'{begin}""', f'{begin}"\\u0000"}}', f'{begin}"\\ud800"}}', f'{begin}"x","priority":99999999999}}',
        f'{begin}"x","spec":{{"a":NaN}}}}', '{"kind":"nope","target_name":"x"}', f'{begin}"x","priority":true}}',
    ):  # fmt: skip
        assert board.post("/api/jobs", content=body, headers=json_type).status_code in (400, 422), body
    deep = "[" * 900 + "18446744073709551557.10" + "]" * 900
    made_deep = board.post("/api/jobs", content=f'{begin}"deep","spec":{deep}}}', headers=json_type)
    assert made_deep.status_code == 201
    assert deep.count("[") == board.get("/api/jobs?q=target:deep").text.count("[") - 1
    assert board.get("/api/jobs.ndjson?q=target:deep").text.count("[") == 900
    for fields in (
        {"do": "retry", "scope": "all", "q": "target:zzz", "as_of": "999999999999999"},
        {"do": "retry", "scope": "all", "q": "target:zzz", "as_of": "²"},
    ):
        assert send(board, "/actions/bulk", **fields).status_code == 200
    assert send(board, "/actions/bulk", do="retry", scope="all", q="target:\x00").status_code == 422
    assert send(board, "/actions/retry", id=UNKNOWN).status_code == 404
    assert send(board, "/actions/retry", id=made.running.id).status_code == 409


def test_a_file_that_the_browser_has_is_not_sent_again(sqlite_url: str) -> None:
    board = client(JobStore(sqlite_url))
    tag = board.get("/static/board.css").headers["etag"]
    again = board.get("/static/board.css", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert board.get("/static/board.css", headers={"If-None-Match": '"old"'}).status_code == 200


async def _fails(_request: Any) -> Access:
    raise RuntimeError("secret of the host")


NO_ACCESS: dict[str, tuple[Any, int]] = {
    "None": (lambda _: None, 403),
    "True": (lambda _: True, 403),
    "a number": (lambda _: -1, 403),
    "raises": (lambda _: 1 / 0, 500),
    "raises, async": (_fails, 500),
}


def test_an_authorize_that_fails_or_returns_no_access_lets_nobody_in(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        made = history(store)
        for name, (authorize, status) in NO_ACCESS.items():
            board = TestClient(create_app(store, authorize=authorize), raise_server_exceptions=False)
            for path in ("/", "/api/jobs", "/poll?view=now", "/events?view=now", f"/jobs/{made.failed.id}"):
                with case(name, path):
                    answer = board.get(path)
                    assert answer.status_code == status
                    assert "gpu-1" not in answer.text
                    assert "secret" not in answer.text
                    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
            assert board.post("/actions/cancel", headers=FORM).status_code == status


def test_an_error_of_ours_says_nothing_and_has_the_headers_too(
    store: JobStore, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mljobs import jobs

    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("secret")

    monkeypatch.setattr(jobs, "summaries", broken)
    monkeypatch.setattr(jobs, "find", broken)
    board = TestClient(create_app(store), raise_server_exceptions=False)
    for path in ("/jobs", "/api/jobs"):
        answer = board.get(path)
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert board.get("/api/jobs").headers["content-type"] == "application/problem+json"


def test_a_closed_store_and_one_that_cannot_be_written_are_shown(store: JobStore, made: Made, sqlite_url: str) -> None:
    if store.engine.dialect.name == "sqlite":
        path = Path(str(store.engine.url.database))
        reader = JobStore(f"sqlite:///file:{path}?mode=ro&uri=true")
        with reader:
            board = client(reader)
            html = board.get("/jobs").text
            assert "Read only: attempt to write a readonly database" in html
            assert 'class="pick"' not in html
            assert send(board, "/actions/cancel", id=made.queued.id).status_code == 503
    store.close()
    assert client(store).get("/").status_code in (200, 503)


def test_every_value_of_a_spec_leads_to_the_jobs_that_have_it(store: JobStore) -> None:
    deep: Any = 5
    for _ in range(11):
        deep = {"d": deep}
    odd = {
        "a b": 1, "a.b": 2, 'a"q': 3, "": 4, "é": "x", "x>y": None, "flag": True, "two": "two words", "quoted": 'say "hi"',
        "star": "a*b", "comma": "a,b", "sp": {"in ner": 1.5}, "big": 2**70, "small": 1e-9, "empty": "", "slash": "a\\b",
        "lines": "a\nb", "word": "true", "digits": "12", "lead": " x", "less": "<5", "__proto__": 1, "deep": deep,
        "control": "\x01", "list": [1, 2, 3, 4, 5, 6, 7, 8, 9, {"x": "y"}], "long": "x" * 3000,
    }  # fmt: skip
    job = store.submit("train", "odd", odd)
    store.submit("train", "plain", {"a": 1})
    page = client(store).get(f"/jobs/{job.id}").text
    links = [html.unescape(link) for link in re.findall(r'<a href="(/jobs\?[^"]*q=spec[^"]*)"', page)]
    asked = [parse_qs(urlsplit(link).query)["q"][0] for link in links]
    assert len(asked) == 34  # all but the long one, which no address has room for
    assert [text for text in asked if [found.target_name for found in store.find(text)] != ["odd"]] == []
    assert client(store).get("/jobs", params={"q": "spec" + ".d" * 101 + ":1"}).status_code == 422


def test_a_board_may_be_mounted_where_an_api_is_and_its_own_api_knows_its_place(sqlite_url: str) -> None:
    store = JobStore(sqlite_url)
    host = TestClient(Starlette(routes=[Mount("/api/board", create_app(store, authorize=lambda _: Access.ACT))]))
    assert host.get("/api/board/jobs/none").headers["content-type"].startswith("text/html")
    assert host.get("/api/board/api/jobs/none").headers["content-type"] == "application/problem+json"
    queued = host.post("/api/board/api/jobs", json={"kind": "train", "target_name": "new"})
    assert queued.headers["location"] == f"/api/board/api/jobs/{queued.json()['id']}"
    assert host.get(queued.headers["location"]).status_code == 200
    assert host.get("/api/board/api/openapi.json").json()["servers"] == [{"url": "/api/board/api"}]
    assert client(store).get("/jobs/none", headers={"host": "x/api/"}).headers["content-type"].startswith("text/html")


def test_a_database_without_the_tables_is_told_from_one_that_is_away(empty_url: str) -> None:
    with JobStore(empty_url) as store:
        board = client(store)
        for path in ("/", "/jobs", "/overview"):
            answer = board.get(path)
            assert answer.status_code == 503
            assert "The tables are not there" in answer.text
            assert "mljobs upgrade" in answer.text
        assert board.get("/api/jobs").json()["title"] == "The tables are not there"


def test_pages_that_polled_once_are_forgotten(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JobStore(sqlite_url)
    board = client(store)
    hub = board.app.state.site.hub
    monkeypatch.setattr(_hub, "_LAST_VIEW_KEPT", -1.0)
    for number in range(60):  # more lists than are kept
        assert board.get("/poll", params={"view": "jobs", "q": f"attempts>{number}"}).status_code == 200
        board.get("/poll", params={"view": "job", "id": str(UUID(int=number))})
    assert len(hub.views) < 3


def test_a_policy_of_the_host_stands_beside_ours_and_a_mount_may_end_with_a_slash(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        history(store)

        async def strict(scope: Any, receive: Any, send_: Any) -> None:
            async def sending(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"content-security-policy", b"default-src 'self'")]
                await send_(message)

            await app(scope, receive, sending)

        app = Starlette(routes=[Mount("/ops/", create_app(store)), Mount("/", Response("home"))])
        for root in ("", "/proxy", "/proxy/"):
            answer = TestClient(strict, root_path=root).get(f"{root}/ops/")
            assert answer.status_code == 200, root
            assert TestClient(strict, root_path=root).get("/ops/").text.count("<a ") == answer.text.count("<a ")
            assert len(answer.headers.get_list("content-security-policy")) == 2
            assert f'href="{root.rstrip("/")}/ops/jobs"' in answer.text
            assert "//ops" not in answer.text


def test_an_origin_or_an_id_of_an_event_that_is_none_breaks_nothing(sqlite_url: str) -> None:
    store = JobStore(sqlite_url)
    made = ended(store, "completed", metrics={"f1": 1})
    board = client(store)
    for origin in ("http://[", "http://[x]", "://", "null"):
        assert board.post("/actions/rescue", headers={"origin": origin}).status_code == 403
        assert board.post("/api/jobs", json={}, headers={"origin": origin}).status_code == 403
    boot = board.app.state.site.hub.boot
    assert board.get("/poll", params={"view": "now", "last": f"{boot}.{'9' * 5000}"}).status_code == 200
    for what in ("metrics", "spec"):
        assert board.get(f"/jobs/{made.id}/{what}.json").status_code == 200
    for what in ("%E2%82%AC", "anything", "a%22b"):
        assert board.get(f"/jobs/{made.id}/{what}.json").status_code == 404


def test_a_page_of_another_port_is_another_site(store: JobStore, made: Made) -> None:
    board = client(store)
    for origin in ("http://testserver:8080", "http://testserver.evil.example", "http://evil@testserver", "null", ""):
        assert send(board, "/actions/cancel", headers={"Origin": origin}, id=made.queued.id).status_code == 403, origin
        body = json.dumps({})
        headers = {"Origin": origin, "Content-Type": "application/json"}
        assert board.post(f"/api/jobs/{made.queued.id}/cancel", content=body, headers=headers).status_code == 403
    assert store.get(made.queued.id).status is MlJobStatus.QUEUED
