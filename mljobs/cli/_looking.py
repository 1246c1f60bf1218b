"""``stats``, ``workers`` and ``rescue``: figures by kind, the workers, and the jobs of workers that are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mljobs.cli import _output as output
from mljobs.cli._options import FieldsOption, JsonOption, span_option
from mljobs.cli._settings import open_store

if TYPE_CHECKING:
    from mljobs.jobs import Holder, WorkerInfo

_HOLDS = ("id", "kind", "target_name", "status", "progress", "acquired_at", "expires_at")


def stats(
    *,
    over: Annotated[str, typer.Option(help="How far back finished jobs are counted.")] = "1d",
    as_json: JsonOption = False,
    fields: FieldsOption = None,
) -> None:
    """Show by kind what waits and since when, what runs, how many finish an hour, and how long they take and wait.

    \b
    Example:
      $ mljobs stats --over 7d
    """
    how_far = span_option("--over", over)
    if not how_far:
        raise typer.BadParameter("--over: expected a span above 0")
    with open_store() as store:
        found = store.stats(over=how_far)
    items = [asdict(kind) for kind in found.kinds]
    if as_json:
        output.print_json(items, output.fields_of(fields))
    elif fields is not None or not output.is_terminal():
        names = [name for name in items[0] if name not in ("ran", "waited")] if items else []
        output.print_tabs(map(output.as_json, items), output.fields_of(fields) or [*names, *_SPREADS])
    elif items:
        output.print_table(_STATS, [_stats_row(kind, found.now) for kind in found.kinds])
    else:
        output.note(f"nothing waits, runs, or finished in the last {over}")
    if not found.complete:
        output.note("of a deep queue the first 20,000 are counted, and of durations the last 5,000 are measured")


_SPREADS = ("ran.p50", "ran.p95", "waited.p50", "waited.p95")
_STATS = (
    output.Column("KIND", least=8),
    output.Column("QUEUED", right=True),
    output.Column("OLDEST", right=True, rank=3),
    output.Column("RUNNING", right=True),
    output.Column("AN HOUR", right=True, rank=4),
    output.Column("FAILED", right=True, rank=5),
    output.Column("TOOK p50", right=True, rank=6),
    output.Column("p95", right=True, rank=7),
    output.Column("WAITED p50", right=True, rank=8),
    output.Column("p95", right=True, rank=9),
)


def _stats_row(kind: Any, now: datetime) -> list[str]:
    oldest = now - kind.oldest if kind.oldest is not None else None
    spreads = [spread for spread in (kind.ran, kind.waited) for _ in range(2)]
    shown = [
        output.span(None if spread is None else (spread.p95 if at % 2 else spread.p50))
        for at, spread in enumerate(spreads)
    ]
    ended = kind.completed + kind.failed
    share = f"{kind.failed:,} ({kind.failed / ended:.0%})" if kind.failed else "0"
    return [
        kind.kind, f"{kind.queued:,}", output.span(oldest), f"{kind.running:,}", f"{kind.per_hour:,.1f}", share, *shown
    ]  # fmt: skip


def workers(
    *,
    gone: Annotated[bool, typer.Option("--gone", help="Those too that ended within a day.")] = False,
    as_json: JsonOption = False,
    fields: FieldsOption = None,
) -> None:
    """Show the workers: what each holds and since when, who is idle, stopping, or silent.

    A silent one was not seen for a minute, or its lease on a job has run out. Jobs that run without a worker, in a
    script or a session, stand under the name that they were claimed with.

    \b
    Example:
      $ mljobs workers
      $ mljobs workers --json --fields worker,state,held,concurrency
    """
    with open_store() as store:
        found = _seen(store.workers(gone=True), store.holders(), gone=gone)
    if as_json:
        output.print_json(found, output.fields_of(fields))
    elif fields is not None or not output.is_terminal():
        output.print_tabs(map(output.as_json, found), output.fields_of(fields) or _WORKERS_TABBED)
    elif found:
        now = datetime.now(UTC)
        output.print_table(_WORKERS, [row for worker in found for row in _worker_rows(worker, now)])
    else:
        output.note("no worker runs, and nobody holds a job")


_WORKERS_TABBED = (
    "worker", "held", "silent", "since", "state", "host", "pid", "concurrency", "started_at", "last_seen_at",
)  # fmt: skip
_ABOUT = ("host", "pid", "kinds", "concurrency", "version", "started_at", "last_seen_at")


def _seen(rows: Sequence[WorkerInfo], holders: Sequence[Holder], *, gone: bool) -> list[dict[str, Any]]:
    """Return the workers of the table, with what they hold; then those that hold jobs and have no row there."""
    held = {holder.worker: holder for holder in holders}
    known: dict[str, Any] = {row.name: row for row in rows if gone or row.state != "gone" or row.name in held}
    return [_seen_one(name, known.get(name), held.get(name)) for name in dict.fromkeys([*known, *held])]


def _seen_one(name: str, row: Any, holder: Any) -> dict[str, Any]:
    jobs = holder.jobs if holder else ()
    if row is None:
        state = "silent" if holder.silent == holder.held else "busy"
    elif row.state == "gone":
        state = "silent" if jobs else "gone"
    else:
        state = "stopping" if row.state == "stopping" else "busy" if jobs else "idle"
    return {
        "worker": name,
        "state": state,
        "held": holder.held if holder else 0,
        "silent": holder.silent if holder else 0,
        "since": holder.since if holder else None,
        **{field: getattr(row, field, None) for field in _ABOUT},
        "jobs": [{field: getattr(job, field) for field in _HOLDS} for job in jobs],
    }


_WORKERS = (
    output.Column("WORKER", least=10),
    output.Column("STATE", colours={"idle": "32", "stopping": "33", "silent": "31", "gone": "31"}),
    output.Column("JOB", rank=5),
    output.Column("KIND", least=8, rank=3),
    output.Column("TARGET", least=8, rank=2),
    output.Column("DONE", right=True, rank=1),
    output.Column("FOR", right=True, rank=1),
    output.Column("", colours={"silent": "33", "cancelled, stopping": "33"}, rank=1),
    output.Column("SEEN", right=True, rank=6),
    output.Column("HOST", least=8, rank=7),
)


def _worker_rows(worker: dict[str, Any], now: datetime) -> list[list[str]]:
    """Return a line for each job that a worker holds, or one."""
    places = f" {worker['held']}/{worker['concurrency']}" if worker["concurrency"] and worker["held"] else ""
    head = [worker["worker"], worker["state"] + places]
    seen = output.span(now - worker["last_seen_at"]) + " ago" if worker["last_seen_at"] else ""
    rows: list[list[str]] = []
    for job in worker["jobs"] or (None,):
        first, last = (head, [seen, worker["host"] or ""]) if not rows else (["", ""], ["", ""])
        rows.append([*first, *(_held_cells(job, now) if job else [""] * 6), *last])
    return rows


def _held_cells(job: dict[str, Any], now: datetime) -> list[str]:
    silent = job["expires_at"] is not None and job["expires_at"] < now
    state = "silent" if silent else "cancelled, stopping" if job["status"] == "cancelled" else ""
    held = now - job["acquired_at"] if job["acquired_at"] is not None else None
    return [str(job["id"]), str(job["kind"]), job["target_name"], f"{job['progress']}%", output.span(held), state]


def rescue(
    *,
    max_attempts: Annotated[int, typer.Option(min=1, help="A job that was started so often fails instead.")] = 5,
    kinds: Annotated[
        list[str] | None,
        typer.Option("--kind", help="Only such jobs may fail; may be given again."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Requeue the running jobs whose worker has been silent for longer than its lease; workers do it by themselves.

    \b
    Example:
      $ mljobs rescue --max-attempts 3
    """
    with open_store() as store:
        done = store.rescue(max_attempts=max_attempts, kinds=kinds)
    if as_json:
        found = {"requeued": done.requeued, "failed": done.failed, "released": done.released}
        output.print_json([{**found, "errors": {job_id: str(error) for job_id, error in done.errors.items()}}])
    else:
        typer.echo(f"requeued {len(done.requeued):,}, failed {len(done.failed):,}, released {len(done.released):,}")
        for job_id, error in done.errors.items():
            output.note(f"mljobs: {job_id}: {output.escaped(str(error))}")
    if done.errors:
        raise typer.Exit(1)
