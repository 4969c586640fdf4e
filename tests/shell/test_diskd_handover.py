"""An image is handed over while something of it is under way: it is this daemon's or the next one's, never
nobody's, and what the next one has is not written to any more."""

import os
import time
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from diskd_libraries import Hosts, hosts
from diskd_library import disks, get, opened, put, until

from daemonkit.units import MiB
from diskd.core.steps import Script
from diskd.errors import Refused
from diskd.shell.files import Files
from diskd.shell.library import Library

T = TypeVar("T")
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


class LateFiles(Files):
    """What is run on them is done, and answers only when it is let go."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.done = trio.Event()
        self.go = trio.Event()

    async def run(self, script: Script[T]) -> T:
        result = await super().run(script)
        self.done.set()
        await self.go.wait()
        return result


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


async def test_a_checkpoint_that_ends_while_its_image_is_handed_over_merges_nothing_here(storage: Hosts):
    async with storage.serving("n1") as one, storage.serving("n2", "host2") as two:
        await leased(one)
        frozen = await with_avhd(one)
        (held,) = one._checkpoints.held.values()
        held.files.close()
        held.files = late = LateFiles(held.files.directory)
        image = one.opened("web")
        async with trio.open_nursery() as nursery:

            async def end() -> None:
                with pytest.raises(Refused, match="handed over"):
                    await frozen.end("discard")

            nursery.start_soon(end)
            await late.done.wait()
            nursery.start_soon(one.hand_over, "web", 2, "n2/web")
            await until(lambda: held.lost is not None)
            late.go.set()
        assert not held.merging
        assert image.overlay.merge is None
        await two.open_image("web")  # the end was durable: it is carried out here
        await until(lambda: two.checkpoints() == [])
        await two.acquire_lease("web", 3, "n2/web")
        device = (await opened(two, "web@3")).device
        assert await get(device, SIZE - 4096, 4096) == b"y" * 4096


async def test_a_merge_that_was_decided_on_before_a_handover_does_not_begin_after_it(storage: Hosts):
    async with storage.serving("n1") as one:
        await leased(one)
        await with_avhd(one)
        image = one.opened("web")
        await image.stop_merging("given away")
        assert not await one._checkpoints.merge_image(image, image.overlay)
        assert image.overlay.map.data_blocks == SIZE // 4096
        assert image.stuck is None
