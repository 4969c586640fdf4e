"""A tracked image keeps the contract of ports.Device, like every other device."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import UUID

import pytest
import trio
from device_contract import CASES, MiB

from diskd.core.ports import Device
from diskd.shell.image import Image, ImageSettings


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
async def test_contract(case: Callable[[Device], Awaitable[None]], tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    await Image.create(directory, uuid=UUID(int=7), size_bytes=5 * MiB + 4096)
    image = await Image.open(directory, ImageSettings(shared_dir=tmp_path))
    async with trio.open_nursery() as nursery:
        await nursery.start(image.run)
        writer = image.open_writer(lambda: None)
        await case(writer)
        await image.drain(writer)
        await image.close()
        nursery.cancel_scope.cancel()
