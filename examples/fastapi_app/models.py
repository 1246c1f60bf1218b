"""The application's own tables."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from mljobs import MlJob


class Base(DeclarativeBase):
    """Of the application; mljobs has a base, and a migration history, of its own."""


class Upload(Base):
    """A file that a user sent, and the job that trains on it."""

    __tablename__ = "uploads"

    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str]
    job_id: Mapped[UUID] = mapped_column(ForeignKey(MlJob.id))
    job: Mapped[MlJob] = relationship(MlJob, lazy="raise_on_sql")
