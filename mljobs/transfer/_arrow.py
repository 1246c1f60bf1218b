"""Jobs as Arrow, for pandas, polars and DuckDB: read by COPY, a column at a time, without building a record.

Types: ``kind`` and ``status`` are dictionary-encoded, times are UTC in milliseconds, ids are text as ``str(job.id)`` writes
it, or Arrow's own UUID type; JSON is text. ``spread`` makes a column of each key of ``spec`` or ``metrics``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Literal, Unpack, get_args

from mljobs._fields import BY_NAME, FIELDS
from mljobs._values import check_count
from mljobs.db._wire import Wire, read_wire, wire_of
from mljobs.errors import InvalidValueError
from mljobs.jobs import Bind, Filter, Filters, Model, Where, conditions, table_of
from mljobs.jobs._base import connection_of
from mljobs.record._host_columns import host_columns
from mljobs.record._models import MlJob
from mljobs.states import MlJobStatus
from mljobs.transfer._host_values import readable

try:
    import pyarrow as pa
    import pyarrow.compute as pc
except ImportError as error:
    raise ImportError("mljobs.transfer._arrow needs pyarrow: pip install 'mljobs[arrow]'") from error

from mljobs.transfer._arrow_host import host_array, host_field
from mljobs.transfer._arrow_spread import SPREAD_TYPES, Shape, shape_of, spread_chunks, spread_texts

if TYPE_CHECKING:
    from sqlalchemy import Connection

Ids = Literal["string", "uuid"]
"""How ids are given: 36 characters, or Arrow's extension type ``arrow.uuid``."""

BATCH = 65_536
"""Rows in a batch, where the caller says nothing."""
_BATCH_MAX = 1_000_000
_SPREADABLE = ("spec", "metrics")
_COLUMNS = tuple(field.name for field in FIELDS if field.kv_key or field.extended)
"""What an export holds: the record, without the lease of the present."""
_POSTGRES_EPOCH_US = 946_684_800_000_000  # from 1970 to 2000, where COPY counts from

_ARROW_TYPES: dict[str, Any] = {
    "token": pa.dictionary(pa.int8(), pa.string()),
    "text": pa.string(),
    "json": pa.large_string(),  # and errors: a batch of string holds 2 GiB: 65,536 specs of 32 KiB
    "small": pa.int16(),
    "time": pa.timestamp("ms", "UTC"),
    "flag": pa.bool_(),
}


def to_arrow(
    session: Bind,
    /,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    columns: Sequence[str] | None = None,
    spread: Sequence[str] = (),
    ids: Ids = "string",
    model: Model = MlJob,
    **fields: Unpack[Filters],
) -> pa.Table:
    """Return jobs as an Arrow table, in no particular order.

    Args:
        session: The caller's session or connection.
        filter: A :class:`~mljobs.Filter`, or its text; None for all jobs.
        where: SQLAlchemy expressions of one's own beside it.
        columns: Which columns of the record and of the host's class; None for all. A host's own are read by SELECT, which
            takes longer than COPY.
        spread: ``"spec"``, ``"metrics"`` or both: a column for each key of these objects, named ``metrics.f1`` and so on.
            Where all values under a key are numbers it is float64, where all are strings or flags it is that; anything
            else becomes JSON text. null and a missing key are null.
        ids: ``"string"`` or ``"uuid"``.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.

    Raises:
        InvalidValueError: A name or a value is not one of those; or more than 1,000 keys are to be spread.
    """
    reading = _Reading(session, filter, where=where, columns=columns, spread=spread, ids=ids, model=model, **fields)
    batches = list(reading.batches(BATCH))
    table = pa.Table.from_batches(batches, reading.schema)
    for name in reading.spread:
        texts = table.column(f"{name}_json")
        shape = shape_of(name, (chunk.to_pylist() for chunk in texts.chunks), {})
        for key, values in spread_chunks(name, shape, texts.chunks).items():
            table = table.append_column(key, values)
    return table.drop_columns(reading.surplus) if reading.surplus else table


def arrow_batches(
    session: Bind,
    /,
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    columns: Sequence[str] | None = None,
    spread: Sequence[str] = (),
    ids: Ids = "string",
    batch: int = BATCH,
    model: Model = MlJob,
    **fields: Unpack[Filters],
) -> pa.RecordBatchReader:
    """Return a reader of jobs as Arrow batches, in constant memory; the connection is busy until its last batch is read.

    With ``spread`` the JSON is read once before, to know the columns: do it in a REPEATABLE READ transaction, as
    ``JobStore.arrow_batches`` does, or a job that finishes in between may not fit them.

    Args:
        session: The caller's session or connection.
        filter: A :class:`~mljobs.Filter`, or its text; None for all jobs.
        where: SQLAlchemy expressions of one's own beside it.
        columns: Which columns; None for all.
        spread: See ``to_arrow``.
        ids: ``"string"`` or ``"uuid"``.
        batch: Rows in a batch, 1 to 1,000,000.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.

    Raises:
        InvalidValueError: See ``to_arrow``; while reading: a value does not fit its column.
    """
    schema, batches = _open(
        session, filter, where=where, columns=columns, spread=spread, ids=ids, batch=batch, model=model, **fields
    )
    return pa.RecordBatchReader.from_batches(schema, batches)


@contextmanager
def reader_of(session: Bind, **options: Any) -> Iterator[pa.RecordBatchReader]:
    """Read as ``arrow_batches`` does, and free the connection at the end of the block, however far the reader came."""
    schema, batches = _open(session, **options)
    with closing(batches):
        yield pa.RecordBatchReader.from_batches(schema, batches)


def _open(session: Bind, *args: Any, batch: int = BATCH, **options: Any) -> tuple[pa.Schema, Generator[pa.RecordBatch]]:
    """Return the schema of what ``arrow_batches`` reads, and its batches."""
    check_count("batch", batch, _BATCH_MAX)
    reading = _Reading(session, *args, **options)
    shapes = reading.shapes(batch)
    kept = [field for field in reading.schema if field.name not in reading.surplus]
    extra = [
        pa.field(f"{name}.{key}", SPREAD_TYPES[kind]) for name in reading.spread for key, kind in shapes[name].items()
    ]
    schema = pa.schema(kept + extra)

    def generate() -> Generator[pa.RecordBatch]:
        with closing(reading.batches(batch)) as batches:
            for found in batches:
                arrays = [found.column(field.name) for field in kept]
                for name in reading.spread:
                    texts = found.column(f"{name}_json").to_pylist()
                    arrays += spread_texts(name, shapes[name], texts).values()
                yield pa.record_batch(arrays, schema=schema)

    return schema, generate()


# --------------------------------------------------------------------------------------------------------- the record


class _Reading:
    """What to read, and from where.

    Attributes:
        schema: Of what is read.
        spread: What is to be spread.
        surplus: Columns that are read only to be spread.
    """

    def __init__(
        self,
        session: Bind,
        filter: Filter | str | None = None,  # noqa: A002 - as users say it
        *,
        where: Where | None = None,
        columns: Sequence[str] | None = None,
        spread: Sequence[str] = (),
        ids: Ids = "string",
        model: Model = MlJob,
        **fields: Unpack[Filters],
    ) -> None:
        self._where = conditions(model, filter, where=where, **fields)
        self._table = table_of(model)
        self._connection: Connection = connection_of(session, model)
        self._kinds = [str(kind) for kind in model.__kinds__]
        self._host = host_columns(model)
        known = (*_COLUMNS, *self._host)
        names = list(known) if columns is None else _known("columns", columns, known)
        self.spread = _known("spread", spread, _SPREADABLE)
        if ids not in get_args(Ids):
            raise InvalidValueError("ids", ids, "expected 'string' or 'uuid'")
        self.surplus = [f"{name}_json" for name in self.spread if f"{name}_json" not in names]
        self._names = names + self.surplus
        if not self._names:
            raise InvalidValueError("columns", columns, "expected at least one, or None for all")
        self._id_type = pa.string() if ids == "string" else pa.uuid()
        self.schema = pa.schema([self._field(name) for name in self._names])

    def _field(self, name: str) -> pa.Field:
        if name in self._host:
            return host_field(name, self._host[name], self._id_type)
        form = BY_NAME[name].form
        arrow_type = self._id_type if form == "id" else _ARROW_TYPES["json" if name == "error_message" else form]
        return pa.field(name, arrow_type, bool(self._table.c[name].nullable))

    def batches(self, batch: int) -> Generator[pa.RecordBatch]:
        hosts = [name for name in self._names if name in self._host]
        ours = [name for name in self._names if name not in self._host]
        wire = wire_of(self._connection, copied=not hosts)
        makers = [self._maker(name, wire) for name in ours]
        makers += [host_array(self._host[name], self.schema.field(name).type) for name in hosts]
        columns = [self._table.c[name] for name in ours]
        beside = [readable(self._host[name], self._connection.dialect) for name in hosts]
        with closing(read_wire(self._connection, columns, self._where, batch, beside=beside)) as chunks:
            for rows in chunks:
                arrays = {
                    name: make(values)
                    for name, make, values in zip([*ours, *hosts], makers, zip(*rows, strict=True), strict=True)
                }
                yield pa.record_batch([arrays[name] for name in self._names], schema=self.schema)

    def shapes(self, batch: int) -> dict[str, Shape]:
        """Read the JSON that is to be spread, and nothing else."""
        shapes: dict[str, Shape] = {name: {} for name in self.spread}
        if shapes:
            columns = [self._table.c[f"{name}_json"] for name in self.spread]
            with closing(read_wire(self._connection, columns, self._where, batch)) as chunks:
                for rows in chunks:
                    for name, texts in zip(self.spread, zip(*rows, strict=True), strict=True):
                        shape_of(name, [texts], shapes[name])
        return shapes

    def _maker(self, name: str, wire: Wire) -> Callable[[Sequence[Any]], pa.Array]:
        """Return what makes an array of a column's values in wire form."""
        form = BY_NAME[name].form
        if form == "id":
            return _ids_as_text(wire) if self._id_type == pa.string() else _ids_as_uuid(wire)
        if form == "time":
            return _times(wire)
        if form == "token":
            tokens = self._kinds if name == "kind" else [str(status) for status in MlJobStatus]
            return _tokens(tokens)
        wanted = self.schema.field(name).type
        if form == "flag":  # SQLite's are 0 and 1
            return lambda values: pa.array([bool(value) for value in values], wanted)
        return lambda values: pa.array(values, wanted)


def _known(field: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    listed = [names] if isinstance(names, str) else list(names)
    for name in listed:
        if name not in known or listed.count(name) > 1:
            raise InvalidValueError(field, name, f"expected each of {', '.join(known)} once at most")
    return listed


def _ids_as_text(wire: Wire) -> Callable[[Sequence[Any]], pa.Array]:
    to_hex = wire.id_out

    def make(values: Sequence[Any]) -> pa.Array:
        present = [value for value in values if value is not None]
        digits = b"".join(present).hex() if wire.name == "psycopg" else "".join(map(to_hex, present))
        # All at once: to write half a million dashes one by one in Python costs as much as to read the rows.
        offsets = pa.array(range(0, len(digits) + 1, 32), pa.int32())
        plain = pa.StringArray.from_buffers(len(present), offsets.buffers()[1], pa.py_buffer(digits.encode()))
        cuts = [pc.utf8_slice_codeunits(plain, start, end) for start, end in _DASHED]
        dashed = pc.binary_join_element_wise(*cuts, "-")
        return dashed if len(present) == len(values) else _with_nulls(dashed, values)

    return make


_DASHED = ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32))


def _with_nulls(present: pa.Array, values: Sequence[Any]) -> pa.Array:
    at = -1
    places: list[int | None] = []
    for value in values:
        if value is not None:
            at += 1
        places.append(None if value is None else at)
    return present.take(pa.array(places, pa.int32()))


def _ids_as_uuid(wire: Wire) -> Callable[[Sequence[Any]], pa.Array]:
    to_hex = wire.id_out

    def make(values: Sequence[Any]) -> pa.Array:
        if wire.name != "psycopg":
            values = [None if value is None else bytes.fromhex(to_hex(value)) for value in values]
        return pa.ExtensionArray.from_storage(pa.uuid(), pa.array(values, pa.binary(16)))

    return make


def _times(wire: Wire) -> Callable[[Sequence[Any]], pa.Array]:
    wanted = pa.timestamp("ms", "UTC")
    if wire.name == "psycopg":
        # Times have whole milliseconds, so the division leaves no rest.
        return lambda values: pc.divide(
            pc.add(pa.array(values, pa.int64()), _POSTGRES_EPOCH_US), pa.scalar(1000, pa.int64())
        ).cast(wanted)
    to_millis = wire.time_out
    return lambda values: pa.array([None if value is None else to_millis(value) for value in values], pa.int64()).cast(
        wanted
    )


def _tokens(tokens: Sequence[str]) -> Callable[[Sequence[Any]], pa.Array]:
    place = {token: at for at, token in enumerate(tokens)}

    def encode(values: Sequence[Any]) -> pa.Array:
        # A newer release may have queued kinds that this one does not know.
        places = pa.array([place.setdefault(str(value), len(place)) for value in values], pa.int8())
        return pa.DictionaryArray.from_arrays(places, pa.array(place, pa.string()))

    return encode
