"""What the board's pages say: one of a thing as one, numbers short and exact, many kinds folded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import pytest

from mljobs import JobStore
from mljobs._values import utc_now
from mljobs.board._format import parsed, plural, tree
from mljobs.board._site import Links, templates
from mljobs.jobs import Queue
from mljobs.jobs._queue import QueueDepth
from tests.boards import client, ended, send, worker


@pytest.fixture
def store(sqlite_url: str) -> Iterator[JobStore]:
    with JobStore(sqlite_url) as made:
        yield made


def test_one_of_anything_is_said_as_one(store: JobStore) -> None:
    done = ended(
        store, "completed", target="only", spec={"a": {"b": 1}, "c": [{"d": 1}], "e": "x" * 50}, metrics={"f1": 1}
    )
    store.claim_one(store.submit("backfill", "only", {"b": 1}), worker="w1", lease=0.001)
    worker(store, "w1", "train")
    store.submit("drift_compute", "only", {}, run_after=timedelta(hours=1))
    board = client(store)
    paths = [
        "/",
        "/jobs",
        "/jobs?q=kind:train",
        f"/jobs/{done.id}",
        "/targets",
        "/target?name=only&kind=train",
        "/overview",
        "/compare",
    ]
    pages = [board.get(path).text for path in paths]
    pages += [
        send(board, "/actions/preview", do=what, scope="all", q="kind:train").text for what in ("cancel", "retry")
    ]
    words = [re.sub(r"<[^>]+>|\s+", " ", page) for page in pages]
    things = "jobs|runs|keys|targets|workers|kinds|frames|records|items|wait |match\b|are |terms"
    assert [
        found for page in words for found in re.findall(rf".{{20}}(?<![\d.,:])\b1 +(?:{things}).{{10}}", page)
    ] == []
    assert "1 silent workers" not in " ".join(words)
    assert (plural(1, "job"), plural(1204, "job"), plural(0, "key")) == ("1 job", "1,204 jobs", "0 keys")
    assert tree(parsed('[{"a": 1}]'))[0].note == "1 key"


def test_a_fraction_of_many_digits_is_short_in_a_table_and_whole_in_its_title(store: JobStore) -> None:
    values = {"f1": 0.1 + 0.2, "rows": 2**70}
    ids = [
        str(ended(store, "completed", spec={"lr": 1 / (3 + at), "n": 2**64 + at}, metrics=values).id) for at in range(2)
    ]
    board = client(store)
    for path in ("/target?name=spam", f"/compare?id={ids[0]}&id={ids[1]}"):
        page = board.get(path).text
        assert 'title="0.3333333333333333">0.333333<' in page
        assert f">{2**70}"[:18] in page  # a whole number stays exact, and is cut as any text is
        assert f'title="{2**64}"' in page
    listed = board.get("/jobs").text
    assert "<b>0.3</b>" in listed
    assert f"<b>{2**64}</b>" in listed
    assert "0.30000000000000004" in board.get(f"/jobs/{ids[0]}").text  # as it was written


def test_of_many_kinds_the_first_are_shown_and_the_others_folded() -> None:
    now = utc_now()
    depths = tuple(QueueDepth(f"kind_{number:03}", 200 - number, 0, 0, now) for number in range(150))
    around = SimpleNamespace(queue=Queue(depths, complete=True, now=now))
    view = SimpleNamespace(around=around, unhandled={}, late_kinds=(), held=1, delayed=2, deepest=9, at=now)
    page = templates().get_template("now_queue.html").render(view=view, url=Links(""))
    shown, folded = page.split("<details>")
    assert (shown.count("<tr id="), folded.count("<tr id=")) == (12, 138)
    assert "<summary>138 more kinds</summary>" in folded
    assert "1 waits for its target. 2 wait for their time." in page
