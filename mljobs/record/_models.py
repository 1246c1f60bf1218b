"""The record: ``MlJobMixin`` for a host's own table, ``MlJob`` for ours, and the leases beside it.

A record is complete at construction: an id minted by the client, ``queued``, progress 0, created now. Each legal
outcome is one method, which sets every field that belongs to it, so no illegal mix of fields is built by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Self
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Table,
    Text,
    case,
    event,
    func,
    inspect,
    null,
    text,
    type_coerce,
)
from sqlalchemy.ext.hybrid import hybrid_method, hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedColumn, Mapper, mapped_column, validates
from sqlalchemy.orm.base import NO_VALUE
from sqlalchemy.sql.elements import conv
from sqlalchemy.types import JSON
from uuid_utils.compat import uuid7

from mljobs.errors import InvalidTransitionError, InvalidValueError, TerminalStateError
from mljobs.guards._companions import GUARDED_COLUMNS, short_name, without_parameters
from mljobs.guards._hooks import install_hooks, install_triggers, is_expression, remember_start
from mljobs.guards._overview import install_overview
from mljobs.record import _kv as codec
from mljobs.record._declaring import (
    KIND_LENGTH,
    check_body,
    check_dataclass,
    check_kinds,
    check_lease_name,
    check_mapping,
)
from mljobs.states import ACTIVE, TERMINAL, MlJobKind, MlJobStatus
from mljobs.types import (
    EPOCH,
    JobId,
    JsonText,
    PlainText,
    SqliteCheck,
    TokenType,
    UtcMillis,
    epoch_millis,
    first_line,
    from_json_text,
    from_millis,
    json_number,
    storable_text,
    to_job_id,
    to_json_text,
    to_member,
    to_millis,
    to_utc,
    utc_now,
)

_SMALLINT_MAX = 32_767
_PROGRESS_MAX = 100


def kind_column(enum: type[StrEnum], **kw: Any) -> MappedColumn[Any]:
    """Return the ``kind`` column for a host with kinds of its own.

    Args:
        enum: A ``StrEnum`` of the kinds; each value is a token of 1 to 32 characters.
        **kw: Passed on to ``mapped_column``; where ``sort_order`` is not among them, the column stands second as in ours.

    Raises:
        InvalidValueError: ``enum`` is none such.

    Example:
        ``kind: Mapped[MyKind] = kind_column(MyKind)``
    """
    kw.setdefault("sort_order", -15)
    return mapped_column(TokenType(check_kinds(enum), KIND_LENGTH, "kind"), nullable=False, **kw)


class MlJobMixin:
    """The columns, checks and guard of a job record, for a class in the host's own metadata.

    The checks, indexes, the lease table (``<table>_leases``) and the triggers come with the table, whatever
    ``__table_args__`` says.

    Source: RedDB's ``MlJob``; ``attempts``, ``priority``, ``run_after``, ``exclusive`` and ``retry_of`` are our own.
    """

    __lease_tablename__: ClassVar[str | None] = None
    """Name of the lease table; ``<table>_leases`` where None."""
    __overview_name__: ClassVar[str | None] = None
    """Name of the view for people with a SQL shell; no view where None. See :mod:`mljobs.guards._overview`."""
    __leases__: ClassVar[Table]
    """The lease table."""
    __kinds__: ClassVar[type[StrEnum]] = MlJobKind
    """The enum of the ``kind`` column."""

    def __init_subclass__(cls, **kw: Any) -> None:
        check_body(cls)
        super().__init_subclass__(**kw)

    id: Mapped[UUID] = mapped_column(JobId(), primary_key=True, default=uuid7, sort_order=-16)
    """128 bits, UUIDv7: sorted by time of submission, unique without coordination."""
    kind: Mapped[Any] = mapped_column(TokenType(MlJobKind, 32, "kind"), nullable=False, sort_order=-15)
    target_name: Mapped[str] = mapped_column(PlainText("target_name"), nullable=False, sort_order=-14)
    """What the job works on: a model, a table, a feature set."""
    status: Mapped[MlJobStatus] = mapped_column(
        TokenType(MlJobStatus, 16, "status"),
        nullable=False,
        default=MlJobStatus.QUEUED,
        # The hook compares old with new; without this the old value is unknown once a commit has expired it.
        active_history=True,
        sort_order=-13,
    )
    progress: Mapped[int] = mapped_column(SmallInteger, nullable=False, default=0, sort_order=-12)
    """Percent, 0..100."""
    created_at: Mapped[datetime] = mapped_column(
        UtcMillis("created_at"), nullable=False, default=utc_now, sort_order=-11
    )
    started_at: Mapped[datetime | None] = mapped_column(UtcMillis("started_at"), sort_order=-10)
    finished_at: Mapped[datetime | None] = mapped_column(UtcMillis("finished_at"), sort_order=-9)
    error_message: Mapped[str | None] = mapped_column(PlainText("error_message"), sort_order=-8)
    spec_json: Mapped[str] = mapped_column(JsonText("spec_json"), nullable=False, sort_order=-7)
    """What to do: opaque JSON text, kept byte for byte."""
    metrics_json: Mapped[str | None] = mapped_column(JsonText("metrics_json"), sort_order=-6)
    """What came out: opaque JSON text, kept byte for byte."""
    attempts: Mapped[int] = mapped_column(
        SmallInteger, nullable=False, default=0, server_default=text("0"), sort_order=-5
    )
    """How many times the job was started."""
    priority: Mapped[int] = mapped_column(
        SmallInteger, nullable=False, default=0, server_default=text("0"), sort_order=-4
    )
    """Higher is claimed first."""
    run_after: Mapped[datetime | None] = mapped_column(UtcMillis("run_after"), sort_order=-3)
    """Not claimed before this time."""
    exclusive: Mapped[bool] = mapped_column(
        Boolean, nullable=False, default=False, server_default=text("false"), sort_order=-2
    )
    """Never two exclusive jobs at once on one ``target_name``."""
    retry_of: Mapped[UUID | None] = mapped_column(JobId(), sort_order=-1)
    """The finished job that this one does again."""
    worker: Mapped[str | None] = mapped_column(PlainText("worker"), sort_order=-1)
    """Who ran it last: set by a claim, kept by a requeue and for ever after."""
    lease: Mapped[int | None] = mapped_column(BigInteger, sort_order=-1)
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
    def _is_terminal(cls) -> ColumnElement[bool]:
        return cls.status.in_(TERMINAL)

    @hybrid_property
    def created_at_ms(self) -> int:
        """``created_at`` in epoch milliseconds."""
        return to_millis(self.created_at)

    @created_at_ms.inplace.expression
    @classmethod
    def _created_at_ms(cls) -> ColumnElement[int]:
        return epoch_millis(cls.created_at)

    @hybrid_property
    def started_at_ms(self) -> int:
        """``started_at`` in epoch milliseconds, 0 when not yet."""
        return 0 if self.started_at is None else to_millis(self.started_at)

    @started_at_ms.inplace.expression
    @classmethod
    def _started_at_ms(cls) -> ColumnElement[int]:
        return func.coalesce(epoch_millis(cls.started_at), 0)

    @hybrid_property
    def finished_at_ms(self) -> int:
        """``finished_at`` in epoch milliseconds, 0 when not yet."""
        return 0 if self.finished_at is None else to_millis(self.finished_at)

    @finished_at_ms.inplace.expression
    @classmethod
    def _finished_at_ms(cls) -> ColumnElement[int]:
        return func.coalesce(epoch_millis(cls.finished_at), 0)

    @hybrid_property
    def duration_ms(self) -> int | None:
        """Milliseconds from start to finish; None unless both are set and in order. Source: RedDB's ``duration_ms``."""
        if self.started_at is None or self.finished_at is None or self.finished_at < self.started_at:
            return None
        return to_millis(self.finished_at) - to_millis(self.started_at)

    @duration_ms.inplace.expression
    @classmethod
    def _duration_ms(cls) -> ColumnElement[int | None]:
        return case(
            (
                cls.finished_at >= cls.started_at,
                epoch_millis(cls.finished_at) - epoch_millis(cls.started_at),
            ),
            else_=null(),
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
    def _spec(cls) -> ColumnElement[Any]:
        return type_coerce(cls.spec_json, JSON())

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
    def _metrics(cls) -> ColumnElement[Any]:
        return type_coerce(cls.metrics_json, JSON())

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
    def _metric(cls, key: str) -> ColumnElement[float | None]:
        return json_number(cls.metrics_json, key)

    @hybrid_property
    def error_line(self) -> str | None:
        """First line of ``error_message``: of an exception its type and message, without the traceback."""
        return None if self.error_message is None else self.error_message.partition("\n")[0]

    @error_line.inplace.expression
    @classmethod
    def _error_line(cls) -> ColumnElement[str | None]:
        return first_line(cls.error_message)

    # ------------------------------------------------------------------------------------------------ what it refuses

    @validates(
        "id", "kind", "target_name", "status", "error_message", "spec_json", "metrics_json", "retry_of", "worker"
    )
    def _check_text(self, field: str, value: Any) -> Any:
        return value if is_expression(value) else _TEXT_CHECKS[field](self, field, value)

    @validates("progress", "attempts", "priority", "exclusive")
    def _check_number(self, field: str, value: Any) -> Any:
        if is_expression(value):
            return value
        low, high = _RANGES[field]
        number = value
        if field == "exclusive":
            if not isinstance(value, bool):
                raise InvalidValueError(field, value, "expected True or False")
        elif not isinstance(value, int) or isinstance(value, bool):
            as_index = getattr(value, "__index__", None)  # NumPy's integers
            if as_index is None or isinstance(value, bool):
                raise InvalidValueError(field, value, f"expected an int, {low} to {high}")
            number = as_index()
        if not low <= number <= high:
            raise InvalidValueError(field, value, f"expected {low} to {high}")
        return number

    @validates("created_at", "started_at", "finished_at", "run_after")
    def _check_time(self, field: str, value: Any) -> Any:
        if is_expression(value):
            return value
        if value is None:
            if field == "created_at":
                raise InvalidValueError(field, value, "every job has one")
            return None
        moment = to_utc(field, value)
        if moment < EPOCH:
            raise InvalidValueError(field, value, "times start at 1970-01-01 UTC, epoch milliseconds are not negative")
        return moment

    # ------------------------------------------------------------------------------------------------ its legal outcomes

    def start(self, worker: str | None = None) -> None:
        """Start the queued job: running, progress 0, one more attempt.

        Args:
            worker: Who runs it, for operators to read; None keeps what ``worker`` holds.

        Raises:
            InvalidValueError: ``worker`` is not a string, or an empty one; nothing was changed.
            InvalidTransitionError: The job is already running.
            TerminalStateError: The job has finished.
        """
        name = None if worker is None else worker_name(worker)
        self._become(MlJobStatus.RUNNING)
        self.progress = 0
        if name is not None:
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
        self.progress = _PROGRESS_MAX
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
        if not values.keys() >= _KV_FIELDS:
            values = {name: getattr(self, name) for name in _KV_FIELDS}
        started_at, finished_at = values["started_at"], values["finished_at"]
        return codec.encode(
            codec.KvRecord(
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
        record = codec.decode(raw, cls.__kinds__)
        values: dict[str, Any] = {
            "id": record.id,
            "kind": record.kind,
            "target_name": record.target,
            "status": record.status,
            "progress": record.progress,
            "created_at": from_millis(record.created_at),
            "started_at": from_millis(record.started_at) if record.started_at else None,
            "finished_at": from_millis(record.finished_at) if record.finished_at else None,
            "error_message": record.error,
            "spec_json": record.spec,
            "metrics_json": record.metrics,
        }
        mapper: Mapper[Any] = cls.__mapper__  # type: ignore[attr-defined]
        manager = mapper.class_manager
        if own_columns or cls is not MlJob or len(manager.dispatch.init) != _OWN_LISTENERS or not mapper.configured:
            return cls(**values, **own_columns)  # a host's own constructor, checks and listeners; or the first of all
        # The codec has checked all of it. To set it attribute by attribute would cost ten times the decoding.
        job: Self = manager.new_instance()
        job.__dict__.update(values, attempts=0, priority=0, exclusive=False)
        state: Any = job._sa_instance_state  # type: ignore[attr-defined]
        state.committed_state.update(_ALL_NEW)
        state.modified = True
        return job

    def __repr__(self) -> str:
        state = inspect(self).dict  # a repr must never load from the database
        shown = " ".join(str(state[name]) for name in ("id", "kind", "status", "target_name") if name in state)
        progress = f" {state['progress']}%" if "progress" in state else ""
        return f"<{type(self).__name__} {shown}{progress}>"


def worker_name(name: object) -> str:
    """Return the name of a worker.

    Raises:
        InvalidValueError: Not a string, an empty one, or one that no database can hold.
    """
    if not isinstance(name, str) or not name:
        raise InvalidValueError("worker", name, "expected a name for operators to read")
    return storable_text("worker", name)


def error_text(error: object) -> str:
    """Return the ``error_message`` for a reason or an exception.

    Raises:
        InvalidValueError: Neither a string nor an exception.
    """
    if isinstance(error, BaseException):
        message = str(error)
        name = type(error).__name__
        return (f"{name}: {message}" if message else name).replace("\x00", "\N{REPLACEMENT CHARACTER}")
    if not isinstance(error, str):
        raise InvalidValueError("error_message", error, "expected a string or an exception")
    return error


def _required_text(_job: MlJobMixin, field: str, value: object) -> object:
    if not isinstance(value, str):
        raise InvalidValueError(field, value, "expected a string")
    return value


def _optional_text(job: MlJobMixin, field: str, value: object) -> object:
    return None if value is None else _required_text(job, field, value)


_TEXT_CHECKS: dict[str, Callable[[MlJobMixin, str, Any], object]] = {
    "id": lambda _job, field, value: to_job_id(value, field),
    "retry_of": lambda _job, field, value: None if value is None else to_job_id(value, field),
    "kind": lambda job, field, value: to_member(type(job).__kinds__, field, value),
    "status": lambda _job, field, value: to_member(MlJobStatus, field, value),
    "target_name": _required_text,
    "error_message": _optional_text,
    "spec_json": _required_text,
    "metrics_json": _optional_text,
    "worker": _optional_text,
}
_KV_FIELDS = frozenset(
    {
        "id", "kind", "target_name", "status", "progress", "created_at", "started_at", "finished_at", "error_message",
        "spec_json", "metrics_json",
    }
)  # fmt: skip
"""What the KV JSON holds."""
_ALL_NEW = dict.fromkeys((*_KV_FIELDS, "attempts", "priority", "exclusive"), NO_VALUE)
"""What SQLAlchemy notes of attributes that were set and had no value before."""
_RANGES = {
    "progress": (0, _PROGRESS_MAX),
    "attempts": (0, _SMALLINT_MAX),
    "priority": (-_SMALLINT_MAX - 1, _SMALLINT_MAX),
    "exclusive": (0, 1),
}


# -------------------------------------------------------------------------------------------- what comes with the table


@event.listens_for(MlJobMixin, "init", propagate=True)
def _complete_at_construction(job: MlJobMixin, _args: object, values: dict[str, Any]) -> None:
    for name in ("spec", "metrics"):
        if name in values and f"{name}_json" in values:
            raise InvalidValueError(name, values[name], f"give {name} or {name}_json, not both")
    # Straight into the instance: seven attribute events with their checks, for values that are known to be right, would
    # cost more than all else.
    if is_dataclass(type(job)):  # it has all of this from its fields
        return
    known = inspect(job).dict
    for name, make in _AT_CONSTRUCTION:
        if name not in values:
            known[name] = make()
    if "spec" not in values and "spec_json" not in values:
        known["spec_json"] = "{}"


_AT_CONSTRUCTION: tuple[tuple[str, Callable[[], object]], ...] = (
    ("id", uuid7),
    ("created_at", utc_now),
    ("status", lambda: MlJobStatus.QUEUED),
    ("progress", int),
    ("attempts", int),
    ("priority", int),
    ("exclusive", bool),
)


@event.listens_for(MlJobMixin, "after_mapper_constructed", propagate=True)
def _furnish(mapper: Mapper[Any], cls: type[MlJobMixin]) -> None:
    """Give a newly mapped table its checks, indexes, leases and triggers, once."""
    table = mapper.local_table
    if not isinstance(table, Table) or (mapper.inherits is not None and not mapper.concrete):
        return  # a subclass that shares the table, or has one of its own beside it
    check_dataclass(cls)  # once more, for what a decorator has made of it
    check_mapping(cls, mapper, _TYPES)
    table.info["mljobs_model"] = cls
    kinds: type[StrEnum] = table.c.kind.type.enum
    cls.__kinds__ = kinds
    if "mljobs" in table.info:  # defined once more on the same table, as in a notebook
        cls.__leases__ = table.info["mljobs"]
        return
    lease_name = cls.__lease_tablename__ or short_name(f"{table.name}_leases")
    check_lease_name(cls, lease_name, table.schema, table.metadata.tables)
    _add_checks_and_indexes(table, kinds)
    cls.__leases__ = table.info["mljobs"] = _lease_table(table, lease_name)
    install_triggers(table)
    if cls.__overview_name__ is not None:
        install_overview(table, cls.__leases__, cls.__overview_name__)


_TYPES = {name: getattr(MlJobMixin, name).column.type for name in GUARDED_COLUMNS}


def _add_checks_and_indexes(table: Table, kinds: type[StrEnum]) -> None:
    for constraint in _checks(table, kinds):
        table.append_constraint(constraint)
    _add_indexes(table)


def record_table(table: Table) -> Table:
    """Return what the mixin alone makes of a mapped job table: none of the host's columns, keys, checks and indexes."""
    # In the host's order, which PostgreSQL's statistics keep.
    names = [column.name for column in table.c if column.name in GUARDED_COLUMNS]
    columns = [Column(name, table.c[name].type, primary_key=name == "id") for name in names]
    with_rowid = table.dialect_options["sqlite"]["with_rowid"]
    bare = Table(table.name, MetaData(), *columns, schema=table.schema, sqlite_with_rowid=with_rowid)
    kind_type: Any = table.c.kind.type
    _add_checks_and_indexes(bare, kind_type.enum)
    install_triggers(bare)
    return bare


def _name(prefix: str, table: Table, suffix: str) -> conv:
    """Return a name that no naming convention of the host's changes, and that PostgreSQL can hold."""
    return conv(short_name(f"{prefix}_{table.name}_{suffix}"))


def _quoted(tokens: type[StrEnum] | tuple[StrEnum, ...]) -> str:
    return ", ".join("'{}'".format(token.value.replace("'", "''")) for token in tokens)


def _checks(table: Table, kinds: type[StrEnum]) -> list[CheckConstraint]:
    def check(suffix: str, condition: str, kind: type[CheckConstraint] = CheckConstraint) -> CheckConstraint:
        return kind(text(without_parameters(condition)), name=_name("ck", table, suffix))

    hex_digits = "length(id) = 32 AND id NOT GLOB '*[^0-9a-f]*'"
    return [
        check("kind", f"kind IN ({_quoted(kinds)})"),
        check("status", f"status IN ({_quoted(tuple(MlJobStatus))})"),
        check("progress", f"progress BETWEEN 0 AND {_PROGRESS_MAX}"),
        check("lease", f"lease IS NULL OR status = '{MlJobStatus.RUNNING}'"),
        # PostgreSQL's uuid and json types check these themselves.
        check("id", hex_digits, SqliteCheck),
        check("spec_json", "json_valid(spec_json)", SqliteCheck),
        check("metrics_json", "metrics_json IS NULL OR json_valid(metrics_json)", SqliteCheck),
    ]


def _add_indexes(table: Table) -> None:
    columns = table.c

    def index(suffix: str, *keys: Any, where: str | None = None) -> None:
        condition: dict[str, Any] = (
            {} if where is None else {"postgresql_where": text(where), "sqlite_where": text(where)}
        )
        Index(_name("ix", table, suffix), *keys, **condition)

    index(
        "queue",
        columns.priority.desc(),
        columns.created_at,
        columns.id,
        where=f"status = '{MlJobStatus.QUEUED}'",
    )
    index(
        "kind",
        columns.kind,
        columns.priority.desc(),
        columns.created_at,
        columns.id,
        where=f"status = '{MlJobStatus.QUEUED}'",
    )
    index("active", columns.target_name, columns.kind, where=f"status IN ({_quoted(ACTIVE)})")
    index("created", columns.created_at, columns.id)
    index("finished", columns.finished_at, columns.id, where="finished_at IS NOT NULL")
    index("target", columns.target_name, columns.created_at, columns.id)
    index("failed", columns.created_at, columns.id, where=f"status = '{MlJobStatus.FAILED}'")
    index("retries", columns.retry_of, where="retry_of IS NOT NULL")


def _lease_table(jobs: Table, name: str) -> Table:
    """Return the table of present leases on ``jobs``. The record is history, the lease is the present."""
    token = BigInteger().with_variant(Integer(), "sqlite")  # only INTEGER PRIMARY KEY counts up by itself there
    leases = Table(
        name,
        jobs.metadata,
        Column("token", token, Identity(always=True), primary_key=True),
        Column("job_id", JobId(), ForeignKey(jobs.c.id, ondelete="CASCADE"), nullable=False),
        Column("worker", Text, nullable=False),
        Column("acquired_at", UtcMillis("acquired_at"), nullable=False),
        Column("expires_at", UtcMillis("expires_at"), nullable=False),
        Column("target_lock", Text),
        schema=jobs.schema,
        # A token is never used again: without AUTOINCREMENT SQLite would hand out the highest one twice.
        sqlite_autoincrement=True,
    )
    Index(_name("uq", leases, "job"), leases.c.job_id, unique=True)
    # Partial, for most leases lock no target. And none by expires_at: the table is as small as the work in hand, and a
    # heartbeat that changes no index is a HOT update.
    held = text("target_lock IS NOT NULL")
    Index(_name("uq", leases, "target"), leases.c.target_lock, unique=True, postgresql_where=held, sqlite_where=held)
    return leases


install_hooks(MlJobMixin)


# ------------------------------------------------------------------------------------------------------- our own tables


class Base(DeclarativeBase):
    """The declarative base of our own tables."""

    metadata = MetaData()


metadata = Base.metadata
"""Our own tables: ``ml_jobs`` and ``ml_job_leases``."""


class MlJob(MlJobMixin, Base):
    """A unit of asynchronous machine-learning work, in table ``ml_jobs``."""

    __tablename__ = "ml_jobs"
    __lease_tablename__ = "ml_job_leases"
    __overview_name__ = "ml_jobs_overview"
    __table_is_migrated_by_mljobs__: ClassVar[bool] = True

    kind: Mapped[MlJobKind] = kind_column(MlJobKind)


_OWN_LISTENERS = len(inspect(MlJob).class_manager.dispatch.init)


class MlJobLease(Base):
    """Who works on which job now, in table ``ml_job_leases``. Its ``token`` fences every write of that worker."""

    __table__ = MlJob.__leases__

    if TYPE_CHECKING:
        token: Mapped[int]
        job_id: Mapped[UUID]
        worker: Mapped[str]
        acquired_at: Mapped[datetime]
        expires_at: Mapped[datetime]
        target_lock: Mapped[str | None]
