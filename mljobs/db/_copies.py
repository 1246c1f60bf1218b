"""Copies of a whole database, for tests that each begin with a fresh one."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.pool import NullPool


@contextmanager
def copy_of(template: str | URL) -> Iterator[str]:
    """Yield the URL of a fresh copy of a database, dropped at the end: of a SQLite file, or by PostgreSQL's TEMPLATE.

    Args:
        template: Its URL. Of PostgreSQL nobody may be connected to it, and its role needs CREATEDB.
    """
    url, name = make_url(template), uuid4().hex[:12]
    if url.get_backend_name() == "sqlite":
        with TemporaryDirectory() as directory:
            path = str(Path(directory) / f"{name}.db")
            with closing(sqlite3.connect(str(url.database))) as old, closing(sqlite3.connect(path)) as new:
                old.backup(new)
            yield url.set(database=path).render_as_string(hide_password=False)
        return
    server = url.set(drivername="postgresql+psycopg", database="postgres")
    admin = create_engine(server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    quote, copy = admin.dialect.identifier_preparer.quote, f"{url.database}_{name}"
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {quote(copy)} TEMPLATE {quote(str(url.database))}"))
        try:
            yield url.set(database=copy).render_as_string(hide_password=False)
        finally:
            connection.execute(text(f"DROP DATABASE {quote(copy)} WITH (FORCE)"))
