"""The commands put together, and how errors are told: one line on stderr, exit code 1, never a traceback."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

import mljobs
from mljobs.cli import _audit, _board, _demo, _schema, _transfer, _work
from mljobs.errors import MlJobsError

app = typer.Typer(
    name="mljobs",
    help="Machine-learning jobs in your database. A job that has finished never changes again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:  # noqa: FBT001 - Typer's callback
    if wanted:
        typer.echo(f"mljobs {mljobs.__version__}")
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Machine-learning jobs in your database."""


for module in (_demo, _board, _schema, _work, _transfer, _audit):
    module.add_to(app)


def run(arguments: list[str] | None = None) -> None:
    """Run the command and exit.

    Args:
        arguments: Instead of the process's own.
    """
    try:
        app(args=arguments)
    except MlJobsError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        _fail(f"{name} is not installed: {_EXTRAS.get(name, 'see the extras of mljobs')}")
    except (DBAPIError, ArgumentError, NoSuchModuleError) as error:
        cause: Any = getattr(error, "orig", None) or error
        _fail(str(cause).strip().partition("\n")[0])
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:  # of a file that is to be read or written
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))


_EXTRAS = {
    "psycopg_binary": "pip install 'mljobs[binary]'",
    "psycopg2": "use postgresql+psycopg://",
    "backports": "pip install 'mljobs[zstd]'",
    "starlette": "pip install 'mljobs[board]'",
    "jinja2": "pip install 'mljobs[board]'",
    "uvicorn": "pip install 'mljobs[board]'",
    "sklearn": "pip install 'mljobs[demo]'",
}


def _fail(message: str) -> None:
    sys.stderr.write(f"mljobs: {message}\n")
    sys.exit(1)
