"""An overlay over real files that fail or wait when told to, and a model of what the guest has written."""

import errno
import os
import random
import threading
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from diskd.core import avhd
from diskd.core.avhd import AvhdMap, Head
from diskd.core.steps import Step, Sync, Write
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
        self.refused = 0
        self.slow: Callable[[Step], bool] | None = None  # which step waits for ``gate``, once
        self.done: list[Step] = []

    def _sync_or_fail(self, descriptor: int) -> None:
        if self.no_sync:
            raise OSError(errno.EIO, "simulated")
        os.fdatasync(descriptor)

    def _step(self, step: Step):
        if self.broken is not None and isinstance(step, Write) and step.file == avhd.DATA_FILE:
            if self.gate is not None:
                self.waits = True
                self.gate.wait()
            self.refused += 1
            raise OSError(self.broken, os.strerror(self.broken))
        if self.slow is not None and self.gate is not None and self.slow(step):
            gate, self.slow, self.waits = self.gate, None, True
            gate.wait()
        result = super()._step(step)
        self.done.append(step)
        return result

    def sync(self, name: str) -> None:
        """Those of the parent come from its layer, past the scripts."""
        super().sync(name)
        self.done.append(Sync(name))


class Rig:
    """The layer, and beside it what its parent held at the cut and what the guest should read now."""

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
        self.noted = 0  # how often tracking was told that the parent changes
        self.raw = RawLayer(self.files, SIZE, self.note)
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

    def note(self) -> None:
        self.noted += 1

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


def only(wanted: Step) -> Callable[[Step], bool]:
    return lambda step: step == wanted


async def waits(files: FailingFiles) -> None:
    with trio.fail_after(20):
        while not files.waits:
            await trio.lowlevel.checkpoint()
