"""The image library on real files: exports, leases, checkpoints, merges, restarts."""

import os
import random
from pathlib import Path

import pytest
import trio
from diskd_library import BLOCK, SIZE, disks, frozen_bytes, get, opened, put, serving, until

from daemonkit.units import KiB, MiB
from diskd.errors import NoSuchExport, NoSuchPoint, Refused


async def test_an_image_is_created_listed_written_and_deleted(tmp_path):
    async with serving(tmp_path) as library:
        info = await library.create_image("a", SIZE)
        assert (info.size_bytes, info.block_bytes, info.epoch, info.state) == (SIZE, BLOCK, 0, "open")
        assert list(library.names()) == ["a"]
        with pytest.raises(Refused, match="exists already"):
            await library.create_image("a", SIZE)
        with pytest.raises(Refused, match="cannot name an image"):
            await library.create_image("A/b", SIZE)
        with pytest.raises(Refused, match="multiple of 512"):
            await library.create_image("odd", 1000)
        export = await opened(library, "a")
        await put(export.device, 5, b"hello")
        assert await get(export.device, 0, 16) == b"\0" * 5 + b"hello" + b"\0" * 6
        with pytest.raises(Refused, match="1 connections"):
            await library.delete_image("a")
        export.close()
        paths = await library.delete_image("a", dry_run=True)
        assert any(path.endswith("disk.raw") for path in paths) and library.image("a").name == "a"
        await library.delete_image("a")
        assert library.images() == [] and os.listdir(tmp_path / "root" / "images") == []


async def test_an_import_is_sparse_and_exact(tmp_path):
    source = tmp_path / "source.img"
    data = random.Random(1).randbytes(300 * KiB)
    with source.open("wb") as file:
        file.truncate(20 * MiB)
        file.seek(3 * MiB + 700)
        file.write(data)
    told = []
    async with serving(tmp_path) as library:
        info = await library.import_image(
            "a", source, progress=lambda done, total: told.append((done, total))
        )
        assert info.size_bytes == 20 * MiB and info.allocated_bytes < 4 * MiB
        export = await opened(library, "a")
        assert await export.device.read(0, 20 * MiB) == source.read_bytes()
        export.close()
    assert told[-1] == (20 * MiB, 20 * MiB) and told == sorted(told)


async def test_an_import_that_cannot_be_leaves_nothing(tmp_path):
    empty = tmp_path / "empty"
    empty.touch()
    async with serving(tmp_path) as library:
        for source in (empty, tmp_path / "absent"):
            with pytest.raises(Refused):
                await library.import_image("a", source)
        assert library.images() == [] and os.listdir(tmp_path / "root" / "images") == []


async def test_a_second_daemon_is_refused(tmp_path):
    async with serving(tmp_path):
        with pytest.raises(Exception, match="in use by another process"):
            async with serving(tmp_path):
                pass


async def test_released_images_are_left_alone_until_opened(tmp_path):
    async with serving(tmp_path) as library:
        await library.create_image("a", SIZE)
        assert (await library.release_image("a")).state == "released"
        assert list(library.names()) == []
        assert library.lease("a").epoch == 0  # as the storage has it, whoever serves the image
        with pytest.raises(Refused, match="image open a"):
            await library.acquire_lease("a", 1, "n1/web")
    async with serving(tmp_path) as library:
        assert library.image("a").state == "released"
        assert (await library.open_image("a")).state == "open"
    async with serving(tmp_path) as library:
        assert library.image("a").state == "open"


async def test_a_damaged_image_does_not_stop_the_others(tmp_path):
    async with serving(tmp_path) as library:
        await library.create_image("a", SIZE)
        await library.create_image("b", SIZE)
    (tmp_path / "root/images/a/lease").write_bytes(b"rubbish")
    async with serving(tmp_path) as library:
        assert [info.state for info in library.images()] == ["damaged", "open"]
        assert "lease file is damaged" in (library.image("a").reason or "")
        with pytest.raises(Refused, match="damaged"):
            await library.acquire_lease("a", 1, "x")
        await library.acquire_lease("b", 1, "x")


async def test_a_kept_point_knows_what_was_written_since(tmp_path):
    async with serving(tmp_path) as library:
        await library.create_image("a", SIZE)
        export = await opened(library, "a")
        await put(export.device, 0, b"1" * BLOCK)
        frozen = await library.begin_checkpoint("web", disks("a"), "config = 1\n")
        assert (frozen.vm, frozen.config) == ("web", "config = 1\n")
        disk = frozen.disks["disk-a"]
        before = await trio.to_thread.run_sync(frozen_bytes, disk)
        assert before[:BLOCK] == b"1" * BLOCK
        await put(export.device, 0, b"2" * BLOCK)  # whole block
        await put(export.device, BLOCK + 100, b"part")  # copied up
        await export.device.write_zeroes(10 * BLOCK, 5 * BLOCK)
        await export.device.trim(20 * BLOCK + 7, 2 * BLOCK)
        await export.device.flush()
        assert await get(export.device, 0, 4) == b"2222"
        assert await get(export.device, BLOCK + 98, 8) == b"\0\0part\0\0"
        assert await trio.to_thread.run_sync(frozen_bytes, disk) == before
        view = await opened(library, f"a:{frozen.checkpoint}")
        assert view.device.is_read_only and await view.device.read(0, SIZE) == before
        with pytest.raises(PermissionError):
            view.device.write_nowait(0, b"x" * BLOCK)
        after = await export.device.read(0, SIZE)
        await frozen.end("keep")
        with pytest.raises(OSError, match="ended"):
            await trio.to_thread.run_sync(frozen_bytes, disk)
        await until(lambda: library.checkpoints() == [])
        assert library.image("a").checkpoint is None
        assert await export.device.read(0, SIZE) == after
        assert (tmp_path / "root/images/a/disk.raw").read_bytes() == after
        assert not (tmp_path / "root/images/a/checkpoint").exists()
        assert os.listdir(tmp_path / "root/checkpoints") == []
        [point] = library.points("a")
        assert point.valid and point.point == frozen.point
        changed = {
            block
            for start, length in (await library.changes("a", frozen.point)).extents
            for block in range(start // BLOCK, -(-(start + length) // BLOCK))
        }
        assert changed == {0, 1, *range(10, 15), 20, 21, 22}
        export.close()


async def test_discarding_leaves_the_source_as_if_not_tried(tmp_path):
    async with serving(tmp_path) as library:
        await library.create_image("a", SIZE)
        export = await opened(library, "a")
        first = await library.begin_checkpoint("web", disks("a"), "")
        await first.end("keep")
        await put(export.device, 0, b"1" * BLOCK)
        second = await library.begin_checkpoint("web", disks("a"), "")
        assert second.disks["disk-a"].points == [first.point]
        assert second.disks["disk-a"].changes_since(first.point).extents == [(0, BLOCK)]
        await put(export.device, 5 * BLOCK, b"2" * BLOCK)
        await second.end("discard")
        assert [point.point for point in library.points("a")] == [first.point]
        assert (await library.changes("a", first.point)).extents == [(0, BLOCK), (5 * BLOCK, BLOCK)]
        with pytest.raises(NoSuchPoint):
            await library.changes("a", second.point)
        export.close()


def mappings():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum("/holdfast-" in line for line in lines)


async def test_a_cut_leaves_no_bitmap_mapped_behind(tmp_path):
    """32 MiB per TiB and backup, until the image was closed."""
    async with serving(tmp_path) as library:
        await library.create_image("a", SIZE)
        counts = set()
        for _ in range(3):
            frozen = await library.begin_checkpoint("web", disks("a"), "")
            await frozen.end("keep")
            await until(lambda: library.checkpoints() == [])
            counts.add(mappings())
        assert len(counts) == 1


async def test_a_pending_point_waits_to_be_settled(tmp_path):
    async with serving(tmp_path) as library:
        await library.create_image("a", SIZE)
        export = await opened(library, "a")
        points = []
        for _ in range(2):
            frozen = await library.begin_checkpoint("web", disks("a"), "")
            points.append(frozen.point)
            await put(export.device, len(points) * BLOCK, b"1" * BLOCK)
            await frozen.end("pending")
        export.close()
        await until(lambda: {info.state for info in library.checkpoints()} == {"pending"})
        assert [point.valid for point in library.points("a")] == [False, False]
        assert library.names() == ["a"]
        with pytest.raises(NoSuchExport, match="its frozen view has ended"):
            await opened(library, f"a:{frozen.checkpoint}")
    async with serving(tmp_path) as library:
        frozen = await library.begin_checkpoint("web", disks("a"), "")
        assert frozen.pending_at("any") == points and frozen.disks["disk-a"].points == []
        await frozen.settle(points[0], committed=True)
        await frozen.settle(points[1], committed=False)
        with pytest.raises(Refused, match="not pending"):
            await frozen.settle(points[1], committed=True)
        disk = frozen.disks["disk-a"]
        assert frozen.pending_at("any") == [] and disk.points == [points[0]]
        assert disk.changes_since(points[0]).extents == [(BLOCK, 2 * BLOCK)]
        await frozen.end("discard")
        await until(lambda: library.checkpoints() == [])
        assert [point.point for point in library.points("a")] == [points[0]]


async def test_a_second_begin_is_refused_naming_the_first(tmp_path):
    async with serving(tmp_path) as library:
        for name in ("a", "b"):
            await library.create_image(name, SIZE)
        frozen = await library.begin_checkpoint("web", disks("a"), "")
        for vm, image in (("web", "b"), ("other", "a")):
            with pytest.raises(Refused, match=frozen.checkpoint):
                await library.begin_checkpoint(vm, disks(image), "")
        with pytest.raises(Refused, match=frozen.checkpoint):
            await library.release_image("a")
        for wrong in (disks("a", "a"), disks("absent"), []):
            with pytest.raises(Refused):
                await library.begin_checkpoint("third", wrong, "")
        await frozen.end("discard")
        with pytest.raises(Refused):
            await frozen.end("keep")
        again = await library.begin_checkpoint("web", disks("a", "b"), "")
        await again.end("discard")


async def test_no_hand_calls_the_point_of_a_backup_that_runs_good(tmp_path):
    """Its target has not committed it (B3). Giving it up is anybody's right."""
    async with serving(tmp_path) as library:
        await library.create_image("a", SIZE)
        frozen = await library.begin_checkpoint("web", disks("a"), "")
        with pytest.raises(Refused, match="by a backup that runs: its target's word makes its point valid"):
            await library.end_checkpoint(frozen.checkpoint, "keep")
        assert [info.valid for info in library.points("a")] == [False]
        await library.end_checkpoint(frozen.checkpoint, "discard")
        with pytest.raises(Refused, match=r"has ended already|there is no checkpoint"):
            await frozen.end("keep")
        assert library.points("a") == []


async def test_all_disks_are_cut_at_one_instant(tmp_path):
    """A writer bumps a counter on a, then on b: the frozen b is never ahead of the frozen a."""
    async with serving(tmp_path) as library:
        for name in ("a", "b"):
            await library.create_image(name, SIZE)
        exports = [await opened(library, name) for name in ("a", "b")]
        stop = False

        async def write() -> None:
            count = 0
            while not stop:
                count += 1
                for export in exports:
                    await put(export.device, 0, count.to_bytes(8, "big").ljust(BLOCK, b"\0"))
                    await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            for _ in range(10):
                frozen = await library.begin_checkpoint("web", disks("a", "b"), "")
                views = [frozen.disks[f"disk-{name}"] for name in ("a", "b")]
                contents = [await trio.to_thread.run_sync(frozen_bytes, view) for view in views]
                a, b = (int.from_bytes(content[:8], "big") for content in contents)
                assert b <= a <= b + 1
                await frozen.end("discard")
            stop = True
        for export in exports:
            export.close()


async def test_an_avhd_at_its_limit_invalidates_and_the_guest_goes_on(tmp_path):
    async with serving(tmp_path, avhd_limit_bytes=4 * BLOCK) as library:
        await library.create_image("a", SIZE)
        export = await opened(library, "a")
        frozen = await library.begin_checkpoint("web", disks("a"), "")
        disk = frozen.disks["disk-a"]
        for block in range(10):
            await put(export.device, block * BLOCK, bytes([block + 1]) * BLOCK)
        assert library.checkpoints()[0].state == "invalid"
        with pytest.raises(OSError, match="cannot take a write"):
            await trio.to_thread.run_sync(frozen_bytes, disk)
        content = b"".join(bytes([block + 1]) * BLOCK for block in range(10))
        assert await export.device.read(0, 10 * BLOCK) == content
        await until(lambda: library.image("a").checkpoint is None)
        with pytest.raises(Refused, match=frozen.checkpoint):
            await library.begin_checkpoint("web", disks("a"), "")
        await frozen.end("discard")
        await until(lambda: library.checkpoints() == [])
        assert await export.device.read(0, 10 * BLOCK) == content
        export.close()


async def test_a_checkpoint_held_by_hand_survives_a_restart(tmp_path):
    async with serving(tmp_path) as library:
        await library.create_image("a", SIZE)
        export = await opened(library, "a")
        await put(export.device, 0, b"1" * BLOCK)
        frozen = await library.begin_checkpoint("web", disks("a"), "", held_by="hand")
        await put(export.device, 0, b"2" * BLOCK)
        export.close()
    async with serving(tmp_path) as library:
        [info] = library.checkpoints()
        assert (info.state, info.exports) == ("sealed", {"a": f"a:{frozen.checkpoint}"})
        view = await opened(library, info.exports["a"])
        assert (await view.device.read(0, BLOCK)) == b"1" * BLOCK
        export = await opened(library, "a")
        assert await get(export.device, 0, BLOCK) == b"2" * BLOCK
        with pytest.raises(Refused, match=frozen.checkpoint):
            await library.begin_checkpoint("web", disks("a"), "")
        await library.end_checkpoint(frozen.checkpoint, "keep")
        await until(lambda: library.checkpoints() == [])
        assert library.points("a")[0].valid and (await library.changes("a", frozen.point)).extents == [
            (0, BLOCK)
        ]
        assert await get(export.device, 0, BLOCK) == b"2" * BLOCK
        export.close()


async def test_one_held_by_hand_expires_after_a_restart(tmp_path):
    async with serving(tmp_path) as library:
        await library.create_image("a", SIZE)
        await library.begin_checkpoint("web", disks("a"), "", held_by="hand")
    async with serving(tmp_path, checkpoint_resume_timeout_ns=0) as library:
        await until(lambda: library.checkpoints() == [])
        assert library.points("a") == []


async def test_a_backups_checkpoint_that_nobody_goes_on_with_becomes_pending(tmp_path):
    async with serving(tmp_path) as library:
        await library.create_image("a", SIZE)
        frozen = await library.begin_checkpoint("web", disks("a"), "", target="one")
    async with serving(tmp_path, checkpoint_resume_timeout_ns=0) as library:
        await until(lambda: [info.state for info in library.checkpoints()] == ["pending"])
        again = await library.begin_checkpoint("web", disks("a"), "", target="two")
        # Only the target that it was sent to can settle it.
        assert (again.pending_at("one"), again.pending_at("two")) == ([frozen.point], [])
        await again.end("discard")
        await until(lambda: len(library.checkpoints()) == 1)
        # Or the operator, where that target is gone for good.
        await library.end_checkpoint(frozen.checkpoint, "discard")
        await until(lambda: library.checkpoints() == [])
        assert library.points("a") == []


async def test_writers_of_one_block_lose_nothing_to_each_others_copy_up(tmp_path):
    async with serving(tmp_path) as library:
        await library.create_image("a", SIZE)
        export = await opened(library, "a")
        await put(export.device, 0, b"0" * 32 * BLOCK)
        await export.device.flush()
        frozen = await library.begin_checkpoint("web", disks("a"), "")
        async with trio.open_nursery() as nursery:
            for block in range(32):
                for part in range(0, BLOCK, 512):
                    nursery.start_soon(
                        export.device.write, block * BLOCK + part, bytes([part // 512 + 65]) * 256
                    )
        row = b"".join(bytes([part + 65]) * 256 + b"0" * 256 for part in range(8))
        assert await export.device.read(0, 32 * BLOCK) == row * 32
        await frozen.end("discard")
        await until(lambda: library.checkpoints() == [])
        assert await export.device.read(0, 32 * BLOCK) == row * 32
        export.close()


async def test_a_begin_that_fails_leaves_nothing(tmp_path):
    """The second disk's bitmap cannot be had: the first one's fork is undone, and writes go on."""
    async with serving(tmp_path) as library:
        for name in ("a", "b"):
            await library.create_image(name, SIZE)
        export = await opened(library, "a")
        await put(export.device, 0, b"1" * BLOCK)
        obstacle = tmp_path / "root/images/b/checkpoint"
        obstacle.write_bytes(b"in the way")
        with pytest.raises(Refused, match="cannot begin"):
            await library.begin_checkpoint("web", disks("a", "b"), "")
        assert [library.points(name) for name in ("a", "b")] == [[], []]
        await until(lambda: library.checkpoints() == [])
        assert os.listdir(tmp_path / "root/checkpoints") == []
        await put(export.device, 0, b"2" * BLOCK)
        obstacle.unlink()
        frozen = await library.begin_checkpoint("web", disks("a", "b"), "")
        assert (await trio.to_thread.run_sync(frozen_bytes, frozen.disks["disk-a"]))[:2] == b"22"
        await frozen.end("discard")
        export.close()
