"""The page *target*: the runs on one target."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mljobs import jobs
from mljobs._values import utc_now
from mljobs.board._compared import (
    METRIC_COLUMNS,
    TEXT_READ,
    Cell,
    Compared,
    RunRow,
    compared,
    lower_is_better,
)
from mljobs.board._plots import Point, target_chart, took_chart
from mljobs.board._query import MOST_NAME
from mljobs.board._site import Site, Viewer
from mljobs.jobs import Bind, Filter, JobSummary
from mljobs.states import MlJobStatus

_RUNS = 200
_PARAM_COLUMNS = 7
_SPANS = {"7d": timedelta(days=7), "30d": timedelta(days=30), "90d": timedelta(days=90), "all": None}


async def target(request: Request) -> Response:
    """Show the runs of one target: a metric over time, the best so far, what changed from run to run."""
    site: Site = request.app.state.site
    viewer = await site.viewer(request)
    query = request.query_params
    name, model = query.get("name", "")[:MOST_NAME], site.backend.model
    span = query.get("span") if query.get("span") in _SPANS else "all"
    since = _SPANS[span or "all"]

    def read(bind: Bind) -> tuple[list[str], list[JobSummary], bool]:
        newest = jobs.target_jobs(bind, [name], limit=_RUNS, model=model)[name]
        kinds = list(dict.fromkeys(str(job.kind) for job in newest))
        kind = query.get("kind") if query.get("kind") in kinds else next(iter(kinds), None)
        if kind is None:
            return [], [], True
        asked = Filter(target=name, kind=kind)
        if since is not None:
            asked &= Filter(created_after=utc_now() - since)
        page = jobs.summaries(bind, asked, limit=_RUNS, text=TEXT_READ, model=model)
        return [kind, *(one for one in kinds if one != kind)], list(page.jobs), page.cursor is None

    kinds, newest, whole = await site.backend.read(read)
    if not kinds:
        raise HTTPException(404, "No job has worked on this target.")
    shown = compared(newest[::-1])
    metric = shown.chosen(query.get("metric"))
    lower = query.get("best") == "low" if query.get("best") in ("low", "high") else lower_is_better(metric or "")
    return site.page(
        request,
        viewer,
        "target.html",
        here="targets",
        heading=name[:60],
        read_only=await site.why_read_only(viewer),
        name=name,
        kind=kinds[0],
        kinds=sorted(kinds),
        span=span,
        spans=list(_SPANS),
        whole=whole,
        first=newest[-1].created_at if newest else None,
        **_target_values(viewer, shown, metric, lower=lower),
    )


def _target_values(viewer: Viewer, shown: Compared, metric: str | None, *, lower: bool) -> dict[str, Any]:
    points = [
        Point(
            run.job,
            run.job.finished_at,
            run.metric(metric) if metric and run.job.status is MlJobStatus.COMPLETED else None,
            run.took,
            viewer.url(f"jobs/{run.job.id}"),
        )
        for run in shown.runs
        if run.job.finished_at is not None
    ]
    points.sort(key=lambda point: point.at)
    best = shown.best(metric, lower=lower) if metric else None
    metrics = tuple(dict.fromkeys([*([metric] if metric else []), *shown.metrics]))[:METRIC_COLUMNS]
    params = shown.varying[:_PARAM_COLUMNS]
    rows = []
    for at in range(len(shown.runs) - 1, -1, -1):
        run, before = shown.runs[at], shown.runs[at - 1] if at else None
        rows.append(
            RunRow(
                run.job,
                run is best,
                tuple(Cell.of(run.metrics, one, best=run is best and one == metric) for one in metrics),
                tuple(Cell.of(run.params, one, beside=before.params if before else None) for one in params),
                run.took,
            )
        )
    values: dict[str, Any] = {
        "metric": metric,
        "lower": lower,
        "all_metrics": shown.metrics[:12],
        "metrics": metrics,
        "params": params,
        "params_left": len(shown.varying) - len(params),
        "rows": rows,
        "chart": None,
        "took": None,
        "series": None,
    }
    if len(points) > 1:
        begin, end = points[0].at, points[-1].at
        pad = (end - begin) * 0.012 or timedelta(minutes=1)
        begin, end = begin - pad, end + pad
        if metric and any(point.value is not None for point in points):
            values["chart"] = target_chart(points, metric, lower=lower, begin=begin, end=end)
        values["took"] = took_chart(points, begin=begin, end=end)
    return values
