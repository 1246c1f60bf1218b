"""A host's own columns as Arrow: the type that each has, and what makes an array of its values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import pyarrow as pa
from sqlalchemy import Column

from mljobs.errors import InvalidValueError
from mljobs.transfer._host_values import Codec, codec_of

_TYPES: Final[dict[str, Any]] = {
    "integer": pa.int64(),
    "flag": pa.bool_(),
    "number": pa.float64(),
    "text": pa.large_string(),
    "token": pa.dictionary(pa.int32(), pa.string()),
    "json": pa.large_string(),
    "bytes": pa.large_binary(),
    "datetime": pa.timestamp("us"),
    "zoned datetime": pa.timestamp("us", "UTC"),
    "date": pa.date32(),
    "time": pa.time64("us"),
    "interval": pa.duration("us"),
}
_DIGITS_MAX: Final = 38
_AS_TEXT: Final = ("token", "uuid", "text")
"""Forms whose values are given as they stand in a line of an export; the others are taken as they are."""


def host_field(name: str, column: Column[Any], id_type: Any) -> pa.Field:
    """Return the field of a host's own column.

    Args:
        name: Of the attribute.
        column: The column.
        id_type: What ids are given as.
    """
    return pa.field(name, _type_of(codec_of(column.type), column.type, id_type), bool(column.nullable))


def _type_of(codec: Codec, kind: Any, id_type: Any) -> Any:
    if codec.form == "list":
        return pa.list_(_type_of(codec.item or codec, kind.item_type, id_type))
    if codec.form == "uuid":
        return id_type
    if codec.form == "decimal":
        precision, scale = getattr(kind, "precision", None), getattr(kind, "scale", None)
        known = precision is not None and scale is not None and precision <= _DIGITS_MAX
        return pa.decimal128(precision, scale) if known else pa.large_string()
    return _TYPES[codec.form]


def host_array(column: Column[Any], wanted: Any) -> Callable[[Sequence[Any]], pa.Array]:
    """Return what makes an array of a column's values, as its type gives them."""
    codec = codec_of(column.type)
    if codec.decorated is not None:
        convert = _converter(codec.decorated, wanted)
        bind = codec.bind
        return _maker(column, wanted, lambda value: None if (bound := bind(value)) is None else convert(bound))
    return _maker(column, wanted, _converter(codec, wanted))


def _converter(codec: Codec, wanted: Any) -> Callable[[Any], Any]:
    """Return what makes of a value what Arrow takes."""
    convert: Callable[[Any], Any] = _same
    if codec.form in _AS_TEXT or (codec.form in ("decimal", "list") and wanted == pa.large_string()):
        convert = codec.to_line
    elif codec.form == "list":
        convert = _listed(codec)
    elif codec.form == "zoned datetime":
        convert = partial(_parsed, codec)
    return convert


def _same(value: Any) -> Any:
    return value


def _maker(column: Column[Any], wanted: Any, convert: Callable[[Any], Any]) -> Callable[[Sequence[Any]], pa.Array]:
    def make(values: Sequence[Any]) -> pa.Array:
        made = values if convert is _same else [None if value is None else convert(value) for value in values]
        try:
            if wanted == pa.uuid():
                bytes_of = [None if one is None else bytes.fromhex(one.replace("-", "")) for one in made]
                return pa.ExtensionArray.from_storage(wanted, pa.array(bytes_of, pa.binary(16)))
            return pa.array(made, wanted)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InvalidValueError(
                column.name, f"a value of {column.type!r}", f"Arrow cannot hold it: {error}"
            ) from error

    return make


def _parsed(codec: Codec, moment: Any) -> Any:
    """Return a time with its zone, which SQLite does not keep."""
    return codec.from_line(codec.to_line(moment))


def _listed(codec: Codec) -> Callable[[Any], Any]:
    item = codec.item
    if item is not None and item.form in _AS_TEXT:
        return codec.to_line
    return list
