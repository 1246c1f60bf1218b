"""Autogenerate and ``alembic check`` in a host's own history: what they write, what they notice, what they leave alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.util import CommandError
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    create_engine,
    inspect,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

from mljobs import InvalidValueError, MlJob, MlJobKind, MlJobMixin, TerminalStateError, jobs, kind_column, schema
from mljobs import metadata as own_metadata
from tests.alembic_history import History

NAMING = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Kind(StrEnum):
    FIT = "fit"
    SCORE = "score"


class MoreKinds(StrEnum):
    FIT = "fit"
    SCORE = "score"
    TUNE = "it's tuned"


def models(
    kinds: type[StrEnum] = Kind, *, naming: dict[str, str] | None = None, in_schema: str | None = None
) -> tuple[Any, MetaData]:
    """Return a host's job class and its metadata, made anew as a new process would."""

    class Base(DeclarativeBase):
        metadata = MetaData(naming_convention=naming, schema=in_schema)

    class User(Base):
        __tablename__ = "users"

        id: Mapped[int] = mapped_column(primary_key=True)

    class Run(MlJobMixin, Base):
        __tablename__ = "training_runs"

        kind: Mapped[Any] = kind_column(kinds)
        owner_id: Mapped[int | None] = mapped_column(ForeignKey(User.id), index=True)

    class Backfill(MlJobMixin, Base):
        __tablename__ = "backfills"

    return Run, Base.metadata


@pytest.fixture
def empty(empty_url: str) -> Iterator[Engine]:
    engine = create_engine(empty_url, poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
def history(tmp_path: Path, empty: Engine) -> Callable[..., History]:
    return lambda metadata, **options: History(tmp_path / "alembic", empty, metadata, **options)


def stands(engine: Engine, run: Any) -> None:
    """The guard of the table holds."""
    schema.verify(engine, metadata=run.metadata)
    with Session(engine) as session:
        job: Any = jobs.submit(session, next(iter(run.__kinds__)), "x", model=run)
        job.start()
        session.flush()
        job.fail("no")
        session.commit()
        with pytest.raises(TerminalStateError):
            session.execute(text(f"UPDATE {run.__table__.fullname} SET progress = 1"))


def diffs(history: History) -> list[str]:
    with pytest.raises(CommandError) as caught:
        history.check()
    return re.findall(r"\('(\w+)'", str(caught.value))


@pytest.mark.parametrize("naming", [None, NAMING], ids=["plain", "naming"])
def test_a_job_table_is_made_with_its_guard_and_seen_as_it_is(
    history: Callable[..., History], empty: Engine, naming: dict[str, str] | None
) -> None:
    run, metadata = models(naming=naming)
    host = history(metadata)
    made = host.revision()
    compile(made, "made", "exec")
    assert "op.create_mljobs_guard('training_runs', kinds=['fit', 'score'], version=1)" in made
    assert made.count("op.create_mljobs_guard(") == made.count("op.drop_mljobs_guard(") == 2
    assert {"import mljobs.alembic_plugin", "import mljobs.types"} <= set(made.splitlines())
    assert "mljobs.types.UtcMillis('created_at')" in made
    assert "mljobs.record._models" not in made
    assert "info=" not in made
    host.upgrade()
    stands(empty, run)
    host.check()
    again = host.revision()
    assert again.count("pass") == 2
    host.downgrade("base")
    assert set(inspect(empty).get_table_names()) == {"alembic_version"}
    if empty.dialect.name == "postgresql":
        with empty.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM pg_proc WHERE proname ~ 'guard|wake'")) == 0
    host.upgrade()
    stands(empty, run)


def test_a_revision_made_on_one_database_runs_on_the_other(
    tmp_path: Path, postgres_admin: Engine, request: pytest.FixtureRequest
) -> None:
    run, metadata = models()
    sqlite = create_engine(f"sqlite:///{tmp_path / 'a.db'}", poolclass=NullPool)
    postgres_url: str = request.getfixturevalue("postgres_url")
    postgres = create_engine(postgres_url, poolclass=NullPool)
    for number, (first, second) in enumerate([(sqlite, postgres), (postgres, sqlite)]):
        host = History(tmp_path / str(number), first, metadata)
        host.migrate()
        host.downgrade("base")
        host.config.attributes["engine"] = second
        host.upgrade()
        stands(second, run)
        host.check()
        host.downgrade("base")


def test_a_revision_runs_as_a_script(history: Callable[..., History], empty: Engine) -> None:
    run, metadata = models(naming=NAMING)
    host = history(metadata)
    host.revision()
    from alembic import command

    command.upgrade(host.config, "head", sql=True)
    script = host.output.getvalue()
    driver: Any
    with empty.begin() as connection:
        connection.exec_driver_sql("DROP TABLE alembic_version")
    with empty.connect() as connection:
        driver = connection.connection.driver_connection
        if empty.dialect.name == "sqlite":
            driver.executescript(script)
        else:
            driver.autocommit = True
            driver.execute(script)
    stands(empty, run)


@pytest.mark.parametrize("harm", ["trigger", "body", "counts", "disabled", "statistics"])
def test_a_guard_that_is_lost_or_of_another_release_is_noticed_and_put_up_anew(
    history: Callable[..., History], empty: Engine, harm: str
) -> None:
    run, metadata = models()
    host = history(metadata)
    host.migrate()
    postgresql = empty.dialect.name == "postgresql"
    on = " ON training_runs" if postgresql else ""
    old_body = (
        "CREATE OR REPLACE FUNCTION training_runs_guard() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'"
        if postgresql
        else "DROP TRIGGER training_runs_guard_delete;"
        "CREATE TRIGGER training_runs_guard_delete BEFORE DELETE ON training_runs BEGIN SELECT 1; END"
    )
    statements = {
        "trigger": f"DROP TRIGGER training_runs_guard_update{on}",
        "body": old_body,
        "counts": "DROP TRIGGER training_runs_wake_insert ON training_runs"
        if postgresql
        else "DELETE FROM training_runs_counts WHERE kind = 'fit'",
        "disabled": "ALTER TABLE training_runs DISABLE TRIGGER training_runs_guard_delete"
        if postgresql
        else "UPDATE training_runs_guard SET open = 1",
        "statistics": "DROP STATISTICS training_runs_kind_status"
        if postgresql
        else "DROP TRIGGER training_runs_count_delete",
    }
    with empty.begin() as connection:
        for statement in statements[harm].split(";C"):
            connection.exec_driver_sql(statement if statement.startswith(statements[harm][:6]) else f"C{statement}")
    assert diffs(host) == ["create_mljobs_guard"]
    text_of = host.migrate()
    assert text_of.count("op.create_mljobs_guard(") == 2
    assert "drop_mljobs_guard" not in text_of
    stands(empty, run)
    host.check()
    host.downgrade()
    stands(empty, run)


@pytest.mark.parametrize("naming", [None, NAMING], ids=["plain", "naming"])
def test_a_kind_more_is_noticed_in_the_check_and_the_guard(
    history: Callable[..., History], empty: Engine, naming: dict[str, str] | None
) -> None:
    _, metadata = models(naming=naming)
    host = history(metadata, render_as_batch=naming is None or empty.dialect.name == "sqlite")
    host.migrate()
    run, metadata = models(MoreKinds, naming=naming)
    host.use(metadata)
    made = host.revision()
    assert made.count("create_check_constraint(") == made.count("drop_constraint(") == 2
    host.upgrade()
    host.check()
    stands(empty, run)
    with Session(empty) as session:
        jobs.submit(session, "it's tuned", "x", model=run)
        assert jobs.counts(session, model=run)["it's tuned", "queued"] == 1
        session.rollback()
    host.downgrade()
    old, _ = models(naming=naming)
    stands(empty, old)


def test_a_job_table_that_goes_loses_its_guard_first_and_can_come_back(
    history: Callable[..., History], empty: Engine
) -> None:
    run, metadata = models()
    host = history(metadata)
    host.migrate()
    host.use(MetaData())
    made = host.revision()
    host.upgrade()
    assert "op.drop_mljobs_guard('training_runs')" in made
    assert "training_runs_counts" not in made
    assert set(inspect(empty).get_table_names()) == {"alembic_version"}
    host.downgrade()
    with Session(empty) as session:
        job: Any = jobs.submit(session, "fit", "x", model=run)
        job.cancel()
        session.flush()
        with pytest.raises(TerminalStateError):
            session.execute(text("DELETE FROM training_runs"))


def test_a_job_table_that_goes_takes_its_view_along_and_comes_back_whole(
    history: Callable[..., History], empty: Engine
) -> None:
    class Base(DeclarativeBase):
        pass

    class Run(MlJobMixin, Base):
        __tablename__ = "training_runs"
        __overview_name__ = "Training seen"
        __overview_columns__ = ("owner",)
        owner: Mapped[str | None]
        __table_args__ = (CheckConstraint("kind <> 'a rule' OR target_name <> 'x'", name="a_rule"),)

        kind: Mapped[Kind] = kind_column(Kind)

    host = history(Base.metadata)
    host.migrate()
    host.use(MetaData())
    made = host.migrate()
    before, after = made.split("def downgrade")
    dropped = "op.drop_mljobs_overview('Training seen', 'training_runs', 'training_runs_leases')"
    assert before.index(dropped) < before.index("op.drop_table(")
    again = (
        "'Training seen', 'training_runs', 'training_runs_leases', workers='training_runs_workers', columns=['owner'])"
    )
    assert f"op.create_mljobs_overview({again}" in after
    assert "kinds=['fit', 'score']" in after
    assert set(inspect(empty).get_table_names()) == {"alembic_version"}
    assert not inspect(empty).get_view_names()
    host.downgrade()
    schema.verify(empty, metadata=Base.metadata)
    stands(empty, Run)


def test_a_view_stays_beside_tables_that_are_rebuilt_or_renamed(history: Callable[..., History], empty: Engine) -> None:
    def seen(table: str, leases: str, **columns: Any) -> Any:
        class Base(DeclarativeBase):
            pass

        names = {"__tablename__": table, "__lease_tablename__": leases, "__overview_name__": "seen"}
        return type("Run", (MlJobMixin, Base), {**names, **columns})

    steps = [
        seen("runs", "held", points=mapped_column(Integer)),
        seen("runs", "held", points=mapped_column(BigInteger)),
        seen("runs", "leased", points=mapped_column(BigInteger)),
        seen("fits", "fits_held"),
    ]
    host = history(steps[0].metadata)
    for run in steps:
        host.use(run.metadata)
        host.migrate()
        host.check()
        schema.verify(empty, metadata=run.metadata)
        with empty.connect() as connection:
            connection.execute(text("SELECT * FROM seen"))
    for run in reversed(steps[:-1]):
        host.downgrade()
        schema.verify(empty, metadata=run.metadata)


def test_kinds_that_look_like_parameters_are_written_as_they_are(
    history: Callable[..., History], empty: Engine
) -> None:
    fewer = StrEnum("fewer", {"FIT": ":fit"})
    more = StrEnum("more", {"FIT": ":fit", "LATER": "x :y", "PERCENT": "50%"})
    host = history(models(fewer)[1])
    host.migrate()
    host.check()
    run, metadata = models(more)
    host.use(metadata)
    host.migrate()
    host.check()
    stands(empty, run)
    host.downgrade()
    stands(empty, models(fewer)[0])


def test_a_history_of_its_own_never_drops_what_our_migrations_made(
    history: Callable[..., History], empty: Engine
) -> None:
    schema.upgrade(empty)
    _, metadata = models()
    host = history(metadata)
    made = host.migrate()
    assert "ml_jobs" not in made
    assert "ml_job_leases" not in made
    assert "mljobs_alembic_version" not in made
    host.check()
    schema.verify(empty)
    host.downgrade("base")
    schema.verify(empty)


def test_autogenerate_says_nothing_of_what_it_leaves_alone(
    history: Callable[..., History], empty: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    schema.upgrade(empty)
    _, metadata = models()
    host = history(metadata)
    host.migrate()
    caplog.clear()
    with caplog.at_level("INFO"):
        host.check()
    assert [record.getMessage() for record in caplog.records if "removed" in record.getMessage()] == []
    with caplog.at_level("INFO"):
        host.use(MetaData())
        host.migrate()
    said = [record.getMessage() for record in caplog.records if "Detected removed" in record.getMessage()]
    assert any("backfills" in line for line in said)
    assert not [line for line in said if "ml_job" in line or "_guard" in line or "_counts" in line]
    schema.verify(empty)


def test_our_own_models_in_a_hosts_metadata_list_are_made_like_its_own(
    history: Callable[..., History], empty: Engine
) -> None:
    _, metadata = models()
    host = history([metadata, own_metadata])
    made = host.migrate()
    assert "op.create_mljobs_guard('ml_jobs'" in made
    assert str([kind.value for kind in MlJobKind]) in made
    assert "create_mljobs_overview('ml_jobs_overview', 'ml_jobs', 'ml_job_leases', workers='ml_job_workers')" in made
    schema.verify(empty)
    host.check()
    host.downgrade()
    with empty.connect() as connection:
        assert inspect(connection).get_view_names() == []
    command.upgrade(host.config, "head")
    schema.verify(empty)
    with empty.begin() as connection:
        connection.exec_driver_sql("DROP VIEW ml_jobs_overview")
    assert "op.create_mljobs_overview" in host.migrate()
    schema.verify(empty)


@pytest.mark.parametrize("empty_url", ["sqlite"], indirect=True)
def test_a_batch_that_rebuilds_a_table_keeps_guard_order_and_tokens(
    history: Callable[..., History], empty: Engine
) -> None:
    run, metadata = models()
    host = history(metadata)
    host.migrate()
    with Session(empty) as session:
        for _ in range(3):
            jobs.submit(session, "fit", "x", model=run)
            (claim,) = jobs.claim(session, worker="w", model=run)
            jobs.complete(session, claim)
        session.commit()
    with empty.begin() as connection:
        operations = Operations(MigrationContext.configure(connection))
        for table in ("training_runs", "training_runs_leases"):
            with operations.batch_alter_table(table, recreate="always") as batch:
                batch.add_column(Column("remark", Integer))
            with operations.batch_alter_table(table) as batch:
                batch.drop_column("remark")
    stands(empty, run)
    host.check()
    with Session(empty) as session:
        assert jobs.counts(session, model=run)["fit", "completed"] == 3
        jobs.submit(session, "fit", "x", model=run)
        (after,) = jobs.claim(session, worker="w", model=run)
        assert after.token > claim.token


@pytest.mark.parametrize("empty_url", ["sqlite"], indirect=True)
def test_what_a_rebuild_by_hand_loses_is_noticed(history: Callable[..., History], empty: Engine) -> None:
    run, metadata = models()
    host = history(metadata)
    host.migrate()
    with empty.begin() as connection:
        (definition,) = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = 'training_runs'").one()
        indexes = connection.exec_driver_sql(
            "SELECT sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'training_runs' AND sql IS NOT NULL"
        ).scalars()
        statements = [statement.replace(" DESC", "") for statement in indexes]
        connection.exec_driver_sql(definition.replace("training_runs (", "copy (", 1))
        connection.exec_driver_sql("DROP TABLE training_runs")
        connection.exec_driver_sql("ALTER TABLE copy RENAME TO training_runs")
        for statement in statements:
            connection.exec_driver_sql(statement)
    found = diffs(host)
    assert found.count("create_mljobs_guard") == 1
    assert found.count("add_index") == 2
    host.migrate()
    host.check()
    stands(empty, run)


def test_the_comparison_can_be_turned_off(history: Callable[..., History], empty: Engine) -> None:
    _, metadata = models()
    host = history(metadata)
    host.migrate()
    on = " ON training_runs" if empty.dialect.name == "postgresql" else ""
    with empty.begin() as connection:
        connection.exec_driver_sql(f"DROP TRIGGER training_runs_guard_update{on}")
    own = {"training_runs_guard", "training_runs_counts", "backfills_guard", "backfills_counts"}
    host.config.attributes["options"].update(
        autogenerate_plugins=["alembic.autogenerate.*", "~mljobs"],
        include_object=lambda _, name, kind, *__: (kind, name) != ("column", "token"),  # SQLite has no IDENTITY
        include_name=lambda name, kind, _: name not in own and not (kind == "index" and name.endswith("_guard_blobs")),
    )
    host.check()


def test_what_an_environment_filters_out_is_not_compared(history: Callable[..., History], empty: Engine) -> None:
    _, metadata = models()
    host = history(metadata)
    host.migrate()
    on = " ON training_runs" if empty.dialect.name == "postgresql" else ""
    with empty.begin() as connection:
        connection.exec_driver_sql(f"DROP TRIGGER training_runs_guard_update{on}")
    options = host.config.attributes["options"]
    options["include_object"] = lambda _, name, kind, *__: kind != "table" or name != "training_runs"
    host.check()


def test_a_hosts_own_rendering_goes_first(history: Callable[..., History]) -> None:
    _, metadata = models()

    def render_item(kind: str, item: Any, _context: Any) -> Any:
        return "sa.BLOB()" if kind == "type" and type(item).__name__ == "JsonText" else False

    host = history(
        metadata, render_item=render_item, alembic_module_prefix="alembic.op.", sqlalchemy_module_prefix="x."
    )
    made = host.revision()
    assert "x.Column('spec_json', sa.BLOB()" in made
    assert "alembic.op.create_mljobs_guard(" in made
    assert "x.String(length=32)" in made


def test_a_schema_of_its_own(history: Callable[..., History], request: pytest.FixtureRequest, empty: Engine) -> None:
    if empty.dialect.name == "sqlite":
        from sqlalchemy import event

        path = Path(str(empty.url.database)).parent / "tenant.db"
        event.listen(empty, "connect", lambda raw, _: raw.execute(f"ATTACH '{path}' AS tenant"))
    else:
        with empty.begin() as connection:
            connection.exec_driver_sql("CREATE SCHEMA tenant")
    run, metadata = models(in_schema="tenant")
    host = history(metadata, include_schemas=True)
    made = host.migrate()
    assert "op.create_mljobs_guard('training_runs', schema='tenant', kinds=['fit', 'score'], version=1)" in made
    assert "op.drop_mljobs_guard('training_runs', schema='tenant')" in made
    stands(empty, run)
    host.check()
    with empty.begin() as connection:
        connection.exec_driver_sql(
            "DROP TRIGGER tenant.training_runs_guard_update"
            if empty.dialect.name == "sqlite"
            else "DROP TRIGGER training_runs_guard_update ON tenant.training_runs"
        )
    assert diffs(host) == ["create_mljobs_guard"]
    host.migrate()
    stands(empty, run)
    host.downgrade("base")
    assert not inspect(empty).get_table_names(schema="tenant")


def test_a_table_is_renamed_with_its_guard(history: Callable[..., History], empty: Engine) -> None:
    _, metadata = models()
    host = history(metadata)
    host.migrate()
    with empty.begin() as connection:
        operations: Any = Operations(MigrationContext.configure(connection))
        operations.drop_mljobs_guard("backfills")
        operations.rename_table("backfills", "refills")
        operations.create_mljobs_guard("refills", kinds=[kind.value for kind in MlJobKind])
        with pytest.raises(TerminalStateError), connection.begin_nested():
            connection.execute(
                text(
                    "INSERT INTO refills (id, kind, target_name, status, progress, created_at, spec_json)"
                    f" VALUES ('{'0' * 32}', 'train', 'x', 'failed', 0, :now, '{{}}')"
                ),
                {"now": "2026-01-01" if empty.dialect.name == "postgresql" else 0},
            )
            connection.execute(text("DELETE FROM refills"))


def documented(line: str) -> str:
    """Return the block of docs/migrations.md in which a line stands."""
    page = (Path(__file__).parent.parent / "docs" / "migrations.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if line in block]
    return str(block)


def upgrade_by(block: str, connection: Connection) -> None:
    names: dict[str, Any] = {}
    with Operations.context(MigrationContext.configure(connection)):
        exec(block, names)
        names["upgrade"]()


def test_the_documented_way_to_rename_a_table_leaves_nothing_to_verify(
    history: Callable[..., History], empty: Engine
) -> None:
    def named(table: str) -> Any:
        class Base(DeclarativeBase):
            pass

        kind = kind_column(StrEnum("Kinds", {"TRAIN": "train", "TUNE": "tune"}))
        names = {"__tablename__": table, "__overview_name__": "training_overview", "kind": kind}
        return type("Run", (MlJobMixin, Base), {**names, "__annotations__": {"kind": Mapped[Any]}})

    old, new = named("training_runs"), named("fits")
    host = history(old.metadata)
    host.migrate()
    with empty.begin() as connection:
        upgrade_by("from alembic import op\n" + documented('op.rename_table("training_runs", "fits")'), connection)
    host.use(new.metadata)
    made = host.migrate()
    assert "create_table" not in made
    host.check()
    stands(empty, new)


@pytest.mark.parametrize(
    "change",
    [
        'batch.add_column(sa.Column("note", sa.String))',
        'batch.alter_column("error_message", existing_type=sa.Text, comment="why")',
        'batch.create_check_constraint("ck_host", "attempts < 1000")',
    ],
)
def test_the_documented_batch_runs_on_both(empty: Engine, change: str) -> None:
    schema.upgrade(empty)
    block = documented("op.batch_alter_table")
    assert "\n        pass " in block
    with empty.begin() as connection:
        upgrade_by("import sqlalchemy as sa\n" + block.replace("        pass ", f"        {change} "), connection)
    schema.verify(empty)
    stands(empty, MlJob)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"kinds": ["a"], "version": 99}, "version"),
        ({"kinds": "train"}, "kinds"),
        ({"kinds": [1]}, "kinds"),
        ({"kinds": []}, "kinds"),
        ({"kinds": None}, "kinds"),
    ],
)
def test_what_no_guard_can_be_made_of_is_refused(arguments: dict[str, Any], field: str) -> None:
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        operations: Any = Operations(MigrationContext.configure(connection))
        with pytest.raises(InvalidValueError) as caught:
            operations.create_mljobs_guard("x", **arguments)
    assert caught.value.field == field
    engine.dispose()
    other: Any = Operations(MigrationContext.configure(dialect_name="mysql", opts={"as_sql": True}))
    with pytest.raises(InvalidValueError, match="mysql"):
        other.create_mljobs_guard("x", kinds=["a"])


def test_the_text_of_a_version_never_changes() -> None:
    """Migrations of hosts name it. A text that must change gets a new GUARD_VERSION, and the old one stays to be made."""
    from hashlib import sha256

    from mljobs.alembic_plugin._operations import CreateMljobsGuardOp
    from mljobs.guards._companions import GUARD_VERSION

    operation = CreateMljobsGuardOp("training_runs", kinds=["fit"], version=1)
    digests = {}
    for dialect, driver in (("postgresql", "postgresql+psycopg"), ("sqlite", "sqlite")):
        lines = [
            str(statement.compile(dialect=create_engine(f"{driver}://").dialect))
            for statement in operation.statements(dialect, create=True)
        ]
        digests[dialect] = sha256("\n".join(lines).encode()).hexdigest()[:16]
    assert (GUARD_VERSION, digests) == (1, {"postgresql": "dbde73da4c1276b6", "sqlite": "1b76809ad54077a2"})
