"""The operations, through a store, in every backend; and in a host's own session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Session

from mljobs import (
    InvalidTransitionError,
    InvalidValueError,
    JobExistsError,
    JobNotFound,
    JobStore,
    LeaseLostError,
    MlJob,
    MlJobKind,
    MlJobMixin,
    MlJobStatus,
    TargetLockedError,
    TerminalStateError,
    jobs,
    testing,
)
from tests.backends import Backend
from tests.cases import case
from tests.leases import count_leases, expire_leases

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = MlJobStatus
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def tokens(claims: Any) -> list[int]:
    return [claim.token for claim in claims]


# -------------------------------------------------------------------------------------------------------- submitting


def test_a_submitted_job_is_queued_and_complete(store: Any) -> None:
    job = store.submit("train", "spam", {"lr": 0.1}, priority=3, exclusive=True)
    assert (job.status, job.kind, job.spec, job.priority, job.exclusive) == (
        QUEUED,
        MlJobKind.TRAIN,
        {"lr": 0.1},
        3,
        True,
    )
    assert job.started_at is job.finished_at is job.error_message is job.metrics_json is job.retry_of is None
    assert store.get(job.id).to_json() == job.to_json()
    assert store.get(job.id.hex).id == store.get(job).id == job.id


def test_bad_input_names_the_field_and_nothing_is_written(store: Any) -> None:
    for arguments, field in (
        (("training", "spam"), "kind"),
        (("train", 5), "target_name"),
        (("train", "a\x00b"), "target_name"),
        (("train", "spam", float("nan")), "spec"),
        (("train", "spam", object()), "spec"),
    ):
        with case(arguments):
            with pytest.raises(InvalidValueError) as caught:
                store.submit(*arguments)
            assert caught.value.field == field
            assert len(store.find()) == 0


def test_unless_active_returns_the_job_that_is_there(store: Any) -> None:
    first = store.submit("train", "spam", {"n": 1}, unless_active=True)
    assert store.submit("train", "spam", {"n": 2}, unless_active=True).id == first.id
    (claim,) = store.claim(worker="w")
    assert store.submit("train", "spam", unless_active=True).id == first.id
    assert store.submit("backfill", "spam", unless_active=True).id != first.id
    store.complete(claim)
    assert store.submit("train", "spam", unless_active=True).id != first.id


def test_an_id_that_exists_is_an_error_that_names_it(store: Any, backend: Backend) -> None:
    first = store.submit("train", "spam")
    for wanted in ({"id": first.id}, {"id": first.id, "priority": 3}, {"id": first.id, "unless_active": True}):
        with pytest.raises(
            JobExistsError, match=f"^job {first.id} exists already: its id would be a duplicate$"
        ) as caught:
            store.submit("train", "ham", **wanted)
        assert (caught.value.job_id, caught.value.place) == (first.id, None)
    with pytest.raises(JobExistsError) as caught:
        store.submit_many([("train", "a", None), MlJob(id=first.id, kind="train", target_name="b")])
    assert caught.value.job_id in ([first.id] if backend.dialect == "postgresql" else [first.id, None])
    assert [job.id for job in store.find()] == [first.id]

    def in_a_session(session: Session) -> None:
        with pytest.raises(JobExistsError) as caught:
            jobs.submit(session, "train", "c", id=first.id)
        assert caught.value.job_id == first.id
        session.rollback()
        with pytest.raises(JobExistsError):
            jobs.submit_many(session, [MlJob(id=first.id, kind="train", target_name="c")])
        session.rollback()
        session.add(MlJob(id=first.id, kind="train", target_name="d"))
        with pytest.raises(IntegrityError):  # as every other row's, for a host's own tools
            session.flush()
        session.rollback()

    backend.run(in_a_session)


def test_a_unique_constraint_of_the_host_is_not_reported_as_an_id(store: Any, backend: Backend) -> None:
    with backend.outside.begin() as connection:
        connection.exec_driver_sql("CREATE UNIQUE INDEX host_one ON ml_jobs (target_name)")
    store.submit("train", "spam")
    with pytest.raises(IntegrityError):
        store.submit("train", "spam")


def test_submit_many_takes_records_and_tuples_from_a_generator(store: Any) -> None:
    def some() -> Iterator[Any]:
        for number in range(2500):
            yield ("train", f"t{number}", {"n": number})
        yield MlJob(kind="backfill", target_name="rows", spec_json='{"a": 1}', priority=4)

    assert store.submit_many(some()) == 2501
    assert store.counts()["train", "queued"] == 2500
    (job,) = store.find(kind="backfill")
    assert (job.spec_json, job.priority) == ('{"a": 1}', 4)
    assert store.submit_many([]) == 0


def test_a_job_without_a_target_is_refused_by_name_however_it_is_submitted(sqlite_url: str) -> None:
    nothing: Any = None
    with JobStore(sqlite_url) as store:
        for submit in (
            lambda: store.submit("train", nothing),
            lambda: store.submit("train", nothing, priority=1),
            lambda: store.submit_many([("train", nothing, {})]),
            lambda: store.submit_many([{"kind": "train"}]),
            lambda: store.submit_many([MlJob(kind="train")]),
        ):
            with pytest.raises(InvalidValueError, match="field 'target_name' cannot be None"):
                submit()
        assert len(store.find()) == 0


def test_a_bad_record_leaves_nothing_of_submit_many(store: Any) -> None:
    for bad in (
        ("train", "spam"),
        ("nope", "spam", {}),
        "train",
        MlJob(kind="train", target_name="a\x00b"),
        MlJob(kind="train", target_name="x", spec_json="{"),
    ):
        with case(bad):
            with pytest.raises(InvalidValueError):
                store.submit_many([("train", "good", {}), bad])
            assert len(store.find()) == 0


def test_retry_is_a_new_record_and_leaves_the_old_one_alone(store: Any) -> None:
    job = store.submit("train", "spam", {"lr": 1}, priority=2)
    with pytest.raises(InvalidTransitionError):
        store.retry(job.id)
    (claim,) = store.claim(worker="w")
    store.fail(claim, "boom")
    before = store.get(job.id).to_json()
    again = store.retry(job.id, run_after=timedelta(hours=1))
    assert (again.retry_of, again.status, again.spec, again.priority, again.attempts) == (
        job.id,
        QUEUED,
        {"lr": 1},
        2,
        0,
    )
    assert again.run_after > datetime.now(UTC)
    assert store.get(job.id).to_json() == before
    with pytest.raises(JobNotFound):
        store.retry(uuid4())


# ------------------------------------------------------------------------------------------------------------ reading


def test_pages_meet_without_gap_or_overlap_while_jobs_come(store: Any) -> None:
    for number in range(7):
        store.submit("train", f"t{number}")
    for order in ("newest", "oldest"):
        seen, cursor = [], None
        while True:
            page = store.find(order=order, limit=3, after=cursor)
            seen += [job.target_name for job in page]
            cursor = page.cursor
            if cursor is None:
                break
            if order == "newest":
                store.submit("backfill", "later")
        wanted = [f"t{number}" for number in range(7)]
        assert seen[:7] == (wanted[::-1] if order == "newest" else wanted)


def test_a_foreign_cursor_is_refused(store: Any) -> None:
    for cursor in ("", "nonsense", "e30", "W10", "WyJvIiwwLCIwMCJd", "é", None.__class__):
        with case(cursor):
            with pytest.raises(InvalidValueError) as caught:
                store.find(after=cursor)
            assert caught.value.field == "after"


def test_find_filters_by_all_that_it_names(store: Any) -> None:
    for kind, target in (("train", "spam"), ("train", "spam_v2"), ("backfill", "Spam"), ("train", "50%_x")):
        store.submit(kind, target)
    (claim,) = store.claim(worker="w", limit=1)
    store.fail(claim, "CUDA out of memory: 50% used")

    def names(**filters: Any) -> list[str]:
        return sorted(job.target_name for job in store.find(**filters))

    assert names(kind="backfill") == ["Spam"]
    assert names(kind=["backfill", MlJobKind.TRAIN], target="spam") == ["spam"]
    assert names(target_prefix="spam") == ["spam", "spam_v2"]
    assert names(target_prefix="50%_") == ["50%_x"]
    assert names(target_prefix="_") == []
    assert names(status=FAILED) == ["spam"]
    assert names(status=["queued", "failed"], kind="train") == ["50%_x", "spam", "spam_v2"]
    assert names(error_contains="OUT OF") == ["spam"]
    assert names(error_contains="50%") == ["spam"]
    assert names(error_contains="5_%") == []
    now = datetime.now(UTC)
    assert len(names(created_before=now + timedelta(seconds=5), created_after=now - timedelta(minutes=5))) == 4
    assert names(finished_after=now - timedelta(minutes=5)) == ["spam"]
    assert names(finished_before=LONG_AGO) == []
    assert [job.target_name for job in store.history("spam")] == ["spam"]
    for field, value in (("limit", 0), ("limit", 10_001), ("order", "best"), ("status", "done"), ("created_after", 5)):
        with pytest.raises(InvalidValueError) as caught:
            store.find(**{field: value})
        assert caught.value.field == field


def test_counts_are_exact_at_this_size_and_stay_so_after_prune(store: Any) -> None:
    store.submit_many([("train", "t", {}) for _ in range(5)] + [("backfill", "b", {})])
    claims = store.claim(worker="w", kinds=["train"], limit=3)
    store.complete(claims[0])
    store.fail(claims[1], "x")
    counts = store.counts()
    assert counts.exact
    assert counts["train", "queued"] == 2
    assert counts[MlJobKind.TRAIN, RUNNING] == counts["train", "completed"] == counts["train", "failed"] == 1
    assert (counts["drift_compute", "queued"], counts.total(), counts.total(kind="train")) == (0, 6, 5)
    assert store.counts(exact=True).jobs == counts.jobs
    assert store.prune(older_than=timedelta(0)) == 2
    assert store.counts().total(status="completed") == 0


# ----------------------------------------------------------------------------------------------------------- claiming


def test_claims_go_by_priority_then_age_and_only_to_kinds_that_are_handled(store: Any) -> None:
    for target, priority in (("low", -1), ("first", 0), ("second", 0), ("high", 9)):
        store.submit("train", target, priority=priority)
    store.submit("backfill", "other", priority=99)
    claims = store.claim(worker="w", kinds=["train"], limit=3)
    assert [claim.job.target_name for claim in claims] == ["high", "first", "second"]
    for claim in claims:
        assert (claim.job.status, claim.job.progress, claim.job.attempts) == (RUNNING, 0, 1)
        assert claim.job.started_at is not None
        assert claim.expires_at > claim.job.started_at
    assert store.claim(worker="w", kinds=[]) == store.claim(worker="w", kinds="drift_compute") == []
    assert [claim.job.target_name for claim in store.claim(worker="w", limit=10)] == ["other", "low"]
    assert store.claim(worker="w") == []


def test_run_after_is_waited_for(store: Any, backend: Backend) -> None:
    job = store.submit("train", "later", run_after=timedelta(hours=1))
    assert store.claim(worker="w") == []
    moment = "0" if backend.dialect == "sqlite" else "'2020-01-01'"
    with backend.outside.begin() as connection:
        connection.exec_driver_sql(f"UPDATE ml_jobs SET run_after = {moment}")
    assert [claim.job_id for claim in store.claim(worker="w")] == [job.id]


def test_an_exclusive_target_runs_one_at_a_time_and_starves_nobody(store: Any) -> None:
    for number in range(3):
        store.submit("train", "spam", {"n": number}, exclusive=True, priority=9)
    free = store.submit("train", "ham")
    first = store.claim(worker="w", limit=2)
    assert [claim.job.target_name for claim in first] == ["spam", "ham"]
    assert store.claim(worker="w", limit=9) == []
    store.complete(first[0])
    assert [claim.job.spec for claim in store.claim(worker="w", limit=9)] == [{"n": 1}]
    assert store.get(free.id).status is RUNNING


def test_an_exclusive_target_stays_locked_after_a_cancel_until_its_worker_stops(store: Any) -> None:
    first, _ = (store.submit("train", "spam", exclusive=True) for _ in range(2))
    (claim,) = store.claim(worker="w")
    assert store.cancel(first.id)
    assert store.claim(worker="w") == []
    assert tokens(store.renew([claim]).cancelled) == [claim.token]
    assert store.claim(worker="w") == []
    assert store.release([claim]) == 1
    assert store.release([claim]) == 0
    assert len(store.claim(worker="w")) == 1


def test_an_exclusive_target_is_free_once_the_lease_of_a_cancelled_job_has_expired(
    store: Any, backend: Backend
) -> None:
    first, _ = (store.submit("train", "spam", exclusive=True) for _ in range(2))
    (claim,) = store.claim(worker="w")
    store.cancel(first.id)
    expire_leases(backend.outside)
    assert store.rescue().released == [claim.token]
    assert len(store.claim(worker="w")) == 1


def test_claim_one_takes_the_job_that_is_named_or_says_why_not(store: Any) -> None:
    job = store.submit("train", "spam", exclusive=True, run_after=timedelta(hours=1))
    other = store.submit("train", "spam", exclusive=True)
    claim = store.claim_one(job.id, worker="w")
    assert claim.job_id == job.id
    with pytest.raises(InvalidTransitionError):
        store.claim_one(job.id, worker="w")
    with pytest.raises(TargetLockedError):
        store.claim_one(other, worker="w")
    store.complete(claim)
    with pytest.raises(TerminalStateError):
        store.claim_one(job.id, worker="w")
    with pytest.raises(JobNotFound):
        store.claim_one(uuid4(), worker="w")


def test_a_wrong_argument_of_claim_is_named(store: Any) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"worker": ""}, "worker"),
        ({"worker": "w\x00"}, "worker"),
        ({"worker": "w", "limit": 0}, "limit"),
        ({"worker": "w", "limit": True}, "limit"),
        ({"worker": "w", "lease": 0}, "lease"),
        ({"worker": "w", "lease": float("nan")}, "lease"),
        ({"worker": "w", "kinds": ["x"]}, "kinds"),
    ]
    for values, field in wrong:
        with case(values):
            with pytest.raises(InvalidValueError) as caught:
                store.claim(**values)
            assert caught.value.field == field


def test_the_token_grows_with_every_claim_and_never_comes_back(store: Any) -> None:
    store.submit("train", "spam")
    seen = []
    for _ in range(4):
        (claim,) = store.claim(worker="w")
        seen.append(claim.token)
        store.requeue(claim)
    assert seen == sorted(set(seen))


def test_renew_says_what_is_held_lost_and_cancelled(store: Any, backend: Backend) -> None:
    for number in range(4):
        store.submit("train", f"t{number}")
    held, lost, cancelled, put_back = store.claim(worker="w", limit=4, lease=5)
    store.requeue(lost)
    store.cancel(cancelled.job_id)
    with backend.outside.begin() as connection:
        name = put_back.job_id.hex if backend.dialect == "sqlite" else str(put_back.job_id)
        connection.exec_driver_sql(f"UPDATE ml_jobs SET status = 'queued', lease = NULL WHERE id = '{name}'")
    renewal = store.renew([held, lost, cancelled, put_back], lease=600)
    assert tokens(renewal.held) == [held.token]
    assert renewal.held[0].expires_at > held.expires_at
    assert tokens(renewal.cancelled) == [cancelled.token]
    assert sorted(tokens(renewal.lost)) == sorted(tokens([lost, put_back]))
    assert store.renew([]).held == []
    assert {claim.job_id for claim in store.claim(worker="v", limit=9)} == {lost.job_id, put_back.job_id}


def test_an_expired_lease_that_nobody_took_can_still_be_renewed(store: Any, backend: Backend) -> None:
    store.submit("train", "spam")
    (claim,) = store.claim(worker="w")
    expire_leases(backend.outside)
    assert tokens(store.renew([claim]).held) == [claim.token]
    assert not store.rescue()


def test_progress_clamps_goes_back_and_is_checked(store: Any) -> None:
    store.submit("train", "spam")
    (claim,) = store.claim(worker="w")
    for value, stored in ((40, 40), (30, 30), (250, 100), (0, 0)):
        store.set_progress(claim, value)
        assert store.get(claim.job_id).progress == stored
    for bad in (-1, "5", 1.5, True, None):
        with pytest.raises(InvalidValueError) as caught:
            store.set_progress(claim, bad)
        assert caught.value.field == "progress"
    assert store.set_progress_many([]) == []


# ---------------------------------------------------------------------------------------------------------- finishing


def test_each_outcome_sets_all_that_belongs_to_it(store: Any, backend: Backend) -> None:
    for number in range(3):
        store.submit("train", f"t{number}")
    done, failed, back = store.claim(worker="w", limit=3)
    for claim in (done, failed, back):
        store.set_progress(claim, 40)
    store.complete(done, {"f1": 0.9})
    store.fail(failed, ValueError("boom"))
    store.requeue(back)
    job = store.get(done.job_id)
    assert (job.status, job.progress, job.metrics, job.error_message) == (COMPLETED, 100, {"f1": 0.9}, None)
    assert job.finished_at >= job.started_at
    job = store.get(failed.job_id)
    assert (job.status, job.progress, job.error_message) == (FAILED, 40, "ValueError: boom")
    assert job.finished_at is not None
    job = store.get(back.job_id)
    assert (job.status, job.progress, job.started_at, job.finished_at, job.attempts) == (QUEUED, 0, None, None, 1)
    assert count_leases(backend.outside) == 0


LATE: dict[str, Callable[[Any, Any], Any]] = {
    "complete": lambda store, claim: store.complete(claim, {"late": True}),
    "fail": lambda store, claim: store.fail(claim, "late"),
    "requeue": lambda store, claim: store.requeue(claim),
    "set_progress": lambda store, claim: store.set_progress(claim, 77),
}


def test_a_late_worker_gets_an_error_and_writes_nothing(store: Any, backend: Backend) -> None:
    for next_state in ("queued", "claimed", "completed", "cancelled", "deleted"):
        with case(next_state):
            _come_late(store, backend, next_state)
            testing.empty(backend.outside)


def _come_late(store: Any, backend: Backend, next_state: str) -> None:
    store.submit("train", "spam")
    (late,) = store.claim(worker="slow")
    expire_leases(backend.outside)
    assert store.rescue().requeued == [late.job_id]
    if next_state in ("claimed", "completed"):
        (claim,) = store.claim(worker="quick")
        if next_state == "completed":
            store.complete(claim, {"quick": True})
    elif next_state == "cancelled":
        store.cancel(late.job_id)
    elif next_state == "deleted":
        with backend.outside.begin() as connection:
            connection.exec_driver_sql("DELETE FROM ml_jobs")
    before = [job.to_json() for job in store.find()]
    for name, write in LATE.items():
        with case(name):
            with pytest.raises(LeaseLostError):
                write(store, late)
            assert [job.to_json() for job in store.find()] == before
            assert tokens(store.renew([late]).lost) == [late.token]


def test_a_worker_whose_job_was_cancelled_gets_an_error_and_changes_nothing(store: Any) -> None:
    for name, write in LATE.items():
        with case(name):
            job = store.submit("train", "spam")
            (claim,) = store.claim(worker="w")
            assert store.cancel(job.id) is True
            before = store.get(job.id).to_json()
            with pytest.raises(TerminalStateError) as caught:
                write(store, claim)
            assert caught.value.status is CANCELLED
            assert store.get(job.id).to_json() == before


def test_a_finish_refused_by_a_cancel_gives_the_lease_back_once(store: Any, backend: Backend) -> None:
    for end in ("complete", "fail", "requeue"):
        with case(end):
            _finish_what_was_cancelled(store, backend, end)
            testing.empty(backend.outside)


def _finish_what_was_cancelled(store: Any, backend: Backend, end: str) -> None:
    def act() -> None:
        arguments = ["why"] if end == "fail" else []
        getattr(store, end)(claim, *arguments)

    first, second = (store.submit("train", "spam", exclusive=True) for _ in range(2))
    (claim,) = store.claim(worker="w")
    store.cancel(claim.job_id)
    assert count_leases(backend.outside) == 1
    with pytest.raises(TerminalStateError, match="is cancelled"):
        act()
    assert count_leases(backend.outside) == 0
    with pytest.raises(LeaseLostError):
        act()
    (following,) = store.claim(worker="w")
    assert {claim.job_id, following.job_id} == {first.id, second.id}


def test_finish_and_claim_ends_some_and_begins_others_in_one_go(store: Any) -> None:
    ids = [store.submit("train", f"t{number}").id for number in range(6)]
    done, failed, back, lost, cancelled = store.claim(worker="w", limit=5)
    store.cancel(cancelled.job_id)
    store.requeue(lost)
    errors, claims = store.finish_and_claim(
        [
            jobs.Outcome.completed(done, {"f1": 1}),
            jobs.Outcome.failed(failed, "why"),
            jobs.Outcome.requeued(back),
            jobs.Outcome.completed(lost),
            jobs.Outcome.completed(cancelled),
            jobs.Outcome.completed(done, {"f1": 2}),
        ],
        worker="w",
        limit=4,
    )
    assert [type(error) for error in errors] == [
        type(None),
        type(None),
        type(None),
        LeaseLostError,
        TerminalStateError,
        LeaseLostError,
    ]
    assert store.get(done.job_id).metrics == {"f1": 1}
    assert [store.get(job_id).status for job_id in ids[:2]] == [COMPLETED, FAILED]
    assert {ids[3], ids[5]} <= {claim.job_id for claim in claims}  # back may be seen now or by the next claim
    assert all(claim.job.status is RUNNING and claim.token > cancelled.token for claim in claims)
    errors, rest = store.finish_and_claim([jobs.Outcome.completed(claim) for claim in claims], worker="w", limit=4)
    assert errors == [None] * len(claims)
    assert {claim.job_id for claim in (*claims, *rest)} == {ids[2], ids[3], ids[5]}


def test_finish_and_claim_leaves_everything_as_it_was_when_an_argument_is_wrong(store: Any) -> None:
    store.submit("train", "spam")
    (claim,) = store.claim(worker="w")
    with pytest.raises(InvalidValueError, match="limit"):
        store.finish_and_claim([jobs.Outcome.completed(claim)], worker="w", limit=0)
    assert store.get(claim.job_id).status is RUNNING


def test_a_rescue_fails_only_the_kinds_it_was_given(store: Any, backend: Backend) -> None:
    train, backfill = store.submit("train", "spam"), store.submit("backfill", "spam")
    store.claim(worker="w", limit=2)
    expire_leases(backend.outside)
    rescue = store.rescue(max_attempts=1, kinds=["train"])
    assert (rescue.failed, rescue.requeued) == ([train.id], [backfill.id])


def test_finishing_twice_changes_nothing_finished_at_included(store: Any) -> None:
    job = store.submit("train", "spam")
    (claim,) = store.claim(worker="w")
    store.complete(claim)
    before = store.get(job.id).to_json()
    with pytest.raises(LeaseLostError):
        store.complete(claim)
    assert store.cancel(job.id) is False
    assert store.cancel(job.id) is False
    assert store.get(job.id).to_json() == before


def test_many_outcomes_are_recorded_at_once_each_with_its_own_answer(store: Any) -> None:
    for number in range(6):
        store.submit("train", f"t{number}")
    done, failed, back, lost, cancelled, spare = store.claim(worker="w", limit=6)
    store.requeue(lost)
    store.cancel(cancelled.job_id)
    answers = store.finish_many(
        [
            jobs.Outcome.completed(done, {"n": 1}),
            jobs.Outcome.failed(failed, "why"),
            jobs.Outcome.requeued(back),
            jobs.Outcome.completed(lost),
            jobs.Outcome.completed(cancelled),
            jobs.Outcome.completed(done, {"n": 2}),
        ]
    )
    assert [type(answer) for answer in answers] == [
        type(None), type(None), type(None), LeaseLostError, TerminalStateError, LeaseLostError
    ]  # fmt: skip
    assert store.get(done.job_id).metrics == {"n": 1}
    assert store.complete_many([(spare, {"n": 3})]) == [None]
    assert store.finish_many([]) == []
    assert [type(e) for e in store.fail_many([(spare, "x")]) + store.requeue_many([spare])] == [LeaseLostError] * 2
    assert [type(e) for e in store.set_progress_many([(spare, 1)])] == [LeaseLostError]


def test_metrics_that_no_database_can_hold_are_refused_and_the_lease_stays(store: Any) -> None:
    for metrics in (float("inf"), {1, 2}, {"x": "\ud800"}, {"n": "\x00"}):
        with case(metrics):
            store.submit("train", "spam")
            (claim,) = store.claim(worker="w")
            with pytest.raises(InvalidValueError):
                store.complete(claim, metrics)
            store.complete(claim, {"ok": 1})


def test_cancel_of_a_missing_job_is_an_error(store: Any) -> None:
    with pytest.raises(JobNotFound):
        store.cancel(uuid4())
    with pytest.raises(JobNotFound):
        store.get(uuid4())
    with pytest.raises(InvalidValueError):
        store.get("not an id")


# ------------------------------------------------------------------------------------------- in the caller's session


def test_in_a_session_an_operation_is_part_of_its_transaction(backend: Backend) -> None:
    def undone(session: Session) -> None:
        job = jobs.submit(session, "train", "spam")
        assert job in session
        jobs.submit_many(session, [("train", "more", {})])
        session.rollback()

    backend.run(undone)
    assert backend.run(lambda session: len(jobs.find(session))) == 0


def test_in_a_session_instances_show_what_an_operation_changed(backend: Backend) -> None:
    def life(session: Session) -> None:
        job = MlJob(kind="train", target_name="spam")
        session.add(job)  # pending: the operation writes it first
        (claim,) = jobs.claim(session, worker="w")
        assert claim.job is job
        assert job.status is RUNNING
        jobs.set_progress(session, claim, 40)
        assert job.progress == 40
        jobs.complete(session, claim, {"f1": 1})
        assert (job.status, job.metrics) == (COMPLETED, {"f1": 1})
        assert jobs.get(session, job.id) is job
        again = jobs.retry(session, job, again=True)
        assert jobs.cancel(session, again) is True
        assert again.status is CANCELLED
        assert jobs.prune(session, older_than=timedelta(0)) == 2
        assert session.scalars(select(MlJob)).all() == []

    backend.run(life)


def test_unless_active_refuses_a_transaction_that_cannot_see(backend: Backend) -> None:
    if backend.dialect == "sqlite":  # where the write lock comes first, so it always sees
        backend.run(lambda session: jobs.submit(session, "train", "spam", unless_active=True))
        return

    def attempt(session: Session) -> None:
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        with pytest.raises(InvalidValueError) as caught:
            jobs.submit(session, "train", "spam", unless_active=True)
        assert caught.value.field == "unless_active"

    backend.run(attempt)


def test_editing_an_unrelated_field_writes_only_that_field(backend: Backend) -> None:
    backend.run(lambda session: session.add(MlJob(kind="train", target_name="spam")))

    def edit(session: Session) -> None:
        job = session.scalars(select(MlJob)).one()
        with backend.outside.begin() as connection:
            connection.exec_driver_sql("UPDATE ml_jobs SET status = 'running'")
        job.priority = 5
        session.flush()
        session.expire(job)
        assert (job.status, job.priority) == (RUNNING, 5)

    if backend.dialect == "sqlite":
        backend.run(lambda session: session.execute(text("SELECT 1")))
    backend.run(edit)


def test_a_record_that_is_handed_in_says_of_which_class_it_is(empty_url: str) -> None:
    class Base(DeclarativeBase):
        pass

    class Fit(MlJobMixin, Base):
        __tablename__ = "fits"

    class Other(MlJobMixin, Base):
        __tablename__ = "others"

    engine = create_engine(empty_url)
    Base.metadata.create_all(engine)
    with Session(engine, expire_on_commit=False) as session, session.begin():
        fit = jobs.submit(session, "train", "spam", model=Fit)
        assert jobs.get(session, fit) is fit
        assert jobs.cancel(session, fit) is True
        again = jobs.retry(session, fit)
        assert type(again) is Fit
        assert jobs.lineage(session, again) == [fit, again]
        assert jobs.claim_one(session, again, worker="w").job_id == again.id
        with pytest.raises(InvalidValueError, match="it is a Fit, and the model is Other"):
            jobs.retry(session, fit, model=Other)
    engine.dispose()
