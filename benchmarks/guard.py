"""``python -m benchmarks.guard``: what each part of the guard costs a submit, a claim, a finish and a flush.

Each variant has a database of its own with the same rows: without the guard, with all of it, with the hooks alone, with one
trigger alone. They take turns in random order, call by call where a call is short. Beside the clock stands the CPU, of this
process and of the server's processes for it.

``python -m benchmarks.guard sqlite --only flush`` runs that part on that database; ``--before REVISION`` adds the triggers
as git has them there; ``--repeats`` and ``--scale`` shorten it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from sqlalchemy import create_engine, event, make_url, select, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from mljobs import JobStore, MlJob, metadata
from mljobs.guards import _hooks
from mljobs.guards._companions import companion_ddl, companion_names
from mljobs.record._mixin import MlJobMixin
from tests import postgres

SPEC = {"model": "gradient boosting", "depth": 6, "lr": 0.05, "features": ["age", "country", "clicks_7d"]}
METRICS = {"auc": 0.97, "loss": [0.1] * 20}
ROLES = {
    "postgresql": ("update", "after", "range", "spec_json", "metrics_json", "delete", "truncate"),
    "sqlite": ("update", "key", "insert", "blobs", "delete"),
}
MEASURED_ALONE = {"postgresql": ROLES["postgresql"][:5], "sqlite": ROLES["sqlite"][:4]}  # the others see none of these
OF_UPDATES = ("update", "after", "key")  # which see a write of the progress alone
FLUSHED = 250
HELD, FREE = "drift_compute", "backfill"  # kinds of the jobs that are flushed: under leases, and not


@dataclass
class Variant:
    """One form of the guard, in a database of its own."""

    name: str
    store: JobStore
    hooks: bool
    pids: list[int] = field(default_factory=list)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Leave the hook of an UPDATE out meanwhile, where this is a variant without."""
        if self.hooks:
            yield
            return
        event.remove(MlJobMixin, "before_update", _hooks._check_update)
        try:
            yield
        finally:
            event.listen(MlJobMixin, "before_update", _hooks._check_update, propagate=True, raw=True, retval=True)

    def vacuum(self) -> None:
        """Remove old row versions, and look up the server's processes."""
        if self.store.engine.dialect.name == "postgresql":
            with self.store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("VACUUM ANALYZE ml_jobs"))
                mine = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND client_port IS NOT NULL"
                self.pids = list(connection.scalars(text(mine)))

    def cpu(self) -> float:
        """Return the seconds of CPU so far, here and in the server's processes."""
        return time.process_time() + sum(_run_time(pid) for pid in self.pids)


def _run_time(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except OSError:
        return 0.0


# -------------------------------------------------------------------------------------------------------- variants


def variants(stack: ExitStack, backend: str, before: str | None, only: set[str]) -> list[Variant]:
    """Return a variant for each form of the guard, with its database."""
    chosen: dict[str, tuple[set[str], bool]] = {"no guard": (set(), False), "all of it": (set(ROLES[backend]), True)}
    if only & {"flush", "flush under leases"}:
        chosen["the hooks alone"] = (set(), True)
    for role in MEASURED_ALONE[backend]:
        if role in OF_UPDATES or only - {"flush", "flush under leases"}:
            chosen[f"{role} alone"] = ({role}, False)
    if before is not None:
        chosen[f"all, as of {before}"] = (set(ROLES[backend]), True)
    urls = _databases(stack, backend, len(chosen))
    made = []
    for (name, (roles, hooks)), url in zip(chosen.items(), urls, strict=True):
        store = stack.enter_context(JobStore(url, pool_size=4))
        metadata.create_all(store.engine)
        _shape(store, backend, roles, before if name.startswith("all, as of") else None)
        made.append(Variant(name, store, hooks))
    return made


def _databases(stack: ExitStack, backend: str, number: int) -> Iterator[str]:
    if backend == "sqlite":
        place = stack.enter_context(tempfile.TemporaryDirectory())
        yield from (f"sqlite:///{place}/{at}.db" for at in range(number))
        return
    server = stack.enter_context(postgres.server())
    admin = create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    for at in range(number):
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS guard_{at} WITH (FORCE)"))
            connection.execute(text(f"CREATE DATABASE guard_{at}"))
        yield make_url(server.url).set(database=f"guard_{at}").render_as_string(hide_password=False)


def _shape(store: JobStore, backend: str, roles: set[str], before: str | None) -> None:
    """Leave these triggers only; with a revision, in the text that they had there."""
    table: Any = MlJob.__table__
    with store.engine.begin() as connection:
        if before is not None:
            for statement in companion_ddl(table, backend, create=False):
                connection.execute(statement)
            for statement in _companions_at(before).companion_ddl(table, backend):
                connection.execute(statement)
        for role in set(ROLES[backend]) - roles:
            kind = "INDEX" if role == "blobs" else "TRIGGER"
            where = " ON ml_jobs" if backend == "postgresql" else ""
            connection.execute(text(f"DROP {kind} {companion_names('ml_jobs')[role]}{where}"))


def _companions_at(revision: str) -> ModuleType:
    """Return the module that makes triggers, as git has it at a revision."""
    path = "mljobs/guards/_companions.py"
    source = subprocess.run(["git", "show", f"{revision}:{path}"], check=True, capture_output=True, text=True).stdout
    module = ModuleType("companions_before")
    sys.modules[module.__name__] = module
    exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    return module


# ------------------------------------------------------------------------------------------------------- operations


class Costs:
    """Microseconds a job, round by round: for each operation and variant the clock and the CPU."""

    def __init__(self, turns: list[Variant]) -> None:
        self.turns = turns
        self.rounds: dict[str, list[dict[str, tuple[float, float]]]] = {}
        self._sums: dict[str, dict[str, list[float]]] = {}

    def run(self, operation: str, jobs: int, act: Callable[[Variant], Any]) -> dict[str, Any]:
        """Let each variant act once, in random order; return what each returned."""
        sums = self._sums.setdefault(operation, {one.name: [0.0, 0.0, 0] for one in self.turns})
        results = {}
        for variant in random.sample(self.turns, len(self.turns)):
            with variant.hooked():
                cpu, clock = variant.cpu(), time.perf_counter()
                results[variant.name] = act(variant)
                clock, cpu = time.perf_counter() - clock, variant.cpu() - cpu
            for at, value in enumerate((clock * 1e6, cpu * 1e6, jobs)):
                sums[variant.name][at] += value
        return results

    def end_round(self, *, keep: bool) -> None:
        """Note what this round has cost; the first one only warms up."""
        for operation, sums in self._sums.items() if keep else ():
            costs = {name: (clock / jobs, cpu / jobs) for name, (clock, cpu, jobs) in sums.items()}
            self.rounds.setdefault(operation, []).append(costs)
        self._sums = {}

    def report(self, backend: str) -> None:
        for operation, rounds in self.rounds.items():
            print(f"\n{operation}, {backend}: us a job by the clock, of CPU; times what it costs without the guard")
            for variant in self.turns:
                clock, cpu = ([costs[variant.name][at] for costs in rounds] for at in (0, 1))
                ratios = [
                    _ratio([costs[variant.name][at] / costs["no guard"][at] for costs in rounds]) for at in (0, 1)
                ]
                cells = f"{statistics.median(clock):8.1f} {statistics.median(cpu):8.1f}"
                print(f"  {variant.name:<28} {cells}   clock {ratios[0]}   CPU {ratios[1]}", flush=True)


def _ratio(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.2f} .. {max(values):.2f})"


def one_by_one(costs: Costs, number: int) -> None:
    for _ in range(number):
        costs.run("submit", 1, lambda one: one.store.submit("train", "spam", SPEC))
    for _ in range(number):
        claims = costs.run("claim", 1, lambda one: one.store.claim(worker="w", kinds="train")[0])
        costs.run("finish", 1, lambda one, claims=claims: one.store.complete(claims[one.name], METRICS))


def in_batches(costs: Costs, number: int) -> None:
    costs.run("submit_many", number * 100, lambda one: one.store.submit_many([("train", "spam", SPEC)] * number * 100))
    for _ in range(number):
        claims = costs.run("claim of 100", 100, lambda one: one.store.claim(worker="w", kinds="train", limit=100))
        costs.run(
            "finish of 100",
            100,
            lambda one, claims=claims: one.store.complete_many([(claim, METRICS) for claim in claims[one.name]]),
        )


def flush(costs: Costs, kind: str, number: int) -> None:
    """Flushes of changed progress, of 250 records each: of jobs that nobody holds, or of running ones."""
    sessions = {one.name: Session(one.store.engine) for one in costs.turns}
    chosen = select(MlJob).where(MlJob.kind == kind).order_by(MlJob.id).limit(number)
    found = {name: session.scalars(chosen).all() for name, session in sessions.items()}
    title = "flush" if kind == FREE else "flush under leases"
    for start in range(0, number, FLUSHED):
        for jobs in found.values():
            for job in jobs[start : start + FLUSHED]:
                job.progress = (job.progress + 7) % 100
        costs.run(title, min(FLUSHED, number - start), lambda one: sessions[one.name].flush())
    for session in sessions.values():
        session.commit()
        session.close()


def measure(backend: str, only: set[str], repeats: int, scale: float, before: str | None) -> None:
    number, held = max(20, int(5000 * scale)), max(10, int(500 * scale))
    parts: dict[str, Callable[[Costs], None]] = {
        "one by one": lambda costs: one_by_one(costs, max(4, int(40 * scale))),
        "batches": lambda costs: in_batches(costs, max(1, int(8 * scale))),
        "flush": lambda costs: flush(costs, FREE, number),
        "flush under leases": lambda costs: flush(costs, HELD, held),
    }
    with ExitStack() as stack:
        turns = variants(stack, backend, before, only)
        costs = Costs(turns)
        for variant in turns:
            variant.store.submit_many([(FREE, "spam", SPEC)] * number + [(HELD, "spam", SPEC)] * held)
            variant.store.claim(worker="w", kinds=HELD, limit=held, lease=86_400)
        for repeat in range(repeats + 1):
            for name in only:
                parts[name](costs)
            for variant in turns:
                variant.vacuum()
            costs.end_round(keep=repeat > 0)
        costs.report(backend)


PARTS = ("one by one", "batches", "flush", "flush under leases")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__)
    parser.add_argument("databases", nargs="*", default=["postgresql", "sqlite"])
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--repeats", type=int, default=16)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--before", metavar="REVISION")
    asked = parser.parse_args(arguments)
    for backend in asked.databases:
        measure(backend, set(asked.only or PARTS), asked.repeats, asked.scale, asked.before)


if __name__ == "__main__":
    main(sys.argv[1:])
