"""With ``AsyncSession``, and a stream of server-sent events for a progress bar."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated
from uuid import UUID

from fastapi import Depends, FastAPI, Request
from fastapi.sse import EventSourceResponse
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from examples.fastapi_app.models import Base, Upload
from examples.fastapi_app.schemas import UploadCreate, UploadRead
from mljobs import AsyncJobStore, JobNotFound, MlJob, MlJobKind, schema
from mljobs.contrib.fastapi import install, responses
from mljobs.contrib.pydantic import MlJobRead


async def get_session(request: Request) -> AsyncIterator[AsyncSession]:
    """One transaction for each request: committed if the route returns, rolled back if it raises."""
    async with request.app.state.sessions.begin() as session:
        yield session


def get_store(request: Request) -> AsyncJobStore:
    """Jobs in transactions of their own, on the application's engine."""
    store: AsyncJobStore = request.app.state.store
    return store


SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]
StoreDep = Annotated[AsyncJobStore, Depends(get_store)]


async def existing(job_id: UUID, store: StoreDep) -> MlJob:
    """Return the job, or 404 before a stream begins: afterwards it is too late for a status."""
    return await store.get(job_id)


def create_app(url: str | None = None, poll: float = 0.5) -> FastAPI:
    """Return the application on a database.

    Args:
        url: With an async driver.
        poll: Seconds between two looks at a job that somebody watches.
    """
    engine = create_async_engine(url or os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///app.db"))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with engine.begin() as connection:
            await connection.run_sync(schema.upgrade)
            await connection.run_sync(Base.metadata.create_all)
        app.state.sessions = async_sessionmaker(engine, expire_on_commit=False)
        app.state.store = AsyncJobStore(engine)
        yield
        await engine.dispose()

    app = FastAPI(title="Uploads", lifespan=lifespan)
    install(app)

    @app.post("/uploads", status_code=201, responses=responses(422))
    async def upload(body: UploadCreate, session: SessionDep) -> UploadRead:
        job = MlJob(kind=MlJobKind.TRAIN, target_name=body.path, spec=body.spec)
        row = Upload(path=body.path, job=job)
        session.add(row)
        await session.flush()
        return UploadRead.model_validate(row)

    @app.get("/jobs/{job_id}", response_model=MlJobRead, responses=responses(404))
    async def read(job_id: UUID, store: StoreDep) -> MlJob:
        return await store.get(job_id)

    @app.post("/jobs/{job_id}/cancel", response_model=MlJobRead, responses=responses(404, 409))
    async def cancel(job_id: UUID, session: SessionDep) -> MlJob:
        job = await session.get(MlJob, job_id)
        if job is None:
            raise JobNotFound(job_id)
        job.cancel()
        await session.flush()
        return job

    @app.get("/jobs/{job_id}/events", response_class=EventSourceResponse, responses=responses(404))
    async def events(
        job_id: UUID, store: StoreDep, job: Annotated[MlJob, Depends(existing)]
    ) -> AsyncIterable[MlJobRead]:
        shown = None
        while True:
            if (job.status, job.progress) != shown:
                shown = job.status, job.progress
                yield MlJobRead.model_validate(job)
            if job.is_terminal:
                return
            await asyncio.sleep(poll)
            job = await store.get(job_id)

    return app


app = create_app()
