"""A checkpoint that an interrupted backup left standing: gone on with, abandoned, or given up in time."""

from contextlib import asynccontextmanager

import pytest
import trio
from diskd_libraries import hosts

from daemonkit.diskd_api import BackupDisk
from diskd.core.inventory import LibrarySettings
from diskd.errors import Refused
from diskd.shell.library import open_library

KiB = 1 << 10
BLOCK = 4096
DISKS = [BackupDisk("system", "a")]
HOUR_NS = 3600 * 10**9


def settings(tmp_path, **changes):
    shared = tmp_path / "shared"
    shared.mkdir(exist_ok=True)
    return LibrarySettings(shared_dir=str(shared), merge_batch_bytes=64 * KiB, **changes)


@asynccontextmanager
async def serving(tmp_path, **changes):
    async with open_library(tmp_path / "root", settings(tmp_path, **changes)) as library:
        yield library


async def until(condition):
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await trio.sleep(0.01)


async def write(library, block, data):
    export = await library.open("a", peer="test", drop=lambda _reason: None)
    await export.device.write(block * BLOCK, data)
    export.close()


def frozen_block(frozen, block):
    buffer = bytearray(BLOCK)
    frozen.disks["system"].read_into_blocking(block * BLOCK, memoryview(buffer))
    return bytes(buffer)


async def interrupted(library):
    await library.create_image("a", 1 << 20)
    await write(library, 1, b"1" * BLOCK)
    frozen = await library.begin_checkpoint("web", DISKS, "name = 'web'\n", target="one")
    await write(library, 1, b"2" * BLOCK)
    return frozen


async def test_the_same_checkpoint_is_gone_on_with(tmp_path):
    async with serving(tmp_path) as library:
        first = await interrupted(library)
        with pytest.raises(Refused, match="held by a backup that runs"):
            await library.resume_checkpoint("web")
        await first.suspend()
        with pytest.raises(Refused, match="no interrupted backup of other"):
            await library.resume_checkpoint("other")
        again = await library.resume_checkpoint("web")
        assert (again.point, again.target, again.config) == (first.point, "one", "name = 'web'\n")
        assert frozen_block(again, 1) == b"1" * BLOCK
        with pytest.raises(Refused, match="is held"):
            await library.begin_checkpoint("web", DISKS, "")
        await again.end("keep")
        assert [info.valid for info in library.points("a")] == [True]
        assert (await library.changes("a", first.point)).extents == [(BLOCK, BLOCK)]


async def test_it_survives_the_daemon(tmp_path):
    with hosts(tmp_path) as storage:
        async with storage.doomed("n1") as library:
            first = await interrupted(library)
        async with storage.serving("n1") as library:
            await until(lambda: library.checkpoints())
            again = await library.resume_checkpoint("web")
            assert again.point == first.point
            assert frozen_block(again, 1) == b"1" * BLOCK
            await again.end("keep")
            assert (await library.changes("a", first.point)).extents == [(BLOCK, BLOCK)]


async def test_a_new_backup_abandons_it(tmp_path):
    async with serving(tmp_path) as library:
        first = await interrupted(library)
        await first.suspend()
        with trio.fail_after(20):
            second = await library.begin_checkpoint("web", DISKS, "", target="one")
        assert second.pending_at("one") == [first.point]
        assert frozen_block(second, 1) == b"2" * BLOCK
        await second.settle(first.point, committed=False)
        await second.end("keep")
        assert [info.point for info in library.points("a")] == [second.point]


async def test_a_backup_of_its_image_as_another_vms_abandons_it_too(tmp_path):
    async with serving(tmp_path) as library:
        first = await interrupted(library)
        await first.suspend()
        with trio.fail_after(20):
            second = await library.begin_checkpoint("other", DISKS, "")
        assert frozen_block(second, 1) == b"2" * BLOCK
        await second.end("discard")
        assert [info.point for info in library.points("a")] == [first.point], "pending"


async def test_it_is_given_up_in_time_unless_somebody_came_back(tmp_path):
    async with serving(tmp_path, checkpoint_resume_timeout_ns=HOUR_NS) as library:
        first = await interrupted(library)
        library._checkpoints.resume_timeout_ns = 0
        await first.suspend()
        await until(lambda: [info.state for info in library.checkpoints()] == ["pending"])
        with pytest.raises(Refused, match="no interrupted backup"):
            await library.resume_checkpoint("web")


async def test_it_is_not_given_up_under_whoever_came_back(tmp_path, autojump_clock):
    """Also where that one is interrupted in turn: the time begins anew."""
    del autojump_clock
    async with serving(tmp_path, checkpoint_resume_timeout_ns=HOUR_NS) as library:
        first = await interrupted(library)
        await first.suspend()
        await trio.sleep(1800)
        again = await library.resume_checkpoint("web")
        await trio.sleep(1801)
        assert [info.state for info in library.checkpoints()] == ["sealed"]
        await again.suspend()
        await trio.sleep(3500)
        assert [info.state for info in library.checkpoints()] == ["sealed"]
        await (await library.resume_checkpoint("web")).end("keep")


async def test_one_that_is_no_longer_good_does_not_stand(tmp_path):
    async with serving(tmp_path) as library:
        first = await interrupted(library)
        await library._checkpoints.invalidator(library._checkpoints.find(first.checkpoint))("a test")
        await first.suspend()
        await until(lambda: [info.state for info in library.checkpoints()] == ["pending"])


async def test_one_that_is_no_longer_good_is_not_gone_on_with(tmp_path):
    async with serving(tmp_path) as library:
        first = await interrupted(library)
        await first.suspend()
        held = library._checkpoints.find(first.checkpoint)
        held.invalid = True
        with pytest.raises(Refused, match="no longer good"):
            await library.resume_checkpoint("web")
        again = await library.begin_checkpoint("web", DISKS, "")
        await again.end("discard")
