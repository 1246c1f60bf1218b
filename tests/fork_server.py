"""Runs Python commands without the cost of starting Python: each in a fork of a process that has imported everything.

Importing SQLAlchemy and Alembic takes most of the time of a short command. This file is both: the tests' side, and the
program that the interpreter of those commands runs.
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep  # a test may replace time.sleep
from types import MappingProxyType
from typing import IO, Any, NoReturn, Self

_PAUSE = 0.005


def forkserver() -> ForkServerContext:
    """Return a way to start processes of :mod:`multiprocessing`, each a fork of one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded", "pytest"])  # test files, which it unpickles from, import it
    return context


@cache
def shared() -> ForkServer:
    """Return the one fork server of this process, which it has until its end."""
    server = ForkServer(sys.executable)
    atexit.register(server.__exit__)
    return server


class ForkServer:
    """A process that forks a child for each command.

    Args:
        python: The interpreter.
        env: Its environment, and that of each command; the test process's own if None.
    """

    def __init__(self, python: Path | str, env: Mapping[str, str] | None = None) -> None:
        self._env = dict(os.environ if env is None else env)
        self._process = subprocess.Popen(
            [python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._env
        )

    def run(
        self, *arguments: str, cwd: Path, env: Mapping[str, str] = MappingProxyType({})
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python ...``, where the first argument is ``-m``, ``-c`` or a file.

        Args:
            *arguments: Of the command.
            cwd: The directory that it runs in.
            env: Added to its environment. What Python itself reads at its start has no effect.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with TemporaryDirectory() as directory:
            outputs = [Path(directory) / name for name in ("stdout", "stderr")]
            request = {
                "arguments": arguments,
                "cwd": str(cwd),
                "env": {**self._env, **env},
                "outputs": [str(it) for it in outputs],
            }
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(arguments, code, *(output.read_text() for output in outputs))

    def start(self, *arguments: str, cwd: Path, env: Mapping[str, str], output: Path | None = None) -> Forked:
        """Start ``python ...`` and return it as it runs.

        Args:
            *arguments: Of the command.
            cwd: The directory that it runs in.
            env: Its environment.
            output: The file that it writes to, and then it reads nothing; pipes if None.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        directory = TemporaryDirectory()
        if output is None:
            pipes = [str(Path(directory.name) / name) for name in ("stdin", "stdout", "stderr")]
            for pipe in pipes:
                os.mkfifo(pipe)
        else:
            output.touch()
            pipes = [os.devnull, str(output), str(output)]
        status = Path(directory.name) / "status"
        request = {"arguments": arguments, "cwd": str(cwd), "env": dict(env), "pipes": pipes, "status": str(status)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Forked(int(self._process.stdout.readline()), pipes, status, directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


class Forked:
    """A process that a fork server has started: what of `subprocess.Popen` the tests use."""

    def __init__(self, pid: int, pipes: list[str], status: Path, directory: TemporaryDirectory[str]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        # In the order in which the process opens them.
        self.stdin: IO[str] = Path(pipes[0]).open("w")  # noqa: SIM115 - until close()
        self.stdout: IO[str] = Path(pipes[1]).open()  # noqa: SIM115 - the reader closes it
        self.stderr: IO[str] = Path(pipes[2]).open()  # noqa: SIM115 - the reader closes it
        self._status = status
        self._directory = directory

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        if self.returncode is None and self._status.exists():
            self.returncode = int(self._status.read_text())
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for its end; return the exit code."""
        end = monotonic() + timeout
        while self.poll() is None:
            if monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            sleep(_PAUSE)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def stops(self) -> bool:
        """Wait until each of its threads stands still, after a SIGSTOP; return False if it has ended."""
        while self.poll() is None:
            states = [task.read_text().rpartition(") ")[2][0] for task in Path(f"/proc/{self.pid}/task").glob("*/stat")]
            if states and not set(states) - {"T"}:
                return True
            sleep(_PAUSE)
        return False

    def close(self) -> None:
        """Close its input and remove its pipes."""
        for pipe in (self.stdin, self.stdout, self.stderr):
            pipe.close()
        self._directory.cleanup()


def _serve() -> None:
    sys.path.pop(0)  # this file's directory
    runpy.run_path(str(Path(__file__).with_name("preloaded.py")))
    gc.freeze()  # a child that collected garbage would copy all that was imported
    for line in sys.stdin:
        request = json.loads(line)
        if "status" in request:
            sys.stdout.write(f"{_start(request)}\n")
            sys.stdout.flush()
            continue
        child = os.fork()
        if child == 0:
            _become(**request)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _start(request: dict[str, Any]) -> int:
    """Start a process; another waits for it, and leaves the exit code in a file."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(reading)
        child = os.fork()
        if child == 0:
            os.close(writing)
            del request["status"]
            _become(outputs=[], **request)
        os.write(writing, str(child).encode())
        os.close(writing)
        _, status = os.waitpid(child, 0)
        path = Path(request["status"])
        path.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(status)))
        path.with_suffix(".new").rename(path)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pid:
        return int(pid.read())


def _become(
    arguments: list[str], cwd: str, env: dict[str, str], outputs: list[str], pipes: Sequence[str] = ()
) -> NoReturn:
    for number, path in enumerate(pipes or [os.devnull, *outputs]):
        to_write = os.O_WRONLY | os.O_APPEND if pipes else os.O_RDWR
        opened = os.open(path, to_write | os.O_CREAT if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    try:
        _run(arguments, cwd)
        code = 0
    except SystemExit as exited:
        if isinstance(exited.code, str):
            sys.stderr.write(f"{exited.code}\n")
        code = exited.code if isinstance(exited.code, int) else int(exited.code is not None)
    except BaseException:  # noqa: BLE001 - Python's own end would say it in the same way
        traceback.print_exc()
        code = 1
    # Python's own end would take down, object by object, what the server has imported: half a second.
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads, as that would
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(arguments: list[str], cwd: str) -> None:
    first, *rest = arguments
    if first == "-m":
        sys.argv = rest
        sys.path.insert(0, cwd)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str((Path(cwd) / first).parent))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    _serve()
