"""As `alembic init` writes it, with the application's models."""

from alembic import context
from app import URL, Base
from sqlalchemy import create_engine

import mljobs.alembic_plugin  # noqa: F401 - needed with Alembic 1.16 and 1.17 only

options = {"target_metadata": Base.metadata, "render_as_batch": True, "compare_server_default": True}

if context.is_offline_mode():
    context.configure(url=URL, literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    engine = create_engine(URL)
    with engine.connect() as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()
