"""``verify`` names what undermines a guard that stands as it should, and what differs only where one looks closely."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import JobStore, MlJob, SchemaError, TerminalStateError, metadata, schema
from mljobs.guards import retention
from tests.cases import case, undone

FINAL = "('completed', 'failed', 'cancelled')"


def problems(target: Engine | Connection) -> list[str]:
    try:
        schema.verify(target)
    except SchemaError as error:
        return list(error.problems)
    return []


def _run(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def _trigger(engine: Engine, name: str) -> str:
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            found = connection.execute(text("SELECT sql FROM sqlite_master WHERE name = :name"), {"name": name})
        else:
            found = connection.execute(
                text("SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgname = :name"), {"name": name}
            )
        return str(found.scalar_one())


ALIKE = {
    "sqlite": [
        ("'completed'", "'\"completed\"'"),
        ("'completed'", "'completed '"),
        ("'completed'", "' completed'"),
        ("'completed'", "'Completed'"),
    ],
    "postgresql": [
        ("'failed'::text", "'failed::text'::text"),
        ("'failed'::text", "'(failed)'::text"),
        ("'failed'::text", "'failed '::text"),
        ("'failed'::text", "'fai\nled'::text"),
    ],
}


def test_a_literal_that_differs_inside_its_quotes_is_noticed(engine: Engine) -> None:
    on = " ON ml_jobs" if engine.dialect.name == "postgresql" else ""
    definition = _trigger(engine, "ml_jobs_guard_update")
    for known, other in ALIKE[engine.dialect.name]:
        assert known in definition
        with case(other), undone(engine) as connection:
            connection.exec_driver_sql(f"DROP TRIGGER ml_jobs_guard_update{on}")
            connection.exec_driver_sql(definition.replace(known, other))
            found = problems(connection)
            assert [each for each in found if each.startswith("trigger ml_jobs_guard_update of table ml_jobs")]


ATTRIBUTES = {
    "ALTER FUNCTION ml_jobs_guard() RESET search_path": "attributes of function ml_jobs_guard",
    "ALTER FUNCTION ml_jobs_guard() SET search_path = public": "attributes of function ml_jobs_guard",
    "ALTER FUNCTION ml_jobs_guard() RESET row_security": "attributes of function ml_jobs_guard",
    "ALTER FUNCTION ml_jobs_guard() STABLE": "attributes of function ml_jobs_guard",
    "ALTER FUNCTION ml_jobs_guard() SECURITY DEFINER": "attributes of function ml_jobs_guard",
    "ALTER FUNCTION ml_jobs_wake() SECURITY DEFINER": "attributes of function ml_jobs_wake",
    "ALTER TABLE ml_jobs DISABLE TRIGGER ml_jobs_guard_after": "state of trigger ml_jobs_guard_after",
    "ALTER TABLE ml_jobs ENABLE REPLICA TRIGGER ml_jobs_guard_after": "state of trigger ml_jobs_guard_after",
    "DROP TRIGGER ml_jobs_guard_spec_json ON ml_jobs": "trigger ml_jobs_guard_spec_json of table ml_jobs is missing",
    "DROP INDEX uq_ml_jobs_exclusive": "index uq_ml_jobs_exclusive of table ml_jobs is missing",
    "DROP TRIGGER ml_jobs_guard_range ON ml_jobs": "trigger ml_jobs_guard_range of table ml_jobs is missing",
    "CREATE RULE quiet AS ON UPDATE TO ml_jobs DO INSTEAD NOTHING": "rule quiet on table ml_jobs",
    "ALTER SEQUENCE ml_job_leases_token_seq CYCLE": "the numbering of ml_job_leases.token comes back to old ones",
    "ALTER SEQUENCE ml_job_leases_token_seq INCREMENT BY -1": "the numbering of ml_job_leases.token comes back to old ones",
    "CREATE TABLE later () INHERITS (ml_jobs)": "table later inherits from ml_jobs",
    "ALTER DATABASE {database} SET mljobs.retention = 'on'": "database {database} has mljobs.retention set to 'on'",
    "ALTER ROLE {role} IN DATABASE {database} SET mljobs.retention = 'on'": "role {role} has mljobs.retention set to 'on'",
    "ALTER DATABASE {database} SET session_replication_role = 'replica'": "database {database} has session_replication_role",
}


def test_what_undermines_the_guard_on_postgresql_is_named(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    names = {"database": engine.url.database, "role": "postgres"}
    assert problems(engine) == []
    for statement, sentence in ATTRIBUTES.items():
        with case(statement), undone(engine) as connection:
            connection.exec_driver_sql(statement.format(**names))
            found = problems(connection)
            assert [each for each in found if each.startswith(sentence.format(**names))], found
    engine.dispose()


@pytest.mark.parametrize("setting", ["session_replication_role=replica", "mljobs.retention=on"])
def test_a_session_without_its_guard_is_named(postgres_url: str, setting: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool, connect_args={"options": f"-c{setting}"})
    (problem,) = problems(engine)
    assert setting.partition("=")[0] in problem
    assert "in this session" in problem


def test_settings_that_open_nothing_are_no_problem(postgres_url: str) -> None:
    options = "-cquote_all_identifiers=on -cstandard_conforming_strings=off -csession_replication_role=local"
    engine = create_engine(postgres_url, poolclass=NullPool, connect_args={"options": options})
    assert problems(engine) == []
    with undone(engine) as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {engine.url.database} SET session_replication_role = 'local'")
        assert problems(connection) == []
        assert connection.exec_driver_sql("SHOW quote_all_identifiers").scalar() == "on"


def test_a_trigger_on_a_table_beside_the_jobs_is_named(url: str) -> None:
    engine = create_engine(url, poolclass=NullPool)
    if engine.dialect.name == "sqlite":
        tables = ["ml_jobs_guard", "ml_jobs_counts", "ml_job_leases", "ml_job_workers"]
        body = "BEGIN SELECT RAISE(IGNORE); END"
    else:
        tables = ["ml_job_leases", "ml_job_workers"]
        body = "FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()"
    _run(engine, *(f"CREATE TRIGGER x_{table} BEFORE UPDATE ON {table} {body}" for table in tables))
    assert {found.partition(":")[0] for found in problems(engine)} == {
        f"trigger x_{table} on table {table}" for table in tables
    }


def test_what_undermines_the_guard_on_sqlite_is_named(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, poolclass=NullPool)
    _run(engine, "CREATE UNIQUE INDEX host_one ON ml_jobs (target_name)")
    (problem,) = problems(engine)
    assert problem.startswith("unique index host_one of table ml_jobs")
    _run(engine, "DROP INDEX host_one", "CREATE UNIQUE INDEX host_one ON ml_jobs (lower(target_name))")
    (problem,) = problems(engine)
    assert problem.startswith("unique index host_one of table ml_jobs")
    _run(
        engine, "DROP INDEX host_one",
        "CREATE UNIQUE INDEX host_one ON ml_jobs (target_name) WHERE status IN ('queued', 'running')",
        "DROP INDEX ml_jobs_guard_blobs",
    )  # fmt: skip
    assert problems(engine) == ["blob index ml_jobs_guard_blobs of table ml_jobs is missing"]
    with undone(engine) as connection:
        connection.exec_driver_sql("ALTER TABLE ml_jobs ADD COLUMN RowId INTEGER AS (1)")
        assert problems(connection)[1].startswith("column RowId of table ml_jobs hides SQLite's own rowid")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            "sql = replace(sql, 'PRIMARY KEY (id)', 'PRIMARY KEY (id) ON CONFLICT REPLACE')",
            "table ml_jobs says ON CONFLICT",
        ),
        ("sql = replace(sql, 'json_valid(spec_json)', '1')", "check ck_ml_jobs_spec_json of table ml_jobs"),
    ],
)
def test_a_schema_written_by_hand_is_noticed(sqlite_url: str, change: str, sentence: str) -> None:
    engine = create_engine(sqlite_url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA writable_schema = ON")
        connection.exec_driver_sql(f"UPDATE sqlite_master SET {change} WHERE type = 'table' AND name = 'ml_jobs'")
        connection.commit()
    found = problems(engine)
    assert [each for each in found if each.startswith(sentence)], found


def test_a_trigger_taken_out_of_the_schema_by_hand_is_noticed(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA writable_schema = ON")
        connection.exec_driver_sql("DELETE FROM sqlite_master WHERE name = 'ml_jobs_guard_update'")
        connection.commit()
    assert problems(engine) == ["trigger ml_jobs_guard_update of table ml_jobs is missing"]


INTERFERING = {
    "CREATE TRIGGER mine BEFORE DELETE ON ml_jobs BEGIN UPDATE ml_jobs_guard SET open = 1 WHERE name = 'retention'; END": (
        "trigger mine on table ml_jobs writes or reads ml_jobs_guard, which says whether finished jobs may be deleted"
    ),
    "CREATE TEMP TRIGGER mine BEFORE DELETE ON main.ml_jobs BEGIN UPDATE ml_jobs_guard SET open = 1; END": (
        "trigger mine on table ml_jobs writes or reads ml_jobs_guard, which says whether finished jobs may be deleted"
    ),
    "CREATE TRIGGER mine UPDATE ON ml_jobs BEGIN UPDATE \"ml_jobs\" SET status = 'failed' WHERE id = OLD.id; END": (
        "trigger mine on table ml_jobs writes jobs before the row that is changed"
    ),
    "CREATE TRIGGER mine BEFORE DELETE ON ml_jobs BEGIN DELETE FROM ml_jobs WHERE id <> OLD.id; END": (
        "trigger mine on table ml_jobs writes jobs before the row that is changed"
    ),
    "CREATE TRIGGER mine AFTER UPDATE ON ml_jobs BEGIN UPDATE ml_jobs SET priority = 1 WHERE id = NEW.retry_of; END": "",
    "CREATE TRIGGER mine BEFORE UPDATE ON ml_jobs BEGIN SELECT count(*) FROM ml_jobs; END": "",
}


def test_a_hosts_trigger_that_gets_between_a_statement_and_sqlites_guard_is_named(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    for statement, wanted in INTERFERING.items():
        with case(statement), undone(engine) as connection:
            connection.exec_driver_sql(statement)
            assert [each.partition(":")[0] for each in problems(connection)] == ([wanted] if wanted else [])
    engine.dispose()


def test_the_triggers_of_an_open_retention_block_are_no_problem(sqlite_url: str) -> None:
    with Session(create_engine(sqlite_url)) as session, retention(session, MlJob):
        schema.verify(session.connection())


def test_a_hosts_trigger_that_turns_retention_on_for_everybody_is_named(postgres_url: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    _run(
        engine,
        "CREATE FUNCTION opens() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "PERFORM set_config('mljobs.retention', 'on', true); RETURN OLD; END $$",
        "CREATE TRIGGER aa BEFORE DELETE ON ml_jobs FOR EACH ROW EXECUTE FUNCTION opens()",
        "CREATE FUNCTION harmless() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$",
        "CREATE TRIGGER ab BEFORE UPDATE ON ml_jobs FOR EACH ROW EXECUTE FUNCTION harmless()",
    )
    assert problems(engine) == ["trigger aa on table ml_jobs opens the guard in its function opens: DROP TRIGGER"]


def test_a_token_that_somebody_set_and_after_which_no_other_comes_is_named(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, poolclass=NullPool)
    _run(engine, f"INSERT INTO ml_job_leases (token, worker, acquired_at, expires_at) VALUES ({2**63 - 1}, 'w', 1, 1)")
    (problem,) = problems(engine)
    assert problem.startswith("the numbering of ml_job_leases.token is near its end")
    _run(engine, "DELETE FROM ml_job_leases", "UPDATE sqlite_sequence SET seq = 0 WHERE name = 'ml_job_leases'")
    with JobStore(engine) as store:
        assert store.claim_one(store.submit("train", "spam"), worker="w").token == 1


def test_tokens_that_would_come_back_are_noticed(engine: Engine) -> None:
    with JobStore(engine) as store:
        for _ in range(3):
            store.submit("train", "spam")
        store.claim(worker="w", limit=3)
    assert problems(engine) == []
    if engine.dialect.name == "postgresql":
        _run(engine, "ALTER TABLE ml_job_leases ALTER COLUMN token RESTART")
    else:
        _run(engine, "UPDATE sqlite_sequence SET seq = 0 WHERE name = 'ml_job_leases'")
    (problem,) = problems(engine)
    assert re.match(r"the numbering of ml_job_leases.token stands at \d, but token \d was given out", problem) or (
        "numbering" in problem
    )


# --------------------------------------------------------------------------------------------- dropped, then upgraded


def test_an_upgrade_after_the_tables_were_dropped_says_so_and_what_to_do(empty_url: str) -> None:
    engine = create_engine(empty_url, poolclass=NullPool)
    schema.upgrade(engine)
    metadata.drop_all(engine)
    with pytest.raises(SchemaError, match=r"0001_ml_jobs, but table ml_jobs is missing.*stamp\(target, 'base'\)"):
        schema.upgrade(engine)
    schema.stamp(engine, "base")
    schema.upgrade(engine)
    schema.verify(engine)


def test_vacuum_into_copies_the_guard_too(sqlite_url: str, tmp_path: Path) -> None:
    engine = create_engine(sqlite_url, poolclass=NullPool)
    with Session(engine) as session:
        session.add(MlJob(kind="train", target_name="spam", status="failed"))
        session.commit()
    copy: Any = tmp_path / "copy.db"
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"VACUUM INTO '{copy}'")
    copied = create_engine(f"sqlite:///{copy}", poolclass=NullPool)
    schema.verify(copied)
    with pytest.raises(TerminalStateError):
        _run(copied, "DELETE FROM ml_jobs")
