"""The message and the exit code for an error: one line, with what to do."""

from __future__ import annotations

from typing import Any

from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from mljobs.cli._output import escaped
from mljobs.cli._settings import making_tables, settings
from mljobs.errors import FilterError, MlJobsError, SchemaError

_EXTRAS = {
    "psycopg_binary": "pip install 'mljobs[binary]'",
    "psycopg2": "use postgresql+psycopg://",
    "backports": "pip install 'mljobs[zstd]'",
    "starlette": "pip install 'mljobs[board]'",
    "jinja2": "pip install 'mljobs[board]'",
    "uvicorn": "pip install 'mljobs[board]'",
    "sklearn": "pip install 'mljobs[demo]'",
}
_NO_TABLE = "42P01"


def message_and_code(error: Exception) -> tuple[str, int]:
    """Return what to say of an error, and the exit code; an error that nobody expects is raised again.

    Args:
        error: What was raised.
    """
    if isinstance(error, MlJobsError):
        lines = str(error).split("\n") if isinstance(error, SchemaError) else [str(error)]  # one for each difference
        return "\n".join(map(escaped, lines)), 2 if isinstance(error, FilterError) else 1
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").partition(".")[0]
        return f"{name} is not installed: {_EXTRAS.get(name, 'see the extras of mljobs')}", 1
    if isinstance(error, DBAPIError) and str(error.orig) == "interrupted":  # Ctrl-C in a statement of SQLite
        return "interrupted", 130
    if isinstance(error, DBAPIError | ArgumentError | NoSuchModuleError):
        return _of_database(error), 1
    if isinstance(error, OSError):  # of a file that is to be read or written
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        return escaped(text), 1
    raise error


def _of_database(error: Any) -> str:
    cause: Any = getattr(error, "orig", None) or error
    line = escaped(str(cause).strip().partition("\n")[0])
    if line.startswith("no such table") or getattr(cause, "sqlstate", None) == _NO_TABLE:
        model = settings().model
        whose = "the tables" if model is None else f"the tables of {model}"
        return f"{line}: '{making_tables()}' makes {whose}; --url, --model and --schema say where they are"
    place = settings()
    return f"{escaped(place.shown)}: {line}" if place.url.startswith("sqlite") else line  # a server's error names it
