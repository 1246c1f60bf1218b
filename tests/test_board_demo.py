"""The demonstration's history is believable, its workers go on, and the command serves nothing that it should not."""

from __future__ import annotations

import random
import threading
from datetime import timedelta

import pytest

from mljobs import JobStore, MlJobStatus
from mljobs._values import utc_now
from mljobs.board._demo import History, failures
from mljobs.board._live import Live
from mljobs.cli._app import run
from tests.boards import client


def test_its_failures_are_real_and_differ() -> None:
    found = failures()
    assert len({text.partition(":")[0] for text in found}) >= 5
    assert all('File "app/jobs.py", line' in text for text in found)
    assert all("_demo.py" not in text for text in found)


def test_its_history_gets_better_fails_and_retries_and_lies_in_the_past(sqlite_url: str) -> None:
    now = utc_now()
    with JobStore(sqlite_url) as store:
        store.submit_many(History(now).records(1500))
        jobs = store.find(limit=10_000).jobs
        assert 1400 < len(jobs) < 1800
        assert {job.status for job in jobs} == {MlJobStatus.COMPLETED, MlJobStatus.FAILED, MlJobStatus.CANCELLED}
        assert all(
            job.started_at and job.finished_at and job.created_at <= job.started_at <= job.finished_at <= now
            for job in jobs
        )
        assert max(len(chain) for chain in store.chains([job.id for job in jobs if job.retry_of]).values()) >= 2
        f1 = [
            job.metrics["f1"]
            for job in store.find("target:spam_classifier kind:train status:completed", order="oldest")
        ]
        assert max(f1) in f1[len(f1) // 2 :]
        assert len(store.find(finished_after=timedelta(hours=1), limit=1000)) > 20


def test_its_workers_go_on_and_one_is_silent(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        live = Live(store, pace=10)
        live._scene()
        before = {job.id: job.progress for job in store.running_jobs()}
        for _ in range(4):
            live._step()
        after = {job.id: job.progress for job in store.running_jobs()}
        assert any(after.get(job_id, 101) > progress for job_id, progress in before.items())
        html = client(store).get("/").text
        assert "worker gpu-b2-0419 is silent" in html
        assert "by hand, no lease" in html
        assert "queued; its target is taken by" in html


def test_what_it_trains_is_real_and_reported(sqlite_url: str) -> None:
    from mljobs.board import _digits

    with JobStore(sqlite_url) as store:
        spec = {**_digits.spec(random.Random(1)), "epochs": 3, "lr": 0.01, "hidden": 32}
        stop = threading.Event()
        stop.wait = lambda _seconds=None: False  # type: ignore[method-assign, assignment]
        job = store.submit("train", _digits.TARGET, spec)
        with store.running(job, worker="this-process") as work:
            _digits.train(work, stop)
        assert store.get(job).metrics["f1"] > 0.3


def test_the_command_lets_nobody_act_at_an_open_address(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["board", "--act", "--host", "0.0.0.0"])
    assert ended.value.code == 1
    assert "mount create_app(authorize=...)" in capsys.readouterr().err
