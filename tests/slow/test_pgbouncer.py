"""PgBouncer in transaction mode, where every transaction may meet another server process.

``python -m pytest tests/slow/test_pgbouncer.py`` after ``apt-get install pgbouncer``: no wheel carries it, so the README's
test command, which promises to need pip alone, leaves this file out. ``.ci/run`` runs it. Without PgBouncer it fails.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, delete, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from mljobs import JobStore, MlJob, MlJobStatus, TerminalStateError, Worker, schema
from tests.backends import Backend, outside_engine
from tests.postgres import _free_port, _unprivileged

SERVER_CONNECTIONS = 3
CLIENTS = 8


@pytest.fixture
def pooler(postgres_admin: Engine) -> Iterator[int]:
    """The port of a PgBouncer in front of the server of the tests."""
    program = shutil.which("pgbouncer", path=os.environ["PATH"] + ":/usr/sbin")
    if program is None:
        pytest.fail("apt-get install pgbouncer")
    work = Path(tempfile.mkdtemp(prefix="mljobs-pgbouncer-"))
    port = _free_port()
    (work / "users").write_text('"postgres" ""\n')
    (work / "ini").write_text(
        f"""\
[databases]
* = host={postgres_admin.url.host} port={postgres_admin.url.port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {work / "users"}
pool_mode = transaction
default_pool_size = {SERVER_CONNECTIONS}
max_client_conn = 200
"""
    )
    account = _unprivileged()  # PgBouncer refuses root
    for path in (work, *work.iterdir()):
        if account:
            os.chown(path, account["user"], account["group"])
    with (work / "log").open("wb") as log:
        process = subprocess.Popen([program, work / "ini"], stdout=log, stderr=log, cwd=work, **account)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            pytest.fail((work / "log").read_text())
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        shutil.rmtree(work, ignore_errors=True)


@pytest.fixture
def pooled_url(pooler: int, postgres_url: str) -> str:
    """A database with the schema, through PgBouncer."""
    return make_url(postgres_url).set(port=pooler).render_as_string(hide_password=False)


@pytest.fixture(params=["postgresql", "postgresql-psycopg-async"])
def backend(request: pytest.FixtureRequest, pooled_url: str, postgres_url: str) -> Iterator[Backend]:
    driver = "postgresql+psycopg" if request.param == "postgresql" else "postgresql+psycopg_async"
    made = Backend(
        request.param, make_url(pooled_url).set(drivername=driver).render_as_string(False), outside_engine(postgres_url)
    )
    yield made
    made.close()


def _advisory_locks(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")) or 0)


def _everything(store: Any, target: str) -> None:
    """Run each operation."""
    job = store.submit("train", target, {"lr": 0.1}, priority=5)
    assert store.submit("train", target, unless_active=True).id == job.id
    claim = store.claim_one(job, worker="w")
    assert store.renew([claim]).held
    assert store.look([claim]).held
    store.set_progress(claim, 50)
    store.complete(claim, {"f1": 1})
    again = store.retry(job, again=True)
    store.fail(store.claim_one(again, worker="w"), "no")
    third = store.submit("train", target, exclusive=True)
    store.requeue(store.claim_one(third, worker="w"))
    assert store.cancel(third)
    assert store.submit_many([("backfill", target, {"at": at}) for at in range(20)]) == 20
    assert len(store.find(target=target, kind="backfill")) == 20
    assert store.history(target)
    assert [one.id for one in store.lineage(again)] == [job.id, again.id]
    assert store.counts(exact=True).total(kind="backfill") >= 20
    assert not store.rescue().errors
    assert store.get(job).status is MlJobStatus.COMPLETED
    assert not store.cancel(job)


def test_every_operation_works_more_often_than_drivers_wait_before_they_prepare(backend: Backend) -> None:
    store = backend.store()
    for turn in range(8):
        _everything(store, f"t{turn}")
    assert store.prune(older_than=timedelta(0)) == 24
    assert _advisory_locks(backend.outside) == 0


def test_many_clients_at_once_share_a_few_server_processes(pooled_url: str, postgres_url: str) -> None:
    with JobStore(pooled_url, pool_size=CLIENTS) as store, ThreadPoolExecutor(CLIENTS) as threads:
        done = [
            threads.submit(_everything, store, f"t{client}-{turn}") for turn in range(4) for client in range(CLIENTS)
        ]
        for one in done:
            one.result(120)
        claimed = [
            claim.job_id
            for part in threads.map(lambda _: store.claim(worker="w", limit=50), range(CLIENTS))
            for claim in part
        ]
        assert len(claimed) == len(set(claimed)) > 0
    assert _advisory_locks(outside_engine(postgres_url)) == 0


def test_unless_active_queues_one_job_for_many_who_ask_at_once(pooled_url: str) -> None:
    with JobStore(pooled_url, pool_size=CLIENTS) as store, ThreadPoolExecutor(CLIENTS) as threads:
        ids = set(threads.map(lambda _: store.submit("train", "spam", unless_active=True).id, range(CLIENTS * 4)))
        assert len(ids) == 1


def test_a_job_run_by_hand_is_seen_by_who_waits_and_who_watches(backend: Backend) -> None:
    store = backend.store()
    job = store.submit("train", "spam")
    with JobStore(backend.url) as runner, runner.running(job) as run:
        for _ in run.track(range(3)):
            pass
        run.metrics = {"f1": 1}
    assert store.wait(job, timeout=30, poll=0.05).status is MlJobStatus.COMPLETED
    other = store.submit("train", "ham")
    finish = threading.Thread(target=_finish, args=(backend.url, other))

    if backend.is_async:

        async def wait() -> Any:
            waiting = asyncio.ensure_future(store._target.wait(other, timeout=60, poll=0.05))
            finish.start()
            return await waiting

        found = backend.wait(wait())
    else:
        finish.start()
        found = store.wait(other, timeout=60, poll=0.05)
    finish.join(60)
    assert found.status is MlJobStatus.COMPLETED
    assert _advisory_locks(backend.outside) == 0


def _finish(url: str, job: MlJob) -> None:
    with JobStore(url) as store:
        store.complete(store.claim_one(job, worker="w"))


def test_who_watches_sees_what_is_submitted(pooled_url: str) -> None:
    with JobStore(pooled_url) as store:
        seen = store.watch(timeout=30, poll=0.05)
        submit = threading.Timer(0, lambda: [store.submit("train", f"t{at}") for at in range(200)])
        submit.start()
        assert next(seen).kind == "train"
        submit.join(60)


def test_a_worker_works_off_the_queue(pooled_url: str, postgres_url: str) -> None:
    with JobStore(pooled_url) as store:
        store.submit_many([("train", f"t{at}", {}) for at in range(100)])
        worker = Worker(store, concurrency=4, poll=0.05)
        done = threading.Event()
        left = [100]

        @worker.handles("train")
        def train(run: Any) -> dict[str, int]:
            left[0] -= 1
            if left[0] == 0:
                done.set()
            return {"f1": 1}

        thread = threading.Thread(target=worker.run)
        thread.start()
        assert done.wait(60)
        worker.stop()
        thread.join(60)
        assert store.counts(exact=True).total(status="completed") == 100
    assert _advisory_locks(outside_engine(postgres_url)) == 0


def test_retention_is_on_for_the_transaction_that_turned_it_on_alone(pooled_url: str) -> None:
    with JobStore(pooled_url) as store:
        for _ in range(3):
            store.complete(store.claim_one(store.submit("train", "spam"), worker="w"))
            store.prune(older_than=timedelta(0), batch=1)
        store.complete(store.claim_one(store.submit("train", "spam"), worker="w"))
        for _ in range(SERVER_CONNECTIONS * 2):
            with pytest.raises(TerminalStateError), store.connect() as bind:
                bind.execute(delete(MlJob))


@pytest.mark.parametrize("empty_url", ["postgresql"], indirect=True)
def test_the_schema_is_upgraded_verified_and_taken_down(pooler: int, empty_url: str) -> None:
    url = make_url(empty_url).set(port=pooler).render_as_string(hide_password=False)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: schema.upgrade(url), range(4)))
    for _ in range(7):
        schema.verify(url)
    schema.downgrade(url)
    assert schema.current(url) is None
    assert _advisory_locks(outside_engine(empty_url)) == 0


def _often(engine: Engine) -> None:
    with engine.connect() as one, engine.connect() as other:
        for _ in range(20):
            for connection in (one, other):
                connection.execute(text("SELECT id FROM ml_jobs WHERE status = :status"), {"status": "queued"}).all()
                connection.commit()


def test_an_error_says_what_to_set_on_a_hosts_engine_and_that_works(pooled_url: str) -> None:
    with pytest.raises(DBAPIError) as caught:
        _often(create_engine(pooled_url, poolclass=NullPool))
    assert "prepare_threshold" in str(caught.value.__notes__)
    _often(create_engine(pooled_url, poolclass=NullPool, connect_args={"prepare_threshold": None}))


def test_asyncpg_gets_the_arguments_it_needs(pooled_url: str) -> None:
    engine = create_async_engine(make_url(pooled_url).set(drivername="postgresql+asyncpg"), poolclass=NullPool)

    async def use() -> None:
        statement = text("SELECT id FROM ml_jobs")
        async with engine.connect() as one, engine.connect() as other:
            await one.execute(statement)  # prepared on the first server process
            await one.commit()
            await other.execute(text("SELECT 1"))  # which this transaction holds now
            await one.execute(statement)  # so this one goes to the second

    with pytest.raises(Exception, match="prepared statement") as caught:
        asyncio.run(use())
    assert "max_prepared_statements" in str(getattr(caught.value, "__notes__", caught.value))
