"""What a process has imported before it forks others that need it: see ``fork_server.py``."""

import alembic.config  # noqa: F401 - first, as in the command: Alembic then imports its plugins
import psycopg  # noqa: F401
import sqlalchemy.dialects.postgresql.psycopg
import sqlalchemy.dialects.sqlite  # noqa: F401
import typer.rich_utils  # noqa: F401

from mljobs import JobStore, Worker, jobs, schema  # noqa: F401
from mljobs.cli import main  # noqa: F401

assert schema.upgrade
