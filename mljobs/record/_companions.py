"""What a job class gets when it is mapped: checks, indexes, the tables beside it, triggers, the view."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import Table, event
from sqlalchemy.orm import Mapper

from mljobs._fields import BY_NAME
from mljobs.errors import ModelError
from mljobs.guards._companions import short_name
from mljobs.guards._hooks import install_triggers
from mljobs.guards._overview import Overview, install_overview
from mljobs.record._columns import TYPES
from mljobs.record._declaring import check_companion_name, check_dataclass, check_mapping, check_table
from mljobs.record._table import add_checks_and_indexes, lease_table, worker_table


def add_companions(mapper: Mapper[Any], cls: Any) -> None:
    """Give a newly mapped table its checks, indexes, leases and triggers, once."""
    table = mapper.local_table
    if not isinstance(table, Table) or (mapper.inherits is not None and not mapper.concrete):
        return  # a subclass that shares the table, or has one of its own beside it
    check_dataclass(cls)  # once more, for what a decorator has made of it
    check_mapping(cls, mapper, TYPES)
    table.info["mljobs_model"] = cls
    kinds: type[StrEnum] = table.c.kind.type.enum
    cls.__kinds__ = kinds
    if "mljobs" in table.info:  # defined once more on the same table, as in a notebook
        cls.__leases__, cls.__workers__ = table.info["mljobs"], table.info["mljobs_workers"]
        return
    lease_name = cls.__lease_tablename__ or short_name(f"{table.name}_leases")
    worker_name = cls.__worker_tablename__ or short_name(f"{table.name}_workers")
    check_companion_name(cls, lease_name, table, "its leases", "__lease_tablename__")
    check_companion_name(cls, worker_name, table, "its workers", "__worker_tablename__")
    add_checks_and_indexes(table, kinds)
    cls.__leases__ = table.info["mljobs"] = lease_table(table, lease_name)
    cls.__workers__ = table.info["mljobs_workers"] = worker_table(table, worker_name)
    cls.__leases__.add_is_dependent_on(cls.__workers__)  # the view, which comes with the leases, reads both
    # Once more when the table is made, for what a host has added to it since.
    event.listen(table, "before_create", lambda created, *_, **__: check_table(cls, created), propagate=True)
    install_triggers(table)
    if cls.__overview_name__ is not None:
        columns = tuple(cls.__overview_columns__)
        unknown = [name for name in columns if name not in table.c or name in BY_NAME]
        if unknown:
            raise ModelError(cls, f"its __overview_columns__ name {unknown[0]}, which is no column of its own")
        install_overview(Overview(cls.__overview_name__, table, cls.__leases__, cls.__workers__, columns))
