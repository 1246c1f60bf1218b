"""As `alembic init` writes it, with the application's models; nothing in it knows of mljobs."""

from alembic import context
from app import URL, Base
from sqlalchemy import create_engine

engine = create_engine(URL)
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
