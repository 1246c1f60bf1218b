"""The roles of docs/roles.md can do what the page says, through the library's own operations, and nothing else."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from mljobs import JobStore, MlJob, MlJobStatus, TerminalStateError, schema

BLOCKS = re.findall(r"```sql\n(.*?)```", (Path(__file__).parent.parent / "docs" / "roles.md").read_text(), re.DOTALL)
ROLES = ("reader", "submitter", "worker", "janitor")


class Database:
    """A database with the roles of the page, and a store for each; the owner's is ``owner``."""

    def __init__(self, url: str, prefix: str) -> None:
        self.url = url
        self.prefix = prefix
        self.engine = create_engine(url)
        self.owner = JobStore(url)
        self._open = ExitStack()
        self._stores = {"owner": self.owner}

    def apply(self, block: str) -> None:
        with self.engine.begin() as connection:
            connection.exec_driver_sql(
                block.replace("mljobs_", self.prefix).replace(self.prefix + "alembic", "mljobs_alembic")
            )

    def log_in(self, role: str) -> str:
        return make_url(self.url).set(username=f"{self.prefix}{role}_login").render_as_string(hide_password=False)

    def store(self, role: str) -> JobStore:
        if role not in self._stores:
            self._stores[role] = JobStore(self.log_in(role))
        return self._stores[role]

    def run(self, role: str, sql: str) -> Any:
        engine = create_engine(self.log_in(role), poolclass=NullPool)
        with engine.begin() as connection:
            result = connection.execute(text(sql))
            return result.all() if result.returns_rows else result.rowcount

    def close(self) -> None:
        for store in self._stores.values():
            store.close()


@pytest.fixture
def database(postgres_admin: Engine, empty_url: str, request: pytest.FixtureRequest) -> Iterator[Database]:
    # Roles belong to the server, which other tests may share.
    made = Database(empty_url, f"r{make_url(empty_url).database}_")
    schema.upgrade(empty_url)
    made.apply(BLOCKS[0])
    for role in ROLES:
        with made.engine.begin() as connection:
            connection.exec_driver_sql(f"CREATE ROLE {made.prefix}{role}_login LOGIN IN ROLE {made.prefix}{role}")
    yield made
    made.close()
    with made.engine.begin() as connection:
        for role in ROLES:
            connection.exec_driver_sql(f"DROP OWNED BY {made.prefix}{role}, {made.prefix}{role}_login")
            connection.exec_driver_sql(f"DROP ROLE {made.prefix}{role}_login")
        for role in reversed(ROLES):
            connection.exec_driver_sql(f"DROP ROLE {made.prefix}{role}")
    made.engine.dispose()


pytestmark = pytest.mark.parametrize("empty_url", ["postgresql"], indirect=True)


def _finished(store: JobStore) -> MlJob:
    job = store.submit("train", "old")
    store.complete(store.claim_one(job, worker="w"), {"f1": 0.5})
    return job


def _look(store: JobStore, job: MlJob) -> None:
    assert store.get(job).id == job.id
    assert store.find(target=job.target_name)[0].id == job.id
    assert store.history(job.target_name)
    assert store.lineage(job)
    assert store.counts(exact=True)
    assert store.counts()


def _work(store: JobStore) -> None:
    for end in (store.complete, lambda claim: store.fail(claim, "no"), store.requeue):
        (claim,) = store.claim(worker="w")
        assert store.renew([claim]).held
        store.set_progress(claim, 50)
        end(claim)
    (claim,) = store.claim(worker="w")
    store.release([claim])


def test_a_reader_looks_and_verifies_and_writes_nothing(database: Database) -> None:
    job = _finished(database.owner)
    waiting = database.owner.submit("train", "new")
    reader = database.store("reader")
    _look(reader, job)
    assert reader.wait(job, timeout=5).status is MlJobStatus.COMPLETED
    assert database.run("reader", "SELECT count(*) FROM ml_jobs_overview") == [(2,)]
    schema.verify(database.log_in("reader"))
    assert schema.current(database.log_in("reader")) == schema.head()
    forbidden: list[Callable[[], object]] = [
        lambda: reader.submit("train", "mine"),
        lambda: reader.submit_many([("train", "mine", {})]),
        lambda: reader.retry(job, again=True),
        lambda: reader.cancel(waiting),
        lambda: reader.claim(worker="w"),
        lambda: reader.claim_one(waiting, worker="w"),
        reader.rescue,
        lambda: reader.prune(older_than=timedelta(0)),
    ]
    _all_refused(forbidden)
    assert database.owner.get(waiting).status is MlJobStatus.QUEUED


def test_a_submitter_submits_and_cancels_and_claims_nothing(database: Database) -> None:
    submitter = database.store("submitter")
    job = submitter.submit("train", "mine", {"lr": 0.1}, priority=5)
    assert submitter.submit("train", "mine", unless_active=True).id == job.id
    assert submitter.submit_many([("train", "many", {})] * 3) == 3
    _look(submitter, job)
    assert submitter.cancel(job)
    assert submitter.retry(job).retry_of == job.id
    (waiting,) = submitter.find(target="mine", status="queued")
    _all_refused(
        [
            lambda: submitter.claim(worker="w"),
            lambda: submitter.claim_one(waiting, worker="w"),
            submitter.rescue,
            lambda: submitter.prune(older_than=timedelta(0)),
            lambda: database.run("submitter", "UPDATE ml_jobs SET status = 'running', started_at = now()"),
            lambda: database.run("submitter", "UPDATE ml_jobs SET spec_json = '{}'"),
            lambda: database.run("submitter", "UPDATE ml_jobs SET priority = 1"),
        ]
    )


def test_a_submitter_that_writes_sql_can_end_a_live_job_but_not_make_it_look_done(database: Database) -> None:
    job = database.store("submitter").submit("train", "mine")
    database.run("submitter", "UPDATE ml_jobs SET status = 'running'")
    database.run("submitter", "UPDATE ml_jobs SET status = 'completed', finished_at = now()")
    ended = database.owner.get(job.id)
    assert (ended.status, ended.started_at, ended.progress, ended.metrics) == (MlJobStatus.COMPLETED, None, 0, None)
    with pytest.raises(TerminalStateError):
        database.run("submitter", "UPDATE ml_jobs SET status = 'failed'")


def test_a_worker_claims_finishes_retries_and_rescues(database: Database) -> None:
    database.owner.submit_many([("train", "work", {})] * 5)
    worker = database.store("worker")
    _work(worker)
    job = _finished(worker)
    assert worker.retry(job, again=True).retry_of == job.id
    (claim,) = worker.claim(worker="silent")
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE ml_job_leases SET expires_at = now() - interval '1 second'")
    assert worker.rescue().requeued == [claim.job_id]
    with worker.running(claim.job_id) as run:
        run.metrics = {"f1": 1}
    assert worker.get(claim.job_id).status is MlJobStatus.COMPLETED
    _all_refused(
        [
            lambda: worker.prune(older_than=timedelta(0)),
            lambda: database.run("worker", "UPDATE ml_jobs SET spec_json = '{}'"),
            lambda: database.run("worker", "UPDATE ml_jobs SET target_name = 'x'"),
            lambda: database.run("worker", "DELETE FROM ml_jobs"),
            lambda: database.run("worker", "SELECT setval('ml_job_leases_token_seq', 1)"),
            lambda: database.run("worker", "INSERT INTO ml_job_leases (token) OVERRIDING SYSTEM VALUE VALUES (1)"),
            lambda: database.run("worker", "UPDATE ml_job_leases SET worker = 'me', token = DEFAULT"),
        ]
    )


def test_a_janitor_deletes_by_prune_and_not_by_delete(database: Database) -> None:
    job = _finished(database.owner)
    janitor = database.store("janitor")
    with pytest.raises(TerminalStateError):
        database.run("janitor", "DELETE FROM ml_jobs")
    assert janitor.prune(older_than=timedelta(0)) == 1
    assert not database.owner.find(target=job.target_name)
    waiting = database.owner.submit("train", "new")
    _all_refused(
        [lambda: janitor.submit("train", "x"), lambda: janitor.cancel(waiting), lambda: janitor.claim(worker="w")]
    )


@pytest.mark.parametrize("role", ROLES)
def test_no_role_gets_past_the_guard(database: Database, role: str) -> None:
    job = _finished(database.owner)
    outside: list[str] = [
        "TRUNCATE ml_jobs CASCADE",
        "TRUNCATE ml_job_leases",
        "ALTER TABLE ml_jobs DISABLE TRIGGER ALL",
        "ALTER TABLE ml_jobs DISABLE TRIGGER ml_jobs_guard_update",
        "DROP TRIGGER ml_jobs_guard_update ON ml_jobs",
        "CREATE TRIGGER mine BEFORE UPDATE ON ml_jobs FOR EACH ROW EXECUTE FUNCTION ml_jobs_wake()",
        "CREATE OR REPLACE FUNCTION ml_jobs_guard() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "ALTER FUNCTION ml_jobs_guard() OWNER TO CURRENT_USER",
        "CREATE RULE mine AS ON UPDATE TO ml_jobs DO INSTEAD NOTHING",
        "ALTER TABLE ml_jobs ADD COLUMN mine integer",
        "DROP TABLE ml_jobs CASCADE",
        "DROP VIEW ml_jobs_overview",
        "CREATE TABLE mine (id integer)",
        "CREATE FUNCTION mine() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        "SET session_replication_role = replica",
        "UPDATE mljobs_alembic_version SET version_num = 'x'",
        "ALTER SEQUENCE ml_job_leases_token_seq RESTART",
        "SELECT nextval('ml_job_leases_token_seq')",
    ]
    _all_refused([lambda sql=sql: database.run(role, sql) for sql in outside], also="must be owner|must be able")
    if role != "janitor":
        retention = "SET LOCAL mljobs.retention = 'on'"
        engine = create_engine(database.log_in(role), poolclass=NullPool)
        with pytest.raises(DBAPIError, match="permission denied"), engine.begin() as connection:
            connection.execute(text(retention))
            connection.execute(text("DELETE FROM ml_jobs"))
    if role in ("submitter", "worker"):
        with pytest.raises(TerminalStateError):
            database.run(role, "UPDATE ml_jobs SET status = 'queued'")
    assert database.owner.get(job).status is MlJobStatus.COMPLETED


def _all_refused(attempts: list[Callable[[], object]], also: str = "must be owner") -> None:
    for number, attempt in enumerate(attempts):
        with pytest.raises(DBAPIError) as caught:
            attempt()
        assert re.search(f"permission denied|{also}", str(caught.value)), (number, caught.value)


def test_a_reader_that_waits_is_woken_by_what_a_worker_does(database: Database) -> None:
    job = database.store("submitter").submit("train", "spam")
    reader, worker = database.store("reader"), database.store("worker")
    found: list[MlJob] = []
    waiting = threading.Thread(target=lambda: found.append(reader.wait(job, timeout=60, poll=3600)))
    claim = worker.claim_one(job, worker="w")
    waiting.start()
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        listening = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'")
        while not connection.scalar(listening):
            assert waiting.is_alive()
    worker.complete(claim)
    waiting.join(60)
    assert [done.status for done in found] == [MlJobStatus.COMPLETED]


def test_row_security_holds_a_submitter_to_queued_and_cancelled(database: Database) -> None:
    database.apply(BLOCKS[1])
    submitter, worker = database.store("submitter"), database.store("worker")
    job = submitter.submit("train", "mine")
    assert submitter.submit_many([("train", "many", {"at": at}) for at in range(5)]) == 5
    claim = worker.claim_one(job, worker="w")
    for status in ("completed", "failed", "queued", "running"):
        with pytest.raises(DBAPIError, match="row-level security"):
            database.run("submitter", f"UPDATE ml_jobs SET status = '{status}' WHERE status = 'running'")
    with pytest.raises(DBAPIError, match="row-level security"):
        database.run("submitter", "UPDATE ml_jobs SET lease = NULL WHERE status = 'running'")
    for status in ("running", "completed"):
        with pytest.raises(DBAPIError, match="row-level security"):
            submitter.submit("train", "forged", status=status)
    assert submitter.cancel(job)
    with pytest.raises(TerminalStateError):
        worker.complete(claim)
    _work(worker)
    assert database.run("reader", "SELECT count(*) FROM ml_jobs_overview") == [(6,)]
    schema.verify(database.url)


def test_the_view_shows_no_more_than_row_security_lets_its_reader_see(database: Database) -> None:
    database.owner.submit_many([("train", "ours", {}), ("train", "theirs", {})])
    with database.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE ml_jobs ENABLE ROW LEVEL SECURITY")
        connection.exec_driver_sql("CREATE POLICY tenant ON ml_jobs USING (target_name = 'ours')")
    assert database.run("reader", "SELECT target_name FROM ml_jobs_overview") == [("ours",)]
