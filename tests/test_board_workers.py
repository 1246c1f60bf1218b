"""The board shows who works: busy, idle, stopping and silent workers, and of which jobs nobody takes care."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from mljobs import JobStore, MlJob
from mljobs._values import utc_now
from mljobs.jobs import WorkerState
from tests.boards import client, worker

WORKERS = MlJob.__workers__


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as made:
        yield made


def silence(store: JobStore, name: str, span: timedelta) -> None:
    with store.engine.begin() as connection:
        connection.execute(sa.update(WORKERS).where(WORKERS.c.name == name).values(last_seen_at=utc_now() - span))


def rows(html: str) -> list[tuple[str, str]]:
    """Return the name and the state of each worker on the page."""
    table = re.search(r'<div id="workers">.*?</div>', html, re.DOTALL)
    assert table is not None
    plain = [re.sub(r"<[^>]+>", " ", row) for row in re.findall(r"<tr id=.*?</td>", table[0], re.DOTALL)]
    return [(words[0], words[1]) for words in map(str.split, plain)]


def test_workers_are_shown_with_what_they_do_the_silent_ones_first(store: JobStore) -> None:
    for name in ("busy", "idle", "quiet", "lost"):
        worker(store, name, "train")
    worker(store, "leaving", "train", state=WorkerState.STOPPING)
    worker(store, "ended", "train", state=WorkerState.GONE)
    silence(store, "quiet", timedelta(minutes=5))
    silence(store, "lost", timedelta(hours=5))
    store.claim_one(store.submit("train", "spam"), worker="busy", lease=60)
    store.claim_one(store.submit("train", "ham"), worker="unregistered", lease=60)
    board = client(store)
    html = board.get("/").text
    shown = [("quiet", "silent"), ("leaving", "stopping"), ("idle", "idle"), ("busy", "busy"), ("unregistered", "busy")]
    assert rows(html) == shown
    assert "not registered" in html
    found = board.get("/api/workers").json()["workers"]
    assert [(one["worker"], one["state"]) for one in found] == shown
    quiet, *_, busy, unregistered = found
    assert 299 < quiet["silent_seconds"] < 400
    assert (busy["jobs"], busy["concurrency"], busy["kinds"], busy["host"]) == (1, 2, ["train"], "host-1")
    assert 0 < busy["lease_seconds_left"] <= 60
    assert (unregistered["host"], unregistered["kinds"]) == (None, ["train"])
    assert "silent" in board.get("/overview").text


def test_a_queued_job_that_no_worker_takes_says_why(store: JobStore) -> None:
    old = utc_now() - timedelta(minutes=3)
    job, other = store.submit("backfill", "events", created_at=old), store.submit("train", "spam", created_at=old)
    nobody = client(store)
    assert nobody.get("/").text.count("1 queued; no worker is running") == 2
    assert "no worker is running" in nobody.get(f"/jobs/{job.id}").text
    worker(store, "gpu-1", "train")
    board = client(store)
    html = board.get("/").text
    assert html.count("1 queued; no worker handles this kind") == 1
    assert board.get("/api/workers").json()["unhandled"] == {"backfill": "no worker handles this kind"}
    assert "no worker handles this kind" in board.get(f"/jobs/{job.id}").text
    assert "no worker" not in board.get(f"/jobs/{other.id}").text
    fragments: Any = board.get(f"/poll?view=job&id={job.id}").json()["html"]
    assert "no worker handles this kind" in fragments["state"]


def test_a_database_without_the_table_of_workers_guesses_nothing(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        with store.engine.begin() as connection:
            connection.execute(sa.schema.DropTable(WORKERS))
        store.submit("train", "spam", created_at=utc_now() - timedelta(minutes=3))
        html = client(store).get("/").text
        assert "keeps no table of workers" in html
        assert "no worker is running" not in html
        store.claim(worker="gpu-9", lease=60)
        assert rows(client(store).get("/").text) == [("gpu-9", "busy")]
