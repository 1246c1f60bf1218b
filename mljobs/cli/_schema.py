"""``upgrade``, ``downgrade``, ``current``, ``verify``, ``stamp``: the tables in a database."""

from __future__ import annotations

from typing import Annotated

import typer

from mljobs.cli._settings import job_class, settings


def upgrade(revision: Annotated[str, typer.Argument(help="How far.")] = "head") -> None:
    """Bring the tables up to date; make them where there are none.

    \b
    Example:
      $ mljobs upgrade --url postgresql://me@localhost/ml
    """
    _refuse_own_class("upgrade")
    from mljobs import schema  # noqa: PLC0415 - loads SQLAlchemy

    target = settings().located
    schema.upgrade(target, revision)
    typer.echo(f"{settings().shown} is at {schema.current(target)}")


def downgrade(
    revision: Annotated[str, typer.Argument(help="How far back; base drops the tables.")] = "base",
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Take the tables back to an earlier version; base drops them, finished records included.

    \b
    Example:
      $ mljobs downgrade base
    """
    _refuse_own_class("downgrade")
    from mljobs import schema  # noqa: PLC0415 - loads SQLAlchemy

    if not yes:
        typer.confirm(f"Take {settings().shown} back to {revision}? Records may be lost", abort=True)
    target = settings().located
    schema.downgrade(target, revision)
    typer.echo(f"{settings().shown} is at {schema.current(target) or 'base'}")


def current() -> None:
    """Say which version the tables are at, and which one this release makes.

    \b
    Example:
      $ mljobs current
    """
    from mljobs import schema  # noqa: PLC0415 - loads SQLAlchemy
    from mljobs.errors import SchemaError  # noqa: PLC0415 - loads SQLAlchemy

    target, known = settings().located, job_class()
    version = schema.current(target)
    if version == schema.head():
        typer.echo(f"{version} (up to date)")
        return
    if version is None:
        try:
            schema.ready(target, model=known)
        except SchemaError:
            version = "no tables"
        else:
            version = "tables whose version your own migrations keep"
    typer.echo(f"{version} (this release: {schema.head()})")


def verify() -> None:
    """Check tables, columns, indexes and the body of every trigger; exit with 1 and say what differs.

    With --model the table of your own class, whatever made it.

    \b
    Example:
      $ mljobs verify --model app.models:TrainingRun
    """
    from mljobs import schema  # noqa: PLC0415 - loads SQLAlchemy

    metadata = None if settings().model is None else job_class().metadata
    schema.verify(settings().located, metadata=metadata)
    typer.echo(f"{settings().shown}: the schema is what this release expects, and the guard stands")


def stamp(revision: Annotated[str, typer.Argument(help="What the tables are.")] = "head") -> None:
    """Say that the tables, made by other means, are those of a version; verify them first.

    \b
    Example:
      $ mljobs stamp head
    """
    _refuse_own_class("stamp")
    from mljobs import schema  # noqa: PLC0415 - loads SQLAlchemy

    target = settings().located
    schema.stamp(target, revision)
    typer.echo(f"{settings().shown} is at {schema.current(target)}")


def _refuse_own_class(command: str) -> None:
    """Refuse to migrate a host's own class: its table is made by the host's migrations.

    Raises:
        InvalidValueError: ``--model`` is given.
    """
    from mljobs.errors import InvalidValueError  # noqa: PLC0415 - loads SQLAlchemy

    model = settings().model
    if model is not None:
        reason = f"its table belongs to your own migrations: alembic {command}, or leave --model out for ml_jobs"
        raise InvalidValueError("model", model, reason)
