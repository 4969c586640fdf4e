"""The NBD server over real sockets: order, limits, faults, and peers that misbehave."""

import contextlib
import errno
import socket
import struct
from pathlib import Path

import nbd_client as client
import pytest
import trio
import trio.testing
from nbd_catalog import FakeCatalog
from nbd_harness import Wire, serving, still_serves

from daemonkit.errors import OperatorError
from diskd.core.ports import Allocation, ChangeReport, Device, Export
from diskd.shell import nbd_connection
from diskd.shell.faulty_device import FaultyDevice
from diskd.shell.memory_device import MemoryDevice
from diskd.shell.nbd_server import NbdServer

MiB = 1 << 20


async def test_a_batch_is_answered_in_one_go() -> None:
    async with serving() as harness:
        wire = await harness.open()
        await wire.stream.send_all(
            client.request(client.WRITE, 4096, data=b"abc", cookie=1)
            + client.request(client.READ, 4095, 5, cookie=2)
            + client.request(client.CACHE, 0, MiB, cookie=3)
        )
        assert await wire.exactly(16 + 16 + 5 + 16) == (
            struct.pack(">IIQ", 0x67446698, 0, 1)
            + struct.pack(">IIQ", 0x67446698, 0, 2)
            + b"\0abc\0"
            + struct.pack(">IIQ", 0x67446698, 0, 3)
        )


async def test_every_command_reaches_the_device() -> None:
    device = MemoryDevice(8 * MiB)
    async with serving(device) as harness:
        wire = await harness.open()
        data = bytes(range(256)) * 4096
        for cookie, message in enumerate(
            [
                client.request(client.WRITE, MiB, data=data, cookie=0),
                client.request(client.WRITE, 0, data=b"f", cookie=1, flags=client.FUA),
                client.request(client.WRITE_ZEROES, MiB, 1000, cookie=2, flags=client.NO_HOLE),
                client.request(client.TRIM, MiB + 65536, 65536, cookie=3),
                client.request(client.FLUSH, cookie=4),
                client.request(client.WRITE, 0, 0, cookie=5),
                client.request(client.TRIM, 0, 0, cookie=6),
            ]
        ):
            await wire.stream.send_all(message)
            assert await wire.simple() == (cookie, 0, b"")
        await wire.stream.send_all(client.request(client.READ, MiB, MiB, cookie=9))
        _, _, back = await wire.simple(length=MiB)
        assert back == bytes(1000) + data[1000:65536] + bytes(65536) + data[131072:]
        assert device.statistics.flushes == 2
        assert (device.statistics.zeroes, device.statistics.trims) == (1, 1)


async def test_block_status_of_allocation_and_of_a_point() -> None:
    device = MemoryDevice(1 * MiB)
    device.write_nowait(65536, b"x")
    async with serving(device) as harness:
        harness.catalog.points["rp-0"] = ChangeReport(
            [(0, 100), (70_000, 4096)], exact=True, over_report_bytes=0
        )
        wire = await harness.open(structured=True, queries=("base:allocation", "qemu:dirty-bitmap:rp-0"))
        await wire.stream.send_all(client.request(client.BLOCK_STATUS, 0, MiB, cookie=3))
        cookie, flags, kind, payload = await wire.chunk()
        assert (cookie, flags, kind) == (3, 0, 5)
        assert struct.unpack(">7I", payload) == (1, 65536, 3, 65536, 0, MiB - 131072, 3)
        cookie, flags, kind, payload = await wire.chunk()
        assert (cookie, flags, kind) == (3, 1, 5)
        assert struct.unpack(">9I", payload) == (2, 100, 1, 69_900, 0, 4096, 1, MiB - 74_096, 0)
        await wire.stream.send_all(client.request(client.BLOCK_STATUS, 10, MiB - 10, flags=client.REQ_ONE))
        assert struct.unpack(">3I", (await wire.chunk())[3]) == (1, 65526, 3)
        assert struct.unpack(">3I", (await wire.chunk())[3]) == (2, 90, 1)


async def test_a_slow_request_does_not_hold_up_the_others() -> None:
    device = FaultyDevice(MemoryDevice(8 * MiB))
    device.close_gate()
    async with serving(device) as harness:
        wire = await harness.open()
        await wire.stream.send_all(client.request(client.FLUSH, cookie=1))
        await wire.stream.send_all(client.request(client.CACHE, 0, 1, cookie=2))
        assert await wire.simple() == (2, 0, b"")
        device.open_gate()
        assert await wire.simple() == (1, 0, b"")


async def test_requests_in_flight_are_bounded() -> None:
    device = FaultyDevice(MemoryDevice(8 * MiB))
    device.close_gate()
    count = 3 * nbd_connection.IN_FLIGHT_MAX
    async with serving(device) as harness:
        wire = await harness.open()
        await wire.stream.send_all(b"".join(client.request(client.FLUSH, cookie=i) for i in range(count)))
        while device.waiting < nbd_connection.IN_FLIGHT_MAX:
            await trio.testing.wait_all_tasks_blocked()
        await still_serves(harness)
        assert device.waiting == nbd_connection.IN_FLIGHT_MAX
        device.open_gate()
        cookies = {(await wire.simple())[0] for _ in range(count)}
        assert cookies == set(range(count))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ESHUTDOWN, errno.EBADF])
async def test_errors_of_the_device_reach_the_client(code: int) -> None:
    device = FaultyDevice(MemoryDevice(8 * MiB), fail=lambda *_: code)
    expected = 5 if code == errno.EBADF else code
    async with serving(device) as harness:
        wire = await harness.open(structured=True)
        for message in (
            client.request(client.READ, 0, 10),
            client.request(client.WRITE, 0, data=b"x"),
            client.request(client.WRITE, 0, data=b"x", flags=client.FUA),
            client.request(client.FLUSH),
            client.request(client.TRIM, 0, 10),
        ):
            await wire.stream.send_all(message)
            _, flags, kind, payload = await wire.chunk()
            assert (flags, kind) == (1, 1 << 15 | 1)
            assert struct.unpack_from(">I", payload)[0] == expected


class Broken(MemoryDevice):
    async def flush(self) -> None:
        raise ZeroDivisionError

    async def allocation(self, offset: int, length: int) -> list[Allocation]:
        raise KeyError(offset)


async def test_a_defect_of_the_device_is_one_requests_error() -> None:
    async with serving(Broken(MiB)) as harness:
        wire = await harness.open()
        await wire.stream.send_all(
            client.request(client.FLUSH, cookie=1) + client.request(client.CACHE, cookie=2)
        )
        answers = {(await wire.simple())[:2] for _ in range(2)}
        assert answers == {(1, errno.EIO), (2, 0)}


async def test_drop_finishes_what_runs_and_says_so() -> None:
    device = FaultyDevice(MemoryDevice(8 * MiB))
    device.close_gate()
    async with serving(device) as harness:
        wire = await harness.open()
        await wire.stream.send_all(client.request(client.WRITE, 0, data=b"x", cookie=1))
        while not device.waiting:
            await trio.testing.wait_all_tasks_blocked()
        device.fail = lambda *_: errno.ESHUTDOWN
        harness.catalog.drops[0]("fenced")
        device.open_gate()
        assert await wire.simple() == (1, errno.ESHUTDOWN, b"")
        await wire.ends()


async def test_drop_does_not_wait_for_a_peer_that_does_not_read() -> None:
    async with serving(MemoryDevice(64 * MiB)) as harness:
        wire = await harness.open()
        await wire.stream.send_all(client.request(client.READ, 0, 64 * MiB) * 4)
        await trio.testing.wait_all_tasks_blocked()
        harness.catalog.drops[0]("fenced")
        await harness.connections(0)


async def test_refusals_are_told_apart() -> None:
    async with serving() as harness:
        harness.catalog.refused["disk"] = "image disk is leased: connect to disk@3"
        wire = await harness.connect()
        await wire.greet()
        reply = await wire.haggle(client.go("nothing"))
        assert reply.kind == client.ERR_UNKNOWN
        reply = await wire.haggle(client.go("disk"))
        assert reply.kind == client.ERR_POLICY
        assert reply.data == b"image disk is leased: connect to disk@3"
        assert (await wire.haggle(client.option(client.LIST))).kind == client.ACK
        assert (await wire.haggle(client.go("other"))).kind == client.ACK


NONSENSE = [
    b"\x00" * 4 + b"GET / HTTP/1.1\r\n\r\n",
    b"\xff" * 500,
    client.FIXED_NO_ZEROES + struct.pack(">QII", client.IHAVEOPT, 7, 0xFFFFFFFF),
    client.FIXED_NO_ZEROES + client.option(client.EXPORT_NAME, b"nothing"),
    client.FIXED_NO_ZEROES + client.option(client.STRUCTURED) * 1100,
    client.FIXED_NO_ZEROES + client.go("disk") + b"\x25\x60\x95\x14" * 20,
]


@pytest.mark.parametrize("data", NONSENSE)
async def test_a_peer_that_talks_nonsense_loses_only_its_own_connection(data: bytes) -> None:
    async with serving() as harness:
        good = await harness.open("other")
        bad = await harness.connect()
        with contextlib.suppress(trio.BrokenResourceError):
            await bad.stream.send_all(data)
        await bad.ends()
        await good.stream.send_all(client.request(client.READ, 0, 1))
        assert await good.simple(length=1) == (1, 0, b"\0")


@pytest.mark.parametrize("data", [b"", b"\x00", client.FIXED_NO_ZEROES + b"IHAVE", client.FIXED_NO_ZEROES])
async def test_a_peer_that_vanishes_in_the_middle(data: bytes) -> None:
    async with serving() as harness:
        wire = await harness.connect()
        await wire.stream.send_all(data)
        await wire.stream.aclose()
        await harness.connections(0)
        await still_serves(harness)


async def test_a_half_closed_peer_still_gets_its_replies() -> None:
    device = FaultyDevice(MemoryDevice(MiB))
    device.close_gate()
    async with serving(device) as harness:
        wire = await harness.open()
        assert isinstance(wire.stream, trio.SocketStream)
        await wire.stream.send_all(client.request(client.WRITE, 0, data=b"x", cookie=4))
        await wire.stream.send_eof()
        while not device.waiting:
            await trio.testing.wait_all_tasks_blocked()
        device.open_gate()
        assert await wire.simple() == (4, 0, b"")
        await wire.ends()


async def test_a_reset_in_the_middle_of_a_large_write() -> None:
    async with serving(MemoryDevice(64 * MiB)) as harness:
        wire = await harness.open()
        assert isinstance(wire.stream, trio.SocketStream)
        await wire.stream.send_all(client.request(client.WRITE, 0, 64 * MiB) + bytes(3 * MiB))
        linger = struct.pack("ii", 1, 0)
        wire.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await wire.stream.aclose()
        await harness.connections(0)
        await still_serves(harness)


async def test_too_many_connections_are_turned_away() -> None:
    async with serving(connections_max=3) as harness:
        wires = [await harness.open() for _ in range(3)]
        turned_away = await harness.connect()
        await turned_away.ends()
        await wires[0].stream.aclose()
        await harness.connections(2)
        await still_serves(harness)


async def test_a_port_in_use_is_one_clear_line() -> None:
    async with serving() as harness:
        with pytest.raises(OperatorError, match=r"cannot listen on 127\.0\.0\.1:"):
            await harness.server.serve_tcp(harness.address)


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "nbd.sock")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    server = NbdServer(FakeCatalog({"disk": MemoryDevice(MiB)}))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_unix, path)
            async with await trio.open_unix_socket(path) as stream:
                wire = Wire(stream)
                await wire.go("disk")
                await stream.send_all(client.request(client.READ, 0, 3))
                assert await wire.simple(length=3) == (1, 0, bytes(3))
                with pytest.raises(OperatorError, match="another process listens"):
                    await server.serve_unix(path)
            nursery.cancel_scope.cancel()
    assert not (tmp_path / "nbd.sock").exists()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OperatorError, match="is no socket"):
        await server.serve_unix(str(tmp_path / "file"))


class Turns:
    """Counts the passes of the scheduler, so that a test sees whether others get their turn."""

    def __init__(self) -> None:
        self.count = 0

    async def run(self) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            self.count += 1


class TurnCatalog(FakeCatalog):
    """Notes at which turn each question was asked."""

    def __init__(self, devices: dict[str, Device], *, multi_conn: bool = True) -> None:
        super().__init__(devices, multi_conn=multi_conn)
        self.turns = Turns()
        self.asked: list[int] = []

    async def info(self, name: str) -> Export:
        self.asked.append(self.turns.count)
        return await super().info(name)


async def test_a_flood_of_options_lets_others_have_their_turn() -> None:
    async with serving(kind=TurnCatalog) as harness, trio.open_nursery() as nursery:
        catalog = harness.catalog
        assert isinstance(catalog, TurnCatalog)
        nursery.start_soon(catalog.turns.run)
        wire = await harness.connect()
        await wire.greet()
        await wire.stream.send_all(client.option(client.STRUCTURED))
        await wire.stream.send_all(client.meta("disk", *["x"] * 200, number=client.LIST_META) * 100)
        for _ in range(101):
            await wire.haggle(b"")
        assert len(catalog.asked) == 100
        # Of two tasks that take turns, one may go twice between two goes of the other, and no more.
        assert len(set(catalog.asked)) >= 50, "several options in one turn"
        nursery.cancel_scope.cancel()


async def test_who_never_chooses_an_export_makes_way_for_who_does() -> None:
    async with serving(connections_max=3) as harness:
        served = await harness.open()
        silent = [await harness.connect() for _ in range(4)]
        for wire in silent:
            with contextlib.suppress(EOFError):
                await wire.greet()
        await still_serves(harness)
        await served.stream.send_all(client.request(client.READ, 0, 512, cookie=6))
        assert await served.simple(length=512) == (6, 0, bytes(512))
        await silent[0].ends()


class Uncached(MemoryDevice):
    """Nothing can be read without a wait."""

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        return None

    async def read(self, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        data = super().read_nowait(offset, length)
        assert data is not None
        return data


async def test_a_request_that_waits_for_room_gets_it_also_behind_a_slow_reader() -> None:
    """Two replies fill the room; both are with the kernel or on their way as the third request arrives."""
    size = 64 * MiB
    device = Uncached(size)
    device.write_nowait(0, b"x" * size)
    async with serving(device) as harness:
        wire = await harness.open()
        for cookie in (1, 2):
            await wire.stream.send_all(client.request(client.READ, 0, size, cookie=cookie))
        await trio.testing.wait_all_tasks_blocked()
        assert (await wire.simple(length=size))[1] == 0
        await wire.exactly(16 + MiB)  # now the second one is being sent, by the task of the first
        await trio.testing.wait_all_tasks_blocked()
        await wire.stream.send_all(client.request(client.READ, 0, size, cookie=3))
        await trio.testing.wait_all_tasks_blocked()
        await wire.exactly(size - MiB)
        assert (await wire.simple(length=size))[:2] == (3, 0)


class Counting(MemoryDevice):
    """Counts the runs that it was made to find."""

    runs = 0

    async def allocation(self, offset: int, length: int) -> list[Allocation]:
        found = await super().allocation(offset, length)
        self.runs += len(found)
        return found


async def test_one_extent_at_a_time_costs_no_more_than_there_are() -> None:
    """As qemu asks (REQ_ONE): each answer looks no farther than it must, on a fragmented disk."""
    device = Counting(128 * MiB)
    for index in range(500):
        device.write_nowait(index * 131072, b"x" * 65536)
    async with serving(device) as harness:
        wire = await harness.open(structured=True, queries=("base:allocation",))
        position, states = 0, []
        while position < 128 * MiB:
            rest = 128 * MiB - position
            await wire.stream.send_all(
                client.request(client.BLOCK_STATUS, position, rest, flags=client.REQ_ONE)
            )
            _, length, state = struct.unpack(">3I", (await wire.chunk())[3])
            states.append((length, state))
            position += length
        assert states == [(65536, 0), (65536, 3)] * 499 + [(65536, 0), (128 * MiB - 999 * 65536, 3)]
        assert device.runs < 10 * len(states)
