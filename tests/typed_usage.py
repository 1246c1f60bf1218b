"""What a type checker sees; ``.ci/run`` gives it to mypy --strict and to pyright. Never executed.

Each ``type: ignore`` marks a mistake that must be seen: both checkers report one that is not needed.
"""

from __future__ import annotations

from typing import Any, assert_type
from uuid import UUID

from sqlalchemy.orm import DeclarativeBase, Mapped, Session, scoped_session

from mljobs import AsyncJobStore, Claim, Followed, JobStore, MlJob, MlJobMixin, Run, Worker, jobs
from mljobs.jobs import Counts, Page, Renewal, Rescue
from mljobs.testing import advance, make_job, run_jobs


class Base(DeclarativeBase):
    """A host's own."""


class Training(MlJobMixin, Base):
    """A host's class."""

    __tablename__ = "trainings"
    owner: Mapped[str]


def blocking(store: JobStore, job_id: UUID) -> None:
    """Use a store of the default class."""
    assert_type(store.submit("train", "spam", {"lr": 0.1}, priority=3), MlJob)
    assert_type(store.submit_many([("train", "spam", {})]), int)
    assert_type(store.submit_many([{"kind": "train", "target_name": "spam"}], ids=True, priority=1), list[UUID])
    assert_type(jobs.submit_many(Session(), [], ids=True), list[UUID])
    claims = store.claim(worker="w1", kinds=None, limit=10, lease=60.0)
    assert_type(claims, list[Claim])
    assert_type(store.renew(claims, lease=60.0), Renewal)
    assert_type(store.cancel(job_id), bool)
    assert_type(store.find(status="failed", limit=5), Page)
    assert_type(store.counts(), Counts)
    assert_type(store.rescue(max_attempts=5), Rescue)
    assert_type(store.wait(job_id, timeout=1.0), MlJob)
    assert_type(store.export_jobs("jobs.ndjson", extended=True), int)
    assert_type(store.import_jobs("jobs.ndjson", on_conflict="update").inserted, int)
    store.claim()  # type: ignore[call-arg]
    store.submit("train")  # type: ignore[call-arg]
    store.set_progress(claims[0], "40")  # type: ignore[arg-type]
    store.complete(job_id)  # type: ignore[arg-type]
    store.submit("train", "spam").owner  # type: ignore[attr-defined]  # noqa: B018
    store.import_jobs("jobs.ndjson", on_conflict="perhaps")  # type: ignore[arg-type]
    with store.running(job_id) as run:
        assert_type(run, Run)
        for number in run.track(range(3)):
            assert_type(number, int)


async def awaited(store: AsyncJobStore, job_id: UUID) -> None:
    """Use an async store of the default class."""
    assert_type(await store.submit("train", "spam", {"lr": 0.1}, priority=3), MlJob)
    claims = await store.claim(worker="w1", kinds=None, limit=10, lease=60.0)
    assert_type(claims, list[Claim])
    assert_type(await store.cancel(job_id), bool)
    assert_type(await store.counts(), Counts)
    assert_type(await store.export_jobs("jobs.ndjson"), int)
    await store.claim()  # type: ignore[call-arg]
    await store.complete(job_id)  # type: ignore[arg-type]
    async with store.running(job_id) as run:
        assert_type(run, Run)
    async for job in store.watch(kind="train"):
        assert_type(job, MlJob)
    assert_type(await store.follow([job_id]), Followed[MlJob])
    assert_type(await store.submit_many([], ids=True), list[UUID])


def of_a_class(job_id: UUID) -> None:
    """Use a store of a host's class."""
    store = JobStore("sqlite://", model=Training)
    assert_type(store, JobStore[Training])
    assert_type(store.submit("train", "spam", owner="ann").owner, str)
    assert_type(store.get(job_id).owner, str)
    assert_type(store.retry(job_id).owner, str)
    assert_type(store.find(kind="train"), Page[Training])
    assert_type(store.find().jobs[0].owner, str)
    assert_type([job.owner for job in store.history("spam")], list[str])
    claims = store.claim(worker="w1")
    assert_type(claims, list[Claim[Training]])
    assert_type(claims[0].job.owner, str)
    assert_type(store.renew(claims).held, list[Claim[Training]])
    assert_type(store.claim_one(job_id, worker="w1").job, Training)
    assert_type(store.wait(job_id).owner, str)
    for job in store.watch():
        assert_type(job, Training)
    assert_type(store.follow("status:queued"), Followed[Training])
    assert_type([job.owner for job in store.follow([job_id])], list[str])
    with store.running(job_id) as run:
        assert_type(run, Run[Training])
        assert_type(run.job.owner, str)
    store.complete(claims[0])
    JobStore("sqlite://").submit("train", "spam").owner  # type: ignore[attr-defined]  # noqa: B018


async def of_a_class_awaited(job_id: UUID) -> None:
    """Use an async store of a host's class."""
    store = AsyncJobStore("sqlite://", model=Training)
    assert_type(store, AsyncJobStore[Training])
    assert_type((await store.submit("train", "spam")).owner, str)
    assert_type((await store.find()).jobs, tuple[Training, ...])
    assert_type((await store.claim(worker="w1"))[0].job.owner, str)
    assert_type((await store.wait(job_id)).owner, str)
    async with store.running(job_id) as run:
        assert_type(run.job.owner, str)


def in_a_session(session: Session, scoped: scoped_session[Session], job_id: UUID) -> None:
    """Use the operations."""
    assert_type(jobs.submit(session, "train", "spam"), MlJob)
    assert_type(jobs.submit(scoped, "train", "spam", model=Training).owner, str)
    assert_type(jobs.get(session, job_id, model=Training), Training)
    assert_type(jobs.find(session, model=Training), Page[Training])
    assert_type(jobs.lineage(session, job_id, model=Training), list[Training])
    (claim,) = jobs.claim(session, worker="w1", model=Training)
    assert_type(claim, Claim[Training])
    assert_type(jobs.renew(session, [claim]), Renewal[Training])
    jobs.complete(session, claim, {"auc": 0.9})
    jobs.submit("sqlite://", "train", "spam")  # type: ignore[arg-type]


def work() -> None:
    """Handle jobs."""
    worker = Worker(JobStore("sqlite://", model=Training), concurrency=2)
    assert_type(worker, Worker[Training])

    @worker.handles("train", retries=2)
    def train(run: Run[Training]) -> dict[str, Any]:
        return {"owner": run.job.owner}

    @worker.handles("backfill")
    async def backfill(run: Run[Training]) -> None:
        assert_type(run.job, Training)

    @worker.handles("drift_compute")  # type: ignore[arg-type]
    def wrong(run: Run[MlJob]) -> None:
        assert_type(run.job, MlJob)

    plain = Worker(JobStore("sqlite://"))
    assert_type(plain, Worker)

    @plain.handles("train")
    def fit(run: Run) -> None:
        assert_type(run.job, MlJob)


def test_with(store: JobStore[Training]) -> None:
    """Make jobs for tests."""
    assert_type(make_job("failed", Training, owner="ann").owner, str)
    assert_type(make_job("completed"), MlJob)
    assert_type(run_jobs(store, Worker(store)), dict[str, int])
    advance(store, hours=1)
