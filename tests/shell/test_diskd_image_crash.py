"""What an opening believes after a crash, on real files: shared bitmaps, times, how much is over-reported."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from image_harness import SIZE, MiB, Place, any_writer, blocks, create, cut, new_place, open_image

from diskd.shell import resizing
from diskd.shell.image import Image

SECOND_POINT = "rp-0000000000000002"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with new_place(tmp_path) as made:
        yield made


def fine_grained(place: Place) -> Place:
    """Opened with a grain of 1 ns, any change of the raw file that was not noted is one from outside."""
    return attrs.evolve(place, settings=attrs.evolve(place.settings, tracking_flush_interval_ns=1))


async def frozen(image: Image) -> None:
    await image.prepare_cut()
    async with image.held():
        image.freeze(SECOND_POINT)


async def write_later(image: Image, block: int) -> None:
    """A write of which the kernel, too, says that it is later than any before."""
    before = (image.directory / "disk.raw").stat().st_mtime_ns
    deadline = time.monotonic() + 10
    while (image.directory / "disk.raw").stat().st_mtime_ns <= before:
        await any_writer(image).write(block * 4096, b"x")
        assert time.monotonic() < deadline


async def test_what_lies_in_shared_memory_is_of_this_boot_or_not_believed(place: Place) -> None:
    """Also where it outlives the boot: on a directory that is none of tmpfs."""
    boot = place.directory.parent / "boot_id"
    boot.write_text("00000000-0000-4000-8000-000000000001\n")
    place = attrs.evolve(place, settings=attrs.evolve(place.settings, boot_id_file=boot))
    await create(place)
    async with open_image(place) as image:
        point = await cut(image, 1)
        await any_writer(image).write(3 * MiB, b"x")
    boot.write_text("00000000-0000-4000-8000-000000000002\n")
    async with open_image(place) as image:
        assert image.opened_how == "power_loss"
        assert image.changes_since(point).extents == [(3 * MiB, MiB)]


@pytest.mark.parametrize("damage", ["header", "size", "gone"])
async def test_a_shared_bitmap_that_is_not_the_one_is_not_believed(place: Place, damage: str) -> None:
    await create(place)
    async with open_image(place) as image:
        point = await cut(image, 1)
        await any_writer(image).write(3 * MiB, b"x")
    (shared,) = place.settings.shared_dir.iterdir()
    with shared.open("r+b") as file:
        if damage == "header":
            file.seek(64)
            file.write(b"rot")
        elif damage == "size":
            file.truncate(shared.stat().st_size - 4096)
    if damage == "gone":
        shared.unlink()
    async with open_image(place) as image:
        assert image.opened_how == "power_loss"
        assert image.changes_since(point).extents == [(3 * MiB, MiB)]


async def test_half_of_a_cut_is_not_believed(place: Place) -> None:
    """What was written since the freeze is marked in the later bitmap alone."""
    await create(place)
    async with open_image(place) as image:
        point = await cut(image, 1)
        await any_writer(image).write(3 * MiB, b"x")
        earlier = set(place.settings.shared_dir.iterdir())
        await frozen(image)
        await any_writer(image).write(5 * MiB, b"x")
        (later,) = set(place.settings.shared_dir.iterdir()) - earlier
    later.unlink()
    async with open_image(place) as image:
        assert image.opened_how == "power_loss"
        assert image.changes_since(point).extents == [(3 * MiB, MiB), (5 * MiB, MiB)]


async def test_a_cut_that_was_taken_back_costs_no_exactness(place: Place) -> None:
    await create(place)
    for is_frozen in (False, True):
        async with open_image(fine_grained(place)) as image:
            point = await cut(image, 1 + 2 * is_frozen)
            await image.prepare_cut()
            if is_frozen:
                async with image.held():
                    image.freeze(SECOND_POINT)
            await write_later(image, 7)
            await image.cancel_cut()
        async with open_image(fine_grained(place)) as image:
            assert image.opened_how == "daemon_crash"
            assert image.changes_since(point).exact
            assert blocks(image, point) == {7}


async def test_writes_since_a_freeze_are_not_taken_for_changes_from_outside(place: Place) -> None:
    await create(place)
    async with open_image(fine_grained(place)) as image:
        point = await cut(image, 1)
        await write_later(image, 7)
        await frozen(image)
        await write_later(image, 300)
    async with open_image(fine_grained(place)) as image:
        assert (image.opened_how, image.opened_reason) == ("daemon_crash", None)
        assert blocks(image, point) == {7, 300}


@pytest.mark.parametrize("end", ["crash", "close"])
async def test_a_time_that_was_set_back_hides_no_change_from_outside(place: Place, end: str) -> None:
    await create(place)
    async with open_image(place) as image:
        await cut(image, 1)
        await write_later(image, 7)
        if end == "close":
            await image.close()
    raw = place.directory / "disk.raw"
    was = raw.stat()
    deadline = time.monotonic() + 10
    while raw.stat().st_ctime_ns <= was.st_ctime_ns + 10**7:
        with raw.open("r+b") as file:
            file.write(b"y")
        os.utime(raw, ns=(was.st_atime_ns, was.st_mtime_ns))
        assert time.monotonic() < deadline
    async with open_image(fine_grained(place)) as image:
        assert image.opened_how == "new_generation"


async def test_inexact_stays_inexact_whatever_becomes_of_the_interval(place: Place) -> None:
    """T3: through a cut, a join, a resize and a clean stop."""
    await create(place)
    async with open_image(place) as image:
        point = await cut(image, 1)
        await any_writer(image).write(3 * MiB, b"x")
    place.lose_power()
    over = MiB  # nothing of the region was durable, the one changed block neither

    def told(image: Image) -> tuple[bool, int]:
        report = image.changes_since(point)
        return report.exact, report.over_report_bytes

    async with open_image(place) as image:
        assert told(image) == (False, over)
        between = await cut(image, 2)
        assert told(image) == (False, over)
        await image.delete_point(between)
        third = await cut(image, 3)
        assert len(image.tracker.catalogue.segments) == 1, "the intervals are joined"
        assert told(image) == (False, over)
        await image.close()
    async with open_image(place) as image:
        assert told(image) == (False, over)
        await any_writer(image).write(30 * MiB, b"x")
    place.lose_power()
    async with open_image(place) as image:
        assert told(image) == (False, 2 * over)
        await cut(image, 4)
        await image.delete_point(third)
        assert len(image.tracker.catalogue.segments) == 1, "joined again"
        assert told(image) == (False, 2 * over)
        await any_writer(image).write(40 * MiB, b"x")
    place.lose_power()
    async with open_image(place) as image:
        assert told(image) == (False, 3 * over)
        # What is open over a cut counts in both intervals, and no longer hides behind the size of the answer.
        await resizing.grow(image, 2 * SIZE)
        assert told(image) == (False, 4 * over)
        await image.close()
    async with open_image(place) as image:
        assert told(image) == (False, 4 * over)
        await image.close()


@pytest.mark.parametrize("tail", [512, 4096 - 512])
async def test_the_part_of_a_block_at_the_old_end_counts_as_changed(place: Place, tail: int) -> None:
    await create(place, SIZE + tail)
    async with open_image(place) as image:
        point = await cut(image, 1)
        await resizing.grow(image, SIZE + 8 * MiB)
        assert image.changes_since(point).extents == [(SIZE, 8 * MiB)]
        await any_writer(image).write(SIZE + tail, b"x")
        later = await cut(image, 2)
        await any_writer(image).write(SIZE + 512, b"y")
        assert image.changes_since(point).extents == [(SIZE, 8 * MiB)]
        assert image.changes_since(point, until=later).extents == [(SIZE, 8 * MiB)]
        assert image.changes_since(later).extents == [(SIZE, 4096)]
        await image.close()
