"""How the NBD server sends clients home, fenced or at shutdown: nobody is left without an answer."""

import contextlib
import errno
from collections.abc import Callable
from typing import Any

import nbd_client as client
import pytest
import trio
import trio.testing
from nbd_catalog import FakeCatalog
from nbd_harness import MiB, serving

from diskd.core.ports import Export
from diskd.shell import nbd_connection
from diskd.shell.faulty_device import FaultyDevice
from diskd.shell.memory_device import MemoryDevice
from diskd.shell.nbd_connection import Connection
from diskd.shell.nbd_linger import Company
from diskd.shell.nbd_memory import Pool

ERR_SHUTDOWN = 7 | 1 << 31


class SlowCatalog(FakeCatalog):
    """Nothing is ever opened: as when an older connection has to be drained first."""

    async def open(self, name: str, *, peer: str, drop: Callable[[str], None]) -> Export:
        await trio.sleep_forever()
        raise AssertionError("never")


async def test_an_option_that_waits_is_refused_at_shutdown() -> None:
    async with serving(kind=SlowCatalog) as harness:
        wire = await harness.connect()
        await wire.greet()
        await wire.stream.send_all(client.go("disk"))
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(harness.server.drain, "diskd is shutting down")
            reply = await wire.haggle(b"")
        assert (reply.option, reply.kind) == (client.GO, ERR_SHUTDOWN)
        assert reply.data == b"diskd is shutting down"
        await wire.ends()


@pytest.mark.parametrize("structured", [False, True])
async def test_requests_that_come_during_shutdown_are_refused_and_what_runs_is_finished(
    structured: bool,
) -> None:
    device = FaultyDevice(MemoryDevice(8 * MiB))
    device.close_gate()
    async with serving(device) as harness:
        wire = await harness.open(structured=structured)
        await wire.stream.send_all(client.request(client.FLUSH, cookie=1))
        while not device.waiting:
            await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(harness.server.drain, "diskd is shutting down")
            await trio.testing.wait_all_tasks_blocked()
            for cookie, command in ((2, client.READ), (3, client.TRIM)):
                await wire.stream.send_all(client.request(command, 0, 512, cookie=cookie))
                if structured:
                    answer, _, kind, payload = await wire.chunk()
                    assert (answer, kind, payload[:4]) == (cookie, 1 << 15 | 1, b"\0\0\0\x6c")
                else:
                    assert await wire.simple() == (cookie, errno.ESHUTDOWN, b"")
            device.open_gate()
            assert await wire.simple() == (1, 0, b"")
        await wire.ends()
        assert harness.server.connections == 0


async def test_requests_that_wait_for_room_are_refused_too() -> None:
    device = FaultyDevice(MemoryDevice(8 * MiB))
    device.close_gate()
    count = nbd_connection.IN_FLIGHT_MAX + 40
    async with serving(device) as harness:
        wire = await harness.open()
        await wire.stream.send_all(b"".join(client.request(client.FLUSH, cookie=i) for i in range(count)))
        while device.waiting < nbd_connection.IN_FLIGHT_MAX:
            await trio.testing.wait_all_tasks_blocked()
        harness.catalog.drops[0]("fenced")
        errors = [await wire.simple() for _ in range(40)]
        assert {error for _, error, _ in errors} == {errno.ESHUTDOWN}
        device.open_gate()
        errors += [await wire.simple() for _ in range(nbd_connection.IN_FLIGHT_MAX)]
        assert {cookie for cookie, _, _ in errors} == set(range(count))
        await wire.ends()


async def test_a_dropped_connection_begins_nothing_more() -> None:
    device = MemoryDevice(8 * MiB)
    async with serving(device) as harness:
        wire = await harness.open()
        harness.catalog.drops[0]("fenced")
        with contextlib.suppress(trio.BrokenResourceError, EOFError):
            await wire.stream.send_all(client.request(client.WRITE, 0, data=b"x", cookie=9))
            assert await wire.simple() == (9, errno.ESHUTDOWN, b"")
        await wire.ends()
        assert device.statistics.writes == 0


async def test_nonsense_from_a_dropped_connection_is_no_trouble() -> None:
    device = FaultyDevice(MemoryDevice(8 * MiB))
    device.close_gate()
    async with serving(device) as harness:
        wire = await harness.open()
        await wire.stream.send_all(client.request(client.FLUSH, cookie=1))
        while not device.waiting:
            await trio.testing.wait_all_tasks_blocked()
        harness.catalog.drops[0]("fenced")
        await wire.stream.send_all(b"nonsense" * 100)
        await trio.testing.wait_all_tasks_blocked()
        device.open_gate()
        assert await wire.simple() == (1, 0, b"")
        await wire.ends()


async def test_drain_sends_everybody_home() -> None:
    async with serving() as harness:
        wires = [await harness.open() for _ in range(3)]
        await harness.server.drain("shutting down")
        assert harness.server.connections == 0
        for wire in wires:
            await wire.ends()


class EndlessPeer:
    """A socket whose peer always has something more to say, and takes every answer at once."""

    RECEPTIONS_MAX = 20_000

    def __init__(self, first: bytes, more: bytes) -> None:
        self._first = first
        self._more = more
        self.receptions = 0

    def recv_into(self, buffer: memoryview) -> int:
        self.receptions += 1
        assert self.receptions < self.RECEPTIONS_MAX, "nobody else has had a turn"
        said = self._first or self._more
        self._first = b""
        buffer[: len(said)] = said
        return len(said)

    def sendmsg(self, buffers: list[memoryview]) -> int:
        return sum(map(len, buffers))


async def test_a_peer_that_never_stops_does_not_hold_up_its_own_end() -> None:
    device = FaultyDevice(MemoryDevice(8 * MiB))
    device.close_gate()
    catalog = FakeCatalog({"disk": device})
    flush = client.request(client.FLUSH)
    peer: Any = EndlessPeer(client.FIXED_NO_ZEROES + client.go("disk") + flush, flush)
    connection = Connection(peer, "endless", catalog, Company(), Pool())
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            while not device.waiting:
                await trio.lowlevel.checkpoint()
            connection.drop("fenced")
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            device.open_gate()
    assert catalog.open_count == 0
