"""Network namespaces as hosts, by ``ip``, which needs root."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from types import TracebackType
from typing import Self

_BRIDGE = f"mlj{os.getpid() % 10_000}"
_NET = "10.213.77"
OUTSIDE = f"{_NET}.254"
"""The address of the machine itself, where the test runs."""


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Host:
    """A namespace with an address.

    Args:
        number: The last part of its address.

    Attributes:
        address: Where the others reach it.
        enter: What a command begins with that runs on this host.
    """

    def __init__(self, number: int) -> None:
        self._name, self._link = f"{_BRIDGE}-{number}", f"{_BRIDGE}v{number}"
        self.address = f"{_NET}.{number}"
        self.enter = ("ip", "netns", "exec", self._name)
        _ip("netns", "add", self._name)
        inside = f"{self._link}i"
        _ip("link", "add", self._link, "type", "veth", "peer", "name", inside, "netns", self._name)
        _ip("-n", self._name, "addr", "add", f"{self.address}/24", "dev", inside)
        for device in ("lo", inside):
            _ip("-n", self._name, "link", "set", device, "up")
        _ip("link", "set", self._link, "up")
        self.heal()

    def cut(self) -> None:
        """Take the link off the bridge: the device stays up, and nobody is told."""
        _ip("link", "set", self._link, "nomaster")

    def heal(self) -> None:
        """Put the link back on the bridge."""
        _ip("link", "set", self._link, "master", _BRIDGE)

    def remove(self) -> None:
        """Remove the namespace, its devices with it."""
        with suppress(RuntimeError):
            _ip("netns", "del", self._name)


class Network:
    """A bridge, and hosts on it, which are gone at the end."""

    def __init__(self) -> None:
        self._hosts: list[Host] = []

    def host(self) -> Host:
        """Add a host."""
        self._hosts.append(Host(len(self._hosts) + 1))
        return self._hosts[-1]

    def __enter__(self) -> Self:
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{OUTSIDE}/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self._hosts:
            host.remove()
        _ip("link", "del", _BRIDGE)
