"""``Import``: an import from any input, batch by batch; and ``import_jobs``, from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import wraps
from inspect import Parameter, signature
from typing import Any, Concatenate, Final, ParamSpec, Protocol, Self

from mljobs.jobs import Bind, Model
from mljobs.record._models import MlJob
from mljobs.transfer._files import File, reading
from mljobs.transfer._judging import OnConflict, check_on_conflict
from mljobs.transfer._lines import Batch, batches
from mljobs.transfer._rejects import Rejects, rejects_file
from mljobs.transfer._results import Imported, OnProgress, Problem, Progress
from mljobs.transfer._writing import Done, Writer, may_pass

_TRIES: Final = 5
"""How often a transaction is begun that meets another import's; each time one of the two goes through."""

P = ParamSpec("P")
Reject = Callable[[Problem, Iterable[bytes]], None]


class Input(Protocol):
    """What an import reads from."""

    def batches(self, reject: Reject) -> Iterator[Batch]:
        """Yield what is to be written, in order; hand to ``reject`` what is no line of a batch."""
        ...

    def progress(self, records: int) -> Progress:
        """Say how far the reading is, after so many records."""
        ...

    def close(self) -> None:
        """Close what was opened."""
        ...


class Import:
    """An import, batch by batch; the caller begins and commits the transactions.

    ``with`` it, iterate over ``batches``, ``write`` each in a transaction, and ``record`` what came of it once that stands.

    Args:
        source: What it reads from; it is closed at the end.
        on_conflict: ``skip``, ``update`` or ``error``; see ``import_jobs``.
        requeue_running: Queue running records again.
        rejects: Where to put what is not imported; None for a new file in the present directory.
        progress: Is called after each batch.
        model: The mapped job class.
        defaults: Of a host's own columns; see ``import_jobs``.

    Raises:
        InvalidValueError: An argument is not one of its choices.
    """

    def __init__(
        self,
        source: Input,
        *,
        on_conflict: str,
        requeue_running: bool,
        rejects: File | None,
        progress: OnProgress | None,
        model: Model,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        with ExitStack() as stack:
            stack.callback(source.close)
            check_on_conflict(on_conflict)
            self._writer = Writer(
                on_conflict=on_conflict, requeue_running=requeue_running, model=model, defaults=defaults
            )
            self._rejects = Rejects(rejects)
            stack.callback(self._rejects.close)
            self._open = stack.pop_all()
        self._source = source
        self._progress = progress
        self._counts = dict.fromkeys(("inserted", "updated", "skipped", "refused", "rejected"), 0)

    @property
    def single(self) -> bool:
        """Whether all of it is to be one transaction: where the first conflict ends it, nothing is to stand."""
        return self._writer.on_conflict == "error"

    @property
    def result(self) -> Imported:
        """What has been recorded so far."""
        return Imported(**self._counts, rejects=self._rejects.path, problems=tuple(self._rejects.problems))

    def batches(self) -> Iterator[Batch]:
        """Yield what is to be written, in order.

        Raises:
            TransferError: The input cannot be read to its end.
        """
        return self._source.batches(self._reject)

    def write(self, bind: Bind, batch: Batch) -> Done:
        """Write a batch in the caller's transaction; nothing is counted yet."""
        return self._writer.write(bind, batch)

    def record(self, done: Done) -> None:
        """Count what came of a batch, and put what was not imported into the rejects."""
        self._counts["inserted"] += done.inserted
        self._counts["updated"] += len(done.updated)
        self._counts["skipped"] += done.skipped
        for problem, raw, known in sorted(done.problems, key=lambda found: found[0].line):
            self._counts["refused" if known else "rejected"] += 1
            self._rejects.add(problem, raw)
        self._rejects.flush()
        if self._progress is not None:
            self._progress(self._source.progress(self.result.total))

    def run(self, bind: Bind) -> Imported:
        """Do all of it in the caller's transaction."""
        with self:
            for batch in self.batches():
                self.record(self.write(bind, batch))
        return self.result

    def run_in_batches(self, connect: Callable[[], AbstractContextManager[Bind]]) -> Imported:
        """Do all of it, a transaction for each batch; begun again where it met another import's.

        Args:
            connect: Begins a transaction.
        """
        if self.single:
            with connect() as bind:
                return self.run(bind)
        with self:
            for batch in self.batches():
                for tried in range(_TRIES):
                    try:
                        with connect() as bind:
                            done = self.write(bind, batch)
                        break
                    except Exception as error:
                        if not self.try_again(error, tried):
                            raise
                self.record(done)
        return self.result

    @staticmethod
    def try_again(error: Exception, tried: int) -> bool:
        """Whether to begin a batch's transaction again.

        Args:
            error: How it ended.
            tried: How often it has ended before.
        """
        return may_pass(error) and tried < _TRIES - 1

    def _reject(self, problem: Problem, parts: Iterable[bytes]) -> None:
        self._counts["rejected"] += 1
        self._rejects.add_long(problem, parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


class FileInput:
    """The lines of a file.

    Args:
        file: A path, ``"-"`` for standard input, or an open file.

    Raises:
        InvalidValueError: Not a file.
        OSError: The path cannot be opened.
    """

    def __init__(self, file: File) -> None:
        with ExitStack() as stack:
            self._source = stack.enter_context(reading(file))
            self._open = stack.pop_all()

    def batches(self, reject: Reject) -> Iterator[Batch]:
        """See ``Input.batches``."""

        def on_long_line(number: int, parts: Iterator[bytes]) -> None:
            reject(Problem(number, None, "too long to be a record"), parts)

        return batches(self._source.read, on_long_line)

    def progress(self, records: int) -> Progress:
        """See ``Input.progress``."""
        self._source.records = records
        return Progress(records, self._source.position(), self._source.size)

    def close(self) -> None:
        """See ``Input.close``."""
        self._open.close()


def import_operation(new_import: Callable[P, Import]) -> Callable[Concatenate[Bind, P], Imported]:
    """Return the operation that runs an import in the caller's transaction.

    Args:
        new_import: Returns the import. It is kept under this name on the operation, for stores, which run it in a
            transaction for each batch.
    """

    @wraps(new_import)
    def run(session: Bind, /, *args: P.args, **kw: P.kwargs) -> Imported:
        return new_import(*args, **kw).run(session)

    own = Parameter("session", Parameter.POSITIONAL_ONLY, annotation="Bind")
    declared = signature(new_import)
    run.__signature__ = declared.replace(  # type: ignore[attr-defined]
        parameters=[own, *declared.parameters.values()], return_annotation="Imported"
    )
    run.new_import = new_import  # type: ignore[attr-defined]
    return run


@import_operation
def import_jobs(
    file: File,
    *,
    on_conflict: OnConflict = "skip",
    requeue_running: bool = False,
    rejects: File | None = None,
    progress: OnProgress | None = None,
    defaults: Mapping[str, Any] | None = None,
    model: Model = MlJob,
) -> Import:
    """Read records from NDJSON, one a line, in the caller's transaction, in constant memory.

    A finished record is never overwritten: an equal one is skipped, another is refused. A line that is no record is
    rejected and does not stop the import. A record that a worker holds is refused. Running records get no lease.

    Args:
        session: The caller's session or connection.
        file: A path, ``"-"`` for standard input, or an open file. A compressed one is known by its name (``.gz``,
            ``.zst``) or by its first bytes.
        on_conflict: What to do with a live record that is there already: ``"skip"`` leaves it; ``"update"`` makes it what
            the line says if that is a legal step; ``"error"`` raises at the first record that is there, finished or not.
        requeue_running: Queue running records again, as RedDB does on restart: progress 0, not started.
        rejects: Where refused and rejected lines go; None for ``<file>.rejects.ndjson``, where an older one is removed, and
            for an input without a name a new ``import.rejects.ndjson`` in the present directory, with a number where
            there is one. It is made only if there are any.
        progress: Is called after each batch of some thousand lines.
        defaults: Values of your class's own columns, for new records whose lines do not say them: those of an export that
            was not extended, or of another class.
        model: The mapped job class.

    Returns:
        How many lines came to what.

    Raises:
        InvalidValueError: An argument is not one of its choices, or the rejects would replace the input.
        JobExistsError: A record is there, and ``on_conflict`` is ``"error"``. Roll back; in a store nothing stands.
        TransferError: The file cannot be read to its end. What was read before may stand; the import can be run again.
        OSError: The file cannot be opened.
    """
    place = rejects_file(file, rejects)  # before the file is opened: it may be refused
    return Import(
        FileInput(file),
        on_conflict=on_conflict,
        requeue_running=requeue_running,
        rejects=place,
        progress=progress,
        model=model,
        defaults=defaults,
    )
