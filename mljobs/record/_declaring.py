"""Checks of a class with ``MlJobMixin``, made when the class is defined and not by the first query that fails."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from enum import StrEnum
from inspect import get_annotations
from typing import Any

from sqlalchemy import Column, Table, UniqueConstraint
from sqlalchemy.dialects import sqlite
from sqlalchemy.orm import MappedAsDataclass, MappedColumn, Mapper
from sqlalchemy.schema import CreateIndex

from mljobs._fields import NAMES
from mljobs._values import storable_text
from mljobs.errors import InvalidValueError, ModelError
from mljobs.guards._unique import finished_key
from mljobs.types import TokenType

KIND_LENGTH = 32
"""The most characters of a kind's token."""

_RESERVED = (
    *("spec", "metrics", "is_terminal", "created_at_ms", "started_at_ms", "finished_at_ms", "duration_ms", "kv_key"),
    *("start", "complete", "fail", "cancel", "requeue", "to_json", "from_json"),
)
"""What the record knows and does. An attribute of these names that is mapped would hide it."""

_PYDANTIC = ("pydantic", "sqlmodel")
_NO_PYDANTIC = (
    "Pydantic would have to know the types of the record: give it a Base of SQLAlchemy's beside your SQLModel classes, "
    "`class Base(DeclarativeBase): metadata = SQLModel.metadata`, and show it by mljobs.contrib.pydantic.MlJobRead"
)

_ANY_KIND = ("Any", "str", "StrEnum")


def check_kinds(enum: Any) -> type[StrEnum]:
    """Return ``enum`` if its tokens fit the column ``kind``.

    Raises:
        InvalidValueError: Not a ``StrEnum`` with members, or a token of none or more than 32 characters.
    """
    if not (isinstance(enum, type) and issubclass(enum, StrEnum)) or not len(enum):
        raise InvalidValueError("kind", enum, "expected a StrEnum with a member for each kind of job")
    for member in enum:
        if not 0 < len(storable_text("kind", member.value)) <= KIND_LENGTH:
            raise InvalidValueError(
                "kind", member.value, f"a token of {enum.__name__} has 1 to {KIND_LENGTH} characters"
            )
    return enum


def check_dataclass(cls: type[Any]) -> None:
    """Check that a dataclass has the mixin for dataclasses.

    Raises:
        ModelError: It has the other one.
    """
    if (issubclass(cls, MappedAsDataclass) or is_dataclass(cls)) and not getattr(cls, "__record_is_dataclass__", False):
        raise ModelError(cls, "it is a dataclass: inherit from MlJobDataclassMixin in the place of MlJobMixin")


def check_body(cls: type[Any]) -> None:
    """Check what can be seen before SQLAlchemy maps the class.

    Raises:
        ModelError: It cannot hold a record.
    """
    if any(base.__module__.partition(".")[0] in _PYDANTIC for base in cls.__mro__):
        raise ModelError(cls, _NO_PYDANTIC)
    check_dataclass(cls)
    table = cls.__dict__.get("__table__")
    if isinstance(table, Table):
        missing = [name for name in NAMES if name not in table.c]
        if missing:
            raise ModelError(
                cls,
                f"its __table__ has no column {missing[0]}: give a __tablename__ instead, and the mixin makes the columns",
            )
    _check_validators(cls)
    parents = [parent for parent in cls.__mro__[1:] if isinstance(parent.__dict__.get("__table__"), Table)]
    options = cls.__dict__.get("__mapper_args__")
    if (
        parents
        and isinstance(options, Mapping)
        and options.get("concrete")
        and table is None
        and "id" not in cls.__dict__
    ):
        raise ModelError(
            cls,
            f"as a concrete subclass it takes no columns from {parents[0].__name__}: define class "
            f"{cls.__name__}(MlJobMixin, YourBase), or put what both share into an __abstract__ class",
        )
    if not parents or not getattr(parents[0], "__table_is_migrated_by_mljobs__", False):
        return
    own = [name for name, value in cls.__dict__.items() if isinstance(value, MappedColumn | Column)]
    own += [name for name in get_annotations(cls) if not name.startswith("__")]
    if own and not {"__tablename__", "__table__"} & set(cls.__dict__):
        raise ModelError(
            cls,
            f"it adds {own[0]} to the table of {parents[0].__name__}, which our migrations make: for columns of your own "
            "define class ...(MlJobMixin, YourBase) with a table of its own",
        )


def _check_validators(cls: type[Any]) -> None:
    """Refuse a second ``@validates`` of a column: SQLAlchemy takes one, and says so only when mappers are configured."""
    for parent in cls.__mro__:
        if parent.__module__.partition(".")[0] == __name__.partition(".")[0]:
            continue
        for name, value in vars(parent).items():
            ours = [column for column in getattr(value, "__sa_validators__", ()) if column in NAMES]
            if ours:
                raise ModelError(
                    cls,
                    f"{name} validates {ours[0]}, which the record validates itself, and SQLAlchemy takes one: listen with "
                    f'@event.listens_for({cls.__name__}.{ours[0]}, "set") instead, which comes beside it',
                )


def check_mapping(cls: type[Any], mapper: Mapper[Any], columns: Mapping[str, Any]) -> None:
    """Check what SQLAlchemy has made of a class that owns its table.

    Args:
        cls: The class.
        mapper: Its mapper.
        columns: The types that the columns of the record must have, by name.

    Raises:
        ModelError: It cannot hold a record.
    """
    table: Any = mapper.local_table
    where = f"class {cls.__name__}(MlJobMixin, ...)"
    for name in NAMES:
        column = mapper.columns.get(
            name
        )  # not mapper.attrs, which would configure mappers while classes are still to come
        if column is None or column.table is not table:
            raise ModelError(cls, f"it has no column {name} of its own: put the mixin first, {where}")
        if column.name != name:
            called = f"its column {name} is called {column.name!r}"
            raise ModelError(cls, f"{called}; the operations, triggers and indexes name it, so leave it {name!r}")
        if not isinstance(column.type, type(columns[name])):
            raise ModelError(
                cls,
                f"its column {name} is {column.type!r}, not the mixin's: where a base or another mixin has one of "
                f"this name, put ours first, {where}" + (" and use kind_column(...)" if name == "kind" else ""),
            )
    key = [column.name for column in table.primary_key]
    if key != ["id"]:
        raise ModelError(
            cls,
            f"its primary key is ({', '.join(key)}), but leases refer to id alone: make the others columns and index them",
        )
    check_name(cls, table.name, "__tablename__")
    check_table(cls, table)
    hidden = [name for name in _RESERVED if mapper.has_property(name)]
    if hidden:
        raise ModelError(cls, f"its attribute {hidden[0]} would hide the record's own: give it another name")
    _check_kind(cls, table.c.kind.type)


def check_name(cls: type[Any], name: str, attribute: str) -> None:
    """Check that a table has no name that the statements of the operations give to their parts.

    Args:
        cls: The class.
        name: The table's.
        attribute: What gives it another one.

    Raises:
        ModelError: A statement would read its own part in the place of the table.
    """
    if name.lower() in NAMES_IN_STATEMENTS:
        raise ModelError(cls, f"statements of mljobs call a part of theirs {name}: give the table another {attribute}")


NAMES_IN_STATEMENTS = frozenset({
    "alone", "begun", "chosen", "e", "finished", "found", "held", "j", "l", "later", "leased", "locks", "lost",
    "met", "missed", "number", "o", "picked", "r", "released", "renewed", "sorted_row", "still", "wanted",
    "written"
})  # fmt: skip
"""What the operations call common table expressions, subqueries and aliases, and no host its tables."""


def check_table(cls: type[Any], table: Table) -> None:
    """Check that a job table can be guarded on either database.

    Raises:
        ModelError: A finished record could be replaced or removed without any trigger.
    """
    _check_kept(cls, table)
    for option in ("partition_by", "inherits"):
        if table.dialect_options["postgresql"].get(option):
            raise ModelError(
                cls,
                f"its table says postgresql_{option}: PostgreSQL guards each part by itself, and one that is truncated or "
                "detached loses finished records; archive old ones by an export and prune",
            )
    if table.dialect_options["sqlite"]["with_rowid"]:
        aliases = [column.name for column in table.c if column.name.lower() in _ROWID_NAMES]
        if aliases:
            raise ModelError(
                cls,
                f"its column {aliases[0]} hides SQLite's own rowid, by which rows are replaced: give it another name",
            )
    for part in (*table.columns, *table.constraints):
        for name, action in part.dialect_options["sqlite"].items():
            if name.startswith("on_conflict") and str(action).upper() == "REPLACE":
                raise ModelError(
                    cls,
                    f"{part} says sqlite_{name}={action!r}, which deletes the other record without any trigger: "
                    "write an upsert with ON CONFLICT DO UPDATE where you want one",
                )
    for key, names in _unique_keys(table):
        raise ModelError(
            cls,
            f"its unique key ({', '.join(key)}) names {names[0]}, so INSERT OR REPLACE of SQLite takes a finished one "  # noqa: S608 - a message
            "with the same values away without any trigger; a key of live jobs may be unique: Index(..., unique=True, "
            "postgresql_where=text(\"status IN ('queued', 'running')\"), sqlite_where=the same)",
        )


_NOT_KEPT = {
    "UNLOGGED": "a crash of PostgreSQL's server empties it",
    "TEMP": "it ends with the connection that made it",
}

_ROWID_NAMES = frozenset({"rowid", "oid", "_rowid_"})


def _check_kept(cls: type[Any], table: Table) -> None:
    for prefix in (str(prefix).upper() for prefix in table._prefixes):  # noqa: SLF001 - nothing public tells
        for word, reason in _NOT_KEPT.items():
            if word in prefix:
                raise ModelError(cls, f"its table is {word}: {reason}, finished records included")


def _unique_keys(table: Table) -> Iterator[tuple[list[str], list[str]]]:
    """Yield each UNIQUE that may hold for finished records, and what of the record it names."""
    for constraint in table.constraints:
        if isinstance(constraint, UniqueConstraint):
            key = [column.name for column in constraint.columns]
            names = [name for name in key if name in NAMES]
            if names and "id" not in names:  # beside the id no other row has the same values
                yield key, names
    for index in table.indexes:
        if index.unique:
            names = finished_key(str(CreateIndex(index).compile(dialect=sqlite.dialect())))
            if names:
                yield [column.name for column in index.columns] or names, names


def _check_kind(cls: type[Any], kind: TokenType) -> None:
    annotation = str(get_annotations(cls).get("kind", ""))
    found = re.search(r"\[\s*['\"]?(?:[\w.<> ]*\.)?(\w+)['\"]?\s*\]$", annotation)
    if found and found[1] not in (*_ANY_KIND, kind.enum.__name__):
        raise ModelError(
            cls,
            f"its kinds are those of {kind.enum.__name__}: write kind: Mapped[{found[1]}] = kind_column({found[1]})",
        )


def check_companion_name(cls: type[Any], name: str, jobs: Table, holds: str, attribute: str) -> None:
    """Check that nothing else has the name of a table beside the job table.

    Args:
        cls: The class.
        name: The name.
        jobs: The job table.
        holds: What the table is to hold.
        attribute: What names it otherwise.

    Raises:
        ModelError: Something has; or no table can have it.
    """
    check_name(cls, name, attribute)
    full = f"{jobs.schema}.{name}" if jobs.schema else name
    if full in jobs.metadata.tables:
        raise ModelError(cls, f"another class has table {full}, which is to hold {holds}: set {attribute}")
