"""Wait for what another thread or process does, without sleeping for a fixed time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine

PATIENCE = 60.0
"""Seconds after which what was waited for will not come."""


def until(what: Callable[[], Any], *, patience: float = PATIENCE) -> Any:
    """Wait until ``what`` returns something true, and return that."""
    pause = threading.Event()
    end = time.monotonic() + patience
    while not (found := what()):
        assert time.monotonic() < end, f"waited {patience} s in vain"
        pause.wait(0.02)
    return found


def until_blocked(engine: Engine) -> None:
    """Wait until somebody waits for a lock on the server."""
    pause = threading.Event()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for _ in range(600):
            waiting = connection.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE NOT granted").scalar_one()
            if waiting:
                return
            pause.wait(0.05)
    raise AssertionError("nobody waits")
