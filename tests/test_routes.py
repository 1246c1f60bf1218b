"""Every way to write a row, in every backend: a finished job refuses it, and is byte for byte what it was."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import bindparam, delete, func, insert, literal, select, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session, load_only, make_transient
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.util import await_only

from mljobs import InvalidTransitionError, MlJob, MlJobStatus, TerminalStateError
from mljobs.guards import translate_error
from mljobs.guards._companions import GUARD_ROLES, TERMINAL_MESSAGE, TRANSITION_MESSAGE
from tests.backends import Backend
from tests.cases import case
from tests.host_application import GridRun, HostBase, Team, TrainingRun
from tests.postgres import Server

JOBS = MlJob.__table__
ID = "01890000000070008000000000000001"


@dataclass(frozen=True)
class Route:
    """A way to write.

    Attributes:
        write: Does it, in a session, given the finished job's id.
        stopped_by: What stops it, for the docs.
        dialect: Where it exists; both if empty.
    """

    write: Callable[[Session, UUID], Any]
    stopped_by: str
    dialect: str = ""


ROUTES: dict[str, Route] = {}


def route(name: str, stopped_by: str, dialect: str = "") -> Callable[[Callable[[Session, UUID], Any]], Any]:
    def add(write: Callable[[Session, UUID], Any]) -> Callable[[Session, UUID], Any]:
        ROUTES[name] = Route(write, stopped_by, dialect)
        return write

    return add


HOOK = "ORM hook, then trigger"
TRIGGER = "trigger"


def _load(session: Session, job_id: UUID) -> MlJob:
    return session.get_one(MlJob, job_id)


@route("attribute set", HOOK)
def _(session: Session, job_id: UUID) -> None:
    _load(session, job_id).progress = 5
    session.flush()


@route("attribute set on an expired instance", HOOK)
def _(session: Session, job_id: UUID) -> None:
    job = _load(session, job_id)
    session.expire(job)
    job.error_message = "late"
    session.flush()


@route("attribute set with load_only", HOOK)
def _(session: Session, job_id: UUID) -> None:
    job = session.scalars(select(MlJob).options(load_only(MlJob.target_name))).one()
    job.target_name = "other"
    session.flush()


@route("attribute set to a SQL expression", HOOK)
def _(session: Session, job_id: UUID) -> None:
    _load(session, job_id).progress = MlJob.progress + 1  # type: ignore[assignment]
    session.flush()


@route("status set back", HOOK)
def _(session: Session, job_id: UUID) -> None:
    _load(session, job_id).status = MlJobStatus.RUNNING
    session.flush()


@route("merge", HOOK)
def _(session: Session, job_id: UUID) -> None:
    session.merge(MlJob(id=job_id, kind="train", target_name="other"))
    session.flush()


@route("merge(load=False)", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    job = MlJob(id=job_id, kind="train", target_name="other")
    make_transient(job)
    from sqlalchemy.orm import make_transient_to_detached

    make_transient_to_detached(job)
    merged = session.merge(job, load=False)
    merged.progress = 7
    session.flush()


@route("set_committed_value", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    job = _load(session, job_id)
    set_committed_value(job, "status", MlJobStatus.RUNNING)
    job.progress = 7
    session.flush()


for synchronize in ("auto", "fetch", "evaluate", False):

    @route(f"update(MlJob), synchronize_session={synchronize!r}", TRIGGER)
    def _(session: Session, job_id: UUID, synchronize: Any = synchronize) -> None:
        _load(session, job_id)
        session.execute(
            update(MlJob).where(MlJob.id == job_id).values(progress=3),
            execution_options={"synchronize_session": synchronize},
        )


@route("update(MlJob) by primary key", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.execute(update(MlJob), [{"id": job_id, "progress": 3}])


@route("update(MlJob).returning", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.execute(update(MlJob).values(progress=3).returning(MlJob.id)).all()


@route("Query.update", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.query(MlJob).update({"progress": 3})


@route("Query.delete", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.query(MlJob).delete()


@route("bulk_update_mappings", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.bulk_update_mappings(MlJob, [{"id": job_id, "progress": 3}])  # type: ignore[arg-type]


@route("bulk_save_objects", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    job = _load(session, job_id)
    session.expunge(job)
    job.progress = 3
    session.bulk_save_objects([job])


@route("Core update by the session", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.execute(JOBS.update().values(progress=3))


@route("Core update by the connection", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.connection().execute(JOBS.update().values(progress=3))


@route("Core executemany", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    statement = JOBS.update().where(JOBS.c.id == bindparam("key")).values(progress=bindparam("value"))
    session.connection().execute(statement, [{"key": job_id, "value": 3}, {"key": job_id, "value": 4}])


def _upsert(session: Session, target: Any, job_id: UUID) -> Any:
    maker = postgresql.insert if session.connection().dialect.name == "postgresql" else sqlite.insert
    values = {"id": job_id, "kind": "train", "target_name": "x", "status": "queued", "progress": 0, "spec_json": "{}"}
    return (
        maker(target)  # type: ignore[operator]
        .values(**values)
        .on_conflict_do_update(index_elements=["id"], set_={"progress": 9, "status": MlJobStatus.QUEUED})
    )


@route("upsert by the ORM", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.execute(_upsert(session, MlJob, job_id))


@route("upsert by Core", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.connection().execute(_upsert(session, JOBS, job_id))


@route("text()", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.execute(text("UPDATE ml_jobs SET status = 'queued'"))


@route("text() that changes nothing", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.execute(text("UPDATE ml_jobs SET progress = progress"))


@route("exec_driver_sql", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.connection().exec_driver_sql("UPDATE ml_jobs SET metrics_json = '{}'")


@route("the row's own savepoint", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    with session.begin_nested():
        session.execute(text("UPDATE ml_jobs SET finished_at = NULL"))


@route("a raw DBAPI cursor", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    driver = session.connection().connection.dbapi_connection
    assert driver is not None
    cursor = driver.cursor()
    try:
        cursor.execute("UPDATE ml_jobs SET progress = 4")
    except Exception as error:
        raise translate_error(error) or error from error


@route("the driver's own connection", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    driver: Any = session.connection().connection.driver_connection
    try:
        result = driver.execute("UPDATE ml_jobs SET progress = 4")
        if hasattr(result, "__await__"):
            await_only(result)
    except Exception as error:
        raise translate_error(error) or error from error


@route("session.delete", HOOK)
def _(session: Session, job_id: UUID) -> None:
    session.delete(_load(session, job_id))
    session.flush()


@route("delete and add in one flush", HOOK)
def _(session: Session, job_id: UUID) -> None:
    session.delete(_load(session, job_id))
    session.add(MlJob(id=job_id, kind="train", target_name="other"))
    session.flush()


@route("delete, flush, insert again", HOOK)
def _(session: Session, job_id: UUID) -> None:
    session.delete(_load(session, job_id))
    session.flush()
    session.add(MlJob(id=job_id, kind="train", target_name="other"))
    session.flush()


@route("delete(MlJob)", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.execute(delete(MlJob).where(MlJob.id == job_id))


@route("primary-key change", HOOK)
def _(session: Session, job_id: UUID) -> None:
    _load(session, job_id).id = 7  # type: ignore[assignment]
    session.flush()


@route("primary-key change by SQL", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.execute(update(MlJob).values(id=7))


@route("DML in a CTE", TRIGGER, "postgresql")
def _(session: Session, job_id: UUID) -> None:
    changed = update(MlJob).values(progress=3).returning(MlJob.id).cte("changed")
    session.execute(select(changed.c.id)).all()


@route("UPDATE from a CTE", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.execute(text("WITH c AS (SELECT 3 AS p) UPDATE ml_jobs SET progress = (SELECT p FROM c)"))


@route("UPDATE ... FROM", TRIGGER)
def _(session: Session, job_id: UUID) -> None:
    session.execute(text("UPDATE ml_jobs SET progress = s.p FROM (SELECT 3 AS p) AS s"))


@route("MERGE", TRIGGER, "postgresql")
def _(session: Session, job_id: UUID) -> None:
    session.execute(
        text("MERGE INTO ml_jobs USING (SELECT 3 AS p) s ON true WHEN MATCHED THEN UPDATE SET progress = s.p")
    )


@route("MERGE ... DELETE", TRIGGER, "postgresql")
def _(session: Session, job_id: UUID) -> None:
    session.execute(text("MERGE INTO ml_jobs USING (SELECT 3 AS p) s ON true WHEN MATCHED THEN DELETE"))


@route("UPDATE WHERE CURRENT OF a cursor", TRIGGER, "postgresql")
def _(session: Session, job_id: UUID) -> None:
    session.execute(text("DECLARE here CURSOR FOR SELECT * FROM ml_jobs FOR UPDATE"))
    session.execute(text("MOVE NEXT IN here"))
    session.execute(text("UPDATE ml_jobs SET progress = 3 WHERE CURRENT OF here"))


@route("an updatable view", TRIGGER, "postgresql")
def _(session: Session, job_id: UUID) -> None:
    session.execute(text("CREATE VIEW done AS SELECT id, progress FROM ml_jobs"))
    session.execute(text("UPDATE done SET progress = 3"))


@route("a function of one's own", TRIGGER, "postgresql")
def _(session: Session, job_id: UUID) -> None:
    session.execute(text("DO $$ BEGIN UPDATE ml_jobs SET progress = 3; END $$"))


@route("UPDATE while retention is on", TRIGGER, "postgresql")
def _(session: Session, job_id: UUID) -> None:
    session.execute(text("SET LOCAL mljobs.retention = 'on'"))
    session.execute(text("UPDATE ml_jobs SET progress = 3"))


@route("TRUNCATE", TRIGGER, "postgresql")
def _(session: Session, job_id: UUID) -> None:
    session.execute(text("TRUNCATE ml_jobs CASCADE"))


@route("INSERT OR REPLACE", TRIGGER, "sqlite")
def _(session: Session, job_id: UUID) -> None:
    session.execute(text(f"INSERT OR REPLACE INTO ml_jobs {_ROW}"))


@route("REPLACE", TRIGGER, "sqlite")
def _(session: Session, job_id: UUID) -> None:
    session.execute(text(f"REPLACE INTO ml_jobs {_ROW}"))


@route("INSERT OR REPLACE of the rowid", TRIGGER, "sqlite")
def _(session: Session, job_id: UUID) -> None:
    row = _ROW.replace("(id,", "(rowid, id,").replace(f"('{ID}'", f"(1, '{ID[:-1]}9'")
    session.execute(text(f"INSERT OR REPLACE INTO ml_jobs {row}"))


@route("UPDATE OR REPLACE of another row's key", TRIGGER, "sqlite")
def _(session: Session, job_id: UUID) -> None:
    session.execute(text(f"INSERT INTO ml_jobs {_ROW.replace(ID, ID[:-1] + '9')}"))
    session.execute(text(f"UPDATE OR REPLACE ml_jobs SET id = '{ID}' WHERE id <> '{ID}'"))


@route("UPDATE OR IGNORE", TRIGGER, "sqlite")
def _(session: Session, job_id: UUID) -> None:
    session.execute(text("UPDATE OR IGNORE ml_jobs SET progress = 3"))


@route("a trigger of one's own", TRIGGER, "sqlite")
def _(session: Session, job_id: UUID) -> None:
    session.execute(
        text("CREATE TRIGGER mine AFTER UPDATE ON ml_job_leases BEGIN UPDATE ml_jobs SET progress = 3; END")
    )
    session.execute(text("INSERT INTO ml_job_leases (worker, acquired_at, expires_at) VALUES ('w', 0, 0)"))
    session.execute(text("UPDATE ml_job_leases SET worker = 'v'"))


_ROW = (
    "(id, kind, target_name, status, progress, created_at, spec_json) "
    f"VALUES ('{ID}', 'train', 'x', 'queued', 0, 0, '[]')"
)


def _finish(session: Session) -> None:
    job = MlJob(id=ID, kind="train", target_name="spam", spec={"lr": 0.05})
    session.add(job)
    session.flush()
    job.start()
    session.flush()
    job.complete({"f1": 0.9})


def _snapshot(backend: Backend) -> list[Any]:
    with backend.outside.connect() as connection:
        rows = connection.exec_driver_sql("SELECT ml_jobs.* FROM ml_jobs ORDER BY id").all()
    return [tuple(row) for row in rows]


def test_a_finished_job_refuses_every_route(backend: Backend) -> None:
    backend.run(_finish)
    before = _snapshot(backend)
    job_id = UUID(ID)
    for name, way in ROUTES.items():

        def attempt(session: Session, way: Route = way) -> None:
            session.execute(select(func.count()).select_from(MlJob)).scalar()
            with pytest.raises(TerminalStateError), session.begin_nested():
                way.write(session, job_id)
            session.expire_all()
            session.add(MlJob(kind="train", target_name="the session goes on"))  # from the savepoint
            session.flush()
            session.rollback()
            assert session.scalars(select(MlJob)).one().status is MlJobStatus.COMPLETED  # and from the rollback

        if way.dialect in ("", backend.dialect):
            with case(name):
                backend.run(attempt)
                assert _snapshot(backend) == before


def test_the_docs_name_every_route_and_what_stops_it() -> None:
    page = (Path(__file__).parent.parent / "docs" / "guard.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) \| (?:both|PostgreSQL|SQLite) \| (.+?) \|$", page, re.MULTILINE))
    expected = {name: way.stopped_by for name, way in ROUTES.items()} | OTHER_ROUTES
    assert {name.replace("`", ""): stopped for name, stopped in rows.items()} == expected


def test_what_a_foreign_table_says_of_a_refusal_is_translated_too() -> None:
    """postgres_fdw hands on the message of the server behind it, and no name of a constraint."""
    for message, ours in ((TERMINAL_MESSAGE, TerminalStateError), (TRANSITION_MESSAGE, InvalidTransitionError)):
        behind = psycopg.errors.IntegrityConstraintViolation(f"{message}\nDETAIL:  id=1\nCONTEXT:  remote SQL command")
        assert isinstance(translate_error(behind), ours)


# -------------------------------------------------------------------------------- routes that need a stage of their own


def _spoil(backend: Backend, first: Callable[[Session], Any]) -> None:
    before = _snapshot(backend)

    def attempt(session: Session) -> None:
        with pytest.raises(TerminalStateError):
            first(session)
        session.rollback()

    backend.run(attempt)
    assert _snapshot(backend) == before


def test_a_stale_object_that_another_transaction_finished_is_refused(backend: Backend) -> None:
    backend.run(lambda session: session.add(MlJob(id=ID, kind="train", target_name="spam", status="running")))

    def stale(session: Session) -> None:
        job = session.get_one(MlJob, UUID(ID))
        session.commit()
        session.expire_on_commit = False
        job.target_name  # noqa: B018 - loads it
        session.commit()
        with backend.outside.begin() as connection:
            connection.exec_driver_sql("UPDATE ml_jobs SET status = 'cancelled'")
        finished = _snapshot(backend)
        job.progress = 60
        with pytest.raises(TerminalStateError):
            session.flush()
        session.rollback()
        assert _snapshot(backend) == finished

    backend.run(stale)


def test_a_job_completed_and_changed_again_in_one_session_is_refused(backend: Backend) -> None:
    def again(session: Session) -> None:
        job = MlJob(kind="train", target_name="spam")
        session.add(job)
        session.flush()
        job.start()
        session.flush()
        job.complete()
        session.flush()
        job.progress = 3
        with pytest.raises(TerminalStateError):
            session.flush()
        session.rollback()

    backend.run(again)


def test_make_transient_and_add_cannot_take_the_place_of_a_finished_job(backend: Backend) -> None:
    backend.run(_finish)
    before = _snapshot(backend)

    def attempt(session: Session) -> None:
        job = session.get_one(MlJob, UUID(ID))
        make_transient(job)
        job.progress = 4
        session.add(job)
        with pytest.raises(Exception, match=r"(?i)unique|duplicate|terminal"):
            session.flush()
        session.rollback()

    backend.run(attempt)
    assert _snapshot(backend) == before


def test_copy_cannot_take_the_place_of_a_finished_job(backend: Backend) -> None:
    from mljobs import jobs

    backend.run(_finish)
    before = _snapshot(backend)
    with pytest.raises(Exception, match=r"(?i)unique|duplicate|terminal"):
        backend.run(jobs.submit_many, [MlJob(id=ID, kind="train", target_name="other")])
    assert _snapshot(backend) == before


def test_a_shell_of_the_database_is_refused(backend: Backend, request: pytest.FixtureRequest) -> None:
    backend.run(_finish)
    before = _snapshot(backend)
    url = backend.outside.url
    if backend.dialect == "sqlite":
        script = f"import sqlite3; sqlite3.connect({url.database!r}).execute('UPDATE ml_jobs SET progress = 1')"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    else:
        server: Server = request.getfixturevalue("postgres_server")
        done = subprocess.run(
            [
                server.binaries / "psql", "-h", str(url.host), "-p", str(url.port), "-U", str(url.username),
                "-d", str(url.database), "-v", "ON_ERROR_STOP=1", "-c", "UPDATE ml_jobs SET status = 'queued'",
            ],
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        assert "DETAIL:  id=01890000-0000-7000-8000-000000000001 status=completed" in done.stderr
    assert done.returncode != 0
    assert "mljobs: record is in a terminal state" in done.stderr
    assert _snapshot(backend) == before


OTHER_ROUTES = {
    "stale object, finished by another transaction": TRIGGER,
    "completed and changed again in one session": HOOK,
    "make_transient and add": "primary key",
    "COPY, bulk insert of the same id": "primary key",
    "psql, a plain sqlite3 shell": TRIGGER,
    "many-to-one set, a host's foreign key": "legal: a host's own column",
    "post_update": "legal: a host's own column",
    "FK SET NULL by the database": "legal: a host's own column",
    "joined subclass": HOOK,
    "incremental blob I/O": "index that stores nothing",
    "a host's trigger that rewrites the row": "trigger, after all others",
    "a host's trigger that takes an illegal step": "trigger, after all others",
    "a view with INSTEAD OF triggers": "trigger",
    "a temporary trigger": "trigger",
    "a foreign key of ours that cascades": "trigger",
    "TRUNCATE with an old snapshot": "trigger",
    "a decoy in the search_path": "trigger",
    "a row policy that hides finished records": "trigger",
    "a DELETE after a retention block, however it was left": "trigger",
    "a copy of the table by Table.to_metadata": "trigger",
    "ON CONFLICT REPLACE, UNIQUE over our columns, a column named rowid, partitions, UNLOGGED and temporary tables": (
        "refused where the class is defined"
    ),
    "OR REPLACE of another statement, handed down to a trigger": "trigger",
    "decoys of the guard's table and of the job table, its rows renamed": "trigger",
    "CHECKs turned off, an id of another type": "trigger",
    "ATTACH of the same file": "trigger",
    "a foreign key of the host that cascades": "trigger",
    "a table of which it is made a partition, or from which it inherits": "trigger",
    "a rule, a generated column, a deferred foreign key": "trigger",
    "a trigger that writes the row before the guard looks at it": "trigger, for what had finished before the statement",
    "INSERT OR IGNORE": "legal: changes nothing",
    "ON CONFLICT DO NOTHING": "legal: changes nothing",
}


# ----------------------------------------------------------------------------------------------- what must stay legal


@pytest.fixture
def hosted(backend: Backend) -> Backend:
    HostBase.metadata.create_all(backend.outside)
    return backend


def _finish_run(session: Session, kind: type[TrainingRun] = TrainingRun) -> None:
    run = kind(id=ID, kind="train", target_name="spam", note="mine", team=Team(id=1))
    session.add(run)
    session.flush()
    run.start()
    session.flush()
    run.complete()


def test_a_hosts_own_columns_stay_writable_on_a_finished_job(hosted: Backend) -> None:
    hosted.run(_finish_run)

    def change(session: Session) -> None:
        run = session.get_one(TrainingRun, UUID(ID))
        run.note = "still mine"
        run.team = Team(id=2)  # many-to-one set
        session.flush()
        run.team.favourite = run  # post_update
        session.flush()
        session.execute(update(TrainingRun).values(note="by SQL"))

    hosted.run(change)
    with hosted.outside.begin() as connection:
        if hosted.dialect == "sqlite":
            connection.exec_driver_sql("PRAGMA foreign_keys = ON")
        connection.exec_driver_sql("UPDATE teams SET favourite_id = NULL")
        connection.exec_driver_sql("DELETE FROM teams")  # the database sets team_id to NULL
        row = connection.exec_driver_sql("SELECT note, status FROM training_runs").one()
    assert tuple(row) == ("by SQL", "completed")


def test_a_hosts_table_guards_the_record_itself(hosted: Backend) -> None:
    hosted.run(_finish_run)

    def change(session: Session) -> None:
        for statement in (update(TrainingRun).values(progress=3), delete(TrainingRun)):
            with pytest.raises(TerminalStateError), session.begin_nested():
                session.execute(statement, execution_options={"synchronize_session": False})
        run = session.get_one(TrainingRun, UUID(ID))
        run.target_name = "other"
        with pytest.raises(TerminalStateError):
            session.flush()
        session.rollback()

    hosted.run(change)


def test_a_joined_subclass_is_guarded_and_its_own_table_is_the_hosts(hosted: Backend) -> None:
    hosted.run(_finish_run, GridRun)

    def change(session: Session) -> None:
        run = session.get_one(GridRun, UUID(ID))
        run.points = 12
        session.flush()
        run.progress = 3
        with pytest.raises(TerminalStateError), session.begin_nested():
            session.flush()
        session.rollback()
        session.delete(session.get_one(GridRun, UUID(ID)))
        with pytest.raises(TerminalStateError):
            session.flush()
        session.rollback()

    hosted.run(change)


def test_an_insert_that_yields_to_a_finished_job_is_legal(backend: Backend) -> None:
    backend.run(_finish)
    before = _snapshot(backend)

    def yield_to_it(session: Session) -> None:
        if backend.dialect == "sqlite":
            session.execute(text(f"INSERT OR IGNORE INTO ml_jobs {_ROW}"))
        maker = postgresql.insert if backend.dialect == "postgresql" else sqlite.insert
        values = {"id": UUID(ID), "kind": "train", "target_name": "x", "spec_json": "{}"}
        session.execute(maker(MlJob).values(**values).on_conflict_do_nothing())  # type: ignore[operator]

    backend.run(yield_to_it)
    assert _snapshot(backend) == before


def test_replacing_a_job_that_has_not_finished_is_legal(sqlite_url: str) -> None:
    connection = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))
    for _ in range(2):
        connection.execute(f"INSERT OR REPLACE INTO ml_jobs {_ROW}")
    connection.commit()
    assert connection.execute("SELECT count(*) FROM ml_jobs").fetchone() == (1,)
    connection.close()


def test_a_finished_job_may_be_inserted(backend: Backend) -> None:
    backend.run(
        lambda session: session.execute(
            insert(MlJob).values(kind="train", target_name="old", spec_json="{}", status="failed", progress=literal(30))
        )
    )
    assert _snapshot(backend)[0][3] == "failed"


# ------------------------------------------------------------------------------------------- each ring by itself


def test_the_hooks_alone_refuse_early(backend: Backend) -> None:
    backend.run(_finish)
    with backend.outside.begin() as connection:
        for trigger in GUARD_ROLES:
            name = f"ml_jobs_guard_{trigger}"
            statement = f"DROP TRIGGER IF EXISTS {name}"
            connection.exec_driver_sql(statement + (" ON ml_jobs" if backend.dialect == "postgresql" else ""))
    before = _snapshot(backend)
    for name, way in ROUTES.items():
        if way.stopped_by == HOOK:

            def attempt(session: Session, way: Route = way) -> None:
                with pytest.raises(TerminalStateError), session.begin_nested():
                    way.write(session, UUID(ID))
                session.rollback()

            backend.run(attempt)
            assert _snapshot(backend) == before, name


PAIRS = [(old, new) for old in MlJobStatus for new in MlJobStatus if old is not new]


def _by_trigger(session: Session, job_id: UUID, new: MlJobStatus) -> None:
    session.execute(
        text("UPDATE ml_jobs SET status = :new WHERE target_name = :name"), {"new": new.token, "name": job_id.hex}
    )


def _by_hook(session: Session, job_id: UUID, new: MlJobStatus) -> None:
    session.get_one(MlJob, job_id).status = new
    session.flush()


def test_every_edge_is_judged_alike_by_hook_and_trigger(backend: Backend) -> None:
    ids = {old: uuid4() for old in MlJobStatus}
    backend.run(
        lambda session: session.add_all(
            MlJob(id=it, kind="train", target_name=it.hex, status=old) for old, it in ids.items()
        )
    )

    def attempt(session: Session, old: MlJobStatus, new: MlJobStatus, write: Callable[..., None]) -> None:
        if old.can_become(new):
            write(session, ids[old], new)
        else:
            expected = TerminalStateError if old.is_terminal else InvalidTransitionError
            with pytest.raises(expected), session.begin_nested():
                write(session, ids[old], new)
        session.rollback()

    for old, new in PAIRS:
        for write in (_by_trigger, _by_hook):
            with case(old, new, write.__name__):
                backend.run(attempt, old, new, write)
