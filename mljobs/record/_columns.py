"""The columns of a record, made from the table of its fields."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import MappedColumn, mapped_column

from mljobs._fields import BY_NAME, FIELDS, NAMES, Field
from mljobs.errors import InvalidValueError
from mljobs.record._declaring import KIND_LENGTH, check_kinds
from mljobs.states import MlJobKind, MlJobStatus
from mljobs.types import JobId, JsonText, PlainText, TokenType, UtcMillis

STATUS_LENGTH = 16


def type_of(field: Field) -> Any:
    """Return the type of a field's column; of ``kind`` with our own kinds."""
    if field.form == "token":
        own_kinds = field.name == "kind"
        return TokenType(
            MlJobKind if own_kinds else MlJobStatus, KIND_LENGTH if own_kinds else STATUS_LENGTH, field.name
        )
    if field.form in _NAMING_TYPES:
        return _NAMING_TYPES[field.form](field.name)
    return _TYPES[field.form]()


_NAMING_TYPES: dict[str, Any] = {"text": PlainText, "json": JsonText, "time": UtcMillis}
_TYPES: dict[str, Any] = {"id": JobId, "small": sa.SmallInteger, "big": sa.BigInteger, "flag": sa.Boolean}

TYPES = {field.name: type_of(field) for field in FIELDS}
"""The type of each column."""


def column(name: str) -> Any:
    """Return the column of a field, for the mixin."""
    field = BY_NAME[name]
    options = _options(field)
    # A record has a spec from its construction; a row that others insert must say it.
    if name != "spec_json" and (field.factory or field.default is not None):
        options["default"] = field.factory or field.default
    return mapped_column(TYPES[name], **options)


def dataclass_column(name: str) -> Any:
    """Return the column of a field, for the mixin of dataclasses: these have their defaults at construction."""
    field = BY_NAME[name]
    options = _options(field)
    if field.factory is not None:
        options |= {"default_factory": field.factory, "insert_default": field.factory}
    elif not field.required:
        options["default"] = field.default
    return mapped_column(TYPES[name], **options)


def _options(field: Field) -> dict[str, Any]:
    options: dict[str, Any] = {"nullable": field.nullable, "sort_order": NAMES.index(field.name) - len(NAMES)}
    if field.name == "id":
        options["primary_key"] = True
    if field.name == "status":
        # The hook compares old with new; without this the old value is unknown once a commit has expired it.
        options["active_history"] = True
    if field.server_default is not None:
        options["server_default"] = sa.text(field.server_default)
    return options


def kind_column(enum: type[StrEnum], *, built_in: bool = False, **kw: Any) -> MappedColumn[Any]:
    """Return the ``kind`` column for a host with kinds of its own.

    Args:
        enum: A ``StrEnum`` of the kinds; each value is a token of 1 to 32 characters.
        built_in: Whether ``train``, ``backfill`` and the other built-in kinds are kinds too, which need not be repeated. The
            members of ``__kinds__`` are then of an enum of both, and equal to those of ``enum`` and of ``MlJobKind``.
        **kw: Passed on to ``mapped_column``; where ``sort_order`` is not among them, the column stands second as in ours.

    Raises:
        InvalidValueError: ``enum`` is none such.

    Example:
        ``kind: Mapped[MyKind] = kind_column(MyKind)``
    """
    if built_in:
        enum = _with_built_in(check_kinds(enum))
    kw.setdefault("sort_order", NAMES.index("kind") - len(NAMES))
    return mapped_column(TokenType(check_kinds(enum), KIND_LENGTH, "kind"), nullable=False, **kw)


def _with_built_in(enum: type[StrEnum]) -> type[StrEnum]:
    """Return an enum of the built-in kinds and those of ``enum``, under its name."""
    own = {name: member.value for name, member in enum.__members__.items()}
    kinds = {kind.name: kind.value for kind in MlJobKind if kind.value not in own.values()}
    clash = next((name for name in own if name in kinds), None)
    if clash is not None:
        raise InvalidValueError(
            "kind", clash, f"it is the name of the built-in kind {kinds[clash]!r}, not {own[clash]!r}"
        )
    functional: Any = StrEnum  # the name is known when it runs
    made: type[StrEnum] = functional(enum.__name__, {**kinds, **own})
    made.__module__, made.__qualname__ = enum.__module__, enum.__qualname__
    return made
