"""Reads and writes that an image does in place, many in one step: rules S1 and T1 hold there too."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from image_harness import MiB, Place, any_writer, cut, new_place, open_image

from daemonkit.diskd_api import BackupDisk
from diskd.core.inventory import LibrarySettings
from diskd.errors import Fenced
from diskd.shell.frozen import FrozenDevice
from diskd.shell.image import Image
from diskd.shell.library import Library, open_library
from diskd.shell.nbd_linger import LINGER_NS, Company, Lingering
from diskd.shell.open_image import PreparedDevice
from diskd.shell.raw_layer import RawLayer
from diskd.shell.writer import Writer

SIZE = 16 * MiB
DATA = memoryview(b"\x21" * 4096)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with new_place(tmp_path) as made:
        yield made


async def test_a_write_waits_for_its_region_and_its_mark(place: Place) -> None:
    await Image.create(place.directory, SIZE)
    async with open_image(place) as image:
        writer = any_writer(image)
        point = await cut(image, 1)
        assert writer.begin_in_place()
        assert not writer.write_in_place(2 * MiB, DATA)
        assert image.raw.read_nowait(2 * MiB, 4096) in (None, bytes(4096))
        await writer.write(2 * MiB + 8192, bytes(4096))
        assert writer.write_in_place(2 * MiB, DATA)
        assert writer.write_in_place(2 * MiB, DATA)
        assert image.changes_since(point).extents == [(2 * MiB, 4096), (2 * MiB + 8192, 4096)]
        buffer = memoryview(bytearray(4096))
        assert writer.read_in_place(2 * MiB, buffer)
        assert buffer == DATA


async def test_a_marked_block_of_a_closed_region_is_not_written(place: Place) -> None:
    await Image.create(place.directory, SIZE)
    async with open_image(place) as image:
        writer = any_writer(image)
        await writer.write(MiB, DATA)
        assert writer.write_in_place(MiB, DATA)
        await image.flush_tracking()
        await image.flush_tracking()
        assert image.tracker.open_count == 0
        assert not writer.write_in_place(MiB, DATA)


async def test_a_hold_stops_writes_and_not_reads(place: Place) -> None:
    await Image.create(place.directory, SIZE)
    async with open_image(place) as image:
        writer = any_writer(image)
        await writer.write(0, DATA)
        async with image.held():
            assert writer.begin_in_place()
            assert not writer.write_in_place(0, DATA)
            assert writer.read_in_place(0, memoryview(bytearray(4096)))
        assert writer.write_in_place(0, DATA)


async def test_a_failed_image_does_nothing_in_place(place: Place) -> None:
    await Image.create(place.directory, SIZE)
    async with open_image(place) as image:
        writer = any_writer(image)
        image.fail("a test")
        with pytest.raises(OSError, match="reopen the image"):
            writer.begin_in_place()


async def test_writes_in_place_are_noted_as_often_as_recovery_needs(place: Place) -> None:
    await Image.create(place.directory, SIZE)
    async with open_image(place) as image:
        noted: list[int] = []
        every = RawLayer(image.files, SIZE, lambda: noted.append(1), slack_ns=0)
        seldom = RawLayer(image.files, SIZE, lambda: noted.append(2), slack_ns=3600 * 10**9)
        for _ in range(3):
            assert every.write_nowait(0, DATA)
            assert seldom.write_nowait(0, DATA)
        assert noted == [1, 2, 1, 1]
        # What goes by thread may take long: that is always noted.
        await seldom.write_zeroes(0, 4096, may_trim=True)
        assert noted == [1, 2, 1, 1, 2, 2]
        # And the image's own lags by less than an interval.
        await any_writer(image).write(0, DATA)
        assert 0 <= time.time_ns() - image.tracker.area.time_ns < place.settings.tracking_flush_interval_ns


@asynccontextmanager
async def library_at(root: Path) -> AsyncIterator[Library]:
    shared = root / "shared"
    shared.mkdir()
    async with open_library(root / "root", LibrarySettings(shared_dir=str(shared))) as library:
        await library.create_image("a", SIZE)
        yield library


async def test_a_fenced_connection_does_nothing_in_place(tmp_path: Path) -> None:
    async with library_at(tmp_path) as library:
        await library.acquire_lease("a", 5, "n1")
        device = (await library.open("a@5", peer="test", drop=print)).device
        await library.prepare_lease("a", 6, "n2")
        destination = (await library.open("a@6", peer="test", drop=print)).device
        assert isinstance(device, Writer)
        assert isinstance(destination, PreparedDevice)
        await device.write(0, DATA)
        assert device.begin_in_place()
        assert device.write_in_place(0, DATA)
        # Prepared: it may read, not write.
        assert destination.begin_in_place()
        assert destination.read_in_place(0, memoryview(bytearray(4096)))
        with pytest.raises(PermissionError):
            destination.write_in_place(0, DATA)
        await library.acquire_lease("a", 6, "n2")
        with pytest.raises(Fenced):
            device.begin_in_place()
        assert destination.begin_in_place()
        assert destination.write_in_place(0, DATA)


async def test_a_frozen_view_reads_in_place_and_reports_once(tmp_path: Path) -> None:
    async with library_at(tmp_path) as library:
        writer = (await library.open("a", peer="test", drop=print)).device
        first = await library.begin_checkpoint("vm", [BackupDisk("d", "a")], "")
        await first.end("keep")
        await writer.write(MiB, DATA)
        second = await library.begin_checkpoint("vm", [BackupDisk("d", "a")], "")
        await writer.write(MiB, bytes(4096))
        name = f"a:{second.checkpoint}"
        one, other = [await library.open(name, peer="test", drop=print) for _ in range(2)]
        frozen = one.device
        assert isinstance(frozen, FrozenDevice)
        buffer = bytearray(4096)
        assert frozen.begin_in_place()
        assert frozen.read_in_place(MiB, memoryview(buffer))
        assert buffer == DATA
        with pytest.raises(PermissionError):
            frozen.write_in_place(0, DATA)
        reports = [await export.contexts[first.point]() for export in (one, other)]
        assert reports[0].extents == [(MiB, 4096)]
        assert reports[0] is reports[1]
        await library.end_checkpoint(second.checkpoint, "discard")
        with pytest.raises(OSError, match="checkpoint"):
            frozen.begin_in_place()
        with pytest.raises(OSError, match="checkpoint"):
            await one.contexts[first.point]()


class Clock:
    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


def test_only_the_one_busy_connection_lingers() -> None:
    company, clock = Company(), Clock()
    one, other = Lingering(company, clock_ns=clock), Lingering(company, clock_ns=clock)
    assert not one.begin()
    for _ in range(6):
        one.woken()
    assert one.begin()
    one.found()
    other.woken()
    assert not one.begin()
    assert not other.begin()
    for _ in range(6):
        one.woken()
    assert one.begin()


def test_lingering_in_vain_becomes_rare() -> None:
    clock = Clock()
    one = Lingering(Company(), clock_ns=clock)
    lingered = 0
    for _ in range(1000):
        one.woken()
        if one.begin():
            lingered += 1
            clock.ns += LINGER_NS // 2
            assert one.go_on()
            clock.ns += LINGER_NS
            assert not one.go_on()
    assert lingered < 20
    # Requests that come in time make it usual again, unless the core was away meanwhile.
    while not one.begin():
        one.woken()
    one.found()
    assert all(one.begin() for _ in range(3))
    clock.ns += 100 * LINGER_NS
    one.found()
    assert not one.begin()
