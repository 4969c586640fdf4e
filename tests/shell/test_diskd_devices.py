"""Devices that need no files keep the contract of ports.Device."""

import errno
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from device_contract import CASES, MiB

from diskd.core.ports import Device
from diskd.shell.faulty_device import FaultyDevice
from diskd.shell.memory_device import MemoryDevice

MAKERS = [
    lambda: MemoryDevice(5 * MiB + 1234),
    lambda: FaultyDevice(MemoryDevice(5 * MiB + 1234)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("make", MAKERS, ids=["memory", "faulty"])
async def test_contract(case: Callable[[Device], Awaitable[None]], make: Callable[[], Device]) -> None:
    await case(make())


async def test_a_read_only_device_refuses_changes() -> None:
    device = MemoryDevice(4096, is_read_only=True)
    with pytest.raises(OSError, match="read-only") as caught:
        device.write_nowait(0, b"x")
    assert caught.value.errno == errno.EPERM
    with pytest.raises(OSError, match="read-only"):
        await device.trim(0, 1)


async def test_faults_come_where_they_are_planned() -> None:
    device = FaultyDevice(
        MemoryDevice(1 * MiB),
        fail=lambda what, offset, _: errno.EIO if (what, offset) == ("write", 4096) else None,
    )
    assert device.write_nowait(0, b"x")
    with pytest.raises(OSError, match="Input/output"):
        device.write_nowait(4096, b"x")
    device.close_gate()
    assert not device.write_nowait(0, b"y")
    assert device.read_nowait(0, 1) is None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(device.write, 0, b"y")
        await trio.testing.wait_all_tasks_blocked()
        assert device.waiting == 1
        device.open_gate()
    assert device.read_nowait(0, 1) == b"y"
