"""An image in trouble: a disk that fills up within a join, a close with writes behind it, a cut given up, a
question that a join overtakes, a disk that hangs longer than a stamp holds."""

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from image_harness import MiB, Place, any_writer, cut, new_place, open_image

from diskd.core import mrt, points
from diskd.core.recovery import WRITE_NS_MAX
from diskd.core.steps import Read, Replace, Step, Sync, Write, before_steps
from diskd.errors import NoSuchPoint
from diskd.shell.files import Files
from diskd.shell.image import Image

BLOCK = 4096


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with new_place(tmp_path) as place:
        yield place


class AlmostFull(Files):
    """There is space for ``left`` more small files."""

    def __init__(self, directory: Path, left: int) -> None:
        super().__init__(directory)
        self.left = left

    def _step(self, step: Step):
        if isinstance(step, Replace):
            if not self.left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= 1
        return super()._step(step)


def blocks(image: Image, point: str) -> set[int]:
    report = image.changes_since(point)
    return {
        start // BLOCK for start, length in report.extents for start in range(start, start + length, BLOCK)
    }


@pytest.mark.parametrize("left", range(8))
async def test_a_join_that_is_cut_short_costs_no_point(place: Place, left: int) -> None:
    """Several pairs wait to be joined, and the disk is full again after any step of it."""
    await Image.create(place.directory, 32 * MiB)
    async with open_image(place) as image:
        found: list[str] = []
        for number in range(1, 6):
            await any_writer(image).write(number * MiB, b"x")
            found.append(await cut(image, number))
        roomy, image.files = image.files, AlmostFull(place.directory, 2)
        for point in (found[1], found[3]):
            image.files.left = 1  # the catalogue without the point, but no join
            await image.delete_point(point)
        image.files.left = left
        await image.join_segments()
        image.files.close()
        image.files = roomy
        assert blocks(image, found[0]) == {512, 768, 1024, 1280}
        assert blocks(image, found[2]) == {1024, 1280}
        await any_writer(image).write(7 * MiB, b"x")
        last = await cut(image, 9)
        assert points.joinable(image.tracker.catalogue) is None
        await image.close()
    async with open_image(place) as image:
        assert blocks(image, found[0]) == {512, 768, 1024, 1280, 1792}
        assert blocks(image, found[2]) == {1024, 1280, 1792}
        assert blocks(image, last) == set()
        await image.close()


class LingeringLayer:
    """A layer whose close lasts a while, as that of an AVHD which is being flushed does."""

    def __init__(self, image: Image) -> None:
        self._raw = image.raw

    def __getattr__(self, name: str):
        return getattr(self._raw, name)

    async def close(self) -> None:
        await trio.testing.wait_all_tasks_blocked()


async def test_a_write_that_waited_behind_the_close_does_not_slip_through(place: Place) -> None:
    await Image.create(place.directory, 32 * MiB)
    async with open_image(place) as image:
        point = await cut(image, 1)
        image.layer = LingeringLayer(image)
        refused: list[OSError] = []

        async def late() -> None:
            try:
                await any_writer(image).write(0, b"x")
            except OSError as error:
                refused.append(error)

        async with trio.open_nursery() as nursery, image.held():
            nursery.start_soon(late)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(image.close)
            await trio.testing.wait_all_tasks_blocked()
        assert [error.errno for error in refused] == [errno.EIO]
    async with open_image(place) as image:
        assert image.opened_how == "clean"
        assert blocks(image, point) == set()
        await image.close()


async def test_a_cut_given_up_while_it_is_prepared_leaves_no_bitmap_behind(place: Place) -> None:
    await Image.create(place.directory, 32 * MiB)
    async with open_image(place) as image:
        before = set(place.settings.shared_dir.iterdir())
        async with image.commit_turn, trio.open_nursery() as nursery:
            nursery.start_soon(image.prepare_cut)
            with trio.fail_after(20):
                while set(place.settings.shared_dir.iterdir()) == before:
                    await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        assert set(place.settings.shared_dir.iterdir()) == before
        await cut(image, 1)
        await image.close()


async def test_a_first_touch_that_nobody_waits_for_any_more_is_seen_through(place: Place) -> None:
    """Its commit has begun, and waits for a thread: called off in between, none could ever begin again."""
    await Image.create(place.directory, 32 * MiB)
    async with open_image(place) as image:
        point = await cut(image, 1)
        threads = image.files._limiter
        threads.total_tokens = 1
        gone = trio.CancelScope()

        async def impatient() -> None:
            with gone:
                await any_writer(image).write(0, b"x")

        async with trio.open_nursery() as nursery, threads:
            nursery.start_soon(impatient)
            with trio.fail_after(20):
                while not threads.statistics().tasks_waiting:
                    await trio.lowlevel.checkpoint()
            gone.cancel()
            await trio.testing.wait_all_tasks_blocked()
        await any_writer(image).write(5 * MiB, b"y")
        await image.flush_tracking()
        assert 5 * MiB // BLOCK in blocks(image, point)
        await image.close()


async def test_a_question_that_a_join_overtakes_is_asked_again(place: Place) -> None:
    """It has looked up which intervals to unite, and waits for a thread; meanwhile two of them become one.
    The file of the other is gone, and what it held is not: nobody is to be told to take a full backup."""
    await Image.create(place.directory, 32 * MiB)
    async with open_image(place) as image:
        first = await cut(image, 1)
        await any_writer(image).write(MiB, b"x")
        second = await cut(image, 2)
        await any_writer(image).write(2 * MiB, b"x")
        await cut(image, 3)
        found: dict[str, object] = {}

        async def ask(point: str) -> None:
            try:
                report = await image.changes(point)
                found[point] = [offset // MiB for offset, _ in report.extents]
            except NoSuchPoint as error:
                found[point] = str(error)

        threads = trio.to_thread.current_default_thread_limiter()
        threads.total_tokens = 1
        async with trio.open_nursery() as nursery, threads:
            nursery.start_soon(ask, first)
            nursery.start_soon(ask, second)
            with trio.fail_after(20):
                while threads.statistics().tasks_waiting < 2:
                    await trio.lowlevel.checkpoint()
            await image.delete_point(second)
            assert not (place.directory / "disk.rct.3").exists(), "joined with the one before it"
        assert found[first] == [1, 2]
        assert f"{second} is not known" in str(found[second]), "it was there when it was asked about, no more"
        await image.close()


class HangingDisk(Files):
    """The first write of the MRT arrives ``hangs_ns`` after it was submitted, by a clock that tells it so."""

    def __init__(self, directory: Path, hangs_ns: int) -> None:
        super().__init__(directory)
        self._behind_ns = hangs_ns

    def clock(self) -> int:
        return time.time_ns() - self._behind_ns

    def _step(self, step: Step):
        if isinstance(step, Write) and step.file == mrt.FILE:
            self._behind_ns = 0
        return super()._step(step)


async def test_a_disk_that_hangs_longer_than_a_stamp_holds_costs_no_point(place: Place) -> None:
    """The record of an open region arrives so late that its file is younger than it was said to become: as a
    copy is that somebody has put back. So that is said once more."""
    await Image.create(place.directory, 32 * MiB)
    async with open_image(place) as image:
        point = await cut(image, 1)
        usual = image.files
        hanging = image.files = HangingDisk(place.directory, mrt.STAMP_NS + 2 * WRITE_NS_MAX)
        image.clock = hanging.clock
        await any_writer(image).write(5 * MiB, b"x")
        assert hanging.clock() > time.time_ns() - WRITE_NS_MAX, "it has hung, and hangs no more"
        hanging.close()
        image.files = usual
        image.abandon()
    place.lose_power()
    async with open_image(place) as image:
        assert (image.opened_how, image.opened_reason) == ("power_loss", None)
        assert 5 * MiB // BLOCK in blocks(image, point)
        await image.close()


def test_steps_are_told_before_they_are_executed() -> None:
    """``before_steps`` changes neither the steps, nor their results, nor what happens when one fails."""

    def script():
        first = yield Read("a", 0, 1)
        try:
            yield Write("b", 0, first)
        except OSError:
            yield Sync("b")
        return first

    log: list[object] = []
    running = before_steps(script(), lambda step: log.append(("before", step.file)))
    log.append(next(running))
    log.append(running.send(b"1"))
    log.append(running.throw(OSError(errno.EIO, "simulated")))
    with pytest.raises(StopIteration) as stop:
        running.send(None)
    assert stop.value.value == b"1"
    told = ("before", "a"), ("before", "b"), ("before", "b")
    assert log == [told[0], Read("a", 0, 1), told[1], Write("b", 0, b"1"), told[2], Sync("b")]
