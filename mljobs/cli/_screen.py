"""Lines of a terminal that are drawn again in the same place."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from typing import Self

_HIDE, _SHOW = "\x1b[?25l", "\x1b[?25h"


class Screen:
    """Draws lines over those of the time before.

    Args:
        live: Whether there is a terminal to draw on; without one nothing is written.
    """

    def __init__(self, *, live: bool) -> None:
        self._live = live
        self._drawn = 0

    def draw(self, lines: Callable[[int, int], list[str]]) -> None:
        """Draw what ``lines`` returns for a screen of so many columns and rows."""
        if not self._live:
            return
        size = shutil.get_terminal_size((80, 24))
        shown = lines(size.columns - 1, size.lines)[: size.lines - 1]
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        # Each line is cleared behind its text, and what is left of a longer drawing below the last.
        text = "".join(f"{line}\x1b[K\n" for line in shown)
        sys.stdout.write(f"{up}\r{text}\x1b[J")
        sys.stdout.flush()
        self._drawn = len(shown)

    def keep(self) -> None:
        """Leave on the screen what was drawn last."""
        self._drawn = 0

    def __enter__(self) -> Self:
        if self._live:
            sys.stdout.write(_HIDE)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            sys.stdout.write(_SHOW)
            sys.stdout.flush()
