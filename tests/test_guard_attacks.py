"""What got round the guard once, and its kin: each is refused, on ``ml_jobs`` and on a host's own table."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, MetaData, column, create_engine, func, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.pool import NullPool

from mljobs import (
    JobStore,
    MlJob,
    MlJobMixin,
    ModelError,
    SchemaError,
    TargetLockedError,
    TerminalStateError,
    jobs,
    metadata,
    schema,
)
from mljobs._fields import NAMES
from mljobs.guards._unique import finished_key
from tests.backends import Backend
from tests.cases import case
from tests.host_application import HostBase, TrainingRun

ID = UUID("01890000000070008000000000000001")


@pytest.fixture(params=[MlJob, TrainingRun])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def finished(engine: Engine, model: Any) -> Engine:
    """A database in which one job of ``model`` has finished."""
    if model is TrainingRun:
        HostBase.metadata.create_all(engine)
    with Session(engine) as session:
        job = model(id=ID, kind="train", target_name="spam", spec={"lr": 0.1})
        session.add(job)
        session.flush()
        job.start("gpu-1")
        session.flush()
        job.complete({"f1": 0.9})
        job.error_message = "a warning"
        session.commit()
    return engine


def _row(engine: Engine, table: str) -> Any:
    with engine.connect() as connection:
        return connection.exec_driver_sql(f"SELECT * FROM {table} ORDER BY id").all()


def _refuses(engine: Engine, table: str, *statements: str, **options: Any) -> None:
    before = _row(engine, table)
    with engine.connect().execution_options(**options) as connection, connection.begin() as transaction:
        with pytest.raises(TerminalStateError):
            for statement in statements:
                connection.exec_driver_sql(statement)
        transaction.rollback()
    assert _row(engine, table) == before


def test_a_start_by_hand_names_its_worker_which_stays_in_the_record(finished: Engine, model: Any) -> None:
    with Session(finished) as session:
        assert session.scalars(select(model.worker)).all() == ["gpu-1"]


# ------------------------------------------------------------------------------------------------------- SQLite's own


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@pytest.mark.usefixtures("finished")
def test_no_column_of_the_record_opens_for_incremental_writes(engine: Engine, model: Any) -> None:
    for name in NAMES:
        driver = sqlite3.connect(str(engine.url.database))
        with case(name), pytest.raises(sqlite3.OperationalError, match=r"indexed|cannot open value of type"):
            driver.blobopen(model.__tablename__, name, 1)
        driver.close()
    driver = sqlite3.connect(str(engine.url.database))
    with driver.blobopen(model.__tablename__, "spec_json", 1, readonly=True) as blob:
        assert blob.read() == b'{"lr":0.1}'
    driver.close()


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("recursive", ["ON", "OFF"])
def test_no_statement_of_sqlite_gets_round(finished: Engine, model: Any, recursive: str) -> None:
    table = model.__tablename__
    with finished.begin() as connection:
        connection.exec_driver_sql(f"CREATE VIEW seen AS SELECT * FROM {table}")
        connection.exec_driver_sql(
            f"CREATE TRIGGER through INSTEAD OF UPDATE ON seen BEGIN UPDATE {table} SET progress = NEW.progress; END"
        )
        connection.exec_driver_sql("CREATE TABLE targets (name TEXT PRIMARY KEY)")
    pragma = f"PRAGMA recursive_triggers = {recursive}"
    for attack in (
        f"UPDATE OR REPLACE {table} SET progress = 1",
        f"UPDATE OR FAIL {table} SET worker = 'me'",
        f"UPDATE OR ROLLBACK {table} SET lease = 1",
        f"INSERT OR REPLACE INTO {table} SELECT * FROM {table}",
        f"INSERT INTO {table} SELECT * FROM {table} WHERE true ON CONFLICT (id) DO UPDATE SET progress = 1",
        "UPDATE seen SET progress = 1",
        f"WITH gone AS (SELECT id FROM {table}) DELETE FROM {table} WHERE id IN (SELECT id FROM gone)",
        f"UPDATE main.{table} SET metrics_json = NULL",
    ):
        _refuses(finished, table, pragma, attack)
    _refuses(
        finished, table, f"CREATE TEMP TRIGGER mine AFTER INSERT ON targets BEGIN DELETE FROM {table}; END",
        "INSERT INTO targets VALUES ('x')",
    )  # fmt: skip


AN_ID = ID.hex
COLUMNS = ", ".join(f'"{name}"' for name in NAMES)
OTHER_TARGET = COLUMNS.replace('"target_name"', "'evil'")
OTHER_UUID = COLUMNS.replace('"id"', "gen_random_uuid()", 1)
OTHER_ID = COLUMNS.replace('"id"', f"'{uuid4().hex}'", 1)
ON_SQLITE: dict[str, list[str]] = {
    "decoys of the guard's table and of the job table": [
        "CREATE TEMP TABLE {table}_guard (name, open)",
        "INSERT INTO temp.{table}_guard VALUES ('retention', 1)",
        "CREATE TEMP TABLE {table} (id, status)",
        "DELETE FROM main.{table}",
    ],
    "the rows of the guard's table renamed": [
        "UPDATE {table}_guard SET name = 'x' || name",
        "INSERT OR REPLACE INTO {table} (" + COLUMNS + ") SELECT " + OTHER_TARGET + " FROM {table}",
    ],
    "CHECKs turned off, and an id of another type": [
        "PRAGMA ignore_check_constraints = ON",
        "INSERT OR REPLACE INTO {table} (rowid, " + COLUMNS + ") SELECT rowid, "
        + COLUMNS.replace('"id"', "CAST(id AS BLOB)", 1) + " FROM {table}",
    ],
    "OR REPLACE of another statement, handed down to a trigger": [
        "CREATE TABLE z (x UNIQUE)",
        "INSERT INTO z VALUES (1)",
        "CREATE TRIGGER zz AFTER INSERT ON z BEGIN INSERT INTO {table} (" + COLUMNS + ") SELECT " + OTHER_TARGET
        + " FROM {table}; END",
        "INSERT OR REPLACE INTO z VALUES (1)",
    ],
    "OR REPLACE handed down to an UPDATE of the key": [
        "CREATE TABLE z (x UNIQUE)",
        "INSERT INTO z VALUES (1)",
        "INSERT INTO {table} (" + COLUMNS + ") SELECT " + OTHER_ID.replace('"status"', "'queued'") + " FROM {table}",
        "CREATE TRIGGER zz AFTER INSERT ON z BEGIN UPDATE {table} SET id = '" + AN_ID + "' WHERE status = 'queued'; END",
        "INSERT OR REPLACE INTO z VALUES (1)",
    ],
    "a foreign key of the host that cascades": [
        "PRAGMA foreign_keys = ON",
        "CREATE TABLE owners (id INTEGER PRIMARY KEY)",
        "INSERT INTO owners VALUES (1)",
        "ALTER TABLE {table} ADD COLUMN own INTEGER REFERENCES owners (id) ON DELETE CASCADE",
        "UPDATE {table} SET own = 1",
        "DELETE FROM owners",
    ],
    "a view whose trigger replaces": [
        "CREATE VIEW v AS SELECT * FROM {table}",
        "CREATE TRIGGER vi INSTEAD OF UPDATE ON v BEGIN INSERT OR REPLACE INTO {table} (" + COLUMNS + ") SELECT "
        + OTHER_TARGET + " FROM {table} WHERE id = OLD.id; END",
        "UPDATE v SET progress = 1",
    ],
    "ATTACH of the same file": ["ATTACH '{file}' AS other", "UPDATE other.{table} SET worker = 'me'"],
}  # fmt: skip


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("model", [MlJob], indirect=True)
@pytest.mark.parametrize("attack", ON_SQLITE)
def test_no_trick_of_sqlite_changes_a_finished_record(finished: Engine, model: Any, attack: str) -> None:
    table = model.__tablename__
    record = f"SELECT {COLUMNS} FROM {table} WHERE id = '{AN_ID}'"
    with finished.connect() as connection:
        before = connection.exec_driver_sql(record).all()
    driver = sqlite3.connect(str(finished.url.database), isolation_level=None)
    *prepared, last = (each.format(table=table, file=finished.url.database) for each in ON_SQLITE[attack])
    for statement in prepared:
        driver.execute(statement)
    with pytest.raises(sqlite3.Error, match=r"mljobs: record is in a terminal state|constraint failed"):
        driver.execute(last)
    driver.close()
    with finished.connect() as connection:
        assert connection.exec_driver_sql(record).all() == before


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("model", [MlJob], indirect=True)
def test_a_trigger_before_the_guard_changes_nothing_that_had_finished_before_the_statement(finished: Engine) -> None:
    """What finishes within the statement that changes it is seen by nobody; ``verify`` names such a trigger."""
    with finished.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER host BEFORE UPDATE OF progress ON ml_jobs WHEN OLD.status = 'running' BEGIN "
            "UPDATE ml_jobs SET status = 'failed', finished_at = 0 WHERE status = 'running'; END"
        )
    with Session(finished) as session:
        for target in ("first", "second"):
            job = MlJob(kind="train", target_name=target)
            session.add(job)
            session.flush()
            job.start()
        session.commit()
    _refuses(finished, "ml_jobs", "UPDATE ml_jobs SET progress = 7 WHERE target_name <> 'spam'")
    with finished.begin() as connection:
        connection.exec_driver_sql("UPDATE ml_jobs SET progress = 7, status = 'queued' WHERE target_name = 'first'")
        states = connection.exec_driver_sql("SELECT target_name, status FROM ml_jobs ORDER BY 1").all()
    assert states == [("first", "queued"), ("second", "failed"), ("spam", "completed")]
    with pytest.raises(SchemaError) as found:
        schema.verify(finished)
    assert "trigger host on table ml_jobs writes jobs before the row that is changed" in str(found.value.problems)


# --------------------------------------------------------------------------------------------------- PostgreSQL's own


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_truncate_with_an_old_snapshot_is_refused(engine: Engine, level: str) -> None:
    with engine.connect().execution_options(isolation_level=level) as old, old.begin():
        old.exec_driver_sql("SELECT 1 FROM pg_class LIMIT 1")
        with Session(engine) as session:
            session.add(MlJob(kind="train", target_name="spam", status="completed"))
            session.commit()
        with pytest.raises(TerminalStateError, match=r"TRUNCATE .* is refused.*\. A test empties"):
            old.exec_driver_sql("TRUNCATE ml_jobs CASCADE")
    assert len(_row(engine, "ml_jobs")) == 1


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
def test_a_truncate_of_what_is_empty_is_legal(postgres_url: str, level: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool, isolation_level=level)
    with engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE ml_jobs CASCADE")


DECOYS = (
    "CREATE TABLE pg_temp.decoy (status text)",
    "CREATE TYPE pg_temp.regclass AS ENUM ('pg_temp.decoy')",
    "CREATE FUNCTION pg_temp.to_decoy(oid) RETURNS pg_temp.regclass LANGUAGE sql AS $$ SELECT NULL::pg_temp.regclass $$",
    "CREATE CAST (oid AS pg_temp.regclass) WITH FUNCTION pg_temp.to_decoy(oid) AS IMPLICIT",
    "CREATE TABLE pg_temp.ml_jobs (status text)",
    "CREATE TABLE pg_temp.training_runs (status text)",
    "CREATE SCHEMA evil",
    "CREATE FUNCTION evil.no(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT false'",
    "CREATE FUNCTION evil.no(varchar, varchar) RETURNS boolean LANGUAGE sql AS 'SELECT false'",
    "CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.no)",
    "CREATE OPERATOR evil.= (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = evil.no)",
    "CREATE FUNCTION evil.quote_ident(text) RETURNS text LANGUAGE sql AS $$ SELECT 'pg_temp' $$",
    "CREATE FUNCTION evil.current_setting(text, boolean) RETURNS text LANGUAGE sql AS $$ SELECT 'on' $$",
    "SET LOCAL search_path = evil, pg_temp, pg_catalog, public",
)


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_decoy_in_the_search_path_is_not_looked_at(finished: Engine, model: Any) -> None:
    for attack in ("TRUNCATE public.{} CASCADE", "DELETE FROM public.{}", "UPDATE public.{} SET progress = 1"):
        with case(attack):
            _refuses(finished, model.__tablename__, *DECOYS, attack.format(model.__tablename__))


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_row_policy_hides_no_finished_record_from_the_guard(finished: Engine, model: Any) -> None:
    table = model.__tablename__
    before = _row(finished, table)
    with finished.connect() as connection, connection.begin() as transaction:
        for statement in (
            "CREATE ROLE blind",
            f"GRANT SELECT, TRUNCATE ON {table}, {model.__leases__.name} TO blind",
            f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
            f"CREATE POLICY nothing ON {table} TO blind USING (false)",
            "SET LOCAL ROLE blind",
        ):
            connection.exec_driver_sql(statement)
        with pytest.raises(Exception, match=r"row-level security|terminal|TRUNCATE|denied"):
            connection.exec_driver_sql(f"TRUNCATE {table} CASCADE")
        transaction.rollback()
    assert _row(finished, table) == before


REWRITES = [
    "NEW.target_name := upper(NEW.target_name)",
    "NEW.status := 'queued'",
    "NEW.id := gen_random_uuid()",
    "NEW.metrics_json := '{}'",
    "NEW.spec_json := (NEW.spec_json::text || ' ')::json",
    "NEW.lease := NULL; NEW.worker := NULL",
    "NEW.finished_at := NULL",
    "NEW := OLD; NEW.error_message := NULL",
]


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_hosts_trigger_that_rewrites_a_finished_record_is_refused(finished: Engine, model: Any) -> None:
    table = model.__tablename__
    with finished.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN mine text")
        connection.exec_driver_sql(f"UPDATE {table} SET mine = 'legal'")
    for rewrite in REWRITES:
        with case(rewrite):
            with finished.begin() as connection:
                body = f"BEGIN {rewrite}; RETURN NEW; END"
                connection.exec_driver_sql(
                    f"CREATE OR REPLACE FUNCTION zz() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$"
                )
                connection.exec_driver_sql(
                    f"CREATE OR REPLACE TRIGGER zz BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION zz()"
                )
            _refuses(finished, table, f"UPDATE {table} SET mine = 'x'")


def test_a_hosts_trigger_cannot_take_an_illegal_step_nor_a_trigger_that_returns_null_delete(postgres_url: str) -> None:
    from mljobs import InvalidTransitionError

    engine = create_engine(postgres_url, poolclass=NullPool)
    with engine.begin() as connection:
        for body in ("zz() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.status := 'completed'; RETURN NEW; END $$",
                     "aa() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$"):  # fmt: skip
            connection.exec_driver_sql(f"CREATE FUNCTION {body}")
        connection.exec_driver_sql("CREATE TRIGGER zz BEFORE UPDATE ON ml_jobs FOR EACH ROW EXECUTE FUNCTION zz()")
        connection.exec_driver_sql("CREATE TRIGGER aa BEFORE DELETE ON ml_jobs FOR EACH ROW EXECUTE FUNCTION aa()")
    with Session(engine) as session:
        session.add_all([MlJob(kind="train", target_name="a"), MlJob(kind="train", target_name="b", status="failed")])
        session.commit()
        with pytest.raises(InvalidTransitionError), session.begin_nested():
            session.execute(text("UPDATE ml_jobs SET priority = 1 WHERE status = 'queued'"))
        session.execute(text("DELETE FROM ml_jobs"))
        session.commit()
    assert len(_row(engine, "ml_jobs")) == 2


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_no_statement_of_postgresql_gets_round(finished: Engine, model: Any) -> None:
    table = model.__tablename__
    with finished.begin() as connection:
        connection.exec_driver_sql(f"CREATE VIEW seen AS SELECT * FROM {table}")
        connection.exec_driver_sql("CREATE TABLE targets (name text PRIMARY KEY)")
        connection.exec_driver_sql("INSERT INTO targets VALUES ('spam')")
        connection.exec_driver_sql(
            f"ALTER TABLE {table} ADD FOREIGN KEY (target_name) REFERENCES targets ON UPDATE CASCADE ON DELETE CASCADE"
        )
    for attack in (
        "UPDATE targets SET name = 'ham'",
        "DELETE FROM targets",
        "MERGE INTO seen USING (SELECT 1) x ON true WHEN MATCHED THEN UPDATE SET progress = 3"
        if finished.dialect.server_version_info >= (17,)
        else "UPDATE seen SET progress = 3",
        f"INSERT INTO {table} SELECT * FROM {table} ON CONFLICT (id) DO UPDATE SET worker = 'me'",
        f"WITH gone AS (DELETE FROM {table} RETURNING id) SELECT * FROM gone",
        f"TRUNCATE {table}, {model.__leases__.name} CASCADE",
    ):
        _refuses(finished, table, attack)


ON_POSTGRESQL: dict[str, list[str]] = {
    "a table of which it is made a partition": [
        "CREATE TABLE par (LIKE {table}) PARTITION BY LIST (kind)",
        "CREATE TABLE others PARTITION OF par FOR VALUES IN ('elsewhere')",
        "ALTER TABLE par ATTACH PARTITION {table} FOR VALUES IN ('train')",
        "UPDATE par SET worker = 'me'; UPDATE par SET kind = 'elsewhere'; DELETE FROM par; TRUNCATE par",
    ],
    "a table from which it is made to inherit": [
        "CREATE TABLE par (target_name text NOT NULL)",
        "ALTER TABLE {table} INHERIT par",
        "UPDATE par SET target_name = 'evil'; DELETE FROM par; TRUNCATE par CASCADE",
    ],
    "a rule that adds an UPDATE": [
        "CREATE RULE r AS ON INSERT TO {table} DO ALSO UPDATE {table} SET worker = 'me'",
        f"INSERT INTO {{table}} ({COLUMNS}) SELECT {OTHER_UUID} FROM {{table}}",
    ],
    "a generated column": [
        "ALTER TABLE {table} ADD COLUMN g text GENERATED ALWAYS AS (upper(target_name)) STORED",
        "UPDATE {table} SET g = DEFAULT, priority = 3",
    ],
    "a deferred foreign key that cascades": [
        "CREATE TABLE targets (id text PRIMARY KEY)",
        "INSERT INTO targets VALUES ('spam')",
        "ALTER TABLE {table} ADD FOREIGN KEY (target_name) REFERENCES targets ON UPDATE CASCADE INITIALLY DEFERRED",
        "UPDATE targets SET id = 'evil'",
    ],
}


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("model", [MlJob], indirect=True)
@pytest.mark.parametrize("attack", ON_POSTGRESQL)
def test_no_structure_of_postgresql_changes_a_finished_record(finished: Engine, model: Any, attack: str) -> None:
    table = model.__tablename__
    *prepared, last = (each.format(table=table) for each in ON_POSTGRESQL[attack])
    with finished.begin() as connection:
        for statement in prepared:
            connection.exec_driver_sql(statement)
    for statement in last.split("; "):
        _refuses(finished, table, statement)


# ---------------------------------------------------------------------------------------- two exclusive jobs at once


def test_a_second_exclusive_job_of_a_target_starts_by_no_route(backend: Backend) -> None:
    def two(session: Session) -> None:
        first, second = (MlJob(kind="train", target_name="spam", exclusive=True) for _ in range(2))
        other = MlJob(kind="train", target_name="spam")
        session.add_all([first, second, other])
        session.flush()
        first.start()
        other.start()
        session.flush()
        with pytest.raises(TargetLockedError, match="has to wait"), session.begin_nested():
            second.start()
            session.flush()
        running = {"kind": "train", "target_name": "spam", "spec_json": "{}", "status": "running", "exclusive": True}
        with pytest.raises(TargetLockedError), session.begin_nested():
            session.execute(MlJob.__table__.insert(), running)
        with pytest.raises(TargetLockedError), session.begin_nested():
            jobs.submit_many(session, [MlJob(id=uuid4(), **running)])
        session.refresh(first)
        first.complete()
        session.flush()
        session.refresh(second)
        second.start()

    backend.run(two)


def test_an_import_of_a_second_running_exclusive_job_is_told_so(engine: Engine, tmp_path: Any) -> None:
    with Session(engine) as session:
        session.add(MlJob(kind="train", target_name="spam", exclusive=True, status="running"))
        session.commit()
    with JobStore(engine) as store:
        file = tmp_path / "jobs.ndjson"
        store.export_jobs(file, extended=True)
        line = file.read_bytes().replace(store.find()[0].id.hex.encode(), uuid4().hex.encode())
        waiting = line.replace(b'"running"', b'"queued"').replace(
            line[line.index(b'"id":"') + 6 :][:32], uuid4().hex.encode()
        )
        file.write_bytes(line + waiting)
        done = store.import_jobs(file, requeue_running=False)
        assert (done.inserted, done.rejected) == (1, 1)
        assert "its target is held by another exclusive job" in done.problems[0].reason


# ----------------------------------------------------------------------------------------------- classes and copies


def _defined(**body: Any) -> Any:
    class Base(DeclarativeBase):
        pass

    return type("Run", (MlJobMixin, Base), {"__tablename__": "runs", "__module__": __name__, **body})


def _args(*args: Any, **options: Any) -> dict[str, Any]:
    return {"__table_args__": (*args, options)}


NOT_ONLY_ACTIVE = (
    "status NOT IN ('queued', 'running')",
    "status <> 'queued'",
    "spec_json <> 'running'",
    "NOT status = 'running'",
    "status = 'running' OR exclusive",
    "(status = 'running' OR exclusive) AND true",
    "exclusive OR kind = 'train' AND status = 'running'",
    "priority BETWEEN 0 AND status = 'running'",
    "CASE WHEN exclusive AND status = 'running' AND 1 THEN 1 ELSE 1 END",
    "status = 'running' COLLATE NOCASE",
    "\"a AND status = 'running'\" IS NULL",
)
"""Conditions under which a finished record may be in an index, or which the check does not understand."""


def test_a_unique_index_that_verify_accepts_holds_no_finished_record() -> None:
    for key in ("(lower(target_name))", "((1))", "('target_name')", "(substr(spec_json, 1))"):
        assert finished_key(f"CREATE UNIQUE INDEX u ON ml_jobs {key}"), key
    for condition in (*NOT_ONLY_ACTIVE, "status = 'running' -- x\n OR 1"):
        assert finished_key(f"CREATE UNIQUE INDEX u ON ml_jobs (target_name) WHERE {condition}"), condition
    for accepted in (
        "(target_name) WHERE status IN ('queued', 'running')",
        "(target_name) WHERE exclusive = 1 AND (priority > 0 OR 1) AND ((status = 'queued'))",
        '("target_name", id DESC)',
        "(own, lower(other))",
    ):
        assert not finished_key(f"CREATE UNIQUE INDEX u ON ml_jobs {accepted}"), accepted


def test_a_class_whose_finished_records_could_be_replaced_is_refused() -> None:
    from sqlalchemy import Column, Index, Integer, PrimaryKeyConstraint, Text, UniqueConstraint
    from sqlalchemy.orm import mapped_column

    active = text("status IN ('queued', 'running')")
    done = text("status IN ('running', 'completed')")
    refused: list[tuple[str, dict[str, Any]]] = [
        ("REPLACE", _args(PrimaryKeyConstraint("id", sqlite_on_conflict="REPLACE"))),
        ("replace", _args(UniqueConstraint("mine", sqlite_on_conflict="replace")) | {"mine": mapped_column(Integer)}),
        ("REPLACE", {"mine": mapped_column(Integer, nullable=False, sqlite_on_conflict_not_null="REPLACE")}),
        ("rowid", {"rowid": mapped_column(Integer)}),
        ("OID", {"mine": Column("OID", Integer)}),
        ("_rowid_", {"_rowid_": mapped_column(Text)}),
        ("target_name", _args(UniqueConstraint("target_name"))),
        ("kind", _args(UniqueConstraint("mine", "kind")) | {"mine": mapped_column(Integer)}),
        ("target_name", _args(Index("one", "target_name", unique=True))),
        ("target_name", _args(Index("one", "target_name", unique=True, postgresql_where=active))),
        ("target_name", _args(Index("one", "target_name", unique=True, sqlite_where=done))),
        ("target_name", _args(Index("one", text("lower(target_name)"), unique=True))),
        ("target_name", _args(Index("one", func.lower(column("target_name")), unique=True))),
        *(
            ("target_name", _args(Index("one", "target_name", unique=True, sqlite_where=text(condition))))
            for condition in NOT_ONLY_ACTIVE
        ),
        ("partition_by", _args(postgresql_partition_by="HASH (id)")),
        ("inherits", _args(postgresql_inherits="others")),
    ]
    for reason, body in refused:
        with pytest.raises(ModelError, match=reason):
            _defined(**body)
    _defined(rowid=mapped_column(Integer), **_args(sqlite_with_rowid=False))
    _defined(mine=mapped_column(Integer, unique=True))
    _defined(**_args(Index("one", "target_name", unique=True, postgresql_where=active, sqlite_where=active)))
    _defined(**_args(Index("one", "kind", func.lower(column("target_name")), unique=True, sqlite_where=active)))


def test_a_key_that_is_added_later_is_refused_when_the_table_is_made(empty_url: str) -> None:
    from sqlalchemy import UniqueConstraint

    run = _defined()
    run.__table__.append_constraint(UniqueConstraint(run.__table__.c.target_name))
    with pytest.raises(ModelError, match="target_name"):
        run.metadata.create_all(create_engine(empty_url, poolclass=NullPool))


def test_a_table_without_rowid_is_guarded_all_the_same(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, poolclass=NullPool)
    run = _defined(**_args(sqlite_with_rowid=False))
    run.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(run(kind="train", target_name="spam", status="failed"))
        session.commit()
    for attack in (
        "UPDATE runs SET progress = 1",
        "INSERT OR REPLACE INTO runs SELECT * FROM runs",
        "DELETE FROM runs",
    ):
        _refuses(engine, "runs", attack)
    schema.verify(engine, metadata=run.metadata)


@pytest.fixture(params=[None, "app"])
def copied(request: pytest.FixtureRequest, empty_url: str) -> Iterator[tuple[Engine, MetaData]]:
    """A database with a copy of our tables, by ``Table.to_metadata``."""
    engine = create_engine(empty_url, poolclass=NullPool)
    if request.param and engine.dialect.name == "sqlite":
        engine = create_engine("sqlite://")
    copy = MetaData()
    for table in metadata.sorted_tables:
        table.to_metadata(copy, schema=request.param)
    if request.param:
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "CREATE SCHEMA app" if engine.dialect.name == "postgresql" else "ATTACH ':memory:' AS app"
            )
    copy.create_all(engine)
    yield engine, copy
    engine.dispose()


def test_a_copy_of_the_table_has_its_guard(copied: tuple[Engine, MetaData]) -> None:
    engine, copy = copied
    schema.verify(engine, metadata=copy)
    (table,) = [table for table in copy.tables.values() if table.name == "ml_jobs"]
    with engine.begin() as connection:
        connection.execute(table.insert(), {"kind": "train", "target_name": "a", "status": "failed", "spec_json": "{}"})
        with pytest.raises(TerminalStateError), connection.begin_nested():
            connection.execute(table.delete())
    copy.drop_all(engine)


def test_values_that_break_the_shape_stay_an_integrity_error(engine: Engine) -> None:
    with Session(engine) as session, pytest.raises(IntegrityError):
        session.execute(text("UPDATE ml_jobs SET progress = 1"))
        session.execute(text("INSERT INTO ml_jobs (id) VALUES (NULL)"))
