"""Workers: a database that does not answer for a while."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from mljobs import (
    JobStore,
    MlJobStatus,
    TerminalStateError,
)
from mljobs.store._run import Run
from mljobs.worker import _running
from tests.leases import count_leases, expire_leases
from tests.workers import ended, worker_of

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = MlJobStatus


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as store:
        yield store


# -------------------------------------------------------------------------------------------- a database that goes away


class Flaky(JobStore):
    """A store whose database goes away when told."""

    away = False
    lose_answer = False

    def finish_and_claim(self, *args: Any, **kw: Any) -> Any:
        self._leave()
        answer = super().finish_and_claim(*args, **kw)
        self._forget(args)
        return answer

    def finish_many(self, *args: Any, **kw: Any) -> Any:
        self._leave()
        answer = super().finish_many(*args, **kw)
        self._forget(args)
        return answer

    def _leave(self) -> None:
        if self.away:
            raise OperationalError("SELECT 1", None, Exception("the server went away"))

    def _forget(self, args: Any) -> None:
        if args and args[0] and self.lose_answer:
            self.lose_answer = False
            raise OperationalError("COMMIT", None, Exception("the connection broke"))


def test_a_finish_waits_for_the_database_and_is_recorded(url: str) -> None:
    with Flaky(url) as store:
        worker = worker_of(store)

        @worker.handles("train")
        def train(run: Run) -> dict[str, int]:
            store.away = True
            threading.Timer(0.3, setattr, (store, "away", False)).start()
            return {"n": 1}

        job = store.submit("train", "spam")
        assert worker.run(until_idle=True).jobs == {"completed": 1}
        assert ended(store, job).metrics == {"n": 1}


def test_a_second_stop_is_heard_while_the_database_is_away(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_running, "_LAST_SECONDS", 0.2)
    with Flaky(url) as store:
        worker = worker_of(store, grace=3600)
        ending = threading.Event()

        @worker.handles("train")
        def train(run: Run) -> None:
            store.away = True
            worker.stop()
            ending.set()

        job = store.submit("train", "spam")
        thread = threading.Thread(target=worker.run)
        thread.start()
        assert ending.wait(60)
        worker.stop()
        thread.join(60)
        assert not thread.is_alive()
        assert ended(store, job).status is RUNNING  # until its lease ends


def test_a_finish_whose_answer_was_lost_is_counted_once(url: str) -> None:
    with Flaky(url) as store:
        worker = worker_of(store)

        @worker.handles("train", retries=1, backoff=0)
        def train(run: Run) -> dict[str, int]:
            store.lose_answer = True
            return {"n": 1}

        job = store.submit("train", "spam")
        assert worker.run(until_idle=True).jobs == {"completed": 1}
        assert ended(store, job).metrics == {"n": 1}
        with pytest.raises(TerminalStateError):
            store.claim_one(job.id, worker="w")
        assert list(store.find(status="queued")) == []


def test_a_finish_whose_answer_was_lost_is_looked_up_until_the_database_answers(url: str) -> None:
    class FlakyTwice(Flaky):
        looks = 0

        def get(self, *args: Any, **kw: Any) -> Any:
            self.looks += 1
            if self.looks == 1:
                raise OperationalError("SELECT 1", None, Exception("the server went away again"))
            return super().get(*args, **kw)

    with FlakyTwice(url) as store:
        worker = worker_of(store)

        @worker.handles("train")
        def train(run: Run) -> dict[str, int]:
            store.lose_answer = True
            return {"n": 1}

        job = store.submit("train", "spam")
        assert worker.run(until_idle=True).jobs == {"completed": 1}
        assert store.looks >= 2
        assert ended(store, job).metrics == {"n": 1}
        assert count_leases(store.engine) == 0


def test_a_table_that_is_gone_is_not_waited_for(sqlite_url: str) -> None:
    with JobStore(sqlite_url) as store:
        worker = worker_of(store)

        @worker.handles("train")
        def train(run: Run) -> None:
            with store.engine.begin() as connection:
                connection.exec_driver_sql("DROP TABLE ml_job_leases")

        store.submit("train", "spam")
        with pytest.raises(OperationalError, match="no such table"):
            worker.run(until_idle=True)


def test_an_outcome_is_dropped_when_the_lease_is_gone_meanwhile(url: str) -> None:
    with Flaky(url) as store:
        worker = worker_of(store)

        @worker.handles("train")
        def train(run: Run) -> dict[str, int]:
            run.mark_lost()
            return {"n": 1}

        job = store.submit("train", "spam")
        claim_lost = worker.run(until_idle=True)
        assert claim_lost.jobs == {"lost": 1}
        assert ended(store, job).status is RUNNING  # its lease still stands; a rescue decides
        expire_leases(store.engine)
        assert store.rescue().requeued == [job.id]
        assert store.claim_one(job.id, worker="next").job.attempts == 2


# ---------------------------------------------------------------------------------------------- logging that does not work


def test_a_handler_or_filter_of_logs_that_raises_costs_no_job(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise ValueError(f"no disk for {record.msg}")

    def filtered(record: logging.LogRecord) -> bool:
        raise ValueError(f"no filter for {record.msg}")

    logs = logging.getLogger("mljobs.worker")
    monkeypatch.setattr(logs, "handlers", [Broken()])
    with Flaky(sqlite_url) as store:
        for filters in [], [filtered]:
            monkeypatch.setattr(logs, "filters", filters)
            worker = worker_of(store)
            worker.handles("train")(lambda run: {} if run.job.target_name == "good" else 1 / 0)
            for name in ("good", "bad"):
                store.submit("train", name)
            assert dict(worker.run(until_idle=True).jobs) == {"completed": 1, "failed": 1}
    said = capsys.readouterr().err
    assert "no disk for job %s" in said
    assert "no filter for job %s" in said
