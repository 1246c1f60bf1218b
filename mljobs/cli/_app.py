"""The application: the table of commands, each loaded when it is called; and errors as one line on standard error."""

from __future__ import annotations

import os
import re
import sys
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Final, NamedTuple

import typer
from typer.core import TyperGroup

from mljobs.cli import _settings
from mljobs.cli._options import FILTER_HELP
from mljobs.cli._parameters import spare_pydantic

_CLICK_ERROR: Any = typer.BadParameter.__mro__[2]
"""Click's own exception, which Typer brings from one place or another."""


_INTERRUPTED: Final = 130


class Command(NamedTuple):
    """A command: the module of the function of its name, and what the list of commands says about it.

    Attributes:
        module: The module's name in ``mljobs.cli``.
        panel: The part of the list.
        help: One sentence.
        filters: Whether it takes a filter, which its help then explains.
    """

    module: str
    panel: str
    help: str
    filters: bool = False


COMMANDS: Final = {
    "submit": Command("_submitting", "Jobs", "Queue a job."),
    "list": Command("_listing", "Jobs", "List jobs, the newest first.", filters=True),
    "show": Command("_showing", "Jobs", "Show all of a job."),
    "watch": Command("_following", "Jobs", "Follow jobs while they run.", filters=True),
    "wait": Command("_following", "Jobs", "Wait until jobs have finished; the exit code says how."),
    "cancel": Command("_acting", "Jobs", "Cancel queued and running jobs.", filters=True),
    "retry": Command("_acting", "Jobs", "Queue finished jobs once more.", filters=True),
    "lineage": Command("_showing", "Jobs", "Show all tries of the same work."),
    "compare-runs": Command("_comparing", "Jobs", "Show parameters and metrics of jobs side by side."),
    "best": Command("_comparing", "Jobs", "Show the best runs on a target, by a metric.", filters=True),
    "board": Command("_board", "Workers", "Serve the board, where people look."),
    "stats": Command("_looking", "Workers", "Show by kind what waits, runs and finished."),
    "workers": Command("_looking", "Workers", "Show the workers that hold jobs."),
    "work": Command("_work", "Workers", "Run a worker of yours."),
    "rescue": Command("_looking", "Workers", "Requeue the jobs of workers that fell silent."),
    "prune": Command("_acting", "Tables", "Delete finished jobs past their time.", filters=True),
    "upgrade": Command("_schema", "Tables", "Bring the tables up to date."),
    "downgrade": Command("_schema", "Tables", "Take the tables back to an earlier version."),
    "current": Command("_schema", "Tables", "Say which version the tables are at."),
    "verify": Command("_schema", "Tables", "Check tables, indexes and the guard."),
    "stamp": Command("_schema", "Tables", "Say which version tables made otherwise are."),
    "demo": Command("_demo", "Tables", "Train a real model as a job, and see it guarded."),
    "export": Command("_transfer", "Files", "Write jobs to a file.", filters=True),
    "import": Command("_transfer", "Files", "Read jobs from a file."),
    "compare": Command("_audit", "Files", "Compare finished jobs with an earlier export."),
    "digest": Command("_audit", "Files", "Write or check a line for each day's jobs."),
    "completion": Command("_completing", "Files", "Print the script that completes in bash, zsh or fish."),
}
"""Every command, in the order of the help."""

_OPTIONS: Final = {
    "url": "The database, e.g. postgresql://user@host/db. [env: MLJOBS_DATABASE_URL; default: sqlite:///mljobs.db]",
    "model": "Your own job class, e.g. app.models:TrainingRun.",
    "schema": "The PostgreSQL schema that holds the tables.",
}


class LazyGroup(TyperGroup):
    """Knows its commands by name, and imports a command's module when it is called or its help is asked for."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        spare_pydantic(self)

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - Click's signature
        """Return the names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - Click's signature
        """Return the command, with the options that all share."""
        if cmd_name not in COMMANDS:
            return None
        command = _commands_of(COMMANDS[cmd_name].module)[cmd_name]
        if not any(parameter.name == "url" for parameter in command.params):
            command.params += _shared_options()
            spare_pydantic(command)
        return command

    def about(self, name: str) -> str:
        """Return what a command does, in a line."""
        return COMMANDS[name].help

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - Click's signature
        """Write the list of commands, by panel."""
        for panel in dict.fromkeys(command.panel for command in COMMANDS.values()):
            with formatter.section(panel):
                formatter.write_dl(
                    [(name, command.help) for name, command in COMMANDS.items() if command.panel == panel]
                )


@cache
def _commands_of(module: str) -> dict[str, Any]:
    part = typer.Typer(rich_markup_mode=None, context_settings=_CONTEXT)
    functions = vars(import_module(f"mljobs.cli.{module}"))
    for name, command in COMMANDS.items():
        if command.module == module:
            function = functions.get(f"{name}_") or functions[name.replace("-", "_")]  # list_ and import_
            part.command(name, epilog=FILTER_HELP if command.filters else None)(function)
    part.callback()(lambda: None)  # makes a group of it, also where the module has one command only
    group: Any = typer.main.get_command(part)
    return dict(group.commands)


def _shared(url: str | None = None, model: str | None = None, schema: str | None = None) -> None:
    """Take the options that all commands share."""


def _shared_options() -> list[Any]:
    """Return the options that all commands share; what they say is kept in the settings."""
    part = typer.Typer(rich_markup_mode=None)
    part.command()(_shared)
    options = [option for option in typer.main.get_command(part).params if option.name in _OPTIONS]
    for option in options:
        parameter: Any = option
        parameter.help = _OPTIONS[str(option.name)]
        parameter.expose_value = False
        parameter.callback = _keep
    return options


def _keep(_context: Any, parameter: Any, value: str | None) -> str | None:
    if value is not None:
        _settings.given[parameter.name] = value
    return value


_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

app = typer.Typer(
    name="mljobs",
    cls=LazyGroup,
    help="Machine-learning jobs in your database. A job that has finished never changes again.",
    no_args_is_help=True,
    add_completion=False,  # there is a command
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=_CONTEXT,
)


def _version(wanted: bool) -> None:  # noqa: FBT001 - Typer's callback
    if wanted:
        from mljobs import __version__  # noqa: PLC0415

        typer.echo(f"mljobs {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Filters are words such as status:failed 'created:<2h' 'spec.lr>0.01': mljobs list --help. Settings that every "
    "call needs stand in pyproject.toml under [tool.mljobs]: url, model, schema, worker."
)
def main(
    *,
    version: Annotated[  # noqa: ARG001 - its callback has done all
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    url: Annotated[str | None, typer.Option(help=_OPTIONS["url"])] = None,
    model: Annotated[str | None, typer.Option(help=_OPTIONS["model"])] = None,
    schema: Annotated[str | None, typer.Option(help=_OPTIONS["schema"])] = None,
) -> None:
    """Machine-learning jobs in your database. A job that has finished never changes again."""
    for name, value in {"url": url, "model": model, "schema": schema}.items():
        if value is not None:
            _settings.given[name] = value


@cache
def _group() -> Any:
    return typer.main.get_command(app)


def run(arguments: list[str] | None = None) -> None:
    """Run the command and exit: 0, 1 for an error, 2 for usage, 130 when interrupted; see docs/cli.md for wait and watch.

    Args:
        arguments: Instead of the process's own.
    """
    _settings.given.clear()
    if "_MLJOBS_COMPLETE" in os.environ:
        from mljobs.cli._completing import answer  # noqa: PLC0415 - seldom needed

        answer(_group())
    try:
        code = _group()(args=arguments, prog_name="mljobs", standalone_mode=False)
        sys.stdout.flush()
        if code == _INTERRUPTED:  # as some versions of Typer answer
            sys.stderr.write("mljobs: interrupted\n")
        sys.exit(code if isinstance(code, int) else 0)
    except BrokenPipeError:
        # Nobody reads any more. Python would say so once more when it flushes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort) as error:
        interrupted = isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt)
        sys.stderr.write("mljobs: interrupted\n" if interrupted else "mljobs: nothing was done\n")
        sys.exit(_INTERRUPTED if interrupted else 1)
    except Exception as error:  # noqa: BLE001 - what is not known is raised again
        from mljobs.cli._failing import message_and_code  # noqa: PLC0415 - loads SQLAlchemy

        if isinstance(error, _CLICK_ERROR):
            _fail_usage(error, sys.argv[1:] if arguments is None else arguments)
        message, code = message_and_code(error)
        sys.stderr.write(f"mljobs: {message}\n")
        sys.exit(code)
    finally:
        _settings.given.clear()


def _fail_usage(error: Any, arguments: list[str]) -> None:
    """Say what is wrong with the arguments, and where the help is.

    A command without arguments answers with its help.
    """
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stdout.write(f"{error.format_message()}\n")
        sys.exit(2)
    context = getattr(error, "ctx", None)
    name = next((argument for argument in arguments if argument in COMMANDS), None)
    command = context.command_path if context is not None else f"mljobs {name}" if name else "mljobs"
    text = " ".join(str(error.format_message()).split())
    unknown = re.match(r"No such command '([^']*)'", text)
    near = get_close_matches(unknown[1], COMMANDS, 1) if unknown else []
    if near:
        text = f"{text.rstrip('.')}, did you mean {near[0]}?"
    sys.stderr.write(f"mljobs: {text.rstrip('.')}; see {command} --help\n")
    sys.exit(2)
