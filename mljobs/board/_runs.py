"""The pages *targets*, *target* and *compare*."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mljobs import jobs
from mljobs._values import to_job_id, utc_now
from mljobs.board._compared import (
    MOST_RUNS,
    TEXT_READ,
    Compared,
    Run,
    axes_of,
    compared,
    is_neutral,
    lower_is_better,
    names_of,
    ranked,
)
from mljobs.board._format import literal
from mljobs.board._plots import Point, parallel, target_chart, took_chart
from mljobs.board._site import Site, Viewer
from mljobs.errors import InvalidValueError
from mljobs.jobs import Bind, Filter, JobSummary
from mljobs.states import MlJobStatus

_TARGETS = 30
_OUTCOMES = 12
_RUNS = 200
_NAME = 10_000
_METRIC_COLUMNS, _PARAM_COLUMNS = 4, 7

# ----------------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True, slots=True)
class TargetRow:
    """A target in the list."""

    name: str
    kinds: str
    outcomes: Sequence[JobSummary]
    last: JobSummary
    usual: float | None
    failed: int
    seen: int


async def targets(request: Request) -> Response:
    """Show what jobs work on."""
    site: Site = request.app.state.site
    viewer = await site.viewer(request)
    model = site.backend.model
    prefix, after = request.query_params.get("q", "")[:_NAME], request.query_params.get("after")

    def read(bind: Bind) -> tuple[list[str], dict[str, list[JobSummary]]]:
        names = jobs.target_names(bind, prefix=prefix, after=after, limit=_TARGETS + 1, model=model)
        return names, jobs.target_jobs(bind, names[:_TARGETS], limit=_OUTCOMES, model=model)

    names, found = await site.backend.read(read)
    rows = [_target_row(name, found[name]) for name in names[:_TARGETS] if found.get(name)]
    return site.page(
        request,
        viewer,
        "targets.html",
        here="targets",
        heading="Targets",
        read_only=await site.why_read_only(viewer),
        rows=rows,
        q=prefix,
        after=after,
        older=names[_TARGETS - 1] if len(names) > _TARGETS else None,
    )


def _target_row(name: str, newest: Sequence[JobSummary]) -> TargetRow:
    took = sorted(
        (job.finished_at - job.started_at).total_seconds()
        for job in newest
        if job.status is MlJobStatus.COMPLETED and job.finished_at and job.started_at
    )
    kinds = ", ".join(dict.fromkeys(str(job.kind) for job in newest))
    failed = sum(job.status is MlJobStatus.FAILED for job in newest)
    outcomes = list(newest[:_OUTCOMES])[::-1]
    return TargetRow(name, kinds, outcomes, newest[0], took[len(took) // 2] if took else None, failed, len(newest))


# ------------------------------------------------------------------------------------------------------------ target

_SPANS = {"7d": timedelta(days=7), "30d": timedelta(days=30), "90d": timedelta(days=90), "all": None}


@dataclass(frozen=True, slots=True)
class Cell:
    """A value in a table of runs."""

    text: str
    differs: bool
    best: bool = False
    share: float | None = None


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run in the table of its target, or of a comparison."""

    job: JobSummary
    best: bool
    metrics: tuple[Cell, ...]
    params: tuple[Cell, ...]
    took: float | None


async def target(request: Request) -> Response:
    """Show the runs of one target: a metric over time, the best so far, what changed from run to run."""
    site: Site = request.app.state.site
    viewer = await site.viewer(request)
    query = request.query_params
    name, model = query.get("name", "")[:_NAME], site.backend.model
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
    metrics = tuple(dict.fromkeys([*([metric] if metric else []), *shown.metrics]))[:_METRIC_COLUMNS]
    params = shown.varying[:_PARAM_COLUMNS]
    rows = []
    for at in range(len(shown.runs) - 1, -1, -1):
        run, before = shown.runs[at], shown.runs[at - 1] if at else None
        rows.append(
            RunRow(
                run.job,
                run is best,
                tuple(
                    Cell(_text(run.metrics, one), differs=False, best=run is best and one == metric) for one in metrics
                ),
                tuple(
                    Cell(text, differs=before is not None and text != _text(before.params, one))
                    for one in params
                    for text in [_text(run.params, one)]
                ),
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


def _text(values: Any, name: str) -> str:
    return literal(values[name]).strip('"') if name in values else ""


# ----------------------------------------------------------------------------------------------------------- compare


def ids_of(request: Request) -> list[UUID]:
    """Return the jobs that an address names, each once, at most 50.

    Raises:
        HTTPException: One of them is no id (422).
    """
    try:
        found = [to_job_id(text) for text in request.query_params.getlist("id")]
    except InvalidValueError as error:
        raise HTTPException(422, "One of these is not the id of a job.") from error
    return list(dict.fromkeys(found))[:MOST_RUNS]


async def compare(request: Request) -> Response:
    """Show runs side by side, the best first."""
    site: Site = request.app.state.site
    viewer = await site.viewer(request)
    ids, model = ids_of(request), site.backend.model
    read_only = await site.why_read_only(viewer)
    if not ids:
        return await _nothing_to_compare(request, site, viewer, read_only)
    found = await site.backend.read(lambda bind: jobs.summaries_of(bind, ids, text=TEXT_READ, model=model))
    if not found:
        raise HTTPException(404, "None of these jobs is there. They may have been pruned.")
    shown = compared(found)
    metric = shown.chosen(request.query_params.get("metric"))
    lower = lower_is_better(metric or "")
    order = ranked(shown, metric, lower=lower)
    reference = next((run for run in order if str(run.job.id) == request.query_params.get("ref")), order[0])
    metrics = tuple(dict.fromkeys([*([metric] if metric else []), *shown.metrics]))[:_METRIC_COLUMNS]
    axes = axes_of(shown, metric)
    names = list(dict.fromkeys((run.job.target_name, str(run.job.kind)) for run in order))
    return site.page(
        request,
        viewer,
        "compare.html",
        here="compare",
        heading=f"Compare {len(order)} runs" if len(order) > 1 else "One run",
        read_only=read_only,
        ids=[str(one) for one in ids],
        gone=len(ids) - len(found),
        shown=shown,
        metric=metric,
        lower=lower,
        lowers={name: lower_is_better(name) for name in metrics},
        metrics=metrics,
        more_metrics=[name for name in shown.metrics if name not in metrics][:12],
        rows=[_compared_row(run, shown, reference, metrics) for run in order],
        reference=reference.job.id,
        targets=names[:5],
        chart=parallel(axes, [run.job.id for run in order], names_of(order, metric))
        if len(axes) > 1 and len(order) > 1
        else None,
    )


async def _nothing_to_compare(request: Request, site: Site, viewer: Viewer, read_only: str | None) -> Response:
    model = site.backend.model

    def read(bind: Bind) -> list[tuple[str, str, list[str]]]:
        lately = jobs.summaries(bind, Filter(status=MlJobStatus.COMPLETED), limit=400, text=0, model=model).jobs
        groups: dict[tuple[str, str], list[str]] = {}
        for job in lately:
            groups.setdefault((job.target_name, str(job.kind)), []).append(str(job.id))
        many = sorted(groups.items(), key=lambda group: -len(group[1]))
        return [(name, kind, ids[:12]) for (name, kind), ids in many if len(ids) > 1][:12]

    groups = await site.backend.read(read)
    return site.page(
        request, viewer, "compare_none.html", here="compare", heading="Compare", read_only=read_only, groups=groups
    )


def _compared_row(run: Run, shown: Compared, reference: Run, metrics: Sequence[str]) -> RunRow:
    cells = []
    for name in metrics:
        values = [value for other in shown.runs if (value := other.metric(name)) is not None]
        own = run.metric(name)
        best = (min if lower_is_better(name) else max)(values) if values and not is_neutral(name) else None
        low, high = min(values, default=0), max(values, default=0)
        share = None if own is None else 6 + 94 * (own - low) / (high - low) if high > low else 100
        cells.append(Cell(_text(run.metrics, name), differs=False, best=own is not None and own == best, share=share))
    params = tuple(
        Cell(text, differs=text != _text(reference.params, name))
        for name in shown.varying
        for text in [_text(run.params, name)]
    )
    return RunRow(run.job, run is reference, tuple(cells), params, run.took)
