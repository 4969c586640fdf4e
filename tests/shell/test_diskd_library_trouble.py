"""The library in trouble: stopped within a merge, damaged or foreign records, a disk without space."""

import contextlib
import errno
import os
import shutil
import threading
from pathlib import Path

import attrs
import pytest
import trio
from image_harness import new_place

from daemonkit.diskd_api import BackupDisk
from daemonkit.units import KiB, MiB
from diskd.core import avhd
from diskd.core.inventory import LibrarySettings
from diskd.core.steps import Replace, Step, Sync, Write
from diskd.errors import Refused
from diskd.shell.files import Files
from diskd.shell.held import Held
from diskd.shell.image import ImageSettings
from diskd.shell.library import Library, open_library

BLOCK = 4096
SIZE = 4 * MiB
DISKS = [BackupDisk("system", "a")]


@pytest.fixture
def settings(tmp_path):
    with new_place(tmp_path) as place:
        yield LibrarySettings(shared_dir=str(place.settings.shared_dir), merge_batch_bytes=16 * KiB)


@contextlib.asynccontextmanager
async def doomed(root: Path, settings: LibrarySettings):
    """A library that ends as a killed process does: nothing is closed, flushed or recorded."""
    for path in (root, root / "images", root / "checkpoints"):
        path.mkdir(exist_ok=True)
    image_settings = ImageSettings(shared_dir=Path(settings.shared_dir))
    async with trio.open_nursery() as nursery:
        library = Library(root, settings, image_settings, nursery_that_outlives_calls=nursery)
        await library.start()
        yield library
        nursery.cancel_scope.cancel(reason="killed")
    for image in library._images.values():
        if image.overlay is not None:
            image.overlay.abandon()
        image.image.abandon()
        image.files.close()
    library._checkpoints.close()


async def until(condition) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - what is waited for lies outside: no event tells it
            await trio.sleep(0.002)


async def plain(library: Library):
    return (await library.open("a", peer="test", drop=lambda _: None)).device


async def with_point(library: Library) -> str:
    """An image "a" with a valid point and one changed block since."""
    await library.create_image("a", SIZE)
    frozen = await library.begin_checkpoint("web", DISKS, "")
    await frozen.end("keep")
    await until(lambda: library.image("a").checkpoint is None)
    await (await plain(library)).write(0, b"1" * BLOCK)
    return frozen.point


class SlowMerge(Files):
    """The first copy of a merge has begun when ``begun`` is set, and lasts until the image was closed, or
    until that has been waited for long enough."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.begun = threading.Event()
        self.closed = threading.Event()

    def _step(self, step: Step):
        if step == Sync(avhd.PARENT_FILE) and not self.begun.is_set():
            self.begun.set()
            self.closed.wait(1)
            content = (self.directory / avhd.PARENT_FILE).read_bytes()[:512]
            descriptor = self.descriptor(avhd.PARENT_FILE)
            os.pwrite(descriptor, content, 0)
        return super()._step(step)

    def close(self) -> None:
        self.closed.set()
        super().close()


@pytest.mark.slow
async def test_a_stop_within_a_merge_keeps_every_point(tmp_path, settings):
    """The image is not recorded as closed cleanly while the merge still writes to it."""
    async with open_library(tmp_path / "root", settings) as library:
        point = await with_point(library)
        image = library._images["a"]
        slow = SlowMerge(image.image.directory)
        slow._descriptors = image.files._descriptors  # the image's lock among them
        image.files = slow
        frozen = await library.begin_checkpoint("web", DISKS, "")
        await (await plain(library)).write(5 * BLOCK, b"2" * 9 * BLOCK)
        await frozen.end("discard")
        await until(slow.begun.is_set)
    async with open_library(tmp_path / "root", settings) as library:
        assert library._images["a"].image.opened_how == "clean"
        report = await library.changes("a", point)
        assert report.exact and report.extents == [(0, BLOCK), (5 * BLOCK, 9 * BLOCK)]


async def test_a_damaged_record_harms_nobody(tmp_path, settings):
    """The AVHD is merged as one without a record: no byte is lost, and everything is served."""
    root = tmp_path / "root"
    async with doomed(root, settings) as library:
        point = await with_point(library)
        await library.create_image("b", SIZE)
        frozen = await library.begin_checkpoint("web", DISKS, "", held_by="hand")
        await (await plain(library)).write(7 * BLOCK, b"2" * BLOCK)
    record = root / "checkpoints" / frozen.checkpoint / "record"
    record.write_bytes(record.read_bytes()[:-20])
    (root / "checkpoints" / "notes").write_text("a stranger's file")
    (root / "checkpoints" / "lost+found").mkdir()
    async with open_library(root, settings) as library:
        assert [(info.name, info.state) for info in library.images()] == [("a", "open"), ("b", "open")]
        await until(lambda: library.image("a").checkpoint is None)
        device = await plain(library)
        assert await device.read(7 * BLOCK, BLOCK) == b"2" * BLOCK
        assert (await library.changes("a", point)).extents == [(0, BLOCK), (7 * BLOCK, BLOCK)]
        assert library.checkpoints() == []
        # The next one begins, and starts after it find the damaged one out of their way.
        await (await library.begin_checkpoint("web", DISKS, "")).end("keep")
    assert list((root / "checkpoints").glob(".damaged-*/record"))
    async with open_library(root, settings) as library:
        assert len(library.points("a")) == 3


async def test_what_is_no_image_is_not_taken_for_one(tmp_path, settings):
    async with open_library(tmp_path / "root", settings) as library:
        await library.create_image("a", SIZE)
    images = tmp_path / "root" / "images"
    (images / "README").write_text("a stranger's file")
    (images / "lost+found").mkdir()
    async with open_library(tmp_path / "root", settings) as library:
        assert [info.name for info in library.images()] == ["a"]


@pytest.mark.parametrize("held_by", ["hand", "backup"])
async def test_a_start_that_can_record_nothing_serves_all_the_same(tmp_path, settings, held_by):
    root = tmp_path / "root"
    async with doomed(root, settings) as library:
        point = await with_point(library)
        frozen = await library.begin_checkpoint("web", DISKS, "", held_by=held_by)
        await (await plain(library)).write(7 * BLOCK, b"2" * BLOCK)
        held = library._checkpoints.find(frozen.checkpoint)
        await library._checkpoints.invalidator(held)("a test")
    # A small file is replaced by way of a temporary one of this name.
    blocks = [
        root / "checkpoints" / frozen.checkpoint / f".record.{os.getpid()}.tmp",
        root / "images" / "a" / "checkpoint" / f".head.{os.getpid()}.tmp",
    ]
    for path in blocks:
        path.mkdir()
    async with open_library(root, settings) as library:
        device = await plain(library)
        assert await device.read(7 * BLOCK, BLOCK) == b"2" * BLOCK
        await device.write(8 * BLOCK, b"3" * BLOCK)
        await until(lambda: library.image("a").checkpoint is None)
        assert (await library.changes("a", point)).extents == [(0, BLOCK), (7 * BLOCK, 2 * BLOCK)]
        assert library.checkpoints()
        for path in blocks:
            if path.exists():
                path.rmdir()
        # As soon as there is space again, what was decided is recorded.
        await until(lambda: [info.state for info in library.checkpoints()] in ([], ["pending"]))


async def test_an_end_that_cannot_be_recorded_is_made_up_for(tmp_path, settings):
    """B2: a full disk costs the backup; the VM goes on, and the next backup can begin."""
    root = tmp_path / "root"
    async with open_library(root, settings) as library:
        point = await with_point(library)
        frozen = await library.begin_checkpoint("web", DISKS, "")
        await (await plain(library)).write(7 * BLOCK, b"2" * BLOCK)
        blocked = root / "checkpoints" / frozen.checkpoint / f".record.{os.getpid()}.tmp"
        blocked.mkdir()
        with pytest.raises(Refused, match="cannot be recorded"):
            await frozen.end("keep")
        await until(lambda: library.image("a").checkpoint is None)  # the AVHD's space is given back at once
        blocked.rmdir()
        await until(lambda: library.checkpoints() == [])
        assert [info.valid for info in library.points("a")] == [True, True]
        assert (await library.changes("a", point)).extents == [(0, BLOCK), (7 * BLOCK, BLOCK)]
        assert (await library.changes("a", frozen.point)).extents == [(7 * BLOCK, BLOCK)]


class SealFailsLate(Files):
    """The seal is renamed into place, and its directory cannot be synced; nothing is recorded afterwards, not
    even that the checkpoint is no longer good, until ``mended``."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.mended = False

    def _step(self, step: Step):
        if self.mended:
            return super()._step(step)
        if isinstance(step, Replace) and b'"sealed"' in step.data:
            super()._step(step)
        if isinstance(step, Replace | Write):
            raise OSError(errno.EIO, "simulated")
        return super()._step(step)


class OnBadStorage(dict[str, Held]):
    """The checkpoints of a library; the storage of each goes bad once it has begun."""

    def __setitem__(self, identifier: str, held: Held) -> None:
        held.files.close()
        held.files = SealFailsLate(held.files.directory)
        super().__setitem__(identifier, held)


async def test_a_seal_that_may_be_durable_keeps_the_parent_until_it_is_flagged(tmp_path, settings):
    """B2 after a begin that failed: the next start may find it sealed."""
    root = tmp_path / "root"
    async with doomed(root, attrs.evolve(settings, avhd_limit_bytes=2 * BLOCK)) as library:
        await library.create_image("a", SIZE)
        library._checkpoints.held = begun = OnBadStorage()
        with pytest.raises(Refused, match="cannot begin"):
            await library.begin_checkpoint("web", DISKS, "")
        parent = root / "images" / "a" / avhd.PARENT_FILE
        device = await plain(library)
        await device.write(0, b"1" * 2 * BLOCK)
        with pytest.raises(OSError, match="simulated"):
            await device.write(8 * BLOCK, b"2" * BLOCK)
        assert not any(parent.read_bytes()), "nothing durable says that the frozen view has ended"
        (held,) = begun.values()
        held.files.mended = True
        await device.write(8 * BLOCK, b"2" * BLOCK)
        assert parent.read_bytes()[8 * BLOCK : 9 * BLOCK] == b"2" * BLOCK
    async with open_library(root, settings) as library:
        with pytest.raises(Refused, match="no interrupted backup"):
            await library.resume_checkpoint("web")
        device = await plain(library)
        assert await device.read(0, 2 * BLOCK) == b"1" * 2 * BLOCK
        assert await device.read(8 * BLOCK, BLOCK) == b"2" * BLOCK


async def test_a_merge_that_failed_refuses_the_next_checkpoint(tmp_path, settings):
    """With the reason, instead of waiting for it for ever."""
    async with doomed(tmp_path / "root", settings) as library:
        await library.create_image("a", SIZE)
        frozen = await library.begin_checkpoint("web", DISKS, "")
        device = await plain(library)
        await device.write(0, b"1" * BLOCK)
        await device.flush()
        image = library._images["a"]
        path = image.image.directory / avhd.MAP_FILE
        path.write_bytes(bytes(len(path.read_bytes())))
        await frozen.end("discard")
        await until(lambda: image.stuck is not None)
        with trio.fail_after(20), pytest.raises(Refused, match=r"disk\.map is damaged"):
            await library.begin_checkpoint("web", DISKS, "")
        assert await device.read(0, BLOCK) == b"1" * BLOCK


async def test_nothing_is_left_in_shared_memory_of_what_is_deleted(tmp_path, settings):
    root = tmp_path / "root"
    async with doomed(root, settings) as library:
        await library.create_image("a", SIZE)
        await library.create_image("b", SIZE)
    shutil.copytree(root / "images" / "a", root / "images" / ".new-c")
    (root / "images" / "a" / "lease").write_bytes(b"rot")
    (root / "images" / "b").rename(root / "images" / ".gone-b")
    assert len(os.listdir(settings.shared_dir)) == 2
    async with open_library(root, settings) as library:
        assert [info.state for info in library.images()] == ["damaged"]
        await library.delete_image("a")
    assert os.listdir(settings.shared_dir) == []


class AfterTheCut:
    """Syncs of an image's files wait, from the cut on, until ``go``."""

    def __init__(self, library: Library) -> None:
        opened = library.opened("a")
        assert opened is not None
        self._image = opened
        self._go = threading.Event()
        self.waiting = 0
        opened.image.files._sync = self._sync

    def _sync(self, descriptor: int) -> None:
        if self._image.overlay is not None:
            self.waiting += 1
            self._go.wait(20)
        os.fdatasync(descriptor)

    def go(self) -> None:
        self._go.set()


async def test_a_flush_between_the_cut_and_its_sync_covers_what_came_before(tmp_path, settings):
    """The parent holds writes from before it, which a power loss could take back."""
    async with open_library(tmp_path / "root", settings) as library:
        await library.create_image("a", SIZE)
        device = await plain(library)
        storage = AfterTheCut(library)
        flushed = False

        async def flush() -> None:
            nonlocal flushed
            await device.flush()
            flushed = True

        async with trio.open_nursery() as nursery:
            await device.write(0, b"1" * BLOCK)
            nursery.start_soon(library.begin_checkpoint, "web", DISKS, "")
            await until(lambda: storage.waiting > 0)
            nursery.start_soon(flush)
            try:
                with trio.move_on_after(0.2):
                    await until(lambda: flushed)
                assert not flushed
                (info,) = library.checkpoints()
                with pytest.raises(Refused, match="still beginning"):
                    await library.end_checkpoint(info.checkpoint, "discard")
            finally:
                storage.go()
        assert flushed


async def test_a_checkpoint_that_is_invalid_before_it_is_sealed_has_not_begun(tmp_path, settings):
    async with open_library(tmp_path / "root", settings) as library:
        await library.create_image("a", SIZE)
        device = await plain(library)
        await device.write(0, b"1" * BLOCK)
        storage = AfterTheCut(library)
        async with trio.open_nursery() as nursery:

            async def begin() -> None:
                with pytest.raises(Refused, match="invalidated while it began"):
                    await library.begin_checkpoint("web", DISKS, "")

            nursery.start_soon(begin)
            await until(lambda: storage.waiting > 0)
            (held,) = library._checkpoints.held.values()
            await library._checkpoints.invalidator(held)("a test")
            storage.go()
        await until(lambda: library.checkpoints() == [])
        assert library.points("a") == [] and library.image("a").checkpoint is None
        assert await device.read(0, BLOCK) == b"1" * BLOCK


class GatedWrites(Files):
    """Writes to the AVHD, other than those in place, wait for ``gate``."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.gate = threading.Event()
        self.waiting = 0

    def _step(self, step: Step):
        if isinstance(step, Write) and step.file == avhd.DATA_FILE:
            self.waiting += 1
            self.gate.wait(20)
        return super()._step(step)


async def test_a_write_that_a_merge_did_not_see_is_merged_too(tmp_path, settings):
    """It was planned for the AVHD, and arrives there when nothing seems to be left to merge."""
    async with open_library(tmp_path / "root", settings) as library:
        await library.create_image("a", SIZE)
        device = await plain(library)
        await device.write(0, b"1" * BLOCK)
        image = library.opened("a")
        assert image is not None
        image.files.close()
        image.files = files = GatedWrites(image.image.directory)
        frozen = await library.begin_checkpoint("web", DISKS, "")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.write, 0, b"2" * BLOCK)
            await until(lambda: files.waiting > 0)
            await frozen.end("discard")
            await until(lambda: image.image.is_held)
            files.gate.set()
        await until(lambda: library.image("a").checkpoint is None)
        assert await device.read(0, BLOCK) == b"2" * BLOCK
        assert (image.image.directory / avhd.PARENT_FILE).read_bytes()[:BLOCK] == b"2" * BLOCK


async def test_an_outcome_that_not_every_image_could_take_is_made_up_for(tmp_path, settings):
    """Its record says "ending": trying again begins there."""
    async with open_library(tmp_path / "root", settings) as library:
        await library.create_image("a", SIZE)
        frozen = await library.begin_checkpoint("web", DISKS, "")
        image = library.opened("a")
        assert image is not None
        files = image.image.files
        step, full = files._step, True

        def refused(wanted: Step):
            if full and isinstance(wanted, Replace):
                raise OSError(errno.ENOSPC, "simulated")
            return step(wanted)

        files._step = refused
        with pytest.raises(Refused, match="cannot be recorded"):
            await frozen.end("keep")
        assert [info.valid for info in library.points("a")] == [False]
        full = False
        await until(lambda: library.checkpoints() == [])
        assert [info.valid for info in library.points("a")] == [True]
