"""Collect garbage seldom while modules are imported: they leave none, and it took a third of the start."""

from __future__ import annotations

import gc
from typing import Final

_USUAL: Final = gc.get_threshold()


def collect_seldom() -> None:
    """Look for garbage after 100,000 new objects, not after 700."""
    gc.set_threshold(100_000, 50, 50)


def collect_as_usual() -> None:
    """Go back to what Python does; for what runs for long."""
    gc.set_threshold(*_USUAL)
