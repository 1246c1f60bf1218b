"""``MlJobDataclassMixin``: the record for hosts whose classes are dataclasses (SQLAlchemy's ``MappedAsDataclass``).

The columns of ``MlJobMixin`` once more, for a dataclass takes its fields, their defaults and their place in the constructor
from the columns themselves, and a class that is none may not have these.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import BigInteger, Boolean, SmallInteger, text
from sqlalchemy.orm import Mapped, MappedAsDataclass, mapped_column
from uuid_utils.compat import uuid7

from mljobs.record._models import MlJobMixin
from mljobs.states import MlJobKind, MlJobStatus
from mljobs.types import JobId, JsonText, PlainText, TokenType, UtcMillis, utc_now


class MlJobDataclassMixin(MlJobMixin, MappedAsDataclass, kw_only=True):
    """``MlJobMixin`` for a class that is a dataclass; its fields are given by name.

    ``spec`` and ``metrics`` may be given too, in the place of ``spec_json`` and ``metrics_json``.

    Example:
        ``class Run(MlJobDataclassMixin, Base)`` with ``class Base(MappedAsDataclass, DeclarativeBase)``
    """

    __record_is_dataclass__: ClassVar[bool] = True

    id: Mapped[UUID] = mapped_column(
        JobId(), primary_key=True, default_factory=uuid7, insert_default=uuid7, sort_order=-16
    )
    kind: Mapped[Any] = mapped_column(TokenType(MlJobKind, 32, "kind"), nullable=False, sort_order=-15)
    target_name: Mapped[str] = mapped_column(PlainText("target_name"), nullable=False, sort_order=-14)
    status: Mapped[MlJobStatus] = mapped_column(
        TokenType(MlJobStatus, 16, "status"),
        nullable=False,
        default=MlJobStatus.QUEUED,
        active_history=True,
        sort_order=-13,
    )
    progress: Mapped[int] = mapped_column(SmallInteger, nullable=False, default=0, sort_order=-12)
    created_at: Mapped[datetime] = mapped_column(
        UtcMillis("created_at"), nullable=False, default_factory=utc_now, insert_default=utc_now, sort_order=-11
    )
    started_at: Mapped[datetime | None] = mapped_column(UtcMillis("started_at"), default=None, sort_order=-10)
    finished_at: Mapped[datetime | None] = mapped_column(UtcMillis("finished_at"), default=None, sort_order=-9)
    error_message: Mapped[str | None] = mapped_column(PlainText("error_message"), default=None, sort_order=-8)
    spec_json: Mapped[str] = mapped_column(JsonText("spec_json"), nullable=False, default="{}", sort_order=-7)
    metrics_json: Mapped[str | None] = mapped_column(JsonText("metrics_json"), default=None, sort_order=-6)
    attempts: Mapped[int] = mapped_column(
        SmallInteger, nullable=False, default=0, server_default=text("0"), sort_order=-5
    )
    priority: Mapped[int] = mapped_column(
        SmallInteger, nullable=False, default=0, server_default=text("0"), sort_order=-4
    )
    run_after: Mapped[datetime | None] = mapped_column(UtcMillis("run_after"), default=None, sort_order=-3)
    exclusive: Mapped[bool] = mapped_column(
        Boolean, nullable=False, default=False, server_default=text("false"), sort_order=-2
    )
    retry_of: Mapped[UUID | None] = mapped_column(JobId(), default=None, sort_order=-1)
    worker: Mapped[str | None] = mapped_column(PlainText("worker"), default=None, sort_order=-1)
    lease: Mapped[int | None] = mapped_column(BigInteger, default=None, sort_order=-1)
