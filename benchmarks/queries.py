"""``python -m benchmarks.queries``: the plan of each question in docs/queries.md on a million jobs, written into the page.

``BENCH_JOBS`` makes the table smaller. Each plan is of the second run, with what it read and how long it took.
"""

from __future__ import annotations

import os
import re
import sys

from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from benchmarks.bench import clear, database
from tests.sample_history import fill, fixed
from tests.test_queries import PAGE, QUESTIONS, SAMPLE_ID

JOBS = int(os.environ.get("BENCH_JOBS", "1000000"))
EXPLAIN = "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, BUFFERS OFF) "
WIDTH = 150


def main() -> None:
    page = PAGE.read_text()
    with database() as url:
        clear(url)
        engine = create_engine(url, poolclass=NullPool)
        jobs, _, now = fill(engine, JOBS)
        of = {job.retry_of for job in jobs}
        retried = next(job.id for job in reversed(jobs) if job.retry_of is not None and job.id in of)
        with engine.connect() as connection:
            for question in QUESTIONS:
                asked = question.sql.replace("now()", fixed(now)).replace(SAMPLE_ID, str(retried))
                statement = text(EXPLAIN + re.sub(r":(?=:)|(?<=:):", r"\\:", asked))
                lines = [list(connection.execute(statement).scalars()) for _ in range(2)][1]
                if question.indexes and any("Seq Scan on ml_jobs" in line for line in lines):
                    sys.exit(f"{question.title} reads the whole table:\n" + "\n".join(lines))
                page = with_plan(page, question.number, lines)
                print(f"{question.number:>2}. {question.title}: {lines[-1]}", flush=True)
        engine.dispose()
    if JOBS == 1_000_000 or "--write" in sys.argv:
        PAGE.write_text(page)


def with_plan(page: str, number: int, lines: list[str]) -> str:
    """Return the page with this plan at the end of its section, in place of the one that stood there."""
    shown = [line[:WIDTH] + " ..." * (len(line) > WIDTH) for line in lines]
    plan = "```text\n" + "\n".join(shown) + "\n```\n\n"
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    for at, part in enumerate(parts):
        if part.startswith(f"## {number}. "):
            parts[at] = re.sub(r"```text\n.*?```\n\n", "", part, flags=re.DOTALL) + plan
    return "".join(parts)


if __name__ == "__main__":
    main()
