"""Which index serves each documented filter, on both databases: the statements that ``find`` sends, explained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.pool import NullPool

from mljobs import jobs, metadata
from mljobs.jobs import _paging

DOCS = Path(__file__).parent.parent / "docs"
_ROWS = 12_000
_ID = "0199f3c2000070008000000000000007"
_FILL = """
INSERT INTO ml_jobs (id, kind, target_name, status, progress, created_at, started_at, finished_at, error_message, spec_json,
                     attempts, priority, exclusive, worker)
SELECT {id}, CASE WHEN i % 1000 = 7 THEN 'drift_compute' WHEN i % 2 = 0 THEN 'train' ELSE 'backfill' END,
  'target_' || (i % 40), CASE WHEN i % 30 = 0 THEN 'failed' WHEN i % 97 = 0 THEN 'cancelled' ELSE 'completed' END, 100,
  {at}, {at}, {at}, CASE WHEN i % 30 = 0 THEN 'ValueError: row ' || i || ' is NaN' END, '{{"lr": 0.5}}', 1, 0, {false}, 'w1'
FROM {numbers}"""
_PLACES = {
    "postgresql": {
        "id": "('0199f3c2000070008' || lpad(to_hex(i), 15, '0'))::uuid",
        "at": "now() - ({rows} - i) * interval '1 minute'",
        "false": "false",
        "numbers": "generate_series(0, {rows} - 1) AS i",
    },
    "sqlite": {
        "id": "printf('0199f3c2000070008%015x', i)",
        "at": "CAST(strftime('%s') AS INTEGER) * 1000 - ({rows} - i) * 60000",
        "false": "0",
        "numbers": "(WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {rows} - 1) SELECT i FROM n)",
    },
}

_LOCALE = """SELECT collcollate FROM pg_collation
WHERE collprovider = 'c' AND collcollate NOT IN ('C', 'POSIX') AND collencoding IN (-1, pg_char_to_encoding('UTF8'))
LIMIT 1"""

IN_ORDER = {
    "": "created",
    "created:<2h": "created",
    "status:failed": "failed",
    "status:cancelled": "failed",
    "kind:train status:completed": "finished_kind",
    "target:target_7": "target",
    "target:target_7 kind:train": "target",
    "target:target_7 status:failed": "failed_target",
    "target:target_7 status:failed error:nowhere": "failed_target",
    "status:failed error:nowhere": "failed",
    "error:nowhere": "created",
    "worker:nobody": "created",
}
"""What an index serves in the order of creation, so that nothing is sorted."""
MERGED = {
    "kind:drift_compute": "finished_kind",
    "kind:train": "finished_kind",
    "kind:drift_compute created:<2d": "finished_kind",
    "kind:train,drift_compute": "finished_kind",
    "status:failed,cancelled": "failed",
    "target:target_7,target_8": "target",
    "target:target_7,target_8 status:failed,cancelled": "failed_target",
}
"""Alternatives that are each served so, and merged."""
FEW = {
    "target:target_7*": "target",
    "finished:<2h": "finished",
    "finished:<2h status:failed": "finished",
    "status:running": "active",
    "kind:drift_compute spec.lr>1": "finished_kind",
    "status:failed,cancelled error:nowhere": "failed(_target)?",
    "kind:drift_compute status:failed": "finished_kind",
    f"retry_of:{_ID}": "retries",
    f"id:{_ID[:31]}": "pkey",
}
"""What an index serves in another order: few jobs pass, and are sorted."""
BY_END = {
    "": "finished",
    "finished:<2h": "finished",
    "spec.lr>1": "finished",
    "target:target_7": "target",
    "kind:drift_compute": "finished_kind",
    "target:target_7 status:failed": "failed_target",
}
LOOKED_AT = {
    ("target:target_7*", "newest"): "created",
    ("finished:<2d status:failed", "newest"): "failed",
    ("kind:train status:failed", "newest"): "failed",
    ("kind:train spec.lr>1", "newest"): "created",
    ("status:failed worker:nobody", "last_finished"): "finished",
    ("target:target_7 status:completed", "last_finished"): "finished",
}
"""Where many pass, whose index gives the jobs that are looked at."""


def _filled(engine: Engine) -> Engine:
    metadata.create_all(engine)
    dialect = engine.dialect.name
    parts = {name: part.format(rows=_ROWS) for name, part in _PLACES[dialect].items()}
    with engine.connect().execution_options(no_parameters=True) as connection:
        if dialect == "postgresql":  # finished at once, which the guard lets nobody do by the thousand for nothing
            connection.exec_driver_sql("SET session_replication_role = replica")
        connection.exec_driver_sql(_FILL.format(**parts))
        connection.commit()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE" if dialect == "postgresql" else "ANALYZE"))
    return engine


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if request.param == "sqlite":
        yield _filled(create_engine(f"sqlite:///{tmp_path_factory.mktemp('plans') / 'jobs.db'}", poolclass=NullPool))
        return
    admin: Engine = request.getfixturevalue("postgres_admin")
    with admin.connect() as connection:
        connection.execute(text("DROP DATABASE IF EXISTS mljobs_filter_plans"))
        # With a collation under which only the index's own operators know where a beginning stands.
        locale = connection.scalar(text(_LOCALE))
        options = f"TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE '{locale}' LC_CTYPE '{locale}'" if locale else ""
        connection.execute(text(f"CREATE DATABASE mljobs_filter_plans {options}"))
    yield _filled(create_engine(admin.url.set(database="mljobs_filter_plans"), poolclass=NullPool))
    with admin.connect() as connection:
        connection.execute(text("DROP DATABASE mljobs_filter_plans WITH (FORCE)"))


def _plans(connection: Connection, filter_: str, order: Any = "newest", *, scan: bool = False) -> list[str]:
    """Return the plan of each statement that a page of jobs takes."""
    asked: list[tuple[str, Any]] = []

    def keep(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    event.listen(connection, "before_cursor_execute", keep)
    jobs.find(connection, filter_, order=order, limit=20, scan=scan)
    event.remove(connection, "before_cursor_execute", keep)
    explain = "EXPLAIN " if connection.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
    return [
        "\n".join(str(row[-1]) for row in connection.exec_driver_sql(explain + statement, parameters))
        for statement, parameters in asked
    ]


def _check(plans: list[str], index: str, filter_: str) -> None:
    name = "ml_jobs_pkey|sqlite_autoindex_ml_jobs_1" if index == "pkey" else f"ix_ml_jobs_{index}"
    assert not any(re.search(r"Seq Scan on ml_jobs|SCAN ml_jobs$", plan, re.MULTILINE) for plan in plans), (
        filter_,
        plans,
    )
    assert re.search(rf"\b({name})\b", "\n".join(plans)), (filter_, plans)


def test_an_index_serves_a_filter_in_the_order_of_creation(filled: Engine) -> None:
    with filled.connect() as connection:
        if connection.dialect.name == "postgresql":  # it would rather sort a dozen rows, or read a table so small
            connection.exec_driver_sql("SET enable_bitmapscan = off")
            connection.exec_driver_sql("SET enable_seqscan = off")
        for filter_, index in IN_ORDER.items():
            plans = _plans(connection, filter_)
            _check(plans, index, filter_)
            assert not any(re.search("Sort|TEMP B-TREE", plan) for plan in plans), (filter_, plans)
        for filter_, index in MERGED.items():
            _check(_plans(connection, filter_), index, filter_)


def test_an_index_finds_few_jobs_in_another_order(filled: Engine) -> None:
    with filled.connect() as connection:
        for filter_, index in FEW.items():
            plans = _plans(connection, filter_)
            _check(plans, index, filter_)
            if connection.dialect.name == "sqlite" and index != "active":  # which holds nothing else
                assert "SEARCH ml_jobs USING" in plans[0], (filter_, plans)


def test_an_index_serves_a_filter_in_the_order_of_end(filled: Engine) -> None:
    with filled.connect() as connection:
        for filter_, index in BY_END.items():
            _check(_plans(connection, filter_, "last_finished"), index, filter_)


def test_where_many_pass_jobs_are_looked_at_in_the_order_that_is_wanted(
    filled: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_paging, "_FEW", 5)
    with filled.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET enable_seqscan = off")
        for (filter_, order), index in LOOKED_AT.items():
            *_, read = _plans(connection, filter_, order)
            # PostgreSQL knows how many jobs a window holds, and may take a narrower index for it.
            _check([read], index if connection.dialect.name == "sqlite" else r"\w+", filter_)


def test_the_indexes_of_the_how_to_serve_who_looks_at_all(filled: Engine) -> None:
    statements = re.findall(r"```sql\n(.*?)```", (DOCS / "howto" / "search.md").read_text(), re.DOTALL)
    found = {
        "error:nowhere": "ix_jobs_error_text",
        "worker:nobody": "ix_jobs_worker",
        "worker:nobody*": "ix_jobs_worker",
    }
    if filled.dialect.name == "sqlite":
        statements, found = [statements[1]], {"worker:nobody": "ix_jobs_worker"}
    with filled.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in "".join(statements).split(";")[:-1]:
            if filled.dialect.name == "sqlite":
                statement = statement.replace(" CONCURRENTLY", "").replace(" text_pattern_ops", "")  # noqa: PLW2901
            connection.exec_driver_sql(statement)
        for filter_, index in found.items():
            (plan,) = _plans(connection, filter_, scan=True)
            assert index in plan, (filter_, plan)
        for index in set(found.values()):
            connection.exec_driver_sql(f"DROP INDEX {index}")
