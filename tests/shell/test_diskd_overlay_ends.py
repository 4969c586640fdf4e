"""An overlay whose flush is called off, that is removed under a flush, or stopped when no sync succeeds."""

import threading

import pytest
import trio
from diskd_overlay_rig import BLOCK, BLOCKS, HEAD, only, rig, waits

from diskd.core import avhd
from diskd.core.avhd import AvhdMap
from diskd.core.steps import Sync, Write
from diskd.shell.live_map import recover


async def test_a_cancelled_flush_leaves_nothing_unvouched(tmp_path):
    async with rig(tmp_path, 7) as r:
        await r.layer.write(5 * BLOCK, b"0" * BLOCK)
        await r.layer.flush()
        await r.layer.write(0, b"1" * BLOCK)
        r.files._limiter.total_tokens = 1
        r.files.slow, r.files.gate = only(Write(avhd.DATA_FILE, 5 * BLOCK, b"2" * BLOCK)), threading.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.layer.write, 5 * BLOCK, b"2" * BLOCK)
            await waits(r.files)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as flushing:
                    flushing.start_soon(r.layer.flush)
                    with trio.fail_after(20):
                        while r.layer.map.dirty:  # until it has them, and waits for a thread
                            await trio.lowlevel.checkpoint()
                    scope.cancel()
            r.files.gate.set()
        await r.layer.flush()
        states = AvhdMap.over(HEAD, bytearray(await r.files.run(avhd.load_cells(HEAD))))
        assert states.state(0) == avhd.DATA


async def test_a_cancelled_flush_leaves_no_data_unsynced(tmp_path):
    async with rig(tmp_path, 7) as r:
        await r.layer.write(0, b"0" * BLOCK)
        await r.layer.flush()
        assert r.layer.write_nowait(0, b"1" * BLOCK)
        r.files._limiter.total_tokens = 1
        async with trio.open_nursery() as nursery, r.files._limiter:
            nursery.start_soon(r.layer.flush)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        r.files.done.clear()
        await r.layer.flush()
        assert Sync(avhd.DATA_FILE) in r.files.done


async def test_a_flush_under_way_ends_before_the_avhd_is_removed(tmp_path):
    async with rig(tmp_path, 7) as r:
        await r.layer.write(0, b"1" * BLOCK)
        r.files.slow, r.files.gate = only(Sync(avhd.MAP_FILE)), threading.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.layer.flush)
            await waits(r.files)
            nursery.start_soon(r.layer.dispose)
            await trio.testing.wait_all_tasks_blocked()
            waiting = r.layer.map_turn.statistics().tasks_waiting
            r.files.gate.set()
        assert waiting


@pytest.mark.parametrize("is_synced", [True, False])
async def test_a_stop_that_cannot_sync_leaves_the_mapped_copy_to_be_believed(tmp_path, is_synced):
    """The guest goes on, and its writes were acknowledged: without their entries they would be lost to it."""
    async with rig(tmp_path, 7) as r:
        await r.layer.write(0, b"1" * BLOCK)
        r.files.no_sync = not is_synced
        await r.layer.close()
        assert bool(r.failed) == (not is_synced)
    left = recover(tmp_path, HEAD.live_nonce, avhd.cell_bytes(BLOCKS), "boot")
    if is_synced:
        assert left is None
    else:
        assert left is not None and AvhdMap.over(HEAD, bytearray(left)).state(0) == avhd.DATA
