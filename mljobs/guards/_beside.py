"""The tables that stand beside a job table: of its leases and of its workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Table


def tables_beside(jobs: Table) -> list[Table]:
    """Return the tables of leases and of workers; of a copy by ``Table.to_metadata`` those that the same MetaData has."""
    names = [jobs.info[key].name for key in ("mljobs", "mljobs_workers") if key in jobs.info]
    places = (name if jobs.schema is None else f"{jobs.schema}.{name}" for name in names)
    return [jobs.metadata.tables[place] for place in places if place in jobs.metadata.tables]


def leases_of(jobs: Table) -> Table:
    """Return the table of leases, the first of ``tables_beside``."""
    return tables_beside(jobs)[0]
