"""See the package: rivals in turn, repeat by repeat, and what came of it."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import psycopg

from benchmarks.bench import REPEATS
from benchmarks.drain.environments import NODE, interpreter
from tests import postgres

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SCALE = float(os.environ.get("BENCH_SCALE", "1"))
DRAINED = {
    "mljobs": 40_000,
    "raw": 40_000,
    "pgqueuer": 40_000,
    "graphile": 40_000,
    "oban": 8_000,
    "procrastinate": 2_000,
}
ONE_BY_ONE = 2_000
SAMPLES = 200
IDLE_SECONDS = 60
RIVALS = os.environ.get("BENCH_RIVALS", "raw,pgqueuer,procrastinate,oban,graphile").split(",")
PROCESSES = tuple(int(count) for count in os.environ.get("BENCH_PROCESSES", "1,2").split(","))
TICK = os.sysconf("SC_CLK_TCK")


class Bench:
    """A server, and the rivals' programs."""

    def __init__(self, server: str, rivals: list[str]) -> None:
        self.server = server.replace("+psycopg", "")
        self.commands = {name: command for name in rivals if (command := interpreter(name)) is not None}

    def address(self, rival: str) -> str:
        return f"{self.server.rpartition('/')[0]}/bench_{rival}"

    def fill(self, rival: str, number: int) -> None:
        with psycopg.connect(self.server, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS bench_{rival} WITH (FORCE)")
            connection.execute(f"CREATE DATABASE bench_{rival}")
        program = "mljobs" if rival == "raw" else rival
        subprocess.run(
            self._call(program, "fill", self.address(rival), str(number)), check=True, env=self._environment()
        )
        with psycopg.connect(self.address(rival), autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE")
            connection.execute("CHECKPOINT")

    @contextmanager
    def program(self, rival: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Run a rival's program, and wait until it is ready."""
        with subprocess.Popen(
            self._call(rival, arguments[0], self.address(rival), *arguments[1:]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self._environment(),
        ) as process:
            try:
                assert "ready" in line(process.stdout), f"{rival} did not start"
                yield process
            finally:
                process.kill()

    def _call(self, rival: str, action: str, *arguments: str) -> list[str]:
        program = HERE / "programs" / (f"{rival}_.js" if rival in NODE else f"{rival}_.py")
        return [*self.commands.get(rival, [sys.executable]), str(program), action, *arguments]

    @staticmethod
    def _environment() -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT)}

    def drain(self, rival: str, processes: int, mode: str, number: int) -> tuple[float, float]:
        """Return jobs a second, and microseconds of CPU a job in all processes, the server's among them."""
        self.fill(rival, number)
        with ExitStack() as stack:
            running = [stack.enter_context(self.program(rival, "drain", mode)) for _ in range(processes)]
            before, began = self.cpu(running), time.perf_counter()
            for process in running:
                say(process.stdin)
            for process in running:
                line(process.stdout)
            seconds = time.perf_counter() - began
            return number / seconds, (self.cpu(running) - before) / number * 1e6

    def cpu(self, processes: list[subprocess.Popen[str]]) -> float:
        """Return the seconds of CPU that the server and these processes have used so far."""
        with psycopg.connect(self.server) as connection:
            server, _ = ticks(connection.info.backend_pid)
        everything = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
        of_server = sum(ticks(pid)[1] for pid in everything if pid == server or ticks(pid)[0] == server)
        return (of_server + sum(ticks(process.pid)[1] for process in processes)) / TICK


def ticks(pid: int) -> tuple[int, int]:
    """Return the parent of a process, and the CPU that it and those of its children that have ended have used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, 0
    return int(fields[1]), sum(map(int, fields[11:15]))


def line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline()


def say(stream: IO[str] | None) -> None:
    assert stream is not None
    stream.write("\n")
    stream.flush()


def middle(values: list[float], form: str = ",.0f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} .. {max(values):{form}})"


def drain(bench: Bench, *, processes: tuple[int, ...] = PROCESSES, mode: str = "batch") -> None:
    for count in processes:
        what = "one job at a time" if mode == "single" else "no-op jobs"
        print(f"\n{what}, {count} process(es): jobs/s, CPU us/job, mljobs / rival")
        found: dict[str, list[tuple[float, float]]] = {rival: [] for rival in bench.commands}
        for _ in range(REPEATS):
            for rival in bench.commands:
                number = ONE_BY_ONE if mode == "single" else DRAINED[rival]
                found[rival].append(bench.drain(rival, count, mode, max(100, int(number * SCALE))))
        ours = [rate for rate, _ in found["mljobs"]]
        for rival, pairs in found.items():
            ratios = [mine / rate for mine, (rate, _) in zip(ours, pairs, strict=True)]
            rates, costs = middle([rate for rate, _ in pairs]), middle([cost for _, cost in pairs])
            print(f"  {rival:<14} {rates:>30}   {costs:>20}   {middle(ratios, '.2f')}", flush=True)


def single(bench: Bench) -> None:
    drain(bench, processes=(1,), mode="single")


def latency(bench: Bench) -> None:
    """From the call of submit to the first line of the handler, on an idle queue, the rivals in turn."""
    rivals = [rival for rival in bench.commands if rival not in NODE]
    found: dict[str, list[float]] = {rival: [] for rival in rivals}
    with ExitStack() as stack:
        pairs: dict[str, Any] = {}
        for rival in rivals:
            bench.fill(rival, 0)
            pairs[rival] = (
                stack.enter_context(bench.program(rival, "listen")),
                stack.enter_context(bench.program(rival, "submit")),
            )
        time.sleep(3)
        for sample in range(max(20, int(SAMPLES * SCALE)) + 5):
            for rival, (listener, submitter) in pairs.items():
                say(submitter.stdin)
                began, started = float(line(submitter.stdout)), float(line(listener.stdout))
                if sample >= 5:
                    found[rival].append((started - began) * 1000)
                time.sleep(0.02)  # until it is idle again
    print("\nsubmit to start on an idle queue, ms: median, 99th percentile")
    for rival, values in found.items():
        values.sort()
        print(f"  {rival:<14} {statistics.median(values):6.2f} {values[int(len(values) * 0.99)]:6.2f}", flush=True)


def idle(bench: Bench) -> None:
    """What a worker with nothing to do costs in a minute."""
    rivals = [rival for rival in bench.commands if rival not in NODE and rival != "raw"]
    with ExitStack() as stack:
        workers = {}
        for rival in rivals:
            bench.fill(rival, 0)
            workers[rival] = stack.enter_context(bench.program(rival, "listen"))
        time.sleep(5)
        before = {rival: (ticks(process.pid)[1], transactions(bench, rival)) for rival, process in workers.items()}
        seconds = max(10, IDLE_SECONDS * SCALE)
        time.sleep(seconds)
        print("\nan idle worker, a minute: ms of CPU in the worker, transactions")
        for rival, process in workers.items():
            cpu, count = ticks(process.pid)[1] - before[rival][0], transactions(bench, rival) - before[rival][1]
            print(f"  {rival:<14} {cpu / TICK * 1000 * 60 / seconds:8.0f} {count * 60 / seconds:8.0f}", flush=True)


def transactions(bench: Bench, rival: str) -> int:
    with psycopg.connect(bench.server) as connection:
        query = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s"
        ((number,),) = connection.execute(query, [f"bench_{rival}"]).fetchall()
        return int(number)


PARTS = {"drain": drain, "single": single, "latency": latency, "idle": idle}

if __name__ == "__main__":
    with postgres.server() as server:
        bench = Bench(server.url, ["mljobs", *RIVALS])
        for name in sys.argv[1:] or PARTS:
            PARTS[name](bench)
