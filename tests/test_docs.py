"""What the README and the docs show runs as it stands, and agrees with the code."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, delete
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import JobStore, MlJob, MlJobStatus, metadata
from mljobs.states import TRANSITIONS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engine = create_engine(f"sqlite:///{tmp_path / 'docs.db'}", poolclass=NullPool)
    metadata.create_all(engine)
    if page.name == "migrations.md":
        metadata.drop_all(engine)
    module = ModuleType(f"page_{page.stem}")  # classes look for the names in their annotations in their module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names: dict[str, Any] = vars(module)
    names |= {
        "engine": engine,
        "Session": Session,
        "MlJob": MlJob,
        "delete": delete,
        "long_ago": datetime.now(UTC) - timedelta(days=90),
    }
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec", dont_inherit=True), names)
    for value in list(names.values()):
        if isinstance(value, JobStore | Session):
            value.close()
        elif isinstance(value, Engine):
            value.dispose()


def test_the_readme_shows_the_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test_every_python_block_runs(ROOT / "README.md", tmp_path, monkeypatch)
    assert "is completed (since " in capsys.readouterr().out


def test_the_readmes_graph_is_the_table_of_transitions() -> None:
    block = re.search(r"## The states\n\n```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    lines = []
    for state in MlJobStatus:
        after = [other.token for other in MlJobStatus if other in TRANSITIONS[state]]
        lines.append(f"{state.token:<9} -> {' | '.join(after)}" if after else f"{state.token:<12} final")
    assert block[1].splitlines() == lines


def test_the_page_of_states_says_what_the_code_says() -> None:
    page = (ROOT / "docs" / "states.md").read_text()
    source = (ROOT / "mljobs" / "states.py").read_text()
    for state in MlJobStatus:
        sentence = re.search(rf'    {state.name} = "{state.token}"\n    """(.*?)"""', source, re.DOTALL)
        assert sentence is not None
        assert f"| `{state.token}` | {sentence[1]} |" in page
    edges = set(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.MULTILINE))
    assert edges == {(old.token, new.token) for old, news in TRANSITIONS.items() for new in news}


def test_every_link_leads_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_test_that_a_page_names_exists() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    existing = set(re.findall(r"^(?:async )?def (test_\w+)", sources, re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"`(test_\w+)`", page.read_text()))
        assert named <= existing, page.name
