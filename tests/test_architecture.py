"""Imports point one way, and what should be cheap to import is."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.cases import case

PACKAGE = Path(__file__).parent.parent / "mljobs"

ROOMS = [
    ("_lazy", "_logging", "_printable", "states", "errors", "_values", "_fields"),
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
    ("testing",),
    ("board",),
    ("cli", "__main__"),
]
"""A room imports only from those before it, lazily too; what stands in one line, in the order of the line."""

ORDER = [room for line in ROOMS for room in line]

EXCEPTION = ("store._transferring", "transfer")
"""The one arrow that runs back down: methods of the stores that look up an operation when it is first asked for."""


def _module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_module(path): path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _room(module: str) -> str:
    return module.partition(".")[0]


@cache
def _imports(module: str) -> set[str]:
    """Return what a module of ours imports of ours, lazily and for type checkers too."""
    found = set()
    for node in ast.walk(_tree(MODULES[module])):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found |= {submodule if submodule.removeprefix("mljobs.") in MODULES else str(node.module)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and "import_module" in str(
            getattr(node.func, "attr", getattr(node.func, "id", ""))
        ):
            found |= {ast.unparse(node.args[0]).strip("'\"")}
    return {name.removeprefix("mljobs.") for name in found if name.startswith("mljobs.")} & MODULES.keys()


def test_every_module_has_its_place_in_the_order() -> None:
    assert {_room(module) for module in MODULES} == set(ORDER)


def test_imports_only_point_to_earlier_rooms() -> None:
    wrong = {
        (module, imported)
        for module in MODULES
        for imported in _imports(module)
        if ORDER.index(_room(imported)) > ORDER.index(_room(module)) and (module, _room(imported)) != EXCEPTION
    }
    assert wrong == set()


def test_the_files_of_a_room_have_an_order() -> None:
    """Each imports only from those before it; the room itself, which names what is public, comes last."""
    for room in ORDER:
        inside = {
            module: {imported for imported in _imports(module) - {module, room} if _room(imported) == room}
            for module in MODULES
            if _room(module) == room
        }
        with case(room):
            assert list(TopologicalSorter(inside).static_order())  # CycleError names a circle
            assert [module for module in inside if module != room and room in _imports(module)] == []


def _loaded_by(*statements: str) -> list[set[str]]:
    """Run statements in one new process; return for each what has been loaded after it."""
    code = "".join(f"{statement}\nprint(' '.join(sys.modules))\n" for statement in statements)
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_importing_the_package_or_a_leaf_does_not_load_the_model_nor_a_store_the_worker_and_transfer() -> None:
    package, leaf, both = _loaded_by(
        "import mljobs", "import mljobs.guards._companions", "from mljobs import AsyncJobStore, JobStore"
    )
    assert not {"mljobs.record._models", "sqlalchemy"} & package
    assert not {"mljobs.record._models", "sqlalchemy.orm"} & leaf
    assert {"mljobs.store._store", "mljobs.store._async_store"} <= both
    assert not [module for module in both if module.startswith(("mljobs.worker", "mljobs.transfer", "pyarrow"))]


def test_everything_but_the_async_store_works_without_greenlet() -> None:
    statement = (
        "import sys; sys.modules['greenlet'] = None; import mljobs; "
        "[getattr(mljobs, name) for name in mljobs.__all__ if name != 'AsyncJobStore']; import mljobs.schema"
    )
    (loaded,) = _loaded_by(statement)
    assert "mljobs.store._store" in loaded


def test_every_public_name_is_there_once_and_typed() -> None:
    import mljobs

    for name in mljobs.__all__:
        assert getattr(mljobs, name) is not None
        assert name in dir(mljobs)
    assert (PACKAGE / "py.typed").exists()
    with pytest.raises(AttributeError, match="nothing"):
        mljobs.nothing  # noqa: B018


@pytest.mark.parametrize(("folder", "lines"), [("mljobs", 450), ("tests", 800)])
def test_no_file_is_longer_than_can_be_read_at_once(folder: str, lines: int) -> None:
    sizes = {path: path.read_text().count("\n") for path in (PACKAGE.parent / folder).rglob("*.py")}
    assert {str(path): size for path, size in sizes.items() if size > lines} == {}


def test_no_function_is_longer_than_sixty_lines() -> None:
    functions = {
        f"{path.name}:{node.name}": node.end_lineno - node.lineno + 1
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }
    assert {name: lines for name, lines in functions.items() if lines > 60} == {}
