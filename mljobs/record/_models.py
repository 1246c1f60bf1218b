"""Our own tables: ``MlJob`` in ``ml_jobs``, and the leases beside it."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Mapper
from sqlalchemy.orm.base import NO_VALUE

from mljobs._fields import FIELDS
from mljobs.record import _kv as kv
from mljobs.record._columns import kind_column
from mljobs.record._mixin import KV_NAMES, MlJobMixin
from mljobs.states import MlJobKind


class Base(DeclarativeBase):
    """The declarative base of our own tables."""

    metadata = sa.MetaData()


metadata = Base.metadata
"""Our own tables: ``ml_jobs``, ``ml_job_leases`` and ``ml_job_workers``."""


class MlJob(MlJobMixin, Base):
    """A unit of asynchronous machine-learning work, in table ``ml_jobs``."""

    __tablename__ = "ml_jobs"
    __lease_tablename__ = "ml_job_leases"
    __worker_tablename__ = "ml_job_workers"
    __overview_name__ = "ml_jobs_overview"
    __table_is_migrated_by_mljobs__: ClassVar[bool] = True

    kind: Mapped[MlJobKind] = kind_column(MlJobKind)

    @classmethod
    def from_json(cls, raw: str | bytes, **own_columns: Any) -> Self:
        """Return the record that KV JSON holds, as a new instance outside any session; see ``MlJobMixin.from_json``."""
        mapper: Mapper[Any] = cls.__mapper__
        manager = mapper.class_manager
        if own_columns or cls is not MlJob or len(manager.dispatch.init) != _OWN_LISTENERS or not mapper.configured:
            # A host's own constructor, checks and listeners; or the first of all.
            return super().from_json(raw, **own_columns)
        # The codec has checked all of it. To set it attribute by attribute would cost ten times the decoding.
        job: Self = manager.new_instance()
        job.__dict__.update(kv.values_of(kv.decode(raw)), **_NOT_IN_KV)
        state: Any = job._sa_instance_state  # type: ignore[attr-defined]
        state.committed_state.update(_ALL_NEW)
        state.modified = True
        return job


_OWN_LISTENERS = len(sa.inspect(MlJob).class_manager.dispatch.init)
_NOT_IN_KV = {field.name: field.default for field in FIELDS if field.default is not None and field.kv_key is None}
_ALL_NEW = dict.fromkeys((*KV_NAMES, *_NOT_IN_KV), NO_VALUE)
"""What SQLAlchemy notes of attributes that were set and had no value before."""


class MlJobLease(Base):
    """Who holds the jobs of one claim now, in table ``ml_job_leases``. Their records name its ``token``."""

    __table__ = MlJob.__leases__

    if TYPE_CHECKING:
        token: Mapped[int]
        worker: Mapped[str]
        acquired_at: Mapped[datetime]
        expires_at: Mapped[datetime]
        target_lock: Mapped[str | None]
