"""The bound on open regions, on real files: who waits goes on, one flush serves many, nobody is starved."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import attrs
import pytest
import trio
from image_harness import MiB, Place, any_writer, cut, new_place, open_image

from diskd.shell.image import Image

REGION = 16 * MiB
REGIONS = 100
LIMIT = 12  # the least that settings allow with such regions
WRITERS = 40
WRITES = 5


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with new_place(tmp_path) as made:
        yield attrs.evolve(made, settings=attrs.evolve(made.settings, max_open_bytes=LIMIT * REGION))


@pytest.mark.slow
async def test_many_writers_at_a_bound_of_a_few_regions_all_go_on(place: Place) -> None:
    await Image.create(place.directory, REGIONS * REGION, region_bytes=REGION)
    written: set[int] = set()
    async with open_image(place) as image:
        point = await cut(image, 1)
        writer = any_writer(image)
        before = image.tracker.root.sequence

        async def write(seed: int) -> None:
            rng = Random(seed)
            for _ in range(WRITES):
                block = rng.randrange(REGIONS * REGION // 4096)
                await writer.write(block * 4096, b"x")
                assert image.tracker.open_count <= LIMIT
                written.add(block)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for seed in range(WRITERS):
                    nursery.start_soon(write, seed)
        # A flush closes what it can, not one region: far fewer of them than first touches.
        flushes = image.tracker.root.sequence - before
        assert flushes <= WRITERS * WRITES / 3
        found = image.changes_since(point).extents
        assert {offset // 4096 for offset, _ in found} <= written
        assert sum(length for _, length in found) == 4096 * len(written)
        image.abandon()
    place.lose_power()
    async with open_image(place) as image:
        assert 0 < image.changes_since(point).over_report_bytes <= LIMIT * REGION


async def test_a_stream_at_the_bound_does_not_keep_others_out(place: Place) -> None:
    await Image.create(place.directory, REGIONS * REGION, region_bytes=REGION)
    async with open_image(place) as image:
        writer = any_writer(image)

        async def stream() -> None:
            for region in range(REGIONS):
                await writer.write(region * REGION, b"stream")

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream)
                for region in range(REGIONS - 1, 0, -3):
                    await writer.write(region * REGION + 8192, b"other")
        assert image.tracker.open_count <= LIMIT
