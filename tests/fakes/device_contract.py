"""What every ports.Device promises. Each kind of device runs these: memory, faulty (quiet), tracked images.

``CASES`` are async functions of one writable, empty device of at least 4 MiB; each may dirty it as it likes.
"""

import random
from collections.abc import Awaitable, Callable

from diskd.core.ports import Device

MiB = 1 << 20


async def read_all(device: Device, offset: int, length: int) -> bytes:
    """The non-blocking form where it answers, else the other one, as the NBD server does."""
    data = device.read_nowait(offset, length)
    return await device.read(offset, length) if data is None else data


async def write_all(device: Device, offset: int, data: bytes) -> None:
    if not device.write_nowait(offset, data):
        await device.write(offset, data)


async def is_zero_at_first(device: Device) -> None:
    assert device.size_bytes >= 4 * MiB
    assert not device.is_read_only
    assert await read_all(device, 0, 1 * MiB) == bytes(1 * MiB)


async def reads_back_what_was_written(device: Device) -> None:
    generator = random.Random(1)
    model = bytearray(device.size_bytes)
    for _ in range(100):
        length = generator.choice((1, 511, 512, 4096, 5000, 70_000))
        offset = generator.randrange(device.size_bytes - length)
        data = generator.randbytes(length)
        if generator.random() < 0.5:
            await device.write(offset, data, fua=generator.random() < 0.1)
        else:
            await write_all(device, offset, data)
        model[offset : offset + length] = data
        probe = max(0, offset - 100)
        assert await read_all(device, probe, length) == model[probe : probe + length]
    assert await device.read(0, device.size_bytes) == model


async def writes_a_memoryview(device: Device) -> None:
    await write_all(device, 10, bytes(memoryview(b"abcdef")))
    await device.write(13, memoryview(b"xyz"))
    assert await device.read(10, 6) == b"abcxyz"


async def zeroes_and_trims_read_as_zeroes(device: Device) -> None:
    await device.write(0, b"\xaa" * (2 * MiB))
    await device.write_zeroes(1000, 5000)
    await device.write_zeroes(100_000, 200_000, may_trim=False, fua=True)
    await device.trim(512 * 1024, 256 * 1024)
    data = await device.read(0, 2 * MiB)
    assert data[1000:6000] == bytes(5000)
    assert data[100_000:300_000] == bytes(200_000)
    assert data[:1000] == b"\xaa" * 1000
    assert data[6000:7000] == b"\xaa" * 1000
    assert data[300_000:300_100] == b"\xaa" * 100
    assert data[512 * 1024 : 768 * 1024] == bytes(256 * 1024)
    assert data[768 * 1024 :] == b"\xaa" * (1280 * 1024)


async def reaches_its_last_byte(device: Device) -> None:
    await device.write(device.size_bytes - 3, b"end")
    assert await device.read(device.size_bytes - 3, 3) == b"end"
    await device.flush()


async def allocation_covers_exactly_the_range(device: Device) -> None:
    await device.write(1 * MiB, b"\x11" * (1 * MiB))
    await device.flush()
    for offset, length in ((0, 4 * MiB), (1 * MiB - 4096, 8192), (1 * MiB + 1, 4095), (12_345, 1)):
        position = offset
        runs = await device.allocation(offset, length)
        for run in runs:
            assert run.offset == position
            assert run.length > 0
            if run.kind != "data":
                assert not any(await device.read(run.offset, run.length))
            position += run.length
        # A call may stop early where there are thousands of runs, but never answers nothing.
        assert offset < position <= offset + length
    inside = await device.allocation(1 * MiB + 4096, 4096)
    assert [run.kind for run in inside] == ["data"]


CASES: list[Callable[[Device], Awaitable[None]]] = [
    is_zero_at_first,
    reads_back_what_was_written,
    writes_a_memoryview,
    zeroes_and_trims_read_as_zeroes,
    reaches_its_last_byte,
    allocation_covers_exactly_the_range,
]
