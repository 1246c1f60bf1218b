"""Alembic's environment for the tables of mljobs: one transaction, one upgrade at a time, on both databases.

``mljobs.schema`` hands in its connection; the ``alembic`` command makes one here.
"""

from __future__ import annotations

import logging.config
import os
from contextlib import AbstractContextManager, nullcontext

from alembic import context
from sqlalchemy import Connection

from mljobs.db._engines import DEFAULT_URL, URL_VARIABLE, new_engine, sync_url
from mljobs.schema._versions import VERSION_TABLE, is_ours, migrating

config = context.config


def _url() -> str:
    given = context.get_x_argument(as_dictionary=True).get("url")
    return given or os.environ.get(URL_VARIABLE) or config.get_main_option("sqlalchemy.url", DEFAULT_URL)


def _include_object(_object: object, name: str | None, kind: str, *_: object) -> bool:
    # Alembic before 1.17 misses the IDENTITY of the token on SQLite, which has none.
    return not (kind == "column" and name == "token" and context.get_context().dialect.name == "sqlite")


def _configure(**options: object) -> None:
    from mljobs.record._models import metadata  # noqa: PLC0415 - only what compares needs the model

    context.configure(
        target_metadata=metadata,
        version_table=VERSION_TABLE,
        include_name=is_ours,
        include_object=_include_object,
        transactional_ddl=True,  # SQLite has it too, once a transaction has really begun
        **options,
    )


def _begun(connection: Connection) -> AbstractContextManager[object]:
    return nullcontext() if connection.in_transaction() else connection.begin()


if config.config_file_name is not None and "connection" not in config.attributes:
    logging.config.fileConfig(config.config_file_name, disable_existing_loggers=False)

if context.is_offline_mode():
    _configure(url=sync_url(_url()).render_as_string(hide_password=False), literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
elif isinstance(config.attributes.get("connection"), Connection):
    _configure(connection=config.attributes["connection"])
    with context.begin_transaction():
        context.run_migrations()
else:
    given = config.attributes.get("connection")  # an engine: pytest-alembic hands one in under this name
    engine = given or new_engine(_url())
    try:
        with engine.connect() as connection, _begun(connection), migrating(connection):
            _configure(connection=connection)
            with context.begin_transaction():
                context.run_migrations()
    finally:
        if given is None:
            engine.dispose()
