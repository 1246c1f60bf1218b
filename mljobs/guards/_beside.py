"""The job table of a class, and the tables beside it: of leases and of workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect

if TYPE_CHECKING:
    from sqlalchemy import Table


def record_table_of(model: type[Any]) -> Table:
    """Return the table that holds the record of a mapped class; a joined subclass has one of its own beside it."""
    tables = inspect(model).tables
    return next(table for table in tables if "spec_json" in table.c)


def tables_beside(jobs: Table) -> list[Table]:
    """Return the tables of leases and of workers; of a copy by ``Table.to_metadata`` those that the same MetaData has."""
    names = [jobs.info[key].name for key in ("mljobs", "mljobs_workers") if key in jobs.info]
    places = (name if jobs.schema is None else f"{jobs.schema}.{name}" for name in names)
    return [jobs.metadata.tables[place] for place in places if place in jobs.metadata.tables]


def leases_of(jobs: Table) -> Table:
    """Return the table of leases, the first of ``tables_beside``."""
    return tables_beside(jobs)[0]
