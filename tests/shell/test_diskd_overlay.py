"""The overlay layer on real files: random work against a model, merging, AVHDs that fail (B2, B6)."""

import errno
import itertools
import os
import threading

import attrs
import pytest
import trio
from diskd_overlay_rig import BLOCK, BLOCKS, HEAD, SIZE, only, rig, waits

from diskd.core import avhd
from diskd.core.avhd import AvhdMap
from diskd.core.overlay import Mode
from diskd.core.space import Reserve
from diskd.core.steps import Punch, Read, Sync, Write


@pytest.mark.parametrize("seed", range(4))
async def test_forked_the_parent_never_changes(tmp_path, seed):
    async with rig(tmp_path, seed) as r:
        await r.work(150)
        assert r.layer.mode is Mode.FORKED and r.path.read_bytes() == r.cut
        assert await r.layer.read(0, SIZE) == r.model
        found = await r.layer.allocation(0, SIZE)
        assert found[0].offset == 0 and sum(part.length for part in found) == SIZE
        assert all(a.offset + a.length == b.offset for a, b in itertools.pairwise(found))
        for part in found:
            if part.kind != "data":
                assert not any(r.model[part.offset : part.offset + part.length])


@pytest.mark.parametrize("seed", range(6))
async def test_a_merge_under_load_arrives(tmp_path, seed):
    async with rig(tmp_path, 100 + seed) as r:
        await r.work(80)
        middle = (BLOCKS // 2) * BLOCK + 500  # within a block: both sides write it
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.work, 150, 0, middle)
            nursery.start_soon(r.work, 150, middle, SIZE)
            await r.merge()
        await r.merge()
        assert r.path.read_bytes() == r.model
        await r.layer.dispose()
        assert sorted(os.listdir(tmp_path)) == ["disk.raw"]
        await r.work(20)  # late calls go to the parent
        assert r.path.read_bytes() == r.model


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("seed", range(4))
async def test_what_the_avhd_cannot_take_goes_to_the_parent(tmp_path, seed, number):
    async with rig(tmp_path, 200 + seed) as r:
        await r.work(60)
        r.files.broken = number
        middle = (BLOCKS // 2) * BLOCK + 500
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.work, 60, 0, middle)
            nursery.start_soon(r.work, 60, middle, SIZE)
        assert r.failures and r.layer.mode is Mode.MERGING
        assert await r.layer.read(0, SIZE) == r.model
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.work, 60, 0, SIZE)
            await r.merge()
        await r.merge()
        assert r.path.read_bytes() == r.model and not r.failed


async def test_a_write_planned_before_the_invalidation_is_planned_anew(tmp_path):
    """Two guests' writes fail at once: the second must not be put into the parent as if the AVHD had the
    rest of its block."""
    async with rig(tmp_path, 7) as r:
        r.files.broken, r.files.gate = errno.ENOSPC, threading.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.layer.write, 3 * BLOCK + 700, b"x")  # planned as a copy-up
            with trio.fail_after(20):
                while not r.files.waits:
                    await trio.lowlevel.checkpoint()
            r.layer.start_merging()
            r.files.gate.set()
        r.model[3 * BLOCK + 700] = ord("x")
        assert await r.layer.read(0, SIZE) == r.model


async def test_a_block_rewritten_all_the_time_does_not_hold_up_the_merge(tmp_path):
    async with rig(tmp_path, 5) as r:
        await r.layer.write(0, b"0" * BLOCK)
        done = False

        async def hammer(offset: int, length: int) -> None:
            count = 0
            while not done:
                count += 1
                data = bytes([count % 256]) * length
                if length > BLOCK or not r.layer.write_nowait(offset, data):
                    await r.layer.write(offset, data)
                r.model[offset : offset + length] = data
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hammer, 0, BLOCK)
            nursery.start_soon(hammer, 4 * BLOCK, 70 * BLOCK)  # always busy
            for _ in range(50):
                await trio.lowlevel.checkpoint()
            with trio.fail_after(30):
                await r.merge()
            done = True
        assert r.path.read_bytes() == r.model


async def test_a_failed_sync_is_final(tmp_path):
    async with rig(tmp_path, 6) as r:
        await r.layer.write(0, b"1" * BLOCK)
        r.files.no_sync = True
        with pytest.raises(OSError, match="sync"):
            await r.layer.flush()
        r.files.no_sync = False
        assert r.failed
        for call in (r.layer.flush, lambda: r.layer.read(0, 1), lambda: r.layer.write(0, b"2")):
            with pytest.raises(OSError, match="sync"):
                await call()


async def test_what_the_avhd_cannot_take_waits_for_the_copy_of_its_block(tmp_path):
    """Else the merge, which has read the block already, would put the older bytes over the newer ones."""
    async with rig(tmp_path, 8) as r:
        await r.layer.write(0, b"1" * BLOCK)
        copied = Write(avhd.PARENT_FILE, 0, b"1" * BLOCK)
        r.files.slow, r.files.gate = only(copied), threading.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.merge)
            await waits(r.files)
            r.files.broken = errno.ENOSPC
            gate, r.files.gate = r.files.gate, None
            nursery.start_soon(r.layer.write, 0, b"2" * BLOCK)
            with trio.fail_after(20):
                while not r.files.refused:
                    await trio.lowlevel.checkpoint()
            newer = Write(avhd.PARENT_FILE, 0, b"2" * BLOCK)
            with trio.move_on_after(0.2):
                while newer not in r.files.done:
                    await trio.lowlevel.checkpoint()
            gate.set()
        r.model[:BLOCK] = b"2" * BLOCK
        assert await r.layer.read(0, SIZE) == r.model == r.path.read_bytes()
        puts = [step for step in r.files.done if isinstance(step, Write) and step.file == avhd.PARENT_FILE]
        assert puts == [copied, newer]


async def test_a_flush_syncs_the_parent_wherever_it_has_unsynced_writes(tmp_path):
    async with rig(tmp_path, 9) as r:

        async def flush() -> list[str]:
            r.files.done.clear()
            await r.layer.flush()
            return [step.file for step in r.files.done if isinstance(step, Sync)]

        await r.layer.write(0, b"1" * BLOCK)
        assert [*dict.fromkeys(await flush())] == [avhd.DATA_FILE, avhd.MAP_FILE, avhd.PARENT_FILE]
        r.layer.parent_is_synced = True  # the cut is durable
        await r.layer.write(0, b"2" * BLOCK)
        assert [*dict.fromkeys(await flush())] == [avhd.DATA_FILE]
        r.layer.start_merging()
        await r.layer.write(BLOCK, b"3" * BLOCK)  # the parent's, from now on
        assert avhd.PARENT_FILE in await flush()


async def test_what_is_written_during_a_flush_is_for_the_next_one(tmp_path):
    async with rig(tmp_path, 10) as r:
        await r.layer.write(0, b"1" * BLOCK)
        await r.layer.flush()
        r.layer.parent_is_synced = True
        await r.layer.write(0, b"2" * BLOCK)
        r.files.slow, r.files.gate = only(Sync(avhd.DATA_FILE)), threading.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.layer.flush)
            await waits(r.files)
            assert r.layer.write_nowait(0, b"3" * BLOCK)
            r.files.gate.set()
        r.files.done.clear()
        await r.layer.flush()
        assert Sync(avhd.DATA_FILE) in r.files.done


async def test_a_merge_clears_no_entries_within_a_flush(tmp_path):
    """The flush writes sectors as they were before, which would vouch again for what is the parent's."""
    async with rig(tmp_path, 11) as r:
        await r.layer.write(0, b"1" * 3 * BLOCK)
        r.model[: 3 * BLOCK] = b"1" * 3 * BLOCK
        r.files.slow = lambda step: isinstance(step, Write) and step.file == avhd.MAP_FILE
        r.files.gate = threading.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.layer.flush)
            await waits(r.files)
            nursery.start_soon(r.merge)
            with trio.move_on_after(0.2):
                while r.layer.map.entries:
                    await trio.lowlevel.checkpoint()
            r.files.gate.set()
        states = AvhdMap.over(HEAD, bytearray(await r.files.run(avhd.load_cells(HEAD))))
        assert states.entries == 0 == r.layer.map.entries
        assert r.path.read_bytes() == r.model


async def test_nothing_is_punched_under_a_read(tmp_path):
    async with rig(tmp_path, 12) as r:
        r.layer.settings = attrs.evolve(r.layer.settings, low_disk_limit=Reserve(size_bytes=1 << 60))
        await r.layer.write(0, b"1" * 3 * BLOCK)
        r.files.slow, r.files.gate = only(Read(avhd.DATA_FILE, 5, 100)), threading.Event()
        found: list[bytes] = []

        async def read() -> None:
            found.append(await r.layer.read(5, 100))

        def is_punched() -> bool:
            return any(isinstance(step, Punch) and step.file == avhd.DATA_FILE for step in r.files.done)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await waits(r.files)
            nursery.start_soon(r.merge)
            with trio.move_on_after(0.2):
                while not is_punched():
                    await trio.lowlevel.checkpoint()
            r.files.gate.set()
        assert found == [b"1" * 100]
        assert is_punched()


async def test_the_avhd_is_not_removed_under_a_read(tmp_path):
    async with rig(tmp_path, 13) as r:
        await r.layer.write(0, b"1" * 3 * BLOCK)
        r.files.slow, r.files.gate = only(Read(avhd.DATA_FILE, 5, 100)), threading.Event()
        found: list[bytes] = []

        async def read() -> None:
            found.append(await r.layer.read(5, 100))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await waits(r.files)
            await r.merge()
            nursery.start_soon(r.layer.dispose)
            with trio.move_on_after(0.2):
                while (tmp_path / avhd.DATA_FILE).exists():
                    await trio.lowlevel.checkpoint()
            r.files.gate.set()
        assert found == [b"1" * 100]


async def test_a_merge_that_is_stopped_lets_the_writes_go_that_waited_for_it(tmp_path):
    """Or whoever stops it, to give the image away, would wait for them."""
    async with rig(tmp_path, 14) as r:
        await r.layer.write(0, b"1" * BLOCK)
        r.files.slow, r.files.gate = only(Write(avhd.DATA_FILE, 0, b"2" * BLOCK)), threading.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.layer.write, 0, b"2" * BLOCK)
            await waits(r.files)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as merging:
                    merging.start_soon(r.merge)
                    with trio.fail_after(20):
                        while r.layer.merge is None or not r.layer.merge.claimed:
                            await trio.lowlevel.checkpoint()
                    scope.cancel()
            r.files.gate.set()
        with trio.fail_after(20):
            await r.layer.write(0, b"3" * BLOCK)
        assert await r.layer.read(0, BLOCK) == b"3" * BLOCK


@pytest.mark.parametrize("length", [BLOCK, 100])
async def test_no_write_in_place_exceeds_the_limit(tmp_path, length):
    async with rig(tmp_path, 15) as r:
        await r.layer.read(0, SIZE)  # at hand, so that blocks are copied up in place
        r.layer.settings = attrs.evolve(r.layer.settings, avhd_limit_bytes=2 * BLOCK)
        taken = [r.layer.write_nowait(block * BLOCK, b"1" * length) for block in (0, 7, 3)]
        assert taken == [True, True, False]
        assert r.layer.map.data_blocks == 2
        assert r.layer.write_nowait(7 * BLOCK + 9, b"2" * 50), "no new block"
        await r.layer.write(3 * BLOCK, b"3" * length)
        assert r.failures and r.layer.mode is Mode.MERGING


async def test_a_block_that_is_copied_up_is_left_alone_meanwhile(tmp_path):
    """Or its other writer's bytes would be lost to what was read before."""
    async with rig(tmp_path, 16) as r:
        r.files.slow = lambda step: isinstance(step, Write) and step.file == avhd.DATA_FILE
        r.files.gate = threading.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.layer.write, 3 * BLOCK + 700, b"x")
            await waits(r.files)
            try:
                assert not r.layer.write_nowait(3 * BLOCK + 900, b"y")
                assert not r.layer.write_nowait(2 * BLOCK, b"z" * 2 * BLOCK)
                assert r.layer.write_nowait(4 * BLOCK, b"f" * BLOCK), "the next one is free"
                nursery.start_soon(r.layer.write, 3 * BLOCK + 900, b"y")
            finally:
                r.files.gate.set()
        assert (await r.layer.read(3 * BLOCK + 700, 1), await r.layer.read(3 * BLOCK + 900, 1)) == (
            b"x",
            b"y",
        )


async def test_what_a_merge_changes_of_the_parent_is_told_to_tracking(tmp_path):
    """Or a crash would find a change that nobody announced, and cost a full backup (T4)."""
    async with rig(tmp_path, 17) as r:
        await r.layer.write(0, b"1" * BLOCK)
        assert r.noted == 0
        await r.merge()
        assert r.noted >= 2, "before it is written, and before it is synced"
