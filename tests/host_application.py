"""A host application's own tables around a job table of its own, for routes that need them."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from mljobs import MlJobMixin


class HostBase(DeclarativeBase):
    """The host's declarative base."""


class Team(HostBase):
    """Owns runs."""

    __tablename__ = "teams"

    id: Mapped[int] = mapped_column(primary_key=True)
    favourite_id: Mapped[UUID | None] = mapped_column(ForeignKey("training_runs.id", use_alter=True))
    runs: Mapped[list[TrainingRun]] = relationship(back_populates="team", foreign_keys="TrainingRun.team_id")
    favourite: Mapped[TrainingRun | None] = relationship(foreign_keys=[favourite_id], post_update=True)


class TrainingRun(MlJobMixin, HostBase):
    """A job in the host's own table, with columns of the host's."""

    __tablename__ = "training_runs"
    __mapper_args__ = {"polymorphic_identity": "run", "polymorphic_on": "flavour"}

    flavour: Mapped[str] = mapped_column(default="run")
    note: Mapped[str | None]
    team_id: Mapped[int | None] = mapped_column(ForeignKey("teams.id", ondelete="SET NULL"))
    team: Mapped[Team | None] = relationship(back_populates="runs", foreign_keys=[team_id])


class GridRun(TrainingRun):
    """A joined subclass: a second table beside the record."""

    __tablename__ = "grid_runs"
    __mapper_args__ = {"polymorphic_identity": "grid"}

    id: Mapped[UUID] = mapped_column(ForeignKey("training_runs.id"), primary_key=True)
    points: Mapped[int] = mapped_column(default=0)
