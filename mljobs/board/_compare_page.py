"""The page *compare*: runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mljobs import jobs
from mljobs._values import to_job_id
from mljobs.board._compared import (
    METRIC_COLUMNS,
    MOST_RUNS,
    TEXT_READ,
    Cell,
    Compared,
    Run,
    RunRow,
    axes_of,
    compared,
    is_neutral,
    lower_is_better,
    names_of,
    ranked,
)
from mljobs.board._plots import parallel
from mljobs.board._site import Site, Viewer
from mljobs.errors import InvalidValueError
from mljobs.jobs import Bind, Filter
from mljobs.states import MlJobStatus


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
    metrics = tuple(dict.fromkeys([*([metric] if metric else []), *shown.metrics]))[:METRIC_COLUMNS]
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
        cells.append(Cell.of(run.metrics, name, best=own is not None and own == best, share=share))
    params = tuple(Cell.of(run.params, name, beside=reference.params) for name in shown.varying)
    return RunRow(run.job, run is reference, tuple(cells), params, run.took)
