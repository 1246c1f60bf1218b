"""A host's Alembic history in a directory of its own, run in this process."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import alembic
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, MetaData

import mljobs.alembic_plugin  # noqa: F401 - as an env.py with an Alembic before 1.18 has it

ENV = """
from alembic import context

attributes = context.config.attributes
options = {
    "target_metadata": attributes["metadata"],
    "compare_type": True,
    "compare_server_default": True,
    **attributes["options"],
}
if context.is_offline_mode():
    context.configure(url=attributes["engine"].url, literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    with attributes["engine"].begin() as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
"""


class History:
    """An ``alembic`` directory for one database and one set of models.

    Args:
        path: Where it is made.
        engine: The database.
        metadata: The host's models.
        **options: Passed on to ``context.configure``.
    """

    def __init__(self, path: Path, engine: Engine, metadata: MetaData | list[MetaData], **options: Any) -> None:
        self.path = path
        (path / "versions").mkdir(parents=True)
        (path / "env.py").write_text(ENV)
        shutil.copy(Path(alembic.__file__).parent / "templates" / "generic" / "script.py.mako", path)
        self.output = io.StringIO()
        self.config = Config(stdout=io.StringIO(), output_buffer=self.output)
        self.config.set_main_option("script_location", str(path))
        self.config.attributes.update(engine=engine, metadata=metadata, options={"render_as_batch": True, **options})
        self._number = 0

    def use(self, metadata: MetaData) -> None:
        """Go on with other models."""
        self.config.attributes["metadata"] = metadata

    def revision(self) -> str:
        """Autogenerate a revision; return its text, without Alembic's comments."""
        self._number += 1
        script: Any = command.revision(self.config, autogenerate=True, rev_id=f"r{self._number}", message="auto")
        lines = Path(script.path).read_text().splitlines()
        return "\n".join(line for line in lines if line.strip() and not line.strip().startswith("# ###"))

    def upgrade(self, revision: str = "head") -> None:
        command.upgrade(self.config, revision)

    def downgrade(self, revision: str = "-1") -> None:
        command.downgrade(self.config, revision)

    def check(self) -> None:
        """Raise where autogenerate would find something to do."""
        command.check(self.config)

    def migrate(self) -> str:
        """Autogenerate a revision and run it."""
        text = self.revision()
        self.upgrade()
        return text
