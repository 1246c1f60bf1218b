"""Many cases in one test, on one database: each is named in the failure that it causes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def case(*names: object) -> Iterator[None]:
    """Say in the failure of this block which case it was."""
    try:
        yield
    except BaseException as failure:
        failure.add_note(f"the case: {', '.join(map(ascii, names))}")
        raise
