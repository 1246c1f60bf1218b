"""``list``: jobs as a table, as lines with tabs, or as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mljobs.cli import _output as output
from mljobs.cli._options import FieldsOption, FilterArgument, JsonOption, ScanOption, parsed
from mljobs.cli._settings import open_store

if TYPE_CHECKING:
    from mljobs.jobs import Filter
    from mljobs.store._store import JobStore

_PAGE = 1000
TABBED = (
    *("id", "status", "kind", "target_name", "progress", "created_at", "started_at", "finished_at", "attempts"),
    *("worker", "error_line"),
)
"""The fields of ``list`` without a terminal."""


def list_(
    words: FilterArgument = None,
    *,
    limit: Annotated[int, typer.Option("--limit", "-L", min=1, help="At most so many.")] = 50,
    order: Annotated[str, typer.Option(help="newest or oldest first.")] = "newest",
    after: Annotated[str | None, typer.Option(help="The cursor that the list before ended with.")] = None,
    scan: ScanOption = False,
    as_json: JsonOption = False,
    fields: FieldsOption = None,
) -> None:
    """List jobs, the newest first.

    On a terminal a table that fits it; otherwise a line each with tabs between the fields, uncut.

    \b
    Example:
      $ mljobs list status:failed 'created:<1d' 'spec.lr>0.05'
      $ mljobs list --json target:'spam*' | jq -r .metrics.f1
    """
    if order not in ("newest", "oldest"):
        raise typer.BadParameter("--order is newest or oldest")
    chosen = parsed(words)
    wanted = output.fields_of(fields)
    with open_store() as store:
        if as_json or wanted is not None or not output.is_terminal():
            pages = _Pages(store, chosen, order, limit, after, scan)  # type: ignore[arg-type]
            jobs = ({**output.job_object(job), "error_line": job.error_line} for job in pages)
            if as_json:
                whole = ({name: value for name, value in job.items() if name != "error_line"} for job in jobs)
                output.print_json(jobs if wanted else whole, wanted)
            elif wanted is None or not output.is_terminal():
                output.print_tabs(jobs, wanted or TABBED)
            else:
                rows = [[output.as_text(value) for value in output.picked(job, wanted).values()] for job in jobs]
                columns = [output.Column(name.upper(), least=None if name == "id" else 6) for name in wanted]
                output.print_table(columns, rows)
            _say_how_far(pages.cursor, pages.scanned, complete=pages.complete, limit=limit)
            return
        found = store.summaries(chosen, order=order, limit=min(limit, 10_000), after=after, scan=scan, text=0)  # type: ignore[arg-type]
        if found.jobs:
            print_summaries(found.jobs)
        else:
            output.note(f"no {chosen.words()}" if chosen else "no jobs yet: mljobs submit KIND TARGET queues one")
        _say_how_far(found.cursor, found.scanned, complete=found.complete, limit=limit)


class _Pages:
    """The jobs of as many pages as are needed, and where they ended."""

    def __init__(  # noqa: PLR0917 - private
        self,
        store: JobStore,
        chosen: Filter,
        order: Literal["newest", "oldest"],
        limit: int,
        after: str | None,
        scan: bool,  # noqa: FBT001 - private
    ) -> None:
        self.cursor = after
        self.scanned: int | None = None
        self.complete = True
        self._store = store
        self._chosen = chosen
        self._order = order
        self._limit = limit
        self._scan = scan

    def __iter__(self) -> Iterator[Any]:
        left = self._limit
        while left > 0:
            size = min(left, _PAGE)
            page = self._store.find(self._chosen, order=self._order, limit=size, after=self.cursor, scan=self._scan)
            yield from page
            left -= len(page)
            self.cursor, self.scanned, self.complete = page.cursor, page.scanned, page.complete
            if page.cursor is None or not page.complete:
                return


def _say_how_far(cursor: str | None, scanned: int | None, *, complete: bool, limit: int) -> None:
    """Say on standard error that there is more, and how to see it."""
    if cursor is None:
        return
    if not complete:
        output.note(f"looked at {scanned:,} jobs and no further: --scan looks at all, --after {cursor} goes on there")
    elif output.is_terminal():
        output.note(f"there are more: --limit {limit * 4}, or --after {cursor}")


def print_summaries(jobs: Any) -> None:
    """Print jobs as a table for people."""
    columns = [
        output.Column("ID"),
        output.Column("STATUS", colours=output.STATUS_COLOURS),
        output.Column("KIND", least=8, rank=2),
        output.Column("TARGET", least=12),
        output.Column("CREATED", rank=4),
        output.Column("TOOK", rank=5, right=True),
        output.Column("WORKER", least=6, rank=6),
        output.Column("ERROR", least=20, rank=3),
    ]
    output.print_table(columns, [_row(job) for job in jobs])


def _row(job: Any) -> list[str]:
    took = None
    if job.started_at is not None and job.finished_at is not None:
        took = job.finished_at - job.started_at
    running = job.status == "running"
    return [
        str(job.id),
        str(job.status),
        str(job.kind),
        job.target_name,
        output.clock(job.created_at),
        f"{job.progress}%" if running else output.span(took),
        job.worker or "",
        job.error or "",
    ]
