"""``MlJobMixin``: the record, for a class in a host's own metadata.

A record is complete at construction: an id minted by the client, ``queued``, progress 0, created now. Each legal
outcome is one method, which sets every field that belongs to it, so no illegal mix of fields is built by accident.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Self
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.hybrid import hybrid_method, hybrid_property
from sqlalchemy.orm import Mapped, validates

from mljobs._fields import FIELDS, KV_FIELDS
from mljobs._values import MAX_PROGRESS, from_json_text, to_json_text, to_millis, utc_now
from mljobs.errors import InvalidTransitionError, InvalidValueError, TerminalStateError
from mljobs.guards._hooks import install_hooks, is_expression, remember_start
from mljobs.record import _kv as kv
from mljobs.record._columns import column
from mljobs.record._companions import add_companions
from mljobs.record._declaring import check_body
from mljobs.record._html import job_html
from mljobs.record._sql import epoch_millis, first_line_of, json_number
from mljobs.record._values import CHECKS, error_text, worker_name
from mljobs.states import TERMINAL, MlJobKind, MlJobStatus

KV_NAMES = frozenset(field.name for field in KV_FIELDS)
"""The attributes that KV JSON holds."""


class MlJobMixin:
    """The columns, checks and guard of a job record, for a class in the host's own metadata.

    The checks, indexes, the tables of leases (``<table>_leases``) and of workers (``<table>_workers``), and the triggers
    come with the table, whatever ``__table_args__`` says.

    Source: RedDB's ``MlJob``; ``attempts``, ``priority``, ``run_after``, ``exclusive`` and ``retry_of`` are our own.
    """

    __lease_tablename__: ClassVar[str | None] = None
    """Name of the lease table; ``<table>_leases`` where None."""
    __overview_name__: ClassVar[str | None] = None
    """Name of the view for people with a SQL shell; no view where None. See :mod:`mljobs.guards._overview`."""
    __overview_columns__: ClassVar[Sequence[str]] = ()
    """The columns of the class's own that the view shows, by their names in the database."""
    __worker_tablename__: ClassVar[str | None] = None
    """Name of the table of workers; ``<table>_workers`` where None."""
    __workers__: ClassVar[sa.Table]
    """The table of workers."""
    __leases__: ClassVar[sa.Table]
    """The lease table."""
    __kinds__: ClassVar[type[StrEnum]] = MlJobKind
    """The enum of the ``kind`` column."""

    def __init_subclass__(cls, **kw: Any) -> None:
        check_body(cls)
        super().__init_subclass__(**kw)

    id: Mapped[UUID] = column("id")
    """128 bits, UUIDv7: sorted by time of submission, unique without coordination."""
    kind: Mapped[Any] = column("kind")
    """What the job does."""
    target_name: Mapped[str] = column("target_name")
    """What the job works on: a model, a table, a feature set."""
    status: Mapped[MlJobStatus] = column("status")
    """Where the job is in its life."""
    progress: Mapped[int] = column("progress")
    """Percent, 0..100."""
    created_at: Mapped[datetime] = column("created_at")
    started_at: Mapped[datetime | None] = column("started_at")
    finished_at: Mapped[datetime | None] = column("finished_at")
    error_message: Mapped[str | None] = column("error_message")
    spec_json: Mapped[str] = column("spec_json")
    """What to do: opaque JSON text, kept byte for byte."""
    metrics_json: Mapped[str | None] = column("metrics_json")
    """What came out: opaque JSON text, kept byte for byte."""
    attempts: Mapped[int] = column("attempts")
    """How many times the job was started."""
    priority: Mapped[int] = column("priority")
    """Higher is claimed first."""
    run_after: Mapped[datetime | None] = column("run_after")
    """Not claimed before this time."""
    exclusive: Mapped[bool] = column("exclusive")
    """Never two exclusive jobs at once on one ``target_name``."""
    retry_of: Mapped[UUID | None] = column("retry_of")
    """The finished job that this one does again."""
    worker: Mapped[str | None] = column("worker")
    """Who ran it last: set by a claim, kept by a requeue and for ever after."""
    lease: Mapped[int | None] = column("lease")
    """Token of the lease that the running job is held by; None in every other state."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            kind: StrEnum | str = ...,
            target_name: str = ...,
            spec_json: str = ...,
            spec: Any = ...,
            id: UUID | int | str = ...,  # noqa: A002 - the column's name
            status: MlJobStatus | str = ...,
            progress: int = ...,
            created_at: datetime = ...,
            started_at: datetime | None = ...,
            finished_at: datetime | None = ...,
            error_message: str | None = ...,
            metrics_json: str | None = ...,
            metrics: Any = ...,
            attempts: int = ...,
            priority: int = ...,
            run_after: datetime | None = ...,
            exclusive: bool = ...,
            retry_of: UUID | int | str | None = ...,
            worker: str | None = ...,
            lease: int | None = ...,
            **own_columns: Any,
        ) -> None: ...

    # ------------------------------------------------------------------------------------------------ what it knows

    @hybrid_property
    def is_terminal(self) -> bool:
        """Whether the job has finished and can never change again."""
        return self.status.is_terminal

    @is_terminal.inplace.expression
    @classmethod
    def _is_terminal(cls) -> sa.ColumnElement[bool]:
        return cls.status.in_(TERMINAL)

    @hybrid_property
    def created_at_ms(self) -> int:
        """``created_at`` in epoch milliseconds."""
        return to_millis(self.created_at)

    @created_at_ms.inplace.expression
    @classmethod
    def _created_at_ms(cls) -> sa.ColumnElement[int]:
        return epoch_millis(cls.created_at)

    @hybrid_property
    def started_at_ms(self) -> int:
        """``started_at`` in epoch milliseconds, 0 when not yet."""
        return 0 if self.started_at is None else to_millis(self.started_at)

    @started_at_ms.inplace.expression
    @classmethod
    def _started_at_ms(cls) -> sa.ColumnElement[int]:
        return sa.func.coalesce(epoch_millis(cls.started_at), 0)

    @hybrid_property
    def finished_at_ms(self) -> int:
        """``finished_at`` in epoch milliseconds, 0 when not yet."""
        return 0 if self.finished_at is None else to_millis(self.finished_at)

    @finished_at_ms.inplace.expression
    @classmethod
    def _finished_at_ms(cls) -> sa.ColumnElement[int]:
        return sa.func.coalesce(epoch_millis(cls.finished_at), 0)

    @hybrid_property
    def duration_ms(self) -> int | None:
        """Milliseconds from start to finish; None unless both are set and in order. Source: RedDB's ``duration_ms``."""
        if self.started_at is None or self.finished_at is None or self.finished_at < self.started_at:
            return None
        return to_millis(self.finished_at) - to_millis(self.started_at)

    @duration_ms.inplace.expression
    @classmethod
    def _duration_ms(cls) -> sa.ColumnElement[int | None]:
        return sa.case(
            (
                cls.finished_at >= cls.started_at,
                epoch_millis(cls.finished_at) - epoch_millis(cls.started_at),
            ),
            else_=sa.null(),
        )

    @hybrid_property
    def spec(self) -> Any:
        """``spec_json``, parsed anew at each access.

        Raises:
            InvalidValueError: The text is not JSON.
        """
        return from_json_text("spec_json", self.spec_json)

    @spec.inplace.setter
    def _set_spec(self, value: Any) -> None:
        self.spec_json = to_json_text("spec", value)

    @spec.inplace.expression
    @classmethod
    def _spec(cls) -> sa.ColumnElement[Any]:
        return sa.type_coerce(cls.spec_json, sa.JSON())

    @hybrid_property
    def metrics(self) -> Any:
        """``metrics_json``, parsed anew at each access; None where there are none.

        Raises:
            InvalidValueError: The text is not JSON.
        """
        return from_json_text("metrics_json", self.metrics_json)

    @metrics.inplace.setter
    def _set_metrics(self, value: Any) -> None:
        self.metrics_json = None if value is None else to_json_text("metrics", value)

    @metrics.inplace.expression
    @classmethod
    def _metrics(cls) -> sa.ColumnElement[Any]:
        return sa.type_coerce(cls.metrics_json, sa.JSON())

    @hybrid_method
    def metric(self, key: str) -> float | None:
        """Return the number under ``key`` in ``metrics``; None where there is none, or no number.

        In a query too, on both databases: ``order_by(MlJob.metric("f1").desc())``.
        """
        metrics = self.metrics
        value = metrics.get(key) if isinstance(metrics, dict) else None
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    @metric.inplace.expression  # type: ignore[attr-defined,untyped-decorator]
    @classmethod
    def _metric(cls, key: str) -> sa.ColumnElement[float | None]:
        return json_number(cls.metrics_json, key)

    @hybrid_property
    def error_line(self) -> str | None:
        """First line of ``error_message``: of an exception its type and message, without the traceback."""
        return None if self.error_message is None else self.error_message.partition("\n")[0]

    @error_line.inplace.expression
    @classmethod
    def _error_line(cls) -> sa.ColumnElement[str | None]:
        return first_line_of(cls.error_message)

    # ------------------------------------------------------------------------------------------------ what it refuses

    @validates(*CHECKS)
    def _check(self, field: str, value: Any) -> Any:
        return value if is_expression(value) else CHECKS[field](field, value, type(self).__kinds__)

    # ------------------------------------------------------------------------------------------------ its legal outcomes

    def start(self, worker: str | None = None) -> None:
        """Start the queued job: running, progress 0, one more attempt.

        Args:
            worker: Who runs it, for operators to read; None keeps what ``worker`` holds, unless that is who ran it before.

        Raises:
            InvalidValueError: ``worker`` is not a string, or an empty one; nothing was changed.
            InvalidTransitionError: The job is already running.
            TerminalStateError: The job has finished.
        """
        name = None if worker is None else worker_name(worker)
        just_named = bool(sa.inspect(self).attrs.worker.history.added)  # before a load flushes it
        self._become(MlJobStatus.RUNNING)
        self.progress = 0
        if name is not None or (self.attempts and not just_named):
            self.worker = name
        self.started_at = utc_now()
        self.attempts = (self.attempts or 0) + 1
        remember_start(self)

    def complete(self, metrics: Any = None) -> None:
        """Complete the running job: progress 100, finished now.

        Args:
            metrics: What came out, any JSON-able value; None keeps what ``metrics_json`` holds.

        Raises:
            InvalidTransitionError: The job is not running.
            TerminalStateError: The job has finished.
            InvalidValueError: JSON cannot hold the metrics; nothing was changed.
        """
        text = None if metrics is None else to_json_text("metrics", metrics)
        self._become(MlJobStatus.COMPLETED)
        self.progress = MAX_PROGRESS
        self.finished_at = utc_now()
        if text is not None:
            self.metrics_json = text

    def fail(self, error: str | BaseException) -> None:
        """Fail the queued or running job, finished now, with the reason.

        Args:
            error: The reason; of an exception its type and message.

        Raises:
            TerminalStateError: The job has finished.
            InvalidValueError: ``error`` is neither; nothing was changed.
        """
        message = error_text(error)
        self._become(MlJobStatus.FAILED)
        self.error_message = message
        self.finished_at = utc_now()

    def cancel(self) -> None:
        """Cancel the queued or running job, finished now.

        Here and over HTTP (409) it is an error where there is nothing to cancel, also the second time: the caller has the
        record before him. ``jobs.cancel`` and ``store.cancel``, which know the id only, return False.

        Raises:
            TerminalStateError: The job has finished.
        """
        self._become(MlJobStatus.CANCELLED)
        self.finished_at = utc_now()

    def requeue(self) -> None:
        """Put the running job back: queued, progress 0, not started. Its attempts still count.

        Raises:
            InvalidTransitionError: The job is already queued.
            TerminalStateError: The job has finished.
        """
        self._become(MlJobStatus.QUEUED)
        self.progress = 0
        self.started_at = None

    def _become(self, wanted: MlJobStatus) -> None:
        status = self.status
        if status.is_terminal:
            raise TerminalStateError(self.id, status, self.finished_at, {"status": (status.token, wanted.token)})
        if not status.can_become(wanted):
            raise InvalidTransitionError(self.id, status, wanted)
        self.status = wanted
        if wanted is not MlJobStatus.RUNNING and self.lease is not None:
            self.lease = None

    # ------------------------------------------------------------------------------------------------ to and from KV

    @property
    def kv_key(self) -> str:
        """The record's key in a KV store: its id as 32 lower-case hex digits."""
        return self.id.hex

    def to_json(self) -> str:
        """Return the record as KV JSON, byte for byte what RedDB writes.

        Raises:
            InvalidValueError: A text holds a lone surrogate.
        """
        values = self.__dict__  # what is loaded; the attributes themselves cost three times as much
        if not values.keys() >= KV_NAMES:
            values = {name: getattr(self, name) for name in KV_NAMES}
        started_at, finished_at = values["started_at"], values["finished_at"]
        return kv.encode(
            kv.KvRecord(
                to_millis(values["created_at"]),
                values["error_message"],
                0 if finished_at is None else to_millis(finished_at),
                values["id"],
                values["kind"],
                values["metrics_json"],
                values["progress"],
                values["spec_json"],
                0 if started_at is None else to_millis(started_at),
                values["status"],
                values["target_name"],
            )
        )

    @classmethod
    def from_json(cls, raw: str | bytes, **own_columns: Any) -> Self:
        """Return the record that KV JSON holds, as a new instance outside any session.

        Args:
            raw: One JSON object; what RedDB accepts, but no negative numbers, no times after the year 9999 and no raw
                control characters.
            **own_columns: Of a host's class, which KV JSON knows nothing of.

        Raises:
            JobDecodeError: ``raw`` is not a record; it names the key and the reason.
        """
        return cls(**kv.values_of(kv.decode(raw, cls.__kinds__)), **own_columns)

    def __repr__(self) -> str:
        state = dict(sa.inspect(self).dict)  # a repr must never load from the database
        if "id" not in state and (identity := sa.inspect(self).identity) is not None:  # expired by a commit
            state["id"] = identity[0]
        shown = " ".join(str(state[name]) for name in ("id", "kind", "status", "target_name") if name in state)
        progress = f" {state['progress']}%" if "progress" in state else ""
        return f"<{type(self).__name__} {shown}{progress}>"

    def _repr_html_(self) -> str:
        return job_html(self)


install_hooks(MlJobMixin)


@sa.event.listens_for(MlJobMixin, "init", propagate=True)
def _complete_at_construction(job: MlJobMixin, _args: object, values: dict[str, Any]) -> None:
    for name in ("spec", "metrics"):
        if name in values and f"{name}_json" in values:
            raise InvalidValueError(name, values[name], f"give {name} or {name}_json, not both")
    # Straight into the instance: seven attribute events with their checks, for values that are known to be right, would
    # cost more than all else.
    if is_dataclass(type(job)):  # it has all of this from its fields
        return
    loaded = sa.inspect(job).dict
    for name, default, factory in _AT_CONSTRUCTION:
        if name not in values:
            loaded[name] = default if factory is None else factory()
    if "spec" not in values and "spec_json" not in values:
        loaded["spec_json"] = "{}"


_AT_CONSTRUCTION = tuple(
    (field.name, field.default, field.factory)
    for field in FIELDS
    if not field.nullable and not field.required and field.name != "spec_json"
)


sa.event.listen(MlJobMixin, "after_mapper_constructed", add_companions, propagate=True)
