"""The built wheel in an environment of its own, once a session: what a user installs, not what lies in the checkout."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel.

    Attributes:
        python: Its interpreter.
    """

    python: Path

    @property
    def environment(self) -> dict[str, str]:
        """What its processes are started with."""
        return _outside()

    def run(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run ``python ...`` in a directory."""
        return subprocess.run(
            [self.python, *arguments], cwd=cwd, env=self.environment, capture_output=True, text=True, check=False
        )


def _outside() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE", "COV_"))}


def install(shared: Path) -> Installed:
    """Build the wheel and install it, unless another test process has; all else comes from the running environment.

    Args:
        shared: A directory that the test processes have in common.
    """
    home = shared / "installed"
    python = home / "bin" / "python"
    with (shared / "installed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "ready").exists():
            _run([sys.executable, "-m", "venv", "--without-pip", home])
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
            _run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", home / "dist", ROOT])
            (wheel,) = (home / "dist").glob("mljobs-*.whl")
            _run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel])
            packages = Path(_run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
            # Behind the wheel, which therefore wins over the checkout that the running environment has installed.
            (packages / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
            (home / "ready").touch()
    return Installed(python)


def _run(command: list[object]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, env=_outside())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
