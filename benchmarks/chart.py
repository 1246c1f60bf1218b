"""The figures of ``python -m benchmarks`` as a table and as a chart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

OURS, RAW = "mljobs", "raw"


@dataclass
class Row:
    """One operation on one database.

    Attributes:
        database: Its name.
        what: The operation.
        rates: Jobs a second in each repeat: of mljobs, of the driver alone with the same statements, of others.
    """

    database: str
    what: str
    rates: dict[str, list[float]]

    def rate(self, name: str) -> float:
        return statistics.median(self.rates[name])

    def ratio(self, name: str) -> str:
        """Return mljobs as a multiple of another, pair by pair: the median and its spread."""
        pairs = zip(self.rates[OURS], self.rates[name], strict=True)
        ratios = [ours / other for ours, other in pairs]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"


def table(rows: Sequence[Row]) -> str:
    """Return a table in Markdown."""
    others = list(dict.fromkeys(name for row in rows for name in row.rates if name not in (OURS, RAW)))
    head = ["jobs/s", OURS, RAW, f"{OURS} to {RAW}", *others]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        peers = [f"{row.rate(name):,.0f}, ratio {row.ratio(name)}" if name in row.rates else "-" for name in others]
        rates = [f"{row.rate(name):,.0f}" for name in (OURS, RAW)]
        lines.append([f"{row.database}: {row.what}", *rates, row.ratio(RAW), *peers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


WIDTH, LEFT, LONGEST = 760, 130, 520  # of the chart, of the names, of the longest bar
BAR, GAP, TITLE = 13, 4, 26
STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de } text { font: 12px system-ui, sans-serif; fill: #1f2328 }
  .what { font-weight: 600 } .mljobs { fill: #0969da } .raw { fill: #8c959f } .other { fill: #bf8700 }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #3d444d } text { fill: #f0f6fc }
    .mljobs { fill: #4493f8 } .raw { fill: #656c76 } .other { fill: #9e6a03 }
  }"""


def chart(rows: Sequence[Row], measured: str) -> str:
    """Return a chart as SVG, in which the longest bar of each operation is the fastest.

    Args:
        rows: What was measured.
        measured: With what, and when.
    """
    parts: list[str] = []
    y = 34
    for row in rows:
        fastest = max(map(row.rate, row.rates))
        parts.append(f'<text class="what" x="16" y="{y}">{escape(f"{row.database}: {row.what}")}</text>')
        y += 8
        for name in sorted(row.rates, key=[OURS, RAW, *row.rates].index):
            length = max(1, round(row.rate(name) / fastest * LONGEST))
            kind = name if name in (OURS, RAW) else "other"
            base = y + BAR - 3
            parts += [
                f'<text x="{LEFT - 8}" y="{base}" text-anchor="end">{escape(name)}</text>',
                f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{length}" height="{BAR}"/>',
                f'<text x="{LEFT + length + 6}" y="{base}">{row.rate(name):,.0f}/s</text>',
            ]
            y += BAR + GAP
        y += TITLE
    parts.append(f'<text x="16" y="{y - 6}">{escape(measured)}</text>')
    said = "; ".join(
        f"{row.database}, {row.what}: {', '.join(f'{name} {row.rate(name):,.0f}' for name in row.rates)}"
        for row in rows
    )
    height = y + 10
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title figures">
<title id="title">Jobs a second: mljobs, the same statements by the driver alone (raw), and other job systems</title>
<desc id="figures">{escape(said)}</desc>
<style>{STYLE}
</style>
<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>
{chr(10).join(parts)}
</svg>
"""
