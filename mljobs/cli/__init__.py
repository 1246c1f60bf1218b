"""The ``mljobs`` command, from the extra ``cli``."""

from __future__ import annotations

import gc
import sys
from typing import Final

USUAL: Final = gc.get_threshold()
"""When Python looks for garbage; what runs for long goes back to it."""
_SELDOM: Final = (100_000, 50, 50)
"""The same while modules are imported, which leave none: looking for it took a third of the start."""


def main() -> None:
    """Run the command; say what to install where the extra is missing."""
    gc.set_threshold(*_SELDOM)
    if sys.argv[1:] == ["--version"]:  # without the time that Typer takes
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
