"""``MlJobRead``: the record as a Pydantic model, for response bodies and OpenAPI. Needs the extra ``web``.

``MlJobRead.model_validate(job)`` takes ``MlJob`` or any class with ``MlJobMixin``. With a host's own columns::

    TrainingRunRead = read_model(TrainingRun)

or, where a field is to be described or left out, by inheritance::

    class TrainingRunRead(MlJobRead):
        kind: RunKind
        owner_id: int
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

try:
    from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, create_model
except ImportError as error:
    raise ImportError("MlJobRead needs the extra: pip install 'mljobs[web]'") from error

from sqlalchemy import ARRAY, JSON
from sqlalchemy.types import TypeDecorator, TypeEngine

from mljobs._values import to_utc
from mljobs.errors import InvalidValueError
from mljobs.jobs import Model, table_of
from mljobs.record._host_columns import host_columns
from mljobs.states import MlJobStatus

_MAX_MS = 253_402_300_799_999


def _iso(moment: datetime) -> str:
    return to_utc("time", moment).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _storable(value: Any) -> Any:
    """Return parsed JSON without what JSON text in UTF-8 cannot hold: lone surrogates, numbers beyond a double.

    The record keeps such text byte for byte; an answer that shows it must not fail of it.
    """
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    if isinstance(value, float) and value - value != 0:
        return None
    return value


Time = Annotated[
    AwareDatetime,
    PlainSerializer(_iso, return_type=str, when_used="json-unless-none"),
    Field(json_schema_extra={"format": "date-time"}, examples=["2026-11-24T13:12:56.041Z"]),
]
"""A time, in JSON as ISO 8601 in UTC, to the millisecond."""
Millis = Annotated[int, Field(ge=0, le=_MAX_MS)]
Json = Annotated[Any, BeforeValidator(_storable)]
"""Parsed JSON of any shape."""


class MlJobRead(BaseModel):
    """A job. Times are ISO 8601 in UTC to the millisecond, with epoch milliseconds beside them; JSON texts are parsed."""

    model_config = ConfigDict(from_attributes=True, frozen=True)

    id: UUID = Field(description="UUIDv7: sorted by time of submission.")
    kind: str = Field(description="What the job does.", examples=["train"])
    target_name: str = Field(description="What the job works on.", examples=["spam"])
    status: MlJobStatus = Field(description="Where the job is in its life; the last three are final.")
    is_terminal: bool = Field(description="Whether the job has finished and can never change again.")
    progress: int = Field(ge=0, le=100, description="Percent.")
    created_at: Time
    started_at: Time | None = None
    finished_at: Time | None = None
    created_at_ms: Millis
    started_at_ms: Millis = Field(default=0, description="0 when not yet.")
    finished_at_ms: Millis = Field(default=0, description="0 when not yet.")
    duration_ms: int | None = Field(
        default=None, ge=0, description="From start to finish; null unless both are set and in order."
    )
    error_message: str | None = Field(default=None, description="Why the job failed.")
    spec: Json = Field(default=None, description="What to do: JSON of any shape.", examples=[{"lr": 0.1}])
    metrics: Json = Field(default=None, description="What came out: JSON of any shape.", examples=[{"f1": 0.93}])
    attempts: int = Field(ge=0, description="How many times the job was started.")
    priority: int = Field(description="Higher is claimed first.")
    run_after: Time | None = Field(default=None, description="Not started before this time.")
    exclusive: bool = Field(description="Never two exclusive jobs at once on one target.")
    retry_of: UUID | None = Field(default=None, description="The finished job that this one does again.")
    worker: str | None = Field(default=None, description="Who ran it last.")


def read_model(model: Model, name: str | None = None) -> type[MlJobRead]:
    """Return ``MlJobRead`` with the own columns of a host's class, for response bodies and OpenAPI.

    Args:
        model: The mapped job class.
        name: Of the model; None for the name of the class and ``Read``.

    Raises:
        InvalidValueError: Not a mapped job class; or a column has the name of a field of ``MlJobRead``.
    """
    table_of(model)
    fields: dict[str, Any] = {
        "kind": (str, Field(description="What the job does.", examples=[str(kind) for kind in model.__kinds__]))
    }
    for own, column in host_columns(model).items():
        if own in MlJobRead.model_fields:
            raise InvalidValueError("model", model.__name__, f"its column {own} has the name of a field of MlJobRead")
        kind, text = _python_type(column.type), column.comment or column.doc
        optional = bool(column.nullable)
        fields[own] = (kind | None if optional else kind, Field(default=None if optional else ..., description=text))
    config = ConfigDict(from_attributes=True, frozen=True, ser_json_bytes="base64")
    made: type[MlJobRead] = create_model(name or f"{model.__name__}Read", __base__=(_configured(config),), **fields)
    return made


def _configured(config: ConfigDict) -> type[MlJobRead]:
    return type("MlJobRead", (MlJobRead,), {"model_config": config, "__module__": __name__})


def _python_type(kind: TypeEngine[Any]) -> Any:
    if isinstance(kind, JSON):
        return Json
    if isinstance(kind, ARRAY):
        item: Any = _python_type(kind.item_type)
        return list[item | None] if (kind.dimensions or 1) == 1 else list[Any]
    if isinstance(kind, TypeDecorator) and not type(kind).__module__.startswith("mljobs."):
        return Any  # whatever its decorator makes
    try:
        return kind.python_type
    except NotImplementedError:
        return Any
