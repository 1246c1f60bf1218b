"""The SQL that matters, as the operations send it, formatted; ``python -m tests.sql_text`` writes it into ``docs/sql``."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy.dialects import postgresql, sqlite

from mljobs import MlJob
from mljobs.db._prepared import Prepared, _Compiled
from mljobs.jobs import (
    _claiming,
    _exchanging,
    _fencing,
    _finishing,
    _holding,
    _picking,
    _rescuing,
    _starting,
    _submitting,
)

DOCS = Path(__file__).parent.parent / "docs" / "sql"
DIALECTS = {"PostgreSQL": postgresql.psycopg.dialect(), "SQLite": sqlite.dialect()}
_WIDTH = 118
_CLAUSES = (
    "WITH|SELECT|FROM|WHERE|GROUP BY|ORDER BY|LIMIT|FOR NO KEY UPDATE|FOR UPDATE|UNION ALL|INSERT INTO|UPDATE|SET|"
    "DELETE FROM|VALUES|RETURNING|ON CONFLICT|LEFT OUTER JOIN|JOIN"
)
_CLAUSE = re.compile(rf"\b({_CLAUSES})\b")
_BLOCK = re.compile(r"\((?=(?:SELECT|INSERT|UPDATE|DELETE)\b)")


def statements() -> Mapping[str, Mapping[str, list[Prepared]]]:
    """Return the statements of each operation, by page and database; on SQLite those that run in turn."""
    release = [_fencing.delete_statement(MlJob)]
    standing = [_fencing.standing_statement(MlJob)]
    pick = [_picking.pick_statement(MlJob, "any", 10)]
    begin = [*pick, _starting.lease_statement(MlJob), _starting.start_statement(MlJob)]
    finish = [_finishing._FINISH.part(MlJob), *standing, *release]
    expired = [_rescuing._expired_jobs(MlJob)]
    orphaned = [_rescuing._orphaned_jobs(MlJob)]
    cancel = [_finishing._cancellation(MlJob)]
    submit = [_submitting._insertion(MlJob, _submitting._NOT_DEFAULT)]
    return {
        "claim": {"PostgreSQL": [_claiming._claim_statement(MlJob, "any", 10)], "SQLite": begin},
        "renew": {
            "PostgreSQL": [_holding._renewal_statement(MlJob, True)],
            "SQLite": [_holding._extend_statement(MlJob), _holding._lost_statement(MlJob)],
        },
        "progress": {
            "PostgreSQL": [_holding._REPORT.statement(MlJob)],
            "SQLite": [_holding._REPORT.part(MlJob), *standing],
        },
        "finish": {"PostgreSQL": [_finishing._FINISH.statement(MlJob)], "SQLite": finish},
        "finish-and-claim": {
            "PostgreSQL": [_exchanging._statement(MlJob, "any", 10)],
            "SQLite": [*finish, *begin],
        },
        "rescue": {
            "PostgreSQL": [
                *expired,
                _finishing._FINISH.statement(MlJob),
                *orphaned,
                _rescuing._FINISH_ORPHANED.statement(MlJob),
                _rescuing._forgotten(MlJob),
            ],
            "SQLite": [
                *expired,
                *finish,
                *orphaned,
                _rescuing._FINISH_ORPHANED.part(MlJob),
                _rescuing._forgotten(MlJob),
            ],
        },
        "cancel": {"PostgreSQL": cancel, "SQLite": cancel},
        "submit": {"PostgreSQL": submit, "SQLite": submit},
    }


def compiled(prepared: Prepared, database: str) -> _Compiled:
    """Return what is compiled for a database."""
    dialect: Any = DIALECTS[database]
    return prepared._text(dialect, {})


def text_of(prepared: Prepared, database: str) -> str:
    """Return the text of a statement in one line, its parameters as ``:name``."""
    one = compiled(prepared, database)
    text = re.sub(r"%\((\w+)\)s", r":\1", one.text).replace("%%", "%")
    if one.positional:
        names = iter(one.names)
        text = re.sub(r"\?", lambda _: f":{next(names)}", text)
    text = re.sub(r" AS anon_\d+(?=\))", "", text)  # names that nobody uses
    return re.sub(r"\( ", "(", re.sub(r"\s+", " ", text)).strip()


def formatted(text: str) -> str:
    """Return a statement with a line for each clause, and each subquery indented."""
    return "\n".join(_lines(text, 0)) + ";"


def _lines(text: str, indent: int) -> Iterator[str]:
    """Yield the lines of a statement; a subquery that fits stays in its line."""
    for clause in _clauses(text):
        line = " " * indent + clause
        if len(line) <= _WIDTH:
            yield line
            continue
        found = _BLOCK.search(clause)
        if found is None:
            yield from textwrap.wrap(
                line, _WIDTH, subsequent_indent=" " * (indent + 4), break_long_words=False, break_on_hyphens=False
            )
            continue
        end = _closing(clause, found.start())
        yield " " * indent + clause[: found.end()]
        yield from _lines(clause[found.end() : end], indent + 2)
        rest = clause[end:]
        yield from _lines_of_rest(rest, indent)


def _lines_of_rest(rest: str, indent: int) -> Iterator[str]:
    found = _BLOCK.search(rest)
    if found is None or len(rest) + indent <= _WIDTH:
        yield from textwrap.wrap(
            " " * indent + rest,
            _WIDTH,
            subsequent_indent=" " * (indent + 4),
            break_long_words=False,
            break_on_hyphens=False,
        )
        return
    end = _closing(rest, found.start())
    yield " " * indent + rest[: found.end()]
    yield from _lines(rest[found.end() : end], indent + 2)
    yield from _lines_of_rest(rest[end:], indent)


def _clauses(text: str) -> list[str]:
    """Split a statement before each clause that stands in no parentheses."""
    starts, depth = [0], 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and at and text[at - 1] == " " and _CLAUSE.match(text, at):
            before = text[starts[-1] : at].split()
            within = before[-1:] in (["DISTINCT"], ["DELETE"], ["KEY"], ["FOR"], ["OUTER"], ["DO"])
            if not within and not text.startswith("WITH TIME ZONE", at):
                starts.append(at)
    ends = [*starts[1:], len(text)]
    return [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]


def _closing(text: str, opening: int) -> int:
    """Return where the parenthesis that opens there is closed."""
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(text)


def blocks(page: str) -> str:
    """Return the part of a page that is written by this module: each statement of each database."""
    parts = []
    for database, ones in statements()[page].items():
        parts.append(f"## {database}\n")
        for number, one in enumerate(ones, 1):
            if len(ones) > 1:
                parts.append(f"{number} of {len(ones)}:\n")
            parts.append(f"```sql\n{formatted(text_of(one, database))}\n```\n")
    return "\n".join(parts)


def squeezed(text: str) -> str:
    """Return a text without white space, which formatting changes."""
    return re.sub(r"\s", "", text)


def written(page: str) -> str:
    """Return the text of the page as it stands in the repository."""
    return (DOCS / f"{page}.md").read_text()


if __name__ == "__main__":
    for name in statements():
        before, _, _ = written(name).partition("## PostgreSQL\n")
        (DOCS / f"{name}.md").write_text(before + blocks(name))
