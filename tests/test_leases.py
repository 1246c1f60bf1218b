"""A lease belongs to a claim: what a worker holds, what it loses, and what an older claim can never do again."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, delete, select, update
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import JobStore, LeaseLostError, MlJob, MlJobLease, MlJobStatus, TargetLockedError, TerminalStateError, jobs
from mljobs.jobs import Claim, Outcome, _rescuing
from mljobs.jobs._finishing import record_outcomes
from mljobs.store._keeper import Keeper
from mljobs.store._run import Run
from mljobs.worker._finished import FinishedRun
from mljobs.worker._recording import OutcomeWriter
from tests.waiting import until_blocked

_SECONDS = 60


def _leases(store: JobStore) -> list[tuple[int, str | None]]:
    with store.engine.connect() as connection:
        return [(token, lock) for token, lock in connection.execute(select(MlJobLease.token, MlJobLease.target_lock))]


def _claimed(store: JobStore, number: int, **values: Any) -> list[Claim]:
    store.submit_many([MlJob(kind="train", target_name=f"t{at}", **values) for at in range(number)])
    return store.claim(worker="w", limit=number)


# ------------------------------------------------------------------------------------------------------- one of a claim


def test_the_jobs_of_a_claim_share_a_lease_and_an_exclusive_one_has_its_own(url: str) -> None:
    with JobStore(url) as store:
        shared = _claimed(store, 5)
        own = _claimed(store, 3, exclusive=True)
        assert len({claim.token for claim in shared}) == 1
        assert len({claim.token for claim in own}) == 3
        assert sorted(lock for _, lock in _leases(store) if lock) == ["t0", "t1", "t2"]
        assert {store.get(claim.job_id).lease for claim in (*shared, *own)} == {
            claim.token for claim in (*shared, *own)
        }
        assert {store.get(claim.job_id).worker for claim in shared} == {"w"}


def test_a_lease_goes_with_the_last_of_its_jobs_however_they_end(url: str) -> None:
    with JobStore(url) as store:
        done, failed, back, cancelled, released = _claimed(store, 5)
        store.complete(done)
        store.fail(failed, "why")
        store.requeue(back)
        store.cancel(cancelled.job_id)
        assert store.release([cancelled]) == 1
        assert len(_leases(store)) == 1
        assert store.release([released]) == 1
        assert _leases(store) == []
        assert store.release([cancelled, released]) == 0
        running = store.get(released.job_id)
        assert (running.status, running.lease) == (MlJobStatus.RUNNING, None)


def test_a_batch_that_ends_all_jobs_of_a_lease_ends_the_lease(url: str) -> None:
    with JobStore(url) as store:
        claims = _claimed(store, 40)
        assert store.complete_many([(claim, None) for claim in claims]) == [None] * 40
        assert _leases(store) == []


def test_a_finish_that_is_rolled_back_ends_no_lease(url: str) -> None:
    with JobStore(url) as store:
        first, second = _claimed(store, 2)
        with pytest.raises(RuntimeError), store.connect() as bind:
            jobs.complete(bind, first)
            raise RuntimeError
        store.complete(second)
        assert len(_leases(store)) == 1
        assert store.renew([first]).held == [first]
        store.complete(first)
        assert store.get(first.job_id).status is MlJobStatus.COMPLETED


def test_a_claim_that_was_sent_to_another_process_works_there_and_its_lease_goes_at_last(url: str) -> None:
    with JobStore(url) as store:
        alone, *others = [*_claimed(store, 1), *_claimed(store, 2)]
        sent = pickle.loads(pickle.dumps([alone, *others]))
        assert store.complete_many([(claim, None) for claim in sent]) == [None] * 3
        assert len(_leases(store)) == 1  # nobody knows who was the last
        _expire(store)
        assert len(store.rescue().released) == 1
        assert _leases(store) == []


def _expire(store: JobStore) -> None:
    with store.engine.begin() as connection:
        connection.execute(update(MlJobLease).values(expires_at=MlJobLease.acquired_at))


def test_of_several_jobs_under_one_expired_lease_each_is_rescued_and_the_limit_holds(url: str) -> None:
    with JobStore(url) as store:
        claims = _claimed(store, 5)
        store.complete(claims[0])
        _expire(store)
        assert len(store.rescue(limit=3).requeued) == 3
        assert len(_leases(store)) == 1
        assert len(store.rescue(limit=3).requeued) == 1
        assert _leases(store) == []


@pytest.mark.parametrize("how", ["DELETE FROM ml_job_leases", "TRUNCATE ml_job_leases RESTART IDENTITY"])
def test_a_job_whose_lease_was_deleted_by_hand_is_rescued_and_its_workers_late_write_lands_nowhere(
    url: str, how: str
) -> None:
    if url.startswith("sqlite"):  # which has no TRUNCATE: the numbering is set back
        how = "DELETE FROM ml_job_leases" + ("; UPDATE sqlite_sequence SET seq = 0" if "RESTART" in how else "")
    with JobStore(url) as store:
        claims = _claimed(store, 3)
        store.complete(claims[0])
        with store.engine.begin() as connection:
            for statement in how.split("; "):
                connection.exec_driver_sql(statement)
        zombie = claims[1]
        assert store.renew([zombie]).lost == [zombie]
        assert len(store.rescue(limit=1).requeued) == 1
        assert store.rescue(max_attempts=1).failed == [claims[2].job_id]
        assert "the lease of worker w was deleted" in store.get(claims[2].job_id).error_message
        assert not store.rescue()
        with pytest.raises(LeaseLostError):
            store.complete(zombie, {"late": True})
        (again,) = store.claim(worker="v")
        if "RESTART" in how or "seq" in how:
            assert again.token == zombie.token
        assert again.job_id == zombie.job_id
        for write in (store.complete, store.requeue):
            with pytest.raises(LeaseLostError):
                write(zombie)
        store.complete(again, {"late": False})
        assert store.get(again.job_id).metrics == {"late": False}
        (held,) = _claimed(store, 1)
        with store.engine.begin() as connection:  # no token that was ever given out
            connection.exec_driver_sql("UPDATE ml_jobs SET lease = -7 WHERE status = 'running'")
        assert store.rescue().requeued == [held.job_id]


def test_a_rescue_of_a_deleted_lease_leaves_a_job_that_was_claimed_meanwhile(postgres_url: str) -> None:
    with JobStore(postgres_url) as store:
        (lost,) = _claimed(store, 1)
        with store.engine.begin() as connection:
            connection.execute(delete(MlJobLease))
        old = _rescuing._outcome((lost.job_id, "train", 1, lost.token, "w", lost.lease.acquired_at, None), 5, set())
        store.rescue()
        (again,) = store.claim(worker="v")
        with store.engine.begin() as connection:
            written = record_outcomes(connection, MlJob, [old], _rescuing._FINISH_ORPHANED)
        assert old.claim not in written
        store.complete(again)


def test_a_worker_deletes_the_lease_whose_last_jobs_ended_in_two_transactions_at_the_same_time(
    postgres_url: str,
) -> None:
    with JobStore(postgres_url) as store:
        claims = _claimed(store, 2)
        with store.engine.begin() as one, store.engine.begin() as other:
            for connection, claim in zip((one, other), claims, strict=True):
                jobs.complete(connection, claim)
        assert len(_leases(store)) == 1
        writer = OutcomeWriter(store, Keeper(store, 60))
        writer.settle([FinishedRun(Run(claim), Outcome.completed(claim), None, 0.0) for claim in claims], [None, None])
        writer.release_left_over()
        writer.close()
        assert len(_leases(store)) == 0


def test_a_lease_that_cannot_be_deleted_ends_no_worker(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    with JobStore(sqlite_url) as store:
        claims = _claimed(store, 2)
        for claim in claims:
            store.complete(claim)
        writer = OutcomeWriter(store, Keeper(store, 60))
        writer.settle([FinishedRun(Run(claim), Outcome.completed(claim), None, 0.0) for claim in claims], [None, None])
        with store.engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE ml_job_leases")
        writer.release_left_over()
        writer.close()
    assert "leases without jobs are left" in caplog.text


# --------------------------------------------------------------------------------------------- what an older claim can do


@pytest.mark.parametrize("how", ["requeued by hand", "rescued", "finished and claimed"])
def test_the_older_claim_of_a_job_that_was_claimed_again_writes_nothing(url: str, how: str) -> None:
    """The same worker may lose one job of many, and claim it again while the older handler still runs."""
    with JobStore(url) as store:
        older, *others = _claimed(store, 3)
        if how == "requeued by hand":
            with Session(store.engine) as session, session.begin():
                session.get_one(MlJob, older.job_id).requeue()
        elif how == "rescued":
            _expire(store)
            store.rescue()
        else:
            store.requeue(older)
        claims = {claim.job_id: claim for claim in store.claim(worker="w", limit=9)}
        newer = claims[older.job_id]
        assert newer.token != older.token
        for act in (store.complete, store.requeue):
            with pytest.raises(LeaseLostError):
                act(older)
        with pytest.raises(LeaseLostError):
            store.set_progress(older, 5)
        answers = store.complete_many([(older, {"by": "older"}), (newer, {"by": "newer"})])
        assert [type(answer) for answer in answers] == [LeaseLostError, type(None)]
        assert store.get(older.job_id).metrics == {"by": "newer"}
        if how != "rescued":
            assert store.renew(others).held == others


@pytest.mark.parametrize("how", ["restarted", "restored"])
def test_a_token_that_comes_back_opens_nothing(url: str, how: str) -> None:
    """The sequence was restarted, or an older backup restored: the number is the same, the lease is another one."""
    with JobStore(url) as store:
        (zombie,) = _claimed(store, 1)
        with store.engine.begin() as connection:
            if how == "restarted":
                connection.exec_driver_sql("UPDATE ml_jobs SET status = 'queued', started_at = NULL, lease = NULL")
            else:
                connection.exec_driver_sql(
                    "UPDATE ml_jobs SET status = 'queued', started_at = NULL, lease = NULL, worker = NULL, attempts = 0"
                )
            _restart_tokens(store.engine, connection)
        threading.Event().wait(0.002)  # the clock moves on
        (holder,) = store.claim(worker="w")
        assert holder.token == zombie.token
        for act in (store.complete, store.requeue):
            with pytest.raises(LeaseLostError):
                act(zombie)
        with pytest.raises(LeaseLostError):
            store.set_progress(zombie, 99)
        assert store.renew([zombie]).lost == [zombie]
        assert store.release([zombie]) == 0
        store.complete(holder, {"by": "holder"})
        assert store.get(holder.job_id).metrics == {"by": "holder"}


def _restart_tokens(engine: Engine, connection: Any) -> None:
    if engine.dialect.name == "postgresql":
        connection.exec_driver_sql("TRUNCATE ml_job_leases RESTART IDENTITY")
    else:
        connection.exec_driver_sql("DELETE FROM ml_job_leases")
        connection.exec_driver_sql("DELETE FROM sqlite_sequence WHERE name = 'ml_job_leases'")


def test_a_cancelled_record_names_no_lease_and_never_changes_again(url: str) -> None:
    with JobStore(url) as store:
        (claim,) = _claimed(store, 1)
        store.cancel(claim.job_id)
        before = store.get(claim.job_id)
        assert (before.lease, before.worker) == (None, "w")
        with pytest.raises(TerminalStateError):
            store.complete(claim)
        assert store.get(claim.job_id).to_json() == before.to_json()


# ------------------------------------------------------------------------------------------------------ started by hand


def test_an_exclusive_job_is_not_started_by_hand_beside_one_that_was_claimed(url: str) -> None:
    with JobStore(url) as store:
        first, second = (store.submit("train", "spam", exclusive=True) for _ in range(2))
        (claim,) = store.claim(worker="w")
        assert claim.job_id == first.id
        with pytest.raises(TargetLockedError), Session(store.engine) as session, session.begin():
            session.get_one(MlJob, second.id).start()
        assert store.get(second.id).status is MlJobStatus.QUEUED


def test_a_claim_takes_the_target_of_a_job_that_was_started_by_hand_for_taken(url: str) -> None:
    with JobStore(url) as store:
        first, second = (store.submit("train", "spam", exclusive=True) for _ in range(2))
        other = store.submit("train", "ham", exclusive=True)
        with Session(store.engine) as session, session.begin():
            session.get_one(MlJob, first.id).start()
        assert [claim.job_id for claim in store.claim(worker="w", limit=9)] == [other.id]
        with pytest.raises(TargetLockedError):
            store.claim_one(second.id, worker="w")
        with Session(store.engine) as session, session.begin():
            session.get_one(MlJob, first.id).complete()
        assert [claim.job_id for claim in store.claim(worker="w")] == [second.id]


@pytest.mark.parametrize("transaction", [False, True], ids=["by itself", "in a transaction"])
def test_a_claim_that_meets_a_start_by_hand_takes_the_target_for_taken(postgres_url: str, transaction: bool) -> None:  # noqa: FBT001
    engine = create_engine(postgres_url, poolclass=NullPool)
    found: list[Any] = []
    with JobStore(postgres_url) as store:
        _, second = (store.submit("train", "spam", exclusive=True) for _ in range(2))
        free = store.submit("train", "ham")

        def claim() -> None:
            if not transaction:
                found.extend(store.claim(worker="w", limit=9))
                return
            with store.connect() as bind:
                found.extend(jobs.claim(bind, worker="w", limit=9))

        with Session(engine) as session:
            session.get_one(MlJob, second.id).start()
            session.flush()
            claiming = threading.Thread(target=claim)
            claiming.start()
            until_blocked(engine)
            session.commit()
        claiming.join(_SECONDS)
        assert [one.job_id for one in found] == [free.id]
        store.complete(found[0])
    engine.dispose()


# ------------------------------------------------------------------------------------------------------------- on locks


def _racing(postgres_url: str, first: Any, second: Any) -> Any:
    """Run ``second`` until it waits for what ``first`` has written, then commit; return what ``second`` returned."""
    engine = create_engine(postgres_url, poolclass=NullPool)
    results: list[Any] = []
    with engine.connect() as one, engine.connect() as other:

        def run() -> None:
            results.append(second(other))
            other.commit()

        first(one)
        racing = threading.Thread(target=run)
        racing.start()
        until_blocked(engine)
        one.commit()
        racing.join(_SECONDS)
    engine.dispose()
    return results[0]


def test_a_finish_that_waited_for_another_claim_of_its_job_writes_nothing(postgres_url: str) -> None:
    """The record has another lease when the lock is free: what the snapshot said of the lease does not count."""
    with JobStore(postgres_url) as store:
        (older,) = _claimed(store, 1)

        def take_over(bind: Any) -> None:
            jobs.requeue(bind, older)
            jobs.claim(bind, worker="v")

        (answer,) = _racing(postgres_url, take_over, lambda bind: jobs.complete_many(bind, [(older, {"by": "older"})]))
        assert isinstance(answer, LeaseLostError)
        job = store.get(older.job_id)
        assert (job.status, job.worker, job.metrics) == (MlJobStatus.RUNNING, "v", None)


def test_a_finish_that_waited_for_a_cancel_writes_nothing(postgres_url: str) -> None:
    with JobStore(postgres_url) as store:
        (claim,) = _claimed(store, 1)
        (answer,) = _racing(
            postgres_url,
            lambda bind: jobs.cancel(bind, claim.job_id),
            lambda bind: jobs.complete_many(bind, [(claim, {"late": True})]),
        )
        assert isinstance(answer, TerminalStateError)
        assert store.get(claim.job_id).metrics is None


def test_a_renewal_that_waited_for_a_rescue_holds_nothing(postgres_url: str) -> None:
    with JobStore(postgres_url) as store:
        claims = _claimed(store, 3)
        _expire(store)
        renewal = _racing(postgres_url, jobs.rescue, lambda bind: jobs.renew(bind, claims))
        assert (renewal.held, len(renewal.lost)) == ([], 3)


def test_a_rescue_passes_over_what_a_finish_is_writing_and_waits_for_nobody(postgres_url: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    with JobStore(postgres_url) as store:
        finished, silent = _claimed(store, 2)
        _expire(store)
        with engine.connect() as finishing:
            assert jobs.complete_many(finishing, [(finished, None)]) == [None]
            assert store.rescue().requeued == [silent.job_id]
            finishing.commit()
        assert store.get(finished.job_id).status is MlJobStatus.COMPLETED
        store.rescue()
        assert _leases(store) == []
    engine.dispose()
