"""``mljobs.testing``: what its page shows runs as it stands there, and the functions keep what they promise."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, make_url
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from mljobs import GiveUp, JobStore, MlJob, MlJobStatus, Run, TerminalStateError, Worker, jobs
from mljobs.jobs import table_of
from mljobs.testing import advance, copy_of, empty, make_job, rolled_back, run_jobs
from tests.fork_server import ForkServer

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "testing.md").read_text()
FILES = {
    name: text
    for name, text in re.findall(r'```python title="([^"]+)"\n(.*?)```', PAGE, re.DOTALL)
    if not name.startswith("examples/")
}


# ------------------------------------------------------------------------------------------------------------ the page


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The application of the page, in a directory of its own."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    return tmp_path


@pytest.mark.parametrize(
    "options", [[], ["-p", "xdist.plugin", "-n", "2", "postgres", "test_plain.py"]], ids=["one", "xdist"]
)
def test_the_tests_of_the_page_pass(
    project: Path, python: ForkServer, empty_postgres_databases: object, postgres_url: str, options: list[str]
) -> None:
    template = make_url(postgres_url).set(database="template1").render_as_string(hide_password=False)
    done = python.run(
        *["-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
        cwd=project,
        env={
            "TEST_DATABASE_URL": template,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # they need none, and some take seconds to import
            "PYTHONPATH": f"{project}:{ROOT}",
            "PATH": str(Path(sys.executable).parent),
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^{5 if 'postgres' in options else 11} passed", done.stdout, re.MULTILINE), done.stdout


# ------------------------------------------------------------------------------------------------------- the functions


def _worker(store: JobStore) -> Worker:
    worker = Worker(store)

    @worker.handles("train", retries=1, backoff=0)
    def train(run: Run) -> dict[str, int]:
        run.progress(40)
        run.report(seen=1)
        if run.spec == "cancel":
            store.cancel(run.job.id)
        if run.spec == "fail":
            raise ValueError("as it was asked to")
        if run.spec == "give up":
            raise GiveUp("no")
        return {"f1": 1}

    @worker.handles("backfill")
    async def backfill(run: Run) -> None:
        assert run.attempt == 1

    return worker


@pytest.fixture(params=["of its own", "of the caller's transaction"])
def tested(request: pytest.FixtureRequest, engine: Engine) -> Iterator[JobStore]:
    """A store as a test of a host has it."""
    if request.param == "of its own":
        with JobStore(engine) as store:
            yield store
    else:
        with rolled_back(engine) as connection:
            yield JobStore(connection)


def test_what_is_queued_is_run_as_a_worker_would_run_it(tested: JobStore) -> None:
    for spec in ("well", "fail", "give up", "cancel"):
        tested.submit("train", spec, spec)
    tested.submit("backfill", "table")
    tested.submit("drift_compute", "nobody handles it")
    assert run_jobs(tested, _worker(tested)) == {"completed": 2, "failed": 3, "cancelled": 1}
    failed = list(tested.find(status="failed", target="fail"))
    assert [(job.metrics, job.progress) for job in failed] == [({"seen": 1}, 40)] * 2
    assert failed[0].retry_of == failed[1].id
    assert [job.metrics for job in tested.find(status="completed", kind="train")] == [{"seen": 1, "f1": 1}]
    assert len(tested.claim(worker="w", limit=9)) == 1  # of the kind without a handler
    assert tested.holders() != []


def test_no_more_are_run_than_was_said(tested: JobStore) -> None:
    tested.submit_many([("train", "t", None)] * 3)
    assert run_jobs(tested, _worker(tested), most=2) == {"completed": 2}
    assert run_jobs(tested, _worker(tested)) == {"completed": 1}


def test_what_was_rolled_back_has_not_happened(engine: Engine) -> None:
    with rolled_back(engine) as connection:
        store = JobStore(connection)
        job = store.submit("train", "spam")
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            jobs.submit(session, "train", "eggs")
            session.commit()
            jobs.submit(session, "train", "not this one")
            session.rollback()
        assert store.counts().total() == 2
        store.cancel(job)
        with pytest.raises(TerminalStateError):
            store.claim_one(job, worker="w")
    with JobStore(engine) as store:
        assert store.counts().total() == 0


def test_what_is_emptied_in_a_test_is_there_again_afterwards(engine: Engine) -> None:
    with JobStore(engine) as store:
        store.submit_many([make_job("completed")])
        with rolled_back(engine) as connection:
            empty(connection)
            assert JobStore(connection).counts(exact=True).total() == 0
        assert store.counts(exact=True).total() == 1


@pytest.mark.alone
def test_a_copy_is_as_its_template_and_gone_afterwards(url: str) -> None:
    with JobStore(url) as store:
        store.submit("train", "spam")
    with copy_of(url) as copy, JobStore(copy) as store:
        store.cancel(next(iter(store.find())))
        path = make_url(copy).database
    with JobStore(url) as store:
        assert next(iter(store.find())).status is MlJobStatus.QUEUED
        if store.engine.dialect.name == "postgresql":
            with store.engine.connect() as connection:
                names = connection.exec_driver_sql("SELECT datname FROM pg_database").scalars().all()
            assert path not in names
        else:
            assert not Path(str(path)).exists()


def test_jobs_are_made_in_every_state_with_the_times_that_belong_to_it(engine: Engine) -> None:
    with Session(engine) as session:
        for state in MlJobStatus:
            session.add(make_job(state))
        session.add(make_job("cancelled", started_at=None, attempts=0))
        session.commit()
    with JobStore(engine) as store:
        for job in store.find():
            assert (job.started_at is not None) == (job.status is not MlJobStatus.QUEUED and job.attempts == 1)
            assert (job.finished_at is not None) == job.is_terminal
            assert job.duration_ms == (60_000 if job.is_terminal and job.started_at else None)
        assert not store.rescue(max_attempts=1).requeued  # the running one was started by hand
        with pytest.raises(TerminalStateError):
            store.claim_one(next(iter(store.find(status="completed"))), worker="w")


def test_all_jobs_are_deleted_with_their_leases_and_retention_is_off_again(engine: Engine) -> None:
    with JobStore(engine) as store:
        store.submit_many([make_job("completed"), make_job()])
        _worker(store).run(until_idle=True)
        store.claim_one(store.submit("drift_compute", "held"), worker="w")
        assert store.workers(gone=True)
        empty(engine)
        assert (store.counts(exact=True).total(), store.holders(), store.workers(gone=True)) == (0, [], [])
        store.submit_many([make_job("completed")])
        with pytest.raises((TerminalStateError, IntegrityError)), engine.begin() as connection:
            connection.execute(table_of(MlJob).delete())


def test_what_lies_ahead_is_brought_nearer(tested: JobStore) -> None:
    tested.submit("train", "later", run_after=timedelta(hours=1))
    held = tested.submit("train", "held")
    tested.claim_one(held, worker="w", lease=600)
    assert run_jobs(tested, _worker(tested)) == {}
    advance(tested, minutes=59)
    assert run_jobs(tested, _worker(tested)) == {}
    assert tested.rescue(max_attempts=5).requeued == [held.id]
    advance(tested, minutes=2)
    assert run_jobs(tested, _worker(tested)) == {"completed": 2}


def test_the_functions_need_no_pytest(python: ForkServer, tmp_path: Path) -> None:
    code = "import sys; sys.modules['pytest'] = None; from mljobs.testing import make_job, run_jobs, copy_of, empty"
    done = python.run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
