"""HTML that anybody's text can be put into: characters without a shape are written out, at one place for all pages."""

from __future__ import annotations

from typing import Any, Self

from markupsafe import Markup, escape

from mljobs._printable import printable


class Html(Markup):
    """Markup whose ``format`` and ``join`` write out characters without a shape, beside escaping ``<`` and ``&``."""

    __slots__ = ()

    @classmethod
    def escape(cls, s: Any, /) -> Self:
        """Return a value as HTML; what is HTML already stays as it is."""
        return cls(escape(shown(s)))


def shown(value: Any) -> Any:
    """Return what a template puts into a page instead of a value: its finalizer."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value, kept="\n\t")
    return value


def verbatim(text: str) -> Markup:
    """Return text for the value of a field, which the browser sends back as it was: no character is written out.

    Control characters stand as references, so that the page itself holds none and no line end is changed.
    """
    return Markup(  # noqa: S704 - escaped first
        "".join(c if c.isprintable() or "\x7f" <= c <= "\x9f" else f"&#{ord(c)};" for c in str(escape(text)))
    )
