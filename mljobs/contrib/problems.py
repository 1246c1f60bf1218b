"""What each error is over HTTP: one table of statuses, and problem details (RFC 9457) with the error's data.

No framework is imported here; :mod:`mljobs.contrib` installs this into FastAPI, Starlette, Flask, Litestar and Django.

Errors of the caller are 4xx and say everything. Errors of the application are 5xx and say nothing that a stranger should
not read: which table is missing, or what a database URL holds, belongs in the log.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from http import HTTPStatus
from types import MappingProxyType
from typing import Any
from uuid import UUID

from mljobs import errors

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
"""The content type of a problem."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What an error is over HTTP.

    Attributes:
        status: The status code.
        name: The last part of the problem's ``type``.
        title: The same for every problem of this type.
        why: Why it is this status and not another.
        public: The error's attributes that the problem holds, and their names in it.
    """

    status: int
    name: str
    title: str
    why: str
    public: Mapping[str, str] = field(default_factory=dict)


_JOB = {"job_id": "job_id"}
MEANINGS: Mapping[type[errors.MlJobsError], Meaning] = MappingProxyType(
    {
        errors.MlJobsError: Meaning(
            500, "error", "Internal error", "an error of which no more is known is the application's"
        ),
        errors.InvalidValueError: Meaning(
            422,
            "invalid-value",
            "A field cannot hold this value",
            "the request is well-formed, its content is not acceptable; 500 where the application is set up wrongly",
            {"field": "field", "value": "value", "reason": "reason"},
        ),
        errors.JobDecodeError: Meaning(
            422,
            "undecodable-record",
            "This is not a job record",
            "as for an invalid value: the body arrived whole, but is no record",
            {"field": "field", "reason": "reason"},
        ),
        errors.FilterError: Meaning(
            422,
            "filter-not-understood",
            "A word of the filter is not understood",
            "as for an invalid value, with the word and where it stands",
            {"field": "field", "value": "value", "reason": "reason", "position": "position", "word": "word"},
        ),
        errors.AmbiguousIdError: Meaning(
            422,
            "ambiguous-id",
            "Several jobs have an id that begins or ends so",
            "as for an invalid value: a short id has to be given with more digits",
            {"field": "field", "value": "value", "reason": "reason"},
        ),
        errors.JobNotFound: Meaning(
            404, "job-not-found", "No such job", "the resource that the request names does not exist", _JOB
        ),
        errors.TerminalStateError: Meaning(
            409,
            "terminal-state",
            "The job has finished and cannot change",
            "the request conflicts with the state of the resource; repeating it will not help",
            {**_JOB, "status": "job_status", "finished_at": "finished_at"},
        ),
        errors.InvalidTransitionError: Meaning(
            409,
            "invalid-transition",
            "The job cannot take this state now",
            "the request conflicts with the state of the resource; it may fit a later state",
            {**_JOB, "status": "job_status", "wanted": "wanted_status"},
        ),
        errors.TargetLockedError: Meaning(
            409,
            "target-locked",
            "Another job holds the target",
            "a conflict with another job's state, over once that job ends; 423 is for WebDAV's own locks",
            _JOB,
        ),
        errors.StartRefusedError: Meaning(
            500,
            "start-refused",
            "The job cannot be started",
            "the stored job is at fault, not the request: its row cannot be read, or the database refuses the write",
            {**_JOB, "column": "column"},
        ),
        errors.JobExistsError: Meaning(
            409,
            "job-exists",
            "A job with this id is there already",
            "the request conflicts with a resource that exists",
            {**_JOB, "place": "place"},
        ),
        errors.JobHeldError: Meaning(
            409,
            "job-held",
            "A worker holds the job",
            "a conflict with the worker's lease, over once that ends or the job is cancelled",
            {**_JOB, "worker": "worker", "expires_at": "expires_at"},
        ),
        errors.LeaseLostError: Meaning(
            409,
            "lease-lost",
            "The job is held by somebody else now",
            "the caller's picture of the job is out of date; nothing was written",
            {**_JOB, "token": "token"},
        ),
        errors.JobCancelled: Meaning(
            409,
            "job-cancelled",
            "The job was cancelled",
            "a request that works on the job meets its cancellation: a conflict with its state",
            _JOB,
        ),
        errors.GiveUp: Meaning(
            422,
            "give-up",
            "The job cannot succeed as it was asked for",
            "raised by a handler whose work no retry would mend: what was asked for is at fault",
        ),
        errors.WaitTimeout: Meaning(
            504,
            "wait-timeout",
            "The job has not finished in time",
            "the answer depends on a worker that has not answered yet; the job goes on, asking again is right",
            {**_JOB, "timeout": "timeout_seconds", "status": "job_status"},
        ),
        errors.ModelError: Meaning(
            500,
            "unfit-model",
            "A job class is defined wrongly",
            "the application's own class cannot hold a record, whatever was asked",
        ),
        errors.TransferError: Meaning(
            500,
            "broken-transfer",
            "A file could not be read or written to its end",
            "the file is the application's: a full disk, a broken pipe, a damaged archive",
        ),
        errors.SchemaError: Meaning(
            503,
            "database-not-ready",
            "The database is not ready for this application",
            "nothing is wrong with the request; it will work once an operator has migrated the database",
        ),
    }
)
"""Every error of :mod:`mljobs.errors`, and what it is over HTTP. A subclass without a line is what its parent is."""

_SETUP = frozenset((
    "dialect", "executor", "handler", "handlers", "metadata", "model", "session", "source", "store", "target", "url",
))  # fmt: skip
"""Arguments that a program gives and no request: a wrong one is no fault of the client's, and may hold a secret."""

_INTERNAL = MEANINGS[errors.MlJobsError]


def meaning_of(error: errors.MlJobsError | type[errors.MlJobsError]) -> Meaning:
    """Return what an error, or a class of errors, is over HTTP.

    Args:
        error: One of ours, or one that a host derived from ours.
    """
    kind = error if isinstance(error, type) else type(error)
    if isinstance(error, errors.InvalidValueError) and error.field in _SETUP:
        return _INTERNAL
    return next((MEANINGS[parent] for parent in kind.__mro__ if parent in MEANINGS), _INTERNAL)


def status_of(error: errors.MlJobsError | type[errors.MlJobsError]) -> int:
    """Return the HTTP status of an error, or of a class of errors.

    Args:
        error: One of ours, or one that a host derived from ours.
    """
    return meaning_of(error).status


def problem(error: errors.MlJobsError, *, instance: str | None = None) -> dict[str, Any]:
    """Return the problem details of an error (RFC 9457), every value fit for JSON.

    Args:
        error: One of ours.
        instance: What names this occurrence, such as the request's path; None for none.

    Returns:
        ``type``, ``title``, ``status``, ``detail``, and the error's own data: ``job_id``, ``job_status``, ``field`` ...
    """
    meaning = meaning_of(error)
    of_caller = meaning.status < HTTPStatus.INTERNAL_SERVER_ERROR or isinstance(error, errors.WaitTimeout)
    found: dict[str, Any] = {
        "type": f"urn:mljobs:{meaning.name}",
        "title": meaning.title,
        "status": meaning.status,
        "detail": _text(str(error)) if of_caller else f"{meaning.title}; the application's log says more.",
    }
    if instance is not None:
        found["instance"] = _text(instance)
    for attribute, name in meaning.public.items():
        value = getattr(error, attribute)
        if value is not None:
            found[name] = _json_value(value)
    if isinstance(error, errors.TerminalStateError) and error.changes:
        found["changes"] = {
            field: {"from": _json_value(old), "to": _json_value(new)} for field, (old, new) in error.changes.items()
        }
    return found


def body_of(error: errors.MlJobsError, *, instance: str | None = None) -> bytes:
    """Return the problem as a response's body, and log it where the fault is the application's own.

    Args:
        error: One of ours.
        instance: As ``problem`` takes it.
    """
    found = problem(error, instance=instance)
    if found["status"] in (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE):
        logger.error("answered %d at %s: %s", found["status"], instance, error, exc_info=error)
    return json.dumps(found, separators=(",", ":")).encode()


def schema() -> dict[str, Any]:
    """Return the JSON schema of a problem, for OpenAPI."""
    return {
        "title": "Problem",
        "description": "Problem details (RFC 9457), with the data of the error.",
        "type": "object",
        "required": ["type", "title", "status", "detail"],
        "properties": {
            "type": {"type": "string", "format": "uri", "examples": ["urn:mljobs:terminal-state"]},
            "title": {"type": "string"},
            "status": {"type": "integer", "minimum": 400, "maximum": 599},
            "detail": {"type": "string"},
            "instance": {"type": "string", "format": "uri-reference"},
            "job_id": {"type": "string", "format": "uuid"},
            "job_status": {"type": "string"},
        },
        "additionalProperties": True,
    }


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _json_value(value: object) -> Any:
    """Return ``value`` as JSON can hold it: what a client may have sent as it is, all else as a short text."""
    match value:
        case Enum():
            return _json_value(value.value)
        case None | bool():
            found: Any = value
        case int() if abs(value) < _LARGEST:
            found = value
        case float() if value - value == 0:  # JSON has no infinities
            found = value
        case UUID():
            found = str(value)
        case datetime():
            found = value.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        case str():
            text = _text(value)
            found = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
        case _:
            found = _text(errors.shown(value))
    return found


_LONGEST = 1000
_LARGEST = 2**64  # what is larger, hardly a JSON parser reads, and Python itself does not write without limit
