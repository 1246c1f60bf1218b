"""Jobs on a screen: a record and a page as HTML, and the progress of many until their table of outcomes."""

from __future__ import annotations

import io
import threading
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from mljobs import InvalidValueError, JobNotFound, JobStore, MlJob, MlJobStatus
from mljobs.jobs import Page
from mljobs.store._display import Lines, RichTerminal, Terminal, display_for
from mljobs.store._outcomes import Followed, Running, Snapshot

EVIL = "<script>alert(1)</script>"


class Screen(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def _fill(store: Any) -> list[Any]:
    """Submit three jobs: one completes, one fails, one is queued."""
    ids = store.submit_many(
        [("train", name, {"lr": 0.1, "n": n}) for n, name in enumerate(("good", EVIL, "late"))], ids=True
    )
    good, bad = (store.claim_one(job_id, worker="w") for job_id in ids[:2])
    store.complete(good, {"f1": 0.9312342, "note": "x", "ok": True})
    store.fail(bad, f"ValueError: {EVIL}\x1b[2J\nTraceback")
    return list(ids)


def test_following_ends_with_what_became_of_each(store: Any) -> None:
    ids = _fill(store)
    file = io.StringIO()
    late = store.claim_one(ids[2], worker="w")
    store.complete(late, {"f1": 1, "rows": 7})
    followed = store.follow(ids, file=file)
    assert followed.complete
    assert [job.id for job in followed] == ids
    assert followed.counts == {MlJobStatus.COMPLETED: 2, MlJobStatus.FAILED: 1}
    assert [job.id for job in followed.in_state("failed")] == [ids[1]]
    assert repr(followed) == "<Followed 3 of 3 jobs: 2 completed, 1 failed>"
    first, head, *rows = file.getvalue().splitlines()
    assert first == "3 of 3 jobs: 2 completed, 1 failed"
    assert head.split() == ["id", "target", "spec.n", "status", "took", "f1", "rows", "error"]
    assert rows[0].split()[:4] == [ids[0].hex[-8:], "good", "0", "completed"]
    assert " 0.931234" in rows[0]
    assert rows[1].endswith(rf"ValueError: {EVIL}\x1b[2J")


def test_following_goes_on_until_all_have_finished_or_the_time_is_up(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        ids = _fill(store)
        assert not store.follow("target:late", timeout=0, show=False).complete
        file = Screen()
        seen: list[str] = []

        class Watched(io.StringIO):
            """Lets the job end as soon as it was seen to wait."""

            def write(self, text: str) -> int:
                if not seen:
                    store.complete(store.claim_one(ids[2], worker="w"), {"f1": 1})
                seen.append(text)
                return len(text)

        followed = store.follow(kind="train", file=Watched(), poll=0.01)
        assert (followed.complete, len(followed)) == (True, 3)
        assert seen[:2] == ["2 of 3 jobs: 1 queued, 1 completed, 1 failed\n", "3 of 3 jobs: 2 completed, 1 failed\n"]
        store.follow(ids, file=file)
        assert EVIL in file.getvalue()
        assert "\x1b[2J" not in file.getvalue()


def test_a_retry_is_followed_in_the_place_of_what_has_failed(store: Any) -> None:
    ids = store.submit_many([("train", name, None) for name in ("a", "b")], ids=True)
    for job_id in ids:
        store.fail(store.claim_one(job_id, worker="w"), "once")
    second = store.retry(ids[0])
    store.fail(store.claim_one(second, worker="w"), "twice")
    third = store.retry(second)
    waiting = store.follow(ids, timeout=0, show=False)
    assert ([job.id for job in waiting], waiting.complete) == ([third.id, ids[1]], False)
    store.complete(store.claim_one(third, worker="w"), {"f1": 1})
    followed = store.follow(ids, show=False)
    assert [(job.id, job.status) for job in followed] == [(third.id, "completed"), (ids[1], "failed")]
    assert len(store.follow(kind="train", show=False)) == 4  # all are meant


def test_what_is_to_be_followed_must_be_said_and_be_there(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        with pytest.raises(InvalidValueError, match="which jobs are to be followed"):
            store.follow()
        with pytest.raises(InvalidValueError, match="with ids there is no filter beside them"):
            store.follow([], kind="train")
        with pytest.raises(JobNotFound):
            store.follow([uuid4()], show=False)
        with pytest.raises(InvalidValueError, match="at most 10,000"):
            store.follow([uuid4() for _ in range(10_001)], show=False)
        assert repr(store.follow([], show=False)) == "<Followed no jobs>"


def test_closing_the_store_ends_the_following(sqlite_url: str) -> None:
    store = JobStore(sqlite_url)
    store.submit("train", "spam")
    begun, found = threading.Event(), list[Any]()

    class Watched(io.StringIO):
        def write(self, text: str) -> int:
            begun.set()
            return len(text)

    thread = threading.Thread(target=lambda: found.append(store.follow(kind="train", file=Watched())))
    thread.start()
    assert begun.wait(60)
    store.close()
    thread.join(60)
    assert not found[0].complete


@pytest.mark.parametrize("display", [Terminal, RichTerminal])
def test_a_terminal_shows_what_runs_and_is_left_clean(display: Any) -> None:
    out = Screen()
    shown = display(out)
    running = Running("sp\x1b[2Jam", 40, {"loss": 0.25})
    shown.show(Snapshot({MlJobStatus.RUNNING: 1, MlJobStatus.COMPLETED: 1}, [running], 61))
    shown.end(Followed((), complete=False))
    shown.close()
    text = out.getvalue()
    assert "not all have finished; no jobs" in text
    assert "sp\x1b[2Jam" not in text
    assert "[############............] 1 of 2 jobs: 1 running, 1 completed, 0:01:01" in text


def test_the_display_is_of_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(display_for(io.StringIO(), show=True)) is Lines
    rich = display_for(Screen(), show=True)
    rich.close()
    assert type(rich) is RichTerminal
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert type(display_for(Screen(), show=True)) is Terminal


def test_a_job_and_a_page_are_shown_as_html_in_which_nothing_runs(engine: Engine) -> None:
    with Session(engine) as session:
        job = MlJob(kind="train", target_name=EVIL, spec={"a": EVIL}, worker="<b>", error_message="<i>" + "x" * 5000)
        session.add(job)
        session.commit()
        assert job._repr_html_() == "<table></table>"  # expired: to show it loads nothing
        session.refresh(job)
        html = job._repr_html_()
        page = Page((job,), cursor="c")._repr_html_()
    for text in (html, page):
        assert EVIL not in text
        assert "&lt;script&gt;" in text
        assert "&lt;b&gt;" in text
    assert "(5,003 characters)" in html
    assert "There are more: pass after=page.cursor." in page
    assert "<code>{&quot;a&quot;" in page


def test_frames_have_a_column_for_each_key_of_spec_and_metrics(store: Any) -> None:
    import pandas as pd

    _fill(store)
    frame = store.to_pandas(status="completed")
    assert isinstance(frame, pd.DataFrame)
    assert frame[["spec.lr", "metrics.f1", "target_name"]].to_dict("records") == [
        {"spec.lr": 0.1, "metrics.f1": 0.9312342, "target_name": "good"}
    ]
    assert not {"spec_json", "metrics_json"} & set(frame.columns)
    polars = store.to_polars(columns=("target_name",), spread=())
    assert (polars.columns, polars.height) == (["target_name"], 3)
