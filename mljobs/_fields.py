"""The one table of the record's fields: name, type, default, who sets it.

The columns of the mixins, the guard's list, COPY, Arrow, the transfer of records and what a retry takes over derive from
``FIELDS``. For a field that is added here, tests name the places that do not derive from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from uuid_utils.compat import uuid7

from mljobs._values import MAX_PROGRESS, MAX_SMALLINT, MIN_SMALLINT, utc_now
from mljobs.states import MlJobStatus

Form = Literal["id", "token", "text", "json", "small", "big", "time", "flag"]
"""What a field holds: an id, a token of an enum, text, JSON text, an integer of 16 or 64 bits, a time, True or False."""

SetBy = Literal["submitter", "operations"]
"""Who sets a field: whoever submits the job, or the operations while it lives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A field of the record, which is a column of its table and an attribute of its class.

    Attributes:
        name: The name of the column and of the attribute.
        python: The type of its values; of ``kind`` and ``status`` a ``StrEnum``.
        form: What it holds, the same on both databases.
        nullable: Whether it may be None.
        default: The value in a new record, unless another one is given or there is a ``factory``.
        factory: Makes the value for a new record.
        server_default: The column's DEFAULT, for rows that others insert.
        limits: The least and the greatest number.
        kv_key: The key in KV JSON; None where RedDB knows no such field.
        extended: Whether a line of an extended export holds it, under its own name.
        set_by: Who sets it.
        taken_over: Whether a retry has the same value as the job that it does again.
    """

    name: str
    python: type
    form: Form
    nullable: bool = False
    default: Any = None
    factory: Callable[[], Any] | None = None
    server_default: str | None = None
    limits: tuple[int, int] | None = None
    kv_key: str | None = None
    extended: bool = False
    set_by: SetBy = "operations"
    taken_over: bool = False

    @property
    def required(self) -> bool:
        """Whether a new record must be given a value."""
        return not self.nullable and self.default is None and self.factory is None


_SUBMITTER: Final[SetBy] = "submitter"

FIELDS: Final = (
    Field(name="id", python=UUID, form="id", factory=uuid7, kv_key="id", set_by=_SUBMITTER),
    Field(name="kind", python=str, form="token", kv_key="kind", set_by=_SUBMITTER, taken_over=True),
    Field(name="target_name", python=str, form="text", kv_key="target", set_by=_SUBMITTER, taken_over=True),
    Field(name="status", python=MlJobStatus, form="token", default=MlJobStatus.QUEUED, kv_key="status"),
    Field(name="progress", python=int, form="small", default=0, limits=(0, MAX_PROGRESS), kv_key="progress"),
    Field(name="created_at", python=datetime, form="time", factory=utc_now, kv_key="created_at", set_by=_SUBMITTER),
    Field(name="started_at", python=datetime, form="time", nullable=True, kv_key="started_at"),
    Field(name="finished_at", python=datetime, form="time", nullable=True, kv_key="finished_at"),
    Field(name="error_message", python=str, form="text", nullable=True, kv_key="error"),
    Field(name="spec_json", python=str, form="json", default="{}", kv_key="spec", set_by=_SUBMITTER, taken_over=True),
    Field(name="metrics_json", python=str, form="json", nullable=True, kv_key="metrics"),
    Field(
        name="attempts",
        python=int,
        form="small",
        default=0,
        server_default="0",
        limits=(0, MAX_SMALLINT),
        extended=True,
    ),
    Field(
        name="priority",
        python=int,
        form="small",
        default=0,
        server_default="0",
        limits=(MIN_SMALLINT, MAX_SMALLINT),
        extended=True,
        set_by=_SUBMITTER,
        taken_over=True,
    ),
    Field(name="run_after", python=datetime, form="time", nullable=True, extended=True, set_by=_SUBMITTER),
    Field(
        name="exclusive",
        python=bool,
        form="flag",
        default=False,
        server_default="false",
        extended=True,
        set_by=_SUBMITTER,
        taken_over=True,
    ),
    Field(name="retry_of", python=UUID, form="id", nullable=True, extended=True, set_by=_SUBMITTER),
    Field(name="worker", python=str, form="text", nullable=True, extended=True),
    Field(name="lease", python=int, form="big", nullable=True),
)
"""The record, in the order of its columns. Columns that a host adds are its own."""

NAMES: Final = tuple(field.name for field in FIELDS)
"""The record's columns. The guard keeps all of them; columns that a host adds stay writable after the job has finished."""

BY_NAME: Final = {field.name: field for field in FIELDS}

KV_FIELDS: Final = tuple(sorted((field for field in FIELDS if field.kv_key), key=lambda field: str(field.kv_key)))
"""What KV JSON holds, in the order of its keys."""

EXTENDED_FIELDS: Final = tuple(sorted((field for field in FIELDS if field.extended), key=lambda field: field.name))
"""What a line of an extended export holds besides, in the order of its keys."""
