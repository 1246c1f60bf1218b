"""``python -m benchmarks`` runs, in a form that measures nothing."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.chart import Row, chart

SVG = "{http://www.w3.org/2000/svg}"


def test_the_short_benchmark_prints_a_table_and_draws_it(
    postgres_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "chart.svg"
    short = ["--scale", "0.001", "--repeats", "1"]
    benchmarks.main(["submit", "single", *short, "--server", postgres_url, "--svg", str(picture)])
    printed = capsys.readouterr().out
    root = ET.parse(picture).getroot()
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    for what in ("submit, one by one", "claim + complete, one by one"):
        for database in ("PostgreSQL", "SQLite"):
            assert f"| {database}: {what} |" in printed
            assert f"{database}: {what}" in texts
    assert len(root.findall(f"{SVG}rect")) == 1 + 2 * 4


def test_the_chart_says_to_those_who_do_not_see_it_what_it_shows() -> None:
    rows = [Row("SQLite", "drain <2>", {"raw": [200.0, 100.0, 150.0], "mljobs": [100.0] * 3, "a & b": [50.0] * 3})]
    root = ET.fromstring(chart(rows, "two cores"))
    named = {part.get("id"): part.text for part in root if part.get("id")}
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "title figures"
    assert "Jobs a second" in (named["title"] or "")
    assert named["figures"] == "SQLite, drain <2>: raw 150, mljobs 100, a & b 50"
    widths = [int(bar.get("width", "0")) for bar in root.findall(f"{SVG}rect")][1:]
    assert widths == [round(520 / 150 * 100), 520, round(520 / 3)]
