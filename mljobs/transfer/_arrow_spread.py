"""JSON objects as Arrow columns, one for each key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec
import pyarrow as pa

from mljobs.errors import InvalidValueError

_KEYS_MAX = 1_000

_Kind = Literal["null", "number", "flag", "string", "json"]
Shape = dict[str, _Kind]
"""The keys of JSON objects in the order they were met, and what all their values are."""

SPREAD_TYPES: dict[_Kind, Any] = {
    "null": pa.null(),
    "number": pa.float64(),
    "flag": pa.bool_(),
    "string": pa.large_string(),
    "json": pa.large_string(),
}

_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_string = msgspec.json.Decoder(str).decode
_KIND_OF: dict[int, _Kind] = {
    **dict.fromkeys(b"-0123456789", "number"),
    **dict.fromkeys(b"tf", "flag"),
    **dict.fromkeys(b"{[", "json"),
    ord('"'): "string",
}
_NULL = ord("n")


def _object(text: str | None) -> Mapping[str, Any]:
    """Return the values of a JSON object, each as its text in bytes; of anything else none."""
    if text is None or text == "{}":
        return {}
    try:
        return _decode_object(text)
    except msgspec.ValidationError:  # JSON, but no object
        return {}
    except msgspec.DecodeError:  # a lone surrogate, which the databases let through
        found = json.loads(text)
        return {key: _written(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _written(value: Any) -> bytes:
    if isinstance(value, float) and math.isinf(value):  # 1e999 is JSON, Infinity is none
        return b"1e999" if value > 0 else b"-1e999"
    return json.dumps(value).encode()


def shape_of(name: str, parts: Iterable[Sequence[str | None]], shape: Shape) -> Shape:
    for texts in parts:
        for text in texts:
            for key, raw in _object(text).items():
                value = bytes(raw)
                if value[0] == _NULL:
                    shape.setdefault(key, "null")
                    continue
                kind: _Kind = _KIND_OF[value[0]]
                if kind == "string" and b"\\" in value and not _is_text(value):
                    kind = "json"  # a lone surrogate, which no text column can hold
                have = shape.get(key, "null")
                if have != kind:
                    shape[key] = kind if have == "null" else "json"
        if len(shape) > _KEYS_MAX:
            raise InvalidValueError(
                "spread", name, f"its objects have more than {_KEYS_MAX:,} keys; read its text instead"
            )
    return shape


def _is_text(value: bytes) -> bool:
    try:
        _decode_string(value)
    except (msgspec.MsgspecError, UnicodeError):
        return False
    return True


_READ: dict[str, Callable[[bytes], Any]] = {
    "number": float,
    "flag": lambda value: value == b"true",
    "string": _decode_string,
    "json": bytes.decode,
}


def spread_texts(name: str, shape: Shape, texts: Sequence[str | None]) -> dict[str, pa.Array]:
    """Return an array for each key, named ``metrics.f1``."""
    columns: dict[str, list[Any]] = {key: [None] * len(texts) for key in shape}
    for at, text in enumerate(texts):
        for key, raw in _object(text).items():
            value = bytes(raw)
            if value[0] == _NULL:
                continue
            kind = shape.get(key)
            if kind is None or kind not in ("json", _KIND_OF[value[0]]):
                raise InvalidValueError(
                    f"{name}.{key}", value.decode(), "it came while the jobs were read; read them in REPEATABLE READ"
                )
            columns[key][at] = _READ[kind](value)
    return {f"{name}.{key}": pa.array(values, SPREAD_TYPES[shape[key]]) for key, values in columns.items()}


def spread_chunks(name: str, shape: Shape, chunks: Sequence[pa.Array]) -> dict[str, pa.ChunkedArray]:
    spread = [spread_texts(name, shape, chunk.to_pylist()) for chunk in chunks]
    return {
        f"{name}.{key}": pa.chunked_array([part[f"{name}.{key}"] for part in spread], SPREAD_TYPES[kind])
        for key, kind in shape.items()
    }
