"""``cancel``, ``retry`` and ``prune``: change jobs. Before they change many, they show which, and ask."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mljobs.cli import _options as options
from mljobs.cli import _output as output
from mljobs.cli._listing import print_summaries
from mljobs.cli._settings import open_store

if TYPE_CHECKING:
    from mljobs.jobs import Counts, Filter
    from mljobs.store._store import JobStore

_SHOWN = 5


def cancel(
    jobs: options.IdsOrFilterArgument = None,
    *,
    everything: options.AllOption = False,
    yes: options.YesOption = False,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Cancel queued and running jobs; a running one is stopped at its next check.

    With a filter it shows how many and which, and asks. It acts batch by batch: interrupted, what was done stays done,
    and the same command does the rest.

    \b
    Example:
      $ mljobs cancel 9d4e
      $ mljobs cancel status:queued target:'spam*' --dry-run
    """
    with open_store() as store:
        names = options.named(jobs)
        if names:
            _each(options.ids_of(store, names), store.cancel, "cancelled", dry_run=dry_run, as_json=as_json)
        else:
            chosen = _chosen("cancel", jobs, everything=everything)
            _many(_Bulk(store, "cancel", chosen, "cancelled"), yes=yes, dry_run=dry_run, as_json=as_json)


def retry(
    jobs: options.IdsOrFilterArgument = None,
    *,
    spec: Annotated[
        str | None, typer.Option(help="Another one: JSON, @FILE, or - for standard input.", show_default=False)
    ] = None,
    priority: Annotated[int | None, typer.Option(help="Instead of the job's own; with ids.")] = None,
    run_after: Annotated[
        str | None, typer.Option(help="Not before: a span such as 2h, or a time; with ids.", show_default=False)
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Completed jobs, too; with ids.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow the new jobs; with ids.")] = False,
    everything: options.AllOption = False,
    yes: options.YesOption = False,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Queue the work of finished jobs once more, as new jobs, and print their ids.

    With a filter: the failed and cancelled ones that were not retried yet. It shows how many and which, and asks.

    \b
    Example:
      $ mljobs retry 9d4e --watch
      $ mljobs retry status:failed error:"CUDA out of memory" --dry-run
    """
    from mljobs._values import from_json_text  # noqa: PLC0415 - loads SQLAlchemy

    with open_store() as store:
        names = options.named(jobs)
        if not names:
            chosen = _chosen("retry", jobs, everything=everything)
            _many(_Bulk(store, "retry", chosen, "retried"), yes=yes, dry_run=dry_run, as_json=as_json)
            return
        made: list[Any] = []

        text = options.spec_text(spec)
        values: dict[str, Any] = {"priority": priority, "run_after": options.time_option("--run-after", run_after)}
        values |= {"again": again, "spec": from_json_text("spec", text)}

        def act(job_id: Any) -> bool:
            made.append(store.retry(job_id, **values))
            return True

        _each(options.ids_of(store, names), act, "retried", dry_run=dry_run, as_json=as_json, made=made)
        if watch and made:
            from mljobs.cli._following import follow  # noqa: PLC0415 - seldom needed

            raise typer.Exit(follow(store, [job.id for job in made]))


# ----------------------------------------------------------------------------------------------------------- the few


def _each(
    ids: Sequence[Any],
    act: Callable[[Any], bool],
    done: str,
    *,
    dry_run: bool,
    as_json: bool,
    made: Sequence[Any] = (),
) -> None:
    """Act on jobs that were named; one that cannot be done does not stop the others, and the exit code says so."""
    from mljobs.errors import MlJobsError  # noqa: PLC0415 - loads SQLAlchemy

    failed = False
    for job_id in ids:
        if dry_run:
            typer.echo(f"{job_id} would be {done}")
            continue
        try:
            acted = act(job_id)
        except MlJobsError as error:
            output.note(f"mljobs: {output.escaped(str(error))}")
            failed = True
            continue
        if as_json:
            new = {"retry": made[-1].id} if made else {}
            output.print_json([{"id": job_id, done: acted, **new}])
        elif made:
            typer.echo(str(made[-1].id))
        else:
            typer.echo(f"{job_id} {done}" if acted else f"{job_id} has finished already")
    if failed:
        raise typer.Exit(1)


# ---------------------------------------------------------------------------------------------------------- the many


class _Bulk:
    """One action on all jobs that a filter means."""

    def __init__(self, store: JobStore, action: Literal["cancel", "retry"], chosen: Filter, done: str) -> None:
        self.store = store
        self.action = action
        self.chosen = chosen
        self.done = done

    def affected(self) -> Counts:
        return self.store.affected(self.action, self.chosen)

    def batches(self) -> Any:
        run = self.store.cancel_batch if self.action == "cancel" else self.store.retry_batch
        after = None
        while True:
            batch = run(self.chosen, everything=True, after=after)
            yield batch
            after = batch.cursor
            if after is None:
                return


def _chosen(action: str, arguments: Sequence[str] | None, *, everything: bool) -> Filter:
    chosen = options.parsed(arguments)
    if not chosen and not everything:
        raise typer.BadParameter(f"which jobs? Give ids or a filter, or --all to {action} every one")
    return chosen


def _many(bulk: _Bulk, *, yes: bool, dry_run: bool, as_json: bool) -> None:
    counts = bulk.affected()
    total = counts.total()
    kinds = {kind: sum(n for (of, _), n in counts.items() if of == kind) for kind, _ in counts}
    by_kind = ", ".join(
        f"{kind} {number:,}" for kind, number in sorted(kinds.items(), key=lambda one: -one[1]) if number
    )
    noun = "job" if total == 1 else "jobs"
    sentence = f"{bulk.action} {total:,} {noun}" + (f" ({by_kind})" if by_kind else "")
    if dry_run and as_json:
        output.print_json([{"would": bulk.action, "jobs": total, "kinds": {k: n for k, n in kinds.items() if n}}])
        return
    if dry_run:
        typer.echo(f"would {sentence}")
        _preview(bulk)
        return
    if not total:
        output.note(f"nothing to {bulk.action}: no {bulk.chosen.words()} can be")
    elif not yes:
        output.note(f"this would {sentence}: {bulk.chosen.words()}")
        _preview(bulk)
        _ask(f"{bulk.action.capitalize()} them?")
    _act(bulk, total, as_json=as_json)


def _ask(question: str) -> None:
    """Go on after a yes only.

    Raises:
        typer.BadParameter: There is no terminal.
        typer.Abort: The answer is no.
    """
    if not sys.stdin.isatty():
        raise typer.BadParameter("nobody is there to ask: say --yes, or --dry-run to look")
    typer.confirm(question, abort=True, err=True)


def _act(bulk: _Bulk, total: int, *, as_json: bool) -> None:
    acted = refused = 0
    try:
        for batch in bulk.batches() if total else ():
            acted += len(batch.jobs)
            refused += len(batch.errors)
            for job_id, error in batch.errors.items():
                output.note(f"mljobs: {job_id}: {output.escaped(str(error))}")
            if total > len(batch.jobs) and sys.stderr.isatty():
                output.note(f"{acted:,} of {total:,} {bulk.done}")
    except KeyboardInterrupt:
        output.note(f"{bulk.done} {acted:,} so far; the same command does the rest")
        raise
    if as_json:
        output.print_json([{bulk.done: acted, "refused": refused}])
    else:
        typer.echo(f"{bulk.done} {acted:,} {'job' if acted == 1 else 'jobs'}")
    if refused:
        raise typer.Exit(1)


def _preview(bulk: _Bulk) -> None:
    """Show some of the jobs on standard error, the oldest first, as they are acted on."""
    from mljobs.jobs import Filter  # noqa: PLC0415 - loads SQLAlchemy

    able = Filter(status=["queued", "running"] if bulk.action == "cancel" else ["failed", "cancelled"])
    named = any(term.name == "status" for term in bulk.chosen.terms)
    found = bulk.store.summaries(bulk.chosen if named else bulk.chosen & able, order="oldest", limit=_SHOWN, text=0)
    if output.is_terminal() and found.jobs:
        print_summaries(found.jobs)
        if found.cursor is not None:
            output.note("...")


# ------------------------------------------------------------------------------------------------------------- prune


def prune(
    words: options.IdsOrFilterArgument = None,
    *,
    older_than: Annotated[str, typer.Option(help="Finished longer ago than this span, e.g. 90d, or before this time.")],
    keep_last: Annotated[int, typer.Option(min=0, help="Keep so many of each kind and target.")] = 0,
    yes: options.YesOption = False,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Delete finished jobs past their time; nothing that waits or runs is ever deleted.

    \b
    Example:
      $ mljobs prune --older-than 90d --keep-last 10 --dry-run
      $ mljobs prune status:cancelled --older-than 7d --yes
    """
    chosen = options.parsed(words)
    limit = options.time_option("--older-than", older_than)
    with open_store() as store:
        number = store.prunable(chosen, older_than=limit, keep_last=keep_last)
        if dry_run:
            if as_json:
                output.print_json([{"would": "delete", "jobs": number}])
            else:
                typer.echo(f"would delete {number:,} finished jobs")
            return
        if number and not yes:
            _ask(f"Delete {number:,} finished jobs for good?")
        deleted = store.prune(chosen, older_than=limit, keep_last=keep_last) if number else 0
    if as_json:
        output.print_json([{"deleted": deleted}])
    else:
        typer.echo(f"deleted {deleted:,} {'job' if deleted == 1 else 'jobs'}")
