"""``mljobs demo``: run a real training job, then show that the database refuses to change it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import text
from sqlalchemy.orm import Session

from mljobs import schema
from mljobs.cli import _training as training
from mljobs.cli._settings import settings
from mljobs.errors import TerminalStateError
from mljobs.record._models import MlJob
from mljobs.states import MlJobKind
from mljobs.store._store import JobStore


def demo() -> None:
    """Train a real classifier as a job, then try to change the finished record, and see it refused.

    \b
    Example:
      $ mljobs demo
    """
    url = settings().url
    console = Console(highlight=False)
    training.Training(training.SPEC)  # first of all: is scikit-learn here?
    console.print(f"[bold]1.[/] The tables in {settings().shown}: mljobs upgrade")
    schema.upgrade(url)
    with JobStore(url) as store:
        job = store.submit(MlJobKind.TRAIN, training.TARGET, training.SPEC)
        console.print(f"[bold]2.[/] Submitted job {job.id}: {job.kind} {job.target_name}, {job.status}")
        _train(console, store, job)
        job = store.wait(job.id, timeout=10)
        console.print("[bold]3.[/] What an operator sees: SELECT * FROM ml_jobs")
        console.print(_row(store, job))
        console.print("[bold]4.[/] A finished job never changes")
        _refusals(console, store, job)
        console.print("[bold]5.[/] The record for a KV store, as RedDB writes it")
        raw = job.to_json()
        console.print(raw, soft_wrap=True, markup=False)
        again = MlJob.from_json(raw)
        if again.to_json() != raw or again.id != job.id:
            raise AssertionError("the record did not survive the way to JSON and back")
        console.print("   decoded back: equal, byte for byte")


def _train(console: Console, store: JobStore, job: MlJob) -> None:
    columns = (
        TextColumn("   training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs  loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:.4f}"),
        TimeElapsedColumn(),
    )
    with store.running(job) as run:
        work = training.Training(run.spec)
        with Progress(*columns, console=console) as bars:
            bar = bars.add_task("training", total=len(work), loss=float("nan"), accuracy=float("nan"))
            for epoch in run.track(work, total=len(work)):
                bars.update(bar, completed=epoch.number, loss=epoch.loss, accuracy=epoch.accuracy)
        run.metrics = work.metrics()


def _row(store: JobStore, job: MlJob) -> Table:
    table = Table("column", "value", show_edge=False, pad_edge=False)
    as_text = job.id.hex if store.engine.dialect.name == "sqlite" else str(job.id)
    with store.engine.connect() as connection:
        row: Any = connection.execute(text("SELECT * FROM ml_jobs WHERE id = :id"), {"id": as_text}).mappings().one()
    for column, value in row.items():
        table.add_row(column, "" if value is None else str(value))
    return table


def _refusals(console: Console, store: JobStore, job: MlJob) -> None:
    def tell(what: str, error: TerminalStateError) -> None:
        console.print(f"   {what}", markup=False)
        console.print(f"   [red]{type(error).__name__}[/]: {error}")

    try:
        with Session(store.engine) as session, session.begin():
            found = session.get_one(MlJob, job.id)
            found.progress = 50
    except TerminalStateError as error:
        tell("job.progress = 50; session.commit()", error)
    else:
        raise AssertionError("the ORM changed a finished job")
    statement = "UPDATE ml_jobs SET status = 'queued'"
    try:
        with store.engine.begin() as connection:
            connection.execute(text(statement))
    except TerminalStateError as error:
        tell(statement, error)
    else:
        raise AssertionError("raw SQL changed a finished job")
