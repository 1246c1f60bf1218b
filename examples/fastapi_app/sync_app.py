"""With blocking sessions."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated
from uuid import UUID

from fastapi import Depends, FastAPI, Request
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

from examples.fastapi_app.models import Base, Upload
from examples.fastapi_app.schemas import UploadCreate, UploadRead
from mljobs import MlJob, MlJobKind, jobs, schema
from mljobs.contrib.fastapi import install, responses
from mljobs.contrib.pydantic import MlJobRead


def get_session(request: Request) -> Iterator[Session]:
    """One transaction for each request: committed if the route returns, rolled back if it raises."""
    with request.app.state.sessions.begin() as session:
        yield session


# scope="function": the commit, and with it the guard, has its say before the answer leaves. See trap.py.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]


def create_app(url: str | None = None) -> FastAPI:
    """Return the application on a database."""
    engine = create_engine(url or os.environ.get("DATABASE_URL", "sqlite:///app.db"))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        schema.upgrade(engine)  # or in your deployment: mljobs upgrade --url ...
        Base.metadata.create_all(engine)  # or your own Alembic
        app.state.sessions = sessionmaker(engine, expire_on_commit=False)
        yield
        engine.dispose()

    app = FastAPI(title="Uploads", lifespan=lifespan)
    install(app)  # TerminalStateError -> 409, JobNotFound -> 404 ... as problem+json

    @app.post("/uploads", status_code=201, responses=responses(422))
    def upload(body: UploadCreate, session: SessionDep) -> UploadRead:
        job = MlJob(kind=MlJobKind.TRAIN, target_name=body.path, spec=body.spec)
        row = Upload(path=body.path, job=job)
        session.add(row)  # both or neither
        session.flush()
        return UploadRead.model_validate(row)

    @app.get("/jobs/{job_id}", response_model=MlJobRead, responses=responses(404))
    def read(job_id: UUID, session: SessionDep) -> MlJob:
        return jobs.get(session, job_id)

    @app.post("/jobs/{job_id}/cancel", response_model=MlJobRead, responses=responses(404, 409))
    def cancel(job_id: UUID, session: SessionDep) -> MlJob:
        job = jobs.get(session, job_id)
        job.cancel()  # TerminalStateError if it has finished: 409
        session.flush()
        return job

    return app


app = create_app()
