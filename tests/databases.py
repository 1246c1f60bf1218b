"""PostgreSQL databases for the tests: each test is given a fresh one, and most of them are used again.

Creating and dropping a database costs a tenth of a second of processor time or more, emptying one a thousandth, for the
connection that does it is kept: a new one, whose caches are empty, costs ten times as much. A database is used again, under
another name, if the test left its catalogs as they were; any other is dropped. Whether it did is seen by the server's own
counters, if nothing was written there, else by reading all catalogs, which costs more than all the rest.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from time import sleep  # a test may replace time.sleep
from typing import Any

import psycopg
from psycopg.sql import SQL, Identifier
from sqlalchemy import URL, make_url

Connection = psycopg.Connection[tuple[Any, ...]]

_MAX_BYTES = 1_000_000
"""A database with larger tables is not used again: what a test left there would slow down the later ones."""

_END_OTHER_SESSIONS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> %s
"""
_RENAME = "UPDATE pg_database SET datname = %s WHERE datname = %s"  # ALTER DATABASE wants that nobody is connected
_PAUSE = 0.002
_COUNTS_AT_ONCE = 150_000
"""The version since which a server has counted what a session wrote when the session is gone."""
_WRITES_AND_BYTES = """
SELECT sum(pg_stat_get_tuples_inserted(oid) + pg_stat_get_tuples_updated(oid) + pg_stat_get_tuples_deleted(oid))
           FILTER (WHERE oid < 16384)::bigint,
       coalesce(sum(pg_relation_size(oid)) FILTER (WHERE oid >= 16384), 0)
FROM pg_class WHERE oid >= 16384 OR relkind = 'r' AND NOT relisshared
"""
_CATALOGS = """
SELECT string_agg(format('SELECT count(*), max(xmin::text::bigint) FROM pg_catalog.%I', relname), ' UNION ALL '
                  ORDER BY relname)
FROM pg_class WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind = 'r' AND NOT relisshared
"""
_SETTINGS = """
SELECT datdba, datacl::text, datconnlimit,
       (SELECT count(*) FROM pg_db_role_setting WHERE setdatabase = pg_database.oid),
       (SELECT count(*) FROM pg_prepared_xacts WHERE database = datname)
FROM pg_database WHERE datname = %s
"""
_LAST_OID = """
SELECT max(greatest(16383, last)) FROM (
    SELECT max(oid) FROM pg_class UNION ALL SELECT max(oid) FROM pg_proc UNION ALL SELECT max(oid) FROM pg_type
) AS of_each (last)
"""
_DROP_WHAT_IS_NEWER = """
SELECT format('DROP SCHEMA IF EXISTS %I CASCADE', nspname) FROM pg_namespace WHERE oid > {oid} AND nspname !~ '^pg_'
UNION ALL
SELECT format('DROP %s IF EXISTS %s CASCADE', CASE relkind WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END, oid::regclass)
FROM pg_class WHERE oid > {oid} AND relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v')
UNION ALL
SELECT format('DROP ROUTINE IF EXISTS %s CASCADE', oid::regprocedure)
FROM pg_proc WHERE oid > {oid} AND pronamespace = 'public'::regnamespace
UNION ALL
SELECT format('DROP TYPE IF EXISTS %s CASCADE', oid::regtype)
FROM pg_type WHERE oid > {oid} AND typnamespace = 'public'::regnamespace AND typtype IN ('e', 'd')
"""
_EMPTY = """
SELECT coalesce(string_agg(CASE relkind
    WHEN 'r' THEN format('DELETE FROM %s', oid::regclass)
    ELSE format('SELECT setval(%L, 1, false)', oid::regclass) END, '; '), '')
FROM pg_class WHERE oid >= 16384 AND relkind IN ('r', 'S')
"""


class Databases:
    """Databases of one kind on one server: copies of a template.

    Args:
        url: A superuser's URL of the server.
        kind: A part of their names.
        fill: What is made in the template.
    """

    def __init__(self, url: str, kind: str, fill: Callable[[URL], object] | None = None) -> None:
        self._url = make_url(url)
        self._admin = self._connect(self._url.database)
        self._prefix = f"mljobs_{os.environ.get('PYTEST_XDIST_WORKER', 'main')}_{kind}"
        self._numbers = count()
        self._idle: deque[str] = deque()
        self._writes: dict[str, int] = {}
        self._kept: dict[str, Connection] = {}
        self._create(self._prefix)
        if fill is not None:
            fill(self._url.set(database=self._prefix))
        with self._connect(self._prefix) as connection:
            ((self._last_oid,),) = connection.execute(_LAST_OID).fetchall()
            ((self._catalogs,),) = connection.execute(_CATALOGS).fetchall()
            ((self._empty,),) = connection.execute(_EMPTY).fetchall()
            self._untouched = connection.execute(self._catalogs).fetchall()
        self._settings = self._admin.execute(_SETTINGS, [self._prefix]).fetchall()

    @contextmanager
    def fresh(self, *, alone: bool = False) -> Iterator[str]:
        """Lend a database; yield its SQLAlchemy URL.

        Args:
            alone: Whether nobody is connected to it, as it is with one that was never used.
        """
        name = f"{self._prefix}_{next(self._numbers)}"
        if self._idle and not alone:
            idle = self._idle.popleft()
            self._admin.execute(_RENAME, [name, idle])
            self._writes[name] = self._writes.pop(idle, 0)
            self._kept[name] = self._kept.pop(idle)
        else:
            self._create(name, template=self._prefix)
        yield self._url.set(database=name).render_as_string(hide_password=False)
        if self._emptied(name):
            self._idle.append(name)
        else:
            self._writes.pop(name, None)
            if kept := self._kept.pop(name, None):
                kept.close()
            self._drop(name)

    def close(self) -> None:
        """Drop all that are left."""
        for kept in self._kept.values():
            kept.close()
        for name in (*self._idle, self._prefix):
            self._drop(name)
        self._admin.close()

    def _emptied(self, name: str) -> bool:
        """Empty a database; return whether it is now as the template is."""
        kept = self._kept.get(name)
        while self._admin.execute(_END_OTHER_SESSIONS, [name, kept.info.backend_pid if kept else 0]).fetchall():
            sleep(_PAUSE)
        if self._admin.execute(_SETTINGS, [name]).fetchall() != self._settings:
            return False
        connection = self._keep(name)
        ((writes, size),) = connection.execute(_WRITES_AND_BYTES).fetchall()
        if size > _MAX_BYTES:
            return False
        if writes != self._writes.get(name, 0) or connection.info.server_version < _COUNTS_AT_ONCE:
            for (statement,) in connection.execute(_DROP_WHAT_IS_NEWER.format(oid=self._last_oid)).fetchall():
                connection.execute(statement)
            if connection.execute(self._catalogs).fetchall() != self._untouched:
                return False
            if connection.info.server_version >= _COUNTS_AT_ONCE:
                connection.execute("SELECT pg_stat_force_next_flush()")  # of what was dropped
            ((self._writes[name], _),) = connection.execute(_WRITES_AND_BYTES).fetchall()
        connection.execute(self._empty)
        return True

    def _keep(self, name: str) -> Connection:
        """Return the connection that is kept to a database; a new one if a test has ended it."""
        if kept := self._kept.get(name):
            with suppress(psycopg.OperationalError):
                kept.execute("SELECT")
                return kept
        made = self._kept[name] = self._connect(name)
        made.prepare_threshold = None
        made.execute("SET session_replication_role = replica; SET client_min_messages = warning")
        return made

    def _create(self, name: str, *, template: str = "template1") -> None:
        self._drop(name)
        # Copying files costs half of what writing every block to the log does, the default from version 15 on.
        strategy = SQL(" STRATEGY file_copy") if self._admin.info.server_version >= 150_000 else SQL("")
        self._admin.execute(
            SQL("CREATE DATABASE {} TEMPLATE {}").format(Identifier(name), Identifier(template)) + strategy
        )

    def _drop(self, name: str) -> None:
        self._admin.execute(SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(Identifier(name)))

    def _connect(self, database: str) -> Connection:
        url = self._url.set(drivername="postgresql", database=database)
        return psycopg.connect(url.render_as_string(hide_password=False), autocommit=True)
