"""Lines, rows and records are the same in each other's form."""

from __future__ import annotations

import io
import json
from datetime import timedelta
from pathlib import Path
from random import Random, SystemRandom
from typing import Any
from uuid import UUID

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
from tests.cases import case
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


CHARACTERS = 'ab "\\/{}[]\t\n\x01\x7fé\u2028\uffff💩'


def _text(pick: Random) -> str:
    return "".join(pick.choices(CHARACTERS, k=pick.choice([0, 1, 5, 20])))


def _near_record(pick: Random) -> dict[str, Any]:
    """A line's values, most of them legal; by a plain generator, for Hypothesis takes twenty times as long."""

    def millis() -> int:
        return pick.choice([0, 1, 10**12, pick.randrange(10**13), 253_402_300_799_999])

    def hexadecimal() -> str:
        return UUID(int=pick.getrandbits(128)).hex

    record = {
        "created_at": pick.choice([millis(), millis(), -1, 2**60, pick.random() * 1e15]),
        "finished_at": pick.choice([millis(), millis(), -1]),
        "id": pick.choice([hexadecimal(), hexadecimal().upper(), "".join(pick.choices("09afAF -", k=32))]),
        "kind": pick.choice(["train", "backfill", "fit"]),
        "progress": pick.choice([0, 40, 100, -1, 300]),
        "spec": pick.choice(["{}", "[1,2]", "{", '"\\ud800"', "nul", _text(pick)]),
        "started_at": millis(),
        "status": pick.choice([*MlJobStatus, "done"]),
        "target": _text(pick),
    }
    optional = {
        "error": pick.choice([None, _text(pick), 5]),
        "metrics": pick.choice([None, "1", "x", True]),
        "attempts": pick.choice([-1, 0, 3, 32767, 32768]),
        "exclusive": pick.choice([True, False, None]),
        "priority": pick.choice([-32769, -32768, 0, 32767, _text(pick)]),
        "retry_of": pick.choice([None, hexadecimal(), _text(pick)]),
        "run_after": pick.choice([None, -1, 0, millis(), 10**15]),
        "worker": pick.choice([None, _text(pick), 5]),
        "at_epoch": pick.choice([None, [], ["started_at"], ["started_at", "finished_at"]]),
        "other": 1,
    }
    return record | {name: value for name, value in optional.items() if pick.random() < 0.5}


def _seeds(number: int) -> range:
    first = SystemRandom().getrandbits(32)
    return range(first, first + number)


@pytest.mark.parametrize("wire", _WIRES.values(), ids=_WIRES)
def test_the_typed_pass_agrees_with_the_exact_one(wire: Any) -> None:
    read = 0
    for seed in _seeds(1000):
        line = json.dumps(_near_record(Random(seed))).encode()
        results: list[Any] = []
        for make in (row_maker(wire, MlJobKind), lambda raw: _make_exactly(raw, wire, MlJobKind)):
            try:
                results.append(make(line))
            except RejectedLineError as error:
                results.append((error.field, error.reason))
        with case(seed):
            assert results[0] == results[1]
        read += len(results[0]) > 2
    assert 0 < read < 1000


@pytest.mark.parametrize("wire", _WIRES.values(), ids=_WIRES)
def test_extended_lines_and_rows_are_the_same(wire: Any) -> None:
    for seed in _seeds(300):
        pick = Random(seed)

        def millis(pick: Random = pick) -> int:
            return pick.choice([0, 1, pick.randrange(253_402_300_799_999), 253_402_300_799_999])

        values = {
            "created_at": millis(),
            "error_message": pick.choice([None, _text(pick)]),
            "finished_at": pick.choice([None, millis()]),
            "id": UUID(int=pick.getrandbits(128)),
            "kind": pick.choice([each.value for each in MlJobKind]),
            "metrics_json": pick.choice([None, "1", "null", ' {"a":\n1}']),
            "progress": pick.randrange(101),
            "spec_json": pick.choice(["{}", '"\\u0001"']),
            "started_at": pick.choice([None, millis()]),
            "status": pick.choice([each.value for each in MlJobStatus]),
            "target_name": _text(pick),
            "attempts": pick.choice([0, 1, 32767]),
            "exclusive": pick.random() < 0.5,
            "priority": pick.choice([-32768, 0, 32767]),
            "retry_of": pick.choice([None, UUID(int=pick.getrandbits(128))]),
            "run_after": pick.choice([None, millis()]),
            "worker": pick.choice([None, _text(pick)]),
        }
        row = []
        for at, name in enumerate(NAMES):
            value: Any = values[name]
            if value is not None and at in IDS:
                value = wire.id_in(value.hex)
            elif value is not None and (name.endswith("_at") or name == "run_after"):
                value = wire.time_in(value)
            row.append(value)
        line = line_maker(wire, extended=True)([row])
        with case(seed):
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
