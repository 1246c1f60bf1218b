"""Loggers whose handlers and filters, which are the host's, may raise: no job is lost for a line of log."""

from __future__ import annotations

import logging

_stderr = logging.Handler()


def logger_of(name: str) -> logging.Logger:
    """Return the logger of this name; what its handlers or filters raise is printed, as their own errors are.

    A thread that keeps leases or records outcomes would end with it otherwise.
    """
    logger = logging.getLogger(name)
    handle = logger.handle
    if not hasattr(handle, "guarded"):

        def guarded(record: logging.LogRecord) -> None:
            try:
                handle(record)
            except Exception:  # noqa: BLE001 - the host's
                _stderr.handleError(record)

        guarded.guarded = True  # type: ignore[attr-defined]
        logger.handle = guarded  # type: ignore[method-assign]
    return logger
