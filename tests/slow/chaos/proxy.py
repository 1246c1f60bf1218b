"""A TCP proxy that can be cut (reset) and stalled (nothing passes, nothing ends)."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Stands between clients and a server on this machine, on a thread of its own.

    Args:
        target: The server's port.

    Attributes:
        port: Where clients connect.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="chaos-proxy", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(asyncio.start_server(self._serve, sock=self._listener))
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
            with suppress(asyncio.CancelledError, OSError):
                self._loop.run_until_complete(task)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine = {writer}
        self._writers |= mine
        try:
            await self._open.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            mine.add(back)
            self._writers |= mine
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        except OSError:
            pass
        finally:
            self._writers -= mine
            for each in mine:
                each.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._open.wait()
            writer.write(data)
            await writer.drain()
        await self._open.wait()
        raise ConnectionResetError

    def cut(self) -> int:
        """Reset every connection; return how many there were."""
        return asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result()

    async def _cut(self) -> int:
        writers = list(self._writers)
        for writer in writers:
            with suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
        return len(writers) // 2

    def stall(self) -> int:
        """Let nothing pass any more, and nobody know; return how many connections hang now."""
        asyncio.run_coroutine_threadsafe(self._switch(opened=False), self._loop).result()
        return len(self._writers) // 2

    def heal(self) -> None:
        """Let everything pass again, what waited included."""
        asyncio.run_coroutine_threadsafe(self._switch(opened=True), self._loop).result()

    async def _switch(self, *, opened: bool) -> None:
        if opened:
            self._open.set()
        else:
            self._open.clear()

    def close(self) -> None:
        """Cut everything, and stop."""
        self.heal()
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
