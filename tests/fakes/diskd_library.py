"""The image library on real files in tests, and a device of it read and written whichever way it takes."""

from contextlib import asynccontextmanager
from pathlib import Path

import trio

from daemonkit.diskd_api import BackupDisk
from daemonkit.units import KiB, MiB
from diskd.core.inventory import LibrarySettings
from diskd.shell.library import Library, open_library

BLOCK = 4096
SIZE = 8 * MiB


def settings(tmp_path: Path, **changes) -> LibrarySettings:
    shared = tmp_path / "shared"
    shared.mkdir(exist_ok=True)
    return LibrarySettings(shared_dir=str(shared), merge_batch_bytes=64 * KiB, **changes)


@asynccontextmanager
async def serving(tmp_path: Path, **changes):
    async with open_library(tmp_path / "root", settings(tmp_path, **changes)) as library:
        yield library


async def opened(library: Library, name: str, dropped: list[str] | None = None):
    return await library.open(name, peer="test", drop=(dropped if dropped is not None else []).append)


async def put(device, offset: int, data: bytes) -> None:
    if not device.write_nowait(offset, data):
        await device.write(offset, data)


async def get(device, offset: int, length: int) -> bytes:
    data = device.read_nowait(offset, length)
    return data if data is not None else await device.read(offset, length)


async def until(condition, seconds: float = 20) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for lies outside: no event tells it
            await trio.sleep(0.005)


def frozen_bytes(disk) -> bytes:
    buffer = bytearray(disk.size_bytes)
    disk.read_into_blocking(0, memoryview(buffer))
    return bytes(buffer)


def disks(*images: str) -> list[BackupDisk]:
    return [BackupDisk(f"disk-{name}", name) for name in images]
