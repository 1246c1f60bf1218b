"""One bad row in the tables beside the record stops nobody: it cannot be written, or it is read around."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from mljobs import JobStore, MlJob, jobs
from mljobs.jobs import WorkerState

LEASES, WORKERS = MlJob.__leases__, MlJob.__workers__
NEVER = {
    "postgresql": ["'infinity'", "'-infinity'", "'0044-03-15 BC'", "'20000-01-01 UTC'"],
    "sqlite": ["'abc'", "-1", "9223372036854775807", "9e999", "x'00'", "1.5"],
}


@pytest.mark.parametrize("table", [LEASES, WORKERS], ids=["lease", "worker"])
def test_a_time_that_nobody_can_read_is_refused_in_the_tables_beside_the_record(url: str, table: sa.Table) -> None:
    with JobStore(url) as store:
        if table is LEASES:
            store.submit("train", "t")
            store.claim(worker="w")
            times = ("acquired_at", "expires_at")
        else:
            with store.engine.begin() as connection:
                connection.exec_driver_sql(_worker_row(url, "running", "[]"))
            times = ("started_at", "last_seen_at")
        dialect = store.engine.dialect.name
        for column in times:
            for value in NEVER[dialect]:
                with pytest.raises(sa.exc.IntegrityError), store.engine.begin() as connection:
                    connection.exec_driver_sql(f"UPDATE {table.name} SET {column} = {value}")
        assert not store.rescue().errors
        assert len(store.workers(gone=True)) == (table is WORKERS)


def _worker_row(url: str, state: str, kinds: str) -> str:
    now = "now(), now()" if url.startswith("postgresql") else "1, 1"
    return f"INSERT INTO ml_job_workers VALUES ('{state}', 'h', 1, '{kinds}', 1, '1', '{state}', {now})"


def test_a_workers_row_that_somebody_else_wrote_hides_no_other(url: str) -> None:
    with JobStore(url) as store:
        with store.engine.begin() as connection:
            for state, kinds in (("running", "nonsense"), ("bogus", '["train"]'), ("stopping", '{"a": 1}')):
                connection.exec_driver_sql(_worker_row(url, state, kinds))
        found = {worker.name: worker for worker in store.workers(gone=True)}
        assert {name: worker.kinds for name, worker in found.items()} == {
            "running": (),
            "bogus": ("train",),
            "stopping": (),
        }
        assert found["bogus"].state is WorkerState.GONE
        with store.engine.connect() as connection:
            assert len(jobs.workers(connection, gone=True)) == 3


@pytest.mark.parametrize("number", ["0." + "0" * 20000 + "1", "1" * 140_000], ids=["small", "large"])
def test_a_number_that_numeric_cannot_hold_ends_no_query(url: str, number: str) -> None:
    with JobStore(url) as store:
        bad, good = store.submit("train", "bad"), store.submit("train", "good")
        for claim in store.claim(worker="w", limit=2):
            store.complete(claim, f'{{"f1": {number}}}' if claim.job_id == bad.id else {"f1": 0.9})
        found = {job.id for job in store.find("metrics.f1>0.5 metrics.f1<1")}
        assert good.id in found
        assert found <= {good.id, bad.id}
