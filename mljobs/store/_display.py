"""Progress of jobs that are followed: in a notebook, on a terminal, or as lines in a file."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final, TextIO

from mljobs._printable import printable
from mljobs.record._html import rows_html, status_html
from mljobs.store._outcomes import Followed, Snapshot

_RUNNING_SHOWN: Final = 8
_ROWS_SHOWN: Final = 100
_BAR: Final = 24
_NUMBERS_SHOWN: Final = 4
_EVERY: Final = 0.2
"""Seconds between two pictures in a notebook, whose page is redrawn by each."""


class Display:
    """A display that shows nothing; the others inherit from it."""

    def show(self, snapshot: Snapshot) -> None:
        """Show how far the jobs are."""

    def end(self, followed: Followed[Any]) -> None:
        """Show what became of the jobs, as a table."""

    def close(self) -> None:
        """Leave the terminal as it was before, also after an error."""


def display_for(file: TextIO | None, *, show: bool) -> Display:
    """Return the display for a notebook, a terminal or a file.

    Args:
        file: Where to write; None for a notebook's cell, or else standard error.
        show: Whether to show anything.
    """
    if not show:
        return Display()
    if file is None and _in_notebook():
        return Notebook()
    out = sys.stderr if file is None else file
    if not out.isatty():
        return Lines(out)
    return RichTerminal(out) if importlib.util.find_spec("rich") is not None else Terminal(out)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None


class Notebook(Display):
    """The output of a cell, replaced as the jobs go on."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown = 0.0

    def show(self, snapshot: Snapshot) -> None:
        """See ``Display``."""
        if snapshot.done < snapshot.total and time.monotonic() - self._shown < _EVERY:
            return
        self._shown = time.monotonic()
        rows = [
            [
                escape(job.target_name),
                f"<progress max='100' value='{job.progress}'></progress> {job.progress}%",
                escape(_numbers(job.metrics)),
            ]
            for job in snapshot.running[:_RUNNING_SHOWN]
        ]
        share = f"<progress max='{max(snapshot.total, 1)}' value='{snapshot.done}' style='width:24em'></progress>"
        table = rows_html(_TITLES, rows) if rows else ""
        self._put(f"<p>{share} {escape(str(snapshot))}, {_clock(snapshot.seconds)}</p>{table}")

    def end(self, followed: Followed[Any]) -> None:
        """See ``Display``."""
        titles, rows = followed.table()
        at = titles.index("status")
        cells = [
            [status_html(value) if place == at else escape(value) for place, value in enumerate(row)]
            for row in rows[:_ROWS_SHOWN]
        ]
        self._put(f"<p>{escape(_ended(followed))}</p>{rows_html(titles, cells)}<p>{escape(_left_out(rows))}</p>")

    def _put(self, html: str) -> None:
        ipython: Any = importlib.import_module("IPython.display")  # it is there in a notebook
        if self._handle is None:
            self._handle = ipython.display(ipython.HTML(html), display_id=True)
        else:
            self._handle.update(ipython.HTML(html))


class Lines(Display):
    """A line whenever the states have changed: for logs and pipes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._last = ""

    def show(self, snapshot: Snapshot) -> None:
        """See ``Display``."""
        if str(snapshot) != self._last:
            self._last = str(snapshot)
            self._out.write(f"{self._last}\n")
            self._out.flush()

    def end(self, followed: Followed[Any]) -> None:
        """See ``Display``."""
        titles, rows = followed.table()
        lines = table_lines(titles, rows[:_ROWS_SHOWN])
        self._out.write("\n".join([*lines, _left_out(rows)]).rstrip() + "\n")
        self._out.flush()


class Terminal(Lines):
    """One line that is written over."""

    def show(self, snapshot: Snapshot) -> None:
        """See ``Display``."""
        self._clear()
        width = shutil.get_terminal_size().columns - 1
        self._last = f"{_bar(snapshot)} {snapshot}, {_clock(snapshot.seconds)}"[:width]
        self._out.write(self._last)
        self._out.flush()

    def end(self, followed: Followed[Any]) -> None:
        """See ``Display``."""
        self._clear()
        self._out.write(_ended(followed) + "\n")
        super().end(followed)

    def close(self) -> None:
        """See ``Display``."""
        self._clear()
        self._out.flush()

    def _clear(self) -> None:
        self._out.write("\r" + " " * len(self._last) + "\r")
        self._last = ""


class RichTerminal(Lines):
    """A bar, and a line for each job that runs, by rich."""

    def __init__(self, out: TextIO) -> None:
        super().__init__(out)
        from rich.console import Console  # noqa: PLC0415 - optional
        from rich.live import Live  # noqa: PLC0415

        self._live: Any = Live(console=Console(file=out), transient=True, refresh_per_second=4)
        self._live.start()

    def show(self, snapshot: Snapshot) -> None:
        """See ``Display``."""
        from rich.text import Text  # noqa: PLC0415 - optional

        lines = [f"{_bar(snapshot)} {snapshot}, {_clock(snapshot.seconds)}"]
        lines += [
            f"  {printable(job.target_name)}  {job.progress}%  {_numbers(job.metrics)}"
            for job in snapshot.running[:_RUNNING_SHOWN]
        ]
        self._live.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"))  # no markup: names are users'

    def end(self, followed: Followed[Any]) -> None:
        """See ``Display``."""
        self._live.stop()
        self._out.write(_ended(followed) + "\n")
        super().end(followed)

    def close(self) -> None:
        """See ``Display``."""
        self._live.stop()


_TITLES: Final = ("running", "progress", "latest metrics")


def _numbers(metrics: Mapping[str, int | float]) -> str:
    return printable("  ".join(f"{key} {value:.6g}" for key, value in list(metrics.items())[:_NUMBERS_SHOWN]))


def _bar(snapshot: Snapshot) -> str:
    full = _BAR * snapshot.done // max(snapshot.total, 1)
    return f"[{'#' * full}{'.' * (_BAR - full)}]"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _ended(followed: Followed[Any]) -> str:
    how = "" if followed.complete else "not all have finished; "
    return f"{how}{Snapshot(followed.counts)}, {_clock(followed.seconds)}"


def _left_out(rows: Sequence[object]) -> str:
    return f"and {len(rows) - _ROWS_SHOWN:,} more" if len(rows) > _ROWS_SHOWN else ""


def table_lines(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines of text."""
    cells = [[printable(cell) for cell in row] for row in (titles, *rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(titles))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
