"""Make Python values and objects of rows in wire form, a host's own columns included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import inspect

from mljobs._values import from_millis
from mljobs.db._wire import Wire
from mljobs.errors import InvalidValueError
from mljobs.jobs import Model
from mljobs.transfer._host_values import HostValues
from mljobs.transfer._rows import IDS, NAMES, TIMES, RejectedLineError, Row, host_part


def python_values(wire: Wire, row: Row) -> list[Any]:
    """Return the row as the table's types take it."""
    values = list(row)
    for at in IDS:
        values[at] = None if values[at] is None else UUID(hex=wire.id_out(values[at]))
    for at in TIMES:
        moment: datetime | None = None if values[at] is None else from_millis(wire.time_out(values[at]))
        values[at] = moment
    return values


def record_values(wire: Wire, row: Row) -> dict[str, Any]:
    """Return the record that a row holds, by the names of its columns."""
    return dict(zip(NAMES, python_values(wire, row[: len(NAMES)]), strict=True))


def host_of(row: Row) -> Mapping[str, Any]:
    """Return the values of a host's own columns that came with a row."""
    values: Mapping[str, Any] = row[len(NAMES)] if len(row) > len(NAMES) else {}
    return values


def with_host(make: Callable[[bytes], Row], host: HostValues) -> Callable[[bytes], Row]:
    """Return what makes rows with the values of a host's own columns behind them."""

    def make_both(line: bytes) -> Row:
        row = make(line)
        try:
            return (*row, host.from_line(host_part(line)))
        except (InvalidValueError, msgspec.MsgspecError) as error:
            field, reason = (
                (error.field, error.reason) if isinstance(error, InvalidValueError) else ("columns", str(error))
            )
            raise RejectedLineError(field, reason) from error

    return make_both


def made_of(model: Model, values: dict[str, Any]) -> Any:
    mapper = inspect(model)
    if mapper.polymorphic_on is not None:  # each record is of the class that it says
        identity = values.get(mapper.get_property_by_column(mapper.polymorphic_on).key)
        model = mapper.polymorphic_map[identity].class_ if identity in mapper.polymorphic_map else model
        values = {name: value for name, value in values.items() if hasattr(model, name)}
    try:
        return model(**values)
    except TypeError as error:  # its constructor asks for what no record has
        raise InvalidValueError("model", model.__name__, str(error)) from error
