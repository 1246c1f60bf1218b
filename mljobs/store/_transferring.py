"""Files, key-value stores and Arrow, as methods of the stores: the one place that reaches down to ``mljobs.transfer``.

Nothing of ``mljobs.transfer`` is loaded before one of these methods is first used. Type checkers see the signatures of its
functions, ``help`` too.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from mljobs.store._base import async_store_method, method_signature, store_method

if TYPE_CHECKING:
    from mljobs import transfer
    from mljobs.transfer import _arrow as arrow
    from mljobs.transfer import _frames as frames

P = ParamSpec("P")


class _Lazy:
    """A method that is made of an operation of ``mljobs.transfer`` when it is first asked for.

    Args:
        make: Returns the method.
        operation: The name of the operation, of a submodule as ``_arrow.to_arrow``.
    """

    def __init__(self, make: Callable[..., Any], operation: str) -> None:
        self._make = make
        self._operation = operation

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __get__(self, store: Any, owner: type) -> Any:
        method = self._make(_operation(self._operation))
        method.__name__ = self._name
        setattr(self._owner, self._name, method)
        return method.__get__(store, owner)


def _operation(name: str) -> Any:
    from mljobs import transfer  # noqa: PLC0415 - loaded when it is first used

    submodule, _, function = name.rpartition(".")
    return getattr(import_module(f"mljobs.transfer.{submodule}") if submodule else transfer, function)


_in_transaction = partial(store_method, atomic=True)
_in_transaction_async = partial(async_store_method, atomic=True)


def _import(
    operation: Callable[Concatenate[Any, P], transfer.Imported],
) -> Callable[Concatenate[Transfers, P], transfer.Imported]:
    """Return the method that runs an import, a transaction for each batch."""
    new_import: Callable[P, Any] = operation.new_import  # type: ignore[attr-defined]

    @wraps(new_import)
    def run(self: Any, /, *args: P.args, **kw: P.kwargs) -> transfer.Imported:
        kw.setdefault("model", self.model)
        result: transfer.Imported = new_import(*args, **kw).run_in_batches(self.connect)
        return result

    run.__signature__ = method_signature(operation)  # type: ignore[attr-defined]
    return run


def _import_async(
    operation: Callable[Concatenate[Any, P], transfer.Imported],
) -> Callable[Concatenate[AsyncTransfers, P], Coroutine[Any, Any, transfer.Imported]]:
    """Return the coroutine method that runs an import, a transaction for each batch."""
    from sqlalchemy.util import greenlet_spawn  # noqa: PLC0415 - blocking hosts may not have greenlet

    new_import: Callable[P, Any] = operation.new_import  # type: ignore[attr-defined]

    @wraps(new_import)
    async def run(self: Any, /, *args: P.args, **kw: P.kwargs) -> transfer.Imported:
        kw.setdefault("model", self.model)
        work = new_import(*args, **kw)
        if work.single:
            result: transfer.Imported = await self.run(work.run)
            return result
        with work:
            batches = work.batches()
            # In a greenlet too: what it reads from may be asynchronous.
            while (batch := await greenlet_spawn(next, batches, None)) is not None:
                attempts = 0
                while True:
                    try:
                        done = await self.run(partial(work.write, batch=batch))
                        break
                    except Exception as error:
                        if not work.try_again(error, attempts):
                            raise
                        attempts += 1
                work.record(done)
        found: transfer.Imported = work.result
        return found

    run.__signature__ = method_signature(operation)  # type: ignore[attr-defined]
    return run


def _reader(
    arrow_batches: Callable[Concatenate[Any, P], Any],
) -> Callable[Concatenate[Transfers, P], AbstractContextManager[Any]]:
    """Return the method that reads Arrow batches in a transaction of their own, all of one moment."""

    @wraps(arrow_batches)
    @contextmanager
    def run(self: Any, /, *args: P.args, **kw: P.kwargs) -> Iterator[Any]:
        kw.setdefault("model", self.model)
        if self.joined:
            with self.connect() as bind, _operation("_arrow.reader_of")(bind, *args, **kw) as reader:
                yield reader
            return
        with self.engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection.execution_options(isolation_level="REPEATABLE READ")
            else:
                connection.exec_driver_sql("BEGIN")  # Python's driver begins none for reading: two reads, two states
            with _operation("_arrow.reader_of")(connection, *args, **kw) as reader:
                yield reader

    return run


class Transfers:
    """Records in and out of a ``JobStore``."""

    if TYPE_CHECKING:
        export_jobs = store_method(transfer.export_jobs)
        import_jobs = _import(transfer.import_jobs)
        dump_kv = store_method(transfer.dump_kv)
        load_kv = _import(transfer.load_kv)
        compare = store_method(transfer.compare)
        digest = store_method(transfer.digest)
        check_digest = store_method(transfer.check_digest)
        to_arrow = store_method(arrow.to_arrow)
        to_pandas = store_method(frames.to_pandas)
        to_polars = store_method(frames.to_polars)
        arrow_batches = _reader(arrow.arrow_batches)
    else:
        export_jobs = _Lazy(_in_transaction, "export_jobs")
        import_jobs = _Lazy(_import, "import_jobs")
        dump_kv = _Lazy(_in_transaction, "dump_kv")
        load_kv = _Lazy(_import, "load_kv")
        compare = _Lazy(_in_transaction, "compare")
        digest = _Lazy(_in_transaction, "digest")
        check_digest = _Lazy(_in_transaction, "check_digest")
        to_arrow = _Lazy(_in_transaction, "_arrow.to_arrow")
        to_pandas = _Lazy(_in_transaction, "_frames.to_pandas")
        to_polars = _Lazy(_in_transaction, "_frames.to_polars")
        arrow_batches = _Lazy(_reader, "_arrow.arrow_batches")


class AsyncTransfers:
    """Records in and out of an ``AsyncJobStore``."""

    if TYPE_CHECKING:
        export_jobs = async_store_method(transfer.export_jobs)
        import_jobs = _import_async(transfer.import_jobs)
        dump_kv = async_store_method(transfer.dump_kv)
        load_kv = _import_async(transfer.load_kv)
        compare = async_store_method(transfer.compare)
        digest = async_store_method(transfer.digest)
        check_digest = async_store_method(transfer.check_digest)
        to_arrow = async_store_method(arrow.to_arrow)
        to_pandas = async_store_method(frames.to_pandas)
        to_polars = async_store_method(frames.to_polars)
    else:
        export_jobs = _Lazy(_in_transaction_async, "export_jobs")
        import_jobs = _Lazy(_import_async, "import_jobs")
        dump_kv = _Lazy(_in_transaction_async, "dump_kv")
        load_kv = _Lazy(_import_async, "load_kv")
        compare = _Lazy(_in_transaction_async, "compare")
        digest = _Lazy(_in_transaction_async, "digest")
        check_digest = _Lazy(_in_transaction_async, "check_digest")
        to_arrow = _Lazy(_in_transaction_async, "_arrow.to_arrow")
        to_pandas = _Lazy(_in_transaction_async, "_frames.to_pandas")
        to_polars = _Lazy(_in_transaction_async, "_frames.to_polars")
