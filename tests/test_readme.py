"""README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_the_readme_example_runs_and_shows_the_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(compile(block, "README.md", "exec"), namespace)
    namespace["engine"].dispose()  # type: ignore[attr-defined]
    assert "is completed" in capsys.readouterr().out
