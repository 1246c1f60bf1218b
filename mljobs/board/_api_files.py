"""What lists and comparisons show, as files: NDJSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mljobs import jobs
from mljobs.board._api_figures import compared_runs
from mljobs.board._api_records import record
from mljobs.board._api_requests import filter_of, number_of, viewer_of
from mljobs.board._format import iso, literal

_ROWS_MOST = 10_000
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001 - full-width ones are formulas too


async def ndjson(request: Request) -> Response:
    """Return the jobs that a filter finds, one a line, at most 10,000."""
    found_jobs = await _all(request)
    lines = msgspec.json.Encoder().encode_lines(map(record, found_jobs))
    return _file(lines, "application/x-ndjson", "jobs.ndjson")


async def as_csv(request: Request) -> Response:
    """Return the jobs that a filter finds as a table, at most 10,000."""
    rows = []
    for job in await _all(request):
        row = record(job)
        rows.append({**row, "spec": job.spec_json, "metrics": job.metrics_json})
    names = list(rows[0]) if rows else ["id", "kind", "target_name", "status"]
    return _file(
        _table(names, [[row.get(name) for name in names] for row in rows]), "text/csv; charset=utf-8", "jobs.csv"
    )


async def compare_csv(request: Request) -> Response:
    """Return runs side by side as a table."""
    shown = await compared_runs(request)
    names = [*shown.varying, *(name for name, _ in shown.same)]
    head = ["id", "target_name", "status", "started_at", "took_seconds", *shown.metrics, *names]
    rows = [
        [
            str(run.job.id), run.job.target_name, str(run.job.status), iso(run.job.started_at) if run.job.started_at else "",
            run.took, *(run.metrics.get(name, "") for name in shown.metrics),
            *(literal(run.params[name]).strip('"') if name in run.params else "" for name in names),
        ]
        for run in shown.runs
    ]  # fmt: skip
    return _file(_table(head, rows), "text/csv; charset=utf-8", "compare.csv")


async def _all(request: Request) -> Sequence[Any]:
    site, _ = await viewer_of(request)
    model = site.backend.model
    asked, limit = filter_of(request, model), number_of(request, "limit", 1000, _ROWS_MOST)
    return (await site.backend.read(lambda bind: jobs.find(bind, asked, limit=limit, model=model))).jobs


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([_inert(name) for name in head])
    writer.writerows([[_inert(value) for value in row] for row in rows])
    return out.getvalue().encode("utf-8", "replace")


def _inert(value: Any) -> Any:
    """Return text that no spreadsheet runs as a formula."""
    if isinstance(value, str) and value[:1] in _FORMULA and numeric_text(value) is None:
        return f"'{value}"
    return value


def numeric_text(text: str) -> float | None:
    """Return the number that text is, if it is one."""
    try:
        return float(text)
    except ValueError:
        return None


def _file(content: bytes, kind: str, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
    return Response(content, 200, headers, kind)
