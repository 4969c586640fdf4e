"""Reads and writes that an image does in place, many in one step: rules S1 and T1 hold there too."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_harness import MiB, Place, any_writer, cut, new_place, open_image

from diskd.core import lease
from diskd.errors import Fenced
from diskd.shell.files import Files
from diskd.shell.image import Image
from diskd.shell.nbd_linger import Company, Lingering
from diskd.shell.open_image import OpenImage
from diskd.shell.raw_layer import RawLayer

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


async def test_a_fenced_connection_does_nothing_in_place(place: Place) -> None:
    await Image.create(place.directory, SIZE)
    files = Files(place.directory)
    await files.run(lease.persist(lease.LeaseState()))
    opened = OpenImage(await place.open(), files, lease.LeaseState())
    try:
        await opened.change_lease(lease.acquire, 5, "n1")
        device = (await opened.open_session(5, lambda _: None)).device
        await opened.change_lease(lease.prepare, 6, "n2")
        destination = (await opened.open_session(6, lambda _: None)).device
        await device.write(0, DATA)
        assert device.begin_in_place()
        assert device.write_in_place(0, DATA)
        # Prepared: it may read, not write.
        assert destination.begin_in_place()
        assert destination.read_in_place(0, memoryview(bytearray(4096)))
        with pytest.raises(PermissionError):
            destination.write_in_place(0, DATA)
        await opened.change_lease(lease.acquire, 6, "n2")
        with pytest.raises(Fenced):
            device.begin_in_place()
        assert destination.begin_in_place()
        assert destination.write_in_place(0, DATA)
    finally:
        opened.image.abandon()
        files.close()


def test_only_the_one_busy_connection_lingers() -> None:
    company = Company()
    one, other = Lingering(company), Lingering(company)
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
    while one.go_on():
        pass
    # In vain: not at once again.
    assert not one.begin()
