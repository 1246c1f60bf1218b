"""The SQL that matters can be read in ``docs/sql``, and is planned as it should be."""

from __future__ import annotations

import pytest

from tests.sql_text import DOCS, blocks, compiled, squeezed, statements, text_of, written


@pytest.mark.parametrize("page", statements())
def test_the_page_shows_the_sql_that_is_sent(page: str) -> None:
    assert written(page).partition("## PostgreSQL\n")[1:] != ("", ""), "the page has no SQL"
    assert written(page).endswith(blocks(page)), "run `python -m tests.sql_text`"


@pytest.mark.parametrize("page", statements())
def test_formatting_changes_nothing_but_white_space(page: str) -> None:
    shown = squeezed(written(page))
    for database, ones in statements()[page].items():
        for one in ones:
            assert squeezed(text_of(one, database)) in shown


def test_prepared_statements_hide_no_constant_in_a_parameter() -> None:
    """A partial index serves ``status = 'queued'``, never ``status = $1``."""
    for of_databases in statements().values():
        for database, ones in of_databases.items():
            for one in ones:
                hidden = {name: value for name, value in compiled(one, database).fixed.items() if value != 0}
                assert hidden == {}, text_of(one, database)  # SQLite's LIMIT has an OFFSET of 0


def test_every_page_is_of_an_operation() -> None:
    assert {path.stem for path in DOCS.glob("*.md")} == {*statements(), "README"}
