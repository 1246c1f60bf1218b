"""Files to read from and write to: a path, an open file or a standard stream; plain or compressed.

A file that is written under a path appears there whole or not at all: it grows beside it under another name.
"""

from __future__ import annotations

import gzip
import io
import os
import secrets
import stat
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Final, Protocol, Self

from mljobs.errors import InvalidValueError, TransferError

File = str | os.PathLike[str] | IO[bytes] | IO[str]
"""A path, ``"-"`` for the standard stream, or an open file, binary or text."""

_GZIP_MAGIC: Final = b"\x1f\x8b"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_GZIP_LEVEL: Final = 6
_AHEAD: Final = 8
"""Parts that wait to be written, so that memory has an end."""
_STANDARD: Final = "-"
_OTHER_ARCHIVES: Final = frozenset({".bz2", ".xz", ".lzma", ".lz4", ".br", ".zip", ".7z"})
_DAMAGED: Final = (EOFError, zlib.error, gzip.BadGzipFile)


def name_of(file: File) -> str:
    """Return how messages call a file."""
    if file == _STANDARD:
        return "standard stream"
    if isinstance(file, str | os.PathLike):
        return os.fspath(file)
    name = getattr(file, "name", None)
    return name if isinstance(name, str) else "the file"


def path_of(file: File) -> Path | None:
    """Return where a file lies; None for a stream without a place."""
    if file == _STANDARD:
        return None
    if isinstance(file, str | os.PathLike):
        return Path(file)
    name = getattr(file, "name", None)
    # <stdin>, <fdopen> and their kind are no places
    return Path(name) if isinstance(name, str) and not name.startswith("<") else None


def is_same_file(file: File, other: File) -> bool:
    """Whether what is read from one is what lies in the other."""
    try:
        there = _status_of(other)
        return stat.S_ISREG(there.st_mode) and os.path.samestat(_status_of(file), there)
    except (OSError, AttributeError, ValueError):  # not there, or no file of the system
        return False


def _status_of(file: Any) -> os.stat_result:
    if file == _STANDARD:
        file = sys.stdin
    return Path(file).stat() if isinstance(file, str | os.PathLike) else os.fstat(file.fileno())


# -------------------------------------------------------------------------------------------------------- to write


@dataclass(slots=True)
class Sink:
    """Where bytes go.

    Attributes:
        write: Takes all of them.
        records: How many records have gone; for an error's message.
    """

    write: Callable[[bytes], object]
    records: int = 0


def _check_suffix(path: Path) -> Path:
    """Refuse the name of an archive that we neither write nor read: its content would not be what the name says."""
    if path.suffix in _OTHER_ARCHIVES:
        raise InvalidValueError("file", str(path), "of compressed files .gz and .zst are written and read")
    return path


@contextmanager
def writing(file: File) -> Iterator[Sink]:
    """Open a file to write to; under a path it appears when the block has ended well.

    Args:
        file: A name that ends in ``.gz`` or ``.zst`` is compressed. An open file is written as it is and left open.

    Raises:
        InvalidValueError: Not a file, or the name of another kind of archive.
        TransferError: The disk is full, the pipe is broken, or the like.
        OSError: The path cannot be opened.
    """
    with ExitStack() as stack:
        if file == _STANDARD:
            sink = Sink(_writer_of(getattr(sys.stdout, "buffer", sys.stdout)))
            finish: Callable[[], object] = sys.stdout.flush
        elif isinstance(file, str | os.PathLike):
            sink, finish = _at_path(_check_suffix(Path(file)), stack)
        elif callable(getattr(file, "write", None)):
            sink = Sink(_writer_of(file))
            finish = getattr(file, "flush", lambda: None)
        else:
            raise InvalidValueError("file", file, "expected a path, '-' or an open file")
        with transfer_errors(name_of(file), sink):
            yield sink
            finish()


class Counting(Protocol):
    """What knows how many records have gone."""

    records: int


@contextmanager
def transfer_errors(name: str, sink: Counting) -> Iterator[None]:
    """Raise ``TransferError`` for what the system says of a file: a full disk, a broken pipe."""
    try:
        yield
    except TransferError:
        raise
    except UnicodeEncodeError as error:  # of an open text file
        raise TransferError(name, f"{error}; open it as utf-8", sink.records) from error
    except OSError as error:
        failure = TransferError(name, error.strerror or str(error), sink.records)
        failure.errno = error.errno
        raise failure from error


def _writer_of(file: Any) -> Callable[[bytes], object]:
    write = file.write
    if _is_text(file):
        return lambda data: write(data.decode())
    if not isinstance(file, io.RawIOBase):
        opened_binary: Callable[[bytes], object] = write
        return opened_binary

    def write_all(data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[write(left) or 0 :]

    return write_all


def _at_path(path: Path, stack: ExitStack) -> tuple[Sink, Callable[[], object]]:
    try:
        there = path.stat()
    except FileNotFoundError:
        there = None
    if there is not None and not stat.S_ISREG(there.st_mode):
        return _at_device(path, stack)  # it cannot be replaced
    real = Path(os.path.realpath(path))  # a link stays a link
    part = real.with_name(f".{real.name}.{secrets.token_hex(4)}.part")
    raw = _created(path, part, there)
    stack.callback(_discard, raw, part)
    # Not entered into the stack: a failed write must not flush once more on the way out.
    compressing = _compressing(raw, path.suffix)
    behind = _WriterThread(compressing.__enter__().write)
    stack.callback(behind.stop)

    def finish() -> None:
        behind.finish()
        compressing.__exit__(None, None, None)
        raw.flush()
        os.fsync(raw.fileno())
        raw.close()
        part.replace(real)
        with suppress(OSError):  # not every file system lets its directories be synced
            directory = os.open(real.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    return Sink(behind.write), finish


def _at_device(path: Path, stack: ExitStack) -> tuple[Sink, Callable[[], object]]:
    raw = path.open("wb")
    stack.callback(_close, raw)
    compressing = _compressing(raw, path.suffix)

    def finish() -> None:
        compressing.__exit__(None, None, None)
        raw.flush()

    return Sink(compressing.__enter__().write), finish


class _WriterThread:
    """Writes behind the caller's back, in a thread: compressing and writing let go of the GIL.

    What goes wrong is raised by a later call, by ``finish`` at the latest.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._thread = ThreadPoolExecutor(1, "mljobs-export")
        self._under_way: deque[Future[object]] = deque()

    def write(self, data: bytes) -> None:
        if len(self._under_way) >= _AHEAD:
            self._under_way.popleft().result()
        self._under_way.append(self._thread.submit(self._write, data))

    def finish(self) -> None:
        while self._under_way:
            self._under_way.popleft().result()

    def stop(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def _created(path: Path, part: Path, there: os.stat_result | None) -> IO[bytes]:
    mode = 0o666 if there is None else stat.S_IMODE(there.st_mode)
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), mode)
    except OSError as error:  # named as the user named it
        raise type(error)(error.errno, error.strerror, str(path)) from error
    if there is not None:
        part.chmod(mode)  # the umask does not bind a file that is replaced
    return os.fdopen(descriptor, "wb")


def _close(raw: IO[bytes]) -> None:
    with suppress(OSError):  # it flushes once more what could not be written before
        raw.close()


def _discard(raw: IO[bytes], part: Path) -> None:
    _close(raw)
    part.unlink(missing_ok=True)


def _compressing(raw: IO[bytes], suffix: str) -> AbstractContextManager[Any]:
    if suffix == ".gz":  # without name and time, so that equal exports are equal files
        return gzip.GzipFile("", "wb", _GZIP_LEVEL, raw, 0)
    if suffix == ".zst":
        opened: AbstractContextManager[Any] = _zstd().open(raw, "wb")
        return opened
    return _Uncompressed(raw)


class _Uncompressed:
    """A file as it is, whose owner closes it."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.write = raw.write

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


# --------------------------------------------------------------------------------------------------------- to read


@dataclass(slots=True)
class Source:
    """Where bytes come from.

    Attributes:
        read: Returns at most so many, none at the end.
        size: Bytes in all, as they lie in the file; None where unknown.
        position: How many of these have been read; None where nobody counts.
        records: How many records have been read; for an error's message.
    """

    read: Callable[[int], bytes]
    size: int | None = None
    position: Callable[[], int | None] = lambda: None
    records: int = 0


@contextmanager
def reading(file: File) -> Iterator[Source]:
    """Open a file to read from.

    Args:
        file: A compressed one is known by its name or by its first bytes. An open file is left open.

    Raises:
        InvalidValueError: Not a file, or the name of another kind of archive.
        OSError: The path cannot be opened.
    """
    with ExitStack() as stack:
        if file == _STANDARD:
            raw: Any = getattr(sys.stdin, "buffer", sys.stdin)
        elif isinstance(file, str | os.PathLike):
            raw = stack.enter_context(_check_suffix(Path(file)).open("rb"))
        elif callable(getattr(file, "read", None)):
            raw = file
        else:
            raise InvalidValueError("file", file, "expected a path, '-' or an open file")
        source = Source(raw.read, _size_of(raw), lambda: _position_of(raw))
        source.read = _reader_of(raw.read, name_of(file), source)
        if not _is_text(raw):
            begun = _PartlyRead(raw, _start_of(source.read))
            unpacked: Any = begun
            packed = _compression_of(begun.start, path_of(file) if isinstance(file, str | os.PathLike) else None)
            if packed == ".gz":
                if not begun.start:  # gzip.GzipFile takes it for an archive of nothing
                    raise TransferError(name_of(file), "it is empty, not a gzipped file", 0)
                unpacked = stack.enter_context(gzip.GzipFile(fileobj=begun, mode="rb"))  # type: ignore[call-overload]
            elif packed == ".zst":
                unpacked = stack.enter_context(_zstd().open(begun, "rb"))
            source.read = _reader_of(unpacked.read, name_of(file), source)
        yield source


def _is_text(file: Any) -> bool:
    return isinstance(file, io.TextIOBase) or hasattr(file, "encoding")


def _start_of(read: Callable[[int], bytes]) -> bytes:
    start = b""
    while len(start) < len(_ZSTD_MAGIC) and (more := read(len(_ZSTD_MAGIC) - len(start))):
        start += more
    return start


class _PartlyRead:
    """A file whose first bytes have been read already. Not ``peek``: few files have it, and it may give fewer."""

    def __init__(self, raw: Any, start: bytes) -> None:
        self.start = start
        self._left = start
        self._raw = raw

    def read(self, size: int = -1) -> Any:
        if not self._left:
            return self._raw.read(size)
        if size < 0:
            size = len(self._left)
        part, self._left = self._left[:size], self._left[size:]
        return part


def _compression_of(start: bytes, path: Path | None) -> str | None:
    if path is not None and path.suffix in {".gz", ".zst"}:
        return path.suffix
    if start.startswith(_GZIP_MAGIC):
        return ".gz"
    return ".zst" if start.startswith(_ZSTD_MAGIC) else None


def _reader_of(read: Callable[[int], Any], name: str, source: Source) -> Callable[[int], bytes]:
    def bytes_of(size: int) -> bytes:
        try:
            data = read(size)
        except (OSError, *_DAMAGED) as error:
            raise TransferError(name, str(error) or type(error).__name__, source.records) from error
        except Exception as error:
            if type(error).__name__ == "ZstdError":  # its module may not be installed
                raise TransferError(name, str(error), source.records) from error
            raise
        if isinstance(data, str):  # a text file; what it could not decode comes back as the bytes that they were
            try:
                return data.encode()
            except UnicodeEncodeError:
                return _surrogates(data)
        return data if isinstance(data, bytes) else bytes(data or b"")

    return bytes_of


def _surrogates(text: str) -> bytes:
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")


def _size_of(raw: Any) -> int | None:
    try:
        found = os.fstat(raw.fileno())
    except (OSError, AttributeError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _position_of(raw: Any) -> int | None:
    try:
        position: int = raw.tell()
    except (OSError, AttributeError, ValueError):
        return None
    return position


def _zstd() -> Any:
    try:
        return import_module("compression.zstd")  # since Python 3.14
    except ImportError:
        try:
            return import_module("backports.zstd")  # of the extra
        except ImportError as error:
            message = "files in .zst need the extra: pip install 'mljobs[zstd]'"
            raise ModuleNotFoundError(message, name="backports.zstd") from error
