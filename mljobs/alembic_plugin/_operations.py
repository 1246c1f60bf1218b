"""``op.create_mljobs_guard`` and ``op.drop_mljobs_guard``: the companions of a job table, as operations of a migration."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from alembic.autogenerate.render import renderers
from alembic.operations import MigrateOperation, Operations, ops
from sqlalchemy import Constraint, MetaData, Table

from mljobs.errors import InvalidValueError
from mljobs.guards._companions import GUARD_VERSION, companion_ddl, without_parameters


class JobOperation(MigrateOperation):
    """An operation of ours on a job table.

    Attributes:
        name: What it is called after ``op.`` in a migration.
        subject: The name of the table or view.
        schema: Where that is; None for the default.
    """

    name: str
    subject: str
    schema: str | None

    def statements(self, dialect_name: str, *, create: bool) -> Sequence[Any]:
        """Return the DDL for a dialect.

        Raises:
            InvalidValueError: mljobs does not know the dialect.
        """
        found = self.ddl(dialect_name, create=create)
        if not found:
            raise InvalidValueError("dialect", dialect_name, "mljobs knows postgresql and sqlite")
        return found

    def ddl(self, dialect_name: str, *, create: bool) -> Sequence[Any]:
        """Return the DDL for a dialect; none for an unknown one."""
        raise NotImplementedError

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return how ``alembic check`` and ``compare_metadata`` tell it."""
        return (self.name, self.subject, self.schema)


class _GuardOperation(JobOperation):
    def __init__(
        self,
        table_name: str,
        *,
        schema: str | None = None,
        kinds: Sequence[str] = (),
        with_rowid: bool = True,
        version: int = GUARD_VERSION,
    ) -> None:
        if version != GUARD_VERSION:
            reason = f"this release of mljobs makes version {GUARD_VERSION}; install the one that wrote the migration"
            raise InvalidValueError("version", version, reason)
        self.table_name = self.subject = table_name
        self.schema = schema
        self.kinds = _tokens(kinds)
        self.with_rowid = with_rowid
        self.version = version

    def arguments(self) -> dict[str, Any]:
        """Return what was given beside the table's name."""
        return {
            "schema": self.schema,
            "kinds": self.kinds,
            "with_rowid": self.with_rowid,
            "version": self.version,
        }

    def ddl(self, dialect_name: str, *, create: bool) -> Sequence[Any]:
        table = Table(self.table_name, MetaData(), schema=self.schema, sqlite_with_rowid=self.with_rowid)
        return companion_ddl(table, dialect_name, create=create, kinds=self.kinds)


def _tokens(kinds: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(kinds, Collection) or isinstance(kinds, str) or not all(isinstance(kind, str) for kind in kinds):
        raise InvalidValueError("kinds", kinds, "expected the tokens of the column kind, as a list")
    return tuple(str(kind) for kind in kinds)


@Operations.register_operation("create_mljobs_guard")
class CreateMljobsGuardOp(_GuardOperation):
    """Put up the guard of a job table, and what else stands beside it; one that stands is replaced.

    Attributes:
        previous: What stood before, where this replaces it: the way back leads there.
    """

    name = "create_mljobs_guard"
    previous: CreateMljobsGuardOp | None = None

    @classmethod
    def create_mljobs_guard(
        cls,
        operations: Operations,
        table_name: str,
        *,
        schema: str | None = None,
        kinds: Sequence[str],
        with_rowid: bool = True,
        version: int = GUARD_VERSION,
    ) -> None:
        """Put up the guard of a job table: the triggers, and on SQLite the counters; one that stands is replaced.

        Args:
            operations: Alembic's own.
            table_name: The job table.
            schema: Where it is; None for the default.
            kinds: The tokens of its column ``kind``.
            with_rowid: False for a SQLite table WITHOUT ROWID.
            version: Of the guard's text; a later release still makes it.
        """
        operation = cls(table_name, schema=schema, kinds=kinds, with_rowid=with_rowid, version=version)
        if not operation.kinds:
            raise InvalidValueError("kinds", kinds, "expected the tokens of the column kind, one at least")
        operations.invoke(operation)

    def reverse(self) -> MigrateOperation:
        """Return the way back."""
        if self.previous is None:
            return DropMljobsGuardOp(self.table_name, **self.arguments())
        back = CreateMljobsGuardOp(self.previous.table_name, **self.previous.arguments())
        back.previous = self
        return back


@Operations.register_operation("drop_mljobs_guard")
class DropMljobsGuardOp(_GuardOperation):
    """Take down what stands beside a job table."""

    name = "drop_mljobs_guard"

    @classmethod
    def drop_mljobs_guard(
        cls,
        operations: Operations,
        table_name: str,
        *,
        schema: str | None = None,
    ) -> None:
        """Take down the guard of a job table and all that stands beside it; what is not there is no error.

        Args:
            operations: Alembic's own.
            table_name: The job table, which still stands: PostgreSQL drops a trigger only with its table named.
            schema: Where it is; None for the default.
        """
        operations.invoke(cls(table_name, schema=schema))

    def reverse(self) -> MigrateOperation:
        """Return the way back."""
        return CreateMljobsGuardOp(self.table_name, **self.arguments())


@Operations.implementation_for(CreateMljobsGuardOp)
def _create(operations: Operations, operation: CreateMljobsGuardOp) -> None:
    dialect = operations.get_context().dialect.name
    old = [drop for drop in operation.statements(dialect, create=False) if not drop.text.startswith("DROP FUNCTION")]
    for statement in [*old, *operation.statements(dialect, create=True)]:  # CREATE OR REPLACE FUNCTION
        operations.execute(statement)


@Operations.implementation_for(DropMljobsGuardOp)
def drop(operations: Operations, operation: JobOperation) -> None:
    """Run an operation that drops."""
    for statement in operation.statements(operations.get_context().dialect.name, create=False):
        operations.execute(statement)


@renderers.dispatch_for(CreateMljobsGuardOp)
def _render_create(context: Any, operation: CreateMljobsGuardOp) -> str:
    arguments = [f"{str(operation.table_name)!r}"]
    arguments += [f"schema={str(operation.schema)!r}"] if operation.schema else []
    arguments += [f"kinds={list(operation.kinds)!r}", f"version={operation.version}"]
    arguments += [] if operation.with_rowid else ["with_rowid=False"]
    return f"{prefix_of(context)}create_mljobs_guard({', '.join(arguments)})"


@renderers.dispatch_for(DropMljobsGuardOp)
def _render_drop(context: Any, operation: DropMljobsGuardOp) -> str:
    schema = f", schema={str(operation.schema)!r}" if operation.schema else ""
    return f"{prefix_of(context)}drop_mljobs_guard({str(operation.table_name)!r}{schema})"


class CreateJobCheckOp(ops.CreateCheckConstraintOp):
    """Alembic's own operation; of a class of its own, because Alembic before 1.19 cannot write it."""

    def reverse(self) -> DropJobCheckOp:
        """Return the way back."""
        return DropJobCheckOp(self)


class DropJobCheckOp(ops.DropConstraintOp):
    """Alembic's own operation, with a way back that Alembic can write."""

    def __init__(self, create: CreateJobCheckOp) -> None:
        super().__init__(create.constraint_name, create.table_name, "check", schema=create.schema)
        self.create = create

    def reverse(self) -> CreateJobCheckOp:
        """Return the way back."""
        return self.create

    def to_constraint(self) -> Constraint:
        """Return what is dropped."""
        return self.create.to_constraint()


@renderers.dispatch_for(CreateJobCheckOp)
def _render_check(context: Any, operation: CreateJobCheckOp) -> str:
    in_batch: bool = context._has_batch  # noqa: SLF001 - as Alembic's own renderers ask it
    prefix = "batch_op." if in_batch else str(context.opts["alembic_module_prefix"] or "")
    arguments = [f"{prefix}f({str(operation.constraint_name)!r})"]
    arguments += [] if in_batch else [repr(str(operation.table_name))]
    arguments += [repr(without_parameters(str(operation.condition)))]
    arguments += [f"schema={str(operation.schema)!r}"] if operation.schema and not in_batch else []
    return f"{prefix}create_check_constraint({', '.join(arguments)})"


def prefix_of(context: Any) -> str:
    """Return what stands before an operation in a migration's text, and import what registers ours."""
    # The import registers the operations: a migration then runs with an Alembic too old for plugins as well.
    context.imports.add("import mljobs.alembic_plugin")
    return str(context.opts["alembic_module_prefix"] or "")
