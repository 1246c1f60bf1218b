"""What was tried against the board, and what came of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError

import mljobs.board as board_package
from mljobs import JobStore, MlJobStatus
from mljobs.board import Access, create_app
from mljobs.board._access import Tokens
from mljobs.board._hub import MOST_STREAMS
from tests.boards import BASE, FORM, Made, client, ended, history, send, token_of
from tests.cases import case

NASTY = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}}{% raw %}",
    "__proto__",
    "javascript:alert(1)",
    "../../etc/passwd",
    "a/b?c=d#e&f",
    "\x1b[31mred\x1b[0m\r\nline",
    "\u202eesrever\u200b",
    "'; DROP TABLE ml_jobs; --",
    "=cmd|' /C calc'!A0",
    "x" * 5000,
]


@pytest.fixture
def store(sqlite_url: str) -> Iterator[JobStore]:
    with JobStore(sqlite_url) as made:
        yield made


@pytest.fixture
def made(store: JobStore) -> Made:
    return history(store)


# -------------------------------------------------------------------------------------------------------------- shown


@pytest.mark.parametrize("names", [NASTY[::2], NASTY[1::2]], ids=["even", "odd"])
def test_whatever_a_job_is_called_is_shown_as_that(store: JobStore, names: list[str]) -> None:
    paths = {nasty: _make_nasty(store, nasty) for nasty in names}
    board = client(store)
    of_all = ["/", "/jobs", "/targets", "/compare", "/overview", "/poll?view=now"]
    for path in [path for nasty in names for path in paths[nasty]] + of_all:
        with case(path):
            answer = board.get(path)
            assert answer.status_code in (200, 422)
            text = json.loads(answer.text)["html"]["running-jobs"] if path.startswith("/poll") else answer.text
            assert "<script>alert" not in text
            assert "<img" not in text
            assert "49" not in re.findall(r"target[^<]{0,20}49", text)
            assert "\x1b" not in re.sub(r"<input [^>]*>", "", text)  # a filter is kept as it was typed
            assert not re.search(r'(?:href|src|action)="(?:javascript|data):', text)
            assert len(answer.content) < 400_000


def _make_nasty(store: JobStore, nasty: str) -> list[str]:
    """Add jobs with a name wherever there may be one; return the pages that are about them alone."""
    error = f'{nasty}\nTraceback\n  File "{nasty[:50]}", line 1, in f'
    spec = {nasty: nasty, "__proto__": {"constructor": nasty}, "n": 1}
    failed = ended(store, "failed", target=nasty, error_message=error, spec=spec)
    done = [
        ended(store, "completed", target=nasty, spec={**spec, "n": n}, metrics={nasty: n, "__proto__": n})
        for n in (1, 2, 3)
    ]
    held = store.submit("train", nasty, spec, exclusive=True)
    store.claim_one(held, worker=nasty, lease=0.001)
    store.submit("train", nasty, spec, exclusive=True)
    ids = "&".join(f"id={job.id}" for job in done)
    target = str(httpx.QueryParams({"name": nasty}))
    found = str(httpx.QueryParams({"q": f'target:"{nasty[:100]}"'}))
    pages = [f"/jobs/{job.id}" for job in (failed, done[0], held)]
    return [f"/jobs?{found}", *pages, f"/target?{target}", f"/compare?{ids}"]


def test_a_spec_of_a_megabyte_a_deep_one_and_one_with_ten_thousand_keys_are_folded(store: JobStore) -> None:
    deep: Any = 1
    for _ in range(200):
        deep = {"d": deep}
    for spec in (
        {"big": "x" * 1_000_000},
        deep,
        {f"k{n}": n for n in range(10_000)},
        [[n] * 50 for n in range(300)],
        "text",
        None,
    ):
        job = ended(store, "completed", spec=spec, metrics={"f1": 1.5, "n": 2**70})
        board = client(store)
        for path in (f"/jobs/{job.id}", "/jobs", f"/compare?id={job.id}"):
            answer = board.get(path)
            assert answer.status_code == 200
            assert len(answer.content) < 900_000
        assert json.loads(board.get(f"/jobs/{job.id}/spec.json").content) == (spec if spec is not None else {})


def test_an_error_of_four_thousand_characters_of_ansi_is_shown_as_that(store: JobStore) -> None:
    job = ended(store, "failed", error_message="\x1b[31m" * 1000)
    html = client(store).get(f"/jobs/{job.id}").text
    assert "\\x1b[31m" in html
    assert "\x1b" not in html


# -------------------------------------------------------------------------------------------------------------- forged


def test_a_form_that_another_site_sends_does_nothing(store: JobStore, made: Made) -> None:
    board = client(store)
    foreign: list[dict[str, str]] = [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {},
    ]
    for headers in foreign:
        with case(headers):
            answer = send(board, "/actions/cancel", headers=headers, id=made.queued.id)
            assert answer.status_code == 403
            assert store.get(made.queued.id).status is MlJobStatus.QUEUED


def test_a_form_of_this_site_may_say_so_by_its_origin(store: JobStore, made: Made) -> None:
    send(client(store), "/actions/cancel", headers={"Origin": BASE}, id=made.queued.id)
    assert store.get(made.queued.id).status is MlJobStatus.CANCELLED


def test_a_form_without_a_token_of_this_board_does_nothing(store: JobStore, made: Made) -> None:
    board = client(store)
    for token in ("", "x", "ffff.00", "0.", "€.€", "6927aaaa.deadbeef"):
        with case(token):
            assert send(board, "/actions/cancel", id=made.queued.id, token=token).status_code == 403
    assert store.get(made.queued.id).status is MlJobStatus.QUEUED


def test_a_token_ends_and_is_only_of_its_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Tokens("a"), Tokens("b")
    token = one.new()
    one.check(token)
    Tokens("a").check(token)
    with pytest.raises(Exception, match="too old"):
        other.check(token)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 13 * 3600)
    with pytest.raises(Exception, match="too old"):
        one.check(token)


def test_what_changes_something_is_never_a_get(store: JobStore, made: Made) -> None:
    board = client(store)
    for path in ("/actions/cancel", "/actions/retry", "/actions/rescue", "/actions/bulk", "/actions/preview", "/theme"):
        assert board.get(f"{path}?id={made.queued.id}").status_code == 405
    assert store.get(made.queued.id).status is MlJobStatus.QUEUED


@pytest.mark.parametrize("access", [None, Access.READ, Access.READ | Access.RETRY])
def test_who_may_not_cancel_sees_no_form_and_is_refused(store: JobStore, made: Made, access: Access | None) -> None:
    board = client(store, access)
    assert "actions/cancel" not in board.get(f"/jobs/{made.queued.id}").text
    assert send(board, "/actions/cancel", id=made.queued.id).status_code == 403
    fields = {"do": "cancel", "scope": "picked", "id": made.queued.id}
    assert send(board, "/actions/preview", **fields).status_code == 403
    assert send(board, "/actions/bulk", **fields).status_code == 403
    assert board.post(f"/api/jobs/{made.queued.id}/cancel").status_code == 403
    assert board.post("/api/jobs", json={"kind": "train", "target_name": "x"}).status_code == 403
    assert store.get(made.queued.id).status is MlJobStatus.QUEUED


def test_authorize_is_asked_for_every_address_streams_and_the_api_included(store: JobStore, made: Made) -> None:
    asked: list[str] = []

    async def nobody(request: Any) -> Access:
        asked.append(request.url.path)
        return Access.NONE

    from starlette.testclient import TestClient

    board = TestClient(create_app(store, authorize=nobody), follow_redirects=False)
    ids = made.failed.id
    pages = "/ /jobs /targets /target?name=spam /compare /overview /events?view=now /poll?view=now"
    api = "jobs stats workers compare compare.csv target?name=spam jobs.csv jobs.ndjson openapi.json events?view=now"
    paths = [*pages.split(), f"/jobs/{ids}", f"/jobs/{ids}/spec.json", f"/api/jobs/{ids}", f"/api/jobs/{ids}/chain"]
    paths += [f"/api/{name}" for name in api.split()]
    for path in paths:
        answer = board.get(path)
        assert answer.status_code == 403, path
        assert "gpu-1" not in answer.text
        assert "lr must" not in answer.text
    assert len(asked) == len(paths)
    assert board.post("/actions/cancel", headers=FORM).status_code == 403


def test_the_api_refuses_what_a_page_of_another_site_could_send(store: JobStore, made: Made) -> None:
    board = client(store)
    path = f"/api/jobs/{made.queued.id}/cancel"
    assert board.post(path, headers={"Origin": "https://evil.example"}).status_code == 403
    assert board.post(path, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert (
        board.post("/api/jobs", content='{"kind":"train"}', headers={"Content-Type": "text/plain"}).status_code == 415
    )
    assert store.get(made.queued.id).status is MlJobStatus.QUEUED
    assert board.post(path).json()["cancelled"] is True


# --------------------------------------------------------------------------------------------------------------- paths


def test_a_path_leads_nowhere_else(store: JobStore) -> None:
    board = client(store)
    for path in (
        "/static/../_app.py",
        "/static/..%2f_app.py",
        "/static/%2e%2e/_app.py",
        "/static/board.css%00",
        "/static/",
        "/static/htmx.LICENSE/x",
        "/jobs/..%2f..%2fetc",
        "/jobs/%00",
        "/jobs/" + "9" * 5000,
        "//evil.example/",
        "/api/jobs/x",
        "/api/nothing",
    ):
        with case(path):
            answer = board.get(BASE + path)
            assert answer.status_code == 404
            assert "create_app" not in answer.text


def test_the_way_back_of_the_theme_stays_on_the_board(store: JobStore) -> None:
    board = client(store)
    for back in (
        "https://evil.example",
        "//evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "/x\r\nSet-Cookie: a=b",
    ):
        answer = send(board, "/theme", theme="dark", back=back)
        assert answer.headers["location"] == "/"
        assert len(answer.headers.get_list("set-cookie")) == 1
    assert "set-cookie" not in send(board, "/theme", theme="</script>", back="/").headers


def test_a_prefix_that_a_stranger_sends_changes_no_link(store: JobStore) -> None:
    html = (
        client(store)
        .get("/", headers={"X-Forwarded-Prefix": "//evil.example", "X-Forwarded-Host": "evil.example"})
        .text
    )
    assert "evil" not in html


# ------------------------------------------------------------------------------------------------------------ oversize


def test_bodies_addresses_and_pages_are_bounded(store: JobStore, made: Made) -> None:
    board = client(store)
    assert board.post("/actions/cancel", content=b"x" * 100_000, headers=FORM).status_code == 413
    assert board.post("/actions/cancel", content=b"a=1&" * 5_000, headers=FORM).status_code == 400
    assert board.post("/actions/cancel", content=b"\xff\xfe", headers=FORM).status_code == 400
    json_type = {"Content-Type": "application/json"}
    assert board.post("/api/jobs", content=b"x" * 2_000_000, headers=json_type).status_code == 413
    assert board.post("/api/jobs", content=b"[" * 100_000, headers=json_type).status_code in (400, 422)
    assert board.get("/jobs?q=" + "x" * 20_000).status_code == 414
    assert board.get("/api/jobs?q=" + "x" * 3_000).status_code == 422
    assert board.get("/api/jobs?limit=100000").status_code == 422
    assert board.get("/jobs?limit=100000").text.count('<tr id="j-') <= 200
    many = "&".join(f"id={made.failed.id.hex[:24]}{number:08x}" for number in range(200))
    assert board.get(f"/compare?{many}").status_code == 404


def test_a_formula_in_a_table_is_made_inert(store: JobStore) -> None:
    ended(store, "completed", target="=HYPERLINK(1)", spec={"@x": "+1+1"}, metrics={"f1": -0.5})
    ended(store, "completed", target="\uff1dHYPERLINK(1)")  # full width, which some spreadsheets take for the same
    text = client(store).get("/api/jobs.csv").text
    assert "'=HYPERLINK(1)" in text
    assert "'\uff1dHYPERLINK(1)" in text
    assert ",=HYPERLINK" not in text


def test_every_answer_has_the_headers_that_keep_it_from_being_more(store: JobStore, made: Made) -> None:
    board = client(store)
    for path in ("/", "/jobs", "/nope", "/static/board.css", "/api/jobs", "/poll?view=now", "/jobs?q=" + "x" * 20_000):
        headers = board.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
    assert "set-cookie" not in board.get("/").headers


def test_vendored_files_are_those_that_their_list_names() -> None:
    root = Path(board_package.__file__).parent / "static"
    for line in (root / "vendored.txt").read_text().splitlines():
        digest, name, *_ = line.split()
        assert hashlib.sha256((root / name).read_bytes()).hexdigest() == digest, name
    texts = "".join(file.read_text() for file in Path(board_package.__file__).parent.rglob("*.html"))
    assert not re.search(r"https?://", texts)


# --------------------------------------------------------------------------------------------------------------- away


def test_a_database_that_is_away_leaves_the_last_picture(
    store: JobStore, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = client(store)
    assert board.get("/").status_code == 200

    def away(*args: Any, **kw: Any) -> Any:
        raise OperationalError("SELECT secret", {}, Exception("connection refused"))

    monkeypatch.setattr(store, "connect", away)
    from mljobs.board import _hub

    monkeypatch.setattr(_hub, "LOOK_EVERY", 0.0)
    site = board.app.state.site  # type: ignore[attr-defined]
    site.hub._snapshot = site.hub._snapshot and _old(site.hub._snapshot)
    page = board.get("/")
    assert page.status_code == 503
    assert "The database does not answer" in page.text
    assert "gpu-1" in page.text
    assert "secret" not in page.text
    assert board.get("/jobs").status_code == 503
    assert board.get("/api/jobs").json()["title"] == "The database does not answer"


def _old(snapshot: Any) -> Any:
    from dataclasses import replace
    from datetime import timedelta

    return replace(snapshot, at=snapshot.at - timedelta(minutes=1))


# -------------------------------------------------------------------------------------------------------------- streams


class Reader:
    """Opens a stream of the board without a server, and reads as slowly as it likes."""

    def __init__(self, app: Any, path: str, query: str = "view=now") -> None:
        self.chunks: asyncio.Queue[bytes] = asyncio.Queue()
        self.gate = asyncio.Event()
        self.gate.set()
        self.sent = 0
        self.status = 0
        self._gone = asyncio.Event()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(b"host", b"testserver")],
            "client": ("127.0.0.1", 1),
            "server": ("testserver", 80),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))
        self._first = True

    async def _receive(self) -> dict[str, Any]:
        if self._first:
            self._first = False
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message.get("body"):
            await self.gate.wait()
            self.sent += len(message["body"])
            self.chunks.put_nowait(message["body"])

    async def event(self, name: str) -> tuple[str, dict[str, Any]]:
        """Return the id and the data of the next event of this name."""
        while True:
            text = (await asyncio.wait_for(self.chunks.get(), 20)).decode()
            if f"event: {name}\n" in text:
                number = re.search(r"^id: (.+)$", text, re.MULTILINE)
                data = re.search(r"^data: (.+)$", text, re.MULTILINE)
                assert data is not None
                return number[1] if number else "", json.loads(data[1]) if name != "hello" else {}

    async def leave(self) -> None:
        """Hang up."""
        self._gone.set()
        self.gate.set()
        await asyncio.wait_for(self.task, 20)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the database far more often than once a second."""
    from mljobs.board import _hub

    monkeypatch.setattr(_hub, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(_hub, "_AROUND_EVERY", 0.05)
    monkeypatch.setattr(_hub, "_COST_APART", 0.0)


def test_a_stream_tells_what_changed_and_goes_on_where_it_was(store: JobStore, made: Made, quick: None) -> None:
    async def story() -> None:
        app = create_app(store)
        first = Reader(app, "/events")
        number, data = await first.event("patch")
        assert "running-jobs" in data["html"]
        job = store.submit("train", "brand-new")
        (claim,) = [store.claim_one(job, worker="gpu-7", lease=60)]
        while "brand-new" not in data["html"].get("running-jobs", ""):
            number, data = await first.event("patch")
        await first.leave()
        store.complete(claim, {"f1": 1})
        again = Reader(app, "/events", f"view=now&last={number}")
        _, data = await again.event("patch")
        while "running-jobs" not in data["html"]:
            _, data = await again.event("patch")
        assert "brand-new" not in data["html"]["running-jobs"]
        await again.leave()

        restarted = Reader(create_app(store), "/events", f"view=now&last={number}")
        _, data = await restarted.event("patch")
        assert set(data["html"]) >= {"figures", "running-jobs", "queue", "next"}  # of another process: all is told
        await restarted.leave()

    asyncio.run(story())


def test_a_job_that_ends_while_it_is_watched_shows_its_seal(store: JobStore, made: Made, quick: None) -> None:
    async def story() -> None:
        reader = Reader(create_app(store), "/events", f"view=job&id={made.queued.id}")
        await reader.event("patch")
        store.cancel(made.queued.id)
        data: dict[str, Any] = {"html": {}}
        while "Final since" not in data["html"].get("state", ""):
            _, data = await reader.event("patch")
        await reader.leave()

    asyncio.run(story())


def test_a_list_hears_of_newer_jobs_by_one_question_for_all(
    store: JobStore, made: Made, quick: None, monkeypatch: Any
) -> None:
    from mljobs.board import _streams

    monkeypatch.setattr(_streams, "_LIST_EVERY", 0.0)

    async def story() -> None:
        app = create_app(store)
        readers = [Reader(app, "/events", "view=jobs&q=status:queued") for _ in range(5)]
        for reader in readers:
            await reader.event("patch")
        job = store.submit("train", "later")
        for reader in readers:
            data: dict[str, Any] = {"html": {}}
            while not data["html"].get("~ids", "").startswith(str(job.id)):
                _, data = await reader.event("patch")
            await reader.leave()
        assert len(app.state.site.hub.views) == 1

    asyncio.run(story())


def test_a_reader_that_stops_reading_piles_nothing_up(store: JobStore, made: Made, quick: None) -> None:
    async def story() -> None:
        app = create_app(store)
        slow, quick_reader = Reader(app, "/events"), Reader(app, "/events")
        await slow.event("patch")
        slow.gate.clear()
        stopped_at = slow.sent
        for number in range(10):
            store.submit("train", f"t{number}")
            data: dict[str, Any] = {"html": {}}
            while f"{len(store.find('status:queued'))}</dd>" not in data["html"].get("figures", ""):
                _, data = await quick_reader.event("patch")
        assert slow.sent == stopped_at
        slow.gate.set()
        _, data = await slow.event("patch")
        caught_up = 1
        while ">12</dd>" not in data["html"].get("figures", ""):
            _, data = await slow.event("patch")
            caught_up += 1
        assert caught_up <= 3  # the picture as it is now, not each that it missed
        await slow.leave()
        await quick_reader.leave()

    asyncio.run(story())


def test_two_hundred_streams_share_one_look_and_pages_go_on(store: JobStore, made: Made) -> None:
    async def story() -> None:
        app = create_app(store)
        readers = [Reader(app, "/events") for _ in range(200)]
        for reader in readers:
            await reader.event("patch")
        hub = app.state.site.hub
        assert (hub.streams, len(hub.views)) == (200, 1)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as browser:
            before = hub.looks
            for _ in range(20):
                assert (await browser.get("/")).status_code == 200
            assert hub.looks - before <= 40  # by the watcher, not by the pages and streams
        for reader in readers:
            await reader.leave()
        assert hub.streams == 0

    asyncio.run(story())


def test_there_is_a_most_of_streams_and_the_next_polls(store: JobStore, made: Made) -> None:
    board = client(store)
    site = board.app.state.site  # type: ignore[attr-defined]
    assert board.get("/").status_code == 200
    found = board.get("/poll?view=now").json()
    assert "running-jobs" in found["html"]
    assert board.get(f"/poll?view=now&last={found['id']}").json()["html"].keys() <= {
        "running-jobs",
        "figures",
        "attention",
        "next",
    }
    assert board.get("/poll?view=nothing").status_code == 404
    assert board.get("/poll?view=job&id=x").status_code == 404
    assert board.get("/poll?view=jobs&q=nonsense:1").status_code == 404

    async def full() -> None:
        app = create_app(store)
        reader = Reader(app, "/events")
        await reader.event("patch")
        app.state.site.hub.streams = MOST_STREAMS
        refused = Reader(app, "/events")
        await refused.task
        assert refused.status == 503
        app.state.site.hub.streams = 1
        await reader.leave()

    asyncio.run(full())
    assert site.hub.streams == 0


def test_streams_end_when_the_server_wants_to(store: JobStore, made: Made, quick: None) -> None:
    async def story() -> None:
        app = create_app(store)
        reader = Reader(app, "/events")
        await reader.event("patch")
        app.state.site.hub.stop()
        await asyncio.wait_for(reader.task, 20)

    asyncio.run(story())


def test_the_token_of_a_page_is_in_each_form_and_in_no_address(store: JobStore, made: Made) -> None:
    html = client(store).get("/").text
    token = token_of(html)
    assert html.count(f'value="{token}"') == html.count("<form")
    assert not re.search(rf'href="[^"]*{re.escape(token)}', html)
