"""The operations beneath the command: short ids, many at once, the best run, what is going on."""

from __future__ import annotations

from datetime import timedelta
from inspect import signature
from typing import Any
from uuid import UUID

import pytest

from mljobs import AmbiguousIdError, AsyncJobStore, InvalidValueError, JobStore, MlJob, MlJobStatus, jobs
from mljobs.jobs import Batch
from tests.backends import Backend

FIRST = "0199f3c2000070008000000000009d4e"
SECOND = "0199f3c2000070008000000000009d4f"
THIRD = "0199aaaa000070008000000000119d4e"


def test_a_short_id_names_the_one_job_that_begins_or_ends_so(store: Any) -> None:
    for job_id in (FIRST, SECOND, THIRD):
        store.submit("train", "spam", id=job_id)
    for text, wanted in {
        FIRST: FIRST,
        FIRST.upper(): FIRST,
        str(UUID(FIRST)): FIRST,
        "9d4f": SECOND,
        "*9d4f": SECOND,
        "00009d4e": FIRST,
        "119d4e": THIRD,
        "0199a": THIRD,
        "0199f3c2…9d4e": FIRST,
        "0199f3c2...9d4f": SECOND,
    }.items():
        assert store.find_id(text) == UUID(wanted), text
    assert store.find_id(UUID(FIRST)) == UUID(FIRST)
    with pytest.raises(AmbiguousIdError, match="several jobs have it") as caught:
        store.find_id("9d4e")
    assert set(caught.value.candidates) == {UUID(FIRST), UUID(THIRD)}
    with pytest.raises(AmbiguousIdError):
        store.find_id("0199")
    for wrong in ("9d4", "xyz", "", "…", "abcdef", "0199*9d4e*"):
        with pytest.raises(InvalidValueError) as refused:
            store.find_id(wrong)
        assert refused.value.field == "id"


def test_many_are_cancelled_in_batches_that_can_be_run_again(store: Any) -> None:
    store.submit_many([("train", f"t{number}", {"n": number}) for number in range(7)] + [("backfill", "b", {})])
    (running,) = store.claim(worker="w", kinds=["train"], limit=1)
    assert str(store.affected("cancel", "kind:train")) == "train: queued 6, running 1"
    first = store.cancel_batch("kind:train", batch=3)
    assert isinstance(first, Batch)
    assert len(first.jobs) == 3
    assert running.job_id in first.jobs
    assert store.cancel_many("kind:train spec.n>3") == 3
    assert store.cancel_many(kind="train") == 1
    assert store.cancel_many(kind="train") == 0
    assert store.counts().total(status="cancelled") == 7
    assert store.counts()["backfill", "queued"] == 1
    for act in (store.cancel_many, store.retry_many):
        with pytest.raises(InvalidValueError, match="everything=True"):
            act()
    assert store.cancel_many(everything=True) == 1


def test_many_are_retried_once(store: Any) -> None:
    store.submit_many([("train", f"t{number}", {"n": number}) for number in range(6)])
    claims = store.claim(worker="w", limit=5)
    for claim in claims[:3]:
        store.fail(claim, "CUDA out of memory")
    store.fail(claims[3], "disk full")
    store.complete(claims[4])
    assert store.affected("retry", 'error:"out of memory"').total() == 3
    assert store.retry_batch('error:"out of memory"', batch=2).jobs
    assert store.retry_many('error:"out of memory"') == 1
    assert store.retry_many('error:"out of memory"') == 0
    again = store.find("status:queued", limit=100)
    assert sum(job.retry_of is not None for job in again) == 3
    assert store.retry_many("kind:train") == 1
    assert store.retry_many("status:completed") == 1
    assert store.retry_many(everything=True) == 0


def test_the_best_run_on_a_target_is_the_one_with_the_highest_or_lowest_metric(store: Any) -> None:
    for f1, target in ((0.5, "spam"), (0.9, "spam"), (0.7, "spam"), (0.99, "ham"), ("high", "spam"), (None, "spam")):
        store.submit("train", target, {"f1": f1})
    for claim in store.claim(worker="w", limit=10):
        store.complete(claim, {"f1": claim.job.spec["f1"]} if claim.job.spec["f1"] is not None else None)
    assert [job.metrics["f1"] for job in store.best("spam", "f1")] == [0.9, 0.7, 0.5]
    assert [job.metrics["f1"] for job in store.best("spam", "f1", lowest=True, limit=1)] == [0.5]
    assert [job.metrics["f1"] for job in store.best("spam", "f1", filter="spec.f1<0.8")] == [0.7, 0.5]
    assert list(store.best("spam", "loss")) == []
    page = store.best("spam", "f1", scan=True)
    assert (page.complete, page.scanned, page.cursor) == (True, None, None)
    for wrong in ({"metric": ""}, {"limit": 0}):
        with pytest.raises(InvalidValueError):
            store.best("spam", **{"metric": "f1", **wrong})


def test_stats_say_by_kind_what_waits_runs_and_finished(store: Any) -> None:
    store.submit_many([("train", "t", {}) for _ in range(5)] + [("backfill", "b", {})])
    claims = store.claim(worker="gpu-1", kinds=["train"], limit=4)
    store.complete(claims[0])
    store.fail(claims[1], "x")
    store.cancel(claims[2].job_id)
    found = store.stats(over=timedelta(hours=2))
    backfill, train = found.kinds
    assert (backfill.kind, backfill.queued, backfill.running, backfill.per_hour) == ("backfill", 1, 0, 0)
    assert backfill.oldest is not None
    assert (train.queued, train.running, train.completed, train.failed, train.cancelled) == (1, 1, 1, 1, 1)
    assert train.per_hour == 1.5
    assert train.ran is not None
    assert train.ran.jobs == 1
    assert train.waited is not None
    assert found.complete
    with pytest.raises(InvalidValueError):
        store.stats(over=timedelta(0))


def test_holders_are_the_workers_that_hold_leases(backend: Backend) -> None:
    store = backend.store()
    assert store.holders() == []
    store.submit_many([("train", f"t{number}", {}) for number in range(3)])
    store.claim(worker="gpu-2", limit=2)
    store.claim(worker="gpu-1", limit=1, lease=0.001)

    def look(session: Any) -> None:
        assert {holder.worker: holder.held for holder in jobs.holders(session)} == {"gpu-1": 1, "gpu-2": 2}

    backend.run(look)
    found = {holder.worker: holder for holder in store.holders()}
    assert found["gpu-2"].silent == 0
    assert [job.status for job in found["gpu-2"].jobs] == [MlJobStatus.RUNNING] * 2
    assert list(found) == ["gpu-1", "gpu-2"]
    assert MlJob is not None


@pytest.mark.parametrize("store_class", [JobStore, AsyncJobStore])
def test_the_help_of_a_stores_method_names_what_its_caller_gives(store_class: Any) -> None:
    for name in ("find", "submit", "cancel", "claim", "prunable"):
        names = list(signature(getattr(store_class, name)).parameters)
        assert names[0] == "self"
        assert not {"session", "model"} & set(names)
