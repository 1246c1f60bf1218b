"""``op.create_mljobs_overview`` and ``op.drop_mljobs_overview``: the view beside a job table, in a migration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alembic.autogenerate.render import renderers
from alembic.operations import MigrateOperation, Operations
from sqlalchemy import MetaData, Table

from mljobs.alembic_plugin._operations import JobOperation, drop, prefix_of
from mljobs.guards._overview import Overview, OverviewDDL, view_ddl


class _OverviewOperation(JobOperation):
    def __init__(self, overview: Overview, *, schema: str | None = None) -> None:
        self.overview = overview
        self.view_name = self.subject = overview.name
        self.schema = schema

    def ddl(self, dialect_name: str, *, create: bool) -> Sequence[OverviewDDL]:
        return view_ddl(self.overview, dialect_name, create=create)

    def arguments(self) -> str:
        """Return what a migration's text gives."""
        names = (self.view_name, self.overview.jobs.name, self.overview.leases.name)
        schema = [f"schema={str(self.schema)!r}"] if self.schema else []
        return ", ".join([*(repr(str(name)) for name in names), *schema])


def _overview(
    view: str, jobs: str, leases: str, *, schema: str | None, workers: str | None = None, columns: Sequence[str] = ()
) -> Overview:
    """Return the view that these names say."""
    table, held = (Table(name, MetaData(), schema=schema) for name in (jobs, leases))
    seen = None if workers is None else Table(workers, MetaData(), schema=schema)
    return Overview(view, table, held, seen, tuple(columns))


@Operations.register_operation("create_mljobs_overview")
class CreateMljobsOverviewOp(_OverviewOperation):
    """Make the view beside a job table; one of this name is replaced."""

    name = "create_mljobs_overview"

    @classmethod
    def create_mljobs_overview(
        cls,
        operations: Operations,
        view_name: str,
        table_name: str,
        lease_table_name: str,
        *,
        schema: str | None = None,
        workers: str | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        """Make the view beside a job table, for people with a SQL shell; one of this name is replaced.

        Args:
            operations: Alembic's own.
            view_name: What ``__overview_name__`` says.
            table_name: The job table.
            lease_table_name: The table of its leases.
            schema: Where all of them are; None for the default.
            workers: The table of its workers; None: the view does not say where no worker is.
            columns: The host's own columns that the view shows, as ``__overview_columns__`` says.
        """
        operations.invoke(
            cls(
                _overview(view_name, table_name, lease_table_name, schema=schema, workers=workers, columns=columns),
                schema=schema,
            )
        )

    def arguments(self) -> str:
        """Return what a migration's text gives."""
        found = [super().arguments()]
        if self.overview.workers is not None:
            found.append(f"workers={str(self.overview.workers.name)!r}")
        if self.overview.columns:
            found.append(f"columns={[str(name) for name in self.overview.columns]!r}")
        return ", ".join(found)

    def reverse(self) -> MigrateOperation:
        """Return the way back."""
        return DropMljobsOverviewOp(self.overview, schema=self.schema)


@Operations.register_operation("drop_mljobs_overview")
class DropMljobsOverviewOp(_OverviewOperation):
    """Drop the view beside a job table."""

    name = "drop_mljobs_overview"

    @classmethod
    def drop_mljobs_overview(
        cls,
        operations: Operations,
        view_name: str,
        table_name: str,
        lease_table_name: str,
        *,
        schema: str | None = None,
    ) -> None:
        """Drop the view beside a job table, before the table is dropped or rebuilt; what is not there is no error.

        Args:
            operations: Alembic's own.
            view_name: What ``__overview_name__`` says.
            table_name: The job table.
            lease_table_name: The table of its leases.
            schema: Where all three are; None for the default.
        """
        operations.invoke(cls(_overview(view_name, table_name, lease_table_name, schema=schema), schema=schema))

    def reverse(self) -> MigrateOperation:
        """Return the way back."""
        return CreateMljobsOverviewOp(self.overview, schema=self.schema)


@Operations.implementation_for(CreateMljobsOverviewOp)
def _create(operations: Operations, operation: CreateMljobsOverviewOp) -> None:
    dialect = operations.get_context().dialect.name
    for statement in (*operation.statements(dialect, create=False), *operation.statements(dialect, create=True)):
        operations.execute(statement)


Operations.implementation_for(DropMljobsOverviewOp)(drop)


@renderers.dispatch_for(CreateMljobsOverviewOp)
@renderers.dispatch_for(DropMljobsOverviewOp)
def _render(context: Any, operation: _OverviewOperation) -> str:
    return f"{prefix_of(context)}{operation.name}({operation.arguments()})"
