"""``dump_kv`` and ``load_kv``: write the table to a key-value store, and read it.

A store is any mapping from keys to texts (``dict``, ``shelve``, ``dbm``, diskcache), or a client of Redis or Valkey,
blocking or asynchronous, which is spoken to by pipelines. The key of a record is the prefix and the 32 hex digits of its id.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, Final, Unpack

from mljobs.errors import InvalidValueError
from mljobs.jobs import Bind, Filter, Filters, Model, Where, conditions
from mljobs.record._models import MlJob
from mljobs.transfer import _redis as redis
from mljobs.transfer._encoding import records
from mljobs.transfer._exporting import rows_reader
from mljobs.transfer._files import File
from mljobs.transfer._importing import Import, Reject, import_operation
from mljobs.transfer._judging import OnConflict
from mljobs.transfer._lines import BATCH_BYTES, BATCH_LINES, Batch
from mljobs.transfer._rejects import rejects_file
from mljobs.transfer._results import OnProgress, Problem, Progress

KvStore = Any
"""A ``MutableMapping[str, str]`` or ``MutableMapping[str, bytes]``, a ``dbm`` file, or a client of Redis or Valkey."""

_DIGITS: Final = re.compile(r"[0-9a-fA-F]{32}")


def dump_kv(
    session: Bind,
    /,
    mapping: KvStore,
    prefix: str = "",
    filter: Filter | str | None = None,  # noqa: A002 - as users say it
    *,
    where: Where | None = None,
    extended: bool = False,
    progress: OnProgress | None = None,
    model: Model = MlJob,
    **fields: Unpack[Filters],
) -> int:
    """Write records to a key-value store, each under its prefix and id, byte for byte as RedDB writes them.

    What lies under such a key is overwritten; other keys are left alone.

    Args:
        session: The caller's session or connection.
        mapping: A mapping, or a client of Redis or Valkey; an asynchronous client with an async store.
        prefix: Before the 32 hex digits; RedDB's own is ``"red.ml.jobs."``.
        filter: A :class:`~mljobs.Filter`, or its text; None for all jobs.
        where: SQLAlchemy expressions of one's own beside it.
        extended: Write our own columns too, under keys that RedDB ignores.
        progress: Is called after every few hundred records.
        model: The mapped job class.
        **fields: Filters by keyword, see :class:`~mljobs.jobs.Filters`.

    Returns:
        How many.

    Raises:
        InvalidValueError: Not a key-value store, no such filter, or a value that it cannot take.
    """
    _check_prefix(prefix)
    put = _putter(mapping)
    total = 0
    chosen = conditions(model, filter, where=where, **fields)
    reader = rows_reader(session, chosen, extended=extended, model=model)
    with closing(reader.parts()) as parts:
        for rows in parts:
            keys = [prefix + reader.id_of(row) for row in rows]
            put(zip(keys, records(reader.lines(rows)), strict=True))
            total += len(rows)
            if progress is not None:
                progress(Progress(total))
    return total


@import_operation
def load_kv(
    mapping: KvStore,
    prefix: str = "",
    *,
    on_conflict: OnConflict = "skip",
    requeue_running: bool = False,
    rejects: File | None = None,
    progress: OnProgress | None = None,
    defaults: Mapping[str, Any] | None = None,
    model: Model = MlJob,
) -> Import:
    """Read records from a key-value store, in the caller's transaction, by the rules of ``import_jobs``.

    Keys that do not begin with the prefix are not looked at. A key under it that is no id, or not that of its record, is
    rejected.

    Args:
        session: The caller's session or connection.
        mapping: A mapping, or a client of Redis or Valkey; an asynchronous client with an async store.
        prefix: Before the 32 hex digits.
        on_conflict: See ``import_jobs``, as the others.
        requeue_running: Queue running records again, as RedDB does on restart.
        rejects: Where refused and rejected records go; None for a new ``import.rejects.ndjson`` in the present
            directory, with a number where there is one.
        progress: Is called after each batch of some thousand records.
        defaults: Values of your class's own columns, for new records that do not say them.
        model: The mapped job class.

    Returns:
        How many records came to what.

    Raises:
        InvalidValueError: Not a key-value store, or an argument is not one of its choices.
        JobExistsError: A record is there, and ``on_conflict`` is ``"error"``.
    """
    return Import(
        _KvInput(mapping, _check_prefix(prefix)),
        on_conflict=on_conflict,
        requeue_running=requeue_running,
        rejects=rejects_file(None, rejects),
        progress=progress,
        defaults=defaults,
        model=model,
    )


def _check_prefix(prefix: object) -> str:
    if not isinstance(prefix, str):
        raise InvalidValueError("prefix", prefix, "expected a string")
    return prefix


def _check_mapping(mapping: object, method: str) -> None:
    """Refuse what has no keys; a sequence has the method, too."""
    if not hasattr(mapping, method) or isinstance(mapping, Sequence):
        raise InvalidValueError("mapping", mapping, "expected a mapping, or a client of Redis or Valkey")


def _putter(mapping: KvStore) -> Callable[[Iterable[tuple[str, str]]], None]:
    if redis.is_client(mapping):
        return lambda pairs: redis.put(mapping, pairs)
    _check_mapping(mapping, "__setitem__")

    def put(pairs: Iterable[tuple[str, str]]) -> None:
        for key, text in pairs:
            mapping[key] = text

    return put


class _KvInput:
    """The records of a key-value store; see ``importing.Input``."""

    def __init__(self, mapping: KvStore, prefix: str) -> None:
        is_client = redis.is_client(mapping)
        if not is_client:
            _check_mapping(mapping, "__getitem__")
        self._pairs = redis.pairs if is_client else _pairs_of_mapping
        self._mapping = mapping
        self._prefix = prefix

    def batches(self, reject: Reject) -> Iterator[Batch]:
        """See ``importing.Input``."""
        number = 1
        keys: list[str] = []
        lines: list[bytes] = []
        size = 0
        for key, value in self._pairs(self._mapping, self._prefix):
            reason = self._reason(key, value)
            if reason is not None:
                if lines:
                    yield Batch(number, lines, keys)
                    number, keys, lines, size = number + len(lines), [], [], 0
                reject(Problem(number, *reason, key), [_bytes_of(value)])
                number += 1
                continue
            keys.append(key)
            lines.append(_bytes_of(value))
            size += len(lines[-1])
            if len(lines) >= BATCH_LINES or size >= BATCH_BYTES:
                yield Batch(number, lines, keys)
                number, keys, lines, size = number + len(lines), [], [], 0
        if lines:
            yield Batch(number, lines, keys)

    def _reason(self, key: str, value: object) -> tuple[str | None, str] | None:
        if _DIGITS.fullmatch(key, len(self._prefix)) is None:
            return "key", f"expected {self._prefix!r} and 32 hex digits"
        if isinstance(value, Exception):
            return None, f"it cannot be read: {value}"
        if not isinstance(value, str | bytes | bytearray | memoryview):
            return None, f"expected str or bytes, got {type(value).__name__}"
        return None

    def progress(self, records: int) -> Progress:
        """See ``importing.Input``."""
        return Progress(records)

    def close(self) -> None:
        """Close nothing: the mapping is the caller's."""


def _bytes_of(value: object) -> bytes:
    if isinstance(value, str):
        return value.encode(errors="surrogatepass")  # a lone surrogate is rejected with its line, as invalid UTF-8
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    return repr(value).encode(errors="replace")


def _pairs_of_mapping(mapping: KvStore, prefix: str) -> Iterator[tuple[str, Any]]:
    keys = iter(mapping.keys() if hasattr(mapping, "keys") else mapping)
    while part := list(islice(keys, BATCH_LINES)):
        for key in part:
            text = key.decode(errors="surrogateescape") if isinstance(key, bytes) else key
            if not isinstance(text, str) or not text.startswith(prefix):
                continue
            try:
                value = mapping[key]
            except KeyError:  # gone meanwhile
                continue
            yield text, value
