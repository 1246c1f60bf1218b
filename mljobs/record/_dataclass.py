"""``MlJobDataclassMixin``: the record for hosts whose classes are dataclasses (SQLAlchemy's ``MappedAsDataclass``).

The columns of ``MlJobMixin`` once more, for a dataclass takes its fields, their defaults and their place in the constructor
from the columns themselves, and a class that is none may not have these.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy.orm import Mapped, MappedAsDataclass

from mljobs.record._columns import dataclass_column
from mljobs.record._mixin import MlJobMixin
from mljobs.states import MlJobStatus


class MlJobDataclassMixin(MlJobMixin, MappedAsDataclass, kw_only=True):
    """``MlJobMixin`` for a class that is a dataclass; its fields are given by name.

    ``spec`` and ``metrics`` may be given too, in the place of ``spec_json`` and ``metrics_json``.

    Example:
        ``class Run(MlJobDataclassMixin, Base)`` with ``class Base(MappedAsDataclass, DeclarativeBase)``
    """

    __record_is_dataclass__: ClassVar[bool] = True

    id: Mapped[UUID] = dataclass_column("id")
    kind: Mapped[Any] = dataclass_column("kind")
    target_name: Mapped[str] = dataclass_column("target_name")
    status: Mapped[MlJobStatus] = dataclass_column("status")
    progress: Mapped[int] = dataclass_column("progress")
    created_at: Mapped[datetime] = dataclass_column("created_at")
    started_at: Mapped[datetime | None] = dataclass_column("started_at")
    finished_at: Mapped[datetime | None] = dataclass_column("finished_at")
    error_message: Mapped[str | None] = dataclass_column("error_message")
    spec_json: Mapped[str] = dataclass_column("spec_json")
    metrics_json: Mapped[str | None] = dataclass_column("metrics_json")
    attempts: Mapped[int] = dataclass_column("attempts")
    priority: Mapped[int] = dataclass_column("priority")
    run_after: Mapped[datetime | None] = dataclass_column("run_after")
    exclusive: Mapped[bool] = dataclass_column("exclusive")
    retry_of: Mapped[UUID | None] = dataclass_column("retry_of")
    worker: Mapped[str | None] = dataclass_column("worker")
    lease: Mapped[int | None] = dataclass_column("lease")
