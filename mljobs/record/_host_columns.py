"""The columns that a host's class has beside the record."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sqlalchemy import Column, inspect
from sqlalchemy.orm import Mapper

from mljobs._fields import BY_NAME
from mljobs.guards._beside import record_table_of


def host_columns(model: Any) -> Mapping[str, Column[Any]]:
    """Return the columns of the job table that the class, or a subclass of it, maps beside the record.

    Those of a joined subclass, which has a table of its own, are not among them.

    Args:
        model: The mapped job class.

    Returns:
        By the name of the attribute.
    """
    mapper: Mapper[Any] = inspect(model)
    table = record_table_of(model)
    return MappingProxyType(
        {
            attribute.key: column
            for each in mapper.self_and_descendants
            for attribute in each.column_attrs
            for column in attribute.columns
            if isinstance(column, Column) and column.table is table and column.name not in BY_NAME
        }
    )


def made_by_the_database(column: Column[Any]) -> bool:
    """Whether nobody may write the column: it is computed, or GENERATED ALWAYS."""
    return column.computed is not None or (column.identity is not None and bool(column.identity.always))
