"""Host classes of many forms."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    DateTime,
    Engine,
    UniqueConstraint,
    event,
    func,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    mapped_column,
)

from mljobs import (
    MlJobDataclassMixin,
    MlJobMixin,
    kind_column,
)


class Kind(StrEnum):
    FIT = "fit"
    EMBED = "embed"


def plain() -> Any:
    class Base(DeclarativeBase):
        pass

    class Run(MlJobMixin, Base):
        __tablename__ = "runs"

    return Run, {}


def own_kinds_and_columns() -> Any:
    class Base(DeclarativeBase):
        pass

    class Run(MlJobMixin, Base):
        __tablename__ = "runs"

        kind: Mapped[Kind] = kind_column(Kind)
        owner_id: Mapped[int]
        label: Mapped[str] = mapped_column("display_label", default="none")
        seen_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())
        __table_args__ = (
            UniqueConstraint("target_name", "created_at", "id"),
            CheckConstraint("owner_id > 0", name="owner"),
            {"comment": "training"},
        )

    return Run, {"owner_id": 4, "label": "mine"}


def dataclass_base() -> Any:
    class Base(MappedAsDataclass, DeclarativeBase):
        pass

    class Run(MlJobDataclassMixin, Base):
        __tablename__ = "runs"
        owner_id: Mapped[int]
        serial: Mapped[int] = mapped_column(init=False, default=9)

    return Run, {"owner_id": 5}


def in_schema(engine: Engine, *names: str) -> None:
    """Make schemas; on SQLite each is a file of its own, attached to every connection."""
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            for name in names:
                connection.exec_driver_sql(f'CREATE SCHEMA "{name}"')
        return
    home = Path(str(engine.url.database)).parent

    @event.listens_for(engine, "connect")
    def attach(raw: Any, _: object) -> None:
        for name in names:
            raw.cursor().execute(f"ATTACH '{home / name}.db' AS \"{name}\"")
