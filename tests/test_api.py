"""``docs/api.md`` names what a host imports, and what docstrings refer to is there."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import mljobs
from mljobs import AsyncJobStore, JobStore, Run, Worker

ROOT = Path(__file__).parent.parent
INTERNAL = {"mljobs.contrib", "mljobs.db", "mljobs.record", "mljobs.store", "mljobs.worker"}
"""Rooms from whose modules nothing is imported; what is public of them is named in ``mljobs``."""
PUBLIC = {
    "mljobs",
    *(
        module.name
        for module in pkgutil.walk_packages(mljobs.__path__, "mljobs.")
        if not any(part.startswith("_") for part in module.name.split("."))
    ),
} - INTERNAL
SECTIONS = dict(
    re.findall(r"^## `([\w.]+)`\n(.*?)(?=^## |\Z)", (ROOT / "docs/api.md").read_text(), re.MULTILINE | re.DOTALL)
)
OWNERS: dict[str, Any] = {"store": JobStore, "AsyncJobStore": AsyncJobStore, "run": Run, "worker": Worker}


def _names(module: str) -> set[str]:
    found = importlib.import_module(module)
    listed = getattr(found, "__all__", None)
    if listed is not None:
        return set(listed)
    own = {name for name, value in vars(found).items() if getattr(value, "__module__", None) == module}
    return {name for name in own if not name.startswith("_")}


def test_the_page_has_a_section_for_each_public_module() -> None:
    assert SECTIONS.keys() == PUBLIC


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_a_section_names_what_its_module_has(module: str) -> None:
    assert set(re.findall(r"`(\w+)`", SECTIONS[module].strip().partition("\n\n")[2])) == _names(module)


def _docstrings() -> Iterator[tuple[str, str]]:
    for path in (ROOT / "mljobs").rglob("*.py"):
        for node in _blocks(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'module')}", text


def _blocks(node: Any) -> Iterator[Any]:
    """Yield what has statements, but no expressions, which are nine tenths of a tree."""
    yield node
    for part in ("body", "orelse", "finalbody", "handlers", "cases"):
        for statement in getattr(node, part, ()):
            if hasattr(statement, "body"):
                yield from _blocks(statement)


@cache
def _exists(dotted: str) -> bool:
    first, _, rest = dotted.partition(".")
    found: Any = OWNERS.get(first)
    parts = rest.split(".") if found is not None else dotted.split(".")
    if found is None:
        found, parts = _longest_module(parts if first == "mljobs" else ["mljobs", *parts])
    for part in parts:
        annotations = {name for base in getattr(found, "__mro__", ()) for name in vars(base).get("__annotations__", {})}
        if part in annotations | set(getattr(found, "__slots__", ())):
            return True
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def _longest_module(parts: list[str]) -> tuple[Any, list[str]]:
    for length in range(len(parts), 0, -1):
        try:
            return importlib.import_module(".".join(parts[:length])), parts[length:]
        except ModuleNotFoundError:
            continue
    raise AssertionError(parts)


REFERENCE = re.compile(r":(?:func|class|mod|meth|data|attr):`~?([\w.]+)`")
NAME = re.compile(r"``((?:mljobs|jobs|events|guards|schema|transfer|states|types|store)\.[a-zA-Z_.]+)(?:\(.*?\))?``")


def test_what_docstrings_refer_to_exists() -> None:
    missing = []
    for where, text in _docstrings():
        module = where.partition(": ")[0].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        names = [name if "." in name else f"{module}.{name}" for name in REFERENCE.findall(text)]
        missing += [(where, name) for name in [*names, *NAME.findall(text)] if not _exists(name)]
    assert missing == []
