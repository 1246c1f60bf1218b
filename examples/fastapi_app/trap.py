"""The trap: a dependency that commits after its ``yield``, with the scope that FastAPI gives it by default.

With the default scope FastAPI runs what follows the ``yield`` after the answer has left. A commit that the guard refuses,
because the job has finished meanwhile, then raises where nobody listens: the client reads 200, and nothing was written.
"""

from collections.abc import Callable, Iterator
from typing import Annotated
from uuid import UUID

from fastapi import Depends, FastAPI
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from mljobs import jobs
from mljobs.contrib.fastapi import install


def create_app(engine: Engine, meanwhile: Callable[[UUID], None]) -> FastAPI:
    """Return an application with one route written both ways.

    Args:
        engine: On the database.
        meanwhile: What another process does to the job between the route's read and its commit.
    """
    app = FastAPI()
    install(app)

    def get_session() -> Iterator[Session]:
        with Session(engine) as session, session.begin():
            yield session

    def note(job_id: UUID, session: Session) -> int:
        job = jobs.get(session, job_id)
        meanwhile(job_id)
        job.progress = 50  # written by the commit, not here
        return 50

    @app.post("/trapped/{job_id}")
    def trapped(job_id: UUID, session: Annotated[Session, Depends(get_session)]) -> int:
        return note(job_id, session)

    @app.post("/safe/{job_id}")
    def safe(job_id: UUID, session: Annotated[Session, Depends(get_session, scope="function")]) -> int:
        return note(job_id, session)

    return app
