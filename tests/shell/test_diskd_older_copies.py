"""T4 on real files: older copies of side files, put back, are told by the facts that the shell looks up."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_harness import MiB, Place, any_writer, cut, new_place, open_image

from diskd.core import mrt
from diskd.core.recovery import WRITE_NS_MAX
from diskd.errors import NoSuchPoint
from diskd.shell.files import Files
from diskd.shell.image import Image


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with new_place(tmp_path) as made:
        yield made


async def test_an_mrt_whose_file_is_younger_than_it_can_be_is_refused(place: Place) -> None:
    await Image.create(place.directory, 64 * MiB)
    async with open_image(place) as image:
        point = await cut(image, 1)
        await any_writer(image).write(MiB, b"x")
        identity = image.identity
        image.abandon()
    place.lose_power()
    # As if the stamp were the one of an hour ago, and the file had been put back now.
    files = Files(place.directory)
    await files.run(mrt.stamp(identity, time.time_ns() - mrt.STAMP_NS - 2 * WRITE_NS_MAX))
    files.close()
    async with open_image(place) as image:
        assert image.opened_how == "new_generation"
        with pytest.raises(NoSuchPoint, match=r"older time.*take a full backup"):
            image.changes_since(point)


async def test_a_clean_mrt_from_an_earlier_session_is_refused(place: Place) -> None:
    await Image.create(place.directory, 64 * MiB)
    async with open_image(place) as image:
        point = await cut(image, 1)
        await image.close()
    clean = (place.directory / mrt.FILE).read_bytes()
    async with open_image(place) as image:
        image.abandon()
    place.lose_power()
    (place.directory / mrt.FILE).write_bytes(clean)
    async with open_image(place) as image:
        with pytest.raises(NoSuchPoint, match=r"older than disk\.rct.*take a full backup"):
            image.changes_since(point)


async def test_the_file_of_an_interval_from_before_a_join_is_refused(place: Place) -> None:
    await Image.create(place.directory, 64 * MiB)
    async with open_image(place) as image:
        first = await cut(image, 1)
        await any_writer(image).write(MiB, b"x")
        second = await cut(image, 2)
        alone = (place.directory / "disk.rct.2").read_bytes()
        await any_writer(image).write(2 * MiB, b"x")
        third = await cut(image, 3)
        await image.delete_point(second)
        await image.close()
    (place.directory / "disk.rct.2").write_bytes(alone)
    async with open_image(place) as image:
        with pytest.raises(NoSuchPoint, match=r"last join.*take a full backup"):
            image.changes_since(first)
        assert image.changes_since(third).extents == []
