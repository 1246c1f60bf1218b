"""Redis and Valkey, by pipelines: through a client of redis-py or valkey-py, blocking or asynchronous, single or cluster.

The client is the caller's, so nothing of its library is imported here. Asynchronous clients work where SQLAlchemy's
``run_sync`` is above: in ``AsyncJobStore``, or in a host's own.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Iterator
from inspect import isawaitable
from itertools import islice
from typing import Any, Final

from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.util import await_only

from mljobs.errors import InvalidValueError

_PIPELINE: Final = 1000
_NEEDS_ASYNC: Final = "an asynchronous client needs AsyncJobStore, or a session within run_sync"
_SPECIAL: Final = re.compile(r"([\[\]*?\\^])")


def is_client(mapping: object) -> bool:
    """Whether this is a client, and no mapping."""
    return all(callable(getattr(mapping, name, None)) for name in ("pipeline", "scan_iter"))


def put(client: Any, pairs: Iterable[tuple[str, str]]) -> None:
    """Set each key, a thousand in one round trip.

    Raises:
        Exception: What the client raises.
    """
    left = iter(pairs)
    while part := list(islice(left, _PIPELINE)):
        pipeline = client.pipeline(transaction=False)
        for key, text in part:
            pipeline.set(key, text)
        _answer(pipeline.execute())


def pairs(client: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield what lies under the prefix; instead of a value that cannot be read (a list, a hash), its error.

    SCAN may give a key twice while the server rehashes; the second one then meets an equal record.
    """
    # As bytes whatever the client decodes: one that is not UTF-8 would fail all of the answer.
    found = client.scan_iter(match=_SPECIAL.sub(r"\\\1", prefix) + "*", count=_PIPELINE, NEVER_DECODE=True)
    keys = _keys(found)
    while part := list(islice(keys, _PIPELINE)):
        part = list(dict.fromkeys(part))
        pipeline = client.pipeline(transaction=False)
        for key in part:
            pipeline.execute_command("GET", key, NEVER_DECODE=True)
        for key, value in zip(part, _answer(pipeline.execute(raise_on_error=False)), strict=True):
            if value is not None:  # gone meanwhile
                yield (key.decode(errors="surrogateescape") if isinstance(key, bytes) else key), value


def _keys(found: Any) -> Iterator[Any]:
    if not isinstance(found, AsyncIterator):
        yield from found
        return
    while True:
        try:
            yield _answer(anext(found))
        except StopAsyncIteration:
            return


def _answer(result: Any) -> Any:
    if not isawaitable(result):
        return result
    try:
        return await_only(result)
    except MissingGreenlet as error:
        close = getattr(result, "close", None)
        if close is not None:
            close()
        raise InvalidValueError("mapping", type(result).__name__, _NEEDS_ASYNC) from error
