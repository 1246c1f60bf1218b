"""Retry: queue the work of a finished job again, as a new record."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, inspect

from mljobs._fields import FIELDS
from mljobs._values import to_json_text
from mljobs.errors import InvalidTransitionError, InvalidValueError
from mljobs.jobs._base import Bind, JobRef, M, connection_of, model_and_id, table_of
from mljobs.jobs._reading import get
from mljobs.jobs._records import is_ml_job, session_on
from mljobs.jobs._submitting import first_active, hold_off_others, required_fields, submit
from mljobs.record._models import MlJob
from mljobs.states import MlJobStatus

_OF_ONE_RUN = frozenset(field.name for field in FIELDS if not field.taken_over)
"""What a retry does not take over from the job that it does again."""


def retry(
    session: Bind,
    job: JobRef,
    *,
    spec: Any = None,
    run_after: datetime | timedelta | None = None,
    priority: int | None = None,
    unless_active: bool = False,
    again: bool = False,
    another: bool = False,
    model: type[M] = MlJob,  # type: ignore[assignment]
) -> M:
    """Queue a finished job's work again, as a new record with ``retry_of`` set; the finished one stays what it is.

    Kind, target, spec, priority, exclusiveness and a host's own columns are taken over. A job has one queued or running
    retry at a time: where there is one, that is returned.

    Args:
        session: The caller's session or connection.
        job: The finished job or its id.
        spec: What to do instead, any JSON-able value; None for the finished job's own.
        run_after: Not claimed before this time, or for this long.
        priority: Instead of the finished job's own.
        unless_active: Return the queued or running job of this kind and target, if there is one.
        again: Whether a completed job may be retried too; a failed or cancelled one may always.
        another: Whether to queue a second retry beside one that is queued or running.
        model: The mapped job class.

    Raises:
        JobNotFound: No record has this id.
        InvalidTransitionError: It has not finished; or it is completed, and ``again`` is False.
        InvalidValueError: ``spec`` is not one that JSON can hold, or another one than that of the retry that is there.
    """
    model, job_id = model_and_id(job, model)
    if isinstance(session, Connection) and not is_ml_job(model):
        with session_on(session) as own:
            choices: dict[str, Any] = {"run_after": run_after, "priority": priority, "unless_active": unless_active}
            retried = retry(own, job_id, spec=spec, again=again, another=another, model=model, **choices)
            own.refresh(retried)
            own.expunge_all()
        return retried
    original = _finished(session, job_id, model, again=again)
    spec_json = original.spec_json if spec is None else to_json_text("spec", spec)
    if not another:
        live = _live_retry(session, original, model, spec, spec_json)
        if live is not None:
            return live
    values = _taken_over(original) | {"spec_json": spec_json, "retry_of": original.id}
    values |= {} if priority is None else {"priority": priority}
    options: dict[str, Any] = {"run_after": run_after, "unless_active": unless_active, "model": type(original)}
    queued: M = submit(session, **values, **options)
    return queued


def _finished(session: Bind, job_id: UUID, model: type[M], *, again: bool) -> M:
    """Return the job; refuse one that has not finished, and a completed one unless ``again``."""
    original = get(session, job_id, model=model)
    if not original.is_terminal:
        raise InvalidTransitionError(original.id, original.status, MlJobStatus.QUEUED)
    if original.status is MlJobStatus.COMPLETED and not again:
        raise InvalidTransitionError(
            original.id, original.status, MlJobStatus.QUEUED, "again=True does its work once more"
        )
    return original


def _live_retry(session: Bind, original: M, model: type[M], spec: Any, spec_json: str) -> M | None:
    """Return the queued or running retry of a job; refuse one with another spec. Others who retry it wait for our commit.

    In a REPEATABLE READ transaction only a retry that was committed before it began is found.
    """
    hold_off_others(connection_of(session, model), model, "retry", original.id.hex)
    live: M | None = first_active(session, model, table_of(model).c.retry_of == original.id)
    if live is not None and spec is not None and live.spec_json != spec_json:
        reason = f"job {live.id} is {live.status.token} as its retry, with another spec; another=True queues a second"
        raise InvalidValueError("spec", spec, reason)
    return live


def _taken_over(original: Any) -> dict[str, Any]:
    """Return the values that a retry takes over."""
    model = type(original)
    values = {
        attribute.key: getattr(original, attribute.key)
        for attribute in inspect(model).column_attrs
        if attribute.key not in _OF_ONE_RUN
    }
    # A dataclass may ask for the user where the table has the user's id.
    return values | {name: getattr(original, name) for name in required_fields(model) if name not in values}
