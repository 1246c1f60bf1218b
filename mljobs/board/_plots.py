"""Plots of runs as SVG: a chain of retries, the runs of a target, runs side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from mljobs.board._charts import FILL, join, nice
from mljobs.board._format import clock, duration, iso, number, short, short_id
from mljobs.board._html import Html
from mljobs.jobs import JobSummary

_BEYOND_FIGURES = 1e6
_LINES_MOST = 20


# ------------------------------------------------------------------------------------------------------------- gantt


@dataclass(frozen=True, slots=True)
class Stay:
    """How long one record of a chain waited and ran, and its bar on the axis of all."""

    job: JobSummary
    svg: Html
    waited: float | None
    ran: float | None


def gantt(chain: Sequence[JobSummary], now: datetime) -> tuple[list[Stay], datetime, datetime]:
    """Return a bar for each record on one axis of time, and where that begins and ends."""
    begin = min(job.created_at for job in chain)
    end = max([job.finished_at or now for job in chain] + [begin + timedelta(seconds=1)])
    span = (end - begin).total_seconds()

    def x(moment: datetime) -> float:
        return max(0.0, min(100.0, 100 * (moment - begin).total_seconds() / span))

    stays = []
    for job in chain:
        ready = max(job.run_after or job.created_at, job.created_at)
        over = job.finished_at or now
        start = job.started_at or over
        parts = []
        if ready > job.created_at:
            parts.append(
                Html('<line class="axis dash" x1="{:.2f}%" x2="{:.2f}%" y1="8" y2="8"/>').format(
                    x(job.created_at), x(min(ready, start))
                )
            )
        waited = (start - ready).total_seconds()
        if waited > 0:
            parts.append(
                Html('<rect class="fcan" x="{:.2f}%" y="4.5" width="{:.2f}%" height="7"/>').format(
                    x(ready), max(x(start) - x(ready), 0.3)
                )
            )
        ran = (over - start).total_seconds() if job.started_at else None
        if ran is not None:
            parts.append(
                Html('<rect class="{}" x="{:.2f}%" y="4" width="{:.2f}%" height="8"/>').format(
                    FILL[job.status], x(start), max(x(over) - x(start), 0.4)
                )
            )
        label = f"waited {duration(waited)}" + (f", ran {duration(ran)}" if ran is not None else "")
        svg = Html('<svg class="plot" height="16" role="img" aria-label="{}">{}</svg>').format(label, join(parts))
        stays.append(Stay(job, svg, max(waited, 0.0), ran))
    return stays, begin, end


# ------------------------------------------------------------------------------------------------------------ target


@dataclass(frozen=True, slots=True)
class Point:
    """A run on the chart of a target."""

    job: JobSummary
    at: datetime
    value: float | None
    took: float | None
    url: str


def best_of(points: Sequence[Point], *, lower: bool) -> list[Point]:
    """Return the points that were the best so far, in order."""
    found: list[Point] = []
    for point in points:
        if point.value is None:
            continue
        last = found[-1].value if found else None
        if last is None or (point.value < last if lower else point.value > last):
            found.append(point)
    return found


def _day_ticks(begin: datetime, end: datetime) -> list[datetime]:
    span = end - begin
    for step in (1, 3, 6, 12, 24, 48, 24 * 7, 24 * 14, 24 * 28, 24 * 91, 24 * 365):
        if span / timedelta(hours=step) <= 8:
            break
    width = timedelta(hours=step)
    first = datetime.fromtimestamp(
        math.ceil(begin.timestamp() / width.total_seconds()) * width.total_seconds(), begin.tzinfo
    )
    return [first + width * at for at in range(int((end - first) / width) + 1)] if first <= end else []


def target_chart(points: Sequence[Point], metric: str, *, lower: bool, begin: datetime, end: datetime) -> Html:
    """Return a metric of each run over time, a line for the best so far, and those that did not complete on a rail."""
    height = 200
    values = [point.value for point in points if point.value is not None]
    low, high = min(values), max(values)
    pad = (high - low) * 0.08 or abs(high) * 0.05 or 1
    low, high = low - pad, high + pad
    span = max((end - begin).total_seconds(), 1)

    def x(moment: datetime) -> float:
        return 100 * (moment - begin).total_seconds() / span

    def y(value: float) -> float:
        return (height - 22) * (1 - (value - low) / (high - low))

    parts = _value_lines(low, high, y)
    best = best_of(points, lower=lower)
    path = "".join(
        (
            f"M{x(point.at) * 10:.1f} {y(point.value or 0):.1f}"
            if not at
            else f"H{x(point.at) * 10:.1f}V{y(point.value or 0):.1f}"
        )
        for at, point in enumerate(best)
    )
    parts.append(
        Html(
            '<svg viewBox="0 0 1000 {0}" width="100%" height="{0}" preserveAspectRatio="none">'
            '<path class="ln" d="{1}H1000"/></svg>'
        ).format(height, path)
    )
    parts += [
        _mark_of(point, metric, x(point.at), y(point.value) if point.value is not None else None, height)
        for point in points
    ]
    parts.append(_best_mark(best[-1], metric, x(best[-1].at), y(best[-1].value or 0)))
    parts += _time_axis(begin, end, x, height)
    label = f"{metric} of {len(values)} runs, from {number(values[0])} to a best of {number(best[-1].value or 0)}"
    return Html('<svg class="plot" height="{}" role="group" aria-label="{}">{}</svg>').format(
        height, label, join(parts)
    )


def _value_lines(low: float, high: float, y: Callable[[float], float]) -> list[Html]:
    """Return a line at each round value, with its figure."""
    step = nice(high - low)[1]
    digits = max(0, -math.floor(math.log10(step)))
    first = math.ceil(low / step)
    parts = []
    for at in range(first, min(math.floor(high / step), first + _LINES_MOST) + 1):
        value = at * step
        shown = f"{value:.{min(digits, 6)}f}" if abs(value) < _BEYOND_FIGURES else number(value)
        parts.append(
            Html(
                '<line class="grid" x1="0" x2="100%" y1="{0:.0f}.5" y2="{0:.0f}.5"/>'
                '<text class="e" x="-6" y="{1:.0f}">{2}</text>'
            ).format(y(value), y(value) + 4, shown)
        )
    return parts


def _time_axis(begin: datetime, end: datetime, x: Callable[[datetime], float], height: int) -> list[Html]:
    """Return the axis of time with its ticks."""
    parts = [Html('<line class="axis" x1="0" x2="100%" y1="{0}.5" y2="{0}.5"/>').format(height)]
    shape = "hm" if end - begin < timedelta(days=2) else "md"
    for tick in _day_ticks(begin, end):
        place = x(tick)
        anchor = "c" if 3 < place < 98 else "" if place <= 3 else "e"
        parts.append(
            Html(
                '<line class="axis" x1="{0:.2f}%" x2="{0:.2f}%" y1="{1}" y2="{2}"/>'
                '<text class="{3}" x="{0:.2f}%" y="{4}" data-t="{5}" data-f="{6}">{7}</text>'
            ).format(place, height, height + 4, anchor, height + 18, iso(tick), shape, clock(tick, shape))
        )
    return parts


def _mark_of(point: Point, metric: str, x: float, y: float | None, height: int) -> Html:
    if y is None:
        title = f"{point.job.status}, {clock(point.at, 'full')} UTC"
        inner = Html('<svg x="{:.2f}%" y="{}" width="10" height="10" class="m {}"><use href="#{}"/></svg>').format(
            x, height - 14, point.job.status, point.job.status
        )
        return Html('<a href="{}" class="pt" data-row="{}" tabindex="-1"><title>{}</title>{}</a>').format(
            point.url, point.job.id, title, inner
        )
    title = f"{metric} {number(point.value or 0)}, {clock(point.at, 'full')} UTC"
    return Html(
        '<a href="{}" class="pt" data-row="{}" tabindex="-1"><title>{}</title>'
        '<circle class="hit" cx="{:.2f}%" cy="{:.1f}" r="9"/><circle class="fq" cx="{:.2f}%" cy="{:.1f}" r="3.2"/></a>'
    ).format(point.url, point.job.id, title, x, y, x, y)


def _best_mark(point: Point, metric: str, x: float, y: float) -> Html:
    left = x > 14
    return Html(
        '<circle class="ring" cx="{0:.2f}%" cy="{1:.1f}" r="6.5"/><circle class="fink" cx="{0:.2f}%" cy="{1:.1f}" r="3.2"/>'
        '<text class="t1 {2}" x="{0:.2f}%" dx="{3}" y="{4:.0f}">best {5}<title>{6}</title></text>'
    ).format(
        x,
        y,
        "e" if left else "",
        -11 if left else 11,
        max(y - 8, 10),
        number(point.value or 0),
        f"{metric}, {short_id(point.job.id)}",
    )


def took_chart(points: Sequence[Point], *, begin: datetime, end: datetime) -> Html:
    """Return how long each run took, on the same axis of time."""
    height = 44
    longest = max((point.took or 0 for point in points), default=0) or 1
    span = max((end - begin).total_seconds(), 1)
    parts = []
    for point in points:
        if point.took is None:
            continue
        tall = max(height * point.took / longest, 1)
        x = min(100 * (point.at - begin).total_seconds() / span, 99.3)
        title = f"{duration(point.took)}, {point.job.status}"
        parts.append(
            Html(
                '<rect class="{}" x="{:.2f}%" y="{:.1f}" width="{:.2f}%" height="{:.1f}"><title>{}</title></rect>'
            ).format(
                FILL.get(point.job.status, "fq"), x, height - tall, max(min(0.9, 60 / len(points)), 0.15), tall, title
            )
        )
    parts.append(Html('<text class="e" x="100%" y="-6">at most {}</text>').format(short(longest)))
    parts.append(Html('<line class="axis" x1="0" x2="100%" y1="{0}.5" y2="{0}.5"/>').format(height))
    label = f"How long {len(points)} runs took, at most {short(longest)}"
    return Html('<svg class="plot" height="{}" role="img" aria-label="{}">{}</svg>').format(height, label, join(parts))


# ----------------------------------------------------------------------------------------------------------- compare


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of parallel coordinates: a parameter, a metric or the duration, with a place for each run."""

    name: str
    note: str
    low: str
    high: str
    places: Mapping[UUID, float]


def axis(
    name: str, values: Mapping[UUID, float], show: Callable[[float], str], *, metric: bool = False, lower: bool = False
) -> Axis:
    """Return an axis of numbers; logarithmic where they span a hundredfold or more and are parameters."""
    low, high = min(values.values()), max(values.values())
    log = not metric and low > 0 and high / low >= 30
    scale = math.log10 if log else float
    span = (scale(high) - scale(low)) or 1
    places = {job: (scale(value) - scale(low)) / span if high > low else 0.5 for job, value in values.items()}
    note = "log" if log else "lower is better" if lower else ""
    return Axis(name, note, show(low), show(high), places)


def word_axis(name: str, values: Mapping[UUID, str]) -> Axis:
    """Return an axis of words, in order of their alphabet."""
    words = sorted(set(values.values()))
    step = 1 / max(len(words) - 1, 1)
    places = {job: words.index(value) * step for job, value in values.items()}
    return Axis(name, f"{len(words)} values", words[0][:12], words[-1][:12], places)


def parallel(axes: Sequence[Axis], runs: Sequence[UUID], names: Mapping[UUID, str]) -> Html:
    """Return a line for each run over all axes; the first of ``runs`` is the best. Lines that overlap are set apart.

    Args:
        axes: From left to right, at least two.
        runs: The best first.
        names: What each is called in its title.
    """
    height, pitch, inset = 240, 3.0, 16
    inner = height - 2 * inset
    parts = [_axis_of(one, 100 * at / (len(axes) - 1), height) for at, one in enumerate(axes)]
    lines = []
    offsets = _apart(axes, runs, pitch)
    for rank in range(len(runs) - 1, -1, -1):
        run = runs[rank]
        spots = [
            f"{1000 * at / (len(axes) - 1):.0f} {inset + inner * (1 - one.places[run]) + offsets[at][run]:.1f}"
            for at, one in enumerate(axes)
            if run in one.places
        ]
        if len(spots) < 2:
            continue
        kind = "one" if rank == 0 else "top" if rank < 4 else "grey"
        lines.append(
            Html(
                '<g class="run" data-row="{}"><title>{}</title><path class="ln wide-hit" d="{d}"/>'
                '<path class="ln {}" d="{d}"/></g>'
            ).format(run, names[run], kind, d="M" + "L".join(spots))
        )
    dots = [
        Html('<circle class="fink" cx="{:.2f}%" cy="{:.1f}" r="3.5"/>').format(
            100 * at / (len(axes) - 1), inset + inner * (1 - one.places[runs[0]]) + offsets[at][runs[0]]
        )
        for at, one in enumerate(axes)
        if runs[0] in one.places
    ]
    label = f"Parallel coordinates of {len(runs)} runs over {len(axes)} axes; the table below has the same values"
    return Html(
        '<svg class="plot" height="{0}" role="img" aria-label="{1}">{2}'
        '<svg class="runs" viewBox="0 0 1000 {0}" width="100%" height="{0}" preserveAspectRatio="none">{3}</svg>{4}</svg>'
    ).format(height, label, join(parts), join(lines), join(dots))


def _axis_of(one: Axis, x: float, height: int) -> Html:
    """Return an axis of parallel coordinates with its name and ends."""
    anchor = "c" if 0 < x < 100 else "e" if x else ""
    name = one.name if len(one.name) <= 14 else f"…{one.name[-13:]}"
    return Html(
        '<line class="axis" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="{1}"/>'
        '<text class="t1 {2}" x="{0:.2f}%" y="-24">{3}<title>{4}</title></text>'
        '<text class="{2}" x="{0:.2f}%" y="-8">{5}</text><text class="{2}" x="{0:.2f}%" y="{6}">{7}</text>'
    ).format(
        x, height, anchor, f"{name} (log)" if one.note == "log" else name, one.name, one.high, height + 16, one.low
    )


def _apart(axes: Sequence[Axis], runs: Sequence[UUID], pitch: float) -> list[dict[UUID, float]]:
    """Return by how many pixels each line is moved at each axis, so that those with the same value can be told apart."""
    found = []
    for one in axes:
        groups: dict[float, list[UUID]] = {}
        for run in runs:
            if run in one.places:
                groups.setdefault(round(one.places[run], 4), []).append(run)
        moved = {}
        for group in groups.values():
            room = min(pitch, 26 / max(len(group) - 1, 1))
            for at, run in enumerate(group):
                moved[run] = (at - (len(group) - 1) / 2) * room
        found.append(moved)
    return found
