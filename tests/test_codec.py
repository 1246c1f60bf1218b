"""The codec: what RedDB's KV JSON is, what it is not, and that nothing else ever comes out."""

from __future__ import annotations

import json
import sys
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from random import Random, SystemRandom
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mljobs.errors import InvalidValueError, JobDecodeError
from mljobs.record._kv import MAX_MS, KvRecord, _decode_exactly, decode, duration_ms, encode
from mljobs.states import MlJobKind, MlJobStatus, Token
from tests.cases import case

VECTORS = [
    json.loads(line)
    for line in (Path(__file__).parent / "vectors" / "kv_records.jsonl").read_text(encoding="utf-8").splitlines()
]
RECORD = KvRecord(
    created_at=1_700_000_000_123,
    error=None,
    finished_at=0,
    id=UUID("0191e4a2-7c3b-7def-8000-0123456789ab"),
    kind=MlJobKind.TRAIN,
    metrics='{"auc": 0.91}',
    progress=40,
    spec='{"lr": 0.1}',
    started_at=1_700_000_000_456,
    status=MlJobStatus.RUNNING,
    target="churn",
)
VALUES: dict[str, str] = {key: json.dumps(value) for key, value in json.loads(encode(RECORD)).items()}
KEYS = list(VALUES)
NUMBERS = ["created_at", "finished_at", "progress", "started_at"]
STRINGS = ["id", "kind", "spec", "status", "target"]
OPTIONAL = ["error", "metrics"]


def written(**values: str) -> str:
    """Return RECORD's text with the JSON text of some values replaced."""
    return "{" + ",".join(f'"{key}":{value}' for key, value in {**VALUES, **values}.items()) + "}"


def refusal(raw: Any, kinds: type[StrEnum] = MlJobKind) -> JobDecodeError:
    """Return the error that refuses ``raw``, which the exact path must refuse as well."""
    with pytest.raises(JobDecodeError) as caught:
        decode(raw, kinds)
    if isinstance(raw, (str, bytes)):
        with pytest.raises(JobDecodeError):
            _decode_exactly(raw, kinds)
    return caught.value


def outcome(raw: str | bytes, *, exactly: bool = False) -> KvRecord | str:
    try:
        return _decode_exactly(raw, MlJobKind) if exactly else decode(raw)
    except JobDecodeError as error:
        return str(error)


# ---------------------------------------------------------------------------------------------- a second opinion


def reference(raw: str | bytes) -> KvRecord | None:
    """Return the record, or None where it is refused: the rules once more, on the standard library's parser."""
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
        text.encode()
        found = json.loads(text, parse_int=Decimal, parse_float=Decimal, parse_constant=Decimal, object_pairs_hook=list)
        json.dumps(found, ensure_ascii=False, default=_finite).encode()
        if not text.lstrip(" \t\r\n").startswith("{"):
            return None
        values = dict(found)
        strings = {key: values[key] for key in STRINGS}
        numbers = {key: values[key] for key in NUMBERS}
        if not all(isinstance(value, str) for value in strings.values()):
            return None
        if not all(isinstance(value, Decimal) and 0 <= value < 2**63 for value in numbers.values()):
            return None
        if len(strings["id"]) != 32 or set(strings["id"]) - set("0123456789abcdefABCDEF"):
            return None
        whole = {key: int(value) for key, value in numbers.items()}
        if max(whole["created_at"], whole["started_at"], whole["finished_at"]) > MAX_MS:
            return None
        optional: dict[str, Any] = {key: values.get(key) for key in OPTIONAL}
        optional = {key: value if isinstance(value, str) else None for key, value in optional.items()}
        return KvRecord(
            id=UUID(hex=strings["id"]),
            kind=MlJobKind(strings["kind"]),
            status=MlJobStatus(strings["status"]),
            spec=strings["spec"],
            target=strings["target"],
            created_at=whole["created_at"],
            started_at=whole["started_at"],
            finished_at=whole["finished_at"],
            progress=min(whole["progress"], 100),
            **optional,
        )
    except (ValueError, KeyError):
        return None


def _finite(number: Decimal) -> str:
    if not number.is_finite():
        raise ValueError(number)
    return ""


# --------------------------------------------------------------------------------------------------- strategies

texts = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from('"\\/\b\f\n\r\t\x00\x1f\x7f\u2028\uffff💩')))
millis = st.integers(0, MAX_MS)
records = st.builds(
    KvRecord,
    created_at=millis,
    error=st.none() | texts,
    finished_at=millis,
    id=st.uuids(),
    kind=st.sampled_from(MlJobKind),
    metrics=st.none() | texts,
    progress=st.integers(0, 100),
    spec=texts,
    started_at=millis,
    status=st.sampled_from(MlJobStatus),
    target=texts,
)
FRAGMENTS = [
    *(
        "0",
        "-0",
        "-0.0",
        "-0e5",
        "7.9",
        "-0.5",
        "-1",
        "1e2",
        "1E+1",
        "1e-1",
        "1.7e12",
        "1700000000123.0",
        "253402300799999.9",
    ),
    *(
        "253402300800000",
        "9223372036854775807",
        "9223372036854775807.5",
        "9223372036854775808",
        "1e19",
        "1e400",
        "0.1e2",
    ),
    *("01", "1.", ".5", "+1", "1e", "0x10", "NaN", "Infinity", "-Infinity", "-", "1_0", "true", "false", "null", "nul"),
    *("[]", "{}", "[1,]", '{"a":1,}', '{"a":[{"b":"\\ud800"}]}', '["\\ud83d\\ude00"]', '""', '"x"', '"\\q"', '"\\u12"'),
    *('"\\ud800"', '"\\udc00"', '"\\ud800\\u0041"', '"\\ud83d\\ude00"', '"\ud800"', '"\x01"', '"\x7f"', '"\\u0000"'),
    *(
        '"train"',
        '"done"',
        '"TRAIN"',
        '"running"',
        '"\\u0072unning"',
        '"0191E4A27C3B7DEF80000123456789AB"',
        "'x'",
        "/**/",
    ),
    *(
        '"0191e4a2-7c3b-7def-8000-0123456789ab"',
        '"+191e4a27c3b7def80000123456789ab"',
        '"1_91e4a27c3b7def80000123456789a"',
    ),
    *(
        '"\u0660191e4a27c3b7def80000123456789a"',
        '"\\u0030191e4a27c3b7def80000123456789ab"',
        "\xa0",
        "\x0b",
        "\ufeff",
        "\x00",
    ),
    *(
        ",",
        ":",
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        " ",
        "\t\r\n",
        '"extra":1,',
        '"status":3,',
        '"spec":"later",',
        '"\\u0069d":0,',
    ),
]


CHARACTERS = '"\\/\b\f\n\r\t\x00\x1f\x7f\u2028\uffff💩'


def _text(pick: Random) -> str:
    planes = (0x80, 0xD800, 0x110000)
    drawn = (chr(pick.randrange(0xE000 if limit > 0xD800 else 0, limit)) for limit in pick.choices(planes, k=12))
    return "".join(pick.choice([pick.choice(CHARACTERS), char]) for char in drawn)[: pick.randrange(13)]


def _record(pick: Random) -> KvRecord:
    def millis() -> int:
        return pick.choice([0, 1, MAX_MS, pick.randrange(MAX_MS)])

    return KvRecord(
        created_at=millis(),
        error=pick.choice([None, _text(pick)]),
        finished_at=millis(),
        id=UUID(int=pick.getrandbits(128)),
        kind=pick.choice(list(MlJobKind)),
        metrics=pick.choice([None, _text(pick)]),
        progress=pick.randrange(101),
        spec=_text(pick),
        started_at=millis(),
        status=pick.choice(list(MlJobStatus)),
        target=_text(pick),
    )


def near_record(pick: Random) -> str:
    """Text that is almost a record: values replaced, keys doubled, moved, lost or unknown, then characters edited.

    By a plain generator: Hypothesis takes twenty times as long to draw one, and its shrinking is not needed to read one.
    """
    values = json.loads(encode(_record(pick)))
    pairs = [(key, json.dumps(value, ensure_ascii=pick.random() < 0.5)) for key, value in values.items()]
    more = [*KEYS, "extra", "\\u0073tatus"]
    pairs += [(pick.choice(more), pick.choice(FRAGMENTS)) for _ in range(pick.choice([0, 0, 1, 2]))]
    pick.shuffle(pairs)
    pairs = pairs[pick.choice([0, 0, 0, 1]) :]
    gap = pick.choice(["", " ", "\n\t", "\x0b"])
    text = gap + "{" + ",".join(f'{gap}"{key}"{gap}:{gap}{value}{gap}' for key, value in pairs) + "}" + gap
    for _ in range(pick.choice([0, 0, 1, 2])):
        start = pick.randrange(len(text) + 1)
        end = min(len(text), start + pick.randrange(4))
        text = text[:start] + pick.choice(["", *FRAGMENTS, chr(pick.randrange(0x110000))]) + text[end:]
    return text


# ------------------------------------------------------------------------------------------- RedDB and round trips


def test_there_are_vectors() -> None:
    assert len(VECTORS) == 1500
    assert not any(vector["canonical"] for vector in VECTORS if vector.get("deviates"))


@pytest.mark.parametrize("as_bytes", [False, True])
def test_every_vector_agrees(as_bytes: bool) -> None:  # noqa: FBT001 - a parameter of the test
    for vector in VECTORS:
        raw = vector["raw"].encode() if as_bytes else vector["raw"]
        if vector["canonical"] is None:
            refusal(raw)
            continue
        record = decode(raw)
        assert encode(record) == vector["canonical"]
        assert duration_ms(record.started_at, record.finished_at) == vector["duration_ms"]
        assert _decode_exactly(raw, MlJobKind) == record
        assert decode(vector["canonical"]) == record


@given(records)
def test_every_record_survives_the_round_trip(record: KvRecord) -> None:
    raw = encode(record)
    assert decode(raw) == decode(raw.encode()) == _decode_exactly(raw, MlJobKind) == record
    assert type(decode(raw).id) is UUID


@given(records)
def test_the_text_is_one_compact_object_with_sorted_keys_and_the_fewest_escapes(record: KvRecord) -> None:
    values = json.loads(encode(record))
    assert values["id"] == record.id.hex
    assert encode(record) == json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def test_only_quote_backslash_and_controls_are_escaped() -> None:
    raw = encode(decode(written(target='"\\u0000\\u001F\\u000b\\b\\f\\n\\r\\t\\"\\\\\\/\\u007f\\u2028\\u00e9"')))
    assert raw.endswith('"target":"\\u0000\\u001f\\u000b\\b\\f\\n\\r\\t\\"\\\\/\x7f\u2028é"}')


@pytest.mark.parametrize(
    ("key", "field"),
    [("error", "error_message"), ("metrics", "metrics_json"), ("spec", "spec_json"), ("target", "target_name")],
)
def test_a_lone_surrogate_is_not_encoded_and_the_error_names_the_field(key: str, field: str) -> None:
    record = KvRecord(**{**{name: getattr(RECORD, name) for name in KEYS}, key: "x\udc00"})
    with pytest.raises(InvalidValueError, match="lone surrogate") as caught:
        encode(record)
    assert caught.value.field == field


# -------------------------------------------------------------------------------------------- what ends in a record


@given(st.permutations(KEYS))
def test_the_order_of_keys_does_not_matter(keys: list[str]) -> None:
    assert decode("{" + ",".join(f'"{key}":{VALUES[key]}' for key in keys) + "}") == RECORD


def test_white_space_may_stand_between_tokens() -> None:
    assert decode(f" \n\t\r{json.dumps(json.loads(written()), indent=4)}\r\n ") == RECORD


@pytest.mark.parametrize(
    "value",
    ["null", '{"a":[1,{"b":"\\u0000"}]}', "1e999999999", "-1e99999999999999999999999", "9" * 5000, "0." + "9" * 5000,
     "[" * 200 + "]" * 200, '{"a":' * 200 + "1" + "}" * 200],
)  # fmt: skip
def test_unknown_keys_are_ignored_whatever_they_hold(value: str) -> None:
    for raw in (f'{{"extra":{value},{written()[1:]}', f'{written()[:-1]},"":{value}}}'):
        assert decode(raw) == _decode_exactly(raw, MlJobKind) == RECORD


@pytest.mark.parametrize("earlier", ["true", "-1", "1.5", '"x"', "{}", "9" * 5000])
@pytest.mark.parametrize("key", KEYS)
def test_the_last_of_duplicate_keys_wins_whatever_the_earlier_one_holds(key: str, earlier: str) -> None:
    raw = f'{{"{key}":{earlier},{written()[1:]}'
    assert decode(raw) == _decode_exactly(raw, MlJobKind) == RECORD


def test_a_mistyped_last_duplicate_is_not_saved_by_an_earlier_one() -> None:
    assert refusal(written()[:-1] + ',"status":3}').field == "status"
    assert decode(written()[:-1] + ',"metrics":3}').metrics is None


def test_an_id_may_be_in_upper_case() -> None:
    assert decode(written(id=VALUES["id"].upper())) == RECORD


@pytest.mark.parametrize(
    ("number", "value"),
    [
        ("7.9", 7), ("0.9999999999999999999999999999", 0), ("1e2", 100), ("1E+1", 10), ("-0", 0), ("-0.0", 0),
        ("-0e9", 0), ("1.7e12", 1_700_000_000_000), ("1700000000123.0", 1_700_000_000_123),
        ("1.700000000123e+12", 1_700_000_000_123),
        ("253402300799998.99999999999999", MAX_MS - 1), ("253402300799999.9", MAX_MS), ("2534023007999990e-1", MAX_MS),
        ("0e999999999", 0), ("0.0e99999999999999999999", 0), ("1e-999999999", 0), ("9e-" + "9" * 5000, 0),
        ("0." + "0" * 5000 + "42e5002", 42), ("42" + "0" * 5000 + "e-5000", 42), ("1e" + "0" * 5000 + "1", 10),
    ],
)  # fmt: skip
def test_fractions_and_exponents_are_cut_toward_zero_exactly(number: str, value: int) -> None:
    assert decode(written(created_at=number)).created_at == value


@pytest.mark.parametrize("number", ["101", "100.5", "255", "256", "9223372036854775807", "9.2e18"])
def test_progress_above_100_reads_as_100(number: str) -> None:
    assert decode(written(progress=number)).progress == 100


@pytest.mark.parametrize("value", ["null", "1", "true", "[]", '{"a":"b"}', None])
@pytest.mark.parametrize("key", OPTIONAL)
def test_error_and_metrics_missing_or_of_another_type_read_as_none(key: str, value: str | None) -> None:
    kept = {**VALUES, key: value}
    raw = "{" + ",".join(f'"{name}":{text}' for name, text in kept.items() if text is not None) + "}"
    assert getattr(decode(raw), key) is None
    assert _decode_exactly(raw, MlJobKind) == decode(raw)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_every_kind_of_bytes_is_read(kind: type[Any]) -> None:
    raw = written(target='"é💩"').encode()
    assert decode(kind(raw)).target == "é💩"
    assert decode(memoryview(raw + b"x" * len(raw))[: len(raw)]) == decode(raw)


def test_the_kinds_are_those_of_the_enum_that_is_passed() -> None:
    class Kind(Token):
        PRUNE = "prune"

    assert decode(written(kind='"prune"'), Kind).kind is Kind.PRUNE
    assert refusal(written(kind='"train"'), Kind).reason == "unknown token 'train' (prune)"
    assert refusal(written(kind='"prune"')).field == "kind"


def test_a_lenient_enum_lets_in_no_more_than_its_tokens() -> None:
    class Lenient(StrEnum):
        TRAIN = "train"

        @classmethod
        def _missing_(cls, value: object) -> Lenient:
            return cls.TRAIN

    assert decode(written(), Lenient).kind is Lenient.TRAIN
    assert refusal(written(kind='"Train"'), Lenient).field == "kind"


# -------------------------------------------------------------------------------------- what ends in JobDecodeError


@pytest.mark.parametrize("key", [*NUMBERS, *STRINGS])
def test_a_missing_field_is_refused_by_name(key: str) -> None:
    error = refusal("{" + ",".join(f'"{name}":{value}' for name, value in VALUES.items() if name != key) + "}")
    assert (error.field, error.reason) == (key, "missing")


@pytest.mark.parametrize(
    ("value", "found"),
    [('"5"', "a string"), ("true", "a boolean"), ("false", "a boolean"), ("null", "null"), ("[]", "an array"),
     ("{}", "an object"), ("5", "a number"), ("-5.5", "a number")],
)  # fmt: skip
@pytest.mark.parametrize("key", [*NUMBERS, *STRINGS])
def test_a_mistyped_field_is_refused_by_name(key: str, value: str, found: str) -> None:
    expected = "a number" if key in NUMBERS else "a string"
    if expected != found:
        error = refusal(written(**{key: value}))
        assert (error.field, error.reason) == (key, f"expected {expected}, got {found}")


@pytest.mark.parametrize("token", ["done", "", "Running", "running ", "running\0", "x" * 100_000])
def test_an_unknown_token_is_refused_and_the_known_ones_are_listed(token: str) -> None:
    error = refusal(written(status=json.dumps(token)))
    assert error.field == "status"
    assert error.reason.endswith("(queued, running, completed, failed, cancelled)")
    assert error.reason.startswith("unknown token ")
    assert len(str(error)) < 250


@pytest.mark.parametrize(
    "text",
    ["", "0" * 31, "0" * 33, "+" + "0" * 31, "-" + "0" * 31, " " + "0" * 31, "0x" + "0" * 30, "0_" * 16, "é" * 16,
     "\u0660" * 32, "0191e4a2-7c3b-7def-8000-0123456789ab", "{" + "0" * 30 + "}", "urn:uuid:" + "0" * 23,
     "0" * 31 + "\0", "g" * 32,
     '"' + "0" * 31, "\\u0030" + "0" * 26, "0" * 16 + "-" * 4 + "0" * 12],
)  # fmt: skip
def test_an_id_that_is_not_32_hex_digits_is_refused(text: str) -> None:
    assert refusal(written(id=json.dumps(text))).field == "id"
    assert refusal(written(id=json.dumps(text, ensure_ascii=False))).field == "id"


@pytest.mark.parametrize(
    "number",
    ["9223372036854775808", "18446744073709551616", "1e19", "1e400", "1e999999999", "1e" + "9" * 5000, "9" * 5000,
     "9" * 100_000, "1" + "0" * 5000 + ".5", "0.1e20"],
)  # fmt: skip
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_beyond_64_bits_is_refused(key: str, number: str) -> None:
    error = refusal(written(**{key: number}))
    assert error.field == key
    assert error.reason.endswith("does not fit in 64 bits")
    assert len(str(error)) < 120


@pytest.mark.parametrize(
    "number", ["-1", "-256", "-0.5", "-1e-999999999", "-9223372036854775808", "-1e400", "-" + "9" * 5000]
)
@pytest.mark.parametrize("key", NUMBERS)
def test_a_negative_number_is_refused(key: str, number: str) -> None:
    error = refusal(written(**{key: number}))
    assert error.field == key
    assert error.reason.endswith("is negative")


@pytest.mark.parametrize("number", ["253402300800000", "253402300800000.0", "2.534023008e14", "9223372036854775807"])
@pytest.mark.parametrize("key", ["created_at", "started_at", "finished_at"])
def test_a_time_after_the_year_9999_is_refused(key: str, number: str) -> None:
    error = refusal(written(**{key: number}))
    assert error.field == key
    assert "9999-12-31" in error.reason


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "01", "-01", "1.", ".5", "+1", "1e", "1e+", "0x10", "-", "1_0"]
)
@pytest.mark.parametrize("key", ["progress", "extra"])
def test_a_number_that_json_does_not_know_is_refused(key: str, value: str) -> None:
    assert refusal(written(**{key: value})).field is None


@pytest.mark.parametrize("value", ['"\\ud800"', '"\\udc00"', '"\\ud800x"', '"\\udc00\\ud800"', '"\\\\\\udbff"'])
@pytest.mark.parametrize("key", ["target", "error", "id", "extra"])
def test_an_escaped_lone_surrogate_is_refused(key: str, value: str) -> None:
    error = refusal(written(**{key: value}))
    assert error.field is None
    assert "lone surrogate \\ud" in error.reason


@pytest.mark.parametrize("key", ["target", "error", "extra"])
def test_a_lone_surrogate_in_a_str_is_refused(key: str) -> None:
    assert "lone surrogate" in refusal(written(**{key: '"\udc00"'})).reason


@pytest.mark.parametrize("junk", [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"])
@pytest.mark.parametrize("key", ["target", "metrics", "extra"])
def test_invalid_utf_8_is_refused_even_in_an_unknown_key(key: str, junk: bytes) -> None:
    assert "not UTF-8" in refusal(written(**{key: '"@"'}).encode().replace(b"@", junk)).reason
    assert "not UTF-8" in refusal(written(**{"@" + key: "1"}).encode().replace(b"@", junk)).reason


@pytest.mark.parametrize("control", [chr(code) for code in range(32)])
@pytest.mark.parametrize("key", ["target", "extra"])
def test_a_raw_control_character_in_a_string_is_refused(key: str, control: str) -> None:
    assert refusal(written(**{key: f'"{control}"'})).field is None


@pytest.mark.parametrize("space", ["\x0b", "\x0c", "\x00", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", "\ufeff"])
def test_white_space_that_json_does_not_know_is_refused(space: str) -> None:
    for raw in (space + written(), written() + space, written().replace(":", f":{space}", 1)):
        refusal(raw)
        refusal(raw.encode())


@pytest.mark.parametrize("tail", ["x", "{}", ",", "]", "}", "\0", " 1", "//"])
def test_trailing_data_is_refused(tail: str) -> None:
    assert refusal(written() + tail).field is None


def test_a_byte_order_mark_is_refused() -> None:
    for raw in ("\ufeff" + written(), b"\xef\xbb\xbf" + written().encode()):
        assert "byte order mark" in refusal(raw).reason
    refusal(written().encode("utf-16"))


@pytest.mark.parametrize(
    ("raw", "found"),
    [("null", "null"), (" 1", "a number"), ("\n[]", "an array"), ('"x"', "a string"), ("true", "a boolean")],
)
def test_what_is_not_an_object_is_refused(raw: str, found: str) -> None:
    error = refusal(raw)
    assert (error.field, error.reason) == (None, f"expected an object, got {found}")


@pytest.mark.parametrize(
    "raw", ["", " ", "{", "{}x", "{,}", '{"a"}', '{"a":}', "{'a':1}", written()[:-1], written()[:-1] + ",}"]
)
def test_broken_text_is_refused(raw: str) -> None:
    assert refusal(raw).field is None


@pytest.mark.parametrize("raw", [None, 1, 1.5, [], {}, object(), RECORD, written])
def test_what_is_neither_text_nor_bytes_is_refused(raw: object) -> None:
    assert "expected JSON as str or bytes" in refusal(raw).reason


def test_a_released_memoryview_is_refused() -> None:
    view = memoryview(written().encode())
    view.release()
    assert refusal(view).field is None


@pytest.mark.parametrize(
    "nested", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000]
)
def test_deep_nesting_is_refused_without_a_recursion_error(nested: str) -> None:
    for key in ("extra", "status", "metrics"):
        assert refusal(written(**{key: nested})).field is None
    refusal(nested)
    refusal(nested.encode())


# ------------------------------------------------------------------------------------------------------------- fuzz


@given(st.text() | st.binary() | st.text(st.characters(categories=["Cs", "Cc", "Nd"])))
def test_arbitrary_input_ends_in_a_record_or_in_the_error(raw: str | bytes) -> None:
    assert outcome(raw) == outcome(raw, exactly=True)


def agree(raw: str | bytes) -> bool:
    """Return whether it is a record, by both paths and the standard library."""
    found = outcome(raw)
    assert found == outcome(raw, exactly=True)
    assert (found if isinstance(found, KvRecord) else None) == reference(raw)
    return isinstance(found, KvRecord)


def test_both_paths_and_the_standard_library_agree_on_what_is_a_record() -> None:
    agree(written(extra='"\\ud800"'))
    agree(written(progress="-0"))
    first = SystemRandom().getrandbits(32)
    records = 0
    for seed in range(first, first + 3000):
        with case(seed):
            records += agree(near_record(Random(seed)))
    assert 300 < records < 2700


def test_both_paths_and_the_standard_library_agree_on_broken_bytes() -> None:
    first = SystemRandom().getrandbits(32)
    for seed in range(first, first + 1500):
        with case(seed):
            pick = Random(seed)
            raw = bytearray(near_record(pick).encode(errors="surrogatepass"))
            for _ in range(pick.randrange(3)):
                raw[pick.randrange(len(raw))] = pick.randrange(256)
            agree(bytes(raw))


@given(
    st.from_regex(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(NUMBERS),
)
def test_every_number_is_cut_as_exact_arithmetic_cuts_it(number: str, key: str) -> None:
    raw = written(**{key: number})
    found = outcome(raw)
    assert (found if isinstance(found, KvRecord) else None) == reference(raw)


# --------------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize(
    ("started_at", "finished_at", "duration"),
    [(0, 0, None), (5, 0, None), (0, 5, None), (5, 5, 0), (5, 4, None), (5, 9, 4), (1, MAX_MS, MAX_MS - 1)],
)
def test_a_duration_needs_both_ends_in_order(started_at: int, finished_at: int, duration: int | None) -> None:
    assert duration_ms(started_at, finished_at) == duration


def test_the_limit_on_int_digits_plays_no_part() -> None:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        assert refusal(written(created_at="9" * 700)).reason.endswith("does not fit in 64 bits")
        assert decode(written(extra="9" * 700)) == RECORD
        assert decode(written(created_at="1" + "0" * 700 + "e-700")).created_at == 1
    finally:
        sys.set_int_max_str_digits(limit)
