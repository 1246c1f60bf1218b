"""Find the job that a short id names: a unique beginning or end, or both as the board writes it, ``0199f3c2…9d4e``."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from sqlalchemy import String, Text, cast, func, literal, select

from mljobs._values import ID_DIGITS
from mljobs.errors import AmbiguousIdError, InvalidValueError
from mljobs.jobs._base import Bind, JobRef, Model, connection_of, id_of, table_of
from mljobs.jobs._filters import Filter
from mljobs.jobs._words import Pattern, id_parts
from mljobs.record._mixin import MlJobMixin
from mljobs.record._models import MlJob

SHORTEST: Final = 4
"""The fewest digits of a short id."""
LOOKED_AT: Final = 100_000
"""Among how many of the latest jobs the end of an id is looked for."""
_SHOWN = 10


def find_id(session: Bind, job: JobRef, *, model: Model = MlJob) -> UUID:
    """Return the id that is named: whole, or by a beginning or an end of 4 digits or more that only one job has.

    A beginning is found by index among all jobs; an end among the latest 100,000.

    Args:
        session: The caller's session or connection.
        job: The job, its id in any form, or a part of it; ``…`` or ``*`` stands between beginning and end.
        model: The mapped job class.

    Raises:
        InvalidValueError: Not an id, fewer than 4 digits, or no job has it.
        AmbiguousIdError: Several jobs have it.
    """
    if isinstance(job, MlJobMixin | UUID | int):
        return id_of(job)
    parts = id_parts(job.strip()) if isinstance(job, str) else None
    if parts is None or len("".join(parts.parts)) < SHORTEST:
        raise InvalidValueError("id", job, f"expected an id, or {SHORTEST} or more hex digits of its beginning or end")
    begin = parts.parts[0]
    if len(begin) == ID_DIGITS:
        return UUID(begin)
    found = _beginning(session, parts, model) if begin else []
    if len(parts.parts) == 1:
        found += [one for one in _ending(session, begin, model) if one not in found]
    elif not begin:
        found = _ending(session, parts.parts[1], model)
    if not found:
        latest = f" among the latest {LOOKED_AT:,}"
        raise InvalidValueError("id", job, f"no job has an id that begins so, and none that ends so{latest}")
    if len(found) > 1:
        raise AmbiguousIdError(job, found)
    return found[0]


def _beginning(session: Bind, parts: Pattern, model: Model) -> list[UUID]:
    where = Filter(id="*".join(parts.parts)).conditions(model)
    key = table_of(model).c.id
    return list(connection_of(session, model).scalars(select(key).where(*where).order_by(key.desc()).limit(_SHOWN + 1)))


def _ending(session: Bind, end: str, model: Model) -> list[UUID]:
    """Return the latest jobs whose id ends so; ids are in the order of submission."""
    table = table_of(model)
    latest = select(table.c.id).order_by(table.c.id.desc()).limit(LOOKED_AT).subquery()
    ends = func.replace(cast(latest.c.id, String), "-", "").like(literal(f"%{end}", Text()))
    return list(connection_of(session, model).scalars(select(latest.c.id).where(ends).limit(_SHOWN + 1)))
