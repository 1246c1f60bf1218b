"""Write a batch of lines into the database, inside the caller's transaction.

First in one go: lines become rows while COPY takes them, for most imports meet nothing. What the database refuses as a
whole is taken again carefully: which ids are there, what is to be done with each, and the new ones by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, Update, bindparam, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from mljobs.db._binds import connection_for
from mljobs.db._rows import insert_rows, row_security
from mljobs.db._wire import Wire, insert_wire, wire_of
from mljobs.errors import JobExistsError, JobHeldError, MlJobsError
from mljobs.jobs import Bind, Model, table_of
from mljobs.jobs._base import connection_of, is_postgres, lock_sqlite
from mljobs.jobs._records import is_ml_job, refresh, session_on
from mljobs.record._models import MlJob
from mljobs.states import ACTIVE, MlJobStatus
from mljobs.transfer._host_values import HostValues
from mljobs.transfer._judging import SKIP, UPDATE, judge, requeued
from mljobs.transfer._lines import Batch
from mljobs.transfer._making import host_of, made_of, python_values, record_values, with_host
from mljobs.transfer._results import Problem
from mljobs.transfer._rows import (
    ID,
    NAMES,
    SHARED,
    STATUS,
    RejectedLineError,
    Row,
    columns_of,
    own_keys,
    row_maker,
    rows_by_id,
)

_BLANK: Final = b" \t\r"
_REFUSING: Final = ("22", "23", "54")
"""SQLSTATE classes that speak of the row: data exception, integrity, a limit that a value exceeds."""
_PASSING: Final = ("40001", "40P01")
"""SQLSTATEs after which the same transaction may succeed: serialization failure, deadlock."""


@dataclass(slots=True)
class Done:
    """What came of a batch.

    Attributes:
        inserted: New records.
        updated: The ids of those that were changed.
        skipped: Records that stay as they are.
        problems: What was not imported: the problem, the raw line, and whether it is a record (refused) or not.
    """

    inserted: int = 0
    updated: list[UUID] = field(default_factory=list)
    skipped: int = 0
    problems: list[tuple[Problem, bytes, bool]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line that is a record."""

    at: int
    row: Row


@dataclass(frozen=True, slots=True)
class _Change:
    """What a line makes of a live record."""

    at: int
    job_id: UUID
    parameters: dict[str, Any]


class Writer:
    """Writes batches. It remembers whether the last one met records that were there.

    Args:
        on_conflict: ``skip``, ``update`` or ``error``; see ``import_jobs``.
        requeue_running: Whether running records are queued again.
        model: The mapped job class.
        careful: Whether to look first what is there.
        defaults: Values of a host's own columns for new records whose lines do not say them.
    """

    def __init__(
        self,
        *,
        on_conflict: str,
        requeue_running: bool,
        model: Model = MlJob,
        careful: bool = False,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.host = HostValues(model)
        self.defaults = self.host.checked(defaults or {})
        self.on_conflict = on_conflict
        self.requeue_running = requeue_running
        self.model = model
        self._columns = columns_of(model)
        self._careful = careful

    def write(self, bind: Bind, batch: Batch) -> Done:
        """Write a batch in the caller's transaction.

        Raises:
            JobExistsError: A record is there, and ``on_conflict`` is ``error``.
        """
        connection = connection_of(bind, self.model)
        is_postgres(connection)
        reader = _Reader(self, wire_of(connection), batch)
        if not is_postgres(connection):
            # What is read below stays true; and pysqlite begins no transaction for a savepoint alone.
            lock_sqlite(connection, self.model)
        if not self._careful:
            done = Done()
            repeated: list[_Entry] = []
            if self._try_insert(bind, connection, reader.rows(done, repeated), done) is None:
                self._settle(bind, connection, reader, repeated, done)
                return done
        done = Done()
        self._settle(bind, connection, reader, list(reader.entries(done)), done)
        self._careful = done.skipped + len(done.updated) + sum(known for _, _, known in done.problems) > 0
        return done

    # -------------------------------------------------------------------------------------------------- carefully

    def _settle(self, bind: Bind, connection: Connection, reader: _Reader, entries: list[_Entry], done: Done) -> None:
        """Do for each entry what is to be done, the first of an id before the second."""
        while entries:
            first: dict[Any, _Entry] = {}
            later = [entry for entry in entries if first.setdefault(entry.row[ID], entry) is not entry]
            self._settle_distinct(bind, connection, reader, first, done)
            entries = later

    def _settle_distinct(
        self, bind: Bind, connection: Connection, reader: _Reader, entries: dict[Any, _Entry], done: Done
    ) -> None:
        there = rows_by_id(connection, self._columns, entries)
        changing = self._judged(reader, entries, there, done)
        if changing:
            self._change(bind, connection, reader, changing, done)
        new = [entry for job_id, entry in entries.items() if job_id not in there]
        self._insert(bind, connection, reader, new, done)

    def _judged(self, reader: _Reader, entries: dict[Any, _Entry], there: dict[Any, Row], done: Done) -> list[_Entry]:
        """Return the entries whose records are to be changed; count the others that are there."""
        changing = []
        for job_id, entry in entries.items():
            present = there.get(job_id)
            if present is None:
                continue
            if self.on_conflict == "error":
                raise JobExistsError(reader.uuid(job_id), reader.place(entry.at))
            verdict = judge(present, entry.row, reader.own(entry.at), self.on_conflict)
            if verdict is SKIP and self.on_conflict == "update" and present[STATUS] in ACTIVE and host_of(entry.row):
                verdict = UPDATE
            if verdict.act == "skip":
                done.skipped += 1
            elif verdict.act == "update":
                changing.append(entry)
            else:
                reader.problem(done, entry.at, verdict.field, verdict.reason, known=True)
        return changing

    # ----------------------------------------------------------------------------------------------------- insert

    def _insert(self, bind: Bind, connection: Connection, reader: _Reader, new: list[_Entry], done: Done) -> None:
        """Insert; where the database refuses them as a whole, the half of it at fault, down to the line."""
        if not new:
            return
        refusal = self._try_insert(bind, connection, (entry.row for entry in new), done)
        if refusal is None:
            return
        if len(new) > 1:
            middle = len(new) // 2
            for half in (new[:middle], new[middle:]):
                self._insert(bind, connection, reader, half, done)
            return
        entry = new[0]
        if rows_by_id(connection, self._columns, [entry.row[ID]]):  # somebody inserted it meanwhile
            self._settle(bind, connection, reader, new, done)
        else:
            reader.refused(done, entry.at, refusal)

    def _try_insert(self, bind: Bind, connection: Connection, rows: Iterator[Row], done: Done) -> Exception | None:
        """Insert rows, all or none; return why the database refuses them, None if it was all."""
        sent: list[int] = []
        refusal = self._try(bind, connection, lambda: sent.append(self._send(bind, connection, rows)))
        if refusal is None:
            done.inserted += sent[0]
        return refusal

    def _try(self, bind: Bind, connection: Connection, write: Callable[[], object]) -> Exception | None:
        """Write, all or nothing; return why the database refuses it, None if it does not."""
        savepoint: Any
        if isinstance(bind, Session) and not is_ml_job(self.model):
            savepoint = bind.begin_nested()
            connection_for(bind, self.model)  # only now is it sent
        else:
            savepoint = connection.begin_nested()
        try:
            write()
        except (DBAPIError, MlJobsError) as error:
            if not _speaks_of_a_row(error):
                raise
            savepoint.rollback()
            return error
        except BaseException:
            savepoint.rollback()
            raise
        savepoint.commit()
        return None

    def _send(self, bind: Bind, connection: Connection, rows: Iterator[Row]) -> int:
        wire = wire_of(connection)
        if is_ml_job(self.model):
            table = table_of(self.model)
            if is_postgres(connection) and row_security(connection, table):
                return insert_rows(connection, table, NAMES, (python_values(wire, row) for row in rows))
            return insert_wire(connection, table, self._columns, rows)
        # A host's class: only the ORM knows its defaults and its other tables.
        made = [made_of(self.model, {**record_values(wire, row), **self.defaults, **host_of(row)}) for row in rows]
        if isinstance(bind, Session):
            _add(bind, made)
        else:
            # With a savepoint of its own: when it fails, it must not end the one around it.
            joined = Session(connection, join_transaction_mode="create_savepoint", expire_on_commit=False)
            with joined as session, session.begin():
                _add(session, made)
        return len(made)

    # ----------------------------------------------------------------------------------------------------- update

    def _change(self, bind: Bind, connection: Connection, reader: _Reader, changing: list[_Entry], done: Done) -> None:
        """Change live records, judged anew now that nobody else can change them."""
        table = table_of(self.model)
        entries = {entry.row[ID]: entry for entry in changing}
        uuids = [reader.uuid(job_id) for job_id in entries]
        if is_postgres(connection):
            alive = select(table.c.id).where(table.c.id.in_(uuids), table.c.status.in_(ACTIVE))
            connection.execute(alive.order_by(table.c.id).with_for_update()).all()
        there = rows_by_id(connection, self._columns, entries)
        changing = self._judged(reader, {job_id: entries[job_id] for job_id in there}, there, done)
        held = leases_of(connection, self.model, uuids)
        free = []
        for entry in changing:
            holder = held.get(reader.uuid(entry.row[ID]))
            if holder is None:
                free.append(entry)
            else:
                reader.problem(done, entry.at, "status", str(holder), known=True)
        # One statement for each set of our own keys that lines hold: what a line does not say stays.
        by_names: dict[tuple[str, ...], list[_Change]] = {}
        for entry in free:
            own = reader.own(entry.at)
            names = tuple(name for at, name in enumerate(NAMES) if at != ID and (at < SHARED or name in own))
            values = record_values(reader.wire, entry.row)
            parameters = {name: values[name] for name in names}
            at_status = MlJobStatus(there[entry.row[ID]][STATUS])
            change = _Change(entry.at, values["id"], {**parameters, "at_id": values["id"], "at_status": at_status})
            by_names.setdefault(names, []).append(change)
        for names, changes in by_names.items():
            statement = (
                update(table)
                .where(
                    table.c.id == bindparam("at_id", type_=table.c.id.type),
                    table.c.status == bindparam("at_status", type_=table.c.status.type),
                )
                .values({name: bindparam(name, type_=table.c[name].type) for name in names})
            )
            self._update(partial(self._try_update, bind, connection, statement), reader, changes, done)
        self._change_host(
            bind, connection, {UUID(hex=reader.wire.id_out(one.row[ID])): host_of(one.row) for one in free}
        )
        refresh(bind, self.model, [change.job_id for changes in by_names.values() for change in changes])

    def _change_host(self, bind: Bind, connection: Connection, values: Mapping[UUID, Mapping[str, Any]]) -> None:
        """Set the own columns of live records, by the ORM, which knows their types."""
        given = {job_id: own for job_id, own in values.items() if own}
        if not given:
            return
        with nullcontext(bind) if isinstance(bind, Session) else session_on(connection) as session:
            for job_id, own in given.items():
                job = session.get(self.model, job_id)
                for name, value in own.items():
                    setattr(job, name, value)
            session.flush()

    def _update(
        self,
        attempt: Callable[[list[_Change]], Exception | None],
        reader: _Reader,
        changes: list[_Change],
        done: Done,
    ) -> None:
        """Update; where the database refuses it as a whole, the half of it at fault, down to the line."""
        refusal = attempt(changes)
        if refusal is None:
            done.updated += [change.job_id for change in changes]
        elif len(changes) > 1:
            middle = len(changes) // 2
            for half in (changes[:middle], changes[middle:]):
                self._update(attempt, reader, half, done)
        else:
            reader.refused(done, changes[0].at, refusal)

    def _try_update(
        self, bind: Bind, connection: Connection, statement: Update, changes: list[_Change]
    ) -> Exception | None:
        parameters = [change.parameters for change in changes]
        return self._try(bind, connection, lambda: connection.execute(statement, parameters))


def leases_of(connection: Connection, model: Model, ids: Sequence[UUID]) -> dict[UUID, JobHeldError]:
    """Return what to tell about the jobs that workers hold, of these.

    A lease that has run out counts until it is rescued: its worker may yet renew it.
    """
    jobs, leases = table_of(model), model.__leases__
    held = select(jobs.c.id, leases.c.worker, leases.c.expires_at).join(leases, leases.c.token == jobs.c.lease)
    rows = connection.execute(held.where(jobs.c.id.in_(ids)))
    return {job_id: JobHeldError(job_id, worker, expires_at) for job_id, worker, expires_at in rows}


def may_pass(error: Exception) -> bool:
    """Whether the same transaction may succeed when it is tried again: two imports were in each other's way."""
    return isinstance(error, DBAPIError) and _sqlstate(error) in _PASSING


class _Reader:
    """The lines of one batch as rows of one driver, and the words for what is wrong with them."""

    def __init__(self, writer: Writer, wire: Wire, batch: Batch) -> None:
        self.wire = wire
        self._batch = batch
        make = row_maker(wire, writer.model.__kinds__)
        self._make: Callable[[bytes], Row] = with_host(make, writer.host) if writer.host else make
        self._requeue = writer.requeue_running

    def entries(self, done: Done) -> Iterator[_Entry]:
        """Yield the lines that are records; note the others."""
        make, keys = self._make, self._batch.keys
        for at, line in enumerate(self._batch.lines):
            try:
                row = make(line)
                if keys is not None:
                    self._check_key(row, keys[at])
            except RejectedLineError as error:
                if line.strip(_BLANK) or keys is not None:
                    self.problem(done, at, error.field, error.reason, known=False)
                continue
            if self._requeue and row[STATUS] == _RUNNING:
                row = requeued(row)
            yield _Entry(at, row)

    def rows(self, done: Done, repeated: list[_Entry]) -> Iterator[Row]:
        """Yield the rows of the first line of each id; keep the later ones."""
        seen: set[Any] = set()
        add = seen.add
        for entry in self.entries(done):
            job_id = entry.row[ID]
            if job_id in seen:
                repeated.append(entry)
            else:
                add(job_id)
                yield entry.row

    def _check_key(self, row: Row, key: str) -> None:
        job_id = self.wire.id_out(row[ID])
        if not key.lower().endswith(job_id):
            raise RejectedLineError("id", f"the record is {job_id}, its key says otherwise")

    def own(self, at: int) -> frozenset[str]:
        return own_keys(self._batch.lines[at])

    def uuid(self, job_id: Any) -> UUID:
        return UUID(hex=self.wire.id_out(job_id))

    def place(self, at: int) -> str:
        keys = self._batch.keys
        return f"line {self._batch.first + at}" if keys is None else f"key {keys[at]!r}"

    def problem(self, done: Done, at: int, key: str | None, reason: str, *, known: bool) -> None:
        keys = self._batch.keys
        problem = Problem(self._batch.first + at, key, reason, None if keys is None else keys[at])
        done.problems.append((problem, self._batch.lines[at], known))

    def refused(self, done: Done, at: int, refusal: Exception) -> None:
        """Note a record that only the database refuses."""
        self.problem(done, at, None, f"the database refuses it: {_reason_of(refusal)}", known=False)


_RUNNING: Final = MlJobStatus.RUNNING.value


def _add(session: Session, made: Sequence[Any]) -> None:
    session.add_all(made)
    session.flush()
    for job in made:
        session.expunge(job)


def _sqlstate(error: BaseException) -> str:
    """Return the SQLSTATE of what the driver raised, which may be anywhere in the chain of causes."""
    found: BaseException | None = error
    while found is not None:
        for link in (found, getattr(found, "orig", None)):
            state = getattr(link, "sqlstate", None)
            if isinstance(state, str):
                return state
        found = found.__cause__
    return ""


def _speaks_of_a_row(error: Exception) -> bool:
    if isinstance(error, MlJobsError):  # the guard, or a value that a host's class does not take
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return False
    state = _sqlstate(error)
    if state:
        return state.startswith(_REFUSING)
    return type(error).__name__ in {"IntegrityError", "DataError"}  # SQLite has no SQLSTATE


def _reason_of(error: Exception) -> str:
    cause = getattr(error, "orig", None) or error
    return str(cause).strip().partition("\n")[0]
