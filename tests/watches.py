"""Looks of a watch that are called by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mljobs.store._following import Locked, Read


def yielded_by(steps: Any, read: Callable[[Read], Any]) -> list[Any]:
    """Return the jobs that a look yields.

    Args:
        steps: The look.
        read: Answers what it asks of the database.
    """
    found, answer = [], None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration:
            return found
        answer = None
        if isinstance(step, Read | Locked):
            answer = answered(step, read)
        else:
            found.append(step)


def answered(step: Read | Locked, read: Callable[[Read], Any]) -> Any:
    """Return what is to be sent to steps that ask for this."""
    if isinstance(step, Read):
        return read(step)
    answer, steps = None, step.steps()
    with step.lock:
        while True:
            try:
                answer = read(steps.send(answer))
            except StopIteration as stop:
                return stop.value
