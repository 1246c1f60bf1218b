"""Every place that names a state has decided what it does with each of them."""

from __future__ import annotations

import ast
from pathlib import Path

from mljobs import MlJobStatus
from mljobs.states import ACTIVE, TERMINAL

PACKAGE = Path(__file__).parent.parent / "mljobs"

DECIDED: dict[str, int] = {}
"""Modules that have been looked at for a new state: for how many states each has decided. Empty it again at the end."""
STATES = 5
"""For how many states every other module has decided."""


def _names_states(path: Path) -> bool:
    text = path.read_text()
    if "MlJobStatus" not in text and "mljobs.states" not in text:
        return False  # to parse all that is there takes a second
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr.isupper() and ast.unparse(node.value) == "MlJobStatus":
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "mljobs.states":
            names = {alias.name for alias in node.names}
            if names & {"TERMINAL", "ACTIVE"}:
                return True
    return False


def test_every_place_has_decided_for_every_state_and_none_is_said_to_that_names_none() -> None:
    places = (
        sorted(  # that name a state, or the final or the active ones; the others derive from the table of transitions
            path.relative_to(PACKAGE).as_posix()
            for path in PACKAGE.rglob("*.py")
            if path != PACKAGE / "states.py" and _names_states(path)
        )
    )
    undecided = [place for place in places if DECIDED.get(place, STATES) != len(MlJobStatus)]
    assert undecided == [], "look at what each does with the new state, then say so here"
    assert len(places) > 20
    assert DECIDED.keys() <= set(places)


def test_the_short_conditions_of_postgresqls_triggers_are_true_for_all_that_is_refused() -> None:
    """One comparison by bytes each; of what is legal they let the guard's function look at cancelled jobs that waited."""
    from mljobs.guards._companions import _LAST_REFUSED

    states = {state.value.encode(): state for state in MlJobStatus}
    assert [state for token, state in states.items() if token <= max(TERMINAL).encode()] == list(TERMINAL)
    looked_at = {
        (old, new)
        for old_token, old in states.items()
        for new_token, new in states.items()
        if old_token + new_token <= _LAST_REFUSED.encode()
    }
    refused = {(old, new) for old in states.values() for new in states.values() if old.is_terminal}
    refused |= {(old, new) for old in ACTIVE for new in MlJobStatus if old is not new and not old.can_become(new)}
    assert looked_at - refused == {(MlJobStatus.QUEUED, MlJobStatus.CANCELLED)}
    assert refused <= looked_at
