"""The board's pages, asked as a browser without JavaScript asks them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from html.parser import HTMLParser
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from mljobs import AsyncJobStore, JobStore, MlJobMixin, MlJobStatus
from mljobs._values import utc_now
from mljobs.board import Access, create_app
from mljobs.db._engines import async_url
from tests.boards import ERROR, Made, client, ended, history, send, token_of
from tests.cases import case
from tests.databases import Databases


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as made:
        yield made


@pytest.fixture
def made(store: JobStore) -> Made:
    return history(store)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[JobStore, Made]]:
    """A store and the small history in it, for tests that only look."""
    with ExitStack() as stack:
        if request.param == "sqlite":
            path = tmp_path_factory.mktemp("board") / "jobs.db"
            shutil.copy(request.getfixturevalue("sqlite_template"), path)
            url = f"sqlite:///{path}"
        else:
            databases: Databases = request.getfixturevalue("postgres_databases")
            url = stack.enter_context(databases.fresh())
        store = stack.enter_context(JobStore(url))
        yield store, history(store)


def paths(made: Made) -> list[str]:
    ids = "&".join(f"id={job.id}" for job in made.completed)
    jobs = [made.failed, made.retried, made.queued, made.running, made.silent, made.cancelled, made.completed[0]]
    return [
        "/", "/jobs", "/jobs?q=status:failed", "/jobs?q=spec.lr>0.05", "/targets", "/target?name=spam",
        "/target?name=spam&kind=train&metric=loss&span=7d", "/compare", f"/compare?{ids}", f"/compare?{ids}&metric=loss",
        "/overview", "/overview?span=1h", "/overview?span=7d", "/overview?span=30d", *(f"/jobs/{job.id}" for job in jobs),
    ]  # fmt: skip


class Links(HTMLParser):
    """What a page links to and loads, the ids in it, and what is wrong with its nesting."""

    VOID = frozenset({"meta", "link", "input", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.ids: list[str] = []
        self.inline: list[str] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "action") and value and not value.startswith("#"):
                self.links.add(value)
            if name == "id" and value:
                self.ids.append(value)
            if name == "style" or name.startswith("on"):
                self.inline.append(f"{tag} {name}")
        if tag == "script" and not dict(attrs).get("src"):
            self.inline.append("script")
        if tag == "style":
            self.inline.append("style")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_every_page_stands_alone_and_all_that_it_links_to_is_there(shown: tuple[JobStore, Made]) -> None:
    store, made = shown
    board = client(store)
    seen: set[str] = set()
    for path in paths(made):
        answer = board.get(path)
        assert answer.status_code == 200, path
        page = Links(answer.text)
        assert (page.inline, page.wrong, page.open) == ([], [], []), path
        assert len(page.ids) == len(set(page.ids)), path
        assert len(answer.content) < 200_000
        seen |= page.links
    if store.engine.dialect.name == "sqlite":  # what a page links to has nothing to do with the database
        for link in sorted(seen):
            if "/actions/" not in link and not link.endswith("/theme"):
                assert board.get(link).status_code == 200, link


def test_now_says_what_runs_and_what_needs_attention(shown: tuple[JobStore, Made]) -> None:
    store, made = shown
    html = client(store).get("/").text
    assert 'aria-valuenow="40"' in html
    assert "gpu-1" in html
    assert re.search(r"worker gpu-2 is silent; its lease ended <time", html)
    assert "queued; its target is taken by gpu-2 (exclusive)" in html
    assert "Rescue expired leases" in html
    assert f"/jobs/{made.running.id}" in html


def test_an_empty_table_says_how_to_begin(store: JobStore) -> None:
    html = client(store).get("/").text
    assert "Nothing runs, nothing waits" in html
    assert "store.submit(" in html


def test_a_list_shows_filter_chips_words_states_and_chains(shown: tuple[JobStore, Made]) -> None:
    store, _ = shown
    html = client(store).get("/jobs?q=status:failed kind:train").text
    assert "ValueError: lr must be below 1" in html
    assert "<b>1</b> match" in html
    assert 'aria-label="Remove status:failed"' in html
    assert html.count('class="me"') == 1
    assert '<span class="vh">queued </span>' in html  # the retry, in the chain
    counted = client(store).get("/jobs").text
    assert "Completed<span>8</span>" in counted


def test_a_filter_that_is_not_understood_asks_nothing_and_helps(shown: tuple[JobStore, Made]) -> None:
    store, _ = shown
    answer = client(store).get("/jobs", params={"q": "staus:failed lr>abc"})
    assert answer.status_code == 422
    assert "nothing was asked" in answer.text
    assert "Did you mean status:failed?" in answer.text


def test_a_filter_that_finds_nothing_says_which_term_to_drop(shown: tuple[JobStore, Made]) -> None:
    store, _ = shown
    html = client(store).get("/jobs?q=kind:train target:zebra").text
    assert "No job matches." in html
    assert "Without target:zebra" in html


def test_pages_hang_on_a_row_and_lead_both_ways(store: JobStore) -> None:
    for number in range(7):
        ended(store, "completed", ago=100 * (number + 1))
    board = client(store)

    def ids(html: str) -> list[str]:
        return re.findall(r'<tr id="j-([0-9a-f-]{36})"', html)

    def link(html: str, rel: str) -> str:
        found = re.search(rf'rel="{rel}" href="([^"]+)"', html)
        assert found is not None
        return f"{found[1].replace('&amp;', '&')}&limit=3"

    first = board.get("/jobs?limit=3").text
    second = board.get(link(first, "next")).text
    third = board.get(link(second, "next")).text
    every = [str(job.id) for job in store.find()]
    assert ids(first) + ids(second) + ids(third) == every
    assert 'rel="next"' not in third
    assert ids(board.get(link(third, "prev")).text) == ids(second)
    store.submit("train", "new")
    assert ids(board.get(link(second, "prev")).text) == ids(first)


def test_a_job_shows_its_chain_its_error_its_trees_and_that_it_is_final(shown: tuple[JobStore, Made]) -> None:
    store, made = shown
    html = client(store).get(f"/jobs/{made.failed.id}").text
    assert "Final since" in html
    assert "2 records of the same work" in html
    assert "app/fit.py:7 in fit" in html
    assert "1 frame in libraries: torch" in html
    assert "torch/nn/module.py:1773 in call" in html
    assert 'class="here"' in html
    assert "opt.name" in html  # the link to the jobs that have it too
    big = client(store).get(f"/jobs/{made.completed[0].id}").text
    assert str(2**70) in big


def test_a_running_job_shows_its_lease_and_what_it_reported(store: JobStore, made: Made) -> None:
    (claim,) = [store.claim_one(store.submit("train", "live"), worker="gpu-9", lease=60)]
    store.report(claim, progress=30, metrics={"loss": 0.25})
    html = client(store).get(f"/jobs/{claim.job_id}").text
    assert "fences every write" in html
    assert "so far, 1 key" in html
    assert "0.25" in html
    assert "Cancel…" in html


def test_a_target_shows_the_best_so_far_and_what_changed(shown: tuple[JobStore, Made]) -> None:
    store, _ = shown
    html = client(store).get("/target?name=spam").text
    assert "best 0.87" in html
    assert 'class="n diff"' in html
    lower = client(store).get("/target?name=spam&metric=loss").text
    assert "best 0.43" in lower
    assert "lower is better" in lower
    assert client(store).get("/target?name=nothing").status_code == 404


def test_a_comparison_leaves_out_what_is_equal_and_ranks(shown: tuple[JobStore, Made]) -> None:
    store, made = shown
    ids = "&".join(f"id={job.id}" for job in made.completed)
    html = client(store).get(f"/compare?{ids}").text
    assert "Compare 8 runs" in html
    rows = re.findall(r'<tr id="run-([0-9a-f-]{36})"', html)
    assert rows == [str(job.id) for job in made.completed[::-1]]
    assert 'title="depth"' not in html  # the same in all
    lines = re.findall(r'<g class="run" data-row="([0-9a-f-]{36})"', html)
    assert sorted(lines) == sorted(rows)


def test_fifty_runs_with_thirty_parameters_are_compared(store: JobStore) -> None:
    jobs = [
        ended(
            store,
            "completed",
            ago=number,
            spec={f"p{at}": (number * at) % 7 for at in range(30)},
            metrics={"f1": number / 60},
        )
        for number in range(1, 51)
    ]
    answer = client(store).get("/compare?" + "&".join(f"id={job.id}" for job in jobs))
    assert answer.status_code == 200
    assert answer.text.count('<tr id="run-') == 50
    assert answer.text.count('<th class="n mono"') == 25  # of every seventh all values are equal
    assert len(answer.content) < 400_000


def test_the_overview_counts_by_outcome_and_groups_reasons(shown: tuple[JobStore, Made]) -> None:
    store, _ = shown
    html = client(store).get("/overview").text
    assert "8 completed" in html
    assert "1 failed, at the foot" in html
    assert "ValueError: lr must be below 1" in html
    assert "gpu-2" in html


def test_times_are_iso_utc_with_all_of_it_in_the_title(shown: tuple[JobStore, Made]) -> None:
    store, made = shown
    html = client(store).get(f"/jobs/{made.failed.id}").text
    iso = made.failed.created_at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    full = made.failed.created_at.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    assert f'<time datetime="{iso}" title="{full} UTC"' in html


def test_a_clock_that_was_set_back_makes_no_negative_duration(store: JobStore) -> None:
    moment = utc_now()
    job = ended(store, "completed", started_at=moment, finished_at=moment - timedelta(hours=1), created_at=moment)
    board = client(store)
    for path in ("/jobs", f"/jobs/{job.id}", "/target?name=spam", f"/compare?id={job.id}"):
        assert not re.search(r">[^<>]*-\d+ (ms|s|m|h)\b", board.get(path).text), path


# ----------------------------------------------------------------------------------------------------------- actions


def test_cancelling_a_queued_job_is_one_form(store: JobStore, made: Made) -> None:
    board = client(store)
    answer = send(board, "/actions/cancel", id=made.queued.id)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/jobs/{made.queued.id}")
    assert store.get(made.queued.id).status is MlJobStatus.CANCELLED


def test_cancelling_a_running_job_asks_first(store: JobStore, made: Made) -> None:
    board = client(store)
    asked = send(board, "/actions/cancel", id=made.running.id)
    assert "Cancel a running job?" in asked.text
    assert store.get(made.running.id).status is MlJobStatus.RUNNING
    send(board, "/actions/cancel", id=made.running.id, confirmed="1", token=token_of(asked.text))
    assert store.get(made.running.id).status is MlJobStatus.CANCELLED


def test_a_retry_is_a_new_record_unless_one_is_at_work(store: JobStore, made: Made) -> None:
    board = client(store)
    answer = send(board, "/actions/retry", id=made.cancelled.id, unless_active="1")
    again = store.get(answer.headers["location"].rpartition("/")[2])
    assert (again.retry_of, again.status) == (made.cancelled.id, MlJobStatus.QUEUED)
    second = send(board, "/actions/retry", id=made.cancelled.id, unless_active="1")
    assert second.headers["location"].endswith(str(again.id))


def test_a_rescue_puts_the_jobs_of_silent_workers_back(store: JobStore, made: Made) -> None:
    answer = send(client(store), "/actions/rescue")
    assert "queued again" in answer.text
    assert store.get(made.silent.id).status is MlJobStatus.QUEUED


def test_a_bulk_action_says_what_it_will_do_and_then_does_that(store: JobStore, made: Made) -> None:
    failed = [ended(store, "failed", target="other", ago=number + 1) for number in range(3)]
    board = client(store)
    page = send(board, "/actions/preview", do="retry", scope="all", q="status:failed")
    assert "Retry 3 jobs?" in page.text
    assert "1</dt><dd>is left alone: retried already" in page.text
    as_of = re.search(r'name="as_of" value="(\d+)"', page.text)
    assert as_of is not None
    later = ended(store, "failed", target="other", created_at=utc_now() + timedelta(seconds=5))
    done = send(board, "/actions/bulk", do="retry", scope="all", q="status:failed", as_of=as_of[1])
    assert "queued again, each as a new record" in done.text
    assert {job.retry_of for job in store.find("target:other status:queued")} == {job.id for job in failed}
    assert not store.find(retry_of=later.id)


def test_picked_jobs_are_cancelled_and_those_that_have_finished_are_left(store: JobStore, made: Made) -> None:
    board = client(store)
    picked = [str(made.queued.id), str(made.failed.id)]
    page = send(board, "/actions/preview", do="cancel", scope="picked", id=picked)
    assert "Cancel 1 job?" in page.text
    assert "left alone: finished, and cannot be cancelled" in page.text
    send(board, "/actions/bulk", do="cancel", scope="picked", id=picked)
    assert store.get(made.queued.id).status is MlJobStatus.CANCELLED


def test_the_theme_is_the_only_cookie_and_leads_back(store: JobStore) -> None:
    board = client(store)
    answer = send(board, "/theme", theme="dark", back="/jobs?q=status:failed")
    assert answer.headers["location"] == "/jobs?q=status:failed"
    assert re.match(r"mljobs-theme=dark; .*Path=/;.*SameSite=lax", answer.headers["set-cookie"])
    assert 'data-theme="dark"' in board.get("/", headers={"Cookie": "mljobs-theme=dark"}).text
    away = send(board, "/theme", theme="dark", back="//evil.example/")
    assert away.headers["location"] == "/"


# ---------------------------------------------------------------------------------------------------------- anywhere


def test_it_can_be_mounted_at_any_path_behind_any_prefix(sqlite_url: str) -> None:
    store = JobStore(sqlite_url)
    made = history(store)
    app = Starlette(routes=[Mount("/a b/jobs", create_app(store))])
    for root_path in ("", "/proxy"):
        board = TestClient(app, root_path=root_path)
        prefix = f"{root_path}/a%20b/jobs"
        for path in paths(made):
            answer = board.get(f"{root_path}/a b/jobs{path}")
            assert answer.status_code == 200, path
            page = Links(answer.text)
            assert all(link.startswith(f"{prefix}/") for link in page.links), path
        without = Links(board.get("/a b/jobs/").text)  # a server may leave the prefix out of the path
        assert without.links
        assert all(link.startswith(f"{prefix}/") for link in without.links)
    store.close()


class Base(DeclarativeBase):
    pass


class BoardRun(MlJobMixin, Base):
    __tablename__ = "board_runs"
    owner: Mapped[str | None] = mapped_column(default=None)


def test_a_hosts_own_class_with_its_sessions_is_shown(empty_url: str) -> None:
    engine = create_engine(empty_url)
    Base.metadata.create_all(engine)
    store = JobStore(sessionmaker(engine), model=BoardRun)
    with Session(engine) as session, session.begin():
        session.add(BoardRun(kind="train", target_name="spam", owner="ann"))
    board = client(store)
    assert "board_runs" in board.get("/").text
    assert "spam" in board.get("/jobs?q=owner:ann").text
    assert 'class="empty"' in board.get("/jobs?q=owner:bob").text
    job = store.find()[0]
    send(board, "/actions/cancel", id=job.id)
    again = send(board, "/actions/retry", id=job.id)
    assert store.get(again.headers["location"].rpartition("/")[2]).owner == "ann"  # type: ignore[attr-defined]
    engine.dispose()


def test_the_async_store_serves_the_same_pages(store: JobStore, made: Made, url: str) -> None:
    awaited = AsyncJobStore(async_url(url))
    with TestClient(create_app(awaited, authorize=lambda _: Access.ACT), follow_redirects=False) as board:
        for path in paths(made):
            assert board.get(path).status_code == 200, path
        send(board, "/actions/cancel", id=made.queued.id)
        assert store.get(made.queued.id).status is MlJobStatus.CANCELLED
        assert board.portal is not None
        board.portal.call(awaited.close)


def test_errors_are_put_so_that_the_data_stay_readable(store: JobStore) -> None:
    job = ended(store, "failed", error_message=ERROR)
    text = client(store).get(f"/api/jobs/{job.id}").json()["error_message"]
    assert text == ERROR
    assert json.loads(client(store).get("/api/jobs?q=status:failed").text)["jobs"][0]["id"] == str(job.id)


def test_a_read_only_database_offers_nothing_that_changes(
    url: str, store: JobStore, made: Made, monkeypatch: Any
) -> None:
    from mljobs import jobs

    monkeypatch.setattr(jobs, "why_read_only", lambda bind, *, model: "the database is a replica")
    html = client(store).get("/jobs").text
    assert "Read only: the database is a replica." in html
    assert 'class="pick"' not in html
    assert "Retry" not in client(store).get(f"/jobs/{made.failed.id}").text


def test_a_list_is_sorted_by_creation_or_by_end_both_ways_and_pages_keep_the_order(store: JobStore) -> None:
    for number in range(5):
        ended(store, "completed", ago=100 * (number * 3 % 5 + 1), took=1000 - 200 * number)
    store.submit("train", "waits")
    board = client(store)
    for sort, key, last in (
        ("newest", "created_at", True),
        ("oldest", "created_at", False),
        ("last_finished", "finished_at", True),
        ("first_finished", "finished_at", False),
    ):
        jobs = [job for job in store.find() if getattr(job, key) is not None]
        expected = [str(job.id) for job in sorted(jobs, key=lambda job: getattr(job, key), reverse=last)]
        seen: list[str] = []
        path = f"/jobs?sort={sort}&limit=2"
        for _ in range(3):
            html = board.get(path).text
            seen += re.findall(r'<tr id="j-([0-9a-f-]{36})"', html)
            found = re.search(r'rel="next" href="([^"]+)"', html)
            path = found[1].replace("&amp;", "&") if found else path
        assert seen == expected, sort
        assert f'aria-sort="{"descending" if last else "ascending"}"' in html
        back = re.search(r'rel="prev" href="([^"]+)"', html)
        assert back is not None
        earlier = re.findall(r'<tr id="j-([0-9a-f-]{36})"', board.get(back[1].replace("&amp;", "&")).text)
        assert earlier == expected[2:4]


def test_charts_of_the_strangest_numbers_are_drawn_or_left_out(sqlite_url: str) -> None:
    strange: list[tuple[float, float]] = [
        (1e16, 1e16 + 2),
        (1e308, -1e308),
        (5e-324, 0.0),
        (1e-300, 2e-300),
        (0.0, 0.0),
        (1e149, -1e149),
        (2**80, 2**80 + 1),
    ]
    with JobStore(sqlite_url) as store:
        board = client(store)
        for at, values in enumerate(strange):
            jobs = [
                ended(store, "completed", target=f"t{at}", ago=n + 1, spec={"p": v}, metrics={"f1": v})
                for n, v in enumerate(values)
            ]
            ids = "&".join(f"id={job.id}" for job in jobs)
            for path in (f"/target?name=t{at}", f"/compare?{ids}", f"/api/compare?{ids}", f"/api/target?name=t{at}"):
                with case(values, path):
                    answer = board.get(path)
                    assert answer.status_code == 200
                    assert not re.search(r'="-?(?:nan|inf)', answer.text)
