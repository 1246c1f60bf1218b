"""A standby of PostgreSQL: who reads there, and what a failover costs.

``python -m pytest -n 0 tests/slow/test_replica.py``: two servers, which take seconds to make.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import InternalError
from sqlalchemy.pool import NullPool

from mljobs import JobStore, MlJobStatus, Run, TerminalStateError, Worker, schema
from tests import postgres
from tests.test_watching import Looks
from tests.waiting import until


class Standby(postgres.Cluster):
    """A copy of a server that follows it."""

    def __init__(self, work: Path, primary: postgres.Cluster) -> None:
        super().__init__(work, fsync=False)
        subprocess.run(["rm", "-rf", work / "data"], check=True)
        source = ["-h", "127.0.0.1", "-p", str(primary.port), "-U", "postgres"]
        subprocess.run(
            [self.binaries / "pg_basebackup", *source, "-D", work / "data", "-R", "-c", "fast", "-X", "stream"],
            check=True,
            cwd=work,
            **self._account,
        )


@contextmanager
def _standby(primary: postgres.Cluster) -> Iterator[Standby]:
    work = Path(tempfile.mkdtemp(prefix="mljobs-standby-"))
    made = Standby(work, primary)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        subprocess.run(["rm", "-rf", work], check=True)


@pytest.fixture
def servers() -> Iterator[tuple[postgres.Cluster, Standby]]:
    with ExitStack() as stack:
        primary = stack.enter_context(postgres.cluster())
        schema.upgrade(primary.url)
        yield primary, stack.enter_context(_standby(primary))


def _execute(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(statement))


def test_a_standby_serves_readers_and_refuses_writers(servers: tuple[postgres.Cluster, Standby]) -> None:
    primary, standby = servers
    with JobStore(primary.url) as writer, JobStore(standby.url) as reader:
        job = writer.submit("train", "spam")
        until(lambda: len(reader.find()) == 1)
        schema.ready(reader.engine)
        waiting = threading.Thread(target=reader.wait, args=(job,), kwargs={"timeout": 60, "poll": 0.05})
        waiting.start()
        writer.complete(writer.claim_one(job, worker="w"), {"f1": 0.9})
        waiting.join(60)
        assert not waiting.is_alive()
        assert [job.metrics for job in reader.best("spam", metric="f1")] == [{"f1": 0.9}]
        assert reader.counts().total() == 1
        for write in (
            lambda: reader.submit("train", "eggs"),
            lambda: reader.submit_many([("train", "eggs", None)]),
            lambda: reader.claim(worker="w"),
            lambda: reader.rescue(max_attempts=3),
        ):
            with pytest.raises(InternalError, match=r"read-only|during recovery"):
                write()
        assert reader.why_read_only() == "the database is a replica"
        assert reader.counts(exact=True).total() == 1
        looks = Looks(reader.engine)
        writer.submit("train", "watched")
        assert until(looks.seen) == [("watched", "queued")]


def test_a_worker_goes_on_at_the_promoted_standby(servers: tuple[postgres.Cluster, Standby]) -> None:
    primary, standby = servers
    hosts = f"host=127.0.0.1:{primary.port}&host=127.0.0.1:{standby.port}&target_session_attrs=read-write"
    _execute(primary.url, "ALTER SYSTEM SET synchronous_standby_names = '*'")
    _execute(primary.url, "SELECT pg_reload_conf()")
    started, failed_over = threading.Event(), threading.Event()
    with JobStore(f"postgresql+psycopg://postgres@/postgres?{hosts}") as store:
        worker = Worker(store, lease=60, poll=0.1)

        @worker.handles("train")
        def train(run: Run) -> dict[str, int]:
            started.set()
            assert failed_over.wait(60)
            return {"attempt": run.attempt}

        before = store.submit("train", "spam")
        done = store.submit("backfill", "table")
        store.complete(store.claim_one(done, worker="w"))
        thread = threading.Thread(target=worker.run)
        thread.start()
        assert started.wait(60)
        with JobStore(primary.url) as there:
            token = there.get(before).lease
        primary.stop(immediate=True)
        _execute(standby.url, "SELECT pg_promote()")
        failed_over.set()
        with JobStore(standby.url) as there:
            assert there.wait(before, timeout=60).metrics == {"attempt": 1}  # the lease came along
            assert there.get(done).status is MlJobStatus.COMPLETED
            after = there.submit("train", "ham")
            assert there.wait(after, timeout=60).status is MlJobStatus.COMPLETED
            claim = there.claim_one(there.submit("backfill", "again"), worker="w")
            assert claim.token > int(str(token))
            schema.verify(there.engine)
            with pytest.raises(TerminalStateError):
                there.claim_one(done, worker="w")
        worker.stop()
        thread.join(60)
        assert not thread.is_alive()
