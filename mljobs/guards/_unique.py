"""Whether a UNIQUE index of SQLite may hold finished records: INSERT OR REPLACE would remove one without any trigger.

The index is judged by its text, the same where a class is defined and where a database is verified. What is not understood
is taken for an index that holds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mljobs._fields import NAMES
from mljobs.states import ACTIVE

_TOKEN = re.compile(
    r"""--[^\n]*|/\*.*?\*/|(?P<token>'(?:[^']|'')*'|"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^]]*]|\w+|[^\s\w])""", re.DOTALL
)
_ACTIVE = "|".join(f"'{status}'" for status in ACTIVE)
_IS_ACTIVE = re.compile(rf"status (?:=|= =|is) (?:{_ACTIVE})|status in \( (?:{_ACTIVE})(?: , (?:{_ACTIVE}))* \)")
_NOT_UNDERSTOOD = frozenset({"or", "between", "case"})
"""What a condition has outside brackets where AND may not be what joins its parts."""


def finished_key(definition: str) -> list[str]:
    """Return what names the record, or nothing at all, in a key that finished records may be held by; else an empty list.

    Args:
        definition: ``CREATE UNIQUE INDEX ... ON ... (key) WHERE condition``, or from the key's bracket on.
    """
    tokens = [_lower(found["token"]) for found in _TOKEN.finditer(definition) if found["token"]]
    start = tokens.index("(")
    end = _end_of(tokens, start)
    if tokens[end + 1 : end + 2] == ["where"] and _only_active(tokens[end + 2 :]):
        return []
    parts = list(_split(tokens[start + 1 : end], ","))
    if any(part[0] == "id" and set(part[1:]) <= {"asc", "desc"} for part in parts):  # no other row has the same values
        return []
    named = []
    for part in parts:
        names = [
            _bare(each) for each, after in zip(part, [*part[1:], ""], strict=True) if after != "(" and _is_name(each)
        ]
        named += [name for name in names if name in NAMES] if names else [" ".join(part)]
    return named


def _lower(token: str) -> str:
    """Return a token as SQL compares it: names and keywords in lower case, without quotes that are not needed."""
    if token.startswith("'"):
        return token
    bare = _bare(token).lower()
    return bare if token[0] not in '"`[' or bare in NAMES else f'"{bare}"'


def _bare(token: str) -> str:
    return token[1:-1] if token[0] in "'\"`[" and len(token) > 1 else token


def _is_name(token: str) -> bool:
    return not token[0].isdigit() and re.match(r"\w|['\"]", token) is not None


def _end_of(tokens: Sequence[str], start: int) -> int:
    """Return where the bracket ends that begins at ``start``."""
    depth = 0
    for at in range(start, len(tokens)):
        depth += (tokens[at] == "(") - (tokens[at] == ")")
        if not depth:
            return at
    return len(tokens)


def _split(tokens: Sequence[str], separator: str) -> Iterator[Sequence[str]]:
    """Yield the parts between separators that stand in no bracket."""
    begin = depth = 0
    for at, token in enumerate(tokens):
        depth += (token == "(") - (token == ")")  # noqa: S105 - a bracket
        if token == separator and not depth:
            yield tokens[begin:at]
            begin = at + 1
    yield tokens[begin:]


def _only_active(condition: Sequence[str]) -> bool:
    """Whether a condition holds for queued and running records only."""
    if condition and condition[0] == "(" and _end_of(condition, 0) == len(condition) - 1:
        return _only_active(condition[1:-1])
    if any(len(list(_split(condition, word))) > 1 for word in _NOT_UNDERSTOOD):
        return False
    parts = list(_split(condition, "and"))
    if len(parts) == 1:
        return _IS_ACTIVE.fullmatch(" ".join(condition)) is not None
    return any(_only_active(part) for part in parts)
