"""``Bind``: the session or connection on which an operation runs."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, inspect
from sqlalchemy.orm import Session, scoped_session

from mljobs.errors import InvalidValueError

Bind = Session | scoped_session[Any] | Connection
"""Where an operation runs: the caller's ``Session``, a ``scoped_session`` (such as Flask-SQLAlchemy's ``db.session``), or a
Core ``Connection``; in its transaction either way."""

_ADVICE = {
    "AsyncSession": "run it by `await session.run_sync(jobs.submit, ...)`, or use an AsyncJobStore",
    "async_scoped_session": "run it by `await session.run_sync(jobs.submit, ...)`, or use an AsyncJobStore",
    "AsyncConnection": "run it by `await connection.run_sync(jobs.submit, ...)`, or use an AsyncJobStore",
    "Engine": "pass a connection, `with engine.begin() as connection`, or use JobStore(engine)",
    "AsyncEngine": "pass a connection by `connection.run_sync`, or use AsyncJobStore(engine)",
    "sessionmaker": "call it first, `with maker.begin() as session`, or use JobStore(maker)",
    "async_sessionmaker": "call it first, `async with maker.begin() as session`, or use AsyncJobStore(maker)",
    "SQLAlchemy": "pass its session, `db.session`",
    "JobStore": "call its method, `store.submit(...)`, or pass what `with store.connect()` gives",
    "AsyncJobStore": "await its method, `store.submit(...)`",
}
"""By the name of a class: what to pass instead of it."""


def resolve(bind: object) -> Session | Connection:
    """Return the session or connection that a caller means.

    Raises:
        InvalidValueError: It is none; the message says what to pass instead.
    """
    if isinstance(bind, Session | Connection):
        return bind
    if isinstance(bind, scoped_session):
        session: Session = bind()
        return session
    known = (_ADVICE[base.__name__] for base in type(bind).__mro__ if base.__name__ in _ADVICE)
    raise InvalidValueError("session", type(bind).__name__, next(known, "expected a Session or a Connection"))


def connection_for(bind: Bind, model: type[Any]) -> Connection:
    """Return the connection of the caller's transaction on the database of ``model``.

    Args:
        bind: A session may have several engines: the one to which the model is bound counts.
        model: The mapped job class.
    """
    resolved = resolve(bind)
    if isinstance(resolved, Connection):
        return resolved
    return resolved.connection(bind_arguments={"mapper": inspect(model)})
