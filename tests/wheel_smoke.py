"""Run by ``.ci/run`` with nothing but the wheel installed, in an empty directory: the wheel migrates a database."""

from pathlib import Path
from tempfile import TemporaryDirectory

import mljobs
from mljobs import JobStore, schema

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
