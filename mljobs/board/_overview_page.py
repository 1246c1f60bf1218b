"""The page *overview*: how things go over hours and weeks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mljobs import jobs
from mljobs._values import utc_now
from mljobs.board._backend import DatabaseAway, TooSlow
from mljobs.board._charts import columns, log_axis, log_ticks, spread
from mljobs.board._finished import HOUR, FinishedKept
from mljobs.board._html import Html
from mljobs.board._now import columns_of
from mljobs.board._site import Site
from mljobs.jobs import Bind, Durations, Finished, KindDurations, Reasons, Spread

logger = logging.getLogger(__name__)
_PAUSE = 0.03  # as long as the count before it takes: half of the time is for others

_FIGURES_KEPT = 10.0


@dataclass(frozen=True, slots=True)
class Period:
    """A span that the overview shows, and how it is divided."""

    name: str
    span: timedelta
    width: timedelta
    word: str
    shape: str
    every: int

    def start(self, moment: datetime) -> datetime:
        """Return when the first of its spans begins."""
        epoch = datetime.fromtimestamp(0, moment.tzinfo)
        return moment - (moment - epoch) % self.width - self.span + self.width


_MINUTE = timedelta(minutes=1)
PERIODS = {
    "1h": Period("1 h", HOUR, _MINUTE, "minute", "hm", 10),
    "24h": Period("24 h", 24 * HOUR, HOUR, "hour", "hm", 3),
    "7d": Period("7 d", 7 * 24 * HOUR, 6 * HOUR, "six hours", "mdhm", 4),
    "30d": Period("30 d", 30 * 24 * HOUR, 24 * HOUR, "day", "md", 4),
}


async def overview(request: Request) -> Response:
    """Show how things go: what finished when, how long jobs take and wait, why they fail, who works."""
    site: Site = request.app.state.site
    viewer = await site.viewer(request)
    chosen = request.query_params.get("span", "24h")
    chosen = chosen if chosen in PERIODS else "24h"
    period, moment = PERIODS[chosen], utc_now()

    def read(bind: Bind) -> tuple[list[Finished], Figures]:
        return _finished(bind, site, period, moment), _figures(bind, site, period)

    finished, figures = await site.backend.read(read)
    snapshot = await site.hub.snapshot(oldest=5)
    html, whole = finished_part(site, period, moment, finished)
    if not whole:
        count_beside(site)
    return site.page(
        request,
        viewer,
        "overview.html",
        here="overview",
        heading="Overview",
        stream="" if whole else viewer.url("events", view="overview", span=chosen),
        read_only=await site.why_read_only(viewer),
        span=chosen,
        spans=PERIODS,
        period=period,
        finished=Html(html),
        moment=moment,
        complete=figures.durations.complete,
        ran=_spreads(figures.durations.kinds, "ran"),
        waited=_spreads(figures.durations.kinds, "waited"),
        reasons=figures.reasons.reasons[:12],
        reasons_complete=figures.reasons.complete,
        failures=sum(reason.jobs for reason in figures.reasons.reasons),
        workers=snapshot.workers(moment),
        registered=snapshot.around.workers is not None,
    )


@dataclass(frozen=True, slots=True)
class Figures:
    """How long jobs take and wait, and why they fail, over a period: read once in some seconds for all viewers."""

    at: float
    durations: Durations
    reasons: Reasons


def _figures(bind: Bind, site: Site, period: Period) -> Figures:
    kept: Figures | None = site.figures.get(period.name)
    if kept is None or time.monotonic() - kept.at > _FIGURES_KEPT:
        since, model = utc_now() - period.span, site.backend.model
        durations = jobs.durations(bind, since=since, model=model)
        reasons = jobs.failure_reasons(bind, since=since, model=model)
        site.figures[period.name] = kept = Figures(time.monotonic(), durations, reasons)
    return kept


def _finished(bind: Bind, site: Site, period: Period, moment: datetime) -> list[Finished]:
    """Return what finished in a period, as far as it is counted."""
    start, model = period.start(moment), site.backend.model
    kept = _kept(site, period)
    kept.count(bind, start, model)
    return kept.per(period.width, start)


def _kept(site: Site, period: Period) -> FinishedKept:
    return site.finished if period.width >= HOUR else site.hub.minutes


def finished_part(site: Site, period: Period, moment: datetime, found: Sequence[Finished]) -> tuple[str, bool]:
    """Return the section of what finished when, and whether all of it is counted."""
    start = period.start(moment)
    counted = _kept(site, period).counted_from(start)
    data = columns_of(found, start, period.width, round(period.span / period.width))
    totals = {name: sum(getattr(one, name) for one in data) for name in ("completed", "failed", "cancelled")}
    label = (
        f"Jobs finished in each {period.word}, by outcome: {totals['completed']} completed, {totals['failed']} failed"
    )
    svg = columns(
        data, height=150, every=period.every, shape=period.shape, label=label, gap=0.6 if len(data) < 40 else 0.35
    )
    values = {
        "period": period, "chart": svg if sum(totals.values()) else None, "totals": totals,
        "counted": None if counted == start else counted,
    }  # fmt: skip
    return site.render("overview_finished.html", values), counted == start


async def render_overview(site: Site, period: Period) -> dict[str, str]:
    """Return the section of what finished when, as far as it is counted now."""
    moment = utc_now()
    found = await site.backend.read(partial(_finished, site=site, period=period, moment=moment))
    html, whole = finished_part(site, period, moment, found)
    if not whole:
        count_beside(site)
    return {"finished": html}


def count_beside(site: Site) -> None:
    """Count what no page has counted yet, unless that is being done."""
    if site.counting is None or site.counting.done():
        site.counting = asyncio.get_running_loop().create_task(_count(site), name="mljobs board, finished jobs")


async def _count(site: Site) -> None:
    kept: FinishedKept = site.finished
    since = PERIODS["30d"].start(utc_now())
    try:
        while kept.counted_from(since) != since and not site.hub.ending:
            await site.backend.read(partial(kept.count, since=since, model=site.backend.model))
            await asyncio.sleep(_PAUSE)
    except (DatabaseAway, TooSlow):
        pass  # the next page that wants it counts on
    except Exception:
        logger.exception("the finished jobs of the last weeks could not be counted")


def _spreads(kinds: Sequence[KindDurations], which: str) -> dict[str, Any]:
    found: list[tuple[str, Spread]] = [(kind.kind, one) for kind in kinds if (one := getattr(kind, which)) is not None]
    low, high = log_axis([one for _, one in found])
    return {"rows": [(kind, one, spread(one, low, high)) for kind, one in found], "ticks": log_ticks(low, high)}
