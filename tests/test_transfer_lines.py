"""Lines, rows and records are the same in each other's form."""

from __future__ import annotations

import io
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from mljobs import (
    InvalidValueError,
    JobStore,
    MlJob,
    MlJobKind,
    MlJobStatus,
)
from mljobs._values import from_millis, storable_json, storable_text
from mljobs.db._rows import insert_rows
from mljobs.db._wire import _WIRES
from mljobs.errors import JobDecodeError
from mljobs.jobs import table_of
from mljobs.record import _kv as codec_module
from mljobs.transfer import _lines as lines
from mljobs.transfer._encoding import line_maker
from mljobs.transfer._rows import IDS, NAMES, SHARED, RejectedLineError, _make_exactly, row_maker
from tests.backends import Backend
from tests.transfer_jobs import NOW, VECTORS, job


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --------------------------------------------------------------------------------------------------- lines and rows


@pytest.mark.parametrize("name", list(_WIRES))
def test_rows_say_what_reddb_reads(name: str) -> None:
    wire = _WIRES[name]
    make, back = row_maker(wire, MlJobKind), line_maker(wire, extended=False)
    seen = {"read": 0, "refused": 0, "unfit": 0}
    for text in VECTORS.read_text().splitlines():
        vector = json.loads(text)
        raw = vector["raw"].encode(errors="surrogatepass")
        try:
            row = make(raw)
        except RejectedLineError as error:
            if vector["canonical"] is None:
                seen["refused"] += 1
                continue
            try:
                record = codec_module.decode(raw)
            except JobDecodeError:
                seen["unfit"] += 1  # stricter on purpose; see codec.decode
                continue
            with pytest.raises(InvalidValueError) as caught:
                storable_text("error", record.error or "")
                storable_json("metrics", "0" if record.metrics is None else record.metrics)
                storable_json("spec", record.spec)
                storable_text("target", record.target)
            assert caught.value.field == error.field  # noqa: PT017 - of two that refuse the same
            seen["unfit"] += 1
        else:
            assert back([row[:SHARED]]).decode() == vector["canonical"] + "\n"
            seen["read"] += 1
    assert min(seen.values()) > 50


_texts = st.text(st.characters(codec="utf-8"), max_size=20)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "created_at": st.integers(0, 2**60) | st.floats(0, 1e15),
            "finished_at": st.integers(-1, 10**13),
            "id": st.uuids().map(lambda each: each.hex) | st.text("0123456789abcdefABCDEF -", min_size=32, max_size=32),
            "kind": st.sampled_from(["train", "backfill", "fit"]),
            "progress": st.integers(-1, 300),
            "spec": st.sampled_from(["{}", "[1,2]", "{", '"\\ud800"', "nul"]) | _texts,
            "started_at": st.integers(0, 10**13),
            "status": st.sampled_from([*MlJobStatus, "done"]),
            "target": _texts,
        },
        optional={
            "error": st.none() | _texts | st.integers(),
            "metrics": st.none() | st.sampled_from(["1", "x"]) | st.booleans(),
            "attempts": st.integers(-1, 40_000),
            "exclusive": st.booleans() | st.none(),
            "priority": st.integers(-40_000, 40_000) | _texts,
            "retry_of": st.none() | st.uuids().map(lambda each: each.hex) | _texts,
            "run_after": st.none() | st.integers(-1, 10**15),
            "worker": st.none() | _texts | st.integers(),
            "at_epoch": st.none() | st.lists(st.sampled_from(["started_at", "finished_at"])),
            "other": st.integers(),
        },
    ),
    st.sampled_from(list(_WIRES.values())),
)
def test_the_typed_pass_agrees_with_the_exact_one(record: dict[str, Any], wire: Any) -> None:
    line = json.dumps(record).encode()
    results: list[Any] = []
    for make in (row_maker(wire, MlJobKind), lambda raw: _make_exactly(raw, wire, MlJobKind)):
        try:
            results.append(make(line))
        except RejectedLineError as error:
            results.append((error.field, error.reason))
    assert results[0] == results[1]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(list(_WIRES.values())))
def test_extended_lines_and_rows_are_the_same(data: st.DataObject, wire: Any) -> None:
    millis = st.integers(0, 253_402_300_799_999) | st.just(0)
    small = st.integers(-32768, 32767)
    values = {
        "created_at": millis,
        "error_message": st.none() | _texts.map(lambda text: text.replace("\x00", "")),
        "finished_at": st.none() | millis,
        "id": st.uuids(),
        "kind": st.sampled_from([each.value for each in MlJobKind]),
        "metrics_json": st.none() | st.sampled_from(["1", "null", ' {"a":\n1}']),
        "progress": st.integers(0, 100),
        "spec_json": st.sampled_from(["{}", '"\\u0001"']),
        "started_at": st.none() | millis,
        "status": st.sampled_from([each.value for each in MlJobStatus]),
        "target_name": _texts.map(lambda text: text.replace("\x00", "")),
        "attempts": st.integers(0, 32767),
        "exclusive": st.booleans(),
        "priority": small,
        "retry_of": st.none() | st.uuids(),
        "run_after": st.none() | millis,
        "worker": st.none() | _texts.map(lambda text: text.replace("\x00", "")),
    }
    row = []
    for at, name in enumerate(NAMES):
        value = data.draw(values[name])
        if value is not None and at in IDS:
            value = wire.id_in(value.hex)
        elif value is not None and (name.endswith("_at") or name == "run_after"):
            value = wire.time_in(value)
        row.append(value)
    line = line_maker(wire, extended=True)([row])
    assert row_maker(wire, MlJobKind)(line[:-1]) == tuple(row)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b"")), max_size=30),
    st.integers(1, 30),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.sampled_from([b"", b"\n"]),
)
def test_lines_are_cut_where_they_end_whatever_the_blocks(
    parts: list[bytes], block: int, mark: bytes, end: bytes
) -> None:
    data = mark + b"\n".join(parts) + end
    stream = io.BytesIO(data)
    found: dict[int, bytes] = {}
    for batch in lines.batches(
        lambda _: stream.read(block), lambda number, rest: found.update({number: b"".join(rest)}), longest=25
    ):
        found.update({batch.first + at: line for at, line in enumerate(batch.lines)})
    expected = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    assert [found[number] for number in sorted(found)] == expected
    assert sorted(found) == list(range(1, len(expected) + 1))


def test_rows_that_python_values_made_are_exported_alike(backend: Backend, store: Any) -> None:
    def act(session: Session) -> None:
        table = table_of(MlJob)
        names = [column.name for column in table.columns]
        one = job(attempts=1)
        insert_rows(session.connection(), table, names, [[getattr(one, name) for name in names]])

    backend.run(act)
    file = io.BytesIO()
    store.export_jobs(file)
    assert json.loads(file.getvalue())["created_at"] == (NOW - from_millis(0)) // timedelta(milliseconds=1)


@pytest.mark.parametrize("name", ["jobs.ndjson.bz2", "jobs.xz", "jobs.zip"])
def test_the_name_of_another_archive_is_refused(full: JobStore, name: str) -> None:
    for move in (full.export_jobs, full.import_jobs):
        with pytest.raises(InvalidValueError, match=r"\.gz and \.zst") as caught:
            move(name)
        assert (caught.value.field, caught.value.value) == ("file", name)
    assert not Path(name).exists()
