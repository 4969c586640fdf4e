"""An image is handed over while something of it is under way: it is this daemon's or the next one's, never
nobody's, and what the next one has is not written to any more."""

import os
import time
from pathlib import Path

import pytest
import trio
from diskd_libraries import Hosts, hosts
from diskd_library import disks, opened, put, until

from daemonkit.units import MiB
from diskd.shell.library import Library

SIZE = 8 * MiB


@pytest.fixture
def storage(tmp_path: Path):
    with hosts(tmp_path) as made:
        yield made


class Gate:
    """A file system whose syncs wait until it is opened."""

    def __init__(self) -> None:
        self.is_open = False
        self.waiting = 0

    def sync(self, descriptor: int) -> None:
        self.waiting += 1
        deadline = time.monotonic() + 20
        while not self.is_open and time.monotonic() < deadline:
            time.sleep(0.002)
        os.fdatasync(descriptor)


async def leased(library: Library) -> None:
    await library.create_image("web", SIZE)
    await library.acquire_lease("web", 1, "n1/web")


async def with_avhd(library: Library):
    """A checkpoint that stands, and a whole AVHD to be merged after it."""
    frozen = await library.begin_checkpoint("web", disks("web"), "")
    export = await opened(library, "web@1")
    for offset in range(0, SIZE, MiB // 2):
        await put(export.device, offset, b"y" * (MiB // 2))
    return frozen


async def test_a_handover_goes_on_when_nobody_waits_for_it(storage: Hosts):
    async with storage.serving("n1") as one, storage.serving("n2", "host2") as two:
        await leased(one)
        frozen = await with_avhd(one)
        gate = Gate()
        image = one.opened("web")
        image.image.files._sync = gate.sync
        await frozen.end("discard")
        await until(lambda: gate.waiting > 0)
        with trio.move_on_after(0.05) as scope:
            await one.hand_over("web", 2, "n2/web")
        assert scope.cancelled_caught
        gate.is_open = True
        await until(lambda: not one._lives._in_work and one.image("web").state == "released")
        await two.open_image("web")
        await two.acquire_lease("web", 3, "n2/web")
        assert (await opened(two, "web@3")).device.size_bytes == SIZE
