"""Imports point one way, and what should be cheap to import is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mljobs"

ROOMS = [
    ("states", "errors"),
    ("types",),
    ("guards",),
    ("record",),
    ("db",),
    ("events",),
    ("jobs",),
    ("schema",),
    ("store",),
    ("worker",),
    ("transfer",),
    ("alembic_plugin",),
    ("contrib",),
    ("cli", "__main__"),
]
"""A room imports only from those before it, lazily too; what stands in one line, in the order of the line."""

ORDER = [room for line in ROOMS for room in line]

OLD_DEBTS = {("db/_wake.py", "jobs"), ("store/_store.py", "transfer"), ("store/_async_store.py", "transfer"),
             ("guards/_hooks.py", "record"), ("schema/_catalog.py", "record")}  # fmt: skip
"""Arrows that still run back up."""


def _room(path: Path) -> str:
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
    assert {_room(path) for path in PACKAGE.rglob("*.py")} - {"__init__"} == set(ORDER)


def test_imports_only_point_to_earlier_rooms() -> None:
    wrong = {
        (str(path.relative_to(PACKAGE)), imported)
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"
        for imported in _imports(path) - {_room(path)}
        if ORDER.index(imported) > ORDER.index(_room(path))
    }
    assert wrong <= OLD_DEBTS


def _loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_or_a_leaf_does_not_load_the_model() -> None:
    assert not {"mljobs.record._models", "sqlalchemy"} & _loaded_by("import mljobs")
    assert not {"mljobs.record._models", "sqlalchemy.orm"} & _loaded_by("import mljobs.guards._companions")


def test_everything_but_the_async_store_works_without_greenlet() -> None:
    statement = (
        "import sys; sys.modules['greenlet'] = None; import mljobs; "
        "[getattr(mljobs, name) for name in mljobs.__all__ if name != 'AsyncJobStore']; import mljobs.schema"
    )
    assert "mljobs.store._store" in _loaded_by(statement)


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
    from mljobs.db._prepared import _Compiled
    from mljobs.jobs import _claiming as claiming
    from mljobs.jobs import _exchanging as exchanging
    from mljobs.jobs import _finishing as finishing
    from mljobs.jobs import _sweeping as sweeping

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
