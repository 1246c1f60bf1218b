"""The ``mljobs`` command, from the extra ``cli``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command; say what to install where the extra is missing."""
    try:
        import rich  # noqa: F401, PLC0415 - asked here, used further in
        import typer  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        sys.stderr.write(f"mljobs: the command needs {error.name}: pip install 'mljobs[cli]'\n")
        sys.exit(2)
    from mljobs.cli._app import run  # noqa: PLC0415

    run()
