"""Growing images on real files: open, in use, refused, cut short, and finished at the next opening."""

import contextlib
import errno
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from image_harness import MiB, Place, any_writer, cut, new_place, open_image

from daemonkit.diskd_api import BackupDisk
from diskd.core import resize as core
from diskd.core.geometry import RAW
from diskd.core.inventory import LibrarySettings
from diskd.core.steps import Allocate, Replace, Step, Truncate
from diskd.errors import Refused
from diskd.shell import image_files, resizing
from diskd.shell.files import Files
from diskd.shell.image import Image
from diskd.shell.library import open_library

SIZE = 64 * MiB


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with new_place(tmp_path) as made:
        yield made


async def create(place: Place) -> None:
    await Image.create(place.directory, SIZE)


async def test_points_stay_valid_and_the_new_part_counts_as_changed(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        writer = any_writer(image)
        point = await cut(image, 1)
        await writer.write(5 * MiB, b"before")
        await resizing.grow(image, 3 * 1024 * MiB)
        assert image.size_bytes == writer.size_bytes == 3 * 1024 * MiB
        assert (place.directory / "disk.raw").stat().st_size == 3 * 1024 * MiB
        await writer.write(7 * MiB, b"after")
        await writer.write(2 * 1024 * MiB, b"beyond")
        assert image.changes_since(point).extents == [
            (5 * MiB, 4096), (7 * MiB, 4096), (SIZE, 3 * 1024 * MiB - SIZE),
        ]  # fmt: skip
        later = await cut(image, 2)
        await writer.write(3 * 1024 * MiB - 10, b"at the end")
        assert image.changes_since(later).extents == [(3 * 1024 * MiB - 4096, 4096)]
        await image.close()
    assert list(place.settings.shared_dir.iterdir()) == []
    async with open_image(place) as image:
        assert image.opened_how == "clean"
        assert image.size_bytes == 3 * 1024 * MiB
        assert image.changes_since(later).exact
        assert await any_writer(image).read(2 * 1024 * MiB, 6) == b"beyond"
        assert image.tracker.catalogue.segments[0].interval == 2, "the two halves of the interval are joined"
        assert len(image.tracker.catalogue.segments) == 1


async def test_after_a_crash_the_tracking_of_a_resized_image_goes_on(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        point = await cut(image, 1)
        await resizing.grow(image, 2 * SIZE)
        await any_writer(image).write(MiB, b"x")
        image.abandon()
    async with open_image(place) as image:
        assert image.opened_how == "daemon_crash"
        assert image.changes_since(point).extents == [(MiB, 4096), (SIZE, SIZE)]
        assert image.changes_since(point).exact
        image.abandon()
        place.lose_power()
    async with open_image(place) as image:
        assert image.opened_how == "power_loss"
        extents = image.changes_since(point).extents
        assert extents == [(MiB, MiB), (SIZE, SIZE)]


async def test_the_present_size_is_fine_and_a_smaller_one_refused(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        before = image.tracker.header
        await resizing.grow(image, SIZE)
        assert image.tracker.header == before
        with pytest.raises(Refused, match="cannot shrink to 1MiB"):
            await resizing.grow(image, MiB)
        with pytest.raises(Refused, match="multiple of 512"):
            await resizing.grow(image, SIZE + 1)


class Reserving(Files):
    """Tells which files it has made room in."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.reserved: list[str] = []

    def _step(self, step: Step) -> Any:
        if isinstance(step, Allocate):
            self.reserved.append(step.file)
        return super()._step(step)


@pytest.mark.parametrize("busy", ["flush_turn", "commit_turn"])
async def test_no_room_is_made_in_a_file_that_is_being_written(place: Place, busy: str) -> None:
    """Where the file system cannot reserve space (NFS before 4.2), the C library reads a byte of every block
    and writes it back: what somebody else wrote there in between would be lost."""
    await create(place)
    async with open_image(place) as image:
        usual, image.files = image.files, Reserving(place.directory)
        turn: trio.Lock = getattr(image, busy)
        async with trio.open_nursery() as nursery, turn:  # a flush or a commit is under way
            nursery.start_soon(resizing.grow, image, 2 * SIZE)
            with trio.fail_after(20):
                while not turn.statistics().tasks_waiting:
                    await trio.lowlevel.checkpoint()
            assert image.files.reserved == []
        assert image.files.reserved[:2] == ["disk.mrt", "disk.rct"]
        image.files.close()
        image.files = usual


async def test_no_write_comes_between_what_a_resize_records_and_what_it_ends(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        writer = any_writer(image)
        await writer.write(MiB, b"its region is open")
        async with trio.open_nursery() as nursery, image.catalogue_turn:
            nursery.start_soon(resizing.grow, image, 2 * SIZE)
            with trio.fail_after(20):
                while not image.catalogue_turn.statistics().tasks_waiting:
                    await trio.lowlevel.checkpoint()
            assert image.is_held
            assert not writer.write_nowait(MiB, b"x")
        assert image.size_bytes == 2 * SIZE


async def test_writers_wait_for_a_resize_and_go_on(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        point = await cut(image, 1)
        writer = any_writer(image)

        async def write(number: int) -> None:
            for round_ in range(8):
                await writer.write((number * 8 + round_) * MiB // 2, bytes([number + 1]) * 512)

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(write, number)
            for step in range(1, 6):
                await resizing.grow(image, SIZE + step * MiB)
        expected = [(index * MiB // 2, 4096) for index in range(64)]
        assert image.changes_since(point).extents == [*expected, (SIZE, 5 * MiB)]
        assert image.tracker.open_count <= 64
        await image.close()
    async with open_image(place) as image:
        assert image.opened_how == "clean"
        assert image.changes_since(point).extents == [*expected, (SIZE, 5 * MiB)]


async def test_no_resize_while_a_point_is_cut_and_no_harm_from_trying(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        await image.prepare_cut()
        with pytest.raises(Refused, match="checkpoint"):
            await resizing.grow(image, 2 * SIZE)
        await image.cancel_cut()
        await resizing.grow(image, 2 * SIZE)
        assert len(list(place.settings.shared_dir.iterdir())) == 1
        await image.close()
        with pytest.raises((Refused, OSError)):
            await resizing.grow(image, 3 * SIZE)


@pytest.mark.parametrize("steps_done", [1, 3, 6, 12, 15])
async def test_what_a_crash_cut_short_is_finished_at_the_next_opening(place: Place, steps_done: int) -> None:
    await create(place)
    async with open_image(place) as image:
        point = await cut(image, 1)
        await any_writer(image).write(MiB, b"x")
        facts = image_files.settled_facts(image.files)
        target = core.grown(image.identity, 2 * SIZE)
        await image.files.run(core.reserve(target, facts.mtime_ns))
        intent = core.plan(image.tracker, facts, 2 * SIZE, facts.mtime_ns)
        await image.files.run(core.record(image.tracker, intent))
        header = core.live_header(image.tracker, intent, bytes(16))
        script = core.carry_out(target, intent, header, facts.mtime_ns)
        step = next(script)
        for _ in range(steps_done):  # what was done of it before the crash
            step = script.send(image.files._step(step))
        script.close()
        image.abandon()
    async with open_image(place) as image:
        assert (image.opened_how, image.size_bytes) == ("resized", 2 * SIZE)
        assert not (place.directory / core.FILE).exists()
        report = image.changes_since(point)
        assert (report.extents, report.exact) == ([(MiB, 4096), (SIZE, SIZE)], True)


class HeldSync(Files):
    """Syncs of the raw file wait until ``go`` is set."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.waiting = 0
        self.go = threading.Event()

    def sync(self, name: str) -> None:
        if name == RAW:
            self.waiting += 1
            assert self.go.wait(20)
        super().sync(name)


@contextlib.asynccontextmanager
async def before_the_hold(image: Image) -> AsyncIterator[HeldSync]:
    """What was begun in it goes on at its end: until then it may wait for the raw file's sync."""
    usual, held = image.raw._files, HeldSync(image.directory)
    image.raw._files = held
    try:
        yield held
    finally:
        held.go.set()
        held.close()
        image.raw._files = usual


async def waits(held: HeldSync) -> None:
    with trio.fail_after(20):
        while not held.waiting:
            await trio.lowlevel.checkpoint()


async def test_a_cut_that_was_prepared_before_the_hold_is_in_the_way(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        refused: list[str] = []

        async def grow() -> None:
            try:
                await resizing.grow(image, 2 * SIZE)
            except Refused as error:
                refused.append(str(error))

        async with before_the_hold(image) as held, trio.open_nursery() as nursery:
            nursery.start_soon(grow)
            await waits(held)
            await image.prepare_cut()
            held.go.set()
        assert "checkpoint" in refused[0]
        assert (image.size_bytes, image.failure) == (SIZE, None)
        async with image.held():
            image.freeze("rp-0000000000000001")
        await image.persist_cut()
        await image.close()
    async with open_image(place) as image:
        assert (image.opened_how, image.size_bytes) == ("clean", SIZE)


@pytest.mark.parametrize("sizes", [(2 * SIZE, 3 * SIZE), (3 * SIZE, 2 * SIZE)])
async def test_of_two_resizes_at_once_one_is_carried_out_and_none_shrinks(
    place: Place, sizes: tuple[int, int]
) -> None:
    await create(place)
    async with open_image(place) as image:
        point = await cut(image, 1)
        grown: list[int] = []
        refused: list[str] = []

        async def grow(size: int) -> None:
            try:
                await resizing.grow(image, size)
                grown.append(size)
            except Refused as error:
                refused.append(str(error))

        async with before_the_hold(image) as held, trio.open_nursery() as nursery:
            nursery.start_soon(grow, sizes[0])
            await waits(held)
            nursery.start_soon(grow, sizes[1])
            with trio.fail_after(20):
                while not image.raw._sync_turn.statistics().tasks_waiting:
                    await trio.lowlevel.checkpoint()
            held.go.set()
        assert len(grown) == 1
        assert "meanwhile" in refused[0]
        assert image.size_bytes == grown[0] == (place.directory / RAW).stat().st_size
        await any_writer(image).write(image.size_bytes - 4096, b"x" * 4096)
        assert image.changes_since(point).extents == [(SIZE, grown[0] - SIZE)]
        await image.close()
    async with open_image(place) as image:
        assert (image.opened_how, image.size_bytes) == ("clean", grown[0])


class SlowToGrow(Files):
    """The raw file has its new size only a while after that was begun, by the clock that stamps files."""

    def _step(self, step: Step) -> Any:
        result = super()._step(step)
        if isinstance(step, Truncate):
            begun, deadline = time.time_ns(), time.monotonic() + 10
            path = self.directory / step.file
            while path.stat().st_ctime_ns <= begun:  # the kernel keeps it in ticks
                os.utime(path)
                assert time.monotonic() < deadline
        return result


async def test_the_growing_of_the_raw_file_is_not_taken_for_a_change_from_outside(place: Place) -> None:
    """The daemon dies before anybody writes: the last change of the raw file was the resize's own."""
    await create(place)
    async with open_image(place) as image:
        point = await cut(image, 1)
        await any_writer(image).write(MiB, b"x")
        usual, slow = image.files, SlowToGrow(place.directory)
        image.files = slow
        await resizing.grow(image, 2 * SIZE)
        slow.close()
        image.files = usual
        image.abandon()
    # With a grain of 1 ns, set at the reopening, even a change right after what was noted is from outside.
    later = attrs.evolve(place, settings=attrs.evolve(place.settings, tracking_flush_interval_ns=1))
    async with open_image(later) as image:
        assert (image.opened_how, image.opened_reason) == ("daemon_crash", None)
        report = image.changes_since(point)
        assert (report.extents, report.exact) == ([(MiB, 4096), (SIZE, SIZE)], True)
        await image.close()


class FullFiles(Files):
    """A file system without room."""

    def _step(self, step: Step) -> Any:
        if isinstance(step, Allocate | Replace):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super()._step(step)


async def test_where_there_is_no_room_nothing_has_changed(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        roomy, image.files = image.files, FullFiles(place.directory)
        try:
            with pytest.raises(Refused, match="make room"):
                await resizing.grow(image, 2 * SIZE)
        finally:
            image.files.close()
            image.files = roomy
        assert len(list(place.settings.shared_dir.iterdir())) == 1
        assert (image.size_bytes, image.failure) == (SIZE, None)
        await any_writer(image).write(MiB, b"x")
        await resizing.grow(image, 2 * SIZE)


async def test_the_library_names_the_checkpoint_that_stands_in_the_way(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    async with open_library(tmp_path / "root", LibrarySettings(shared_dir=str(shared))) as library:
        await library.create_image("d", SIZE)
        frozen = await library.begin_checkpoint("vm", [BackupDisk("root", "d")], "", held_by="hand")
        with pytest.raises(Refused, match=f"diskctl checkpoint end {frozen.checkpoint}"):
            await library.resize_image("d", 2 * SIZE)
        assert (await library.resize_image("d", SIZE)).size_bytes == SIZE
        await frozen.end("keep")
        with trio.fail_after(20):
            while library.image("d").checkpoint is not None:  # noqa: ASYNC110 - the merge's end has no event here
                await trio.sleep(0.01)
        old = await library.open("d", peer="test", drop=lambda _: None)
        assert (await library.resize_image("d", 2 * SIZE)).size_bytes == 2 * SIZE
        new = await library.open("d", peer="test", drop=lambda _: None)
        assert new.device.size_bytes == 2 * SIZE
        await old.device.write(0, b"goes on")
        changes = await library.changes("d", frozen.point)
        assert changes.extents == [(0, 4096), (SIZE, SIZE)]
