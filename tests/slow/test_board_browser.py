"""The board in a real browser: every page in each size and theme, what moves, keys, with and without script."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from mljobs import JobStore, MlJobStatus
from mljobs._values import utc_now
from mljobs.board import Access, create_app
from tests.boards import Made, ended, history, worker
from tests.browser import Browser
from tests.served import served

LIVE = "document.querySelector('#live [data-word]').textContent === 'Live'"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.driver.quit()


@pytest.fixture
def store(sqlite_url: str) -> Iterator[JobStore]:
    with JobStore(sqlite_url) as made:
        yield made


@pytest.fixture
def made(store: JobStore) -> Made:
    return history(store)


@pytest.fixture
def base(store: JobStore, made: Made, browser: Browser) -> Iterator[str]:
    browser.dress(1440, dark=False)
    browser.tell("Emulation.setScriptExecutionDisabled", value=False)
    browser.tell("Emulation.setTimezoneOverride", timezoneId="UTC")
    with served(create_app(store, authorize=lambda _: Access.ACT, title="prod-eu")) as url:
        yield url
        browser.open("about:blank")  # closes its stream


def pages(made: Made) -> dict[str, str]:
    ids = "&".join(f"id={job.id}" for job in made.completed)
    return {
        "now": "/",
        "jobs": "/jobs?q=kind:train",
        "filter": "/jobs?q=staus:failed",
        "job-failed": f"/jobs/{made.failed.id}",
        "job-running": f"/jobs/{made.running.id}",
        "targets": "/targets",
        "target": "/target?name=spam",
        "compare": f"/compare?{ids}",
        "overview": "/overview",
    }


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_every_page_is_sound(base: str, made: Made, browser: Browser, width: int, theme: str) -> None:
    browser.dress(width, dark=theme == "dark", scale=1 if width > 500 else 2)
    keep = os.environ.get("MLJOBS_BOARD_PICTURES")
    browser.console()
    for name, path in pages(made).items():
        browser.open(base + path)
        if browser.run("return Boolean(document.body.dataset.stream)"):
            browser.until(LIVE)
        assert browser.run("return document.scrollingElement.scrollWidth <= innerWidth"), name
        assert browser.accessibility() == [], name
        expected = ["422"] if name == "filter" else []
        assert [one for one in browser.console() if not any(status in one for status in expected)] == [], name
        if keep:
            browser.picture(Path(keep) / f"{name}-{width}-{theme}.png")


def test_a_bar_moves_while_its_job_runs(base: str, store: JobStore, browser: Browser) -> None:
    (claim,) = [store.claim_one(store.submit("train", "moving"), worker="gpu-3", lease=600)]
    store.set_progress(claim, 10)
    browser.open(base + "/")
    bar = f"document.querySelector('#r-{claim.job_id}' + ' .bar')?.getAttribute('aria-valuenow')"
    browser.until(f"{bar} === '10'")
    browser.run("window.same = true")
    for percent in (20, 55):
        store.set_progress(claim, percent)
        browser.until(f"{bar} === '{percent}'")
    store.complete(claim, {"f1": 1})
    browser.until(f"document.querySelector('#r-{claim.job_id}') === null")
    assert browser.run("return window.same")  # the page was not loaded anew


def test_nothing_moves_under_a_focus_and_it_does_once_that_is_gone(
    base: str, store: JobStore, browser: Browser
) -> None:
    (claim,) = [store.claim_one(store.submit("train", "held"), worker="gpu-3", lease=600)]
    browser.open(base + "/")
    browser.until(LIVE)
    row = f"document.querySelector('#r-{claim.job_id}')"
    browser.until(row)
    browser.run(f"{row}.querySelector('a').focus()")
    store.set_progress(claim, 77)
    browser.until("document.querySelector('#figures dd').textContent && window.sawBeat === undefined")
    store.submit("train", "another")  # once this is seen, a look has passed that saw the 77 too
    browser.until("document.querySelector('#next')?.textContent.includes('another')")
    assert browser.run(f"return {row}.querySelector('.bar').getAttribute('aria-valuenow')") == "0"
    browser.run("document.activeElement.blur()")
    browser.until(f"{row}.querySelector('.bar').getAttribute('aria-valuenow') === '77'")


def test_a_stream_goes_on_after_the_server_was_restarted(store: JobStore, made: Made, browser: Browser) -> None:
    with served(create_app(store)) as url:
        browser.open(url + "/")
        browser.until(LIVE)
    browser.until("document.querySelector('#live [data-word]').textContent === 'Reconnecting'")
    store.submit("train", "meanwhile", priority=99)
    with served(create_app(store), int(url.rpartition(":")[2])):
        browser.until("document.querySelector('#next').textContent.includes('meanwhile')")
        browser.until(LIVE)
        browser.open("about:blank")
    browser.console()  # what it said while there was no server


def test_cancelling_works_with_script(base: str, store: JobStore, made: Made, browser: Browser) -> None:
    browser.open(f"{base}/jobs/{made.running.id}")
    browser.run("document.querySelector('form[action$=\"actions/cancel\"] button').click()")
    browser.until("document.querySelector('h1')?.textContent === 'Cancel a running job?'")
    browser.run("document.querySelector('button.danger').click()")
    browser.until("document.querySelector('.seal.cancelled') !== null")
    assert store.get(made.running.id).status is MlJobStatus.CANCELLED
    assert browser.console() == []


def test_cancelling_works_without_script(base: str, store: JobStore, made: Made, browser: Browser) -> None:
    browser.tell("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(f"{base}/jobs/{made.running.id}")
        browser.until("document.querySelector('[data-word]').textContent === 'As of'")
        browser.follow('form[action$="actions/cancel"] button')
        browser.follow("button.danger")
        browser.until("document.querySelector('.seal.cancelled').checkVisibility()")
    finally:
        browser.tell("Emulation.setScriptExecutionDisabled", value=False)
    assert store.get(made.running.id).status is MlJobStatus.CANCELLED


def test_a_list_tells_of_newer_jobs_and_moves_no_row(base: str, store: JobStore, browser: Browser) -> None:
    browser.open(f"{base}/jobs?q=target:fresh*")
    store.submit("train", "fresh_one")
    browser.open(f"{base}/jobs?q=target:fresh*")
    browser.until(LIVE)
    store.submit("train", "fresh_two")
    browser.until("document.querySelector('#newer').textContent === '1 newer: show'")
    assert browser.run("return document.querySelectorAll('#rows tbody tr').length") == 1


def test_keys_move_select_and_lead(base: str, browser: Browser) -> None:
    from selenium.webdriver.common.by import By

    browser.open(f"{base}/jobs")
    browser.until(LIVE)

    def press(keys: str) -> None:
        browser.driver.find_element(By.TAG_NAME, "body").send_keys(keys)

    press("jj")
    browser.until("document.querySelectorAll('tbody tr')[1].classList.contains('cur')")
    press("k")
    browser.until("document.querySelectorAll('tbody tr')[0].classList.contains('cur')")
    press("x")
    browser.until("document.querySelector('#live [data-word]').textContent === 'Paused'")
    browser.until("getComputedStyle(document.querySelector('.bulk')).display === 'flex'")
    press("?")
    browser.until("document.querySelector('dialog[open]') !== null")
    assert browser.accessibility() == []
    browser.run("document.querySelector('dialog').close()")
    press("/")
    browser.until("document.activeElement.id === 'q'")
    browser.run("document.activeElement.blur()")
    press("gt")
    browser.until("location.pathname === '/targets'")


def test_times_are_in_the_zone_of_the_viewer_with_the_zone_written(base: str, made: Made, browser: Browser) -> None:
    browser.tell("Emulation.setTimezoneOverride", timezoneId="Asia/Kolkata")
    browser.open(f"{base}/jobs/{made.failed.id}")
    zone = browser.until(
        "document.querySelector('[data-zone]').textContent !== 'UTC' && document.querySelector('[data-zone]').textContent"
    )
    assert zone == "GMT+5:30"
    title, text = browser.run("const t = document.querySelector('.seal time'); return [t.title, t.textContent]")
    assert text.endswith("GMT+5:30")
    assert made.failed.finished_at is not None
    assert f"{made.failed.finished_at:%Y-%m-%d %H:%M:%S}" in title
    assert title.endswith("UTC")


def test_a_time_that_is_of_another_zone_than_the_head_of_its_column_says_so(
    base: str, store: JobStore, browser: Browser
) -> None:
    now = utc_now()
    half = now - timedelta(days=182)  # in one of the two there is summer time
    for name, moment in (("summer-or-winter", half), ("today", now - timedelta(hours=1))):
        ended(store, "completed", target=name, created_at=moment, started_at=moment, finished_at=moment)
    browser.tell("Emulation.setTimezoneOverride", timezoneId="Europe/Berlin")
    browser.open(f"{base}/jobs?q=target:today,summer-or-winter")
    head, *rows = browser.until(
        "document.querySelector('[data-zone]').textContent !== 'UTC' && [document.querySelector('[data-zone]').textContent,"
        "...[...document.querySelectorAll('#rows tbody time')].map(t => t.textContent)]"
    )
    assert head in ("CET", "CEST", "GMT+1", "GMT+2")
    assert [len(text.split()) for text in rows] == [2, 3]
    browser.dress(390, dark=False, scale=2)  # where no column has a head, each time has its zone
    browser.open(f"{base}/jobs?q=target:today")
    after = "getComputedStyle(document.querySelector('#rows tbody time'), '::after').content"
    browser.until(f"{after} === '\" {head}\"'")


def test_long_names_make_no_page_wider_than_its_window(base: str, store: JobStore, browser: Browser) -> None:
    for name in ("x" * 300, "a b c " * 60, "\U0001f469\u200d" * 40, "\u05e9\u05dc\u05d5\u05dd " * 30):
        ended(store, "failed", target=name, error_message=f"E{name}", spec={name[:60]: name})
        done = ended(store, "completed", target=name, metrics={name[:60]: 0.1 + 0.2}, spec={"lr": 1 / 3})
        claim = store.claim_one(store.submit("backfill", name), worker=f"w{name[:200]}", lease=0.001)
        store.set_progress(claim, 10)
        store.submit("drift_compute", name)
    worker(store, "w" * 150, "train", "backfill", "drift_compute", "feature_refresh")
    for width in (1440, 800, 390):
        browser.dress(width, dark=False)
        for path in ("/", "/jobs", "/targets", "/overview", f"/jobs/{done.id}", f"/compare?id={done.id}", "/compare"):
            browser.open(base + path)
            assert browser.run("return document.scrollingElement.scrollWidth") <= width, (path, width)


def test_the_theme_changes_without_a_reload_and_stays(base: str, browser: Browser) -> None:
    browser.open(f"{base}/jobs")
    browser.run("window.same = true; document.querySelector('form[action$=theme] button').click()")
    browser.until("document.documentElement.dataset.theme === 'dark' && window.same")
    browser.open(f"{base}/")
    assert browser.run("return document.documentElement.dataset.theme") == "dark"
    browser.driver.delete_all_cookies()


def test_the_chart_of_a_target_is_zoomed_under_the_same_policy(base: str, browser: Browser) -> None:
    browser.open(f"{base}/target?name=spam")
    browser.console()
    browser.run("document.querySelector('[data-zoom]').click()")
    browser.until("document.querySelector('.zoom canvas') !== null")
    assert browser.console() == []


def test_a_row_and_its_line_light_each_other(base: str, made: Made, browser: Browser) -> None:
    browser.open(base + pages(made)["compare"])
    run = made.completed[0].id
    browser.run(f"document.querySelector('#run-{run} a').focus()")
    browser.until(f"document.querySelector('g.run[data-row=\"{run}\"]').classList.contains('lit')")


def test_a_page_is_printed_without_what_is_only_for_hands(base: str, made: Made, browser: Browser) -> None:
    browser.open(f"{base}/jobs/{made.failed.id}")
    browser.tell("Emulation.setEmulatedMedia", media="print")
    shown = browser.run(
        "return [...document.querySelectorAll('.top, .acts')].filter(e => getComputedStyle(e).display !== 'none').length"
    )
    browser.tell("Emulation.setEmulatedMedia", media="")
    assert shown == 0
