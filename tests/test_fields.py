"""One table of the record's fields: what does not derive from it is held to it here, by name."""

from __future__ import annotations

import ast
from inspect import get_annotations, getsource
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.dialects import postgresql, sqlite

from mljobs import MlJob, MlJobDataclassMixin, MlJobMixin
from mljobs._fields import EXTENDED_FIELDS, FIELDS, KV_FIELDS, NAMES, Field
from mljobs.contrib.pydantic import MlJobRead
from mljobs.guards._companions import companion_ddl
from mljobs.record._kv import KvRecord
from mljobs.transfer import _rows as rows

SHOWN_AS = {"spec_json": "spec", "metrics_json": "metrics"}
NOT_SHOWN = {"lease"}
"""The present, not the record: see the leases."""


def test_the_columns_of_a_job_table_are_the_fields_in_their_order() -> None:
    assert tuple(MlJob.__table__.c.keys()) == NAMES


@pytest.mark.parametrize("dialect", [postgresql.dialect(), sqlite.dialect()], ids=lambda dialect: dialect.name)
def test_the_guard_refuses_an_update_of_each_field(dialect: Any) -> None:
    texts = [str(each.compile(dialect=dialect)) for each in companion_ddl(MlJob.__table__, dialect.name)]
    (columns,) = [
        text.partition(" UPDATE OF ")[2].partition(" ON ")[0] for text in texts if "_guard_update BEFORE" in text
    ]
    assert columns.replace('"', "").split(", ") == list(NAMES)


@pytest.mark.parametrize("mixin", [MlJobMixin, MlJobDataclassMixin])
def test_both_mixins_declare_each_field(mixin: type[Any]) -> None:
    declared = [name for name, hint in get_annotations(mixin).items() if str(hint).startswith("Mapped[")]
    assert tuple(declared) == NAMES


def test_type_checkers_see_each_field_in_the_constructor() -> None:
    tree = ast.parse(getsource(MlJobMixin))
    init = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    assert {argument.arg for argument in init.args.kwonlyargs} == {*NAMES, *SHOWN_AS.values()}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_field_is_what_its_column_is(field: Field) -> None:
    column = MlJob.__table__.c[field.name]
    assert column.nullable is field.nullable
    assert (column.server_default is not None) is (field.server_default is not None)
    if field.name != "kind":
        assert column.type.python_type is field.python
    if field.kv_key is None and not field.nullable:
        assert field.default is not None, "an import has no value for it"
    assert not (field.kv_key and field.extended), "a line has a key once"


def test_a_read_model_shows_each_field() -> None:
    assert set(MlJobRead.model_fields) >= {SHOWN_AS.get(name, name) for name in NAMES if name not in NOT_SHOWN}


def test_a_kv_record_has_the_keys_that_reddb_writes_in_their_order() -> None:
    assert KvRecord.__struct_fields__ == tuple(field.kv_key for field in KV_FIELDS) == rows.KEYS
    assert tuple(field.name for field in EXTENDED_FIELDS) == rows.OWN


def test_the_page_on_transfer_names_each_key_of_an_extended_line() -> None:
    page = (Path(__file__).parent.parent / "docs" / "transfer.md").read_text()
    assert all(f"`{field.name}`" in page for field in EXTENDED_FIELDS)
