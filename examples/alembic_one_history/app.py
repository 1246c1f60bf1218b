"""Uploads, each with the job that works on it: both rows, or neither."""

from __future__ import annotations

import os
from uuid import UUID

from sqlalchemy import ForeignKey, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from mljobs import MlJob, jobs

URL = os.environ.get("DATABASE_URL", "sqlite:///app.db")


class Base(DeclarativeBase):
    """The application's own tables."""


class Upload(Base):
    """A file that somebody has sent."""

    __tablename__ = "uploads"

    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str]
    job_id: Mapped[UUID] = mapped_column(ForeignKey(MlJob.id), index=True)
    job: Mapped[MlJob] = relationship(MlJob)


def main() -> None:
    """Upload a file, do its job, and show both."""
    engine = create_engine(URL)
    with Session(engine) as session, session.begin():
        job = jobs.submit(session, "backfill", "embeddings", {"path": "emails.csv"})
        session.add(Upload(path="emails.csv", job=job))
    with Session(engine) as session:
        (claim,) = jobs.claim(session, worker="example")
        jobs.complete(session, claim, {"rows": 3})
        session.commit()
        for upload in session.scalars(select(Upload)):
            print(upload.path, upload.job.status, upload.job.metrics)
    engine.dispose()


if __name__ == "__main__":
    main()
