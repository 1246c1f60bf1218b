"""Jobs for the tests of export and import, and what is stored of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from mljobs import MlJob, testing
from tests.backends import Backend

VECTORS = Path(__file__).parent / "vectors" / "kv_records.jsonl"


NOW = datetime(2026, 11, 24, 12, 30, 15, 123000, tzinfo=UTC)


def job(**values: Any) -> MlJob:
    """A finished job, unless told otherwise."""
    given_values: dict[str, Any] = {
        "kind": "train",
        "target_name": "spam",
        "status": "completed",
        "progress": 100,
        "created_at": NOW,
        "started_at": NOW,
        "finished_at": NOW + timedelta(seconds=5),
        "metrics_json": '{"f1": 0.9}',
        **values,
    }
    return MlJob(**given_values)


def queued(**values: Any) -> MlJob:
    return MlJob(**{"kind": "train", "target_name": "spam", "created_at": NOW, **values})


def stored(backend: Backend) -> dict[UUID, str]:
    with Session(backend.outside) as session:
        return {one.id: one.to_json() for one in session.scalars(select(MlJob))}


def empty(backend: Backend) -> None:
    testing.empty(backend.outside)


def put(backend: Backend, *jobs: MlJob) -> None:
    with Session(backend.outside, expire_on_commit=False) as session, session.begin():
        session.add_all(jobs)
