"""A real daemon loses its power right after it answered: what the answer promised was durable.

Everything that was not synced is taken back. `make hunt` looks for such moments at random; these are the ones
on which tracking and checkpoints stand.
"""

from contextlib import asynccontextmanager
from random import Random

import pytest
import trio

from daemonkit.diskd_api import BACKUP_RUN, BackupDisk, BackupRequest, ImageName
from daemonkit.units import MiB
from diskd.core import calls, target_calls
from holdfast.crash.client import connect
from holdfast.crash.machine import machine
from holdfast.crash.repository import VM, Target

pytestmark = pytest.mark.slow

BLOCK = 4096
# Nothing is flushed and no region closed by the clock.
SETTINGS = ("tracking_flush_interval=1h",)
RNG = Random(1)


@asynccontextmanager
async def a_machine(*settings):
    async with machine(Random(1), can_lose_power=True, settings=settings or SETTINGS) as made:
        await made.start()
        await made.call(calls.IMAGE_CREATE, calls.CreateImage("d", 4 * MiB))
        yield made


def client(machine, export="d"):
    return connect(machine.nbd.host, machine.nbd.port, export)


async def lose_power(machine):
    await machine.kill()
    machine.lose_power(RNG, "nothing")
    await machine.start()


async def begin(machine):
    return await machine.call(calls.CHECKPOINT_BEGIN, calls.BeginCheckpoint("web", [BackupDisk("d", "d")]))


async def keep(machine, info):
    await machine.call(calls.CHECKPOINT_END, calls.EndCheckpoint(info.checkpoint, "keep"))


async def changed(machine, point):
    found = await machine.call(calls.CHANGES, calls.PointName("d", point))
    return {
        block
        for offset, length in found.extents
        for block in range(offset // BLOCK, (offset + length) // BLOCK)
    }


async def test_a_durable_write_has_a_durable_mark():
    """T1: the region is open on disk before its first write is answered."""
    async with a_machine() as machine:
        info = await begin(machine)
        await keep(machine, info)
        while (await machine.call(calls.IMAGE_SHOW, ImageName("d"))).checkpoint:
            pass  # merged
        async with client(machine) as guest:
            await guest.write(2 * MiB, b"1" * BLOCK, fua=True)
        await lose_power(machine)
        async with client(machine) as guest:
            assert await guest.read(2 * MiB, BLOCK) == b"1" * BLOCK
        assert 2 * MiB // BLOCK in await changed(machine, info.point)


async def test_what_a_backup_has_read_is_durable():
    """T2: no power loss takes back, without a mark, what a frozen view has shown."""
    async with a_machine() as machine:
        async with client(machine) as guest:
            await guest.write(0, b"1" * BLOCK)
        info = await begin(machine)
        views = []
        for _ in range(2):
            async with client(machine, f"d:{info.checkpoint}") as frozen:
                views.append(await frozen.read(0, 4 * MiB))
            await lose_power(machine)
        assert views[0][:BLOCK] == b"1" * BLOCK
        assert views[0] == views[1]


async def test_what_was_flushed_to_the_avhd_is_there():
    """B6: FLUSH made both the AVHD's data and its map durable."""
    async with a_machine() as machine:
        await begin(machine)
        async with client(machine) as guest:
            await guest.write(MiB, b"2" * BLOCK)
            await guest.flush()
        await lose_power(machine)
        async with client(machine) as guest:
            assert await guest.read(MiB, BLOCK) == b"2" * BLOCK


async def test_an_image_that_was_created_is_there():
    async with a_machine() as machine:
        await lose_power(machine)
        assert [info.name for info in (await machine.call(calls.IMAGE_LIST, calls.Nothing())).images] == ["d"]


async def test_a_committed_backup_is_durable_at_the_target(nursery):
    """B5: its name, its files and the directories that lead to it."""
    async with a_machine() as machine:
        target = Target(machine.directory, can_lose_power=True)
        try:
            await nursery.start(target.serve_link)
            await target.start()
            points = []
            for number in range(2):  # a full, then a differential
                async with client(machine) as guest:
                    await guest.write(number * MiB, b"3" * BLOCK)
                request = BackupRequest(VM, [BackupDisk("d", "d")], "", str(target.link))
                points.append((await machine.call(BACKUP_RUN, request)).point)
                await target.kill()
                target.lose_power(RNG, "nothing")
                await target.start()
                found = await target.call(target_calls.VERIFY, target_calls.PointFilter(None, None))
                assert [(point.point, point.problems) for point in found.points] == [
                    (point, []) for point in points
                ]
        finally:
            await target.close()


async def merge_after_a_while(machine, guest):
    """A checkpoint that stands for longer than recovery forgives. Its guest goes on: a region that is open
    stays open as long as new blocks of it are written, and the parent sees nothing of it."""
    info = await begin(machine)
    for block in range(250):
        await guest.write(block * BLOCK, b"4" * BLOCK)
        with trio.move_on_after(0.004):
            await trio.sleep_forever()
    raw = machine.root / "images" / "d" / "disk.raw"
    before = raw.stat().st_mtime_ns
    await keep(machine, info)
    while raw.stat().st_mtime_ns == before:
        await trio.lowlevel.checkpoint()  # until the merge has begun to write
    return info.point


async def is_valid(machine, point):
    infos = (await machine.call(calls.POINT_LIST, ImageName("d"))).points
    return [(info.valid, info.reason) for info in infos if info.point == point] == [(True, None)]


async def test_a_merge_is_not_taken_for_a_change_from_outside():
    """T4: power is lost as a merge begins, when the parent had not been written for a while."""
    async with a_machine("tracking_flush_interval=300ms") as machine:
        async with client(machine) as guest:
            point = await merge_after_a_while(machine, guest)
        await machine.kill()
        machine.lose_power(RNG, "everything")
        await machine.start()
        assert await is_valid(machine, point)


async def test_the_first_writes_after_an_opening_are_not_taken_for_changes_from_outside():
    """Regions that a crash left open take writes at once; power is lost before they are closed."""
    async with a_machine("tracking_flush_interval=500ms") as machine:
        info = await begin(machine)
        await keep(machine, info)
        for keep_all in (False, True):
            async with client(machine) as guest:
                await guest.write(0, b"5" * BLOCK)
            await machine.kill()
            if keep_all:
                machine.lose_power(RNG, "everything")
            # Longer than the two intervals that recovery forgives, from the last write to the next.
            until = trio.current_time() + 1.2
            while trio.current_time() < until:
                await trio.lowlevel.checkpoint()
            await machine.start()
        assert await is_valid(machine, info.point)
