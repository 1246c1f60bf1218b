"""``show`` and ``lineage``: one job, and all tries of its work."""

from __future__ import annotations

import json
import sys
from typing import Any

from mljobs.cli import _output as output
from mljobs.cli._listing import print_summaries
from mljobs.cli._options import FieldsOption, IdArgument, JsonOption
from mljobs.cli._settings import open_store

_JSON_FIELDS = ("id", "kind", "target_name", "status", "created_at", "started_at", "finished_at", "attempts", "worker")


def show(job: IdArgument, *, as_json: JsonOption = False, fields: FieldsOption = None) -> None:
    """Show all of a job: its life, its error, spec and metrics, and the other tries of the same work.

    \b
    Example:
      $ mljobs show 9d4e
      $ mljobs show 9d4e --json | jq .spec
    """
    wanted = output.fields_of(fields)
    with open_store() as store:
        found = store.get(store.find_id(job))
        if as_json:
            output.print_json([output.job_object(found)], wanted)
            return
        if wanted is not None or not output.is_terminal():
            _print_pairs({**output.picked(output.job_object(found), wanted)})
            return
        (summary,) = store.summaries_of([found.id], text=0)
        _print_job(found, summary, [one for one in store.chain(found.id) if one.id != found.id])


def _print_pairs(item: dict[str, Any]) -> None:
    for name, value in item.items():
        sys.stdout.write(f"{name}\t{output.escaped(output.as_text(value))}\n")


def _print_job(job: Any, summary: Any, others: list[Any]) -> None:
    head = f"{job.kind} {output.escaped(job.target_name)}"
    status = output.coloured(str(job.status), output.STATUS_COLOURS[job.status])
    lines = [output.coloured(head, "1"), f"id        {job.id}", f"status    {status}{_how_far(job)}"]
    lines += [f"created   {_full(job.created_at)}"]
    lines += [f"run after {_full(job.run_after)}"] if job.run_after else []
    lines += (
        [f"started   {_full(job.started_at)}  after {output.span(job.started_at - job.created_at)}"]
        if job.started_at
        else []
    )
    if job.finished_at:
        took = "" if job.duration_ms is None else f"  took {output.span(job.duration_ms / 1000)}"
        lines.append(f"finished  {_full(job.finished_at)}{took}")
    if job.worker:
        lines.append(f"worker    {output.escaped(job.worker)}")
    if summary.expires_at is not None:
        lines.append(f"lease     until {_full(summary.expires_at)}")
    lines.append(f"attempts  {job.attempts}" + (f"  priority {job.priority}" if job.priority else ""))
    lines += ["exclusive on its target"] if job.exclusive else []
    own = {name: value for name, value in output.job_object(job).items() if name not in output.JOB_FIELDS}
    lines += [f"{name:<9} {output.escaped(output.as_text(value))}" for name, value in own.items()]
    for title, text in (("spec", job.spec_json), ("metrics", job.metrics_json)):
        lines += ["", output.coloured(title, "1"), *_pretty(text)] if text is not None else []
    if job.error_message:
        lines += [
            "",
            output.coloured("error", "1"),
            *(f"  {output.escaped(line)}" for line in job.error_message.split("\n")),
        ]
    sys.stdout.write("\n".join(lines) + "\n")
    if others:
        sys.stdout.write(f"\n{output.coloured('other tries', '1')}\n")
        print_summaries(others)


def _how_far(job: Any) -> str:
    return f"  {job.progress}%" if job.status == "running" else ""


def _full(moment: Any) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _pretty(text: str) -> list[str]:
    """Return JSON as lines for people; a text that is none as it is."""
    try:
        shown = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        shown = text
    return [f"  {output.escaped(line)}" for line in shown.split("\n")]


def lineage(job: IdArgument, *, as_json: JsonOption = False, fields: FieldsOption = None) -> None:
    """Show all tries of the same work, the first one first: what this job retries, and what retries it.

    \b
    Example:
      $ mljobs lineage 9d4e
    """
    wanted = output.fields_of(fields)
    with open_store() as store:
        tries = store.chain(store.find_id(job))
        if as_json or wanted is not None:
            records = [output.job_object(store.get(one.id)) for one in tries]
            if as_json:
                output.print_json(records, wanted)
            else:
                output.print_tabs(records, wanted or _JSON_FIELDS)
        elif output.is_terminal():
            print_summaries(tries)
        else:
            output.print_tabs([output.job_object(store.get(one.id)) for one in tries], _JSON_FIELDS)
