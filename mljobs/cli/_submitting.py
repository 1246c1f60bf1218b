"""``submit``: queue a job."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mljobs.cli import _output as output
from mljobs.cli._options import JsonOption, spec_text, time_option
from mljobs.cli._settings import job_class, open_store


def submit(
    kind: Annotated[str, typer.Argument(help="What to do, e.g. train.")],
    target: Annotated[str, typer.Argument(help="What to do it on.")],
    *,
    spec: Annotated[str | None, typer.Option(help="JSON, @FILE, or - for standard input.", show_default=False)] = None,
    priority: Annotated[int, typer.Option(help="Higher is claimed first.")] = 0,
    run_after: Annotated[
        str | None, typer.Option(help="Not before: a span such as 2h, or a time.", show_default=False)
    ] = None,
    exclusive: Annotated[bool, typer.Option("--exclusive", help="Never two such at once on one target.")] = False,
    unless_active: Annotated[
        bool, typer.Option("--unless-active", help="Not if such a job waits or runs; then that one is printed.")
    ] = False,
    column: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A column of your own class; may be given again."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow it until it has finished.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Queue a job, and print its id.

    \b
    Example:
      $ mljobs submit train spam --spec '{"lr": 0.1}' --watch
      $ mljobs submit backfill embeddings --spec @spec.json --run-after 2h --unless-active
    """
    values = _own_values(column or [])
    text = spec_text(spec)
    if text is not None:
        values["spec_json"] = text
    with open_store() as store:
        job = store.submit(
            kind,
            target,
            priority=priority,
            run_after=time_option("--run-after", run_after),
            exclusive=exclusive,
            unless_active=unless_active,
            **values,
        )
        if as_json:
            output.print_json([output.job_object(job)])
        else:
            typer.echo(str(job.id))
        if watch:
            from mljobs.cli._following import follow  # noqa: PLC0415 - seldom needed

            raise typer.Exit(follow(store, [job.id]))


def _own_values(pairs: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not hasattr(job_class(), name):
            raise typer.BadParameter(f"--set: expected NAME=VALUE with a column of the class, not {pair!r}")
        values[name] = _typed(getattr(job_class(), name), value)
    return values


def _typed(column: Any, value: str) -> Any:
    """Return text as the Python type of a column."""
    python = column.type.python_type
    if python is bool:
        return value.lower() in ("true", "yes", "1")
    try:
        return getattr(python, "fromisoformat", python)(value)
    except ValueError as error:
        raise typer.BadParameter(f"--set: {column.key} is a {python.__name__}, not {value!r}") from error
