"""A job as JSON, whole or as lists show it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from mljobs import jobs
from mljobs.board._format import iso


def moment_text(value: datetime | None) -> str | None:
    return iso(value) if value is not None else None


def record(job: Any) -> dict[str, Any]:
    """Return a job as JSON: what ``mljobs.contrib.pydantic.MlJobRead`` is."""
    found = {
        "id": str(job.id),
        "kind": str(job.kind),
        "target_name": job.target_name,
        "status": str(job.status),
        "is_terminal": job.is_terminal,
        "progress": job.progress,
        "created_at": moment_text(job.created_at),
        "started_at": moment_text(job.started_at),
        "finished_at": moment_text(job.finished_at),
        "created_at_ms": job.created_at_ms,
        "started_at_ms": job.started_at_ms,
        "finished_at_ms": job.finished_at_ms,
        "duration_ms": job.duration_ms,
        "error_message": job.error_message,
        "spec": _json_of(job.spec_json),
        "metrics": _json_of(job.metrics_json),
        "attempts": job.attempts,
        "priority": job.priority,
        "run_after": moment_text(job.run_after),
        "exclusive": job.exclusive,
        "retry_of": str(job.retry_of) if job.retry_of is not None else None,
    }
    if hasattr(job, "worker"):
        found["worker"] = job.worker
    return found


def _json_of(text: str | None) -> Any:
    """Return JSON text as it stands in the record: numbers stay as they were written, and no depth is too much."""
    return None if text is None else msgspec.Raw(text.encode("utf-8", "replace"))


def summary(job: jobs.JobSummary) -> dict[str, Any]:
    names = ("progress", "attempts", "priority", "exclusive", "error", "worker", "token")
    times = ("created_at", "started_at", "finished_at", "run_after", "expires_at")
    known: dict[str, Any] = {
        "id": str(job.id),
        "kind": str(job.kind),
        "target_name": job.target_name,
        "status": str(job.status),
    }
    known |= {name: getattr(job, name) for name in names}
    known |= {name: moment_text(getattr(job, name)) for name in times}
    return known | {"retry_of": str(job.retry_of) if job.retry_of else None}
