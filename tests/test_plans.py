"""How PostgreSQL plans the statements of leases: the same way with a generic and a custom plan, before ANALYZE and after."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from mljobs import JobStore, MlJob, jobs
from mljobs.jobs import _exchanging, _fencing, _finishing, _holding, _rescuing
from mljobs.jobs._claims import Claim
from tests.sql_text import compiled

_FINISHED, _CLAIMED, _QUEUED = 2000, 100, 100


def _filled(url: str, *, analyzed: bool, claimed: int = _CLAIMED) -> list[Claim]:
    with JobStore(url) as store:
        done = [MlJob(kind="train", target_name=f"t{at}", status="failed") for at in range(_FINISHED)]
        store.submit_many(done)
        store.submit_many([("train", f"t{at}", {}) for at in range(claimed + _QUEUED)])
        claims = store.claim(worker="w", limit=claimed)
    if analyzed:
        engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")
    return claims


def _plan(url: str, statement: Any, parameters: dict[str, Any], mode: str) -> dict[str, Any]:
    """Return the plan of a prepared statement."""
    one = compiled(statement, "PostgreSQL")
    values = one.parameters(parameters)
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"SET plan_cache_mode = force_{mode}_plan")
        connection.execute(f"PREPARE asked AS {one.numbered}".encode())
        literals = [psycopg.sql.Literal(values[name]) for name in one.names]
        execute = psycopg.sql.SQL("EXPLAIN (FORMAT JSON) EXECUTE asked ({})").format(
            psycopg.sql.SQL(", ").join(literals)
        )
        found = connection.execute(execute).fetchone()
    assert found is not None
    plan: dict[str, Any] = found[0][0]["Plan"]
    return plan


def _nodes(plan: dict[str, Any], parents: tuple[str, ...] = ()) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    yield plan, parents
    for child in plan.get("Plans", ()):
        yield from _nodes(child, (*parents, plan["Node Type"]))


def _scans_of_jobs(plan: dict[str, Any], alias: str) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    return [
        (node, parents)
        for node, parents in _nodes(plan)
        if node.get("Relation Name") == "ml_jobs" and node.get("Alias") == alias and "Scan" in node["Node Type"]
    ]


@pytest.mark.parametrize("analyzed", [False, True], ids=["before ANALYZE", "after"])
def test_a_write_under_leases_finds_its_records_one_by_one_by_their_ids(postgres_url: str, analyzed: bool) -> None:  # noqa: FBT001
    """In a nested loop over the claims, which come in the order of the ids: so records are locked in that order."""
    claims = sorted(_filled(postgres_url, analyzed=analyzed), key=lambda claim: claim.job_id.int)
    outcomes = [jobs.Outcome.completed(claim, {}) for claim in claims]
    finish = _finishing.outcome_parameters("postgresql", outcomes)
    report = _fencing.wanted_parameters("postgresql", claims, progress=[5] * len(claims), metrics=[None] * len(claims))
    asked: list[tuple[Any, dict[str, Any], str]] = [
        (_finishing._FINISH.statement(MlJob), finish, "j"),
        (_holding._REPORT.statement(MlJob), finish | report, "j"),
        (_exchanging._statement(MlJob, "any", 10), {**finish, "worker": "w", "lease": timedelta(seconds=60)}, "j_1"),
    ]
    for statement, parameters, alias in asked:
        for mode in ("custom", "generic"):
            plan = _plan(postgres_url, statement, parameters, mode)
            scans = [
                (node, parents)
                for node, parents in _scans_of_jobs(plan, alias)
                if node.get("Index Name") == "ml_jobs_pkey" and parents[-1] == "Nested Loop"
            ]
            assert len(scans) == 1, plan
            assert scans[0][0]["Index Cond"].replace(f"{alias}.", "") == "(id = wanted.id)"


@pytest.mark.parametrize("analyzed", [False, True], ids=["before ANALYZE", "after"])
def test_no_statement_of_leases_reads_the_whole_job_table(postgres_url: str, analyzed: bool) -> None:  # noqa: FBT001
    claims = _filled(postgres_url, analyzed=analyzed)
    held = {**_fencing.wanted_parameters("postgresql", claims), **_fencing.lease_parameters("postgresql", claims)}
    outcomes = [jobs.Outcome.requeued(claim) for claim in claims]
    asked: list[tuple[Any, dict[str, Any]]] = [
        (_holding._renewal_statement(MlJob, True), {**held, "lease": timedelta(seconds=60)}),
        (_rescuing._expired_jobs(MlJob), {"limit": 1000}),
        (_rescuing._forgotten(MlJob), {"limit": 1000}),
        (_rescuing._FINISH_ORPHANED.statement(MlJob), _finishing.outcome_parameters("postgresql", outcomes)),
    ]
    for statement, parameters in asked:
        for mode in ("custom", "generic"):
            for node, _ in _nodes(_plan(postgres_url, statement, parameters, mode)):
                if node.get("Relation Name") == "ml_jobs":
                    assert node["Node Type"] != "Seq Scan", node


@pytest.mark.parametrize("analyzed", [False, True], ids=["before ANALYZE", "after"])
def test_jobs_whose_lease_was_deleted_are_found_by_the_index_of_leases(postgres_url: str, analyzed: bool) -> None:  # noqa: FBT001
    _filled(postgres_url, analyzed=analyzed, claimed=20)
    for mode in ("custom", "generic"):
        plan = _plan(postgres_url, _rescuing._orphaned_jobs(MlJob), {"limit": 1000}, mode)
        ((node, _),) = _scans_of_jobs(plan, "j")
        assert node.get("Index Name") == "ix_ml_jobs_lease" or "Bitmap" in node["Node Type"], plan
