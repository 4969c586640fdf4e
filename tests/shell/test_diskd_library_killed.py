"""The library killed at any moment of a checkpoint's life, on real files: restarted, merged, compared."""

import random
import shutil
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID, uuid4

import attrs
import pytest
import trio

from daemonkit.diskd_api import BackupDisk
from daemonkit.units import KiB, MiB
from diskd.core import checkpoint
from diskd.core.inventory import LibrarySettings
from diskd.errors import Refused
from diskd.shell import live_map
from diskd.shell.image import ImageSettings
from diskd.shell.library import Library, open_library
from diskd.shell.live_map import LiveMap

BLOCK = 4096
SIZE = 4 * MiB
DISKS = [BackupDisk("system", "a")]


def shared(tmp_path: Path) -> Path:
    path = tmp_path / "shared"
    path.mkdir(exist_ok=True)
    return path


def settings(tmp_path: Path, **changes) -> LibrarySettings:
    return LibrarySettings(shared_dir=str(shared(tmp_path)), merge_batch_bytes=16 * KiB, **changes)


@asynccontextmanager
async def doomed(tmp_path: Path):
    """A library that ends as a killed process does: nothing is closed, flushed or recorded."""
    root = tmp_path / "root"
    for path in (root, root / "images", root / "checkpoints"):
        path.mkdir(exist_ok=True)
    image_settings = ImageSettings(shared_dir=shared(tmp_path))
    async with trio.open_nursery() as nursery:
        library = Library(root, settings(tmp_path), image_settings, nursery_that_outlives_calls=nursery)
        await library.start()
        yield library
        nursery.cancel_scope.cancel(reason="killed")
    for image in library._images.values():
        if image.overlay is not None:
            image.overlay.abandon()
        image.image.abandon()
        image.files.close()
    library._checkpoints.close()


class Guest:
    """Writes at random, one call at a time, and knows what the disk must hold."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.model = bytearray(SIZE)
        self.changed: set[int] = set()
        self.unflushed: set[int] = set()

    async def work(self, device, count: int) -> None:
        for _ in range(count):
            kind = self.rng.choice(("write", "write", "write", "zero", "trim", "flush"))
            if kind == "flush":
                await device.flush()
                self.unflushed.clear()
                continue
            length = self.rng.choice((1, 100, BLOCK, 3 * BLOCK, 5000, 300 * KiB))
            offset = self.rng.randrange(0, SIZE // 2 - length)
            if self.rng.random() < 0.5:
                offset -= offset % BLOCK
            data = bytes(length)
            if kind == "write":
                data = self.rng.randbytes(16) * (length // 16) + bytes(length % 16)
                if not device.write_nowait(offset, data):
                    await device.write(offset, data)
            elif kind == "zero":
                await device.write_zeroes(offset, length)
            else:
                await device.trim(offset, length)
            self.model[offset : offset + length] = data
            blocks = set(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))
            self.changed |= blocks
            self.unflushed |= blocks


async def open_plain(library: Library):
    return await library.open("a", peer="test", drop=lambda _: None)


async def merged(library: Library) -> None:
    with trio.fail_after(20):
        while library.image("a").checkpoint is not None:  # noqa: ASYNC110 - no event tells it from outside
            await trio.sleep(0.002)


async def reported(library: Library, point: str) -> set[int]:
    return {
        block
        for start, length in (await library.changes("a", point)).extents
        for block in range(start // BLOCK, -(-(start + length) // BLOCK))
    }


async def begin_life(library: Library, guest: Guest, stage: str) -> str:
    """Up to ``stage`` of a second checkpoint; returns the first one's point, which is valid."""
    export = await open_plain(library)
    await guest.work(export.device, 20)
    frozen = await library.begin_checkpoint("web", DISKS, "")
    guest.changed.clear()
    await guest.work(export.device, 10)
    await frozen.end("keep")
    await guest.work(export.device, 10)  # during the merge
    await merged(library)
    await guest.work(export.device, 10)
    if stage != "at rest":
        second = await library.begin_checkpoint("web", DISKS, "", held_by="hand")
        await guest.work(export.device, 30)
        if stage == "merging":
            await second.end("discard")
            await guest.work(export.device, guest.rng.randrange(20))
    return frozen.point


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["at rest", "sealed", "merging"])
@pytest.mark.parametrize("seed", range(3))
async def test_a_killed_daemon_loses_no_acknowledged_write(tmp_path, seed, stage):
    guest = Guest(random.Random(seed))
    async with doomed(tmp_path) as library:
        await library.create_image("a", SIZE)
        point = await begin_life(library, guest, stage)
    async with doomed(tmp_path) as library:  # killed once more, while it recovers
        if stage == "sealed":
            [info] = library.checkpoints()
            assert info.state == "sealed"
    async with open_library(tmp_path / "root", settings(tmp_path)) as library:
        export = await open_plain(library)
        assert await export.device.read(0, SIZE) == guest.model
        assert (
            await reported(library, point) == guest.changed and (await library.changes("a", point)).exact
        )  # T3
        for info in library.checkpoints():
            if info.state == "sealed":
                await library.end_checkpoint(info.checkpoint, "discard")
        await guest.work(export.device, 10)
        await merged(library)
        assert await export.device.read(0, SIZE) == guest.model
        assert (tmp_path / "root/images/a/disk.raw").read_bytes() == guest.model
        assert await reported(library, point) == guest.changed
        export.close()
    assert list(shared(tmp_path).iterdir()) == [], "nothing is left in shared memory after a clean stop"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["at rest", "sealed", "merging"])
@pytest.mark.parametrize("seed", range(3))
async def test_losing_shared_memory_loses_no_flushed_write(tmp_path, seed, stage):
    guest = Guest(random.Random(1000 + seed))
    async with doomed(tmp_path) as library:
        await library.create_image("a", SIZE)
        point = await begin_life(library, guest, stage)
    for path in shared(tmp_path).iterdir():
        path.unlink()
    async with open_library(tmp_path / "root", settings(tmp_path)) as library:
        export = await open_plain(library)
        content = await export.device.read(0, SIZE)
        for block in set(range(SIZE // BLOCK)) - guest.unflushed:
            start = block * BLOCK
            assert content[start : start + BLOCK] == guest.model[start : start + BLOCK], f"block {block}"
        report = await library.changes("a", point)
        assert (
            await reported(library, point) >= guest.changed
            and not report.exact
            and report.over_report_bytes > 0
        )
        export.close()


async def test_the_frozen_view_survives_a_kill(tmp_path):
    guest = Guest(random.Random(7))
    async with doomed(tmp_path) as library:
        await library.create_image("a", SIZE)
        export = await open_plain(library)
        await guest.work(export.device, 30)
        frozen = await library.begin_checkpoint("web", DISKS, "config", held_by="hand")
        cut = bytes(guest.model)
        await guest.work(export.device, 30)
    async with open_library(tmp_path / "root", settings(tmp_path)) as library:
        [info] = library.checkpoints()
        view = await library.open(info.exports["a"], peer="test", drop=lambda _: None)
        assert await view.device.read(0, SIZE) == cut
        again = library.frozen(frozen.checkpoint)
        assert (again.config, again.point, list(again.disks)) == ("config", frozen.point, ["system"])
        await again.end("keep")
        await merged(library)
        assert library.points("a")[0].valid
        view.close()


@pytest.mark.parametrize("name", ["disk.map", "head", "disk.avhd", "no head"])
async def test_a_damaged_avhd_refuses_the_image(tmp_path, name):
    async with doomed(tmp_path) as library:
        await library.create_image("a", SIZE)
        await library.create_image("b", SIZE)
        await library.begin_checkpoint("web", [*DISKS, BackupDisk("data", "b")], "", held_by="hand")
    path = tmp_path / "root/images/a/checkpoint" / name.removeprefix("no ")
    if name in ("disk.avhd", "no head"):
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[40] ^= 1
        path.write_bytes(data)
    async with open_library(tmp_path / "root", settings(tmp_path)) as library:
        assert [(info.name, info.state) for info in library.images()] == [("a", "damaged"), ("b", "open")]
        with pytest.raises(Refused, match="damaged"):
            library.lease("a")
        with pytest.raises(Refused):
            await library.open_image("a")
        assert next(iter(library.names())) == "b"
    assert (path.parent / "disk.map").exists(), "what is left is left for whoever repairs it"


@pytest.mark.parametrize("has_head", [False, True])
async def test_half_of_a_head_does_not_keep_the_directory(tmp_path, has_head):
    """A kill between the head's new content and its name. It stayed, and so did the directory, for ever."""
    place = tmp_path / "root/images/a/checkpoint"
    async with doomed(tmp_path) as library:
        await library.create_image("a", SIZE)
        if has_head:
            await library.begin_checkpoint("web", DISKS, "", held_by="hand")
        place.mkdir(exist_ok=True)
        (place / ".head.4711.tmp").write_bytes(b"half")
    async with open_library(tmp_path / "root", settings(tmp_path)) as library:
        for standing in library.checkpoints():
            await library.frozen(standing.checkpoint).end("discard")
        await merged(library)
        assert not place.exists()


async def test_the_avhd_of_another_image_is_not_put_over_this_one(tmp_path):
    async with doomed(tmp_path) as library:
        for name in ("a", "b"):
            await library.create_image(name, SIZE)
        await library.begin_checkpoint("web", DISKS, "", held_by="hand")
    images = tmp_path / "root/images"
    shutil.copytree(images / "a/checkpoint", images / "b/checkpoint")
    async with open_library(tmp_path / "root", settings(tmp_path)) as library:
        assert [(info.name, info.state) for info in library.images()] == [("a", "open"), ("b", "damaged")]
        assert "belongs to another image" in (library.image("b").reason or "")


async def test_the_avhd_of_an_earlier_checkpoint_is_not_served_in_place_of_the_standing_ones(tmp_path):
    """Put back by somebody: what was written since the later cut is not in it."""
    place, kept = tmp_path / "root/images/a/checkpoint", tmp_path / "kept"
    async with doomed(tmp_path) as library:
        await library.create_image("a", SIZE)
        first = await library.begin_checkpoint("web", DISKS, "", held_by="hand")
        shutil.copytree(place, kept)
        await first.end("discard")
        second = await library.begin_checkpoint("web", DISKS, "", held_by="hand")
    shutil.rmtree(place)
    kept.rename(place)
    async with open_library(tmp_path / "root", settings(tmp_path)) as library:
        assert library.image("a").state == "damaged"
        assert f"the AVHD of its checkpoint {second.checkpoint} is missing" in (
            library.image("a").reason or ""
        )


def test_a_map_in_shared_memory_of_another_boot_is_not_believed(tmp_path):
    nonce = live_map.new_nonce(uuid4())
    LiveMap.create(tmp_path, nonce, b"\x01" * 16, "this boot").abandon()
    assert live_map.recover(tmp_path, nonce, 16, "this boot") == b"\x01" * 16
    assert live_map.recover(tmp_path, nonce, 16, "another") is None
    assert live_map.recover(tmp_path, nonce, 17, "this boot") is None


async def test_a_checkpoint_is_settled_when_the_image_that_was_damaged_is_there_again(tmp_path):
    """On all of its images or on none: a point of one alone is no base for anything."""
    async with doomed(tmp_path) as library:
        for name in ("a", "b"):
            await library.create_image(name, SIZE)
        frozen = await library.begin_checkpoint("web", [*DISKS, BackupDisk("data", "b")], "", held_by="hand")
    head = tmp_path / "root/images/a/checkpoint/head"
    whole = head.read_bytes()
    head.write_bytes(b"damaged")
    async with open_library(tmp_path / "root", settings(tmp_path)) as library:
        await library.end_checkpoint(frozen.checkpoint, "keep")
        head.write_bytes(whole)
        await library.open_image("a")
        with trio.fail_after(20):
            while library.checkpoints():  # noqa: ASYNC110 - no event tells it from outside
                await trio.sleep(0.002)
        for name in ("a", "b"):
            assert [(point.point, point.valid) for point in library.points(name)] == [(frozen.point, True)]


async def test_a_map_in_shared_memory_that_no_head_names_goes_with_the_next_opening(tmp_path):
    """A kill between its making and the head's, or between the next head and its removal."""
    async with doomed(tmp_path) as library:
        info = await library.create_image("a", SIZE)
        await library.begin_checkpoint("web", DISKS, "", held_by="hand")
        [in_use] = shared(tmp_path).glob("*.avhd")
        image, other = UUID(info.uuid), uuid4()
        for whose in (image, other):
            LiveMap.create(shared(tmp_path), live_map.new_nonce(whose), bytes(16), "boot").abandon()
    async with doomed(tmp_path) as library:
        left = list(shared(tmp_path).glob("*.avhd"))
        assert len(left) == 2 and in_use not in left, "renewed; the other image's is not ours to remove"
        assert sum(path.name.startswith(f"holdfast-{other.hex}") for path in left) == 1


async def test_what_a_killed_daemon_left_is_flushed_and_killed_again(tmp_path):
    """Its writes are known from shared memory only; a flush in the next life speaks of them as well, and what
    that life writes has to be found by a third."""
    async with doomed(tmp_path) as library:
        await library.create_image("a", SIZE)
        await library.begin_checkpoint("web", DISKS, "", held_by="hand")
        export = await open_plain(library)
        await export.device.write(0, b"1" * BLOCK)
    async with doomed(tmp_path) as library:
        export = await open_plain(library)
        await export.device.write(2 * BLOCK, b"2" * BLOCK)
    async with doomed(tmp_path) as library:
        export = await open_plain(library)
        assert await export.device.read(0, 3 * BLOCK) == b"1" * BLOCK + bytes(BLOCK) + b"2" * BLOCK
        await export.device.flush()
    for path in shared(tmp_path).glob("*.avhd"):
        path.unlink()  # as a power loss does
    async with doomed(tmp_path) as library:
        export = await open_plain(library)
        assert await export.device.read(0, 3 * BLOCK) == b"1" * BLOCK + bytes(BLOCK) + b"2" * BLOCK


async def test_a_torn_checkpoint_never_happened(tmp_path):
    """The record says preparing: the cut is undone, its writes are merged, its changes stay tracked."""
    guest = Guest(random.Random(3))
    async with doomed(tmp_path) as library:
        await library.create_image("a", SIZE)
        export = await open_plain(library)
        first = await library.begin_checkpoint("web", DISKS, "")
        await first.end("keep")
        await merged(library)
        await guest.work(export.device, 10)
        second = await library.begin_checkpoint("web", DISKS, "")
        await guest.work(export.device, 10)
        record = tmp_path / "root/checkpoints" / second.checkpoint / "record"
        held = library._checkpoints.find(second.checkpoint)
    record.write_bytes(checkpoint.encode_record(attrs.evolve(held.record, state="preparing")))
    async with open_library(tmp_path / "root", settings(tmp_path)) as library:
        export = await open_plain(library)
        await merged(library)
        assert await export.device.read(0, SIZE) == guest.model
        assert [point.point for point in library.points("a")] == [first.point]
        assert await reported(library, first.point) == guest.changed
        export.close()


async def test_a_lease_that_cannot_be_recorded_changes_nothing(tmp_path):
    dropped: list[str] = []
    async with open_library(tmp_path / "root", settings(tmp_path)) as library:
        await library.create_image("a", SIZE)
        export = await library.open("a", peer="test", drop=dropped.append)
        path = tmp_path / "root/images/a/lease"
        path.unlink()
        path.mkdir()  # a rename over a directory fails
        with pytest.raises(Refused, match="could not be made durable"):
            await library.acquire_lease("a", 3, "n1/web")
        assert library.lease("a").epoch == 0 and dropped == []
        await export.device.write(0, b"1" * BLOCK)
        path.rmdir()
        await library.acquire_lease("a", 3, "n1/web")
        assert library.lease("a").epoch == 3 and len(dropped) == 1
        export.close()


async def test_an_orphaned_avhd_is_merged(tmp_path):
    guest = Guest(random.Random(4))
    async with doomed(tmp_path) as library:
        await library.create_image("a", SIZE)
        export = await open_plain(library)
        frozen = await library.begin_checkpoint("web", DISKS, "")
        await guest.work(export.device, 20)
    for path in (tmp_path / "root/checkpoints" / frozen.checkpoint).iterdir():
        path.unlink()
    async with open_library(tmp_path / "root", settings(tmp_path)) as library:
        await merged(library)
        export = await open_plain(library)
        assert await export.device.read(0, SIZE) == guest.model
        export.close()
