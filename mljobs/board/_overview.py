"""The page *overview*: how things go over hours and weeks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mljobs import jobs
from mljobs._values import utc_now
from mljobs.board._charts import columns, log_axis, log_ticks, spread
from mljobs.board._now import columns_of
from mljobs.board._site import Site
from mljobs.jobs import Bind, Finished, KindDurations, Model, Spread


@dataclass(frozen=True, slots=True)
class Period:
    """A span that the overview shows, and how it is divided."""

    span: timedelta
    width: timedelta
    word: str
    shape: str
    every: int


PERIODS = {
    "1h": Period(timedelta(hours=1), timedelta(minutes=1), "minute", "hm", 10),
    "24h": Period(timedelta(hours=24), timedelta(hours=1), "hour", "hm", 3),
    "7d": Period(timedelta(days=7), timedelta(hours=6), "six hours", "mdhm", 4),
    "30d": Period(timedelta(days=30), timedelta(days=1), "day", "md", 4),
}


class FinishedKept:
    """What finished in spans of time that are over, which no longer changes: read once, not for every viewer."""

    _FRESH = timedelta(minutes=10)
    _SECONDS = 600.0

    def __init__(self) -> None:
        self._kept: dict[timedelta, tuple[float, dict[datetime, list[Finished]]]] = {}

    def read(self, bind: Bind, width: timedelta, since: datetime, model: Model) -> list[Finished]:
        """Return what finished since, by spans; only what is not known yet is read."""
        made, known = self._kept.get(width, (0.0, {}))
        now = utc_now()
        if time.monotonic() - made > self._SECONDS:
            made, known = time.monotonic(), {}
        from_here = since
        while from_here in known:
            from_here += width
        found = jobs.finished_per(bind, width, since=from_here, model=model)
        fresh: dict[datetime, list[Finished]] = {}
        for one in found:
            fresh.setdefault(one.start, []).append(one)
        start = from_here
        while start + width < now - self._FRESH:
            known[start] = fresh.get(start, [])
            start += width
        self._kept[width] = made, known
        return [
            one
            for start in sorted(known.keys() | fresh)
            if start >= since
            for one in fresh.get(start, known.get(start, []))
        ]


async def overview(request: Request) -> Response:
    """Show how things go: what finished when, how long jobs take and wait, why they fail, who works."""
    site: Site = request.app.state.site
    viewer = await site.viewer(request)
    model = site.backend.model
    chosen = request.query_params.get("span", "24h")
    period = PERIODS.get(chosen, PERIODS["24h"])
    moment = utc_now()
    start = _floor(moment, period.width) - period.span + period.width
    kept: FinishedKept = site.kept

    def read(bind: Bind) -> dict[str, Any]:
        return {
            "finished": kept.read(bind, period.width, start, model),
            "durations": jobs.durations(bind, since=moment - period.span, model=model),
            "reasons": jobs.failure_reasons(bind, since=moment - period.span, model=model),
        }

    found = await site.backend.read(read)
    snapshot = await site.hub.snapshot(oldest=5)
    data = columns_of(found["finished"], start, period.width, round(period.span / period.width))
    totals = {name: sum(getattr(one, name) for one in data) for name in ("completed", "failed", "cancelled")}
    label = (
        f"Jobs finished in each {period.word}, by outcome: {totals['completed']} completed, {totals['failed']} failed"
    )
    svg = columns(
        data, height=150, every=period.every, shape=period.shape, label=label, gap=0.6 if len(data) < 40 else 0.35
    )
    return site.page(
        request,
        viewer,
        "overview.html",
        here="overview",
        heading="Overview",
        read_only=await site.why_read_only(viewer),
        span=chosen if chosen in PERIODS else "24h",
        spans=list(PERIODS),
        period=period,
        chart=svg if sum(totals.values()) else None,
        totals=totals,
        moment=moment,
        complete=found["durations"].complete,
        ran=_spreads(found["durations"].kinds, "ran"),
        waited=_spreads(found["durations"].kinds, "waited"),
        shares={kind.kind: kind.failed for kind in found["durations"].kinds},
        reasons=found["reasons"].reasons[:12],
        reasons_complete=found["reasons"].complete,
        failures=sum(reason.jobs for reason in found["reasons"].reasons),
        workers=snapshot.workers(moment),
        registered=snapshot.around.workers is not None,
    )


def _floor(moment: datetime, width: timedelta) -> datetime:
    epoch = datetime.fromtimestamp(0, moment.tzinfo)
    return moment - (moment - epoch) % width


def _spreads(kinds: Sequence[KindDurations], which: str) -> dict[str, Any]:
    found: list[tuple[str, Spread]] = [(kind.kind, one) for kind in kinds if (one := getattr(kind, which)) is not None]
    low, high = log_axis([one for _, one in found])
    return {"rows": [(kind, one, spread(one, low, high)) for kind, one in found], "ticks": log_ticks(low, high)}
