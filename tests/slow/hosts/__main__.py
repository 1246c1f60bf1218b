"""Run jobs on two hosts while the link of one is cut and healed, and print the counts."""
# ruff: noqa: T201 - prints its counts

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any

from mljobs import JobStore, MlJob, schema
from tests import postgres
from tests.slow.chaos import audit, ledger
from tests.slow.chaos.battle import _ROWS
from tests.slow.chaos.fleet import _COUNTED, ROOT
from tests.slow.chaos.verdict import Evidence, judge
from tests.slow.hosts.network import Host, Network
from tests.waiting import until

_LEASE = 3.0
_CUTS = 3
_WORKERS = 2  # on each of the two hosts


class HostCluster(postgres.Cluster):
    """A server on a host of its own, which others reach by its address."""

    def __init__(self, work: Path, host: Host) -> None:
        super().__init__(work, fsync=True)
        self._host = host
        with (work / "data" / "pg_hba.conf").open("a") as rules:
            rules.write("host all all samenet trust\n")

    @property
    def url(self) -> str:
        """As of ``Cluster``, by the address of the host."""
        return super().url.replace("127.0.0.1", self._host.address)

    def start(self) -> None:
        """Start the server in the namespace, and wait until it answers outside."""
        account = [f"--reuid={self._account['user']}", f"--regid={self._account['group']}", "--clear-groups"]
        options = [f"port={self.port}", f"listen_addresses={self._host.address}", "unix_socket_directories="]
        with (self._work / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(*self._host.enter, "setpriv", *account),
                    *(self.binaries / "postgres", "-D", self._work / "data"),
                    *(part for option in options for part in ("-c", option)),
                ],
                stdout=log,
                stderr=log,
                cwd=self._work,
            )

        def answers() -> bool:
            try:
                schema.upgrade(self.url)
            except Exception as error:
                if self._process is None or self._process.poll() is not None:
                    raise RuntimeError((self._work / "log").read_text()) from error
                return False
            return True

        until(answers)


@contextmanager
def _server(work: Path, host: Host) -> Iterator[HostCluster]:
    work.mkdir()
    work.parent.chmod(0o755)
    cluster = HostCluster(work, host)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _start(host: Host, name: str, url: str, work: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "MLJOBS_DATABASE_URL": url,
        "CHAOS_LEDGER": str(work / "ledger"),
        "CHAOS_CONCURRENCY": "4",
        "CHAOS_LEASE": str(_LEASE),
        "CHAOS_MAX_ATTEMPTS": "5",
    }
    with (work / f"{name}.log").open("wb") as out:
        return subprocess.Popen(
            [*host.enter, sys.executable, "-m", "mljobs", "work", "tests.slow.chaos.app:worker", "--name", name],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )


def _jobs(number: int, random: Random) -> Iterator[MlJob]:
    for at in range(number):
        kind = random.choice(["train", "train", "backfill", "feature_refresh", "drift_compute"])
        spec: dict[str, Any] = {"fail": 128} if at % 5 == 0 else {}
        if kind != "drift_compute":  # a coroutine, which must not sleep so
            spec["seconds"] = round(random.uniform(0.1, 0.8), 2)
        target = f"only_{at % 12}" if at % 8 == 0 else f"target_{at}"
        yield MlJob(kind=kind, target_name=target, spec=spec, exclusive=at % 8 == 0)


class _Course:
    """What is done to the link, and what is seen."""

    def __init__(self, store: JobStore, lonely: Host) -> None:
        self._store, self._lonely = store, lonely
        self.counts: Counter[str] = Counter()

    def _wait(self, seen: Callable[[], bool]) -> None:
        until(seen, patience=120)

    def _holders(self) -> set[str]:
        return {holder.worker for holder in self._store.holders()}

    def _ended(self) -> int:
        counts = self._store.counts(exact=True)
        return counts.total() - counts.total(status="queued") - counts.total(status="running")

    def cut_past_the_lease(self) -> None:
        """Cut the link until all leases of its host are gone, and others have ended jobs since; then heal it."""
        self._wait(lambda: any(name.startswith("far") for name in self._holders()))
        self._lonely.cut()
        self.counts["link cut past the lease"] += 1
        self._wait(lambda: not any(name.startswith("far") for name in self._holders()))
        self._lonely.heal()
        before = self._ended()
        self._wait(lambda: self._ended() > before and any(name.startswith("far") for name in self._holders()))
        self.counts["healed, and its workers claimed again"] += 1

    def cut_for_a_moment(self) -> None:
        """Cut the link for a third of a lease: nobody loses anything."""
        self._wait(lambda: any(name.startswith("far") for name in self._holders()))
        self._lonely.cut()
        time.sleep(_LEASE / 3)
        self._lonely.heal()
        self.counts["link cut for a third of a lease"] += 1


def _evidence(store: JobStore, submitted: set[str], path: Path) -> Evidence:
    names = _ROWS.split(", ")
    with store.engine.connect() as connection:
        found = connection.exec_driver_sql(f"SELECT {_ROWS} FROM ml_jobs")
        rows: list[dict[str, Any]] = [dict(zip(names, row, strict=True)) for row in found]
        leases = connection.exec_driver_sql("SELECT count(*) FROM ml_job_leases").scalar_one()
    calls, wrong = ledger.read(path)
    by_id = {str(row["id"]).replace("-", ""): row for row in rows}
    return Evidence(submitted, by_id, leases, audit.read(store.engine), calls, 5, wrong)


def main() -> int:
    """Return 0 if everything held."""
    parser = argparse.ArgumentParser(prog="python -m tests.slow.hosts", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    asked = parser.parse_args()
    print(f"seed {asked.seed}, {asked.jobs} jobs, two hosts of {_WORKERS} workers, {_CUTS} cuts of each kind")
    began, work = time.monotonic(), Path(tempfile.mkdtemp(prefix="mljobs-hosts-"))
    wrong: list[str] = []
    with ExitStack() as stack:
        network = stack.enter_context(Network())
        database, near, far = network.host(), network.host(), network.host()
        url = stack.enter_context(_server(work / "server", database)).url
        store = stack.enter_context(JobStore(url))
        audit.install(store.engine)
        jobs = list(_jobs(asked.jobs, Random(asked.seed)))
        submitted = {job.id.hex for job in jobs}
        store.submit_many(jobs)
        workers = {
            f"{name}{number}": _start(host, f"{name}{number}", url, work)
            for name, host in (("near", near), ("far", far))
            for number in range(_WORKERS)
        }
        for process in workers.values():
            stack.callback(process.kill)
        course = _Course(store, far)
        for _ in range(_CUTS):
            course.cut_past_the_lease()
            course.cut_for_a_moment()
        until(lambda: not store.find("status:queued,running", limit=1) and not store.holders(), patience=600)
        for name, process in workers.items():
            process.send_signal(signal.SIGTERM)
            if process.wait(60):
                wrong.append(f"{name} ended with {process.returncode}")
        evidence = _evidence(store, submitted, work / "ledger")
        counts = course.counts + judge(evidence)
        wrong += evidence.wrong
    logs = "\n".join(path.read_text() for path in work.glob("*.log"))
    for what, pattern in _COUNTED.items():
        counts[what] += sum(int(found[1]) if found.groups() else 1 for found in re.finditer(pattern, logs))
    if "Traceback" in logs:
        wrong.append(logs[logs.index("Traceback") :][:2000])
    for what, number in sorted(counts.items()):
        if number:
            print(f"{number:>8} {what}")
    print(f"{time.monotonic() - began:>8.0f} seconds")
    for why in wrong[:50]:
        print(f"WRONG: {why}")
    print("everything held" if not wrong else f"{len(wrong)} things do not hold")
    print(f"logs, ledger: {work}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
