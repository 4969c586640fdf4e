"""One epoch's access to an image: a Device (ports.Device), handed out by ``Image.open_writer``.

One write, in one step of the loop, without a wait between these (for many small writes in one step,
``begin_in_place`` does the first for all of them):

    check()            the writer's epoch is still the newest (S1), else Fenced
    no hold in force   (a cut is being made, B1), else wait and start over
    tracker.admit()    every region touched is durably open and the blocks are marked (T1),
                       else open the regions (group commit) and start over
    layer.write()      submitted
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

import trio

from daemonkit.units import SECOND
from diskd.core.ports import Allocation, Layer
from diskd.core.statistics import IoCounts
from diskd.core.tracker import Tracker
from diskd.core.zero_parts import PART_BYTES_MIN, next_part


class Gate(Protocol):
    """What a writer needs of its image."""

    size_bytes: int
    layer: Layer
    tracker: Tracker
    is_held: bool
    zeroes_are_held: bool
    zeroings: int
    last_io: float | None
    writes: int
    counts: IoCounts

    def require_working(self) -> None: ...
    async def wait_unheld(self) -> None: ...
    async def wait_zeroes_unheld(self) -> None: ...
    def zeroing_done(self) -> None: ...
    async def open_regions(self, offset: int, length: int) -> None: ...
    async def sync_layer(self) -> None: ...
    def write_done(self) -> None: ...


class _Submitted:
    """Counts a call from its submission to its end, for the writer, and for the hold if it changes data."""

    def __init__(self, writer: "Writer", *, changes: bool) -> None:
        self._writer = writer
        self._changes = changes

    def __enter__(self) -> None:
        self._writer.submitted += 1
        if self._changes:
            self._writer.image.writes += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        writer = self._writer
        if isinstance(error, OSError):
            writer.image.counts.errors += 1
        writer.submitted -= 1
        if self._changes:
            writer.image.writes -= 1
            writer.image.write_done()
        if not writer.submitted and writer.idle is not None:
            writer.idle.set()


class Writer:
    """``check`` raises Fenced; it is called in the step of every submission and after every wait."""

    def __init__(self, image: Gate, check: Callable[[], None]) -> None:
        self.image = image
        self.submitted = 0
        self.idle: trio.Event | None = None
        self._zero_part = PART_BYTES_MIN
        self._check = check

    @property
    def size_bytes(self) -> int:
        return self.image.size_bytes

    @property
    def is_read_only(self) -> bool:
        return False

    def _begin(self) -> None:
        self._check()
        self.image.require_working()
        self.image.last_io = trio.current_time()

    async def _admitted(self, offset: int, length: int) -> None:
        """Return in the very step in which the range was marked and may be submitted."""
        image = self.image
        while True:
            self._begin()
            if image.is_held:
                await image.wait_unheld()
            elif image.tracker.admit(offset, length):
                return
            else:
                await image.open_regions(offset, length)

    # ports.InPlace: nothing but this task runs between begin_in_place and the others, so neither the epoch
    # nor a hold nor the layer can change there.

    def begin_in_place(self) -> bool:
        self._begin()
        return True

    def read_in_place(self, offset: int, buffer: memoryview) -> bool:
        return self.image.layer.read_into_nowait(offset, buffer)

    def write_in_place(self, offset: int, data: memoryview) -> bool:
        image = self.image
        if image.is_held or not image.tracker.admit(offset, len(data)):
            return False
        return image.layer.write_nowait(offset, data)

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        self._begin()
        data = self.image.layer.read_nowait(offset, length)
        if data is not None:
            self._count_read(length)
        return data

    def _count_read(self, length: int) -> None:
        self.image.counts.reads += 1
        self.image.counts.read_bytes += length

    def _count_write(self, length: int) -> None:
        self.image.counts.writes += 1
        self.image.counts.written_bytes += length

    def read_into_nowait(self, offset: int, buffer: bytearray) -> bool:
        """As ``read_nowait``, into memory of the caller."""
        self._begin()
        if not self.image.layer.read_into_nowait(offset, buffer):
            return False
        self._count_read(len(buffer))
        return True

    async def read(self, offset: int, length: int) -> bytes:
        self._begin()
        with _Submitted(self, changes=False):
            data = await self.image.layer.read(offset, length)
        self._count_read(length)
        return data

    def write_nowait(self, offset: int, data: bytes | memoryview) -> bool:
        self._begin()
        image = self.image
        if image.is_held or not data or not image.tracker.admit(offset, len(data)):
            return not data
        if not image.layer.write_nowait(offset, data):
            return False
        self._count_write(len(data))
        return True

    async def write(self, offset: int, data: bytes | memoryview, *, fua: bool = False) -> None:
        if data:
            await self._admitted(offset, len(data))
            with _Submitted(self, changes=True):
                await self.image.layer.write(offset, data)
            self._count_write(len(data))
        if fua:
            await self.flush()

    async def write_zeroes(
        self, offset: int, length: int, *, may_trim: bool = True, fua: bool = False
    ) -> None:
        self.image.counts.zeroes += 1
        self.image.counts.zeroed_bytes += length
        await self._zero(offset, length, may_trim=may_trim)
        if fua:
            await self.flush()

    async def _zero(self, offset: int, length: int, *, may_trim: bool) -> None:
        # In parts, so that a huge request neither holds up a cut nor exceeds the bound on open regions.
        end = offset + length
        while offset < end:
            part = min(self._zero_part, end - offset)
            await self._zero_part_of(offset, part, may_trim=may_trim)
            offset += part

    async def _zero_part_of(self, offset: int, length: int, *, may_trim: bool) -> None:
        image = self.image
        while True:
            await self._admitted(offset, length)
            if not image.zeroes_are_held:
                break
            await image.wait_zeroes_unheld()
        began = time.monotonic_ns()
        image.zeroings += 1
        try:
            with _Submitted(self, changes=True):
                await image.layer.write_zeroes(offset, length, may_trim=may_trim)
        finally:
            image.zeroings -= 1
            image.zeroing_done()
        self._zero_part = next_part(self._zero_part, time.monotonic_ns() - began)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self.image.counts.trims += 1
        self.image.counts.trimmed_bytes += length
        await self._zero(offset, length, may_trim=True)
        if fua:
            await self.flush()

    async def flush(self) -> None:
        self._begin()
        counts, begun = self.image.counts, trio.current_time()
        counts.flushes += 1
        try:
            with _Submitted(self, changes=False):
                await self.image.sync_layer()
        finally:
            counts.flush_ns += int((trio.current_time() - begun) * SECOND)

    async def allocation(self, offset: int, length: int) -> list[Allocation]:
        self._begin()
        with _Submitted(self, changes=False):
            return await self.image.layer.allocation(offset, length)
