"""One battle: set up, submit, sabotage, wait until all is finished, and judge."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import Event
from typing import Any

from sqlalchemy.exc import DBAPIError

from mljobs import JobStore, MlJob, schema
from tests import postgres
from tests.fork_server import shared
from tests.slow.chaos import audit, ledger
from tests.slow.chaos.fleet import Fleet
from tests.slow.chaos.proxy import Proxy
from tests.slow.chaos.saboteur import Saboteur
from tests.slow.chaos.verdict import Evidence, judge

logger = logging.getLogger("chaos")

_LOOK_SECONDS = 0.05
_ROWS = "id, kind, status, attempts, progress, error_message, metrics_json, retry_of"


@dataclass(frozen=True)
class Plan:
    """How large a battle is.

    Attributes:
        database: ``postgresql`` or ``sqlite``.
        jobs: How many to submit; retries come on top.
        acts: How many acts of sabotage.
        seed: Of everything that is left to chance here.
        workers: Processes at a time.
        concurrency: Of each.
        lease: Seconds.
        max_attempts: As of a worker.
        poison: How many jobs kill their worker each time.
        busy: Seconds that a job of the longer sort takes.
        bound: Seconds after which it has failed, whatever it waits for.
    """

    database: str = "postgresql"
    jobs: int = 400
    acts: int = 8
    seed: int = 0
    workers: int = 4
    concurrency: int = 4
    lease: float = 2.0
    max_attempts: int = 5
    poison: int = 0
    busy: float = 0.4
    bound: float = 120.0


@dataclass
class Report:
    """What came out.

    Attributes:
        plan: What was asked for.
        counts: What was done and seen.
        wrong: What does not hold.
        seconds: How long it took.
    """

    plan: Plan
    counts: Counter[str]
    wrong: list[str]
    seconds: float


def fight(plan: Plan, work: Path) -> Report:
    """Fight it out.

    Args:
        plan: How large.
        work: An empty directory.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        if plan.database == "sqlite":
            url, cluster, proxy = f"sqlite:///{work / 'jobs.db'}", None, None
            urls = (url, url)
        else:
            cluster = stack.enter_context(postgres.cluster(fsync=True))
            proxy = stack.enter_context(Proxy(cluster.port))
            url = cluster.url
            urls = (url, url.replace(f":{cluster.port}/", f":{proxy.port}/"))
        schema.upgrade(url)
        store = stack.enter_context(JobStore(url))
        audit.install(store.engine)
        fleet = Fleet(urls, plan.workers, work, _variables(plan, work), shared())
        stack.callback(fleet.kill)
        random = Random(plan.seed)
        battle = _Battle(plan, random, store, fleet, Saboteur(random, fleet, store, cluster, proxy))
        battle.run(began + plan.bound)
        wrong = battle.wrong
        counts = battle.saboteur.counts
        battle.saboteur.let_go()
        fleet.end(patience=30)
        counts += fleet.counts()
        evidence = _evidence(plan, store, battle.submitted, work / "ledger")
        counts += judge(evidence)
        wrong += [*fleet.wrong, *evidence.wrong]
    return Report(plan, counts, wrong, time.monotonic() - began)


def _variables(plan: Plan, work: Path) -> dict[str, str]:
    variables = {
        "CHAOS_LEDGER": str(work / "ledger"),
        "CHAOS_CONCURRENCY": str(plan.concurrency),
        "CHAOS_LEASE": str(plan.lease),
        "CHAOS_MAX_ATTEMPTS": str(plan.max_attempts),
    }
    return {**variables, "CHAOS_POISON": "1"} if plan.poison else variables


@dataclass
class _Battle:
    plan: Plan
    random: Random
    store: JobStore
    fleet: Fleet
    saboteur: Saboteur
    submitted: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def run(self, end: float) -> None:
        """Submit a portion before each act, act when most of what was there before is finished, wait for the rest."""
        acts = self.saboteur.plan(self.plan.acts)
        portions = list(_portions(self.plan, self.random, len(acts) + 1))
        due = [sum(map(len, portions[: at + 1])) - len(portions[at]) // 2 for at in range(len(acts))]
        begun, at, cancelled, pause = 0, 0, 0, Event()
        self._submit(portions[0])
        while True:
            looked = time.monotonic()
            self.fleet.tend()
            try:
                finished, left = self._look()
                self.saboteur.release()
                self.saboteur.cancel(finished // 40 - cancelled)
                cancelled = max(cancelled, finished // 40)
                if at < len(acts) and finished >= due[at]:
                    if begun == at:
                        begun += 1
                        self._submit(portions[begun])
                    elif self.saboteur.ready(acts[at]) or left == 0:
                        at += 1
                        logger.info("%d finished: %s", finished, acts[at - 1])
                        self.saboteur.do(acts[at - 1])
                if at == len(acts) and left == 0 and finished >= len(self.submitted):
                    return
            except DBAPIError:
                self.saboteur.counts["looks of the test itself that failed"] += 1
            if time.monotonic() - looked > 1:
                logger.info("a look took %.1f s", time.monotonic() - looked)
            if time.monotonic() >= end:
                self.wrong.append(f"not at its end after {self.plan.bound} s: act {at} of {len(acts)}, {self._state()}")
                return
            pause.wait(_LOOK_SECONDS)

    def _submit(self, jobs: list[MlJob]) -> None:
        self.store.submit_many(jobs)
        self.submitted |= {job.id.hex for job in jobs}

    def _look(self) -> tuple[int, int]:
        """Return how many jobs are finished, and how many are not, those with a lease included."""
        with self.store.engine.connect() as connection:
            finished, left, leases = connection.exec_driver_sql(
                "SELECT (SELECT count(*) FROM ml_jobs WHERE status NOT IN ('queued', 'running')), "
                "(SELECT count(*) FROM ml_jobs WHERE status IN ('queued', 'running')), "
                "(SELECT count(*) FROM ml_job_leases)"
            ).one()
        return finished, left + leases

    def _state(self) -> str:
        with self.store.engine.connect() as connection:
            states = connection.exec_driver_sql("SELECT kind, status, count(*) FROM ml_jobs GROUP BY 1, 2").all()
            leases = connection.exec_driver_sql("SELECT * FROM ml_job_leases").all()
        return f"{states}, leases {leases}"


def _portions(plan: Plan, random: Random, number: int) -> Iterator[list[MlJob]]:
    """Yield the jobs in so many portions of nearly one size."""
    jobs = [_job(plan, random, at < plan.poison) for at in range(plan.jobs)]
    random.shuffle(jobs)
    for at in range(number):
        yield jobs[at * plan.jobs // number : (at + 1) * plan.jobs // number]


def _job(plan: Plan, random: Random, poison: bool) -> MlJob:  # noqa: FBT001 - a private shorthand
    kind = "train" if poison else random.choice(["train", "train", "backfill", "feature_refresh", "drift_compute"])
    spec: dict[str, Any] = {"poison": True} if poison else {}
    if kind != "drift_compute" and random.random() < 0.25:
        spec["seconds"] = round(random.uniform(0.0, plan.busy), 3)
    if random.random() < 0.2:
        spec["fail"] = 128
    exclusive = not poison and random.random() < 0.15
    return MlJob(
        kind=kind,
        target_name=f"only_{random.randrange(12)}" if exclusive else f"target_{random.randrange(1000)}",
        spec=spec,
        priority=random.randrange(3),
        exclusive=exclusive,
    )


@contextmanager
def _reading(store: JobStore) -> Iterator[Any]:
    with store.engine.connect() as connection:
        yield connection


def _evidence(plan: Plan, store: JobStore, submitted: set[str], path: Path) -> Evidence:
    with _reading(store) as connection:
        names = _ROWS.split(", ")
        rows = [
            dict(zip(names, row, strict=True)) for row in connection.exec_driver_sql(f"SELECT {_ROWS} FROM ml_jobs")
        ]
        leases = connection.exec_driver_sql("SELECT count(*) FROM ml_job_leases").scalar_one()
    calls, wrong = ledger.read(path)
    by_id = {str(row["id"]).replace("-", ""): row for row in rows}
    return Evidence(submitted, by_id, leases, audit.read(store.engine), calls, plan.max_attempts, wrong)
