"""Failures of other systems that have no better place; ``docs/scenarios.md`` says where each of them is tested."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from mljobs import MlJob, MlJobStatus
from mljobs.jobs import _claiming as claiming
from mljobs.jobs import _picking as picking
from mljobs.jobs import _pruning, _statements
from mljobs.jobs._statements import moments
from tests.backends import Backend
from tests.leases import expire_leases

ROOT = Path(__file__).parent.parent


def test_a_retry_that_collides_leaves_the_first_job_in_its_final_state(backend: Backend, store: Any) -> None:
    with backend.outside.begin() as connection:
        connection.exec_driver_sql(
            "CREATE UNIQUE INDEX host_one_queued ON ml_jobs (target_name) WHERE status = 'queued'"
        )
    first = store.submit("train", "spam")
    (claim,) = store.claim(worker="w")
    store.fail(claim, "boom")
    store.submit("train", "spam")
    with pytest.raises(IntegrityError):
        store.retry(first.id)
    assert store.get(first.id).status is MlJobStatus.FAILED


def test_a_lost_exclusive_job_does_not_block_its_own_rescue(backend: Backend, store: Any) -> None:
    job = store.submit("train", "spam", exclusive=True)
    (late,) = store.claim(worker="lost")
    expire_leases(backend.outside)
    assert store.rescue().requeued == [job.id]
    (claim,) = store.claim(worker="next")
    assert claim.token > late.token
    store.complete(claim)


def test_rescuing_a_kind_that_one_does_not_handle_only_requeues_it(backend: Backend, store: Any) -> None:
    job = store.submit("drift_compute", "spam")
    store.claim(worker="other", kinds=["drift_compute"])
    expire_leases(backend.outside)
    assert store.claim(worker="trainer", kinds=["train"]) == []
    assert store.rescue().requeued == [job.id]
    assert store.claim(worker="trainer", kinds=["train"]) == []
    assert store.get(job.id).status is MlJobStatus.QUEUED


def test_a_clock_that_jumps_does_not_lose_a_lease(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On SQLite the process's clock is the only one there is; on PostgreSQL the database's decides."""
    from mljobs import JobStore

    with JobStore(postgres_url) as store:
        store.submit("train", "spam")
        (claim,) = store.claim(worker="w", lease=60)
        tomorrow = datetime.now(UTC) + timedelta(days=1)
        monkeypatch.setattr(_pruning, "utc_now", lambda: tomorrow)
        nanoseconds = int(tomorrow.timestamp() * 1000) * 1_000_000
        monkeypatch.setattr(_statements, "time", SimpleNamespace(time_ns=lambda: nanoseconds))
        assert not store.rescue()
        (held,) = store.renew([claim], lease=60).held
        assert held.expires_at < tomorrow
        store.complete(claim)
        finished = store.get(claim.job_id).finished_at
        assert finished is not None
        assert finished < tomorrow


def _plan(backend: Backend, connection: Any, statement: Any, parameters: dict[str, Any]) -> str:

    compiled = statement._text(connection.dialect, {})
    explain = "EXPLAIN " if backend.dialect == "postgresql" else "EXPLAIN QUERY PLAN "
    values = compiled.parameters(parameters)
    rows = connection.exec_driver_sql(explain + compiled.text, tuple(values) if compiled.positional else values)
    return "\n".join(str(row) for row in rows)


def test_claiming_reads_the_partial_index_of_the_queue(backend: Backend) -> None:
    if backend.is_async:  # the plan is the database's, whatever the driver
        assert backend.name
        return
    parameters = {**moments(60), "worker": "w", "limit": 10}
    with backend.outside.begin() as connection:
        if backend.dialect == "postgresql":
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            connection.exec_driver_sql("SET LOCAL enable_bitmapscan = off")
            plan = _plan(backend, connection, claiming._claim_statement(MlJob, "any", 10), parameters)
            assert "Seq Scan on ml_jobs" not in plan
        else:
            plan = _plan(backend, connection, picking.pick_statement(MlJob, "any", 10), parameters)
            assert "USE TEMP B-TREE" not in plan  # in the index's own order
    assert "ix_ml_jobs_queue" in plan


def test_every_scenario_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "scenarios.md").read_text()
    source = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    lines = re.findall(r"^\| (\d+) \| .+? \| (.+?) \|$", page, re.MULTILINE)
    assert [int(number) for number, _ in lines] == list(range(1, 26))
    for number, named in lines:
        for name in re.findall(r"`(test_\w+)`", named):
            assert f"def {name}(" in source, f"{number}: {name}"
