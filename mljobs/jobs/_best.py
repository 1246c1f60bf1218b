"""Find the completed jobs on a target with the best value of a metric."""

from __future__ import annotations

from typing import Unpack

from sqlalchemy import ColumnElement

from mljobs._values import check_count
from mljobs.errors import InvalidValueError
from mljobs.jobs._base import Bind, M, connection_of, table_of
from mljobs.jobs._filters import Filter, Filters, Where, selection
from mljobs.jobs._paging import Paging
from mljobs.jobs._reading import Page, fetch
from mljobs.record._models import MlJob
from mljobs.record._sql import json_number
from mljobs.states import MlJobStatus

_MOST = 1000


def best(
    session: Bind,
    target_name: str,
    metric: str,
    *,
    lowest: bool = False,
    limit: int = 10,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    where: Where | None = None,
    scan: bool = False,
    model: type[M] = MlJob,  # type: ignore[assignment]
    **fields: Unpack[Filters],
) -> Page[M]:
    """Return the completed jobs on a target that have a metric, the best first; the newest first among equals.

    Args:
        session: The caller's session or connection.
        target_name: The whole name.
        metric: A key of ``metrics`` under which there is a number.
        lowest: Whether less is better, as of a loss.
        limit: At most so many jobs, 1 to 1,000.
        filter: A :class:`~mljobs.Filter`, or its text, to choose among them.
        where: SQLAlchemy expressions of one's own beside it.
        scan: Look at all jobs on the target, not only at the latest 100,000.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.

    Returns:
        The jobs; ``complete`` says whether all on the target were looked at.
    """
    check_count("limit", limit, _MOST)
    if not isinstance(metric, str) or not metric:
        raise InvalidValueError("metric", metric, "expected a key of metrics")
    chosen = selection(model, filter, where, {**fields, "target": target_name})
    table = table_of(model)
    number: ColumnElement[float | None] = json_number(table.c.metrics_json, metric)
    paging = Paging(session, chosen)
    served, looked_at = paging.divided(sort_all=scan)
    latest = [] if scan else paging.latest(served)
    conditions = [*latest, *served, *looked_at, table.c.status == MlJobStatus.COMPLETED, number.is_not(None)]
    order = [number.asc() if lowest else number.desc(), table.c.created_at.desc(), table.c.id.desc()]
    connection_of(session, model)
    jobs = fetch(session, model, conditions, order, limit)
    return Page(tuple(jobs), scanned=paging.reach if latest else None, complete=not latest)
