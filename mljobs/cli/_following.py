"""``watch`` and ``wait``: a bar for each job while it runs, and an exit code that says how it ended."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from mljobs.cli import _options as options
from mljobs.cli import _output as output
from mljobs.cli._screen import Screen
from mljobs.cli._settings import open_store

if TYPE_CHECKING:
    from mljobs.jobs import Filter, JobSummary
    from mljobs.store._store import JobStore

FAILED, CANCELLED, TIMEOUT = 3, 4, 5
"""Exit codes of ``wait`` and of ``watch --exit-status``."""
_BAR = 20
_MOST = 1000
_METRICS_READ = 4000

_TimeoutOption = Annotated[
    str | None, typer.Option("--timeout", help="Give up after this span, e.g. 30m; exit code 5.", show_default=False)
]


def wait(jobs: options.IdsArgument, *, timeout: _TimeoutOption = None, as_json: options.JsonOption = False) -> None:
    """Wait until jobs have finished, and say how.

    The exit code is 0 when all completed, 3 when one failed, 4 when one was cancelled, 5 when the time is over.

    \b
    Example:
      $ mljobs wait 9d4e && deploy
      $ mljobs list --fields id status:running | mljobs wait - --timeout 2h
    """
    from mljobs.errors import WaitTimeout  # noqa: PLC0415 - loads SQLAlchemy

    end = None if timeout is None else time.monotonic() + options.span_option("--timeout", timeout).total_seconds()
    outcomes: Counter[str] = Counter()
    with open_store() as store:
        for job_id in options.ids_of(store, jobs):
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                job = store.wait(job_id, left)
            except WaitTimeout as error:
                output.note(f"mljobs: {error}")
                raise typer.Exit(TIMEOUT) from error
            outcomes[str(job.status)] += 1
            if as_json:
                output.print_json([output.job_object(job)])
            else:
                typer.echo(f"{job.id} {_ended(job)}")
            sys.stdout.flush()
    raise typer.Exit(exit_code(outcomes))


def watch(
    jobs: options.IdsOrFilterArgument = None,
    *,
    exit_status: Annotated[
        bool, typer.Option("--exit-status", help="Exit with 3 if one failed, 4 if one was cancelled.")
    ] = False,
    timeout: _TimeoutOption = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    as_json: options.JsonOption = False,
) -> None:
    """Follow jobs while they run: a bar each, until they have finished.

    Without ids all that run, new ones too, until Ctrl-C. Without a terminal a line for each change.

    \b
    Example:
      $ mljobs watch 9d4e --exit-status
      $ mljobs watch target:'spam*'
    """
    names = options.named(jobs)
    seconds = None if timeout is None else options.span_option("--timeout", timeout).total_seconds()
    with open_store() as store:
        ids = options.ids_of(store, names) if names else None
        chosen = None if names else options.parsed(jobs)
        code = follow(store, ids, chosen, seconds=seconds, interval=interval, as_json=as_json)
    raise typer.Exit(code if exit_status or code == TIMEOUT else 0)


def follow(
    store: JobStore,
    ids: Sequence[UUID] | None,
    chosen: Filter | None = None,
    *,
    seconds: float | None = None,
    interval: float = 1.0,
    as_json: bool = False,
) -> int:
    """Follow jobs, and return the exit code that says how they ended.

    Args:
        store: Where they are.
        ids: Which; None for what runs and passes ``chosen``.
        chosen: A filter, instead of ids.
        seconds: How long at most; None for ever.
        interval: Seconds between two looks.
        as_json: An object for each change instead of bars.
    """
    following = _Following(store, ids, chosen)
    end = None if seconds is None else time.monotonic() + seconds
    live = not output.is_dumb() and not as_json
    with Screen(live=live) as screen:
        try:
            while True:
                changed = following.look()
                if live:
                    screen.draw(following.lines)
                else:
                    _print_changes(changed, as_json=as_json)
                if following.ended:
                    break
                if end is not None and time.monotonic() >= end:
                    output.note("mljobs: not finished in time")
                    return TIMEOUT
                time.sleep(interval if end is None else max(0.0, min(interval, end - time.monotonic())))
        except KeyboardInterrupt:
            screen.keep()
            if ids is not None:
                raise
    if not as_json:
        output.note(following.outcomes_line())
    return exit_code(following.outcomes)


def exit_code(outcomes: Counter[str]) -> int:
    """Return the exit code for how jobs ended."""
    if outcomes["failed"]:
        return FAILED
    return CANCELLED if outcomes["cancelled"] else 0


class _Following:
    """The jobs that are followed, as they were at the last look.

    Attributes:
        outcomes: How many ended how.
        ended: Whether all that were named have finished.
    """

    def __init__(self, store: JobStore, ids: Sequence[UUID] | None, chosen: Filter | None) -> None:
        self.outcomes: Counter[str] = Counter()
        self.ended = False
        self._store = store
        self._ids = ids
        self._chosen = chosen
        self._jobs: dict[UUID, JobSummary] = {}
        self._more = False

    def look(self) -> list[JobSummary]:
        """Look once, and return what has changed since."""
        before = self._jobs
        found = self._named() if self._ids is not None else self._running()
        self._jobs = {job.id: job for job in found if not job.status.is_terminal or self._ids is not None}
        changed = [job for job in found if _state(before.get(job.id)) != _state(job)]
        for job in changed:
            if job.status.is_terminal:
                self.outcomes[str(job.status)] += 1
        self.ended = self._ids is not None and all(job.status.is_terminal for job in found)
        return changed

    def _named(self) -> list[JobSummary]:
        return self._store.summaries_of(self._ids or (), text=_METRICS_READ)

    def _running(self) -> list[JobSummary]:
        page = self._store.summaries(self._chosen, status="running", order="oldest", limit=_MOST, text=_METRICS_READ)
        self._more = page.cursor is not None
        present = {job.id for job in page.jobs}
        gone = [job_id for job_id in self._jobs if job_id not in present]
        return [*page.jobs, *(job for job in self._store.summaries_of(gone, text=0) if job.status.is_terminal)]

    def lines(self, room: int, height: int) -> list[str]:
        """Return what a screen of this size shows: the running ones first, as many as there is room for."""
        jobs = sorted(self._jobs.values(), key=lambda job: (job.status != "running", job.started_at or job.created_at))
        shown = jobs if len(jobs) <= height - 1 else jobs[: height - 2]
        names = max((output.cells(output.escaped(f"{job.kind} {job.target_name}")) for job in shown), default=0)
        lines = [_line(job, min(names, max(12, room // 3)), room) for job in shown]
        if len(jobs) > len(shown):
            lines.append(f"... and {len(jobs) - len(shown):,}{'+' if self._more else ''} more")
        if self._ids is None:
            lines.append(self.outcomes_line(len(jobs)))
        return lines

    def outcomes_line(self, running: int = 0) -> str:
        """Return how many ended how."""
        parts = [f"{number:,} {status}" for status, number in self.outcomes.items()]
        return ", ".join([f"{running:,} running"] * bool(running) + parts) or "nothing has finished"


def _state(job: Any) -> Any:
    return None if job is None else (job.status, job.progress, job.attempts)


def _line(job: Any, names: int, room: int) -> str:
    """Return a job as a line of at most so many columns: kind and target, a bar, what is known of time, worker, metric."""
    name = output.padded(output.cut(output.escaped(f"{job.kind} {job.target_name}"), names), names)
    if job.status != "running":
        text = output.cut(f"{name}  {_ended(job)}", room)
        return output.coloured(text, output.STATUS_COLOURS[job.status])
    filled = _BAR * job.progress // 100
    bar = "━" * filled + "╸" * (filled < _BAR) + " " * (_BAR - filled - 1)
    elapsed = datetime.now(UTC) - job.started_at if job.started_at else None
    facts = [f"{job.progress:3}%", output.span(elapsed)]
    if elapsed is not None and 0 < job.progress < 100:
        facts.append(f"about {output.span(elapsed * (100 - job.progress) / job.progress)} left")
    facts += [output.escaped(job.worker or ""), _last_metric(job.metrics)]
    head = f"{name}  {bar}  " if room >= names + _BAR + 20 else f"{name}  "
    tail = output.cut("  ".join(fact for fact in facts if fact), max(4, room - output.cells(head)))
    return head.replace(bar, output.coloured(bar, "34")) + tail


def _last_metric(text: str | None) -> str:
    """Return the last number among the metrics, which a run reports while it goes on."""
    try:
        metrics = json.loads(text) if text else None
    except ValueError:
        return ""
    if not isinstance(metrics, dict):
        return ""
    numbers = [(key, value) for key, value in metrics.items() if isinstance(value, int | float) and value is not True]
    return output.escaped(f"{numbers[-1][0]} {numbers[-1][1]:.4g}") if numbers else ""


def _ended(job: Any) -> str:
    error = job.error if hasattr(job, "error") else job.error_line
    took = ""
    if job.started_at is not None and job.finished_at is not None:
        took = f" after {output.span(job.finished_at - job.started_at)}"
    return f"{job.status}{took}{f': {output.escaped(error)}' if error else ''}"


def _print_changes(changed: Sequence[Any], *, as_json: bool) -> None:
    for job in changed:
        if as_json:
            names = ("id", "kind", "target_name", "status", "progress", "attempts", "worker", "error")
            output.print_json([{name: getattr(job, name) for name in names}])
        elif job.status.is_terminal:
            sys.stdout.write(f"{job.id}\t{job.kind}\t{output.escaped(job.target_name)}\t{_ended(job)}\n")
        else:
            sys.stdout.write(
                f"{job.id}\t{job.kind}\t{output.escaped(job.target_name)}\t{job.status}\t{job.progress}%\n"
            )
    sys.stdout.flush()
