"""Text without what a terminal, a log or a page would obey."""

from __future__ import annotations


def printable(text: str, kept: str = "") -> str:
    r"""Return text with each character that has no shape written out: ``\x1b[31m`` instead of a colour.

    Args:
        text: Anybody's.
        kept: Characters without a shape that stay: line feeds, where text may have several lines.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode("ascii") for c in text)
