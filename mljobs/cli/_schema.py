"""``upgrade``, ``downgrade``, ``current``, ``verify``, ``stamp``: the tables in a database."""

from __future__ import annotations

from typing import Annotated

import typer

from mljobs import schema
from mljobs.cli._options import DEFAULT, UrlOption, shown


def add_to(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (upgrade, downgrade, current, verify, stamp):
        app.command()(command)


def upgrade(
    url: UrlOption = DEFAULT,
    revision: Annotated[str, typer.Argument(help="How far.")] = "head",
) -> None:
    """Bring the tables up to date; make them where there are none."""
    schema.upgrade(url, revision)
    typer.echo(f"{shown(url)} is at {schema.current(url)}")


def downgrade(
    url: UrlOption = DEFAULT,
    revision: Annotated[str, typer.Argument(help="How far back; base drops the tables.")] = "base",
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Take the tables back to an earlier version; base drops them, finished records included."""
    if not yes:
        typer.confirm(f"Take {shown(url)} back to {revision}? Records may be lost", abort=True)
    schema.downgrade(url, revision)
    typer.echo(f"{shown(url)} is at {schema.current(url) or 'base'}")


def current(url: UrlOption = DEFAULT) -> None:
    """Say which version the tables are at, and which one this release makes."""
    version = schema.current(url)
    if version == schema.head():
        typer.echo(f"{version} (up to date)")
    else:
        typer.echo(f"{version or 'no tables'} (this release: {schema.head()})")


def verify(url: UrlOption = DEFAULT) -> None:
    """Check tables, columns, indexes and the body of every trigger; exit with 1 and say what differs."""
    schema.verify(url)
    typer.echo(f"{shown(url)}: the schema is what this release expects, and the guard stands")


def stamp(
    url: UrlOption = DEFAULT,
    revision: Annotated[str, typer.Argument(help="What the tables are.")] = "head",
) -> None:
    """Say that the tables, made by other means, are those of a version; verify them first."""
    schema.stamp(url, revision)
    typer.echo(f"{shown(url)} is at {schema.current(url)}")
