"""What keeps a finished job as it is: ORM hooks, triggers, and the one way to delete old records.

Three rings, each enough alone for the writes it sees:

1. the operations in :mod:`mljobs.jobs` name the state and the lease that they expect in their ``UPDATE``;
2. the ORM hooks refuse a flush early, with a clear error;
3. the triggers in the database refuse everything else, raw SQL included.

The names load on first use: Alembic's plugin reads the triggers' text without the ORM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mljobs._lazy import lazy_names

if TYPE_CHECKING:
    from mljobs.guards._errors import translate_error
    from mljobs.guards._hooks import enforce_sqlite
    from mljobs.guards._retention import retention

__all__ = ["enforce_sqlite", "retention", "translate_error"]

__getattr__, __dir__ = lazy_names(
    __name__, __all__, "_retention", {"_hooks": ("enforce_sqlite",), "_errors": ("translate_error",)}
)
