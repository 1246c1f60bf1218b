"""All engines of a test process share the statements that SQLAlchemy and mljobs have compiled.

An application has one engine or two, and compiles each statement once in its life. Tests make some ten thousand engines, and
compiling for each of them would take half of their time. Engines share when their dialects have the same settings: the
driver, the server's version, the default schema, the serializers.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg, PGDialectAsync_psycopg
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.util import LRUCache

from mljobs.db._prepared import Prepared

_SIZE = 2000  # statements; a test of classes of its own adds a dozen
_SETTING = (str, int, float, tuple, frozenset, type(None))
_SERIALIZERS = ("_json_serializer", "_json_deserializer")
_OF_CONNECTIONS = ("_on_connect_isolation_level", "_has_events")
_first: dict[object, Dialect] = {}
_statements: LRUCache[Any, Any] = LRUCache(_SIZE)


def _first_alike(dialect: Any) -> Dialect:
    """Return the first dialect with the same settings."""
    found: Dialect | None = vars(dialect).get("first_alike")
    if found is None:
        settings = {
            name: value
            for name, value in vars(dialect).items()
            if name in _SERIALIZERS or (isinstance(value, _SETTING) and name not in _OF_CONNECTIONS)
        }
        found = dialect.first_alike = _first.setdefault((type(dialect), frozenset(settings.items())), dialect)
    return found


def compile_once() -> None:
    """Begin to share."""
    compile_with_cache: Any = ClauseElement._compile_w_cache
    text: Any = Prepared._text

    def shared_compile(self: ClauseElement, dialect: Dialect, *, compiled_cache: Any, **options: Any) -> Any:
        if compiled_cache is not None:
            dialect, compiled_cache = _first_alike(dialect), _statements
        return compile_with_cache(self, dialect, compiled_cache=compiled_cache, **options)

    def shared_text(self: Prepared, dialect: Dialect, schemas: Any) -> Any:
        return text(self, _first_alike(dialect), schemas)

    def without_hstore(_: object, connection: object, name: str) -> None:
        assert name == "hstore", name

    # Each new engine asks, by a join of catalogs that its new session has not read, for a type that no test uses.
    PGDialect_psycopg._type_info_fetch = PGDialectAsync_psycopg._type_info_fetch = without_hstore  # type: ignore[method-assign]
    ClauseElement._compile_w_cache = shared_compile  # type: ignore[method-assign]
    Prepared._text = shared_text  # type: ignore[method-assign]
