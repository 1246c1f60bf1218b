"""Keep a host's new revision out of our directory of revisions.

With one history Alembic puts a revision beside the head it follows. Where the only head is ours, the host's first one would
go into the installed package, and every database that mljobs upgrades would get it. No event of Alembic comes before that
(``process_revision_directives`` belongs to the host, and a revision without autogenerate asks no ``env.py``), so the one
method that writes a revision is wrapped here.
"""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

from alembic.script import ScriptDirectory
from alembic.util import CommandError

_generate = ScriptDirectory.generate_revision


@wraps(_generate)
def _generate_elsewhere(  # noqa: PLR0917 - Alembic's own
    self: Any,
    revid: str,
    message: str | None,
    head: Any = None,
    splice: bool | None = False,  # noqa: FBT001, FBT002
    branch_labels: Any = None,
    version_path: Any = None,
    **options: Any,
) -> Any:
    from mljobs.schema._versions import migrations_path  # noqa: PLC0415 - Alembic itself is not whole yet at import

    ours = migrations_path().resolve()
    if Path(self.dir).resolve() != ours:  # in our own history it is ours that are made
        if version_path is None:
            version_path = _beside_their_head(self, head, ours)
        if version_path is not None and _is_in(version_path, ours):
            raise CommandError(_ADVICE.format(_first_of(self, ours)))
    return _generate(self, revid, message, head, splice, branch_labels, version_path, **options)


_ADVICE = (
    "this revision would be written into the installed mljobs, after one of its own. Begin a history of yours beside it, "
    "with a label: alembic revision --autogenerate --head base --branch-label app --version-path {} -m ...; "
    "the later ones: alembic revision --autogenerate --head app@head -m ..."
)


def _beside_their_head(script: Any, head: Any, ours: Path) -> Path | None:
    """Return where the first head is that is not ours, else where ours is; None where Alembic has something to say first."""
    try:
        heads = script.get_revisions("head" if head is None else head)
    except CommandError:
        return None
    places = [Path(found.path).parent for found in heads if found is not None]
    if not any(_is_in(place, ours) for place in places):
        return None
    return next((place for place in places if not _is_in(place, ours)), places[0])


def _is_in(place: Any, ours: Path) -> bool:
    return Path(place).resolve().is_relative_to(ours)


def _first_of(script: Any, ours: Path) -> str:
    """Return the host's own directory of revisions, as one types it."""
    for location in map(Path, script._version_locations):  # noqa: SLF001 - the public one is as in the ini
        if not _is_in(location, ours):
            here = Path.cwd()
            return str(location.relative_to(here) if location.is_relative_to(here) else location)
    return "migrations/versions"


ScriptDirectory.generate_revision = _generate_elsewhere  # type: ignore[assignment, method-assign]
