"""Wait for what another thread or process does, without sleeping for a fixed time."""

from __future__ import annotations

import threading

from sqlalchemy import Engine


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
