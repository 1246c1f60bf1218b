"""Keep the guard of a SQLite table that ``batch_alter_table`` rebuilds.

SQLite cannot alter much in place, so ``batch_alter_table`` makes a new table, copies the rows, drops the old table and
gives the new one its name. The triggers go with the old table, and the view that reads it stands in the way of the new
name; reflection loses the order of an index and the AUTOINCREMENT of the leases, so that a token would come back. Here
they are carried over, as the database has them, by the events that SQLAlchemy fires around Alembic's CREATE and DROP.
Nothing of this works in ``--sql`` mode, where nobody can read the old table.
"""

from __future__ import annotations

import re
from typing import Any

from alembic.ddl.impl import DefaultImpl
from sqlalchemy import Connection, Table, event

from mljobs.guards._companions import companion_names

_TEMPORARY = "_alembic_tmp_"
_TEMPORARY_LENGTH = 50


@event.listens_for(Table, "before_create")
def _number_on(table: Table, connection: Connection | None, _ddl_runner: object = None, **_: object) -> None:
    """Give the new table of a rebuild the AUTOINCREMENT of the old one."""
    if not _is_batch(connection, _ddl_runner) or not table.name.startswith(_TEMPORARY):
        return
    for name, text in definitions(connection, table.schema, "table"):
        if _temporary(name) == table.name and re.search(r"\bAUTOINCREMENT\b", text, re.IGNORECASE):
            table.dialect_options["sqlite"]["autoincrement"] = True


@event.listens_for(Table, "before_drop")
def _carry_over(table: Table, connection: Connection | None, _ddl_runner: object = None, **_: object) -> None:
    """Read what a rebuild is about to lose, and put it back once the new table has the old one's name."""
    if not _is_batch(connection, _ddl_runner):
        return
    assert connection is not None  # noqa: S101 - for the type checker
    temporary = _temporary(table.name)
    if not any(name == temporary for name, _ in definitions(connection, table.schema, "table")):
        return
    ours = set(companion_names(table.name).values())
    triggers = [text for name, text in definitions(connection, table.schema, "trigger") if name in ours]
    copied = {
        str(index.name) for index in table.indexes
    }  # a model, given as copy_from, does not describe the guard's own
    triggers += [text for name, text in definitions(connection, table.schema, "index") if name in ours - copied]
    for index in table.indexes:
        descend(index, dict(definitions(connection, table.schema, "index")).get(str(index.name), ""))
    quote = connection.dialect.identifier_preparer.quote
    prefix = f"{quote(table.schema)}." if table.schema else ""
    counted = (
        connection.exec_driver_sql(f"SELECT seq FROM {prefix}sqlite_sequence WHERE name = ?", (table.name,)).scalar()  # noqa: S608
        if table.dialect_options["sqlite"].get("autoincrement") or _numbers(connection, table)
        else None
    )

    views = _take_views(connection, table, prefix)
    waiting = [temporary]

    def renamed(used: Connection, _cursor: object, statement: str, *_: object) -> None:
        if not waiting or not re.match(rf'ALTER TABLE .*"?{re.escape(temporary)}"? RENAME TO', statement):
            return
        waiting.clear()  # an event cannot be removed while it runs
        for text in (*triggers, *views):
            used.exec_driver_sql(_in_schema(text, prefix))
        if counted is not None:
            used.exec_driver_sql(
                f"UPDATE {prefix}sqlite_sequence SET seq = max(seq, ?) WHERE name = ?",  # noqa: S608
                (counted, table.name),
            )
            if not used.exec_driver_sql("SELECT changes()").scalar():  # no row was copied, so none is there yet
                used.exec_driver_sql(
                    f"INSERT INTO {prefix}sqlite_sequence (name, seq) VALUES (?, ?)",  # noqa: S608
                    (table.name, counted),
                )

    event.listen(connection, "after_cursor_execute", renamed)


def _take_views(connection: Connection, table: Table, prefix: str) -> list[str]:
    """Drop the overviews that read a table, which would stand in the way of the new one's name; return their text."""
    from mljobs.schema._catalog import overviews_of  # noqa: PLC0415 - when this is loaded, Alembic is not whole yet

    texts = dict(definitions(connection, table.schema, "view"))
    taken = [found.name for found in overviews_of(connection, table.schema) if table.name in found.reads]
    for view in taken:
        connection.exec_driver_sql(f"DROP VIEW {prefix}{connection.dialect.identifier_preparer.quote(view)}")
    return [texts[view] for view in taken]


def _is_batch(connection: Connection | None, runner: object) -> bool:
    return (
        isinstance(connection, Connection) and connection.dialect.name == "sqlite" and isinstance(runner, DefaultImpl)
    )


def _temporary(name: str) -> str:
    return f"{_TEMPORARY}{name}"[:_TEMPORARY_LENGTH]


def definitions(connection: Any, schema: str | None, kind: str) -> list[tuple[str, str]]:
    """Return the name and text of everything of a kind in a SQLite schema."""
    prefix = f"{connection.dialect.identifier_preparer.quote(schema)}." if schema else ""
    statement = f"SELECT name, sql FROM {prefix}sqlite_master WHERE type = ? AND sql IS NOT NULL"  # noqa: S608
    return [(name, text) for name, text in connection.exec_driver_sql(statement, (kind,))]


def _numbers(connection: Connection, table: Table) -> bool:
    text = dict(definitions(connection, table.schema, "table")).get(table.name, "")
    return re.search(r"\bAUTOINCREMENT\b", text, re.IGNORECASE) is not None


def _in_schema(text: str, prefix: str) -> str:
    """SQLite keeps the text of a trigger, a view or an index without its schema."""
    return re.sub(r"^CREATE (?:TRIGGER|VIEW|INDEX) ", lambda start: start[0] + prefix, text) if prefix else text


def descend(index: Any, text: str) -> None:
    """Give a reflected index the DESC that reflection does not see."""
    descending = {first or second for first, second in re.findall(r'(?:"([^"]+)"|(\w+)) DESC', text, re.IGNORECASE)}
    index.expressions = [
        expression.desc() if getattr(expression, "name", None) in descending else expression
        for expression in index.expressions
    ]
