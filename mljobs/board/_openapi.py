"""The JSON API as OpenAPI 3.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mljobs
from mljobs.contrib.problems import MEDIA_TYPE
from mljobs.states import MlJobStatus

_TIME = {"type": "string", "format": "date-time"}
_TIME_OR_NULL = {"type": ["string", "null"], "format": "date-time"}
_ID = {"type": "string", "format": "uuid"}


def document(server: str, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the document.

    Args:
        server: The path that the API is under.
        kinds: Tokens of the kinds.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mljobs board",
            "version": mljobs.__version__,
            "description": "Machine-learning jobs. A job that has finished never changes again.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": server}],
        "paths": _paths(),
        "components": {"schemas": _schemas([str(kind) for kind in kinds]), "responses": {"Problem": _problem()}},
    }


def _problem() -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Problem"}
    return {"description": "Why not, as RFC 9457.", "content": {MEDIA_TYPE: {"schema": schema}}}


def _schemas(kinds: list[str]) -> dict[str, Any]:
    job = {
        "id": _ID,
        "kind": {"type": "string", "examples": kinds[:1]},
        "target_name": {"type": "string"},
        "status": {"type": "string", "enum": [str(status) for status in MlJobStatus]},
        "is_terminal": {"type": "boolean"},
        "progress": {"type": "integer", "minimum": 0, "maximum": 100},
        "created_at": _TIME,
        "started_at": _TIME_OR_NULL,
        "finished_at": _TIME_OR_NULL,
        "created_at_ms": {"type": "integer"},
        "started_at_ms": {"type": "integer"},
        "finished_at_ms": {"type": "integer"},
        "duration_ms": {"type": ["integer", "null"]},
        "error_message": {"type": ["string", "null"]},
        "spec": {},
        "metrics": {},
        "attempts": {"type": "integer"},
        "priority": {"type": "integer"},
        "run_after": _TIME_OR_NULL,
        "exclusive": {"type": "boolean"},
        "retry_of": {"type": ["string", "null"], "format": "uuid"},
        "worker": {"type": ["string", "null"]},
    }
    page = {
        "jobs": {"type": "array", "items": {"$ref": "#/components/schemas/Job"}},
        "next": {"type": ["string", "null"], "description": "Pass it as after for the next page."},
        "complete": {"type": "boolean"},
    }
    problem = {"type": {"type": "string"}, "title": {"type": "string"}, "status": {"type": "integer"}}
    return {
        "Job": {"type": "object", "properties": job, "required": [name for name in job if name != "worker"]},
        "Page": {"type": "object", "properties": page, "required": list(page)},
        "Problem": {"type": "object", "properties": problem, "required": ["type", "title", "status"]},
        "Anything": {"type": "object"},
    }


_FILTER = {
    "name": "q",
    "in": "query",
    "description": "A filter: kind:train status:failed target:spam* spec.lr>0.01 created:<2h",
    "schema": {"type": "string", "maxLength": 2000, "default": ""},
}
_JOB = {"name": "id", "in": "path", "required": True, "schema": _ID}
_JOBS = {
    "name": "id",
    "in": "query",
    "description": "The jobs, at most 50.",
    "schema": {"type": "array", "items": _ID, "maxItems": 50},
    "style": "form",
    "explode": True,
}


def _limit(default: int, most: int) -> dict[str, Any]:
    return {
        "name": "limit",
        "in": "query",
        "schema": {"type": "integer", "minimum": 1, "maximum": most, "default": default},
    }


def _operation(
    name: str,
    summary: str,
    schema: str = "Anything",
    *,
    status: str = "200",
    media: str = "application/json",
    parameters: Sequence[dict[str, Any]] = (),
    body: dict[str, Any] | None = None,
    problems: Sequence[str] = (),
) -> dict[str, Any]:
    content = (
        {"schema": {"$ref": f"#/components/schemas/{schema}"}}
        if media == "application/json"
        else {"schema": {"type": "string"}}
    )
    refused = {code: {"$ref": "#/components/responses/Problem"} for code in ("403", "422", "503", *problems)}
    found: dict[str, Any] = {
        "operationId": name,
        "summary": summary,
        "parameters": list(parameters),
        "responses": {status: {"description": summary, "content": {media: content}}, **refused},
    }
    if body is not None:
        schema_of = {"type": "object", "properties": body, "additionalProperties": False}
        required = [field for field in ("kind", "target_name") if field in body]
        if required:
            schema_of["required"] = required
        found["requestBody"] = {"required": bool(required), "content": {"application/json": {"schema": schema_of}}}
    return found


def _paths() -> dict[str, Any]:
    priority = {"type": "integer", "minimum": -32768, "maximum": 32767}
    flag = {"type": "boolean"}
    text = {"type": "string", "minLength": 1}
    submit = {
        "kind": text,
        "target_name": text,
        "spec": {},
        "priority": priority,
        "exclusive": flag,
        "unless_active": flag,
    }
    written = ("400", "404", "409", "413", "415")
    after = {"name": "after", "in": "query", "schema": {"type": "string"}}
    hours = {"name": "hours", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 720, "default": 24}}
    name = {"name": "name", "in": "query", "required": True, "schema": {"type": "string", "maxLength": 1000}}
    kind = {"name": "kind", "in": "query", "schema": {"type": "string"}}
    view = {
        "name": "view",
        "in": "query",
        "required": True,
        "schema": {"type": "string", "enum": ["now", "job", "jobs"]},
    }
    one = {"name": "id", "in": "query", "description": "Of view=job: which.", "schema": _ID}
    csv, lines, stream = "text/csv", "application/x-ndjson", "text/event-stream"
    return {
        "/jobs": {
            "get": _operation("list_jobs", "A page of jobs, the newest first.", "Page", parameters=[_FILTER, _limit(50, 200), after]),
            "post": _operation("submit_job", "Queue a job.", "Job", status="201", body=submit, problems=written),
        },
        "/jobs.ndjson": {"get": _operation("jobs_ndjson", "Jobs, one a line.", media=lines, parameters=[_FILTER, _limit(1000, 10_000)])},
        "/jobs.csv": {"get": _operation("jobs_csv", "Jobs as a table.", media=csv, parameters=[_FILTER, _limit(1000, 10_000)])},
        "/jobs/{id}": {"get": _operation("get_job", "A job.", "Job", parameters=[_JOB], problems=["404"])},
        "/jobs/{id}/chain": {"get": _operation("get_chain", "All records of the same work.", parameters=[_JOB], problems=["404"])},
        "/jobs/{id}/cancel": {"post": _operation("cancel_job", "Cancel a job.", parameters=[_JOB], body={}, problems=written)},
        "/jobs/{id}/retry": {
            "post": _operation("retry_job", "Queue a finished job's work again.", "Job", status="201", parameters=[_JOB],
                               body={"priority": priority, "unless_active": flag}, problems=written)
        },
        "/stats": {"get": _operation("get_stats", "Figures by kind.", parameters=[hours])},
        "/workers": {"get": _operation("list_workers", "Who works, and which kinds wait that no worker handles.")},
        "/compare": {"get": _operation("compare_jobs", "Runs side by side.", parameters=[_JOBS])},
        "/compare.csv": {"get": _operation("compare_csv", "Runs side by side as a table.", media=csv, parameters=[_JOBS])},
        "/target": {"get": _operation("get_target", "Metrics of the runs of a target.", parameters=[name, kind])},
        "/events": {"get": _operation("get_events", "What changes, as server-sent events.", media=stream, parameters=[view, one, _FILTER], problems=["404"])},
    }  # fmt: skip
