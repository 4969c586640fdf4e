"""A small NBD client on trio that keeps many requests in flight, and tells when each was sent and answered.

Its end is part of its use: when the server is killed, everything unanswered ends with ConnectionLost.
"""

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES = 0, 1, 3, 4, 6
NBD_CMD_FLAG_FUA: Final = 1
NBD_CMD_FLAG_NO_HOLE: Final = 2
_IHAVEOPT: Final = 0x49484156454F5054
_OPT_GO: Final = 7
_REP_ACK, _REP_INFO = 1, 3
_REQUEST: Final = struct.Struct(">IHHQQI")
_REPLY: Final = struct.Struct(">IIQ")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_READ_BYTES: Final = 1 << 20


class ConnectionLost(Exception):
    """The server is gone, or refused the export: whether an unanswered request was carried out is unknown."""


class RequestFailed(Exception):
    """The server answered with an error number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"NBD error {number}")
        self.number = number


class _Waiting:
    def __init__(self, length: int) -> None:
        self.done = trio.Event()
        self.length = length
        self.error: int | None = None
        self.data = b""


class Client:
    """Made by ``connect``. Calls may overlap as one likes."""

    def __init__(self, stream: trio.SocketStream, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._stream = stream
        self._sending = trio.Lock()
        self._waiting: dict[int, _Waiting] = {}
        self._cookie = 0
        self._gone: str | None = None

    async def read(self, offset: int, length: int) -> bytes:
        """Longer reads are split."""
        parts = []
        while length:
            part = min(length, _READ_BYTES)
            parts.append(await self._call(NBD_CMD_READ, 0, offset, part))
            offset, length = offset + part, length - part
        return b"".join(parts)

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        await self._call(NBD_CMD_WRITE, NBD_CMD_FLAG_FUA if fua else 0, offset, len(data), data)

    async def zero(self, offset: int, length: int, *, may_trim: bool = True, fua: bool = False) -> None:
        flags = (NBD_CMD_FLAG_FUA if fua else 0) | (0 if may_trim else NBD_CMD_FLAG_NO_HOLE)
        await self._call(NBD_CMD_WRITE_ZEROES, flags, offset, length)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self._call(NBD_CMD_TRIM, NBD_CMD_FLAG_FUA if fua else 0, offset, length)

    async def flush(self) -> None:
        await self._call(NBD_CMD_FLUSH, 0, 0, 0)

    async def _call(self, command: int, flags: int, offset: int, length: int, data: bytes = b"") -> bytes:
        if self._gone is not None:
            raise ConnectionLost(self._gone)
        self._cookie += 1
        cookie, waiting = self._cookie, _Waiting(length if command == NBD_CMD_READ else 0)
        self._waiting[cookie] = waiting
        request = _REQUEST.pack(0x25609513, flags, command, cookie, offset, length)
        try:
            async with self._sending:
                await self._stream.send_all(request + data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost(str(error)) from error
        await waiting.done.wait()
        if waiting.error is None:
            raise ConnectionLost(self._gone or "closed")
        if waiting.error:
            raise RequestFailed(waiting.error)
        return waiting.data

    async def receive_replies(self) -> None:
        """Until the connection ends; ``connect`` runs it."""
        buffer = bytearray()
        try:
            while True:
                await _fill(self._stream, buffer, _REPLY.size)
                magic, error, cookie = _REPLY.unpack_from(buffer)
                if magic != 0x67446698 or cookie not in self._waiting:
                    raise ConnectionLost("an answer that makes no sense")
                waiting = self._waiting[cookie]
                length = 0 if error else waiting.length
                await _fill(self._stream, buffer, _REPLY.size + length)
                waiting.data = bytes(buffer[_REPLY.size : _REPLY.size + length])
                del buffer[: _REPLY.size + length]
                del self._waiting[cookie]
                waiting.error = error
                waiting.done.set()
        except ConnectionLost as error:
            self.end(str(error))

    def end(self, reason: str) -> None:
        """Nothing will be answered any more."""
        self._gone = self._gone or reason
        for waiting in self._waiting.values():
            waiting.done.set()
        self._waiting.clear()


async def _fill(stream: trio.SocketStream, buffer: bytearray, length: int) -> None:
    while len(buffer) < length:
        try:
            data = await stream.receive_some(max(length - len(buffer), 65536))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost(str(error)) from error
        if not data:
            raise ConnectionLost("the server closed the connection")
        buffer += data


@asynccontextmanager
async def connect(host: str, port: int, export: str) -> AsyncIterator[Client]:
    """Raises ConnectionLost where the server is not there, or refuses the export (with its reason)."""
    try:
        stream = await trio.open_tcp_stream(host, port)
    except OSError as error:
        raise ConnectionLost(str(error)) from error
    failure: Exception | None = None
    async with stream:
        client = Client(stream, await _negotiate(stream, export))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.receive_replies)
            try:
                yield client
            except (ConnectionLost, RequestFailed) as error:
                failure = error
            finally:
                client.end("closed")
                nursery.cancel_scope.cancel(reason="closed")
    if failure is not None:
        raise failure  # without the nursery's group around it


async def _negotiate(stream: trio.SocketStream, export: str) -> int:
    """The size. Simple replies are all that is asked for."""
    buffer = bytearray()
    await _fill(stream, buffer, 18)
    del buffer[:18]
    name = export.encode()
    body = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    hello = struct.pack(">I", 3) + struct.pack(">QII", _IHAVEOPT, _OPT_GO, len(body)) + body
    try:
        await stream.send_all(hello)
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise ConnectionLost(str(error)) from error
    size = 0
    while True:
        await _fill(stream, buffer, _OPTION_REPLY.size)
        _, _, kind, length = _OPTION_REPLY.unpack_from(buffer)
        await _fill(stream, buffer, _OPTION_REPLY.size + length)
        payload = bytes(buffer[_OPTION_REPLY.size : _OPTION_REPLY.size + length])
        del buffer[: _OPTION_REPLY.size + length]
        if kind == _REP_ACK:
            return size
        if kind != _REP_INFO:
            raise ConnectionLost(f"{export}: {payload.decode(errors='replace') or hex(kind)}")
        if payload[:2] == b"\0\0":
            (size,) = struct.unpack_from(">Q", payload, 2)
