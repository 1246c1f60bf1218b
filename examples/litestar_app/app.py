"""With advanced-alchemy's plugin."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from advanced_alchemy.extensions.litestar import AsyncSessionConfig, SQLAlchemyAsyncConfig, SQLAlchemyPlugin
from litestar import Litestar, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from pydantic import BaseModel, ConfigDict
from sqlalchemy import ForeignKey
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from mljobs import JobNotFound, MlJob, schema
from mljobs.contrib.litestar import MlJobsPlugin
from mljobs.contrib.pydantic import MlJobRead


class Base(DeclarativeBase):
    """Of the application."""


class Upload(Base):
    """A file that a user sent, and the job that trains on it."""

    __tablename__ = "uploads"

    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str]
    job_id: Mapped[UUID] = mapped_column(ForeignKey(MlJob.id))
    job: Mapped[MlJob] = relationship(MlJob, lazy="raise_on_sql")


class UploadCreate(BaseModel):
    """A file to train on."""

    path: str
    spec: dict[str, Any]


class UploadRead(BaseModel):
    """The file and its job."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    path: str
    job: MlJobRead


@post("/uploads")
async def upload(data: JSONBody[UploadCreate], db_session: NamedDependency[AsyncSession]) -> UploadRead:
    """Keep the file and queue its training: both or neither."""
    job = MlJob(kind="train", target_name=data.path, spec=data.spec)
    row = Upload(path=data.path, job=job)
    db_session.add(row)
    await db_session.commit()  # here: what the plugin commits for you may fail unheard, see trap.py
    return UploadRead.model_validate(row)


async def existing(db_session: AsyncSession, job_id: UUID) -> MlJob:
    """Return the job."""
    job = await db_session.get(MlJob, job_id)
    if job is None:
        raise JobNotFound(job_id)
    return job


@get("/jobs/{job_id:uuid}")
async def read(job_id: FromPath[UUID], db_session: NamedDependency[AsyncSession]) -> MlJobRead:
    """Return the job; JobNotFound is a 404."""
    return MlJobRead.model_validate(await existing(db_session, job_id))


@post("/jobs/{job_id:uuid}/cancel", status_code=200)
async def cancel(job_id: FromPath[UUID], db_session: NamedDependency[AsyncSession]) -> MlJobRead:
    """Cancel the job; TerminalStateError is a 409."""
    job = await existing(db_session, job_id)
    job.cancel()
    await db_session.commit()
    return MlJobRead.model_validate(job)


def create_app(url: str | None = None) -> Litestar:
    """Return the application on a database."""
    config = SQLAlchemyAsyncConfig(
        connection_string=url or os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///app.db"),
        metadata=Base.metadata,
        session_config=AsyncSessionConfig(expire_on_commit=False),
    )

    @asynccontextmanager
    async def lifespan(_app: Litestar) -> AsyncIterator[None]:
        engine = config.get_engine()
        async with engine.begin() as connection:
            await connection.run_sync(schema.upgrade)  # or in your deployment: mljobs upgrade --url ...
            await connection.run_sync(Base.metadata.create_all)  # or advanced-alchemy's migrations
        yield
        await engine.dispose()

    return Litestar(
        [upload, read, cancel],
        plugins=[SQLAlchemyPlugin(config), MlJobsPlugin()],
        lifespan=[lifespan],
        logging_config=None,  # as the server has it
    )
