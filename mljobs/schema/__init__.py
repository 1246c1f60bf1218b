"""The tables of mljobs in a database: upgrade, downgrade, verify.

Every upgrade is one transaction, on SQLite too, and waits for an upgrade that another process has begun. The version
is kept in ``mljobs_alembic_version``, a table of our own, so it never meets a host's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mljobs._lazy import lazy_names

if TYPE_CHECKING:
    from mljobs.schema._catalog import OWN_TABLES, VERSION_TABLE
    from mljobs.schema._versions import (
        Target,
        current,
        downgrade,
        head,
        is_ours,
        migrating,
        migrations_path,
        ready,
        stamp,
        upgrade,
        verify,
    )

__all__ = [
    "OWN_TABLES",
    "VERSION_TABLE",
    "Target",
    "current",
    "downgrade",
    "head",
    "is_ours",
    "migrating",
    "migrations_path",
    "ready",
    "stamp",
    "upgrade",
    "verify",
]

__getattr__, __dir__ = lazy_names(__name__, __all__, "_versions", {"_catalog": ("OWN_TABLES", "VERSION_TABLE")})
