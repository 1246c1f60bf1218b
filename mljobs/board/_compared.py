"""Runs side by side: which parameters and metrics they have, which differ, which run is best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from uuid import UUID

from mljobs.board._format import brief, leaves, literal, number, numeric, parsed, short
from mljobs.board._plots import Axis, axis, word_axis
from mljobs.jobs import JobSummary
from mljobs.states import MlJobStatus

TEXT_READ = 64_000
"""How many characters of a spec and of metrics are compared; runs with more are shown without them."""
MOST_RUNS = 50
METRIC_COLUMNS = 4
_AXES = 10
_LOWER = ("loss", "error", "err", "rmse", "mae", "mse", "perplexity", "wer", "cer", "latency", "seconds", "ms", "time")
_NEUTRAL = (
    "rows",
    "samples",
    "size",
    "count",
    "epochs",
    "epoch",
    "steps",
    "step",
    "n",
    "seed",
    "params",
    "parameters",
    "bytes",
)
_LIKED = ("f1", "auc", "accuracy", "score", "r2", "recall", "precision")


@dataclass(frozen=True, slots=True)
class Cell:
    """A value in a table of runs: as it is, and as it is shown."""

    text: str
    brief: str
    differs: bool
    best: bool = False
    share: float | None = None

    @classmethod
    def of(cls, values: Any, name: str, *, beside: Any = None, best: bool = False, share: float | None = None) -> Cell:
        """Return the value of this name, of a spec or of metrics.

        Args:
            values: By name.
            name: Of the value.
            beside: Those of the run that it is compared with; None for no other.
            best: Whether it is the best of its column.
            share: How far it is from the least to the most of its column, in per cent; None for no bar.
        """
        text, shown = text_of(values, name), brief(values[name]) if name in values else ""
        return cls(text, shown, beside is not None and text != text_of(beside, name), best, share)


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run in the table of its target, or of a comparison."""

    job: JobSummary
    best: bool
    metrics: tuple[Cell, ...]
    params: tuple[Cell, ...]
    took: float | None


def text_of(values: Any, name: str) -> str:
    """Return a value of a spec or of metrics as it is; empty where it has none of this name."""
    return literal(values[name]).strip('"') if name in values else ""


def lower_is_better(metric: str) -> bool:
    """Whether a metric of this name is usually the better the lower it is."""
    parts = metric.lower().replace(".", "_").split("_")
    return any(part in _LOWER for part in parts)


def is_neutral(metric: str) -> bool:
    """Whether more of a metric of this name is neither better nor worse."""
    parts = metric.lower().replace(".", "_").split("_")
    return any(part in _NEUTRAL for part in parts)


@dataclass(frozen=True, slots=True)
class Run:
    """A run with its parameters and metrics by path."""

    job: JobSummary
    params: Mapping[str, Any]
    metrics: Mapping[str, Any]

    @property
    def took(self) -> float | None:
        """Seconds from start to end; None without both, or where a clock was set back."""
        job = self.job
        if job.started_at is None or job.finished_at is None or job.finished_at < job.started_at:
            return None
        return (job.finished_at - job.started_at).total_seconds()

    def metric(self, name: str) -> float | None:
        """Return a metric as a number."""
        return numeric(self.metrics.get(name))


def run_of(job: JobSummary) -> Run:
    """Return a job with its spec and metrics taken apart."""
    return Run(job, dict(leaves(parsed(job.spec))), dict(leaves(parsed(job.metrics))))


@dataclass(frozen=True, slots=True)
class Compared:
    """Runs side by side.

    Attributes:
        runs: In the order in which they were given.
        metrics: Names of the metrics that are numbers, the most interesting first.
        varying: Names of the parameters that differ, the most varied first.
        same: What is equal in all.
    """

    runs: Sequence[Run]
    metrics: tuple[str, ...]
    varying: tuple[str, ...]
    same: tuple[tuple[str, str], ...]

    def chosen(self, wanted: str | None) -> str | None:
        """Return the metric that was asked for, or the most interesting one; None where there is none."""
        return wanted if wanted in self.metrics else next(iter(self.metrics), None)

    def best(self, metric: str, *, lower: bool) -> Run | None:
        """Return the best completed run."""
        found = [(value, run) for run in self.runs if (value := run.metric(metric)) is not None]
        if not found:
            return None
        pick = min if lower else max
        return pick(found, key=lambda pair: pair[0])[1]


def compared(jobs: Sequence[JobSummary]) -> Compared:
    """Return jobs side by side."""
    runs = [run_of(job) for job in jobs]
    seen: Counter[str] = Counter()
    for run in runs:
        seen.update(name for name in run.metrics if run.metric(name) is not None)
    first = {name: at for at, name in enumerate(seen)}
    liked = {name: at for at, name in enumerate(_LIKED)}
    by_interest = sorted(
        seen,
        key=lambda name: (
            is_neutral(name),
            -seen[name] * 2 // max(len(runs), 1),
            name.count("."),
            liked.get(name.split("_")[0], 9),
            first[name],
        ),
    )
    names = dict.fromkeys(name for run in runs for name in run.params)
    values = {name: [literal(run.params[name]) if name in run.params else None for run in runs] for name in names}
    varying = sorted((name for name in names if len(set(values[name])) > 1), key=lambda name: -_changes(values[name]))
    same = tuple((name, str(values[name][0])) for name in names if len(set(values[name])) == 1)
    return Compared(runs, tuple(by_interest), tuple(varying), same if len(runs) > 1 else ())


def _changes(values: Sequence[str | None]) -> int:
    return sum(a != b for a, b in pairwise(values))


def axes_of(shown: Compared, metric: str | None) -> list[Axis]:
    """Return the axes on which runs are compared: parameters that differ, the duration, metrics; the chosen one last."""
    found: list[Axis] = []
    for name in shown.varying:
        values = {run.job.id: run.params[name] for run in shown.runs if name in run.params}
        numbers = {job: value for job, one in values.items() if (value := numeric(one)) is not None}
        if len(numbers) == len(values) and len(set(numbers.values())) > 1:
            found.append(axis(name, numbers, number))
        elif 1 < len({literal(one) for one in values.values()}) <= 8:
            found.append(word_axis(name, {job: literal(one).strip('"') for job, one in values.items()}))
        if len(found) == _AXES - 4:
            break
    took = {run.job.id: seconds for run in shown.runs if (seconds := run.took) is not None}
    if len(set(took.values())) > 1:
        found.append(axis("took", took, short, metric=True))
    others = [name for name in shown.metrics if name != metric and not is_neutral(name)][:2][::-1]
    for name in [*others, *([metric] if metric else [])]:
        numbers = {run.job.id: value for run in shown.runs if (value := run.metric(name)) is not None}
        if numbers:
            found.append(axis(name, numbers, number, metric=True, lower=lower_is_better(name)))
    return found


def ranked(shown: Compared, metric: str | None, *, lower: bool) -> list[Run]:
    """Return the runs, the best first; those without the metric last, the newest of them first."""
    if metric is None:
        return sorted(shown.runs, key=lambda run: run.job.created_at, reverse=True)

    def place(run: Run) -> tuple[bool, float]:
        value = run.metric(metric)
        return value is None, 0.0 if value is None else value if lower else -value

    return sorted(shown.runs, key=place)


def completed(runs: Sequence[Run]) -> list[Run]:
    """Return those that completed."""
    return [run for run in runs if run.job.status is MlJobStatus.COMPLETED]


def names_of(runs: Sequence[Run], metric: str | None) -> dict[UUID, str]:
    """Return what each run is called."""
    return {
        run.job.id: f"{run.job.id}" + (f", {metric} {number(run.metric(metric) or 0)}" if metric else "")
        for run in runs
    }
