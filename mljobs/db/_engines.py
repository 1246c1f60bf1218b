"""Make engines from what users give: a URL, with the drivers and settings that jobs need."""

from __future__ import annotations

import os
import time
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, InvalidRequestError

from mljobs.db._timeouts import obey_timeouts
from mljobs.errors import InvalidValueError

URL_VARIABLE = "MLJOBS_DATABASE_URL"
DEFAULT_URL = "sqlite:///mljobs.db"

_POSTGRES = ("postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg_async", "postgresql+asyncpg")
_SQLITE = ("sqlite", "sqlite+pysqlite", "sqlite+aiosqlite")
_SYNC = dict.fromkeys(_POSTGRES, "postgresql+psycopg") | dict.fromkeys(_SQLITE, "sqlite")
_ASYNC = dict.fromkeys(_POSTGRES, "postgresql+psycopg") | dict.fromkeys(_SQLITE, "sqlite+aiosqlite")
_ASYNC["postgresql+asyncpg"] = "postgresql+asyncpg"
_BUSY_SECONDS = 30.0
_NETWORK: dict[str, int] = {
    "connect_timeout": 10,  # seconds
    "keepalives_idle": 30,  # seconds; the system's own default is two hours
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # milliseconds; Linux only
}
"""How soon libpq notices that a host or a network is gone, unless the URL, or the environment, says otherwise."""
_SAID_ELSEWHERE = {"connect_timeout": "PGCONNECT_TIMEOUT"}
_WAL_PAUSE = 0.02


def url_from_env(url: str | None = None) -> str:
    """Return ``url``, else what ``MLJOBS_DATABASE_URL`` says, else ``sqlite:///mljobs.db``."""
    return url or os.environ.get(URL_VARIABLE) or DEFAULT_URL


def sync_url(url: str | URL) -> URL:
    """Return the URL with a driver for blocking code.

    Raises:
        InvalidValueError: Not a URL, or of a database that mljobs does not know.
    """
    return _with_driver(url, _SYNC)


def async_url(url: str | URL) -> URL:
    """Return the URL with a driver for asyncio.

    Raises:
        InvalidValueError: Not a URL, or of a database that mljobs does not know.
    """
    return _with_driver(url, _ASYNC)


def new_engine(url: str | URL, *, autocommit: bool = False, **options: Any) -> Engine:
    """Return an engine with the settings that jobs need.

    SQLite: WAL, so that readers never wait; foreign keys; a busy timeout of 30 s; see ``guards.enforce_sqlite``.
    PostgreSQL by psycopg: a connection attempt ends after 10 s, and one over a network that is gone is noticed within a
    minute at rest (TCP keepalives) or 30 s at work (``tcp_user_timeout``). Options of the URL, or of ``connect_args``,
    come first: ``postgresql://host/db?connect_timeout=3&tcp_user_timeout=5000``.
    PostgreSQL: behind a pooler psycopg prepares no statements, for the next one may reach another server process.

    Args:
        url: Where the database is.
        autocommit: On PostgreSQL each statement is a transaction of its own, unless an option says otherwise.
        **options: Passed on to ``create_engine``.
    """
    parsed = sync_url(url)
    engine = create_engine(parsed, **engine_options(parsed, options, autocommit=autocommit))
    set_up_connections(engine)
    obey_timeouts(engine)
    return engine


def shown_url(url: URL) -> str:
    """Return what may be printed of a URL: scheme, host and database; user, password and query may be secret."""
    return URL.create(url.drivername, host=url.host, port=url.port, database=url.database).render_as_string()


def is_memory(url: URL) -> bool:
    """Whether this is a SQLite database in memory, which no second connection can see."""
    return url.get_backend_name() == "sqlite" and (
        ":memory:" in (url.database or ":memory:") or url.query.get("mode") == "memory"
    )


def refuse_memory(url: URL) -> None:
    """Refuse what the thread that keeps a lease could not open.

    Raises:
        InvalidValueError: A SQLite database in memory.
    """
    if is_memory(url):
        raise InvalidValueError(
            "url", shown_url(url), "the thread that keeps the lease cannot open a database in memory"
        )


def _with_driver(url: str | URL, drivers: dict[str, str]) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # whose text may show a password
        raise InvalidValueError("url", "...", "not a database URL, such as postgresql://host/database") from None
    driver = drivers.get(parsed.drivername)
    if driver is None:
        known = ", ".join(sorted(drivers))
        raise InvalidValueError("url", shown_url(parsed), f"expected one of {known}")
    return parsed.set(drivername=driver)


def engine_options(url: URL, options: dict[str, Any], *, autocommit: bool) -> dict[str, Any]:
    """Return the options of an engine, with what jobs need where the caller says nothing."""
    if url.get_backend_name() == "sqlite":
        options.setdefault("connect_args", {}).setdefault("timeout", _BUSY_SECONDS)
    else:
        options.setdefault("pool_pre_ping", True)
        if url.get_driver_name().startswith("psycopg"):
            said = options["connect_args"] = dict(options.get("connect_args", {}))
            for name, value in _NETWORK.items():
                if name not in url.query and _SAID_ELSEWHERE.get(name, "") not in os.environ:
                    said.setdefault(name, value)
        if autocommit:
            options.setdefault("isolation_level", "AUTOCOMMIT")
    return options


def at_level(engine: Engine, level: str) -> Engine:
    """Return the engine with another isolation level, and the same options otherwise, a tenant's schemas among them."""
    try:
        return engine.execution_options(isolation_level=level)
    except InvalidRequestError:
        # SQLAlchemy 2.0 cannot set a level on an engine that has options: set all of them on the one underneath.
        root = getattr(engine, "_proxied", None)
        if not isinstance(root, Engine):
            raise
        return root.execution_options(**{**engine.get_execution_options(), "isolation_level": level})


def set_up_connections(engine: Engine) -> None:
    """Set on each connection of an engine what jobs need."""
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_pragmas)
    elif engine.dialect.driver in ("psycopg", "psycopg_async"):
        event.listen(engine, "connect", _prepare_nothing_behind_a_pooler)


def pooled(server_pid: int, announced_pid: int) -> bool:
    """Whether a pooler stands between: it answers for the server when a client connects, with a process id of its own.

    In PgBouncer's transaction mode what belongs to a session (LISTEN, an advisory lock, a prepared statement) is left
    behind on a server process that goes to the next client.

    Args:
        server_pid: What ``pg_backend_pid()`` says.
        announced_pid: What the driver was given at the start.
    """
    return server_pid != announced_pid


def _prepare_nothing_behind_a_pooler(dbapi_connection: Any, _record: object) -> None:
    cursor = dbapi_connection.cursor()
    cursor.execute("SELECT pg_backend_pid()")
    (server_pid,) = cursor.fetchone()
    cursor.close()
    dbapi_connection.rollback()
    driver = getattr(dbapi_connection, "driver_connection", dbapi_connection)
    if pooled(server_pid, driver.info.backend_pid):
        driver.prepare_threshold = None


def _set_pragmas(dbapi_connection: Any, _record: object) -> None:
    cursor = dbapi_connection.cursor()
    _switch_to_wal(cursor)
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA recursive_triggers = ON")
    cursor.close()


def _switch_to_wal(cursor: Any) -> None:
    """Switch the file to WAL, once in its life; wait for a writer, which SQLite's busy timeout does not do here."""
    cursor.execute("PRAGMA busy_timeout")
    (busy_timeout,) = cursor.fetchone()
    end = time.monotonic() + busy_timeout / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except Exception as error:
            # By its text: aiosqlite's cursor raises what sqlite3 raises, and Python 3.11 names no busy class.
            if "readonly" in str(error):  # `mode=ro`, or no right to write: it is read as it is
                return
            if "locked" not in str(error) or time.monotonic() >= end:
                raise
            time.sleep(_WAL_PAUSE)
        else:
            return
