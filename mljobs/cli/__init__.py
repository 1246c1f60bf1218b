"""The ``mljobs`` command, from the extra ``cli``."""

from __future__ import annotations

import os
import sys

from mljobs.cli._garbage import collect_seldom


def main() -> None:
    """Run the command; say what to install where the extra is missing."""
    collect_seldom()
    if sys.argv[1:] == ["--version"] and "_MLJOBS_COMPLETE" not in os.environ:  # without the time that Typer takes
        from mljobs import __version__  # noqa: PLC0415

        sys.stdout.write(f"mljobs {__version__}\n")
        return
    try:
        import typer  # noqa: F401, PLC0415 - asked here, used further in
    except ModuleNotFoundError as error:
        sys.stderr.write(f"mljobs: the command needs {error.name}: pip install 'mljobs[cli]'\n")
        sys.exit(2)
    from mljobs.cli._app import run  # noqa: PLC0415

    run()
