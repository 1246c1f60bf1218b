"""``compare-runs`` and ``best``: parameters and metrics of runs beside each other."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from mljobs.cli import _options as options
from mljobs.cli import _output as output
from mljobs.cli._settings import open_store

_CELL = 18


def compare_runs(
    jobs: options.IdsArgument,
    *,
    everything: Annotated[bool, typer.Option("--all", help="Parameters that are equal, too.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Show the parameters in which jobs differ, and their metrics, side by side.

    \b
    Example:
      $ mljobs compare-runs 9d4e 51b2 07af
      $ mljobs best spam --metric f1 --fields id | mljobs compare-runs -
    """
    with open_store() as store:
        found = [store.get(job_id) for job_id in options.ids_of(store, jobs)]
    items = [output.job_object(job) for job in found]
    if as_json:
        output.print_json(items, ["id", "kind", "target_name", "status", "spec", "metrics"])
        return
    specs, metrics = ([flat(item[name]) for item in items] for name in ("spec", "metrics"))
    rows = [(f"spec.{key}", values) for key, values in _rows(specs) if everything or len(set(values)) > 1]
    rows += [(f"metrics.{key}", values) for key, values in _rows(metrics)]
    if output.is_terminal():
        _print_side_by_side(items, rows)
        return
    sys.stdout.write("\t".join(["id", *(item["id"] for item in items)]) + "\n")
    for name, values in rows:
        sys.stdout.write("\t".join(map(output.escaped, [name, *values])) + "\n")


def flat(value: Any, before: str = "") -> dict[str, str]:
    """Return a JSON value as one text for each path."""
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for key, item in value.items():
            found |= flat(item, f"{before}.{key}" if before else str(key))
        return found
    return {} if value is None and not before else {before or "value": output.as_text(value)}


def _rows(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    keys = dict.fromkeys(key for column in columns for key in column)
    return [(key, [column.get(key, "") for column in columns]) for key in keys]


def _print_side_by_side(items: Sequence[Mapping[str, Any]], rows: Sequence[tuple[str, list[str]]]) -> None:
    """Print the runs as numbered columns, as many beside each other as there is room for."""
    for number, item in enumerate(items, 1):
        line = f"[{number}] {item['id']} {item['status']} {item['kind']} {output.escaped(item['target_name'])}"
        sys.stdout.write(f"{line}\n")
    names = max((output.cells(output.escaped(name)) for name, _ in rows), default=0)
    names = min(names, max(12, output.width() // 3))
    at_once = max(1, (output.width() - names) // (_CELL + 2))
    for start in range(0, len(items), at_once):
        here = range(start, min(start + at_once, len(items)))
        columns = [output.Column("", least=names), *(output.Column(f"[{at + 1}]", least=6, right=True) for at in here)]
        shown = [[name, *(output.cut(output.escaped(values[at]), _CELL) for at in here)] for name, values in rows]
        sys.stdout.write("\n")
        output.print_table(columns, shown)


def best(
    target: Annotated[str, typer.Argument(help="The whole name.")],
    words: options.FilterArgument = None,
    *,
    metric: Annotated[str, typer.Option(help="A key of the metrics with a number under it.")],
    lowest: Annotated[bool, typer.Option("--lowest", help="Less is better.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-L", min=1, max=1000, help="At most so many.")] = 10,
    scan: options.ScanOption = False,
    as_json: options.JsonOption = False,
    fields: options.FieldsOption = None,
) -> None:
    """Show the completed runs on a target with the highest value of a metric.

    \b
    Example:
      $ mljobs best spam --metric f1
      $ mljobs best spam --metric loss --lowest 'created:<7d'
    """
    wanted = output.fields_of(fields)
    with open_store() as store:
        found = store.best(target, metric, lowest=lowest, limit=limit, filter=options.parsed(words), scan=scan)
    items = [output.job_object(job) for job in found]
    if as_json:
        output.print_json(items, wanted)
    elif wanted is not None or not output.is_terminal():
        output.print_tabs(items, wanted or ["id", f"metrics.{metric}", "finished_at", "spec"])
    elif items:
        columns = [
            output.Column("ID"),
            output.Column(metric.upper(), least=6, right=True),
            output.Column("FINISHED", rank=2),
            output.Column("SPEC", least=10, rank=3),
        ]
        rows = [[job.id, job.metrics.get(metric), output.clock(job.finished_at), job.spec_json] for job in found]
        output.print_table(
            columns, [[value if isinstance(value, str) else _shown(value) for value in row] for row in rows]
        )
    else:
        output.note(f"no completed job on {output.escaped(target)} has a number under {output.escaped(metric)}")
    if not found.complete:
        output.note(f"among the latest {found.scanned:,} jobs on it: --scan looks at all")


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, int | float) else str(value)
