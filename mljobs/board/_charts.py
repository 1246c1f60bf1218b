"""Charts as SVG: x in per cent and y in pixels, so that text never stretches; no style attribute, so that any CSP holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from mljobs.board._format import clock, iso, short
from mljobs.board._html import Html
from mljobs.jobs import Spread
from mljobs.states import MlJobStatus

R = MlJobStatus.RUNNING
C, F, X = MlJobStatus.COMPLETED, MlJobStatus.FAILED, MlJobStatus.CANCELLED
FILL = {R: "frun", C: "fok", F: "fbad", X: "fq"}
"""What colours a bar of a job in each state."""


def join(parts: Sequence[Html]) -> Html:
    """Return the parts one after the other."""
    return Html("").join(parts)


def bar(percent: int, usual: float | None = None, *, fill: str = "frun", label: str = "") -> Html:
    """Return a bar of progress, with a tick where the usual run would be by now."""
    tick = (
        Html('<rect class="tick" x="{:.1f}%" y="0" width="1.5" height="10"/>').format(min(usual, 99.6))
        if usual is not None
        else ""
    )
    hatch = Html('<rect fill="url(#hatch)" y="2" width="{}%" height="6"/>').format(percent) if fill == "fwarn" else ""
    return Html(
        '<svg class="bar" role="progressbar" aria-valuenow="{0}" aria-valuemin="0" aria-valuemax="100" aria-label="{1}">'
        '<rect class="ftr" y="2" width="100%" height="6" rx="1"/>'
        '<rect class="{2}" y="2" width="{0}%" height="6" rx="1"/>{3}{4}</svg>'
    ).format(percent, label, fill, hatch, tick)


def cell(percent: float, fill: str = "fq") -> Html:
    """Return a small bar beside a figure."""
    return Html(
        '<svg class="cell" aria-hidden="true"><rect class="ftr" y="3" width="100%" height="2"/>'
        '<rect class="{}" y="1" width="{:.0f}%" height="6" rx="1"/></svg>'
    ).format(fill, max(0.0, min(100.0, percent)))


def nice(highest: float) -> tuple[float, float]:
    """Return a round upper end of an axis, and the step of its lines."""
    if highest <= 0:
        return 1, 1
    step: float = 10 ** math.floor(math.log10(highest))
    if highest / step < 2:
        step /= 2
    elif highest / step > 5:
        step *= 2
    return step * math.ceil(highest / step), step


# ---------------------------------------------------------------------------------------------------------- finished


@dataclass(frozen=True, slots=True)
class Column:
    """What finished in one span of time."""

    start: datetime
    completed: int
    failed: int
    cancelled: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.completed + self.failed + self.cancelled


def columns(
    data: Sequence[Column], *, height: int, every: int, shape: str, label: str, gap: float, side: str = "left"
) -> Html:
    """Return stacked columns: failed at the foot, where they compare, completed above, cancelled on top."""
    highest, step = nice(max((one.total for one in data), default=0) or 1)
    unit = height / highest
    width = 100 / len(data)
    parts = []
    lines = [step * at for at in range(1, int(highest / step) + 1)] if highest > 1 else [1]
    for value in lines:
        y = height - value * unit
        left = Html('<text class="e" x="-6" y="{1:.0f}">{0}</text>')
        right = Html('<text x="100%" dx="4" y="{1:.0f}">{0}</text>')
        parts.append(Html('<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(y))
        parts.append((right if side == "right" else left).format(f"{value:g}", y + 4))
    worst = max(range(len(data)), key=lambda at: data[at].failed)
    for at, one in enumerate(data):
        x, wide = at * width + gap / 2, width - gap
        parts.append(_column(one, x, wide, height, unit))
        if at % every == every - 1:
            parts.append(
                Html('<text class="c" x="{:.2f}%" y="{}" data-t="{}" data-f="{}">{}</text>').format(
                    x + wide / 2, height + 17, iso(one.start), shape, clock(one.start, shape)
                )
            )
        if at == worst and one.failed >= 5 and one.failed * 3 > one.total and side == "left":
            anchor = "c" if 6 < x < 94 else "e" if x >= 94 else ""
            parts.append(
                Html('<text class="t1 {}" x="{:.2f}%" y="{:.0f}">{} failed</text>').format(
                    anchor, x + wide / 2, height - one.total * unit - 8, one.failed
                )
            )
    parts.append(Html('<line class="axis" x1="0" x2="100%" y1="{0}.5" y2="{0}.5"/>').format(height))
    return Html('<svg class="plot" height="{}" role="img" aria-label="{}">{}</svg>').format(height, label, join(parts))


def _column(one: Column, x: float, wide: float, height: int, unit: float) -> Html:
    title = f"{clock(one.start, 'full')} UTC: {one.completed:,} completed, {one.failed:,} failed"
    title += f", {one.cancelled:,} cancelled" if one.cancelled else ""
    low = float(height)
    rects = []
    for jobs, fill in ((one.failed, "fbad"), (one.completed, "fok"), (one.cancelled, "fcan")):
        if jobs:
            tall = max(jobs * unit, 1.0)
            rects.append(
                Html('<rect class="{}" x="{:.2f}%" y="{:.1f}" width="{:.2f}%" height="{:.1f}"/>').format(
                    fill, x, low - tall, wide, tall
                )
            )
            low -= tall + 1  # a gap parts the colours, which alone would not do
    hit = Html('<rect class="hit" x="{:.2f}%" y="0" width="{:.2f}%" height="{}"/>').format(x, wide, height)
    return Html("<g><title>{}</title>{}{}</g>").format(title, hit, join(rects))


# ------------------------------------------------------------------------------------------------------------ spread


def _log_x(seconds: float, low: float, high: float) -> float:
    return 100 * math.log(max(seconds, low) / low) / math.log(high / low)


_TICKS = (
    (0.01, "10 ms"),
    (0.1, "0.1 s"),
    (1, "1 s"),
    (10, "10 s"),
    (60, "1 m"),
    (600, "10 m"),
    (3600, "1 h"),
    (36_000, "10 h"),
    (432_000, "5 d"),
)


def log_axis(spreads: Sequence[Spread]) -> tuple[float, float]:
    """Return the ends of an axis that holds all of these, at ticks."""
    lowest = min((spread.p50 for spread in spreads), default=1)
    highest = max((spread.p99 for spread in spreads), default=1)
    low = max([tick for tick, _ in _TICKS if tick <= lowest], default=_TICKS[0][0])
    high = min([tick for tick, _ in _TICKS if tick >= highest], default=max(highest, _TICKS[-1][0]))
    return low, high if high > low else low * 10


def log_ticks(low: float, high: float) -> Html:
    """Return the labels of such an axis."""
    ticks = [(seconds, text) for seconds, text in _TICKS if low <= seconds <= high]
    if len(ticks) > 5:
        ticks = [tick for at, tick in enumerate(ticks) if at % 2 == 0 or at == len(ticks) - 1]
    parts = [
        Html('<text class="{}" x="{:.1f}%" y="11">{}</text>').format(
            "" if seconds == low else "e" if seconds == high else "c", _log_x(seconds, low, high), text
        )
        for seconds, text in ticks
    ]
    return Html('<svg class="plot" height="14" aria-hidden="true">{}</svg>').format(join(parts))


def spread(one: Spread, low: float, high: float) -> Html:
    """Return a dot at the median, a block to the 95th percentile, a stroke at the 99th."""
    grid = [
        Html('<line class="grid" x1="{0:.1f}%" x2="{0:.1f}%" y1="-8" y2="24"/>').format(_log_x(seconds, low, high))
        for seconds, _ in _TICKS
        if low <= seconds <= high
    ]
    p50, p95, p99 = (_log_x(seconds, low, high) for seconds in (one.p50, one.p95, one.p99))
    return Html(
        '<svg class="plot" height="16" role="img" aria-label="median {}, 95th percentile {}, 99th {}">{}'
        '<line class="axis" x1="{p50:.1f}%" x2="{p99:.1f}%" y1="8" y2="8"/>'
        '<rect class="fq" x="{p50:.1f}%" y="5" width="{block:.1f}%" height="6"/>'
        '<circle class="fink" cx="{p50:.1f}%" cy="8" r="4"/>'
        '<line class="ring" x1="{p99:.1f}%" x2="{p99:.1f}%" y1="3" y2="13"/></svg>'
    ).format(short(one.p50), short(one.p95), short(one.p99), join(grid), p50=p50, p99=p99, block=max(p95 - p50, 0))
