"""Whatever text the jobs of a board hold, no page, fragment or form lets it be more than text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from mljobs import JobStore, MlJob
from mljobs._printable import printable
from mljobs.board._html import Html, verbatim
from tests.boards import client, ended, send

HOSTILE = (
    "\x1b[31m\u202eesrever\u2066\x01\x7f\x9b\u2028\u200b\r\nX: y\t<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    "{{7*7}}{% raw %}javascript:alert(1) __proto__ ../../x \U000e0001 é 模型"
)
FILTER = f"target:{json.dumps(HOSTILE.replace(chr(13), ''), ensure_ascii=False)}"


@pytest.fixture
def store(sqlite_url: str) -> Iterator[JobStore]:
    with JobStore(sqlite_url) as made:
        yield made


def hostile_jobs(store: JobStore) -> list[MlJob]:
    """Make a job in each state whose every text is hostile, a chain of retries, and three runs that can be compared."""
    spec = {HOSTILE: HOSTILE, "__proto__": {"constructor": [HOSTILE] * 9}, "n": 0}
    done = [
        ended(store, "completed", target=HOSTILE, worker=HOSTILE, ago=100 * n,
              spec={**spec, "n": n, HOSTILE * 2: f"{n}{HOSTILE}"},
              metrics={HOSTILE: n / 7, "__proto__": n, "notes": {HOSTILE: HOSTILE}})
        for n in (1, 2, 3)
    ]  # fmt: skip
    error = f'{HOSTILE}\nTraceback\n  File "{HOSTILE[:20]}", line 1, in {HOSTILE[:9]}\n    {HOSTILE}\n{HOSTILE}'
    failed = ended(store, "failed", target=HOSTILE, worker=HOSTILE, error_message=error, spec=spec)
    retried = store.retry(failed)
    for job, lease in (
        (store.submit("train", HOSTILE, spec, exclusive=True), 0.001),
        (store.submit("backfill", HOSTILE, spec), 60),
    ):
        claim = store.claim_one(job, worker=HOSTILE, lease=lease)
        if lease > 1:
            store.report(claim, progress=30, metrics={HOSTILE: HOSTILE})
    held = store.submit("train", HOSTILE, spec, exclusive=True)
    cancelled = store.submit("train", HOSTILE, spec)
    store.claim_one(cancelled, worker=HOSTILE, lease=60)
    store.cancel(cancelled)
    return [*done, failed, retried, held, cancelled, *store.find("status:running").jobs]


class Page(HTMLParser):
    """What a browser makes of a page: its elements, the links in it, and the text that is seen or read out."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.links: set[str] = set()
        self.scripts: list[str | None] = []
        self.images = 0
        self.handlers: list[str] = []
        self.seen: list[str] = []
        self._hidden = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.images += tag in ("img", "iframe", "object", "embed", "base")
        if tag == "script":
            self.scripts.append(given.get("src"))
        self._hidden += tag == "pre" and given.get("class") == "vh"
        for name, value in attrs:
            if name.startswith("on") or name == "style":
                self.handlers.append(name)
            if name in ("href", "src", "action", "data-stream", "data-zoom") and value and not value.startswith("#"):
                self.links.add(value)
            if name in ("title", "aria-label", "content", "placeholder", "alt") and value:
                self.seen.append(value)

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre":
            self._hidden = 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.seen.append(data)


def assert_sound(html: str, where: str) -> Page:
    page = Page(html)
    assert page.scripts in ([], [src for src in page.scripts if src and "/static/board.js" in src]), where
    assert (page.images, page.handlers) == (0, []), where
    text = "".join(page.seen)
    assert not [c for c in text if not c.isprintable() and c not in "\n\t"], where
    assert not re.search(r"(?<!7\*)49\{%|alert\(1\)\.49", text), where
    for link in page.links:
        parts = urlsplit(link)
        assert (parts.scheme, parts.netloc) == ("", ""), (where, link)
        assert link.startswith("/"), (where, link)
    return page


def test_no_page_that_can_be_reached_lets_a_text_be_more_than_text(store: JobStore) -> None:
    jobs = hostile_jobs(store)
    board = client(store, title=HOSTILE)
    ids = "&".join(f"id={job.id}" for job in jobs)
    known, todo = set(), ["/", f"/compare?{ids}", "/overview", "/targets", "/jobs?limit=3"]
    shapes = set()
    while todo:
        path = todo.pop()
        shape = (
            re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", urlsplit(path).path),
            tuple(sorted(parse_qs(urlsplit(path).query))),
        )
        if path in known or (shape in shapes and "/jobs/" not in path):  # each kind of address once, and each job
            continue
        known.add(path)
        shapes.add(shape)
        answer = board.get(path)
        assert answer.status_code in (200, 404, 405, 422), path
        kind = answer.headers["content-type"].partition(";")[0]
        assert answer.headers["x-content-type-options"] == "nosniff", path
        if kind != "text/html":
            continue
        todo += [
            link for link in assert_sound(answer.text, path).links if "/events" not in link and "/actions/" not in link
        ]
    assert {shape for shape, _ in shapes} >= {"/", "/jobs", "/jobs/ID", "/targets", "/target", "/compare", "/overview"}


def test_no_fragment_of_a_stream_lets_a_text_be_more_than_text(store: JobStore) -> None:
    jobs = hostile_jobs(store)
    board = client(store)
    for query in ("view=now", *(f"view=job&id={job.id}" for job in jobs)):
        fragments = board.get(f"/poll?{query}").json()["html"]
        assert fragments
        for name, html in fragments.items():
            assert_sound(html, f"{query} {name}")


@pytest.mark.parametrize("what", ["cancel", "retry"])
def test_no_answer_to_a_form_lets_a_text_be_more_than_text(store: JobStore, what: str) -> None:
    jobs = hostile_jobs(store)
    board = client(store)
    asked = send(board, "/actions/cancel", id=next(job.id for job in jobs if job.status == "running"))
    for q in (FILTER, f"error:{json.dumps(HOSTILE[:20])}", HOSTILE):
        page = send(board, "/actions/preview", do=what, scope="all", q=q)
        assert_sound(page.text, q)
        assert_sound(board.get("/jobs", params={"q": q}).text, q)
    done = send(board, "/actions/bulk", do=what, scope="picked", id=[str(job.id) for job in jobs])
    for answer in (asked, done):
        assert answer.status_code == 200
        assert_sound(answer.text, what)


def test_a_form_brings_back_the_very_text_of_a_filter(store: JobStore) -> None:
    html = client(store).get("/jobs", params={"q": FILTER}).text
    typed = re.search(r'<input id="q" name="q" value="([^"]*)"', html)
    assert typed is not None
    assert unescape(typed[1]) == FILTER
    assert "\x1b" not in html
    assert "\r" not in html


def test_the_finalizer_leaves_html_and_numbers_alone() -> None:
    assert Html("<b>{}</b> {}").format("\x1b<i>", Html("<u>")) == "<b>\\x1b&lt;i&gt;</b> <u>"
    assert Html("{:.1f}").format(1.25) == "1.2"
    assert printable("a\u202eb\n\tc", kept="\n\t") == "a\\u202eb\n\tc"
    assert verbatim('a"\r\n\u202e') == "a&#34;&#13;&#10;&#8238;"


def test_json_keeps_the_text_as_it_is(store: JobStore) -> None:
    jobs = hostile_jobs(store)
    found: Any = client(store).get(f"/api/jobs/{jobs[3].id}").json()
    assert found["target_name"] == HOSTILE
    assert found["spec"][HOSTILE] == HOSTILE
