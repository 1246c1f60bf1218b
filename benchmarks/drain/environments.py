"""An environment for each rival, made once and kept: their dependencies do not meet ours, nor each other's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HOME = Path(os.environ.get("BENCH_ENVIRONMENTS", Path.home() / ".cache" / "mljobs-benchmarks"))
PACKAGES = {
    "pgqueuer": ["pgqueuer==1.6.0", "asyncpg==0.32.0", "uvloop==0.23.0"],
    "procrastinate": ["procrastinate==3.10.0", "psycopg[binary,pool]==3.3.9"],
    "oban": ["oban==0.7.0", "psycopg[binary,pool]==3.3.9", "uvloop==0.23.0"],
}
NEEDS_NEWER = {"oban": (3, 12)}  # than the Python that mljobs runs on
NODE = {"graphile": "graphile-worker@0.18.0"}


def interpreter(rival: str) -> list[str] | None:
    """Return what runs a rival's program; None, with the reason printed, where it cannot be had here."""
    if rival in ("mljobs", "raw"):
        return [sys.executable]
    place = HOME / rival
    if rival in NODE:
        return _node(rival, place)
    if not (place / "bin" / "python").exists():
        python = _python(NEEDS_NEWER.get(rival, (3, 11)))
        if python is None:
            print(f"{rival}: needs Python {'.'.join(map(str, NEEDS_NEWER[rival]))}; name one in BENCH_PYTHON")
            return None
        subprocess.run([python, "-m", "venv", place], check=True)
        subprocess.run([place / "bin" / "pip", "install", "-q", *PACKAGES[rival]], check=True)
    return [str(place / "bin" / "python")]


def _python(least: tuple[int, int]) -> str | None:
    """Return a Python of this version or a later one."""
    wanted = os.environ.get("BENCH_PYTHON")
    on_path = (f"python3.{minor}" for minor in range(least[1], 20))
    pyenv = sorted(map(str, Path.home().glob(".pyenv/versions/3.*/bin/python")))
    for candidate in (sys.executable, wanted, *on_path, *pyenv):
        if candidate and shutil.which(candidate) and _version(candidate) >= least:
            return candidate
    return None


def _version(python: str) -> tuple[int, ...]:
    code = "import sys; print(*sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return tuple(map(int, done.stdout.split()))  # none of a shim that leads nowhere


def _node(rival: str, place: Path) -> list[str] | None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        print(f"{rival}: needs node and npm")
        return None
    if not (place / "node_modules").exists():
        place.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "--prefix", place, NODE[rival]], check=True)
    return ["env", f"NODE_PATH={place / 'node_modules'}", "node"]
