"""Imports point one way, and what should be cheap to import is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mljobs"

ORDER = [
    "states",
    "errors",
    "problems",
    "types",
    "triggers",
    "overview",
    "codec",
    "guards",
    "declaring",
    "model",
    "dataclass_mixin",
    "events",
    "admin",
    "prepared",
    "bulk",
    "jobs",
    "arrow",
    "transfer",
    "patience",
    "engines",
    "wake",
    "following",
    "run",
    "store",
    "async_store",
    "worker",
    "catalog",
    "schema",
    "contrib",
    "alembic_plugin",
    "demo",
    "cli",
    "__main__",
]
"""A module imports only from those before it; the package's own ``__init__`` is lazy and may name all."""


def _module(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mljobs":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mljobs.")}
    return found & set(ORDER)


def test_every_module_has_its_place_in_the_order() -> None:
    modules = {_module(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert modules == set(ORDER)


def test_imports_only_point_to_earlier_modules() -> None:
    for path in PACKAGE.rglob("*.py"):
        module = _module(path)
        if module == "__init__":
            continue
        for imported in _imports(path) - {module}:
            assert ORDER.index(imported) < ORDER.index(module), f"{path} imports {imported}"


def _loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_or_a_leaf_does_not_load_the_model() -> None:
    assert not {"mljobs.model", "sqlalchemy"} & _loaded_by("import mljobs")
    assert not {"mljobs.model", "sqlalchemy.orm"} & _loaded_by("import mljobs.triggers")


def test_everything_but_the_async_store_works_without_greenlet() -> None:
    statement = (
        "import sys; sys.modules['greenlet'] = None; import mljobs; "
        "[getattr(mljobs, name) for name in mljobs.__all__ if name != 'AsyncJobStore']; import mljobs.schema"
    )
    assert "mljobs.store" in _loaded_by(statement)


def test_every_public_name_is_there_once_and_typed() -> None:
    import mljobs

    for name in mljobs.__all__:
        assert getattr(mljobs, name) is not None
        assert name in dir(mljobs)
    assert (PACKAGE / "py.typed").exists()
    with pytest.raises(AttributeError, match="nothing"):
        mljobs.nothing  # noqa: B018


def test_prepared_statements_hide_no_constant_in_a_parameter() -> None:
    """A partial index serves ``status = 'queued'``, never ``status = $1``."""
    from sqlalchemy.dialects import postgresql, sqlite

    from mljobs import MlJob
    from mljobs.jobs import claiming, exchanging, finishing, sweeping
    from mljobs.prepared import _Compiled

    statements = {
        "postgresql": [
            *(claiming._claim_statement(MlJob, which, 10) for which in ("any", "kinds", "ids")),
            claiming._renewal(MlJob),
            claiming._progress_statement(MlJob),
            *(finishing._finish_statement(MlJob, single) for single in (True, False)),
            *(exchanging._statement(MlJob, "any", 10, single) for single in (True, False)),
            finishing._cancellation(MlJob),
            sweeping._expired(MlJob),
            sweeping._rescue_statement(MlJob),
        ],
        "sqlite": [
            claiming._start_statement(MlJob),
            finishing._outcome_statement(MlJob),
            finishing._cancellation(MlJob),
        ],
    }
    for name, prepared in statements.items():
        dialect = {"postgresql": postgresql.psycopg.dialect, "sqlite": sqlite.dialect}[name]()
        for statement in prepared:
            assert _Compiled(statement._statement(dialect), dialect).fixed == {}
