"""A bad network between one client and its server: a TCP proxy that is slow, that cuts, or that swallows everything.

What it does can be changed while connections are open. It knows nothing of what passes, so it serves gRPC with TLS too.
"""

import asyncio
import socket
import struct
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from types import TracebackType
from typing import Literal, Self

Way = Literal["up", "down"]
_PIECE_BYTES = 1024
_IN_FLIGHT = 64  # pieces; what is further behind waits with its sender, as TCP's window makes it
_LOOK_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What a link does to the bytes that pass, in both directions.

    Attributes:
        latency_s: Every byte comes so much later.
        bytes_per_s: No more come through, each way; 0: any number.
        cut_at: Every connection is reset when so many bytes have gone up, counted from when this link was set; it is
            whole again afterwards. 0: it is not cut.
        black_hole: Nothing comes through, and nobody is told; when that ends, what was sent meanwhile arrives.
    """

    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    cut_at: int = 0
    black_hole: bool = False


class FaultProxy:
    """Listens on a free port of loopback and passes on to a server; closed with its ``with`` block.

    Attributes:
        address: ``HOST:PORT`` to connect to.
        seen: Bytes that were passed on, each way.
        cuts: How often it has reset its connections.
    """

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self.address, self.cuts = "", 0
        self.seen: dict[Way, int] = {"up": 0, "down": 0}
        self._target, self._link, self._up_when_set = (host, int(port)), Link(), 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._wait(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def set(self, link: Link) -> None:
        """Be another link from now on, for connections that are open too."""
        self._up_when_set, self._link = self.seen["up"], link

    def reset(self) -> None:
        """Reset every connection that is open."""
        self._wait(self._cut())

    def _wait(self, work: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_PIECE_BYTES)
        self.address = "127.0.0.1:{1}".format(*self._server.sockets[0].getsockname())

    async def _close(self) -> None:
        self._server.close()
        await self._cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _cut(self) -> None:
        for writer in self._writers:
            _reset(writer)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        try:
            back, out = await asyncio.open_connection(*self._target, limit=_PIECE_BYTES)
            self._writers.add(out)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass_on(reader, out, "up"))
                both.create_task(self._pass_on(back, writer, "down"))
            self._writers.discard(out)
        except (OSError, asyncio.CancelledError):
            _reset(writer)
        finally:
            self._writers.discard(writer)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: Way) -> None:
        """Read at one end while the other end waits for what is on its way."""
        flying: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_IN_FLIGHT)
        async with asyncio.TaskGroup() as both:
            both.create_task(self._land(flying, sink, way))
            with suppress(OSError):
                while piece := await source.read(_PIECE_BYTES):
                    await flying.put((time.monotonic(), piece))
            await flying.put((time.monotonic(), b""))

    async def _land(self, flying: "asyncio.Queue[tuple[float, bytes]]", sink: asyncio.StreamWriter, way: Way) -> None:
        while True:
            sent_at, piece = await flying.get()
            while self._link.black_hole or time.monotonic() < sent_at + self._link.latency_s:
                await asyncio.sleep(_LOOK_S)
            if not piece:
                sink.close()
                return
            with suppress(OSError):
                await self._write(piece, sink, way)
            if self._link.bytes_per_s:
                await asyncio.sleep(len(piece) / self._link.bytes_per_s)

    async def _write(self, piece: bytes, sink: asyncio.StreamWriter, way: Way) -> None:
        left = self._link.cut_at - (self.seen["up"] - self._up_when_set)
        cut = way == "up" and self._link.cut_at > 0 and left <= len(piece)
        piece = piece[:left] if cut else piece
        if not sink.is_closing():
            sink.write(piece)
            await sink.drain()
            self.seen[way] += len(piece)
        if cut:
            self._link, self.cuts = Link(), self.cuts + 1
            await self._cut()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with an RST, as a link that breaks does; what was not sent yet is gone."""
    with suppress(OSError):
        plain: socket.socket = writer.get_extra_info("socket")
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
