"""Which targets there are and what was done on each; bounded counts; what a connection may do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Boolean, Connection, String, func, select, type_coerce
from sqlalchemy.exc import DBAPIError

from mljobs._values import storable_text
from mljobs.jobs._base import Bind, Model, check_count, connection_of, is_postgres, lock_sqlite, table_of
from mljobs.jobs._filters import Filter, conditions
from mljobs.jobs._paging import MAX_PAGE
from mljobs.jobs._summaries import JobSummary, summaries_of
from mljobs.record._models import MlJob


def count_up_to(session: Bind, limit: int, filter: Filter | str | None = None, *, model: Model = MlJob) -> int:  # noqa: A002
    """Return how many jobs match, or ``limit`` where it is as many or more: no more rows are found than that.

    Args:
        session: The caller's session or connection.
        limit: At least 1.
        filter: A :class:`~mljobs.Filter`, or its text.
        model: The mapped job class.
    """
    table = table_of(model)
    some = select(table.c.id).where(*conditions(model, filter)).limit(limit).subquery()
    found: int = connection_of(session, model).scalar(select(func.count()).select_from(some)) or 0
    return found


def target_names(
    session: Bind, *, prefix: str = "", after: str | None = None, limit: int = 50, model: Model = MlJob
) -> list[str]:
    """Return what jobs work on, by name, each once; a step in the index for each name, however many jobs it has.

    Args:
        session: The caller's session or connection.
        prefix: How the names begin.
        after: Names after this one.
        limit: At most so many, 1 to 10,000.
        model: The mapped job class.
    """
    check_count("limit", limit, MAX_PAGE)
    names = table_of(model).c.target_name
    connection = connection_of(session, model)
    first = select(func.min(names).label("name"))
    if after is not None:
        first = first.where(names > storable_text("after", after))
    if prefix:
        first = first.where(names >= storable_text("prefix", prefix))
    found = first.cte("found", recursive=True)
    following = select(func.min(names)).where(names > found.c.name).scalar_subquery()
    steps = found.union_all(select(following).where(found.c.name.is_not(None)))
    listed = []
    for name in connection.scalars(select(type_coerce(steps.c.name, String())).limit(limit)):
        if name is None or not name.startswith(prefix):
            break
        listed.append(name)
    return listed


def target_jobs(
    session: Bind, targets: Iterable[str], *, limit: int = 20, model: Model = MlJob
) -> dict[str, list[JobSummary]]:
    """Return the newest jobs on each of these targets, without ``spec`` and ``metrics``.

    Args:
        session: The caller's session or connection.
        targets: Whole names.
        limit: At most so many for each, 1 to 10,000.
        model: The mapped job class.
    """
    check_count("limit", limit, MAX_PAGE)
    table, connection = table_of(model), connection_of(session, model)
    ids: dict[str, list[Any]] = {}
    for target in dict.fromkeys(targets):
        newest = select(table.c.id).where(table.c.target_name == target)
        newest = newest.order_by(table.c.created_at.desc(), table.c.id.desc()).limit(limit)
        ids[target] = list(connection.scalars(newest))
    found = {job.id: job for job in _in_parts(connection, ids, model)}
    return {target: [found[one] for one in own if one in found] for target, own in ids.items()}


def _in_parts(connection: Connection, ids: dict[str, list[Any]], model: Model) -> list[JobSummary]:
    wanted = [one for own in ids.values() for one in own]
    parts = (wanted[at : at + 1000] for at in range(0, len(wanted), 1000))
    return [job for part in parts for job in summaries_of(connection, part, text=0, model=model)]


def limit_time(session: Bind, seconds: float, *, model: Model = MlJob) -> None:
    """Let each statement of this transaction run for so long at most; on PostgreSQL, SQLite knows no such limit.

    Args:
        session: The caller's session or connection.
        seconds: Above 0.
        model: The mapped job class.
    """
    connection = connection_of(session, model)
    if is_postgres(connection):
        setting = func.set_config("statement_timeout", str(max(1, round(seconds * 1000))), True)
        connection.execute(select(setting))


def why_read_only(session: Bind, *, model: Model = MlJob) -> str | None:
    """Return why jobs cannot be changed on this connection, in words; None where they can.

    Args:
        session: The caller's session or connection.
        model: The mapped job class.
    """
    connection = connection_of(session, model)
    if not is_postgres(connection):
        return _why_sqlite_read_only(connection, model)
    recovery = func.pg_is_in_recovery(type_=Boolean)
    only = func.current_setting("transaction_read_only", type_=String)
    quoted = connection.dialect.identifier_preparer.format_table(table_of(model))
    may_insert, may_update = (func.has_table_privilege(quoted, what, type_=Boolean) for what in ("INSERT", "UPDATE"))
    replica, setting, inserts, updates = connection.execute(select(recovery, only, may_insert, may_update)).one()
    if replica:
        return "the database is a replica"
    if setting == "on":
        return "transactions are read only"
    missing = [word for word, granted in (("INSERT", inserts), ("UPDATE", updates)) if not granted]
    return f"the role lacks {' and '.join(missing)}" if missing else None


def _why_sqlite_read_only(connection: Connection, model: Model) -> str | None:
    try:
        lock_sqlite(connection, model)  # writes nothing, but must be allowed to
    except DBAPIError as error:
        return str(error.orig).partition("\n")[0]
    return None
