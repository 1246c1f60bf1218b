"""Statements that are compiled once and sent often; SQLAlchemy's types still convert parameters and rows.

``Connection.execute`` takes as long around a small statement as PostgreSQL takes for it. Operations that run a thousand
times a second use this module instead: SQLAlchemy compiles the text once for each dialect, and the driver's cursor sends
it. Where the host has listeners for statements, ``exec_driver_sql`` sends it, so that they are called. Pools and the
translation of errors work as with ``Connection.execute``.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy.util import await_only

from mljobs.db._answers import Answer, Row, RowsAnswer, UnreadAnswer

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Dialect
    from sqlalchemy.sql.expression import Executable

_Process = Callable[[Any], Any]
_Schemas = Mapping[str | None, str | None]

_TENANTS = 100  # for so many schema maps each statement keeps its text
HOLE = "{number}"
"""What stands in the text of a statement where ``Prepared.filled`` writes a number."""
_FEW = 8  # values of so few rows are made at once: to keep them unread costs as much


class _Compiled:
    """The text of one statement for one dialect, and what its types do to values on the way in and out."""

    def __init__(self, statement: Executable, dialect: Dialect, schemas: _Schemas | None = None) -> None:
        options = {"schema_translate_map": schemas, "render_schema_translate": True} if schemas else {}
        compiled: Any = statement.compile(dialect=dialect, **options)  # type: ignore[attr-defined]
        self.text: str = compiled.string
        # Values the statement itself carries: limits, tokens, flags.
        self.fixed: dict[str, Any] = {
            name: bind.effective_value for bind, name in compiled.bind_names.items() if not bind.required
        }
        self.names: Sequence[str] = tuple(compiled.positiontup or ())
        self.positional: bool = compiled.positional
        self.numbered: str | None = None
        if dialect.driver == "psycopg":
            self.numbered, self.names = _numbered(self.text)
        bind: dict[str, _Process] = {}
        for parameter, name in compiled.bind_names.items():
            process = parameter.type.dialect_impl(dialect).bind_processor(dialect)
            if process is not None:
                bind[name] = process
        self._types = [column.type.dialect_impl(dialect) for column in getattr(statement, "exported_columns", ())]
        self._dialect = dialect
        self._result: dict[int, _Process] | None = None
        self.returns_rows = bool(self._types)
        self.described = not self.returns_rows
        for name in self.fixed:
            if name in bind:
                self.fixed[name] = bind.pop(name)(self.fixed[name])
        self.bind = tuple(bind.items())

    def parameters(self, given: Mapping[str, Any]) -> Any:
        values = {**self.fixed, **given}
        for name, process in self.bind:
            value = values[name]
            if value is not None:  # NULL, of whatever type
                values[name] = process(value)
        return self.in_order(values) if self.positional else values

    def filled(self, number: int) -> _Compiled:
        """Return the same with a number in the hole of the text."""
        made = copy(self)
        made.text = self.text.replace(HOLE, str(number))
        made.numbered = None if self.numbered is None else self.numbered.replace(HOLE, str(number))
        return made

    def in_order(self, values: Mapping[str, Any]) -> Sequence[Any]:
        """Return the values in the order of the placeholders."""
        return list(map(values.__getitem__, self.names))

    def describe(self, cursor: Any) -> None:
        """Choose the result processor of each column, for which SQLAlchemy asks the type code that the driver reports."""
        codes = [column[1] for column in cursor.description]
        processes = [of.result_processor(self._dialect, code) for of, code in zip(self._types, codes, strict=True)]
        self._result = {at: process for at, process in enumerate(processes) if process is not None}
        self.described = True

    def row(self, raw: Sequence[Any]) -> Row:
        """Return the Python values of a row of a cursor that was described."""
        values = list(raw)
        for at, process in (self._result or {}).items():
            value = values[at]
            if value is not None:
                values[at] = process(value)
        return values

    def process_of(self, at: int) -> _Process | None:
        """Return what makes Python values of what the driver gives for one column; None where nothing is to be done."""
        return (self._result or {}).get(at)


def _numbered(text: str) -> tuple[str, Sequence[str]]:
    """Return the text with PostgreSQL's own placeholders, ``$1``, and the name of each.

    psycopg would look for placeholders in the text, and in one of more than 4096 characters each time.
    """
    names: dict[str, int] = {}

    def placeholder(found: re.Match[str]) -> str:
        name = found[1]
        return "%" if name is None else f"${names.setdefault(name, len(names) + 1)}"

    return re.sub(r"%(?:\((\w+)\)s|%)", placeholder, text), tuple(names)


class Prepared:
    """A statement to be run often.

    Args:
        build: Returns the Core statement for a dialect's name. Every parameter is a ``bindparam`` with a type; there are
            no expanding parameters (use arrays or ``json_each``).
    """

    def __init__(self, build: Callable[[str], Executable]) -> None:
        self._build = build
        self._statements: dict[str, Executable] = {}
        self._compiled: WeakKeyDictionary[Dialect, dict[Any, _Compiled]] = WeakKeyDictionary()
        self._latest: tuple[Dialect, _Compiled] | None = None

    def rows(self, connection: Connection, parameters: Mapping[str, Any]) -> list[Row]:
        """Run the statement; return its rows as Python values.

        Args:
            connection: Where to run it.
            parameters: By name; names that the statement does not use are ignored.
        """
        return self.answer(connection, parameters, late=False).rows()

    def answer(self, connection: Connection, parameters: Mapping[str, Any], *, late: bool = True) -> Answer:
        """Run the statement; return its rows, whose Python values are made when they are asked for.

        Args:
            connection: Where to run it.
            parameters: By name; names that the statement does not use are ignored.
            late: Whether psycopg, too, is to make the values of many rows when they are asked for.
        """
        schemas = connection.get_execution_options().get("schema_translate_map")
        latest = self._latest
        if latest is not None and latest[0] is connection.dialect and not schemas:
            compiled = latest[1]
        else:
            compiled = self._text(connection.dialect, schemas or {})
        values = compiled.parameters(parameters)
        if has_no_listeners(connection):
            return _by_cursor(connection, compiled, values, late=late)
        result = connection.exec_driver_sql(compiled.text, tuple(values) if compiled.positional else values)
        if not compiled.described:
            compiled.describe(result.cursor)
        return RowsAnswer(result.fetchall() if result.returns_rows else (), compiled)

    def _text(self, dialect: Dialect, schemas: _Schemas) -> _Compiled:
        """Return the text for a dialect, and for the schemas of a tenant."""
        texts = self._compiled.get(dialect)
        if texts is None:
            texts = self._compiled[dialect] = {}
        key = frozenset(schemas.items()) if schemas else None
        compiled = texts.get(key)
        if compiled is None:
            if len(texts) > _TENANTS:
                texts.clear()
            compiled = texts[key] = self._compile(dialect, schemas)
        if key is None:
            self._latest = (dialect, compiled)
        return compiled

    def _compile(self, dialect: Dialect, schemas: _Schemas) -> _Compiled:
        statement = self._statements.get(dialect.name)
        if statement is None:
            statement = self._statements[dialect.name] = self._build(dialect.name)
        return _Compiled(statement, dialect, schemas)

    def filled(self, number: int) -> Prepared:
        """Return the same statement with a number in its ``HOLE``: it is compiled once, which takes milliseconds."""
        return _Filled(self._build, self, number)


class _Filled(Prepared):
    def __init__(self, build: Callable[[str], Executable], template: Prepared, number: int) -> None:
        super().__init__(build)
        self._template = template
        self._number = number

    def _compile(self, dialect: Dialect, schemas: _Schemas) -> _Compiled:
        return self._template._text(dialect, schemas).filled(self._number)  # noqa: SLF001 - of this class


def has_no_listeners(connection: Any) -> bool:
    """Whether the driver's cursor may send a statement: no listener for statements, and a transaction that is active.

    SQLAlchemy makes an object of each column of each result, which takes longer than many of our statements. It sends the
    statement where there are listeners (an instrumentation, ``echo``), where a transaction has to begin first, and where
    the connection is closed or its transaction has failed.
    """
    transaction = connection._nested_transaction or connection._transaction  # noqa: SLF001 - asked for each statement
    if transaction is None or not transaction.is_active:
        return False
    dialect = connection.dialect
    return dialect.driver in _DRIVERS and not (
        connection._has_events  # noqa: SLF001 - there is no public way
        or connection.engine._has_events  # noqa: SLF001
        or connection._echo  # noqa: SLF001
        or dialect.dispatch.do_execute
    )


_DRIVERS = frozenset({"psycopg", "pysqlite", "asyncpg"})


def _by_cursor(connection: Any, compiled: _Compiled, values: Any, *, late: bool) -> Answer:
    """Send the statement by the driver's cursor.

    Args:
        connection: Where to run it.
        compiled: Its text and types.
        values: Its parameters.
        late: Whether the values of many rows are made only when they are asked for.
    """
    cursor = None
    try:
        if compiled.numbered is None and not connection.dialect.is_async:
            try:
                cursor = connection.connection.dbapi_connection.execute(compiled.text, values)
            except sqlite3.OperationalError as error:
                cursor = _in_turns(connection, compiled, values, error)
            rows = cursor.fetchall() if compiled.returns_rows else ()
        elif compiled.numbered is None:
            cursor = connection.connection.cursor()
            cursor.execute(compiled.text, values)
            rows = cursor.fetchall() if compiled.returns_rows else ()
        elif connection.dialect.is_async:
            cursor, rows = await_only(_by_async_psycopg(connection, compiled, values, late=late))
        else:
            cursor = connection.dialect.dbapi.RawCursor(connection.connection.dbapi_connection)
            cursor.execute(compiled.numbered, compiled.in_order(values))
            rows = cursor.fetchall() if compiled.returns_rows and not (late and cursor.rowcount > _FEW) else None
        if not compiled.described:
            compiled.describe(cursor)
    except BaseException as error:
        connection._handle_dbapi_exception(error, compiled.text, values, cursor, None)  # noqa: SLF001 - there is no public way
        raise
    if rows is None and compiled.returns_rows:
        return UnreadAnswer(cursor.connection, cursor.pgresult, compiled)
    return RowsAnswer(rows, compiled) if rows else _NO_ROWS


_NO_ROWS = RowsAnswer(())


async def _by_async_psycopg(
    connection: Any, compiled: _Compiled, values: Any, *, late: bool
) -> tuple[Any, Sequence[Sequence[Any]] | None]:
    """Send and fetch in one coroutine: each that a greenlet awaits costs two switches."""
    cursor = connection.dialect.dbapi.AsyncRawCursor(connection.connection.driver_connection)
    await cursor.execute(compiled.numbered, compiled.in_order(values))
    return cursor, await cursor.fetchall() if compiled.returns_rows and not (late and cursor.rowcount > _FEW) else None


LOCK_TURNS = "mljobs.lock_turns"
"""In ``Connection.info``: how many times a statement is sent again that met SQLite's lock."""


def _in_turns(connection: Any, compiled: _Compiled, values: Any, error: sqlite3.OperationalError) -> Any:
    """Send a statement again while somebody else holds SQLite's write lock; return the cursor.

    Nothing is asked of the pool, and no error made for SQLAlchemy: many processes may be waiting, and the one that they wait
    for needs the processor.
    """
    for _ in range(connection.info.get(LOCK_TURNS, 0)):
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:  # with a snapshot that is too old no wait helps
            break
        try:
            return connection.connection.dbapi_connection.execute(compiled.text, values)
        except sqlite3.OperationalError as again:
            error = again
    raise error
