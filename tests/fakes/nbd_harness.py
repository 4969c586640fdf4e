"""An NBD server over real sockets and raw clients of it, for tests of how it behaves."""

import contextlib
import struct
from collections.abc import AsyncIterator

import nbd_client as client
import trio
import trio.testing
from nbd_catalog import FakeCatalog

from daemonkit.ports import Address
from diskd.core.ports import Device
from diskd.shell.memory_device import MemoryDevice
from diskd.shell.nbd_memory import Pool
from diskd.shell.nbd_server import NbdServer

MiB = 1 << 20


class Wire:
    """A raw client over one stream."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream

    async def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = await self.stream.receive_some(count - len(data))
            if not part:
                raise EOFError(f"{len(data)} of {count} bytes")
            data += part
        return data

    async def haggle(self, data: bytes) -> client.OptionReply:
        """The last reply to one option."""
        await self.stream.send_all(data)
        while True:
            _, number, kind, length = struct.unpack(">QIII", await self.exactly(20))
            reply = client.OptionReply(number, kind, await self.exactly(length))
            if kind == client.ACK or kind & 1 << 31:
                return reply

    async def greet(self) -> None:
        assert (await self.exactly(client.GREETING_BYTES))[:8] == b"NBDMAGIC"
        await self.stream.send_all(client.FIXED_NO_ZEROES)

    async def go(self, name: str, *, structured: bool = False, queries: tuple[str, ...] = ()) -> None:
        await self.greet()
        if structured:
            assert (await self.haggle(client.option(client.STRUCTURED))).kind == client.ACK
        if queries:
            assert (await self.haggle(client.meta(name, *queries))).kind == client.ACK
        reply = await self.haggle(client.go(name))
        assert reply.kind == client.ACK, reply.data

    async def simple(self, *, length: int = 0) -> tuple[int, int, bytes]:
        """(cookie, error, data) of the next simple reply."""
        _, error, cookie = struct.unpack(">IIQ", await self.exactly(16))
        return cookie, error, b"" if error else await self.exactly(length)

    async def chunk(self) -> tuple[int, int, int, bytes]:
        """(cookie, flags, type, payload)"""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", await self.exactly(20))
        assert magic == 0x668E33EF
        return cookie, flags, kind, await self.exactly(length)

    async def ends(self) -> None:
        """The server closes, whatever it still says."""
        with contextlib.suppress(trio.BrokenResourceError):
            while await self.stream.receive_some(65536):
                pass


class Harness:
    def __init__(self, catalog: FakeCatalog, server: NbdServer, address: Address) -> None:
        self.catalog = catalog
        self.server = server
        self.address = address
        self._stack = contextlib.AsyncExitStack()

    async def connect(self) -> Wire:
        stream = await trio.open_tcp_stream(self.address.host, self.address.port)
        await self._stack.enter_async_context(stream)
        return Wire(stream)

    async def open(
        self, name: str = "disk", *, structured: bool = False, queries: tuple[str, ...] = ()
    ) -> Wire:
        wire = await self.connect()
        await wire.go(name, structured=structured, queries=queries)
        return wire

    async def connections(self, count: int) -> None:
        """Wait until the server has this many."""
        while self.server.connections != count:
            await trio.testing.wait_all_tasks_blocked()


@contextlib.asynccontextmanager
async def serving(
    device: Device | None = None,
    *,
    connections_max: int = 8,
    kind: type[FakeCatalog] = FakeCatalog,
    pool: Pool | None = None,
) -> AsyncIterator[Harness]:
    catalog = kind({"disk": device or MemoryDevice(8 * MiB), "other": MemoryDevice(1 * MiB)})
    server = NbdServer(catalog, connections_max=connections_max, pool=pool)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            address = await nursery.start(server.serve_tcp, Address("127.0.0.1", 0))
            harness = Harness(catalog, server, address)
            async with harness._stack:
                yield harness
            await harness.connections(0)
            assert catalog.open_count == 0
            nursery.cancel_scope.cancel()


async def still_serves(harness: Harness) -> None:
    wire = await harness.open("other")
    await wire.stream.send_all(client.request(client.READ, 0, 512, cookie=5))
    assert await wire.simple(length=512) == (5, 0, bytes(512))
