"""Jobs as HTML, for notebooks: of what is loaded only, with every text escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import Enum
from html import escape
from typing import Any, Final

from sqlalchemy import inspect

from mljobs._fields import NAMES

_LEFT: Final = "style='text-align:left'"
_SHOWN: Final = 2_000
"""So many characters of a text are shown."""
_CUT: Final = 120
"""And in a cell of a list."""
_COLUMNS: Final = (
    "id",
    "kind",
    "target_name",
    "status",
    "progress",
    "created_at",
    "started_at",
    "finished_at",
    "worker",
)
_COLOURS: Final[Mapping[str, str]] = {
    "running": "#1f6feb",
    "completed": "#1a7f37",
    "failed": "#cf222e",
    "cancelled": "#9a6700",
}


def job_html(job: Any) -> str:
    """Return a job as a table of its fields; those that are empty or not loaded are left out."""
    state = inspect(job).dict  # to show a job must never load from the database
    own = [name for name in inspect(type(job)).column_attrs.keys() if name not in NAMES]  # noqa: SIM118 - a collection
    rows = [
        f"<tr><th {_LEFT}>{escape(name)}</th><td {_LEFT}>{_cell(name, state[name])}</td></tr>"
        for name in (*NAMES, *own)
        if state.get(name) is not None and name != "lease"
    ]
    return f"<table>{''.join(rows)}</table>"


def jobs_html(jobs: Iterable[Any], note: str = "") -> str:
    """Return jobs as a table with a row for each.

    Args:
        jobs: The jobs.
        note: A sentence beneath it.
    """
    listed = list(jobs)
    own = [name for job in listed[:1] for name in inspect(type(job)).column_attrs.keys() if name not in NAMES]  # noqa: SIM118
    names = (*_COLUMNS, *own, "spec_json", "metrics_json")
    rows = [[_cell(name, state.get(name), _CUT) for name in names] for state in (inspect(job).dict for job in listed)]
    return rows_html(names, rows) + (f"<p>{escape(note)}</p>" if note else "")


def rows_html(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are HTML already."""
    head = "".join(f"<th {_LEFT}>{escape(title)}</th>" for title in titles)
    lines = "".join("<tr>" + "".join(f"<td {_LEFT}>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def status_html(status: Any) -> str:
    """Return a state in its colour."""
    colour = _COLOURS.get(str(status))
    return f"<span style='color:{colour}'>{escape(str(status))}</span>" if colour else escape(str(status))


def _cell(name: str, value: Any, most: int = _SHOWN) -> str:
    if name == "status":
        return status_html(value)
    if name in ("spec_json", "metrics_json"):
        return f"<code>{_text(value or '', most)}</code>"
    if name == "error_message":
        return f"<pre>{_text(value)}</pre>"
    if isinstance(value, datetime):
        return escape(f"{value:%Y-%m-%d %H:%M:%S}")
    return _text("" if value is None else str(value.value if isinstance(value, Enum) else value), most)


def _text(text: str, most: int = _SHOWN) -> str:
    return escape(text if len(text) <= most else f"{text[:most]} ... ({len(text):,} characters)")


def values_of(json_text: str | None) -> dict[str, Any]:
    """Return what stands on the first level of a JSON object, without lists and objects; nothing of other JSON."""
    try:
        found = json.loads(json_text or "{}")
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if not isinstance(value, list | dict)}


def numbers_of(metrics_json: str | None) -> dict[str, int | float]:
    """Return the numbers on the first level of metrics, by key."""
    found = values_of(metrics_json)
    return {
        key: value for key, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
