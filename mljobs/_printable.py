"""Text for people: control characters escaped; and spans of time."""

from __future__ import annotations

from datetime import timedelta

_UNITS = (("d", 86_400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1))


def printable(text: str, kept: str = "") -> str:
    r"""Return text with each character that has no shape written out: ``\x1b[31m`` instead of a colour.

    Args:
        text: Anybody's.
        kept: Characters without a shape that stay: line feeds, where text may have several lines.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode("ascii") for c in text)


def span_text(seconds: float | timedelta, gap: str = "", *, days_from: int = 1) -> str:
    """Return a span of time: ``0.4s``, ``12s``, ``4m10s``, ``2h05m``, ``3d04h``; never below zero, for clocks are set.

    Args:
        seconds: How long.
        gap: Stands between the numbers and units: with a space it is ``4 m 10 s``.
        days_from: A span of so many days or more is written in days.
    """
    left = max(0.0, seconds.total_seconds() if isinstance(seconds, timedelta) else seconds)
    if left < 10:
        return f"{left:.1f}{gap}s"
    whole = round(left)
    for unit, size, smaller, part in _UNITS:
        if whole >= size * (days_from if unit == "d" else 1):
            return f"{whole // size}{gap}{unit}{gap}{whole % size // part:02}{gap}{smaller}"
    return f"{whole}{gap}s"
