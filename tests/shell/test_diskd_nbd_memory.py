"""The memory that all connections share: bounded, first come first served, and nobody keeps it for ever."""

import struct

import nbd_client as client
import pytest
import trio
import trio.testing
from nbd_harness import MiB, serving, still_serves

from diskd.shell import nbd_memory
from diskd.shell.faulty_device import FaultyDevice
from diskd.shell.memory_device import MemoryDevice
from diskd.shell.nbd_memory import PATIENCE_SECONDS, Pool


def nobody(reason: str) -> None:
    raise AssertionError(reason)


async def test_first_come_first_served(autojump_clock: trio.testing.MockClock) -> None:
    pool, order = Pool(10), []

    async def take(count: int) -> None:
        share = await pool.take(count, nobody)
        order.append(count)
        pool.give(share)

    first = await pool.take(8, nobody)
    async with trio.open_nursery() as nursery:
        for count in (9, 2, 1):
            nursery.start_soon(take, count)
            await trio.testing.wait_all_tasks_blocked()
        assert order == []
        await trio.sleep(10 * PATIENCE_SECONDS)
        assert order == [], "the small ones wait behind the large one"
        pool.give(first)
    assert order == [9, 2, 1]
    assert pool.used_bytes == 0


async def test_the_longest_waited_for_is_sent_home_and_only_if_somebody_needs_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pool = Pool(10)
    gone: list[tuple[str, float]] = []
    shares = {}

    def dropped(name: str) -> None:
        gone.append((name, trio.current_time()))
        pool.give(shares[name])

    for name in ("device", "first", "second"):
        shares[name] = await pool.take(3, lambda _, name=name: dropped(name))
    shares["second"].peer_since = trio.current_time()
    shares["first"].peer_since = trio.current_time() - 1
    await trio.sleep(5 * PATIENCE_SECONDS)
    assert gone == [], "nobody waits"
    shares["second"].peer_since = trio.current_time()
    shares["first"].peer_since = trio.current_time() - 1
    begun = trio.current_time()
    pool.give(await pool.take(4, nobody))
    assert gone == [("first", begun + PATIENCE_SECONDS - 1)], "the other one is not in the way any more"


@pytest.mark.parametrize("structured", [False, True])
async def test_half_a_write_that_does_not_go_on_makes_way(structured: bool) -> None:
    """Of three connections that promise 64 MiB each, two have the pool, and the first says no more."""
    pool = Pool(128 * MiB, patience_s=0.5)
    async with serving(MemoryDevice(64 * MiB), pool=pool) as harness:
        wires = [await harness.open(structured=structured) for _ in range(3)]
        for wire in wires:
            await wire.stream.send_all(struct.pack(">IHHQQI", 0x25609513, 0, client.WRITE, 7, 0, 64 * MiB))
            await wire.stream.send_all(b"x" * MiB)
            await trio.testing.wait_all_tasks_blocked()
        assert pool.used_bytes == 128 * MiB
        await still_serves(harness)
        await wires[0].ends()
        await wires[2].stream.send_all(b"x" * (63 * MiB))
        assert await wires[2].simple() == (7, 0, b"")


async def test_replies_that_nobody_reads_take_no_more_than_the_pool() -> None:
    device = FaultyDevice(MemoryDevice(64 * MiB))
    device.write_nowait(0, b"x" * (64 * MiB))
    device.close_gate()
    pool = Pool(128 * MiB)
    async with serving(device, pool=pool) as harness:
        wires = [await harness.open() for _ in range(3)]
        for wire in wires:
            await wire.stream.send_all(client.request(client.READ, 0, 64 * MiB))
        while device.waiting < 2:
            await trio.testing.wait_all_tasks_blocked()
        assert pool.used_bytes == 128 * MiB
        device.open_gate()
        async with trio.open_nursery() as nursery:
            for wire in wires:
                nursery.start_soon(wire.exactly, 16 + 64 * MiB)
        await harness.connections(3)
        assert pool.used_bytes == 0


async def test_a_write_that_waits_for_room_is_refused_when_its_connection_is_dropped() -> None:
    pool = Pool(64 * MiB)
    async with serving(MemoryDevice(64 * MiB), pool=pool) as harness:
        keeper, waiter = await harness.open(), await harness.open()
        for wire in (keeper, waiter):
            await wire.stream.send_all(struct.pack(">IHHQQI", 0x25609513, 0, client.WRITE, 7, 0, 64 * MiB))
            await trio.testing.wait_all_tasks_blocked()
        harness.catalog.drops[1]("fenced")
        assert await waiter.simple() == (7, 108, b"")
        await waiter.ends()
        assert pool.used_bytes == 64 * MiB


async def test_small_requests_need_no_pool() -> None:
    pool = Pool(64 * MiB)
    async with serving(MemoryDevice(8 * MiB), pool=pool) as harness:
        keeper, other = await harness.open(), await harness.open()
        await keeper.stream.send_all(struct.pack(">IHHQQI", 0x25609513, 0, client.WRITE, 7, 0, 8 * MiB))
        taken = await pool.take(56 * MiB, nobody)
        await trio.testing.wait_all_tasks_blocked()
        for cookie in range(5):
            await other.stream.send_all(client.request(client.WRITE, 0, data=b"y" * MiB, cookie=cookie))
            assert await other.simple() == (cookie, 0, b"")
        assert MiB <= nbd_memory.OWN_BYTES
        pool.give(taken)


async def test_many_small_requests_go_on_while_others_wait_for_the_pool() -> None:
    device = FaultyDevice(MemoryDevice(8 * MiB))
    device.close_gate()
    pool = Pool(64 * MiB)
    async with serving(device, pool=pool) as harness:
        taken = await pool.take(64 * MiB, nobody)
        queued, other = await harness.open(), await harness.open()
        await queued.stream.send_all(struct.pack(">IHHQQI", 0x25609513, 0, client.WRITE, 7, 0, 8 * MiB))
        await trio.testing.wait_all_tasks_blocked()
        for cookie in range(40):
            await other.stream.send_all(client.request(client.READ, 0, MiB // 8, cookie=cookie))
        while device.waiting < 16:
            await trio.testing.wait_all_tasks_blocked()
        device.open_gate()
        assert {(await other.simple(length=MiB // 8))[0] for _ in range(40)} == set(range(40))
        pool.give(taken)
