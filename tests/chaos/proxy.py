"""A TCP proxy before a server, to take the network away from between a client and it."""

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Self

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: closing sends RST


class Proxy:
    """Forwards a port of the loopback to ``upstream_port``. As a context manager it runs.

    The modes are :meth:`forward` (at first), :meth:`refuse` and :meth:`hang`; :meth:`cut` is over at once.
    Each method returns when its mode is in force.

    Attributes:
        port: Where it listens, in every mode but ``refuse``.
    """

    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self.port = 0

    def __enter__(self) -> Self:
        self._flowing = asyncio.Event()
        self._thread.start()
        self.forward()
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def forward(self) -> None:
        """Let everything through, also what was held back while it hung."""
        self._do(self._forward)

    def hang(self) -> None:
        """Take connections and bytes, and pass nothing on: a server that does not answer."""
        self._do(self._hang)

    def refuse(self) -> None:
        """Reset all connections and refuse new ones: no server there."""
        self._do(self._close)

    def cut(self) -> None:
        """Reset all connections; new ones are welcome."""
        self._do(self._cut)

    def _do(self, action: Callable[[], Awaitable[None]]) -> None:
        async def act() -> None:
            await action()

        asyncio.run_coroutine_threadsafe(act(), self._loop).result(timeout=10)

    async def _forward(self) -> None:
        self._flowing.set()
        await self._listen()

    async def _hang(self) -> None:
        self._flowing.clear()
        await self._listen()

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, reuse_address=True)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut()

    async def _cut(self) -> None:
        self._flowing.set()  # wakes those that hold something back: they find their connection closed
        for writer in list(self._connections):
            sock = writer.get_extra_info("socket")
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
        while self._connections:
            await asyncio.sleep(0.005)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        upstream: asyncio.StreamWriter | None = None
        try:
            await self._flowing.wait()
            from_upstream, upstream = await asyncio.open_connection("127.0.0.1", self._upstream_port)
            self._connections.add(upstream)
            ways = [
                asyncio.ensure_future(self._pump(reader, upstream)),
                asyncio.ensure_future(self._pump(from_upstream, writer)),
            ]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass  # no upstream: the client is hung up on, as by a server that has died
        finally:
            for each in (writer, upstream):
                if each is not None:
                    each.transport.abort()
                    self._connections.discard(each)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                await self._flowing.wait()
                target.write(data)
                await target.drain()
