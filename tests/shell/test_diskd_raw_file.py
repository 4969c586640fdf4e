"""A raw file served as it is: a device like any other, under QEMU's locks, zeroed fast where that is so."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from device_contract import CASES, MiB

from diskd.core.ports import Device
from diskd.errors import NoSuchExport, Refused
from diskd.shell.raw_file import OpenFile, RawFile, RawFileCatalog


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
