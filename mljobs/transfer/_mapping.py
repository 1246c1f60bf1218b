"""``JobMapping``: the table as a key-value store, guarded."""

from __future__ import annotations

import re
from collections.abc import ItemsView, Iterator, MutableMapping, ValuesView
from contextlib import closing
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, delete, func, select
from sqlalchemy.orm import Session

from mljobs.db._binds import resolve
from mljobs.db._wire import read_wire, wire_of
from mljobs.errors import (
    InvalidTransitionError,
    InvalidValueError,
    JobDecodeError,
    JobNotFound,
    TerminalStateError,
)
from mljobs.jobs import Bind, Model, get, table_of
from mljobs.jobs._base import connection_of, is_postgres, lock_sqlite
from mljobs.record._models import MlJob
from mljobs.states import ACTIVE
from mljobs.transfer._encoding import line_maker
from mljobs.transfer._lines import Batch
from mljobs.transfer._rows import ID, NAMES, SHARED, columns_of
from mljobs.transfer._writing import Writer, leases_of

_DIGITS: Final = re.compile(r"[0-9a-fA-F]{32}")
_PAGE: Final = 1000


class JobMapping(MutableMapping[str, str]):
    """The table as a mapping from ids to records, each as RedDB writes it; in the caller's transaction.

    It meets RedDB's persistence contract for the namespace ``jobs``: put is ``mapping[key] = text``, get is
    ``mapping.get(key)``, delete is ``mapping.pop(key, None)``, list is ``mapping.items()``. But it is guarded: a finished
    record is neither changed nor deleted, a live one moves along legal edges only, and one that a worker holds is that
    worker's.

    Args:
        session: The caller's session or connection; of async ones use ``run_sync``.
        prefix: Stands before the 32 hex digits of each key.
        model: The mapped job class.

    Raises:
        InvalidValueError: Not a session or a prefix.
    """

    def __init__(self, session: Bind, prefix: str = "", *, model: Model = MlJob) -> None:
        if not isinstance(prefix, str):
            raise InvalidValueError("prefix", prefix, "expected a string")
        is_postgres(connection_of(session, model))
        self._session = session
        self._prefix = prefix
        self._model = model
        self._table = table_of(model)

    def __getitem__(self, key: str) -> str:
        """Return the record.

        Raises:
            KeyError: There is none.
        """
        job_id = self._id(key)
        if job_id is not None:
            for _, text in self._read([self._table.c.id == job_id]):
                return text
        raise KeyError(key)

    def __setitem__(self, key: str, text: str | bytes) -> None:
        """Add the record, or change a live one along a legal edge; an equal record is left as it is.

        Args:
            key: The prefix and 32 hex digits.
            text: The record, as text or UTF-8.

        Raises:
            InvalidValueError: The key is no key, or that of another record.
            JobDecodeError: The text is no record; it names the field and the reason.
            TerminalStateError: The record has finished, and the text says something else.
            InvalidTransitionError: The step is not legal.
            JobHeldError: A worker holds the job.
        """
        job_id = self._id(key)
        if job_id is None:
            raise InvalidValueError("key", key, f"expected {self._prefix!r} and 32 hex digits")
        if not isinstance(text, str | bytes):
            raise JobDecodeError(None, f"expected JSON as str or bytes, got {type(text).__name__}")
        raw = text.encode(errors="surrogatepass") if isinstance(text, str) else text
        writer = Writer(on_conflict="update", requeue_running=False, model=self._model, careful=True)
        done = writer.write(resolve(self._session), Batch(1, [raw], [key]))
        for problem, _, known in done.problems:
            if not known:
                if problem.field == "id" and problem.reason.startswith("the record is "):
                    raise InvalidValueError("key", key, problem.reason)
                raise JobDecodeError(problem.field, problem.reason)
            raise self._refusal(job_id, raw)

    def __delitem__(self, key: str) -> None:
        """Delete a live record.

        Raises:
            KeyError: There is none.
            TerminalStateError: It has finished; old ones go by ``prune``.
            JobHeldError: A worker holds the job.
        """
        job_id = self._id(key)
        if job_id is None:
            raise KeyError(key)
        connection = self._connection()
        if is_postgres(connection):
            connection.execute(select(self._table.c.id).where(self._table.c.id == job_id).with_for_update()).all()
        else:
            lock_sqlite(connection, self._model)
        held = leases_of(connection, self._model, [job_id])
        if held:
            raise held[job_id]
        try:
            job = get(self._session, job_id, model=self._model)
        except JobNotFound:
            raise KeyError(key) from None
        if job.status.is_terminal:
            raise TerminalStateError(job_id, job.status, job.finished_at, action="be deleted")
        session = resolve(self._session)
        if isinstance(session, Session):
            session.delete(job)
            session.flush()
        else:
            connection.execute(delete(self._table).where(self._table.c.id == job_id, self._table.c.status.in_(ACTIVE)))

    def __contains__(self, key: object) -> bool:
        job_id = self._id(key)
        if job_id is None:
            return False
        return (
            self._connection().execute(select(self._table.c.id).where(self._table.c.id == job_id)).first() is not None
        )

    def _connection(self) -> Connection:
        return connection_of(self._session, self._model)

    def __len__(self) -> int:
        number: int = self._connection().execute(select(func.count()).select_from(self._table)).scalar_one()
        return number

    def __iter__(self) -> Iterator[str]:
        """Yield the keys in the order of the ids, page by page: records may come and go meanwhile."""
        for key, _ in self._pages(texts=False):
            yield key

    def items(self) -> ItemsView[str, str]:
        """Return the keys with their records, read page by page."""
        return _Items(self)

    def values(self) -> ValuesView[str]:
        """Return the records, read page by page."""
        return _Values(self)

    def __repr__(self) -> str:
        return f"<JobMapping of {self._table.name}, prefix {self._prefix!r}>"

    def _id(self, key: object) -> UUID | None:
        if not isinstance(key, str) or not key.startswith(self._prefix):
            return None
        return UUID(hex=key[len(self._prefix) :]) if _DIGITS.fullmatch(key, len(self._prefix)) else None

    def _read(self, where: list[Any]) -> list[tuple[str, str]]:
        connection = self._connection()
        wire = wire_of(connection)
        make = line_maker(wire, extended=False)
        with closing(read_wire(connection, columns_of(self._model)[:SHARED], where)) as parts:
            rows = [row for part in parts for row in part]
        return [(self._prefix + wire.id_out(row[ID]), make([row])[:-1].decode()) for row in rows]

    def _pages(self, *, texts: bool) -> Iterator[tuple[str, str]]:
        column = self._table.c.id
        last: UUID | None = None
        while True:
            statement = select(column).order_by(column).limit(_PAGE)
            if last is not None:
                statement = statement.where(column > last)
            ids = list(self._connection().execute(statement).scalars())
            if not ids:
                return
            if texts:
                found = dict(self._read([column.in_(ids)]))
                keys = [self._prefix + job_id.hex for job_id in ids]
                yield from [(key, found[key]) for key in keys if key in found]
            else:
                yield from [(self._prefix + job_id.hex, "") for job_id in ids]
            last = ids[-1]

    def _refusal(self, job_id: UUID, raw: bytes) -> Exception:
        job: Any = get(self._session, job_id, model=self._model)
        wanted: Any = self._model.from_json(raw)
        if job.is_terminal:
            pairs = {name: (getattr(job, name), getattr(wanted, name)) for name in NAMES[:SHARED]}
            changes = {name: (old, new) for name, (old, new) in pairs.items() if old != new}
            return TerminalStateError(job_id, job.status, job.finished_at, changes)
        held = leases_of(self._connection(), self._model, [job_id])
        return held[job_id] if held else InvalidTransitionError(job_id, job.status, wanted.status)


class _Items(ItemsView[str, str]):
    _mapping: JobMapping

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return self._mapping._pages(texts=True)  # noqa: SLF001 - of this file


class _Values(ValuesView[str]):
    _mapping: JobMapping

    def __iter__(self) -> Iterator[str]:
        return (text for _, text in self._mapping._pages(texts=True))  # noqa: SLF001 - of this file
