"""The targets and the jobs on each; bounded counts; whether a connection may write."""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.operators import custom_op

from mljobs._values import check_count, storable_text
from mljobs.jobs._base import Bind, Model, connection_of, is_postgres, lock_sqlite, table_of
from mljobs.jobs._filters import Filter, selection
from mljobs.jobs._paging import MAX_PAGE, Paging
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
    return Paging(session, selection(model, filter, None, {})).count(limit)


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
    # In the order of the index: by bytes, which on PostgreSQL have operators of their own.
    postgres = is_postgres(connection)
    later, begin = ("~>~", "~>=~") if postgres else (">", ">=")
    by = sa.UnaryExpression(names, modifier=custom_op("USING ~<~")) if postgres else names.asc()
    first = sa.select(names.label("name")).order_by(by).limit(1)
    if after is not None:
        first = first.where(names.op(later, is_comparison=True)(storable_text("after", after)))
    if prefix:
        first = first.where(names.op(begin, is_comparison=True)(storable_text("prefix", prefix)))
    found = sa.select(first.subquery().c.name).cte("found", recursive=True)
    following = sa.select(names).where(names.op(later, is_comparison=True)(found.c.name)).order_by(by).limit(1)
    steps = found.union_all(sa.select(following.scalar_subquery()).where(found.c.name.is_not(None)))
    listed = []
    for name in connection.scalars(sa.select(sa.type_coerce(steps.c.name, sa.String())).limit(limit)):
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
    found: dict[str, list[JobSummary]] = {storable_text("targets", target): [] for target in targets}
    newest = sa.select(table.c.id).order_by(table.c.created_at.desc(), table.c.id.desc()).limit(limit)
    if is_postgres(connection):
        listed = sa.func.unnest(sa.literal(list(found), sa.ARRAY(sa.Text())))
        wanted = listed.table_valued("name").render_derived(name="wanted")
        each = newest.where(table.c.target_name == wanted.c.name).lateral()
        ids = connection.scalars(sa.select(each.c.id).select_from(wanted.join(each, sa.true()))).all()
    else:  # it has no LATERAL, and a statement more costs it little
        one = newest.where(table.c.target_name == sa.bindparam("name"))
        ids = [job_id for target in found for job_id in connection.scalars(one, {"name": target})]
    for at in range(0, len(ids), MAX_PAGE):
        for job in summaries_of(connection, ids[at : at + MAX_PAGE], text=0, model=model):
            found[job.target_name].append(job)
    return found


def limit_time(session: Bind, seconds: float, *, model: Model = MlJob) -> None:
    """Let each statement of this transaction run for so long at most; on PostgreSQL, SQLite knows no such limit.

    Args:
        session: The caller's session or connection.
        seconds: Above 0.
        model: The mapped job class.
    """
    connection = connection_of(session, model)
    if is_postgres(connection):
        setting = sa.func.set_config("statement_timeout", str(max(1, round(seconds * 1000))), True)
        connection.execute(sa.select(setting))


def why_read_only(session: Bind, *, model: Model = MlJob) -> str | None:
    """Return why jobs cannot be changed on this connection, in words; None where they can.

    Args:
        session: The caller's session or connection.
        model: The mapped job class.
    """
    connection = connection_of(session, model)
    if not is_postgres(connection):
        return _why_sqlite_read_only(connection, model)
    recovery = sa.func.pg_is_in_recovery(type_=sa.Boolean)
    only = sa.func.current_setting("transaction_read_only", type_=sa.String)
    quoted = connection.dialect.identifier_preparer.format_table(table_of(model))
    may_insert, may_update = (
        sa.func.has_table_privilege(quoted, what, type_=sa.Boolean) for what in ("INSERT", "UPDATE")
    )
    replica, setting, inserts, updates = connection.execute(sa.select(recovery, only, may_insert, may_update)).one()
    if replica:
        return "the database is a replica"
    if setting == "on":
        return "transactions are read only"
    missing = [word for word, granted in (("INSERT", inserts), ("UPDATE", updates)) if not granted]
    return f"the role lacks {' and '.join(missing)}" if missing else None


def _why_sqlite_read_only(connection: sa.Connection, model: Model) -> str | None:
    try:
        lock_sqlite(connection, model)  # writes nothing, but must be allowed to
    except DBAPIError as error:
        return str(error.orig).partition("\n")[0]
    return None
