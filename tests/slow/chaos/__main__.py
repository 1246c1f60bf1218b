"""Fight a battle of any size, and print its counts: ``python -m tests.slow.chaos --jobs 20000``."""
# ruff: noqa: T201 - prints its counts

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

from tests.slow.chaos.battle import Plan, Report, fight


def main() -> int:
    """Return 0 if everything held."""
    plan, keep = _asked()
    print(
        f"seed {plan.seed}, {plan.jobs} jobs, {plan.acts} acts of sabotage on {plan.database}, at most {plan.bound} s"
    )
    work = Path(keep) if keep else Path(tempfile.mkdtemp(prefix="mljobs-chaos-"))
    work.mkdir(parents=True, exist_ok=True)
    report = fight(plan, work)
    show(report)
    print(f"logs, ledger: {work}")
    return 1 if report.wrong else 0


def _asked() -> tuple[Plan, str | None]:
    parser = argparse.ArgumentParser(prog="python -m tests.slow.chaos", description=__doc__)
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--jobs", type=int, default=20_000, help="retries come on top")
    parser.add_argument("--acts", type=int, default=100, help="of sabotage, each kind at least once")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--workers", type=int, default=4, help="processes at a time")
    parser.add_argument("--lease", type=float, default=3.0, help="seconds")
    parser.add_argument("--poison", type=int, default=2, help="jobs that kill their worker each time")
    parser.add_argument("--bound", type=float, default=1200.0, help="seconds after which it has failed")
    parser.add_argument("--verbose", action="store_true", help="say each act when it is done")
    parser.add_argument("--work", help="a directory for logs and ledger; a temporary one otherwise")
    asked = parser.parse_args()
    if asked.verbose:
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
        logging.getLogger("chaos").setLevel(logging.INFO)
    plan = Plan(
        database=asked.database,
        jobs=asked.jobs,
        acts=asked.acts,
        seed=asked.seed,
        workers=asked.workers,
        lease=asked.lease,
        poison=asked.poison,
        bound=asked.bound,
    )
    return plan, asked.work


def show(report: Report) -> None:
    """Print the counts, then what does not hold."""
    for what, number in sorted(report.counts.items()):
        print(f"{number:>8} {what}")
    print(f"{report.seconds:>8.0f} seconds")
    for why in report.wrong[:50]:
        print(f"WRONG: {why}")
    print("everything held" if not report.wrong else f"{len(report.wrong)} things do not hold")


if __name__ == "__main__":
    sys.exit(main())
