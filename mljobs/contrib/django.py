"""mljobs beside Django's ORM: a SQLAlchemy session in Django's own transaction, stores, a migration, errors as answers.

Django's ORM cannot map ``MlJob``, and two connections cannot share a transaction. So :func:`session` lends Django's
connection to SQLAlchemy: what Django has written and what the session writes are one transaction, committed or rolled back
by Django alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse
from sqlalchemy import URL, Connection, Engine, create_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import events
from mljobs.contrib.problems import MEDIA_TYPE, body_of, status_of
from mljobs.errors import InvalidValueError, MlJobsError
from mljobs.guards._errors import translate_error
from mljobs.schema._versions import downgrade as schema_downgrade
from mljobs.schema._versions import upgrade as schema_upgrade
from mljobs.store._store import JobStore

if TYPE_CHECKING:
    from mljobs.store._async_store import AsyncJobStore

__all__ = [
    "ProblemMiddleware",
    "async_store",
    "connection",
    "database_url",
    "downgrade",
    "session",
    "store",
    "upgrade",
]

_DRIVERS = {"postgresql": "postgresql+psycopg", "sqlite": "sqlite"}


# ------------------------------------------------------------------------------------------------ errors as answers


class ProblemMiddleware:
    """Answers each of our errors that a view raises with its status and its problem details.

    ``MIDDLEWARE = [..., "mljobs.contrib.django.ProblemMiddleware"]``. What Django's own connection raises when the
    guard refuses a write by raw SQL is answered as well.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponse | Awaitable[HttpResponse]:
        """Pass the request on."""
        answer: HttpResponse | Awaitable[HttpResponse] = self.get_response(request)
        return answer

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Return the answer to one of our errors; None leaves any other to Django."""
        error = exception if isinstance(exception, MlJobsError) else translate_error(exception)
        if error is None:
            return None
        return HttpResponse(body_of(error, instance=request.path), status=status_of(error), content_type=MEDIA_TYPE)


# ------------------------------------------------------------------------------------------- in Django's transaction


class _Lent:
    """A driver's connection as SQLAlchemy sees it, while Django keeps it: it ends no transaction and is not closed."""

    def __init__(self, lent: Any) -> None:
        self._lent = lent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lent, name)

    def _nothing(self, *_args: object, **_kw: object) -> None:
        """Leave to Django what is Django's."""

    commit = rollback = close = _nothing
    # What SQLAlchemy's dialects would add to a new connection, each time anew.
    add_notice_handler = create_function = _nothing


@cache
def _engine(using: str, vendor: str) -> Engine:
    options: dict[str, Any] = {"use_native_hstore": False} if vendor == "postgresql" else {}
    return create_engine(
        f"{_driver(using, vendor)}://", creator=lambda: _Lent(_raw(using, vendor)), poolclass=NullPool, **options
    )


def _driver(using: str, vendor: str) -> str:
    driver = _DRIVERS.get(vendor)
    if driver is None:
        raise InvalidValueError("source", using, f"mljobs knows PostgreSQL and SQLite, not {vendor}")
    return driver


def _raw(using: str, vendor: str) -> Any:
    raw = connections[using].connection
    if vendor == "postgresql" and type(raw).__module__.partition(".")[0] != "psycopg":
        raise InvalidValueError(
            "source", using, "its connection is not one of psycopg 3: pip install 'psycopg[binary]'"
        )
    return raw


@contextmanager
def connection(using: str = "default") -> Iterator[Connection]:
    """Lend Django's connection to SQLAlchemy Core, in a ``transaction.atomic`` block.

    Args:
        using: The name of the database in ``DATABASES``.

    Raises:
        InvalidValueError: Neither PostgreSQL by psycopg 3 nor SQLite.
    """
    database = connections[using]
    engine = _engine(using, database.vendor)
    with transaction.atomic(using=using), engine.begin() as lent:  # its commit is none, but tells listeners
        if events.subscribed():
            events.deliver_by(lent, partial(transaction.on_commit, using=using))
        yield lent


@contextmanager
def session(using: str = "default", **options: Any) -> Iterator[Session]:
    """Open a SQLAlchemy session in Django's transaction, flushed when the block ends.

    ::

        with transaction.atomic(), mljobs.contrib.django.session() as session:
            upload = Upload.objects.create(path=path)          # Django's ORM
            job = jobs.submit(session, "train", path)          # both or neither

    Without ``transaction.atomic`` around it the block is a transaction of its own. ``session.commit()`` and
    ``session.rollback()`` inside it end a savepoint; only Django commits.

    Args:
        using: The name of the database in ``DATABASES``.
        **options: Passed on to ``Session``.

    Raises:
        InvalidValueError: Neither PostgreSQL by psycopg 3 nor SQLite.
    """
    options.setdefault("expire_on_commit", False)
    with (
        connection(using) as lent,
        Session(lent, join_transaction_mode="create_savepoint", **options) as opened,
    ):
        yield opened
        opened.commit()


# ----------------------------------------------------------------------------------------- in transactions of their own


def database_url(using: str = "default") -> URL:
    """Return the URL of one of Django's databases, for a store or a worker.

    Args:
        using: The name of the database in ``DATABASES``. Of its ``OPTIONS`` those are taken over that a URL can hold.

    Raises:
        InvalidValueError: Neither PostgreSQL nor SQLite.
    """
    database = connections[using]
    settings = database.settings_dict
    driver = _driver(using, database.vendor)
    if database.vendor == "sqlite":
        return URL.create(driver, database=str(settings["NAME"]))
    query = {name: value for name, value in settings.get("OPTIONS", {}).items() if isinstance(value, str)}
    return URL.create(
        driver,
        username=settings["USER"] or None,
        password=settings["PASSWORD"] or None,
        host=settings["HOST"] or None,
        port=int(settings["PORT"]) if settings["PORT"] else None,
        database=settings["NAME"] or None,
        query=query,
    )


def store(using: str = "default", **options: Any) -> JobStore:
    """Return a store on one of Django's databases, with connections of its own.

    Args:
        using: The name of the database in ``DATABASES``.
        **options: As of ``JobStore``.
    """
    return JobStore(database_url(using), **options)


def async_store(using: str = "default", **options: Any) -> AsyncJobStore:
    """Return a store for async views on one of Django's databases, with connections of its own.

    Args:
        using: The name of the database in ``DATABASES``.
        **options: As of ``AsyncJobStore``.
    """
    from mljobs.store._async_store import AsyncJobStore  # noqa: PLC0415 - needs greenlet, which blocking hosts may not have

    return AsyncJobStore(database_url(using), **options)


# ------------------------------------------------------------------------------------------------- in its migrations


def upgrade(_apps: Any, schema_editor: Any) -> None:
    """Bring our tables up to date in a migration of Django's: ``migrations.RunPython(upgrade, downgrade)``.

    Run it anew, in a further migration, for a release of mljobs that brings a new version of them.
    """
    with connection(schema_editor.connection.alias) as lent:
        schema_upgrade(lent)


def downgrade(_apps: Any, schema_editor: Any) -> None:
    """Drop our tables, finished records included, in a migration of Django's that is taken back."""
    with connection(schema_editor.connection.alias) as lent:
        schema_downgrade(lent)
