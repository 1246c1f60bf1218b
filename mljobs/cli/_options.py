"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from mljobs.db._engines import DEFAULT_URL, URL_VARIABLE, sync_url

UrlOption = Annotated[
    str,
    typer.Option(
        "--url",
        envvar=URL_VARIABLE,
        help="The database, e.g. postgresql://user@host/db.",
        show_default=True,
    ),
]
DEFAULT = DEFAULT_URL


def shown(url: str) -> str:
    """Return the URL as it may be printed: without the password."""
    return sync_url(url).render_as_string(hide_password=True)
