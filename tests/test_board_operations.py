"""The operations that the board shows: summaries, chains, the queue, figures over many; through every driver."""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from mljobs import InvalidValueError, JobStore, MlJob, jobs
from mljobs._values import utc_now
from tests.backends import Backend

DAY = timedelta(days=1)


def ended(store: Any, status: str, *, target: str = "spam", took: float = 60, ago: float = 600, **values: Any) -> MlJob:
    """Insert a job that finished ``ago`` seconds ago, after ``took`` seconds and 30 of waiting."""
    end = utc_now() - timedelta(seconds=ago)
    start = end - timedelta(seconds=took)
    values = {"created_at": start - timedelta(seconds=30), "started_at": start, "finished_at": end} | values
    job: MlJob = store.submit("train", target, status=status, attempts=1, **values)
    return job


def test_a_summary_has_the_record_and_its_lease_with_texts_cut(store: Any) -> None:
    store.submit("train", "spam", {"big": "x" * 300_000, "n": 2**70}, priority=2)
    store.submit("train", "spam", {"lr": 0.1})
    claim = store.claim(worker="w1", limit=1)[0]
    store.set_progress(claim, 40)
    small, big = store.summaries().jobs
    assert (small.spec, small.worker, small.status) == ('{"lr":0.1}', None, "queued")
    assert (big.spec, big.worker, big.progress, big.token) == (None, "w1", 40, claim.token)
    assert big.spec_bytes > 1000
    assert big.expires_at == claim.expires_at
    (cut,) = store.summaries_of([big.id], text=1_000_000)
    assert len(cut.spec) > 300_000


def test_pages_of_summaries_hang_on_a_row(store: Any) -> None:
    made = [store.submit("train", "spam").id for _ in range(5)]
    first = store.summaries(limit=2)
    store.submit("train", "spam")
    second = store.summaries(limit=2, after=first.cursor)
    third = store.summaries(limit=2, after=second.cursor)
    assert [job.id for page in (first, second, third) for job in page.jobs] == made[::-1]
    assert third.cursor is None
    with pytest.raises(InvalidValueError):
        store.summaries(after="nonsense")


def test_an_error_is_its_first_line(store: Any) -> None:
    ended(store, "failed", error_message="ValueError: " + "x" * 4000 + "\nTraceback")
    assert store.last_failures()[0].error == ("ValueError: " + "x" * 4000)[:300]


def test_the_chain_of_a_job_goes_both_ways_and_branches(store: Any) -> None:
    first = ended(store, "failed")
    second = store.retry(first)
    other = store.retry(first, another=True)
    alone = store.submit("train", "other")
    chains = store.chains([second.id, alone.id])
    assert [job.id for job in chains[second.id]] == [first.id, second.id, other.id]
    assert [job.id for job in chains[alone.id]] == [alone.id]
    assert [job.id for job in store.chain(first)] == [first.id, second.id, other.id]


def test_a_chain_whose_beginning_was_pruned_and_one_of_unknown_jobs(store: Any) -> None:
    lone = store.submit("train", "spam", retry_of="0199f3c2" + "0" * 24)
    assert [job.id for job in store.chain(lone)] == [lone.id]
    assert store.chain("0199f3c2" + "0" * 24) == []


def test_a_chain_that_bites_its_tail_ends(store: Any, backend: Backend) -> None:
    one, two = store.submit("train", "spam"), store.submit("train", "spam")
    with backend.outside.begin() as connection:
        table = MlJob.__table__
        for this, that in ((one, two), (two, one)):
            connection.execute(table.update().where(table.c.id == this.id).values(retry_of=that.id))
    assert {job.id for job in store.chain(one)} == {one.id, two.id}


def test_running_jobs_come_longest_first_with_those_started_by_hand(store: Any) -> None:
    hour = timedelta(hours=1)
    by_hand = store.submit("train", "hand", status="running", started_at=utc_now() - hour, created_at=utc_now() - hour)
    store.submit("train", "spam")
    store.claim(worker="w1")
    assert [(job.target_name, job.worker) for job in store.running_jobs()] == [("hand", None), ("spam", "w1")]
    assert store.running_jobs(limit=1)[0].id == by_hand.id


def test_a_cancelled_job_whose_worker_has_not_stopped_is_found(store: Any) -> None:
    job = store.submit("train", "spam", exclusive=True)
    (claim,) = store.claim(worker="w1")
    store.cancel(job)
    waits = store.submit("train", "spam", exclusive=True)
    assert [(held.id, held.worker) for held in store.held_after_end()] == [(job.id, "w1")]
    assert [(held.id, worker) for held, worker in store.held_in_queue()] == [(waits.id, "w1")]
    store.release([claim])
    assert store.held_after_end() == []
    assert store.held_in_queue() == []


def test_the_queue_is_told_by_kind_with_what_waits_for_its_time_or_target(store: Any) -> None:
    old = utc_now() - timedelta(hours=2)
    store.submit("train", "spam", exclusive=True)
    store.claim(worker="w1")
    store.submit("train", "spam", exclusive=True, created_at=old)
    store.submit("train", "ham", run_after=timedelta(hours=1))
    store.submit("backfill", "ham", run_after=utc_now() - timedelta(minutes=1))
    queue = store.queue_depths()
    assert queue.complete
    assert {one.kind: (one.ready, one.delayed, one.held) for one in queue.kinds} == {
        "train": (1, 1, 1),
        "backfill": (1, 0, 0),
    }
    assert next(one.oldest for one in queue.kinds if one.kind == "train") == old


def test_what_is_claimed_next_is_what_a_claim_takes(store: Any) -> None:
    store.submit("train", "low")
    store.submit("train", "high", priority=5)
    store.submit("train", "later", priority=9, run_after=timedelta(hours=1))
    ahead = [job.id for job in store.next_claims(limit=2)]
    assert ahead == [claim.job_id for claim in store.claim(worker="w1", limit=2)]


def test_finished_jobs_are_counted_in_spans_by_outcome(store: Any) -> None:
    hour = utc_now().replace(minute=0, second=0, microsecond=0) - timedelta(hours=3)

    def at(minutes: int) -> dict[str, datetime]:
        end = hour + timedelta(minutes=minutes)
        return {"created_at": hour, "started_at": hour, "finished_at": end}

    for status, minutes in (("completed", 5), ("completed", 6), ("failed", 10), ("cancelled", 65)):
        ended(store, status, **at(minutes))
    found = store.finished_per(timedelta(hours=1), since=hour)
    assert {(one.start, one.status.value): one.jobs for one in found} == {
        (hour, "completed"): 2,
        (hour, "failed"): 1,
        (hour + timedelta(hours=1), "cancelled"): 1,
    }
    assert store.finished_per(timedelta(hours=1), since=hour, until=hour) == []


def test_durations_are_spread_by_kind_and_never_negative(store: Any) -> None:
    now = utc_now() - timedelta(seconds=600)
    starts = [(now - timedelta(seconds=took), now) for took in range(1, 102)]
    store.submit_many(
        MlJob(
            kind="train",
            target_name="spam",
            status="completed",
            attempts=1,
            created_at=start - timedelta(seconds=30),
            started_at=start,
            finished_at=end,
        )
        for start, end in starts
    )
    ended(store, "failed", took=5000)
    ended(
        store, "completed", started_at=utc_now(), finished_at=utc_now() - timedelta(seconds=5)
    )  # a clock that was set
    found = store.durations(since=utc_now() - DAY)
    (train,) = found.kinds
    assert found.complete
    assert (train.ran.p50, round(train.ran.p95), round(train.ran.p99), train.ran.jobs) == (51, 96, 100, 101)
    assert train.waited.p50 == 30
    assert train.failed == pytest.approx(1 / 103)


def test_durations_are_of_the_last_that_finished_and_say_whether_that_was_all(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mljobs.jobs import _statistics

    monkeypatch.setattr(_statistics, "SAMPLE", 3)
    for number in range(3):
        ended(store, "completed", took=10 * (number + 1), ago=600 - number)
    assert store.durations(since=utc_now() - DAY).complete
    ended(store, "failed", target="spam", ago=100)
    found = store.durations(since=utc_now() - DAY)
    assert not found.complete
    assert (found.kinds[0].ran.jobs, found.kinds[0].ran.p50, found.kinds[0].failed) == (2, 25, pytest.approx(1 / 3))


def test_a_search_without_an_index_looks_as_far_as_its_time_allows(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mljobs.jobs import _paging

    clock = itertools.count()  # each look at it is a second later: two jobs are looked at in a second
    monkeypatch.setattr(_paging, "WINDOWS", (2, 2, 100))
    monkeypatch.setattr(_paging, "_STEP", 1)
    monkeypatch.setattr(_paging, "perf_counter", lambda: next(clock))
    store.submit_many([("train", f"t{number}", {}) for number in range(20)])
    far, near = (store.summaries("error:nowhere", seconds=seconds) for seconds in (7.5, 0))
    assert (far.jobs, far.complete, far.scanned, near.complete, near.scanned) == ((), False, 13, False, 4)
    rest = store.summaries("error:nowhere", seconds=1000, after=near.cursor)
    assert (rest.complete, rest.cursor) == (True, None)


def test_what_is_usual_is_the_median_of_those_that_completed(store: Any) -> None:
    for took in (10, 20, 60):
        ended(store, "completed", took=took)
    ended(store, "failed", took=9000)
    ended(store, "completed", target="rare", took=9000)
    assert store.usual_durations([("train", "spam"), ("train", "rare"), ("backfill", "spam")]) == {
        ("train", "spam"): 20
    }


def test_failures_are_grouped_by_their_first_line_but_for_its_digits(store: Any) -> None:
    ended(store, "failed", error_message="OutOfMemory: tried 2.19 GiB\nFile x")
    ended(store, "failed", error_message="OutOfMemory: tried 3 GiB", target="ham", ago=60)
    ended(store, "failed", error_message="ValueError: NaN", ago=30)
    ended(store, "failed", error_message="ValueError: NaN", created_at=utc_now() - timedelta(days=30))
    first, second = store.failure_reasons(since=utc_now() - DAY).reasons
    assert (first.jobs, set(first.targets), second.jobs) == (2, {"spam", "ham"}, 1)
    assert store.last_failures(limit=1)[0].error == "ValueError: NaN"


def test_targets_are_listed_once_in_pages_and_by_their_beginning(store: Any) -> None:
    for name in ("b", "a", "ab", "c", "ab", "a_b"):
        store.submit("train", name)
    names = store.target_names()
    assert sorted(names) == ["a", "a_b", "ab", "b", "c"]
    assert store.target_names(limit=2) + store.target_names(after=names[1]) == names
    assert sorted(store.target_names(prefix="a")) == ["a", "a_b", "ab"]
    assert {name: len(own) for name, own in store.target_jobs(["ab", "none"]).items()} == {"ab": 2, "none": 0}


def test_a_count_stops_at_its_limit(store: Any) -> None:
    for _ in range(5):
        store.submit("train", "spam")
    assert (store.count_up_to(3), store.count_up_to(9)) == (3, 5)
    assert store.count_up_to(9, "status:failed") == 0


def test_a_store_that_may_write_is_not_read_only(store: Any) -> None:
    assert store.why_read_only() is None


def test_a_role_without_rights_is_noticed(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE ROLE board_reader"))
        connection.execute(text("GRANT SELECT ON ALL TABLES IN SCHEMA public TO board_reader"))
    try:
        with engine.begin() as connection:
            connection.execute(text("SET LOCAL ROLE board_reader"))
            assert jobs.why_read_only(connection) == "the role lacks INSERT and UPDATE"
        with engine.begin() as connection:
            connection.execute(text("SET TRANSACTION READ ONLY"))
            assert jobs.why_read_only(connection) == "transactions are read only"
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP OWNED BY board_reader"))
            connection.execute(text("DROP ROLE board_reader"))
        engine.dispose()


def test_a_file_that_may_not_be_written_is_noticed(sqlite_url: str) -> None:
    path = sqlite_url.removeprefix("sqlite:///")
    with JobStore(sqlite_url) as store:
        store.counts()  # the first connection puts the file into WAL mode, which one that may not write could not
    with JobStore(f"sqlite:///file:{path}?mode=ro&uri=true") as store:
        assert "readonly" in (store.why_read_only() or "")


def test_a_statement_that_takes_too_long_is_ended(postgres_url: str) -> None:
    with JobStore(postgres_url) as store, store.connect() as connection:
        jobs.limit_time(connection, 0.05)
        assert isinstance(connection.scalar(text("SHOW statement_timeout")), str)
        with pytest.raises(Exception, match="statement timeout"):
            connection.execute(text("SELECT pg_sleep(30)"))


def test_jobs_are_paged_by_their_end_both_ways_and_what_has_not_finished_is_left_out(store: Any) -> None:
    made = [
        ended(store, "completed" if n % 2 else "failed", ago=100 * (n * 7 % 5) + n, took=n + 1).id for n in range(5)
    ]
    by_end = [made[n] for n in sorted(range(5), key=lambda n: 100 * (n * 7 % 5) + n)]
    store.submit("train", "waits")
    for order, expected in (("last_finished", by_end), ("first_finished", by_end[::-1])):
        first = store.summaries(order=order, limit=2)
        second = store.summaries(order=order, limit=2, after=first.cursor)
        third = store.summaries(order=order, limit=2, after=second.cursor)
        assert [job.id for page in (first, second, third) for job in page.jobs] == expected
        assert third.cursor is None
        assert [job.id for job in store.find(order=order)] == expected
        with pytest.raises(InvalidValueError, match="not a cursor"):
            store.summaries(order="newest", after=first.cursor)
    failed = [one for one in by_end if made.index(one) % 2 == 0]
    assert [job.id for job in store.summaries("status:failed target:spam", order="last_finished").jobs] == failed
    assert store.summaries("status:queued", order="last_finished").jobs == ()
    with pytest.raises(InvalidValueError, match="order"):
        store.find(order="sideways")
