"""The page *targets*: what jobs work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from mljobs import jobs
from mljobs.board._query import MOST_NAME
from mljobs.board._site import Site
from mljobs.jobs import Bind, JobSummary
from mljobs.states import MlJobStatus

_TARGETS = 30
_OUTCOMES = 12


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
    prefix, after = request.query_params.get("q", "")[:MOST_NAME], request.query_params.get("after")

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
