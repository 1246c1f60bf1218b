"""Write our column types and CHECKs into the text of a migration; tokens as text, for an enum may change later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from sqlalchemy import CheckConstraint

from mljobs.guards._companions import without_parameters
from mljobs.types import DialectCheck, TokenType

_TYPES = "mljobs.types"
_KIND_CHECK = "kind IN ("
_Render = Callable[[str, Any, Any], "str | Literal[False]"]


def render_ours(options: dict[str, Any]) -> None:
    """Render our types in this environment, where the host's own ``render_item`` leaves them to Alembic."""
    of_host: _Render | None = options.get("render_item")
    if getattr(of_host, "renders_mljobs", False):
        return

    def render_item(kind: str, item: Any, context: Any) -> str | Literal[False]:
        found = of_host(kind, item, context) if of_host else False
        if found is False and isinstance(item, CheckConstraint) and _lists_kinds(item):
            prefixes = options["sqlalchemy_module_prefix"] or "", options["alembic_module_prefix"] or ""
            condition = without_parameters(str(item.sqltext))
            return f"{prefixes[0]}CheckConstraint({condition!r}, name={prefixes[1]}f({str(item.name)!r}))"
        if found is not False or type(item).__module__ != _TYPES:
            return found
        if isinstance(item, TokenType):  # not with its enum, which a host may rename; the CHECK lists the tokens
            return f"{options['sqlalchemy_module_prefix'] or ''}String(length={item.length})"
        context.imports.add(f"import {_TYPES}")
        if isinstance(item, DialectCheck):
            name = f"{options['alembic_module_prefix'] or ''}f({str(item.name)!r})"
            return f"{_TYPES}.{type(item).__name__}({str(item.sqltext)!r}, name={name})"
        return f"{_TYPES}.{item!r}"

    render_item.renders_mljobs = True  # type: ignore[attr-defined]
    options["render_item"] = render_item


def _lists_kinds(check: CheckConstraint) -> bool:
    """Whether this is our CHECK of kinds with a colon in one, which Alembic would write as a parameter."""
    condition = str(check.sqltext)
    return condition.startswith(_KIND_CHECK) and ":" in condition
