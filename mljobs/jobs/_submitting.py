"""Queue jobs: one, or very many."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, overload
from uuid import UUID

from sqlalchemy import BigInteger, Connection, bindparam, false, func, insert, inspect, literal, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from mljobs._fields import FIELDS, NAMES
from mljobs._values import to_json_text, to_member, utc_now
from mljobs.db._binds import resolve
from mljobs.db._prepared import Prepared
from mljobs.db._rows import insert_rows
from mljobs.errors import InvalidValueError, JobExistsError
from mljobs.guards._companions import qualified_name
from mljobs.guards._errors import duplicate_id_error
from mljobs.jobs._base import Bind, M, Model, connection_of, is_postgres, lock_sqlite, owner_of, per_model, table_of
from mljobs.jobs._reading import get
from mljobs.jobs._records import is_ml_job, record, session_on
from mljobs.jobs._statements import constant
from mljobs.record._mixin import MlJobMixin
from mljobs.record._models import MlJob
from mljobs.states import ACTIVE, MlJobKind, MlJobStatus
from mljobs.types import JsonText

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect

_CHUNK = 1000


def submit(
    session: Bind,
    /,
    kind: str,
    target_name: str,
    spec: Any = None,
    *,
    priority: int = 0,
    run_after: datetime | timedelta | None = None,
    exclusive: bool = False,
    unless_active: bool = False,
    model: type[M] = MlJob,  # type: ignore[assignment]
    **values: Any,
) -> M:
    """Queue a job.

    Args:
        session: The caller's session or connection; in a session the job is a member of it.
        kind: The kind or its token.
        target_name: What the job works on.
        spec: What to do, any JSON-able value; None for ``{}``.
        priority: Higher is claimed first, -32,768 to 32,767.
        run_after: Not claimed before this time, or for this long.
        exclusive: Never two exclusive jobs at once on one ``target_name``.
        unless_active: Return the queued or running job of this kind and target, if there is one, instead of a second;
            safe between two transactions that cannot see each other.
        model: The mapped job class.
        **values: Other fields of the record, and columns that a host has added.

    Raises:
        InvalidValueError: A value is not one that its field can hold; or ``unless_active`` in a REPEATABLE READ
            transaction, which cannot see what others have committed since it began.
        JobExistsError: You gave an ``id``, and a record with it is there.
    """
    table_of(model)
    special = priority != 0 or exclusive is not False or unless_active or run_after is not None or values
    if not special and is_ml_job(model) and isinstance(session, Connection):
        # The frequent case: the record's constructor would take as long as the statement.
        row = _default_row(kind, target_name, {} if spec is None else spec)
        added: M = _add_row(session, model, row, _insertion(model, _NOT_DEFAULT))
        return added
    if spec is not None:
        values["spec"] = spec
    if run_after is not None:
        values["run_after"] = utc_now() + run_after if isinstance(run_after, timedelta) else run_after
    values |= {"kind": kind, "target_name": target_name, "priority": priority, "exclusive": exclusive}
    job: M = _made(model, values)
    if unless_active:
        active: M | None = _active(session, job, model)
        if active is not None:
            return active
    added_job: M = _add(session, job)
    return added_job


Submission = MlJobMixin | tuple[str, str, Any] | Mapping[str, Any]
"""A record; a kind, target name and spec; or the arguments of ``submit`` by name."""


@overload
def submit_many(
    session: Bind, jobs: Iterable[Submission], *, ids: Literal[False] = ..., model: type[M] = ..., **values: Any
) -> int: ...
@overload
def submit_many(
    session: Bind, jobs: Iterable[Submission], *, ids: Literal[True], model: type[M] = ..., **values: Any
) -> list[UUID]: ...
def submit_many(
    session: Bind,
    jobs: Iterable[Submission],
    *,
    ids: bool = False,
    model: type[M] = MlJob,  # type: ignore[assignment]
    **values: Any,
) -> int | list[UUID]:
    """Queue very many jobs at the speed of COPY, in constant memory, in the caller's transaction.

    A host's own class goes through the ORM, a thousand at a time, because only the ORM knows its defaults and tables.

    Args:
        session: The caller's session or connection.
        jobs: Records; tuples of kind, target name and spec; or dicts of what ``submit`` takes (``kind``, ``target_name``,
            ``spec``, ``priority``, columns of your own and so on). Any length, a generator too.
        ids: Return the ids of all, in the order of ``jobs``.
        model: The mapped job class.
        **values: Fields and own columns of all jobs that are given as tuples or dicts; a dict may say another value.

    Returns:
        How many were queued, or their ids.

    Raises:
        InvalidValueError: A value is not one that its field can hold. Roll back: none is queued then.
        JobExistsError: A record with the id of one of them is there. Roll back, as above.
    """
    table = table_of(model)
    given: list[UUID] = []
    keep = given.append if ids else None
    if is_ml_job(model):
        with _naming_duplicates():
            rows = _rows(jobs, values, keep)
            total = insert_rows(connection_of(session, model), table, table.columns.keys(), rows)
    else:
        total = _add_chunks(session, model, (_record_of(model, job, values) for job in jobs), keep)
    return given if ids else total


def required_fields(model: Any) -> list[str]:
    """Return the arguments that a dataclass cannot be made without; an empty list for any other class."""
    if not is_dataclass(model):
        return []
    return [
        field.name
        for field in fields(model)
        if field.init and field.default is MISSING and field.default_factory is MISSING
    ]


def _made(model: Any, values: dict[str, Any]) -> Any:
    """Return a new job.

    Raises:
        InvalidValueError: The class has no such field. A class with a constructor of its own is not checked here.
    """
    by_constructor = values
    of_dataclass = is_dataclass(model)
    if of_dataclass or inspect(model).class_manager.original_init.__module__.startswith("sqlalchemy."):
        for name, value in values.items():
            if not hasattr(model, name):
                raise InvalidValueError(name, value, f"{model.__name__} has no such field")
    if of_dataclass:
        for name in required_fields(model):
            if name not in values:
                raise InvalidValueError(name, None, f"{model.__name__} needs it: its field has no default")
        taken = {field.name for field in fields(model) if field.init}
        by_constructor = {name: value for name, value in values.items() if name in taken}
    for relationship in inspect(model).relationships:
        given = values.get(relationship.key)
        one = given is not None and not relationship.uselist
        if one and not isinstance(given, relationship.mapper.class_):
            keys = ", ".join(column.name for column in relationship.local_columns)
            reason = f"it is a relationship: give a {relationship.mapper.class_.__name__}, or its key as {keys}"
            raise InvalidValueError(relationship.key, given, reason)
    job: Any = model(**by_constructor)
    for name in values.keys() - by_constructor.keys():
        setattr(job, name, values[name])
    return job


@contextmanager
def _naming_duplicates(job_id: UUID | None = None) -> Iterator[None]:
    """Raise ``JobExistsError``, which names the id, for a record that is there already.

    Args:
        job_id: The id of the record, where only one is added.
    """
    try:
        yield
    except IntegrityError as error:
        duplicate = duplicate_id_error(error)
        if duplicate is None:
            raise
        raise JobExistsError(duplicate.job_id or job_id) from error


def _add(given_bind: Bind, job: Any) -> Any:
    bind = resolve(given_bind)
    if isinstance(bind, Session):
        alone = not bind.new
        bind.add(job)
        with _naming_duplicates(job.id if alone else None):
            bind.flush()
        return job
    model = type(job)
    if is_ml_job(model):
        return _add_row(bind, model, _row_of(job, table_of(model).columns.keys()), _insertion(model, NAMES))
    with session_on(bind) as session:
        session.add(job)
        with _naming_duplicates(job.id):
            session.flush()
        session.refresh(job)
        session.expunge_all()
    return job


def _add_chunks(bind: Bind, model: Model, records: Iterator[Any], keep: Callable[[UUID], object] | None) -> int:
    if isinstance(bind, Connection):
        with session_on(bind) as session:
            return _add_chunks(session, model, records, keep)
    total = 0
    while chunk := list(islice(records, _CHUNK)):
        bind.add_all(chunk)
        with _naming_duplicates():
            bind.flush()
        for job in chunk:
            bind.expunge(job)
            if keep is not None:
                keep(job.id)
        total += len(chunk)
    return total


def _record_of(model: Model, job: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(job, model):
        return job
    if isinstance(job, Mapping):
        given = {**values, **job}
    else:
        kind, target_name, spec = _checked_tuple(job)
        given = {**values, "kind": kind, "target_name": target_name, "spec": spec}
    if given.get("spec", "") is None:
        del given["spec"]
    if isinstance(given.get("run_after"), timedelta):
        given["run_after"] = utc_now() + given["run_after"]
    return _made(model, given)


def _checked_tuple(job: Any) -> tuple[str, str, Any]:
    if not isinstance(job, tuple) or len(job) != 3:
        reason = "expected a record, a tuple of kind, target name and spec, or a dict of what submit takes"
        raise InvalidValueError("jobs", job, reason)
    kind, target_name, spec = job
    return kind, target_name, {} if spec is None else spec


def _add_row(connection: Connection, model: Model, row: tuple[Any, ...], insertion: Prepared) -> Any:
    detached: MlJob = record(model, row)
    try:
        insertion.answer(connection, detached.__dict__)
    except IntegrityError as error:  # as _naming_duplicates does, which costs a generator more
        if duplicate_id_error(error) is None:
            raise
        raise JobExistsError(row[0]) from error
    return detached


class _MadeJson(JsonText):
    """JSON text that ``to_json_text`` has made, so that it need not be checked."""

    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> None:
        """Leave the value as it is."""


@per_model
def _insertion(model: Model, given: tuple[str, ...]) -> Prepared:
    """Return the INSERT of a job. The columns that are not ``given`` get their defaults, which stand in its text."""
    table = table_of(model)
    types = {name: table.c[name].type for name in given}
    if given is _NOT_DEFAULT:
        types["spec_json"] = _MadeJson("spec_json")
    values: dict[str, Any] = {name: bindparam(name, type_=of) for name, of in types.items()}
    for field in FIELDS:
        if field.name not in given and field.default is not None:
            values[field.name] = false() if field.default is False else constant(field.default)
    return Prepared(lambda _: insert(table).values(values))


def _active(bind: Bind, job: Any, model: Model) -> Any:
    """Return the active job of the same kind and target; others who ask wait until this transaction has ended."""
    connection = connection_of(bind, model)
    table = table_of(model)
    if hold_off_others(connection, model, job.kind.value, job.target_name) == "repeatable read":
        raise InvalidValueError(
            "unless_active",
            True,
            "a REPEATABLE READ transaction cannot see what others have committed; use READ COMMITTED",
        )
    return first_active(bind, model, table.c.kind == job.kind, table.c.target_name == job.target_name)


def hold_off_others(connection: Connection, model: Model, *subject: str) -> str | None:
    """Make others who ask about ``subject`` wait until this transaction ends; return its isolation on PostgreSQL."""
    if not is_postgres(connection):
        lock_sqlite(connection, model)
        return None
    place = "/".join((qualified_name(connection, table_of(model)), *subject))
    digest = hashlib.sha256(place.encode()).digest()
    key = literal(int.from_bytes(digest[:8], "big", signed=True), BigInteger())
    row = connection.execute(
        select(func.pg_advisory_xact_lock(key), func.current_setting("transaction_isolation"))
    ).one()
    isolation: str = row[1]
    return isolation


def first_active(bind: Bind, model: Model, *where: Any) -> Any:
    """Return the oldest queued or running job that meets the conditions; None where there is none."""
    table = table_of(model)
    found = (
        connection_of(bind, model)
        .execute(
            select(table.c.id)
            .where(*where, table.c.status.in_(ACTIVE))
            .order_by(table.c.created_at, table.c.id)
            .limit(1)
        )
        .scalar()
    )
    return None if found is None else get(bind, found, model=owner_of(model))


def _rows(
    jobs: Iterable[Any], values: Mapping[str, Any], keep: Callable[[UUID], object] | None
) -> Iterator[tuple[Any, ...]]:
    names = table_of(MlJob).columns.keys()
    for job in jobs:
        if isinstance(job, tuple) and not values:
            row = _default_row(*_checked_tuple(job))
        else:
            made = _record_of(MlJob, job, values)  # kept in a variable: its state goes with it
            row = _row_of(made, names)
        if keep is not None:
            keep(row[0])
        yield row


def _row_of(job: Any, names: Sequence[str]) -> tuple[Any, ...]:
    """Return the row of a record that no flush looks at."""
    state = inspect(job).dict
    for name in ("kind", "target_name"):
        if state.get(name) is None:
            raise InvalidValueError(name, None, "every job has one")
    return tuple([state.get(name) for name in names])


def _default_row(kind: str, target_name: str, spec: Any) -> tuple[Any, ...]:
    """Return the row of a new job that has no more than these: in a tenth of the time that the record takes."""
    member = to_member(MlJobKind, "kind", kind)
    if target_name is None:
        raise InvalidValueError("target_name", None, "every job has one")
    return (uuid7(), member, target_name, _QUEUED, 0, utc_now(), *_UNSET, to_json_text("spec", spec), *_REST)


_NOT_DEFAULT = ("id", "kind", "target_name", "created_at", "spec_json")
"""The columns in which ``_default_row`` has no default."""
_QUEUED = MlJobStatus.QUEUED
_DEFAULTS = tuple(field.default for field in FIELDS)
_UNSET = _DEFAULTS[NAMES.index("created_at") + 1 : NAMES.index("spec_json")]
_REST = _DEFAULTS[NAMES.index("spec_json") + 1 :]
