"""The overlay layer on real files: random work against a model, merging, AVHDs that fail (B2, B6)."""

import errno
import itertools
import os
import random
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from diskd.core import avhd
from diskd.core.avhd import AvhdMap, Head
from diskd.core.overlay import Mode
from diskd.core.steps import Step, Write
from diskd.shell.files import Files
from diskd.shell.live_map import LiveMap
from diskd.shell.overlay import OverlayLayer
from diskd.shell.overlay_settings import OverlaySettings
from diskd.shell.raw_layer import RawLayer

BLOCK = 4096
BLOCKS = 150
SIZE = BLOCKS * BLOCK - 1024  # the last block is a short one
HEAD = Head("cp-0123456789abcdef", "uuid", SIZE, BLOCK, "0011223344556677", "live")


class FailingFiles(Files):
    """Files whose AVHD takes no more writes while ``broken``, and whose syncs fail while ``no_sync``."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, sync=self._sync_or_fail)
        self.broken: int | None = None
        self.no_sync = False
        self.gate: threading.Event | None = None  # writes to the AVHD wait for it
        self.waits = False

    def _sync_or_fail(self, descriptor: int) -> None:
        if self.no_sync:
            raise OSError(errno.EIO, "simulated")
        os.fdatasync(descriptor)

    def _step(self, step: Step):
        if self.broken is not None and isinstance(step, Write) and step.file == avhd.DATA_FILE:
            if self.gate is not None:
                self.waits = True
                self.gate.wait()
            raise OSError(self.broken, os.strerror(self.broken))
        return super()._step(step)


class Rig:
    def __init__(self, directory: Path, rng: random.Random) -> None:
        self.rng = rng
        self.model = bytearray(rng.randbytes(SIZE))
        (directory / "checkpoint").mkdir()
        (directory / "disk.raw").write_bytes(self.model)
        self.cut = bytes(self.model)
        self.path = directory / "disk.raw"
        self.files = FailingFiles(directory)
        self.files.run_blocking(avhd.create(HEAD))
        live = LiveMap.create(directory, HEAD.live_nonce, bytes(avhd.cell_bytes(BLOCKS)), "boot")
        self.raw = RawLayer(self.files, SIZE, lambda: None)
        self.failures: list[str] = []
        self.failed: list[str] = []
        self.layer = OverlayLayer(
            directory,
            AvhdMap.over(HEAD, live.cells),
            live,
            self.raw,
            self.files,
            OverlaySettings(8 * BLOCK, None),
            on_failure=self.on_failure,
            fail=self.failed.append,
        )

    async def on_failure(self, reason: str) -> None:
        if not self.failures:
            assert self.path.read_bytes() == self.cut, "nothing reached the parent before the invalidation"
        self.failures.append(reason)
        await trio.lowlevel.checkpoint()
        self.layer.start_merging()

    async def work(self, count: int, low: int = 0, high: int = SIZE) -> None:
        """Within [low, high), which nobody else writes; every read is checked."""
        for _ in range(count):
            length = self.rng.choice((1, 300, BLOCK, 2 * BLOCK, 3 * BLOCK + 7, 20 * BLOCK))
            offset = self.rng.randrange(low, high - length)
            if self.rng.random() < 0.5:
                offset = max(low, offset - offset % BLOCK)
            kind = self.rng.choice(("write", "write", "in place", "zero", "read", "read", "flush"))
            if kind in ("write", "in place"):
                data = self.rng.randbytes(length)
                if kind == "write" or not self.layer.write_nowait(offset, data):
                    await self.layer.write(offset, data)
                self.model[offset : offset + length] = data
            elif kind == "zero":
                await self.layer.write_zeroes(offset, length, may_trim=True)
                self.model[offset : offset + length] = bytes(length)
            elif kind == "flush":
                await self.layer.flush()
            else:
                data = self.layer.read_nowait(offset, length) or await self.layer.read(offset, length)
                assert data == self.model[offset : offset + length]

    async def merge(self) -> None:
        while True:
            await self.layer.run_merge()
            if self.layer.map.entries == 0:
                return


@asynccontextmanager
async def rig(tmp_path, seed: int):
    made = Rig(tmp_path, random.Random(seed))
    try:
        yield made
    finally:
        made.layer.abandon()
        made.files.close()


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


async def test_a_cancelled_flush_leaves_nothing_unvouched(tmp_path):
    async with rig(tmp_path, 7) as r:
        await r.layer.write(0, b"1" * BLOCK)
        with trio.CancelScope() as scope:
            scope.cancel()
            await r.layer.flush()
        await r.layer.flush()
        states = AvhdMap.over(HEAD, bytearray(await r.files.run(avhd.load_cells(HEAD))))
        assert states.state(0) == avhd.DATA
