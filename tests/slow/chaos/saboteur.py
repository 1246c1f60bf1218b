"""What is done to the workers, the server and the network: each act after so many finished jobs, none after a time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from signal import SIGCONT, SIGKILL, SIGTERM

from sqlalchemy.exc import DBAPIError

from mljobs import JobStore, MlJobsError
from tests.postgres import Cluster
from tests.slow.chaos.fleet import Fleet, Member
from tests.slow.chaos.proxy import Proxy
from tests.worker_process import can_write

logger = logging.getLogger("chaos")

PROCESS_ACTS = ("kill", "stop", "term", "term twice")
SERVER_ACTS = ("restart fast", "restart immediate", "reset", "stall")


@dataclass
class Hold:
    """Something that lasts until the database shows its effect.

    Attributes:
        act: Its name.
        worker: Whose leases have to be gone; None for those of all behind the proxy.
        release: Ends it.
    """

    act: str
    workers: set[str]
    release: Callable[[], None]


@dataclass
class Saboteur:
    """Does the acts.

    Attributes:
        random: Seeded.
        fleet: The processes.
        store: Straight to the database.
        cluster: The server; None for SQLite.
        proxy: The network; None for SQLite.
        counts: What was done.
    """

    random: Random
    fleet: Fleet
    store: JobStore
    cluster: Cluster | None
    proxy: Proxy | None
    counts: Counter[str] = field(default_factory=Counter)
    _holds: list[Hold] = field(default_factory=list)

    def plan(self, number: int) -> list[str]:
        """Return so many acts, each kind at least once, in an order of chance."""
        acts = [*PROCESS_ACTS, *(SERVER_ACTS if self.cluster is not None else ())]
        common = ["kill", "kill", "stop", *(["reset", "stall"] if self.proxy is not None else [])]
        plan = [*acts, *(self.random.choice([*acts, *common]) for _ in range(number - len(acts)))]
        self.random.shuffle(plan)
        return plan

    def ready(self, act: str) -> bool:
        """Whether this may begin: what lasts is not done twice at once, and whoever is hit should have something to lose."""
        if any(hold.act == act for hold in self._holds):
            return False
        holders = self._holders()
        hit = [member for member in self.fleet.members if not member.stopped and (member.behind or act != "stall")]
        return act not in ("kill", "stop", "stall") or any(member.name in holders for member in hit)

    def do(self, act: str) -> None:
        """Do it."""
        holders = self._holders()
        if act == "stall":
            self._stall(holders)
            return
        if act in SERVER_ACTS:
            self._hit_server(act)
            return
        member = self.fleet.choose(self.random, holders)
        if member is None:
            return
        if act == "stop":
            self._stop(member, holders)
        elif act == "kill":
            member.send(SIGKILL)
            self.counts["kills of a worker that held leases" if member.name in holders else "kills"] += 1
        else:
            member.send(SIGTERM)
            if act == "term twice":
                member.send(SIGTERM)
            self.counts["stops by SIGTERM" + (" twice" if act == "term twice" else "")] += 1

    def _holders(self) -> set[str]:
        with self.store.engine.connect() as connection:
            return set(connection.exec_driver_sql("SELECT DISTINCT worker FROM ml_job_leases").scalars())

    def _stop(self, member: Member, holders: set[str]) -> None:
        stands = member.freeze()
        while self.cluster is None and stands and not can_write(self.store):  # SQLite's lock would stand still with it
            self.counts["SIGSTOPs inside a transaction of SQLite, taken back"] += 1
            member.send(SIGCONT)
            stands = member.freeze()
        if not stands:  # a job has killed it just now
            return
        self.counts["SIGSTOPs" + (" past the lease" if member.name in holders else " of an idle worker")] += 1
        self._holds.append(Hold("stop", {member.name}, lambda: member.send(SIGCONT)))

    def _stall(self, holders: set[str]) -> None:
        assert self.proxy is not None
        behind = {member.name for member in self.fleet.members if member.behind}
        self.counts["connections stalled"] += self.proxy.stall()
        self.counts["partitions" + (" past the lease" if behind & holders else " of idle workers")] += 1
        self._holds.append(Hold("stall", behind, self.proxy.heal))

    def _hit_server(self, act: str) -> None:
        assert self.cluster is not None
        assert self.proxy is not None
        if act == "reset":
            self.counts["connections reset"] += self.proxy.cut()
            self.counts["resets of the network"] += 1
            return
        self.store.close()
        self.cluster.stop(immediate=act == "restart immediate")
        self.cluster.start()
        self.counts[f"server restarts, {act.partition(' ')[2]}"] += 1

    def release(self) -> None:
        """End what has shown its effect: nobody behind it holds a lease any more."""
        if not self._holds:
            return
        holders = self._holders()
        for hold in list(self._holds):
            if not hold.workers & holders:
                logger.info("its leases are gone: %s ends", hold.act)
                hold.release()
                self._holds.remove(hold)

    def let_go(self) -> None:
        """End everything that lasts."""
        for hold in self._holds:
            hold.release()
        self._holds.clear()

    def cancel(self, number: int) -> None:
        """Cancel so many jobs of chance, running ones as often as there are."""
        with self.store.engine.connect() as connection:
            chosen = connection.exec_driver_sql(
                f"SELECT id FROM ml_jobs WHERE status IN ('queued', 'running') ORDER BY random() LIMIT {number}"
            ).all()
        for (job_id,) in chosen:
            try:
                self.counts["cancels that came in time" if self.store.cancel(job_id) else "cancels too late"] += 1
            except (DBAPIError, MlJobsError):
                self.counts["cancels whose answer was lost"] += 1
