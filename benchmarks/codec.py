"""How fast the codec is, next to the bound that the same run measures: ``python -m benchmarks.codec``.

The bound is msgspec decoding the same line into a plain struct, with no UUID, no enum and no range checked. Known
figures of RedDB's own Rust codec, on other hardware: 230,000 records a second decoded, 415,000 encoded.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import msgspec

from mljobs.record._kv import KvRecord, decode, encode
from mljobs.states import MlJobKind, MlJobStatus

LINES = 2_000
ROUNDS = 25
REPEATS = 5


class Bare(msgspec.Struct, gc=False):
    """The record's keys, with nothing about the values checked but their type."""

    created_at: int
    error: str | None
    finished_at: int
    id: str
    kind: str
    metrics: str | None
    progress: int
    spec: str
    started_at: int
    status: str
    target: str


def sample(number: int) -> KvRecord:
    """Return a finished training job of about 700 bytes."""
    spec = {"algorithm": "gradient_boosting", "lr": 0.1, "features": [f"feature_{index:02}" for index in range(18)]}
    metrics = {"auc": 0.9137, "loss": [0.61, 0.42, 0.37], "rows": 120_000 + number}
    return KvRecord(
        created_at=1_700_000_000_000 + number,
        error=None,
        finished_at=1_700_000_360_000 + number,
        id=UUID(int=0x0191E4A27C3B7DEF8000000000000000 + number * 0x9E3779B97F4A7C15),
        kind=list(MlJobKind)[number % 4],
        metrics=json.dumps(metrics),
        progress=100,
        spec=json.dumps(spec),
        started_at=1_700_000_060_000 + number,
        status=MlJobStatus.COMPLETED,
        target=f"models/churn/{number % 50}",
    )


def rate(work: Callable[[Any], object], items: list[Any]) -> float:
    """Return how many items a second ``work`` does."""
    start = time.perf_counter()
    for _ in range(ROUNDS):
        for item in items:
            work(item)
    return ROUNDS * len(items) / (time.perf_counter() - start)


def main() -> None:
    """Print the median and the spread of five interleaved repeats."""
    records = [sample(number) for number in range(LINES)]
    texts = [encode(record) for record in records]
    lines = [text.encode() for text in texts]
    cases: dict[str, tuple[Callable[[Any], object], list[Any]]] = {
        "bound: bare struct": (msgspec.json.Decoder(Bare).decode, lines),
        "decode bytes": (decode, lines),
        "decode str": (decode, texts),
        "encode": (encode, records),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(REPEATS):
        for name, (work, items) in cases.items():
            rates[name].append(rate(work, items))
    bound = statistics.median(rates["bound: bare struct"])
    print(f"{statistics.mean(map(len, lines)):.0f} bytes a line, median of {REPEATS} repeats (lowest to highest), 1/s")
    for name, found in rates.items():
        middle = statistics.median(found)
        print(f"{name:20}{middle:12,.0f}  ({min(found):,.0f} to {max(found):,.0f})  {middle / bound:5.0%} of the bound")
    print("RedDB's Rust, as known:  230,000 decoded, 415,000 encoded")


if __name__ == "__main__":
    main()
