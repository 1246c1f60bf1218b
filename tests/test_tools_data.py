"""pandas, polars and DuckDB read the tables as they stand, and sqlacodegen writes models of them that work."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, String, cast, create_engine, func, select
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import MlJob, MlJobStatus
from tests.backends import Backend

COLUMNS = [column.name for column in MlJob.__table__.columns]


def _jobs(session: Session) -> tuple[UUID, UUID]:
    """Add a completed job and a queued one that does it again; return their ids."""
    done = MlJob(kind="train", target_name="spam", spec={"lr": 0.1})
    done.start()
    done.complete({"f1": 0.5})
    queued = MlJob(kind="train", target_name="ham", retry_of=done.id)
    session.add_all([done, queued])
    session.commit()
    return done.id, queued.id


@pytest.fixture
def ids(engine: Engine) -> tuple[UUID, UUID]:
    with Session(engine) as session:
        return _jobs(session)


def _driver_url(engine: Engine) -> str:
    """Return the URL as other programs write it."""
    return engine.url.set(drivername=engine.url.get_backend_name()).render_as_string(hide_password=False)


# -------------------------------------------------------------------------------------------------------------- pandas


def test_pandas_reads_records_with_their_types(engine: Engine, ids: tuple[UUID, UUID]) -> None:
    import pandas as pd

    frame = pd.read_sql(select(MlJob).order_by(MlJob.id), engine)
    assert list(frame.columns) == COLUMNS
    assert list(frame["id"]) == list(ids)
    assert list(frame["status"]) == ["completed", "queued"]
    for column in ("created_at", "started_at", "finished_at"):
        assert isinstance(frame[column].dtype, pd.DatetimeTZDtype)
    assert frame["finished_at"].isna().tolist() == [False, True]
    assert json.loads(frame["metrics_json"][0]) == {"f1": 0.5}


def test_pandas_reads_what_a_query_works_out(engine: Engine, ids: tuple[UUID, UUID]) -> None:
    import pandas as pd

    took = (MlJob.finished_at - MlJob.started_at).label("took")
    frame = pd.read_sql(select(MlJob.target_name, MlJob.metric("f1").label("f1"), took).order_by("f1"), engine)
    assert frame["f1"].dropna().tolist() == [0.5]
    assert pd.api.types.is_timedelta64_dtype(frame["took"])


def test_pandas_reads_through_an_async_engine(backend: Backend) -> None:
    import pandas as pd

    backend.run(_jobs)
    if isinstance(backend.engine, AsyncEngine):

        async def read() -> pd.DataFrame:
            assert isinstance(backend.engine, AsyncEngine)
            async with backend.engine.connect() as connection:
                return await connection.run_sync(lambda sync: pd.read_sql(select(MlJob), sync))

        frame = backend.wait(read())
    else:
        frame = pd.read_sql(select(MlJob), backend.engine)
    assert set(frame["target_name"]) == {"spam", "ham"}


def test_pandas_reads_the_view_by_name(engine: Engine, ids: tuple[UUID, UUID]) -> None:
    import pandas as pd

    frame = pd.read_sql("SELECT * FROM ml_jobs_overview ORDER BY id", engine)
    assert list(frame["target_name"]) == ["spam", "ham"]
    assert {"age", "duration", "stuck", "note"} <= set(frame.columns)


# -------------------------------------------------------------------------------------------------------------- polars


def test_polars_reads_records_with_their_types(engine: Engine, ids: tuple[UUID, UUID]) -> None:
    import polars as pl

    columns: list[Any] = [column for column in MlJob.__table__.columns if column.name not in ("id", "retry_of")]
    statement = select(cast(MlJob.id, String).label("id"), *columns).order_by(MlJob.id)
    with engine.connect() as connection:
        frame = pl.read_database(statement, connection)
        whole = pl.read_database(select(MlJob), connection)
    assert [UUID(text) for text in frame["id"]] == list(ids)
    assert frame["status"].to_list() == ["completed", "queued"]
    assert frame.schema["created_at"] == frame.schema["finished_at"] == pl.Datetime("us", "UTC")
    assert whole.columns == COLUMNS


def test_polars_reads_by_adbc(engine: Engine, ids: tuple[UUID, UUID]) -> None:
    import polars as pl

    frame = pl.read_database_uri("SELECT * FROM ml_jobs ORDER BY id", _driver_url(engine), engine="adbc")
    assert frame.columns == COLUMNS
    first = frame["id"][0]
    assert (UUID(bytes=first) if isinstance(first, bytes) else UUID(first)) == ids[0]
    assert frame["status"].to_list() == ["completed", "queued"]


def test_polars_reads_by_connectorx(engine: Engine, ids: tuple[UUID, UUID]) -> None:
    import polars as pl

    frame = pl.read_database_uri("SELECT * FROM ml_jobs ORDER BY id", _driver_url(engine), engine="connectorx")
    assert frame.columns == COLUMNS
    assert UUID(frame["id"][0]) == ids[0]
    assert frame["status"].to_list() == ["completed", "queued"]


# -------------------------------------------------------------------------------------------------------------- DuckDB


def test_duckdbs_postgres_reader_attaches_the_database(postgres_url: str) -> None:
    import duckdb

    """The extension comes from a wheel: DuckDB would fetch it from the network."""
    engine = create_engine(postgres_url, poolclass=NullPool)
    with Session(engine) as session:
        done, _ = _jobs(session)
        ended = session.get_one(MlJob, done).finished_at_ms
    spec = find_spec("duckdb_extension_postgres_scanner")
    assert spec is not None
    assert spec.submodule_search_locations
    (extension,) = Path(spec.submodule_search_locations[0]).glob(f"extensions/v{duckdb.__version__}/*.duckdb_extension")
    with duckdb.connect() as duck:
        duck.execute(f"LOAD '{extension}'")
        duck.execute(f"ATTACH '{_driver_url(engine)}' AS jobs (TYPE postgres, READ_ONLY)")
        rows = duck.execute(
            "SELECT id, epoch_ms(finished_at), CAST(json_extract(metrics_json, '$.f1') AS DOUBLE) FROM jobs.ml_jobs"
            " WHERE status = 'completed'"
        ).fetchall()
        assert [row[0] for row in rows] == [done]
        assert rows[0][1] == ended
        assert rows[0][2] == 0.5
        by_status = "SELECT status, count(*) FROM jobs.ml_jobs_overview GROUP BY status ORDER BY status"
        assert duck.execute(by_status).fetchall() == [("completed", 1), ("queued", 1)]
        with pytest.raises(duckdb.Error, match="read-only"):
            duck.execute("UPDATE jobs.ml_jobs SET progress = 1")


def test_duckdb_that_may_write_is_stopped_by_the_guard(postgres_url: str) -> None:
    import duckdb

    engine = create_engine(postgres_url, poolclass=NullPool)
    with Session(engine) as session:
        _jobs(session)
    spec = find_spec("duckdb_extension_postgres_scanner")
    assert spec is not None
    assert spec.submodule_search_locations
    (extension,) = Path(spec.submodule_search_locations[0]).glob(f"extensions/v{duckdb.__version__}/*.duckdb_extension")
    with duckdb.connect() as duck:
        duck.execute(f"LOAD '{extension}'")
        duck.execute(f"ATTACH '{_driver_url(engine)}' AS jobs (TYPE postgres)")
        with pytest.raises(duckdb.Error, match="mljobs: record is in a terminal state"):
            duck.execute("UPDATE jobs.ml_jobs SET progress = 1")


# --------------------------------------------------------------------------------------------------------- sqlacodegen


def test_sqlacodegens_models_compile_and_round_trip_a_row(
    engine: Engine, ids: tuple[UUID, UUID], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typeguard.typechecked", lambda checked: checked)  # or to import a dependency takes seconds
    from sqlacodegen import cli

    path = tmp_path / "reflected.py"
    arguments = ["--outfile", str(path), engine.url.render_as_string(hide_password=False)]
    if engine.dialect.name == "sqlite":  # sqlacodegen 4.0.4 writes the condition of a partial index without quotes
        arguments = ["--options", "noindexes", *arguments]
    monkeypatch.setattr(sys, "argv", ["sqlacodegen", *arguments])
    monkeypatch.setattr(cli, "create_engine", lambda _url: engine)  # its own would not be closed
    cli.main()
    spec = spec_from_file_location("reflected", path)
    assert spec is not None
    assert spec.loader is not None
    reflected: Any = module_from_spec(spec)
    spec.loader.exec_module(reflected)
    for name in ("MlJobs", "MlJobLeases"):
        assert hasattr(reflected, name), path.read_text()
    with Session(engine) as session:
        keys = {ids[0], ids[0].hex, str(ids[0])}
        (found,) = (row for row in session.scalars(select(reflected.MlJobs)) if row.id in keys)
        assert (found.status, found.target_name, found.progress) == ("completed", "spam", 100)
        (queued,) = (row for row in session.scalars(select(reflected.MlJobs)) if row.status == "queued")
        copied = {column.name: getattr(queued, column.name) for column in reflected.MlJobs.__table__.columns}
        new = MlJob(kind="train", target_name="x").id
        copied["id"] = new if isinstance(queued.id, UUID) else new.hex
        copied["target_name"] = "copied"
        session.add(reflected.MlJobs(**copied))
        session.commit()
        copy = session.get_one(MlJob, new)
        assert (copy.target_name, copy.status, copy.spec) == ("copied", MlJobStatus.QUEUED, {})
        assert session.scalar(select(func.count()).select_from(MlJob)) == 3
