"""The trap: advanced-alchemy's ``autocommit``, which commits when the answer leaves, and hides a commit that fails.

The guard refuses the commit because the job has finished meanwhile; the plugin logs that at DEBUG; the client reads 201, and
nothing was written.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from advanced_alchemy.extensions.litestar import SQLAlchemyPlugin, SQLAlchemySyncConfig
from litestar import Litestar, post
from litestar.di import NamedDependency
from litestar.params import FromPath
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from mljobs import jobs
from mljobs.contrib.litestar import MlJobsPlugin


def create_app(engine: Engine, meanwhile: Callable[[UUID], None]) -> Litestar:
    """Return an application with one route written both ways.

    Args:
        engine: On the database.
        meanwhile: What another process does to the job between the handler's read and its commit.
    """

    def note(job_id: UUID, session: Session) -> None:
        job = jobs.get(session, job_id)
        meanwhile(job_id)
        job.progress = 50

    @post("/trapped/{job_id:uuid}", sync_to_thread=True)
    def trapped(job_id: FromPath[UUID], db_session: NamedDependency[Session]) -> int:
        note(job_id, db_session)
        return 50

    @post("/safe/{job_id:uuid}", sync_to_thread=True)
    def safe(job_id: FromPath[UUID], db_session: NamedDependency[Session]) -> int:
        note(job_id, db_session)
        db_session.commit()
        return 50

    config = SQLAlchemySyncConfig(engine_instance=engine, before_send_handler="autocommit")
    return Litestar([trapped, safe], plugins=[SQLAlchemyPlugin(config), MlJobsPlugin()], logging_config=None)
