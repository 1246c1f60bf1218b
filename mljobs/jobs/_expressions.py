"""Expressions that the two databases write differently: text like a pattern, and values at a path of JSON."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final, Literal, Self

from sqlalchemy import Double, Numeric, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import Boolean, TypeDecorator, TypeEngine

_MAX_SQLITE_INT: Final = 2**63 - 1
_NESTED: Final = 4


class Number(TypeDecorator[Any]):
    """A number compared with one in JSON: exact on PostgreSQL, as the driver takes it on SQLite."""

    impl = Double
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(Numeric() if dialect.name == "postgresql" else Double())

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        if dialect.name == "postgresql":
            return lambda value: Decimal(repr(value))
        return lambda value: float(value) if isinstance(value, int) and abs(value) > _MAX_SQLITE_INT else value


class Glob(FunctionElement[bool]):
    """Text like a pattern, case and all: ``LIKE`` on PostgreSQL, ``GLOB`` on SQLite, whose LIKE ignores case."""

    type = Boolean()
    inherit_cache = True
    name: Literal["glob"] = "glob"

    def self_group(self, against: object = None) -> Self:  # noqa: ARG002 - SQLAlchemy's signature
        """Return the comparison as it is: with the ``= 1`` that SQLAlchemy would add, SQLite's index serves it not."""
        return self


@compiles(Glob)
def _glob_text(element: Glob, compiler: SQLCompiler, **kw: Any) -> str:
    column, _, pattern = element.clauses
    return f"{compiler.process(column, **kw)} GLOB {compiler.process(pattern, **kw)}"


@compiles(Glob, "postgresql")
def _like_text(element: Glob, compiler: SQLCompiler, **kw: Any) -> str:
    column, pattern, _ = element.clauses
    return f"{compiler.process(column, **kw)} LIKE {compiler.process(pattern, **kw)} ESCAPE '/'"


class JsonNumber(FunctionElement[Any]):
    """The number at a path of a JSON column, exactly; NULL where there is none."""

    type: TypeEngine[Any] = Numeric()
    inherit_cache = True
    name: Literal["json_number_at"] = "json_number_at"


class JsonText(FunctionElement[str]):
    """The string at a path of a JSON column; NULL where there is none."""

    type = Text()
    inherit_cache = True
    name: Literal["json_text_at"] = "json_text_at"


class JsonWord(FunctionElement[str]):
    """``true``, ``false`` or ``null`` where the path of a JSON column leads to one, another word for what else is there."""

    type = Text()
    inherit_cache = True
    name: Literal["json_word_at"] = "json_word_at"


def _at(element: FunctionElement[Any], compiler: SQLCompiler, wanted: str, **kw: Any) -> str:
    """Return the subquery of SQLite that walks down the keys; of a key that stands there twice the last one counts."""
    column, _, *keys = element.clauses
    inner = compiler.process(column, **kw)
    steps = []
    for number, key in enumerate(keys, 1):
        last = number == len(keys)
        value = wanted if last else "value"
        inside = "" if last else " AND type IN ('object', 'array')"
        inner = (
            f"(SELECT {value} FROM json_each({inner}) WHERE CAST(key AS TEXT) = {compiler.process(key, **kw)}"  # noqa: S608 - compiled parts
            f"{inside} ORDER BY id DESC LIMIT 1)"
        )
        if not last and len(keys) > _NESTED:  # by name: SQLite's parser has room for ten within another
            steps.append(f"k{number}(value) AS {inner}")
            inner = f"(SELECT value FROM k{number})"  # noqa: S608 - a number
    return f"(WITH {', '.join(steps)} SELECT * FROM {inner})" if steps else inner  # noqa: S608 - compiled parts


@compiles(JsonNumber)
def _number_of_text(element: JsonNumber, compiler: SQLCompiler, **kw: Any) -> str:
    return _at(element, compiler, "CASE WHEN type IN ('integer', 'real') THEN value END", **kw)


@compiles(JsonText)
def _text_of_text(element: JsonText, compiler: SQLCompiler, **kw: Any) -> str:
    return _at(element, compiler, "CASE WHEN type = 'text' THEN value END", **kw)


@compiles(JsonWord)
def _word_of_text(element: JsonWord, compiler: SQLCompiler, **kw: Any) -> str:
    return _at(element, compiler, "type", **kw)


def _at_path(element: FunctionElement[Any], compiler: SQLCompiler, wanted: str, **kw: Any) -> str:
    """Return PostgreSQL's expression, in which ``{kind}`` is what is at the path, and ``{text}`` its text."""
    column, path, *_ = element.clauses
    json, keys = compiler.process(column, **kw), f"CAST({compiler.process(path, **kw)} AS text[])"
    kind, text = f"json_typeof({json} #> {keys})", f"{json} #>> {keys}"
    return wanted.replace("{kind}", kind).replace("{text}", text)


@compiles(JsonNumber, "postgresql")
def _number_of_json(element: JsonNumber, compiler: SQLCompiler, **kw: Any) -> str:
    # A number that numeric cannot hold would end the whole query: it counts as none.
    fits = "{kind} = 'number' AND length({text}) < 1000 AND {text} !~ '[eE][-+]?[0-9]{4}'"
    return _at_path(element, compiler, f"CASE WHEN {fits} THEN CAST({{text}} AS numeric) END", **kw)


@compiles(JsonText, "postgresql")
def _text_of_json(element: JsonText, compiler: SQLCompiler, **kw: Any) -> str:
    return _at_path(element, compiler, "CASE WHEN {kind} = 'string' THEN {text} END", **kw)


@compiles(JsonWord, "postgresql")
def _word_of_json(element: JsonWord, compiler: SQLCompiler, **kw: Any) -> str:
    return _at_path(element, compiler, "CASE {kind} WHEN 'boolean' THEN {text} ELSE {kind} END", **kw)
