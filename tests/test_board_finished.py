"""What finished in each hour is counted once, a little at a time, and the overview says how far."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from mljobs import JobStore, MlJob, jobs
from mljobs._values import utc_now
from mljobs.board import _hub, _overview_page, create_app
from mljobs.board._finished import HOUR, FinishedKept
from tests.boards import client, ended
from tests.test_board_attacks import Reader

DAY = timedelta(days=1)
OLDER = "what is older is being counted"


@pytest.fixture
def store(sqlite_url: str) -> Iterator[JobStore]:
    with JobStore(sqlite_url) as made:
        yield made


def spread_out(store: JobStore) -> None:
    for hours in (0, 0.5, 3, 30, 31, 200, 600, 690):
        ended(store, "failed" if hours == 31 else "completed", ago=3600 * hours + 5)


def test_hours_are_counted_as_the_database_counts_them_and_only_once(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread_out(store)
    kept, asked = FinishedKept(), []
    real = jobs.finished_per

    def finished_per(*given: Any, **options: Any) -> Any:
        asked.append(options["since"])
        return real(*given, **options)

    monkeypatch.setattr(jobs, "finished_per", finished_per)
    since = utc_now().replace(hour=0, minute=0, second=0, microsecond=0) - 29 * DAY
    with store.connect() as bind:
        kept.count(bind, since, MlJob, most=10**9)
        assert kept.counted_from(since) == since
        assert sorted(map(str, kept.per(DAY, since))) == sorted(map(str, real(bind, DAY, since=since)))
        assert len(asked) < 20  # not one for each of 690 hours
        asked.clear()
        kept.count(bind, since, MlJob, most=10**9)
    assert asked == []


def test_the_overview_shows_what_is_counted_and_counts_on_beside(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hub, "LOOK_EVERY", 0.02)
    spread_out(store)

    async def story() -> None:
        assert OLDER not in client(store).get("/overview?span=30d").text  # so few are counted at once
        monkeypatch.setattr(FinishedKept.count, "__defaults__", (1,))
        app = create_app(store)
        reader = Reader(app, "/events", "view=overview&span=30d")
        _, data = await reader.event("patch")
        assert OLDER in data["html"]["finished"]
        while OLDER in data["html"].get("finished", OLDER):
            _, data = await reader.event("patch")
        assert "7 completed" in data["html"]["finished"]
        assert "1 failed, at the foot" in data["html"]["finished"]
        await reader.leave()

    asyncio.run(story())


def test_the_figures_of_a_period_are_read_once_for_all_who_look_in_the_same_seconds(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    real = jobs.durations
    monkeypatch.setattr(jobs, "durations", lambda bind, **options: asked.append(1) or real(bind, **options))
    ended(store, "completed", took=60)
    board = client(store)
    assert "1 m 00 s" in board.get("/overview").text
    before = len(asked)
    assert "1 m 00 s" in board.get("/overview").text
    assert len(asked) == before
    board.get("/overview?span=7d")
    assert len(asked) == before + 1
    monkeypatch.setattr(_overview_page, "_FIGURES_KEPT", -1.0)
    board.get("/overview")
    assert len(asked) == before + 2


def test_a_page_that_is_open_says_when_the_database_is_away_and_when_it_is_back(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hub, "LOOK_EVERY", 0.02)

    async def story() -> None:
        reader = Reader(create_app(store), "/events")
        await reader.event("patch")
        with monkeypatch.context() as away:

            def connect(*_: Any, **__: Any) -> Any:
                raise OperationalError("SELECT secret", {}, Exception("connection refused"))

            away.setattr(store, "connect", connect)
            data: dict[str, Any] = {"html": {}}
            while not data["html"].get("~away"):
                _, data = await reader.event("patch")
            assert data["html"]["~away"] == "connection refused"
        while data["html"].get("~away") != "":
            _, data = await reader.event("patch")
        await reader.leave()

    asyncio.run(story())


def test_hours_that_are_not_over_are_counted_anew(store: JobStore) -> None:
    kept, since = FinishedKept(seconds=0.0), utc_now().replace(minute=0, second=0, microsecond=0) - DAY
    with store.connect() as bind:
        kept.count(bind, since, MlJob)
    ended(store, "completed", ago=0.01)
    with store.connect() as bind:
        kept.count(bind, since, MlJob)
    assert sum(one.jobs for one in kept.per(HOUR, since)) == 1
