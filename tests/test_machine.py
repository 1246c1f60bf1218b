"""Hypothesis drives a store, and the record itself, against plain models, on SQLite and PostgreSQL."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from mljobs import (
    InvalidTransitionError,
    JobStore,
    LeaseLostError,
    MlJob,
    MlJobStatus,
    TerminalStateError,
)
from mljobs._values import utc_now
from mljobs.jobs import Claim
from mljobs.jobs._claims import Lease

SETTINGS = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TARGETS = ["spam", "ham"]


class Job:
    """What the model knows of a job."""

    def __init__(self, target: str, *, exclusive: bool) -> None:
        self.target = target
        self.exclusive = exclusive
        self.status = "queued"
        self.progress = 0
        self.attempts = 0
        self.result: Any = None
        self.token: int | None = None  # of the present lease
        self.expired = False


def store_machine(store: JobStore) -> type[RuleBasedStateMachine]:
    """Workers claim, stall, die, come back late; the model says what each is told."""

    class StoreMachine(RuleBasedStateMachine):
        claims: Bundle[Claim] = Bundle("claims")
        ids: Bundle[UUID] = Bundle("ids")

        def __init__(self) -> None:
            super().__init__()
            self.store = store
            self.jobs: dict[UUID, Job] = {}
            with self.store.engine.begin() as connection:
                connection.exec_driver_sql("DELETE FROM ml_job_leases")
                if self.store.engine.dialect.name == "postgresql":
                    connection.exec_driver_sql("SET LOCAL mljobs.retention = 'on'")
                    connection.exec_driver_sql("DELETE FROM ml_jobs")
                else:
                    connection.exec_driver_sql("UPDATE ml_jobs_guard SET open = 1 WHERE name = 'retention'")
                    connection.exec_driver_sql("DELETE FROM ml_jobs")
                    connection.exec_driver_sql("UPDATE ml_jobs_guard SET open = 0 WHERE name = 'retention'")

        @rule(target=ids, name=st.sampled_from(TARGETS), exclusive=st.booleans())
        def submit(self, name: str, exclusive: bool) -> UUID:  # noqa: FBT001 - Hypothesis calls it by name
            job = self.store.submit("train", name, exclusive=exclusive)
            self.jobs[job.id] = Job(name, exclusive=exclusive)
            return job.id

        @rule(target=claims)
        def claim(self) -> Any:
            locked = {job.target for job in self.jobs.values() if job.token is not None and job.exclusive}
            wanted = [
                job_id
                for job_id, job in self.jobs.items()
                if job.status == "queued" and not (job.exclusive and job.target in locked)
            ]
            got = self.store.claim(worker="w")
            if not wanted:
                assert got == []
                return Claim(
                    MlJob(kind="train", target_name="nothing"), uuid4(), 0, "w", utc_now(), Lease(MlJob, 0, None, ())
                )
            assert [claim.job_id for claim in got] == wanted[:1]
            job = self.jobs[got[0].job_id]
            job.status, job.progress, job.token, job.expired = "running", 0, got[0].token, False
            job.attempts += 1
            assert got[0].job.attempts == job.attempts
            return got[0]

        def _write(self, claim: Claim, act: Any, then: Any, *, ends: bool) -> None:
            job = self.jobs.get(claim.job_id)
            if job is None:
                return
            if job.token != claim.token:
                with pytest.raises(LeaseLostError):
                    act()
                return
            if job.status != "running":
                with pytest.raises(TerminalStateError):
                    act()
            else:
                act()
                then(job)
            if ends:
                job.token = None

        @rule(claim=claims, result=st.integers())
        def complete(self, claim: Claim, result: int) -> None:
            def then(job: Job) -> None:
                job.status, job.progress, job.result = "completed", 100, {"n": result}

            self._write(claim, lambda: self.store.complete(claim, {"n": result}), then, ends=True)

        @rule(claim=claims)
        def fail(self, claim: Claim) -> None:
            def then(job: Job) -> None:
                job.status = "failed"

            self._write(claim, lambda: self.store.fail(claim, "why"), then, ends=True)

        @rule(claim=claims)
        def requeue(self, claim: Claim) -> None:
            def then(job: Job) -> None:
                job.status, job.progress = "queued", 0

            self._write(claim, lambda: self.store.requeue(claim), then, ends=True)

        @rule(claim=claims, value=st.integers(0, 130))
        def progress(self, claim: Claim, value: int) -> None:
            def then(job: Job) -> None:
                job.progress = min(value, 100)

            self._write(claim, lambda: self.store.set_progress(claim, value), then, ends=False)

        @rule(claim=claims)
        def renew(self, claim: Claim) -> None:
            job = self.jobs.get(claim.job_id)
            if job is None:
                return
            renewal = self.store.renew([claim])
            if job.token != claim.token:
                assert renewal.lost
            elif job.status == "running":
                assert renewal.held
                job.expired = False
            else:
                assert renewal.cancelled
                job.expired = False

        @rule(claim=consumes(claims))
        def dies_or_stalls(self, claim: Claim) -> None:
            job = self.jobs.get(claim.job_id)
            if job is not None and job.token == claim.token:
                moment = "0" if self.store.engine.dialect.name == "sqlite" else "'2020-01-01'"
                with self.store.engine.begin() as connection:
                    connection.exec_driver_sql(
                        f"UPDATE ml_job_leases SET expires_at = {moment} WHERE token = {claim.token}"
                    )
                job.expired = True

        @rule(claim=claims)
        def stalls_and_comes_back(self, claim: Claim) -> None:
            self.dies_or_stalls(claim)

        @rule(most=st.integers(1, 3))
        def rescue(self, most: int) -> None:
            rescue = self.store.rescue(max_attempts=most)
            expected: dict[str, set[Any]] = {"requeued": set(), "failed": set(), "released": set()}
            for job_id, job in self.jobs.items():
                if job.token is None or not job.expired:
                    continue
                token, job.token = job.token, None
                if job.status != "running":
                    expected["released"].add(token)
                elif job.attempts >= most:
                    job.status = "failed"
                    expected["failed"].add(job_id)
                else:
                    job.status, job.progress = "queued", 0
                    expected["requeued"].add(job_id)
            for name, ids in expected.items():
                assert set(getattr(rescue, name)) == ids
            assert not rescue.errors

        @rule(job_id=ids)
        def cancel(self, job_id: UUID) -> None:
            job = self.jobs[job_id]
            cancellable = job.status in ("queued", "running")
            assert self.store.cancel(job_id) is cancellable
            if cancellable:
                job.status = "cancelled"

        @rule(target=ids, job_id=ids)
        def retry(self, job_id: UUID) -> UUID:
            old = self.jobs[job_id]
            if old.status in ("queued", "running"):
                with pytest.raises(InvalidTransitionError):
                    self.store.retry(job_id)
                return job_id
            again = self.store.retry(job_id, again=True, another=True)
            self.jobs[again.id] = Job(old.target, exclusive=old.exclusive)
            return again.id

        @invariant()
        def the_table_is_the_model(self) -> None:
            found = {
                job.id: (job.status.token, job.progress, job.attempts, job.metrics)
                for job in self.store.find(limit=1000)
            }
            assert found == {
                job_id: (job.status, job.progress, job.attempts, job.result) for job_id, job in self.jobs.items()
            }

    return StoreMachine


def test_a_store_behaves_like_the_model(url: str) -> None:
    with JobStore(url) as store:
        run_state_machine_as_test(store_machine(store), settings=SETTINGS)


def record_machine(engine: Engine) -> type[RuleBasedStateMachine]:
    """One record and its methods, flushed and expired at will, against a plain dict."""

    class RecordMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.session = Session(engine)
            self.job = MlJob(kind="train", target_name="spam")
            self.session.add(self.job)
            self.session.flush()
            self.model: dict[str, Any] = {"status": "queued", "progress": 0, "attempts": 0, "finished": False}

        def teardown(self) -> None:
            self.session.rollback()
            self.session.close()

        def _step(self, wanted: str, act: Any, changes: dict[str, Any]) -> None:
            status = MlJobStatus(self.model["status"])
            if status.is_terminal:
                with pytest.raises(TerminalStateError):
                    act()
            elif not status.can_become(MlJobStatus(wanted)):
                with pytest.raises(InvalidTransitionError):
                    act()
            else:
                act()
                self.session.flush()
                self.model |= {"status": wanted, **changes}

        @rule()
        def start(self) -> None:
            self._step("running", self.job.start, {"progress": 0, "attempts": self.model["attempts"] + 1})

        @rule()
        def complete(self) -> None:
            self._step("completed", self.job.complete, {"progress": 100, "finished": True})

        @rule()
        def fail(self) -> None:
            self._step("failed", lambda: self.job.fail("why"), {"finished": True})

        @rule()
        def cancel(self) -> None:
            self._step("cancelled", self.job.cancel, {"finished": True})

        @rule()
        def requeue(self) -> None:
            self._step("queued", self.job.requeue, {"progress": 0})

        @rule(value=st.integers(0, 100))
        def progress(self, value: int) -> None:
            if self.model["finished"] and value != self.model["progress"]:
                with pytest.raises(TerminalStateError), self.session.begin_nested():
                    self.job.progress = value
                    self.session.flush()
            else:
                self.job.progress = value
                self.session.flush()
                self.model["progress"] = value

        @rule()
        def expire(self) -> None:
            self.session.expire(self.job)

        @invariant()
        def the_row_is_the_dict(self) -> None:
            job = self.job
            assert {
                "status": job.status.token,
                "progress": job.progress,
                "attempts": job.attempts,
                "finished": job.finished_at is not None,
            } == self.model

    return RecordMachine


def test_a_record_behaves_like_the_plain_dict(engine: Engine) -> None:
    run_state_machine_as_test(record_machine(engine), settings=SETTINGS)
