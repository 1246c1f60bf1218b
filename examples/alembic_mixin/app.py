"""Training runs that belong to users, in the application's own table."""

from __future__ import annotations

import os
from enum import StrEnum

from sqlalchemy import ForeignKey, MetaData, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from mljobs import MlJobMixin, TerminalStateError, jobs, kind_column

URL = os.environ.get("DATABASE_URL", "sqlite:///app.db")


class Base(DeclarativeBase):
    """The application's own tables."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Kind(StrEnum):
    """What a run does."""

    FIT = "fit"
    TUNE = "tune"


class User(Base):
    """Owns runs."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    runs: Mapped[list[TrainingRun]] = relationship(back_populates="owner")


class TrainingRun(MlJobMixin, Base):
    """A job of a user."""

    __tablename__ = "training_runs"

    kind: Mapped[Kind] = kind_column(Kind)
    owner_id: Mapped[int] = mapped_column(ForeignKey(User.id), index=True)
    owner: Mapped[User] = relationship(back_populates="runs")
    note: Mapped[str | None]


def main() -> None:
    """Train for a user, and try to change what has finished."""
    engine = create_engine(URL)
    with Session(engine) as session, session.begin():
        user = User(name="Ada")
        jobs.submit(session, "fit", "spam", {"lr": 0.1}, model=TrainingRun, owner=user)
    with Session(engine) as session:
        (claim,) = jobs.claim(session, worker="example", model=TrainingRun)
        jobs.complete(session, claim, {"f1": 0.9})
        session.commit()
        run = session.scalars(select(TrainingRun)).one()
        print(run.owner.name, run.kind, run.status, run.metrics)
        run.note = "the columns that you add stay yours to change"
        session.commit()
        try:
            run.progress = 50
            session.commit()
        except TerminalStateError:
            print("a finished run never changes")
    engine.dispose()


if __name__ == "__main__":
    main()
