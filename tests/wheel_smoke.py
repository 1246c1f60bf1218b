"""Run by ``.ci/run`` with nothing but the wheel installed, in an empty directory: the wheel migrates a database.

By itself, and beside the revisions of a host whose ``alembic.ini`` is as ``docs/migrations.md`` shows it.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import mljobs
from mljobs import JobStore, schema

HOST_INI = """\
[alembic]
script_location = %(here)s/migrations
path_separator = space
version_locations = %(here)s/migrations/versions mljobs:migrations/versions
"""
HOST_ENV = """\
from alembic import context
from sqlalchemy import create_engine

with create_engine("sqlite:///host.db").begin() as connection:
    context.configure(connection=connection)
    context.run_migrations()
"""
HOST_REVISION = """\
from alembic import op

revision, down_revision, branch_labels, depends_on = "host1", None, ("host",), None


def upgrade():
    op.execute("CREATE TABLE uploads (id INTEGER PRIMARY KEY)")
"""

with TemporaryDirectory() as directory:
    url = f"sqlite:///{Path(directory) / 'jobs.db'}"
    schema.upgrade(url)
    schema.verify(url)
    with JobStore(url) as store:
        job = store.submit("train", "spam", {"lr": 0.1})
        with store.running(job) as run:
            run.metrics = {"f1": 0.9}
        assert store.get(job.id).is_terminal
    schema.downgrade(url)

    home = Path(mljobs.__file__).parent
    assert schema.migrations_path() == home / "migrations"
    assert (home / "py.typed").exists()

    host = Path(directory)
    (host / "migrations" / "versions").mkdir(parents=True)
    (host / "alembic.ini").write_text(HOST_INI)
    (host / "migrations" / "env.py").write_text(HOST_ENV)
    (host / "migrations" / "versions" / "host1.py").write_text(HOST_REVISION)
    subprocess.run([sys.executable, "-m", "alembic", "upgrade", "heads"], cwd=host, check=True)
    schema.verify(f"sqlite:///{host / 'host.db'}")
