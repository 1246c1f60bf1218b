"""The database and the job class: from the options, the environment or ``pyproject.toml``, in this order."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mljobs.store._store import JobStore

SHARED = ("url", "model", "schema")
"""Options of every command, which may stand before it too."""
_KEYS = (*SHARED, "worker")
_VARIABLES = {"url": "MLJOBS_DATABASE_URL"}
DEFAULT_URL = "sqlite:///mljobs.db"
_STEPS = 200_000  # of SQLite's machine: a few milliseconds

given: dict[str, str] = {}
"""What the options of this call say."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the jobs are.

    Attributes:
        url: Of the database.
        model: ``package.module:Class`` of the host's own class; None for ``MlJob``.
        schema: The PostgreSQL schema with the tables; None for the one that the database finds by itself.
        worker: ``module:name`` of the worker that ``mljobs work`` runs.
    """

    url: str
    model: str | None
    schema: str | None
    worker: str | None

    @property
    def shown(self) -> str:
        """The URL as it may be printed: without the password."""
        from mljobs.db._engines import sync_url  # noqa: PLC0415 - loads SQLAlchemy

        return sync_url(self.url).render_as_string(hide_password=True)

    @property
    def located(self) -> Any:
        """The URL with the schema in it: all connections look there, and nowhere else.

        Raises:
            InvalidValueError: Not a URL; or a schema of a database that has none.
        """
        from mljobs.db._engines import sync_url  # noqa: PLC0415 - loads SQLAlchemy
        from mljobs.errors import InvalidValueError  # noqa: PLC0415

        if self.schema is None:
            return self.url
        url = sync_url(self.url)
        if url.get_backend_name() != "postgresql" or not self.schema.replace("_", "a").isalnum():
            raise InvalidValueError("schema", self.schema, "expected the name of a schema of PostgreSQL")
        options = url.query.get("options", "")
        return url.update_query_dict({"options": f"{options} -csearch_path={self.schema}".strip()})


def settings() -> Settings:
    """Return the settings of this call.

    Raises:
        InvalidValueError: ``[tool.mljobs]`` holds what is no setting.
    """
    said = _of_project()
    said |= {key: os.environ[name] for key, name in _VARIABLES.items() if os.environ.get(name)}
    said |= given
    return Settings(said.get("url", DEFAULT_URL), said.get("model"), said.get("schema"), said.get("worker"))


def _of_project() -> dict[str, str]:
    """Return ``[tool.mljobs]`` of the ``pyproject.toml`` here or in a directory above."""
    here = Path.cwd()
    for directory in (here, *here.parents):
        path = directory / "pyproject.toml"
        if path.is_file():
            text = path.read_text("utf-8", "replace")
            return _read_project(path, text) if "mljobs" in text else {}
    return {}


def _read_project(path: Path, text: str) -> dict[str, str]:
    import tomllib  # noqa: PLC0415 - seldom needed

    from mljobs.errors import InvalidValueError  # noqa: PLC0415 - loads SQLAlchemy

    try:
        table = tomllib.loads(text).get("tool", {}).get("mljobs", {})
    except tomllib.TOMLDecodeError as error:
        raise InvalidValueError("pyproject", str(path), f"not TOML: {error}") from error
    for key, value in table.items():
        if key not in _KEYS or not isinstance(value, str):
            raise InvalidValueError(f"tool.mljobs.{key}", value, f"expected text under {', '.join(_KEYS)}, in {path}")
    return dict(table)


def load(place: str, what: str, example: str) -> Any:
    """Return the object at ``module:name``.

    Args:
        place: Where it is.
        what: What it is to be, for errors.
        example: Of a place.

    Raises:
        InvalidValueError: There is no such module, or no such name in it.
    """
    from mljobs.errors import InvalidValueError  # noqa: PLC0415 - loads SQLAlchemy

    module_name, colon, attribute = place.partition(":")
    if not colon or not module_name or not attribute or module_name.startswith("."):
        raise InvalidValueError(what, place, f"expected module:name, e.g. {example}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InvalidValueError(what, place, f"importing {module_name} failed: {error}") from error
        raise InvalidValueError(what, place, f"there is no module {error.name!r} here or installed") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InvalidValueError(what, place, f"{module_name} has no {attribute!r}")
        found = getattr(found, part)
    return found


def job_class() -> Any:
    """Return the job class that the settings name.

    Raises:
        InvalidValueError: There is none at the place, or it is no job class.
    """
    from mljobs.record._models import MlJob  # noqa: PLC0415 - loads SQLAlchemy

    place = settings().model
    if place is None:
        return MlJob
    from mljobs.jobs import table_of  # noqa: PLC0415

    model = load(place, "model", "app.models:TrainingRun")
    table_of(model)
    return model


@contextmanager
def open_store() -> Iterator[JobStore]:
    """Open the store that the settings name.

    Raises:
        InvalidValueError: There is no such file, no such class, or the URL is none.
    """
    from mljobs.store._store import JobStore  # noqa: PLC0415 - loads SQLAlchemy

    place = settings()
    model = job_class()
    refuse_missing_file(place.url)
    with JobStore(place.located, model=model) as store:
        _obey_ctrl_c(store.engine)
        yield store


def _obey_ctrl_c(engine: Any) -> None:
    """Let a long statement of SQLite be interrupted: only between bytecodes does Python look for signals."""
    if engine.dialect.name != "sqlite":
        return
    from sqlalchemy import event  # noqa: PLC0415

    def look_for_signals(connection: Any, _record: object) -> None:
        connection.set_progress_handler(lambda: 0, _STEPS)

    event.listen(engine, "connect", look_for_signals)


def refuse_missing_file(url: str) -> None:
    """Refuse a SQLite file that is not there, which opening it would make.

    Raises:
        InvalidValueError: It is not there.
    """
    from mljobs.db._engines import sync_url  # noqa: PLC0415 - loads SQLAlchemy
    from mljobs.errors import InvalidValueError  # noqa: PLC0415

    parsed = sync_url(url)
    name = parsed.database
    if parsed.get_backend_name() != "sqlite" or not name or name == ":memory:" or name.startswith("file:"):
        return
    if not Path(name).exists():
        reason = f"there is no file {name}: '{making_tables()}' makes it, --url names another database"
        raise InvalidValueError("url", parsed.render_as_string(hide_password=True), reason)


def making_tables() -> str:
    """Return the command that makes the tables of the job class."""
    return "mljobs upgrade" if settings().model is None else "alembic upgrade head"
