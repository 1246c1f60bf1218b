"""The plugin for Alembic: job tables in the ``env.py`` and the migrations of a host whose models have ``MlJobMixin``.

- :mod:`~mljobs.alembic_plugin._operations`: ``op.create_mljobs_guard`` and ``op.drop_mljobs_guard``;
- :mod:`~mljobs.alembic_plugin._views`: ``op.create_mljobs_overview`` and ``op.drop_mljobs_overview``;
- :mod:`~mljobs.alembic_plugin._comparing`: what autogenerate and ``alembic check`` see of job tables;
- :mod:`~mljobs.alembic_plugin._rendering`: our column types and CHECKs in a migration's text;
- :mod:`~mljobs.alembic_plugin._rebuilding`: a batch that rebuilds a SQLite table keeps its guard;
- :mod:`~mljobs.alembic_plugin._placing`: a host's new revision never lands among ours.

Alembic from 1.18 on finds this package by the entry point ``alembic.plugins``; with an older one an ``env.py`` says
``import mljobs.alembic_plugin``. ``autogenerate_plugins=["alembic.autogenerate.*", "~mljobs"]`` turns the comparison off.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any


def setup(plugin: Any) -> None:
    """Take part in autogenerate; Alembic calls it once, while it is being imported.

    By default an environment runs the plugins in ``alembic.autogenerate.*`` and no other. Ours is one of them, for a host
    that never heard of this must not drop the tables of our migrations; and it has its plain name beside.
    """
    from alembic.runtime.plugins import Plugin  # noqa: PLC0415 - since Alembic 1.18
    from alembic.util import DispatchPriority  # noqa: PLC0415

    for each in (plugin, Plugin("alembic.autogenerate.mljobs")):
        each.add_autogenerate_comparator(_hide_own_tables, "schema", "mljobs_first", priority=DispatchPriority.FIRST)
        each.add_autogenerate_comparator(_compare, "schema", "mljobs", priority=DispatchPriority.LAST)


def _compare(context: Any, upgrade: Any, schemas: Iterable[str | None]) -> Any:
    from mljobs.alembic_plugin._comparing import compare  # noqa: PLC0415 - Alembic itself is not whole yet at import

    compare(context, upgrade, schemas)


def _hide_own_tables(context: Any, _upgrade: Any, schemas: Iterable[str | None]) -> Any:
    from mljobs.alembic_plugin._comparing import hide_own_tables  # noqa: PLC0415 - as above

    hide_own_tables(context, schemas)


class _ModuleOrModules(ModuleType):
    def __iter__(self) -> Iterator[ModuleType]:
        return iter((self,))


# The first releases with plugins iterate over what an entry point names, the later ones take a module.
sys.modules[__name__].__class__ = _ModuleOrModules

# After setup: where a host imports this package before Alembic, the next line makes Alembic ask for it.
from mljobs.alembic_plugin import _operations, _placing, _rebuilding, _views  # noqa: E402, F401

try:
    import alembic.runtime.plugins  # noqa: F401
except ImportError:  # before 1.18
    from alembic.autogenerate.compare import comparators

    comparators.dispatch_for("schema")(_compare)
    getattr(comparators, "_registry")["schema", "default"].insert(0, _hide_own_tables)  # noqa: B009 - it has no priorities
