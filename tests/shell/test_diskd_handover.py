"""An image is handed over while something of it is under way: it is this daemon's or the next one's, never
nobody's, and what the next one has is not written to any more."""

import errno
import os
import time
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from diskd_libraries import Hosts, hosts
from diskd_library import disks, get, opened, put, until

from daemonkit.units import MiB
from diskd.core import lease
from diskd.core.ownership import Lost
from diskd.core.steps import Create, Read, Remove, Replace, Script, Size, Step, Sync, Write
from diskd.errors import Damaged, Refused
from diskd.shell.files import Files
from diskd.shell.held import Held
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


class CancelsWhenRead(dict[str, Held]):
    """The checkpoints of a library; the last look at them within an opening cancels it."""

    def __init__(self, scope: trio.CancelScope) -> None:
        super().__init__()
        self._scope = scope

    def values(self):
        self._scope.cancel()
        return super().values()


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


async def point_of(library: Library) -> str:
    frozen = await library.begin_checkpoint("web", disks("web"), "")
    await frozen.end("keep")
    await until(lambda: library.checkpoints() == [])
    return frozen.point


async def test_a_handover_goes_on_when_nobody_waits_for_it(storage: Hosts):
    async with storage.serving("n1") as one, storage.serving("n2", "host2") as two:
        await leased(one)
        frozen = await with_avhd(one)
        gate = Gate()
        image = one.opened("web")
        image.files._sync = gate.sync
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


async def test_a_checkpoint_that_waits_for_a_merge_is_refused_when_its_image_is_lost(storage: Hosts):
    async with storage.serving("n1") as one:
        await leased(one)
        frozen = await with_avhd(one)
        gate = Gate()
        image = one.opened("web")
        image.files._sync = gate.sync
        await frozen.end("discard")
        await until(lambda: gate.waiting > 0)
        async with trio.open_nursery() as nursery:

            async def begin() -> None:
                with pytest.raises(Refused, match="image web is not served here any more"):
                    await one.begin_checkpoint("web", disks("web"), "")

            nursery.start_soon(begin)
            await until(lambda: one._checkpoints.is_beginning("web"))
            nursery.start_soon(one._lives.lose, "web", image, "a test")
            await until(lambda: one.opened("web") is None)
            gate.is_open = True
            with trio.fail_after(20):
                while one._checkpoints.is_beginning("web"):  # noqa: ASYNC110 - no event tells it from outside
                    await trio.sleep(0.005)


async def test_a_point_whose_deletion_came_too_late_for_the_handover_is_not_deleted(storage: Hosts):
    async with storage.serving("n1") as one, storage.serving("n2", "host2") as two:
        await leased(one)
        points = [await point_of(one) for _ in range(3)]
        image = one.opened("web").image
        async with trio.open_nursery() as nursery:

            async def delete() -> None:
                with pytest.raises(OSError, match="closed"):
                    await image.delete_point(points[1])

            async with image.catalogue_turn:
                nursery.start_soon(one.hand_over, "web", 2, "n2/web")
                await until(lambda: image.catalogue_turn.statistics().tasks_waiting == 1)
                assert one.opened("web") is None and not image.files._is_closed
                nursery.start_soon(delete)
                await until(lambda: image.catalogue_turn.statistics().tasks_waiting == 2)
        await two.open_image("web")
        assert [info.point for info in two.points("web")] == points


async def test_nothing_is_recorded_of_an_image_after_the_last_word(storage: Hosts):
    async with storage.serving("n1") as one:
        await leased(one)
        point = await point_of(one)
        found = one.opened("web")
        directory = found.image.directory
        await one.hand_over("web", 2, "n2/web")
        before = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        with pytest.raises(Lost, match="given it up"):
            await found.change_lease(lease.acquire, 9, "n1/web")
        with pytest.raises(Lost, match="given it up"):
            await found.ownership.check()
        with pytest.raises(OSError, match="closed"):
            await found.image.validate_point(point)
        with pytest.raises(OSError, match="closed"):
            await found.image.delete_point(point)
        assert {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()} == before
        assert not found.files._descriptors and not found.image.files._descriptors


async def test_an_image_that_is_served_is_flushed_though_nobody_waits_for_its_opening(storage: Hosts):
    async with storage.serving("n1") as one:
        await leased(one)
    async with storage.serving("n2", "host2") as two:
        recovery = two._lives._recovery
        with trio.CancelScope() as scope:
            recovery._checkpoints.held = CancelsWhenRead(scope)
            await two.open_image("web")
        assert scope.cancel_called
        assert two.opened("web") is not None
        tasks = [task.name for task in two._lives._nursery.child_tasks]
        assert any("Image.run" in name for name in tasks)


def test_files_that_are_closed_stay_closed(tmp_path: Path):
    files = Files(tmp_path)
    files.run_blocking(_one_step(Create("a", b"1")))
    files.close()
    for step in (Read("a", 0, 1), Write("a", 0, b"2"), Sync("a"), Replace("a", b"2"), Remove("a"), Size("a")):
        with pytest.raises(OSError, match="files are closed") as caught:
            files.run_blocking(_one_step(step))
        assert caught.value.errno == errno.ESHUTDOWN
    assert not files._descriptors and (tmp_path / "a").read_bytes() == b"1"


def _one_step(step: Step) -> Script[None]:
    yield step


async def test_a_takeover_that_fails_does_not_keep_the_image_from_a_third(storage: Hosts, tmp_path: Path):
    async with storage.doomed("n1") as one:
        await leased(one)
        await put((await opened(one, "web@1")).device, 0, b"1" * 4096)
    boot = (tmp_path / "host1.boot").read_text().strip()
    toml = storage.root / "images" / "web" / "image.toml"
    content = toml.read_bytes()
    async with storage.serving("n2", "host2") as two, storage.serving("n3", "host3") as three:
        toml.write_bytes(b"rot")
        for _ in range(2):
            with pytest.raises(Damaged):
                await two.acquire_lease("web", 2, "n2/web", dead_boots=[boot])
        toml.write_bytes(content)
        # Nobody says once more that host1 is dead, and host2 need not be.
        await three.acquire_lease("web", 3, "n3/web", dead_boots=[])
        assert await get((await opened(three, "web@3")).device, 0, 4096) == b"1" * 4096
    async with storage.serving("n1") as one:
        assert one.image("web").state == "elsewhere"


@pytest.mark.parametrize("verb", ["release", "hand over"])
async def test_a_failed_image_is_given_away_for_recovery(storage: Hosts, verb: str):
    async with storage.serving("n1") as one, storage.serving("n2", "host2") as two:
        await leased(one)
        point = await point_of(one)
        await put((await opened(one, "web@1")).device, MiB, b"1" * 4096)
        image = one.opened("web")
        image.image.fail("a flush failed")
        if verb == "release":
            await one.acquire_lease("web", 2, "n1/web")
            await one.release_lease("web", 2, "n1/web")
            assert (await one.release_image("web")).state == "released"
        else:
            await one.hand_over("web", 2, "n2/web")
        await two.open_image("web")
        assert two.opened("web").image.opened_how != "clean"
        await two.acquire_lease("web", 3, "n2/web")
        assert await get((await opened(two, "web@3")).device, MiB, 4096) == b"1" * 4096
        extents = (await two.changes("web", point)).extents
        assert any(start <= MiB and MiB + 4096 <= start + length for start, length in extents)


@pytest.mark.parametrize("verb", ["release", "hand over"])
async def test_a_failed_image_is_not_given_away_while_this_host_may_still_write_to_it(
    storage: Hosts, verb: str
):
    """What a sync could not write lies in this host's memory. Written out later, it would come over what the
    next one writes; so it is synced first, every file of it, and where that fails the image stays here."""
    async with storage.serving("n1") as one, storage.serving("n2", "host2") as two:
        await leased(one)
        await put((await opened(one, "web@1")).device, MiB, b"1" * 4096)
        image = one.opened("web")
        image.image.fail("a flush failed")
        await one.acquire_lease("web", 2, "n1/web")
        await one.release_lease("web", 2, "n1/web")
        unwritten = storage.root / "images" / "web" / "late"
        unwritten.symlink_to("/proc/self/status")  # a file whose sync fails, wherever it lies
        with pytest.raises(Refused):
            await (one.release_image("web") if verb == "release" else one.hand_over("web", 3, "n2/web"))
        with pytest.raises(Refused, match=r"belongs to diskd n1|served by diskd n1"):
            await two.open_image("web")
        unwritten.unlink()
