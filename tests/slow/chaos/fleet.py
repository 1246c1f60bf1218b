"""Workers as processes, some behind the proxy; whoever dies is replaced."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.fork_server import Forked, ForkServer

ROOT = Path(__file__).parents[3]
_REFUSED = 1
logger = logging.getLogger("chaos")

_COUNTED = {
    "rescued: queued again": r"rescued jobs .*: (\d+) queued again",
    "rescued: failed after the last attempt": r"rescued jobs .* (\d+) failed,",
    "rescued: leases of cancelled jobs ended": r"rescued jobs .* (\d+) leases ended",
    "retries submitted": r"will be retried as",
    "outcomes dropped because the lease was lost": r" lost after ",
    "waits: to record an outcome": r"cannot record the end",
    "waits: to claim": r"cannot claim jobs yet",
    "waits: to renew leases": r"cannot renew",
    "waits: to look for lost jobs": r"cannot look for lost jobs",
    "answers given up by the client": r"has not answered within",
    "handlers put back at a stop": r"puts back what has not ended in time; jobs: (\d+)",
}


@dataclass
class Member:
    """One process.

    Attributes:
        name: Its worker's name.
        behind: Whether it is behind the proxy.
        process: The process.
        log: Where it writes.
        told: The signals that it was sent and that end it.
        stopped: Whether it stands still now.
    """

    name: str
    behind: bool
    process: Forked
    log: Path
    told: list[signal.Signals] = field(default_factory=list)
    stopped: bool = False

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        if number in (signal.SIGKILL, signal.SIGTERM):
            self.told.append(number)
        if number is signal.SIGCONT:
            self.stopped = False
        self.process.send_signal(number)

    def freeze(self) -> bool:
        """Have it stand still until SIGCONT; return False if it has ended by itself."""
        self.stopped = True
        self.process.send_signal(signal.SIGSTOP)
        return self.process.stops()


class Fleet:
    """The processes.

    Args:
        urls: Of the database: as it is, and behind the proxy; the same where there is none.
        size: How many at a time.
        work: A directory for their logs.
        variables: Of their environment.
        forks: Starts them.
    """

    def __init__(
        self, urls: tuple[str, str], size: int, work: Path, variables: dict[str, str], forks: ForkServer
    ) -> None:
        self._forks = forks
        self._urls = urls
        self._size = size
        self._work = work
        self._variables = variables
        self._all: list[Member] = []
        self.members: list[Member] = []
        self.poisoned = 0
        self.refused = 0
        self.wrong: list[str] = []

    def tend(self) -> None:
        """Take note of who has died; start new ones in their place."""
        for member in list(self.members):
            code = member.process.poll()
            if code is not None:
                self.members.remove(member)
                self._note(member, code)
        behind = sum(member.behind for member in self.members)
        while len(self.members) < self._size:
            self._start(behind=behind < self._size // 2)
            behind += self.members[-1].behind

    def _start(self, *, behind: bool) -> None:
        name = f"w{len(self._all)}"
        log = self._work / f"{name}.log"
        environment = {**os.environ, **self._variables, "MLJOBS_DATABASE_URL": self._urls[behind]}
        command = ("-m", "mljobs", "work", "tests.slow.chaos.app:worker", "--name", name)
        process = self._forks.start(*command, cwd=ROOT, env=environment, output=log)
        logger.info("%s begins%s", name, ", behind the proxy" if behind else "")
        member = Member(name, behind, process, log)
        self._all.append(member)
        self.members.append(member)

    def _note(self, member: Member, code: int) -> None:
        """Judge an end: who was not told to end ended by poison, or never found the database."""
        if code == 0 and signal.SIGTERM in member.told:
            return
        said = member.log.read_text()
        if code == -signal.SIGTERM and signal.SIGTERM in member.told and (" begins: " in said) == (" ends: " in said):
            return  # before it could hear, or after all was done
        if code == -signal.SIGKILL and (signal.SIGKILL in member.told or "CHAOS_POISON" in self._variables):
            self.poisoned += signal.SIGKILL not in member.told
            return
        if code == _REFUSED and said.startswith("mljobs: ") and said.count("\n") == 1:
            self.refused += 1  # it was started while the server was away
            return
        self.wrong.append(f"{member.name} ended with {code}, told {member.told}: {said[-2000:]}")

    def choose(self, random: Random, names: set[str]) -> Member | None:
        """Choose one that moves, if possible one of those named."""
        moving = [member for member in self.members if not member.stopped]
        return random.choice([member for member in moving if member.name in names] or moving) if moving else None

    def end(self, patience: float) -> None:
        """Have all end well."""
        for member in self.members:
            if member.stopped:
                member.send(signal.SIGCONT)
            member.send(signal.SIGTERM)
        for member in self.members:
            try:
                self._note(member, member.process.wait(patience))
            except subprocess.TimeoutExpired:
                self.wrong.append(f"{member.name} has not ended {patience} s after SIGTERM")
        self.kill()

    def kill(self) -> None:
        """End all that still live."""
        for member in self._all:
            if member.process.poll() is None:
                member.process.send_signal(signal.SIGKILL)
                member.process.wait(30)
            member.process.close()

    def counts(self) -> Counter[str]:
        """Return what their logs tell."""
        found: Counter[str] = Counter()
        for member in self._all:
            text = member.log.read_text()
            if "Traceback" in text:
                self.wrong.append(f"{member.name} met an unexpected error: {text[text.index('Traceback') :][:2000]}")
            for what, pattern in _COUNTED.items():
                for match in re.finditer(pattern, text):
                    found[what] += int(match[1]) if match.groups() else 1
        found["worker processes"] = len(self._all)
        found["starts refused while the server was away"] = self.refused
        found["deaths by a job that kills its worker"] = self.poisoned
        return found
