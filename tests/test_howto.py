"""What the how-tos quote and tabulate is what stands in the code."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest

from mljobs.contrib.problems import MEANINGS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
QUOTED = [
    (page.relative_to(ROOT).as_posix(), source, text)
    for page in sorted(DOCS.rglob("*.md"))
    for source, text in re.findall(r'```\w+ title="(examples/[^"]+)"\n(.*?)```', page.read_text(), re.DOTALL)
]


@pytest.mark.parametrize(("page", "source", "text"), QUOTED, ids=[f"{page}:{source}" for page, source, _ in QUOTED])
def test_what_a_page_quotes_from_an_example_stands_there(page: str, source: str, text: str) -> None:
    assert text in (ROOT / source).read_text()


def test_every_framework_has_its_page_and_every_page_quotes_or_runs_code() -> None:
    pages = {path.stem for path in (DOCS / "howto").glob("*.md")}
    assert pages == {"fastapi", "flask", "litestar", "django", "errors", "events", "search", "sweep"}
    quoting = {page for page, _, _ in QUOTED}
    for path in (DOCS / "howto").glob("*.md"):
        assert "```python\n" in path.read_text() or path.relative_to(ROOT).as_posix() in quoting


def test_the_table_of_statuses_is_the_codes() -> None:
    page = (DOCS / "howto" / "errors.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (.*) \|$", page, re.MULTILINE)
    assert rows == [(kind.__name__, str(meaning.status), meaning.why) for kind, meaning in MEANINGS.items()]


def test_each_guarantee_names_what_shows_it() -> None:
    page = (DOCS / "guarantees.md").read_text()
    table = page.partition("## Guarantees")[2].partition("## Limits")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ") and not row.startswith(("| what", "|---"))]
    assert len(rows) >= 10
    for row in rows:
        shown = re.findall(r"`(tests/\w+\.py)`", row)
        assert shown, row
        assert all((ROOT / path).exists() for path in shown), row


def test_the_examples_and_their_own_pages_are_there() -> None:
    for name in ("fastapi_app", "flask_app", "litestar_app", "django_asgi"):
        readme = ROOT / "examples" / name / "README.md"
        for path in re.findall(r"^\| `([\w/]+\.py)` \|", readme.read_text(), re.MULTILINE):
            assert (readme.parent / path).exists(), path
        assert dedent(readme.read_text()).startswith("# ")
