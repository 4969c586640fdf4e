"""Tracked images on real files: rules T1 to T4, cuts, holds, failures, and stock locks."""

import errno
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import attrs
import pytest
import trio
from image_harness import SIZE, GatedLayer, MiB, Place, any_writer, blocks, create, cut, new_place, open_image

from diskd.core import mrt
from diskd.core.ports import Allocation
from diskd.errors import Fenced, NoSuchPoint, Refused
from diskd.shell.image import Image


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with new_place(tmp_path) as made:
        yield made


async def test_changes_are_exact_through_a_clean_stop(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        writer = any_writer(image)
        await writer.write(0, b"before")
        point = await cut(image, 1)
        await writer.write(5 * MiB + 100, b"x" * 5000)
        await writer.trim(7 * MiB, 4096)
        await writer.write_zeroes(9 * MiB, 1, may_trim=False)
        expected = [(5 * MiB, 8192), (7 * MiB, 4096), (9 * MiB, 4096)]
        assert image.changes_since(point).extents == expected
        await image.close()
        assert not list(place.settings.shared_dir.iterdir())
    async with open_image(place) as image:
        assert image.opened_how == "clean"
        report = image.changes_since(point)
        assert (report.extents, report.exact, report.over_report_bytes) == (expected, True, 0)
        assert [(p.id, p.state) for p in image.points()] == [(point, "valid")]
        await image.close()


async def test_the_death_of_the_daemon_costs_nothing(place: Place) -> None:
    await create(place)
    written: set[int] = set()
    rng = Random(1)
    async with open_image(place) as image:
        point = await cut(image, 1)
    for _ in range(4):
        async with open_image(place) as image:
            assert image.opened_how == "daemon_crash"
            assert image.changes_since(point).exact
            assert blocks(image, point) == written
            writer = any_writer(image)
            for _ in range(20):
                block = rng.randrange(SIZE // 4096)
                written.add(block)
                if not writer.write_nowait(block * 4096, b"y" * 4096):
                    await writer.write(block * 4096, b"y" * 4096)
            if rng.random() < 0.5:
                await image.flush_tracking()


async def test_a_power_loss_is_a_bounded_superset(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        point = await cut(image, 1)
        writer = any_writer(image)
        await writer.write(3 * MiB, b"durable")
        await image.flush_tracking()
        await writer.write(3 * MiB + 8192, b"open again")
        await writer.write(20 * MiB, b"open")
    place.lose_power()
    for _ in range(2):
        async with open_image(place) as image:
            assert image.opened_how == "power_loss"
            report = image.changes_since(point)
            assert report.extents == [(3 * MiB, MiB), (20 * MiB, MiB)]
            assert (report.exact, report.over_report_bytes) == (False, 2 * MiB - 4096)
        place.lose_power()
    async with open_image(place) as image:
        await image.flush_tracking()
        assert image.tracker.open_count == 0
        # Inexact stays inexact for this point, and the next one is exact again.
        newer = await cut(image, 2)
        await any_writer(image).write(0, b"z")
        assert not image.changes_since(point).exact
        assert image.changes_since(newer).exact


async def test_at_rest_a_power_loss_costs_nothing_either(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        point = await cut(image, 1)
        await any_writer(image).write(3 * MiB, b"durable")
        await image.flush_tracking()
    place.lose_power()
    async with open_image(place) as image:
        report = image.changes_since(point)
        assert (report.extents, report.exact) == ([(3 * MiB, 4096)], True)


def durable_open(place: Place, image: Image) -> bytearray:
    """The regions that disk.mrt on disk says are open."""

    def read() -> bytes:
        return (place.directory / "disk.mrt").read_bytes()

    data = read()
    opened = bytearray()
    for index in range(mrt.record_count(image.identity)):
        record = mrt.decode_record(image.tracker.generation, index, data[8192 + 512 * index :][:512])
        assert record is not None
        opened += bytes((record.bits[i >> 3] >> (i & 7)) & 1 for i in range(mrt.REGIONS_PER_RECORD))
    return opened


async def test_data_reaches_its_layer_after_the_mark_and_the_open_region(place: Place) -> None:
    """T1, on the real files, at the instant of submission."""
    await create(place)
    async with open_image(place) as image:
        layer = GatedLayer(image)
        image.layer = layer
        writer = any_writer(image)
        assert not writer.write_nowait(33 * MiB, b"x"), "a closed region is never written in place"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.write, 33 * MiB, b"x" * 4096)
            with trio.fail_after(10):
                await layer.arrived.wait()
            block = 33 * MiB // 4096
            assert image.tracker.area.bits[block >> 3] >> (block & 7) & 1
            assert durable_open(place, image)[33]
            assert await image.raw.read(33 * MiB, 4096) == bytes(4096)
            # The region cannot be closed under the write, unless its mark is durable.
            await image.flush_tracking()
            layer.gate.set()
    place.lose_power()
    async with open_image(place) as image:
        assert image.tracker.area.bits[block >> 3] >> (block & 7) & 1


async def test_concurrent_first_touches_share_commits(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        writer = any_writer(image)
        async with trio.open_nursery() as nursery:
            for region in range(60):
                nursery.start_soon(writer.write, region * MiB, b"x")
        # All of them in few commits; they came one after the other, so the next ones are open too.
        assert 60 <= image.tracker.open_count <= 64
        assert sum(durable_open(place, image)) == image.tracker.open_count
        assert writer.write_nowait(59 * MiB + 5, b"in place")
        assert writer.read_nowait(59 * MiB + 5, 8) == b"in place"


async def test_at_the_bound_a_first_touch_waits_until_a_region_has_closed(tmp_path: Path) -> None:
    with new_place(tmp_path) as made:
        place = attrs.evolve(made, settings=attrs.evolve(made.settings, max_open_bytes=132 * MiB))
        await Image.create(place.directory, 400 * MiB)
        async with open_image(place) as image:
            point = await cut(image, 1)
            writer = any_writer(image)
            async with trio.open_nursery() as nursery:
                for region in range(0, 400, 2):
                    nursery.start_soon(writer.write, region * MiB, b"x")
            await writer.write_zeroes(0, 400 * MiB)
            assert sum(durable_open(place, image)) <= 132
            assert image.changes_since(point).extents == [(0, 400 * MiB)]
        tight = attrs.evolve(place.settings, max_open_bytes=64 * MiB)
        with pytest.raises(Refused, match="max_open_bytes"):
            await Image.open(place.directory, tight)


async def test_the_epoch_is_checked_at_submission_and_after_every_wait(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        fenced = False

        def check() -> None:
            if fenced:
                raise Fenced("epoch 2 has taken over")

        writer = image.open_writer(check)
        await writer.write(0, b"accepted")
        async with trio.open_nursery() as nursery:
            refused: list[int | None] = []

            async def late() -> None:
                try:
                    await writer.write(0, b"too late")
                except Fenced as error:
                    refused.append(error.errno)

            async with image.held():
                nursery.start_soon(late)
                await trio.testing.wait_all_tasks_blocked()
                fenced = True
        assert refused == [errno.ESHUTDOWN]
        with pytest.raises(Fenced):
            writer.write_nowait(0, b"x")
        with pytest.raises(Fenced):
            await writer.write(0, b"x")
        with pytest.raises(Fenced):
            writer.read_nowait(0, 1)
        assert await image.raw.read(0, 8) == b"accepted"


async def test_drain_waits_for_what_was_submitted(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        image.layer = layer = GatedLayer(image)
        writer, drained = any_writer(image), trio.Event()

        async def drain() -> None:
            await image.drain(writer)
            drained.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.write, 0, b"x")
            await layer.arrived.wait()
            nursery.start_soon(drain)
            await trio.testing.wait_all_tasks_blocked()
            assert not drained.is_set()
            layer.gate.set()
            with trio.fail_after(10):
                await drained.wait()


async def test_a_hold_waits_for_what_was_submitted(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        image.layer = layer = GatedLayer(image)
        entered = trio.Event()

        async def hold() -> None:
            async with image.held():
                assert not image.writes
                entered.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(any_writer(image).write, 0, b"x")
            await layer.arrived.wait()
            nursery.start_soon(hold)
            await trio.testing.wait_all_tasks_blocked()
            assert not entered.is_set()
            layer.gate.set()
            with trio.fail_after(10):
                await entered.wait()
        assert not image.is_held


async def test_held_writes_belong_to_the_new_interval(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        first = await cut(image, 1)
        writer = any_writer(image)
        await image.prepare_cut()
        async with trio.open_nursery() as nursery:
            async with image.held():
                assert not writer.write_nowait(4096, b"x")
                nursery.start_soon(writer.write, 4096, b"held")
                await trio.testing.wait_all_tasks_blocked()
                image.freeze("rp-0000000000000002")
            await image.persist_cut()
        await image.validate_point("rp-0000000000000002")
        assert image.changes_since(first, until="rp-0000000000000002").extents == []
        assert image.changes_since("rp-0000000000000002").extents == [(4096, 4096)]
        assert image.changes_since(first).extents == [(4096, 4096)]


async def test_a_cut_that_was_not_persisted_never_happened(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        point = await cut(image, 1)
        writer = any_writer(image)
        await writer.write(0, b"x")
        for number in range(2, 5):
            await image.prepare_cut()
            async with image.held():
                image.freeze(f"rp-{number:016x}")
            await writer.write(number * MiB, b"x")
            if number < 4:
                await image.cancel_cut()
                await image.cancel_cut()
        expected = {0, 512, 768, 1024}
        assert blocks(image, point) == expected
    async with open_image(place) as image:
        assert image.opened_how == "daemon_crash"
        assert [known.id for known in image.points()] == [point]
        assert blocks(image, point) == expected
        await image.prepare_cut()
        with pytest.raises(Refused, match="another point"):
            await image.prepare_cut()
        await image.cancel_cut()
        with pytest.raises(Refused, match="held"):
            image.freeze("rp-0000000000000009")
        with pytest.raises(Refused, match="no point"):
            await image.persist_cut()
        await image.close()
    async with open_image(place) as image:
        assert image.opened_how == "clean"
        assert blocks(image, point) == expected


async def test_deleting_points_joins_their_intervals(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        writer = any_writer(image)
        names = []
        for number in range(1, 6):
            names.append(await cut(image, number))
            await writer.write(number * MiB, b"x")
        await image.delete_point(names[2])
        await image.delete_point(names[2])
        assert blocks(image, names[0]) == {256 * n for n in range(1, 6)}
        assert blocks(image, names[1]) == {256 * n for n in range(2, 6)}
        assert blocks(image, names[3]) == {256 * n for n in range(4, 6)}
        with pytest.raises(NoSuchPoint, match="not known"):
            image.changes_since(names[2])
        assert len(list(place.directory.glob("disk.rct.*"))) == 3
        await image.delete_point(names[4])
        await image.delete_point(names[0])
        assert blocks(image, names[3]) == {256 * n for n in range(4, 6)}
        for name in (names[1], names[3]):
            await image.delete_point(name)
        assert not list(place.directory.glob("disk.rct.*"))
        assert image.points() == []


async def test_pending_points_keep_their_boundary(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        await image.prepare_cut()
        async with image.held():
            image.freeze("rp-00000000000000aa")
        await image.persist_cut()
        await any_writer(image).write(0, b"x")
        with pytest.raises(NoSuchPoint, match="pending"):
            image.changes_since("rp-00000000000000aa")
    async with open_image(place) as image:
        assert [known.state for known in image.points()] == ["pending"]
        await image.validate_point("rp-00000000000000aa")
        assert blocks(image, "rp-00000000000000aa") == {0}
        assert image.points()[0].rct_id.endswith(":2")


async def test_allocation_tells_data_from_holes(place: Place) -> None:
    await create(place)
    async with open_image(place) as image:
        writer = any_writer(image)
        await writer.write(MiB, b"x" * MiB, fua=True)
        runs = await writer.allocation(0, 4 * MiB)
        assert runs == [
            Allocation(0, MiB, "hole"),
            Allocation(MiB, MiB, "data"),
            Allocation(2 * MiB, 2 * MiB, "hole"),
        ]
        assert image.last_io_ns() is not None


async def test_tracking_is_flushed_in_the_background(place: Place) -> None:
    await create(place)
    quick = attrs.evolve(place, settings=attrs.evolve(place.settings, tracking_flush_interval_ns=10**7))
    async with open_image(quick) as image, trio.open_nursery() as nursery:
        await nursery.start(image.run)
        await any_writer(image).write(0, b"x")
        deadline = time.monotonic() + 20
        while image.tracker.open_count:
            assert time.monotonic() < deadline
            await trio.lowlevel.checkpoint()
        await image.close()
