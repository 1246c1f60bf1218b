"""Figures over the API: stats, workers, runs side by side, the metrics of a target."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mljobs import jobs
from mljobs._values import to_millis, utc_now
from mljobs.board._api_records import moment_text, summary
from mljobs.board._api_requests import answer, number_of, viewer_of
from mljobs.board._compare_page import ids_of
from mljobs.board._compared import TEXT_READ, Compared, compared, lower_is_better
from mljobs.board._format import iso, literal, numeric
from mljobs.board._query import MOST_NAME
from mljobs.board._workers import WorkerRow
from mljobs.jobs import Bind, Filter

_TARGET_RUNS = 500


async def stats(request: Request) -> Response:
    """Return how many jobs there are, what waits, and how long jobs take and wait, by kind."""
    site, _ = await viewer_of(request)
    model, over = site.backend.model, timedelta(hours=number_of(request, "hours", 24, 720))

    def read(bind: Bind) -> tuple[jobs.Stats, jobs.Counts]:
        return jobs.stats(bind, over=over, model=model), jobs.counts(bind, model=model)

    found, counts = await site.backend.read(read)
    kinds: dict[str, dict[str, Any]] = {str(kind): {"counts": {}} for kind in model.__kinds__}
    for (kind, status), number in counts.items():
        kinds.setdefault(str(kind), {"counts": {}})["counts"][str(status)] = number
    for one in found.kinds:
        kinds.setdefault(one.kind, {"counts": {}}).update({**asdict(one), "oldest": moment_text(one.oldest)})
    return answer({"since": iso(found.since), "exact": counts.exact, "complete": found.complete, "kinds": kinds})


async def workers(request: Request) -> Response:
    """Return who works, the silent ones first, as the page shows it."""
    site, _ = await viewer_of(request)
    snapshot = await site.hub.snapshot()

    def shown(row: WorkerRow) -> dict[str, Any]:
        return {
            "worker": row.name, "state": row.state, "jobs": row.held, "concurrency": row.concurrency,
            "kinds": list(row.kinds), "host": row.host, "pid": row.pid, "version": row.version,
            "started_at": moment_text(row.started_at), "last_seen_at": moment_text(row.last_seen_at),
            "silent_seconds": row.silent, "lease_seconds_left": row.left,
        }  # fmt: skip

    moment = utc_now()
    return answer(
        {"workers": [shown(row) for row in snapshot.workers(moment)], "unhandled": snapshot.unhandled(moment)}
    )


async def compared_runs(request: Request) -> Compared:
    """Return the runs that an address names, side by side."""
    site, _ = await viewer_of(request)
    ids, model = ids_of(request), site.backend.model
    return compared(await site.backend.read(lambda bind: jobs.summaries_of(bind, ids, text=TEXT_READ, model=model)))


async def compare(request: Request) -> Response:
    """Return runs side by side."""
    shown = await compared_runs(request)
    return answer({
        "metrics": {name: {"lower_is_better": lower_is_better(name)} for name in shown.metrics},
        "differ": list(shown.varying),
        "same": dict(shown.same),
        "runs": [
            summary(run.job)
            | {"params": {name: literal(value) for name, value in run.params.items()},
               "metrics": {name: numeric(value) for name, value in run.metrics.items()}}
            for run in shown.runs
        ],
    })  # fmt: skip


async def target(request: Request) -> Response:
    """Return the metrics of the runs of one target as columns, for a chart."""
    site, _ = await viewer_of(request)
    model, name = site.backend.model, request.query_params.get("name", "")[:MOST_NAME]
    asked = Filter(target=name, status="completed")
    if kind := request.query_params.get("kind"):
        asked &= Filter(kind=kind)
    page = await site.backend.read(
        lambda bind: jobs.summaries(bind, asked, limit=_TARGET_RUNS, text=TEXT_READ, model=model)
    )
    shown = compared([job for job in reversed(page.jobs) if job.finished_at])
    return answer({
        "at": [to_millis(run.job.finished_at) for run in shown.runs if run.job.finished_at],
        "ids": [str(run.job.id) for run in shown.runs],
        "metrics": {one: [run.metric(one) for run in shown.runs] for one in shown.metrics[:12]},
    })  # fmt: skip
