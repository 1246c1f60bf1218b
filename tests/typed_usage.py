"""What a type checker sees of both stores; ``.ci/run`` gives it to mypy --strict. Never executed.

Each ``type: ignore`` marks a mistake that must be seen: strict mode reports one that is not needed.
"""

from __future__ import annotations

from typing import assert_type
from uuid import UUID

from mljobs import AsyncJobStore, JobStore, MlJob
from mljobs.jobs import Claim, Counts, Page, Renewal, Rescue
from mljobs.store._run import Run


def blocking(store: JobStore, job_id: UUID) -> None:
    assert_type(store.submit("train", "spam", {"lr": 0.1}, priority=3), MlJob)
    assert_type(store.submit_many([("train", "spam", {})]), int)
    claims = store.claim(worker="w1", kinds=None, limit=10, lease=60.0)
    assert_type(claims, list[Claim])
    assert_type(store.renew(claims, lease=60.0), Renewal)
    assert_type(store.cancel(job_id), bool)
    assert_type(store.find(status="failed", limit=5), Page)
    assert_type(store.counts(), Counts)
    assert_type(store.rescue(max_attempts=5), Rescue)
    assert_type(store.wait(job_id, timeout=1.0), MlJob)
    store.claim()  # type: ignore[call-arg]
    store.submit("train")  # type: ignore[call-arg]
    store.set_progress(claims[0], "40")  # type: ignore[arg-type]
    store.complete(job_id)  # type: ignore[arg-type]
    with store.running(job_id) as run:
        assert_type(run, Run)
        for number in run.track(range(3)):
            assert_type(number, int)


async def awaited(store: AsyncJobStore, job_id: UUID) -> None:
    assert_type(await store.submit("train", "spam", {"lr": 0.1}, priority=3), MlJob)
    claims = await store.claim(worker="w1", kinds=None, limit=10, lease=60.0)
    assert_type(claims, list[Claim])
    assert_type(await store.cancel(job_id), bool)
    assert_type(await store.counts(), Counts)
    await store.claim()  # type: ignore[call-arg]
    await store.complete(job_id)  # type: ignore[arg-type]
    async with store.running(job_id) as run:
        assert_type(run, Run)
    async for job in store.watch(kind="train"):
        assert_type(job, MlJob)
