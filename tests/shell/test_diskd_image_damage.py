"""Tracked images under damage: changes from outside, side files, failed syncs, full disks (T2, T4)."""

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import attrs
import pytest
from image_harness import GatedLayer, MiB, Place, any_writer, blocks, create, cut, new_place, open_image

from diskd.core.steps import Allocate, Replace, Step
from diskd.errors import Damaged, NoSuchPoint, Refused
from diskd.shell.files import Files
from diskd.shell.image import Image


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with new_place(tmp_path) as made:
        yield made


async def test_changes_outside_are_refused_with_the_remedy(place: Place) -> None:
    await create(place)

    async def doubted(how: str) -> None:
        async with open_image(place) as image:
            assert image.opened_how == "new_generation"
            with pytest.raises(NoSuchPoint, match=f"{how}.*take a full backup"):
                image.changes_since(point)
            assert image.points()[-1].state == "invalid"

    async with open_image(place) as image:
        point = await cut(image, 1)
        await image.close()
    os.utime(place.directory / "disk.raw")
    await doubted("changed outside")

    async with open_image(place) as image:
        point = await cut(image, 2)
        await image.close()
    content = (place.directory / "disk.raw").read_bytes()
    (place.directory / "disk.raw").rename(place.directory / "old")
    (place.directory / "disk.raw").write_bytes(content)
    await doubted("another inode")


def change_outside(path: Path) -> None:
    """Write until the file's time, which the kernel keeps in ticks, is later than any time noted so far."""
    noted = time.time_ns()
    deadline = time.monotonic() + 10
    with path.open("r+b", buffering=0) as file:
        while os.fstat(file.fileno()).st_mtime_ns <= noted:
            file.seek(0)
            file.write(b"y")
            assert time.monotonic() < deadline


async def test_a_change_outside_after_a_crash_is_found_too(place: Place) -> None:
    await create(place)
    later = attrs.evolve(place, settings=attrs.evolve(place.settings, tracking_flush_interval_ns=1))
    for lose_power in (False, True):
        async with open_image(place) as image:
            point = await cut(image, 1 + lose_power)
            await any_writer(image).write(0, b"x")
        if lose_power:
            place.lose_power()
        # With a grain of 1 ns, set at the reopening, even a change right after our own write is one.
        change_outside(place.directory / "disk.raw")
        async with open_image(later) as image:
            assert image.opened_how == "new_generation"
            with pytest.raises(NoSuchPoint, match="changed outside"):
                image.changes_since(point)
            await image.close()


@pytest.mark.parametrize("name", ["disk.rct", "disk.mrt", "points"])
@pytest.mark.parametrize("damage", ["missing", "empty", "noise"])
async def test_a_damaged_side_file_means_a_full_backup(place: Place, name: str, damage: str) -> None:
    await create(place)
    async with open_image(place) as image:
        point = await cut(image, 1)
        await any_writer(image).write(0, b"x")
        await image.close()
    path = place.directory / name
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(Random(1).randbytes(path.stat().st_size))
    async with open_image(place) as image:
        assert image.opened_how == "new_generation"
        with pytest.raises(NoSuchPoint, match="take a full backup"):
            image.changes_since(point)
        newer = await cut(image, 2)
        await any_writer(image).write(8192, b"x")
        assert image.changes_since(newer).extents == [(8192, 4096)]
        await image.close()
    async with open_image(place) as image:
        assert image.opened_how == "clean"
        assert image.changes_since(newer).exact


async def test_a_damaged_interval_refuses_the_points_before_it_only(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        first = await cut(image, 1)
        second = await cut(image, 2)
        intervals = list(place.directory.glob("disk.rct.*"))
        assert len(intervals) == 1
        intervals[0].write_bytes(b"noise")
        with pytest.raises(NoSuchPoint, match="take a full backup"):
            image.changes_since(first)
        assert image.changes_since(second).exact
        await image.close()


@pytest.mark.parametrize("damage", ["missing", "unreadable", "too long"])
async def test_an_interval_that_cannot_be_read_is_refused_with_the_remedy(place: Place, damage: str) -> None:
    await create(place)
    async with open_image(place) as image:
        first = await cut(image, 1)
        second = await cut(image, 2)
        (path,) = place.directory.glob("disk.rct.*")
        if damage == "too long":
            path.write_bytes(path.read_bytes() + bytes(MiB))
        else:
            path.unlink()
        if damage == "unreadable":
            path.mkdir()
        with pytest.raises(NoSuchPoint, match=rf"{first}: {path.name}.*: take a full backup"):
            image.changes_since(first)
        with pytest.raises(NoSuchPoint, match="take a full backup"):
            await image.changes(first)
        assert (await image.changes(second)).exact
        # Neither does it stand in the way of anything else.
        await image.delete_point(second)
        await cut(image, 3)
        await image.close()


async def test_a_damaged_interval_keeps_no_other_intervals_apart(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        made: list[str] = []
        for number in range(1, 7):
            made.append(await cut(image, number))
            await any_writer(image).write(number * MiB, b"x")
        damaged = image.tracker.catalogue.segments[1]
        (place.directory / f"disk.rct.{damaged.interval}").write_bytes(b"noise")
        before = len(image.tracker.catalogue.segments)
        for deleted in (made[1], made[2], made[4]):
            await image.delete_point(deleted)
        # Between the last two points there is one interval again; the damaged one stays by itself.
        assert len(image.tracker.catalogue.segments) == before - 1
        assert blocks(image, made[3]) == {4 * 256, 5 * 256, 6 * 256}
        with pytest.raises(NoSuchPoint, match="take a full backup"):
            image.changes_since(made[0])
        await image.close()


async def test_an_open_image_is_locked_against_qemu_and_a_second_daemon(place: Place) -> None:
    await create(place)
    async with open_image(place):
        with pytest.raises(Refused, match="in use"):
            await place.open()
        with (place.directory / "disk.raw").open("rb") as file:
            wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 201, 1, 0)
            answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, wanted)
            assert struct.unpack("hhqqi4x", answer)[0] == fcntl.F_RDLCK
    async with open_image(place) as image:
        await image.close()


async def test_without_shared_memory_opening_and_cutting_are_refused(place: Place) -> None:
    await create(place)
    gone = attrs.evolve(place.settings, shared_dir=place.directory / "missing")
    with pytest.raises(Refused, match="cannot be opened"):
        await Image.open(place.directory, gone)
    async with open_image(place) as image:
        hidden = place.settings.shared_dir.with_name(place.settings.shared_dir.name + "-hidden")
        place.settings.shared_dir.rename(hidden)
        try:
            with pytest.raises(Refused, match="no shared memory"):
                await image.prepare_cut()
        finally:
            hidden.rename(place.settings.shared_dir)
        await cut(image, 1)
        await image.close()


async def test_a_failed_sync_is_final_until_the_image_is_reopened(place: Place) -> None:
    await create(place)

    class FailingLayer(GatedLayer):
        async def flush(self) -> None:
            raise OSError(errno.EIO, "simulated")

    async with open_image(place) as image:
        point = await cut(image, 1)
        writer = any_writer(image)
        await writer.write(0, b"x")
        image.layer = FailingLayer(image)
        for call in (writer.flush, image.flush, image.flush_tracking):
            with pytest.raises(OSError, match=r".") as caught:
                await call()
            assert caught.value.errno == errno.EIO
        image.layer = image.raw
        for refused in (lambda: writer.write_nowait(0, b"x"), lambda: writer.read_nowait(0, 1)):
            with pytest.raises(OSError, match="reopen"):
                refused()
        await image.close()
    async with open_image(place) as image:
        assert image.opened_how == "daemon_crash"
        assert blocks(image, point) == {0}
        assert image.tracker.open_count == 1
        await image.close()


async def test_images_that_cannot_be_opened(place: Place, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no image there"):
        await place.open()
    with pytest.raises(Refused, match="multiple of 512"):
        await Image.create(place.directory, 1000)
    await create(place)
    with pytest.raises(FileExistsError):
        await create(place)
    (place.directory / "disk.raw").rename(tmp_path / "raw")
    with pytest.raises(Damaged, match="missing"):
        await place.open()
    (place.directory / "disk.raw").write_bytes(b"short")
    with pytest.raises(Damaged, match="restore"):
        await place.open()


class FullFiles(Files):
    """A file system that is full: nothing new can be written, preallocated files can."""

    def _step(self, step: Step) -> Any:
        if isinstance(step, Replace | Allocate):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super()._step(step)


async def test_a_full_disk_costs_the_cut_and_never_a_change(place: Place) -> None:
    """T5: recording a change needs no new space; a cut needs some, and is taken back without."""
    await create(place)
    async with open_image(place) as image:
        point = await cut(image, 1)
        writer = any_writer(image)
        roomy, image.files = image.files, FullFiles(place.directory)
        try:
            await writer.write(0, b"x")
            await image.prepare_cut()
            async with image.held():
                image.freeze("rp-0000000000000002")
            await writer.write(8 * MiB, b"x")
            with pytest.raises(OSError, match="space") as caught:
                await image.persist_cut()
            assert caught.value.errno == errno.ENOSPC
            await image.cancel_cut()
            with pytest.raises(OSError, match="space"):
                await image.delete_point(point)
            await writer.write(9 * MiB, b"x")
            await image.flush_tracking()
            await writer.flush()
        finally:
            image.files.close()
            image.files = roomy
        assert [known.id for known in image.points()] == [point]
        assert blocks(image, point) == {0, 2048, 2304}
        newer = await cut(image, 3)
        await image.close()
    async with open_image(place) as image:
        assert image.opened_how == "clean"
        assert blocks(image, point) == {0, 2048, 2304}
        assert blocks(image, newer) == set()
        await image.close()
