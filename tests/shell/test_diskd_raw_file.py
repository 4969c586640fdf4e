"""A raw file served as it is: a device like any other, under QEMU's locks, zeroed fast where that is so."""

import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from device_contract import CASES, MiB

from diskd.core.ports import Device
from diskd.errors import NoSuchExport, Refused
from diskd.shell.raw_file import OpenFile, RawFile, RawFileCatalog
from diskd.shell.raw_layer import RawLayer


def empty(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 5 * MiB + 1234)
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
async def test_contract(case: Callable[[Device], Awaitable[None]], tmp_path: Path) -> None:
    file = OpenFile(empty(tmp_path))
    try:
        await case(RawFile(file))
    finally:
        file.close()


async def test_reading_into_memory_of_the_caller(tmp_path: Path) -> None:
    file = OpenFile(empty(tmp_path))
    try:
        device = RawFile(file)
        assert device.write_nowait(1000, b"x" * MiB)
        buffer = bytearray(b"?" * MiB)
        assert device.read_into_nowait(1000, buffer)
        assert buffer == b"x" * MiB
        assert not device.read_into_nowait(0, bytearray(2 * MiB)), "too long to be read in place"
        assert not device.read_into_nowait(5 * MiB, bytearray(MiB)), "beyond the end"
    finally:
        file.close()


async def test_one_server_at_a_time_and_one_name(tmp_path: Path) -> None:
    path = empty(tmp_path)
    file = OpenFile(path)
    try:
        with pytest.raises(Refused, match="in use"):
            OpenFile(path)
        catalog = RawFileCatalog(RawFile(file))
        assert list(catalog.names()) == [""]
        export = await catalog.info("")
        assert export.device.size_bytes == 5 * MiB + 1234
        assert export.multi_conn
        with pytest.raises(NoSuchExport):
            await catalog.open("x", peer="test", drop=lambda _: None)
    finally:
        file.close()
    with pytest.raises(Refused, match="No such file"):
        OpenFile(tmp_path / "nothing")
    assert os.listdir(tmp_path) == ["disk.img"], "the probe left something behind"


class GatedSync:
    """An open file whose syncs wait at a gate."""

    def __init__(self, file: OpenFile) -> None:
        self.descriptor = file.descriptor
        self.gate = threading.Event()
        self.begun = 0

    def sync(self, name: str) -> None:
        self.begun += 1
        assert self.gate.wait(20)


async def test_a_flush_joins_no_sync_that_began_without_its_write(tmp_path: Path) -> None:
    file = OpenFile(empty(tmp_path))
    try:
        gated = GatedSync(file)
        layer = RawLayer(gated, file.size_bytes, lambda: None)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(layer.flush)
                while not gated.begun:
                    await trio.lowlevel.checkpoint()
                assert layer.write_nowait(0, b"late")
                for _ in range(3):
                    nursery.start_soon(layer.flush)
                await trio.testing.wait_all_tasks_blocked()
                gated.gate.set()
        assert gated.begun == 2, "one more, and it serves all three"
    finally:
        file.close()


async def test_a_change_of_the_file_is_noted_when_it_is_submitted_and_when_it_has_ended(
    tmp_path: Path,
) -> None:
    """A punch may take minutes. After a crash, its end must not look like a change from outside (T4)."""
    path = empty(tmp_path)
    file = OpenFile(path)
    seen: list[bytes] = []
    try:
        layer = RawLayer(file, file.size_bytes, lambda: seen.append(path.read_bytes()[4096:4097]))
        assert layer.write_nowait(4096, b"x" * 4096)
        assert seen == [b"\0"]
        for may_trim in (True, False):
            seen.clear()
            await layer.write_zeroes(4096, 4096, may_trim=may_trim)
            assert seen == [b"x", b"\0"]
            await layer.write(4096, b"x" * 4096)
    finally:
        file.close()
