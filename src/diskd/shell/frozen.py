"""The frozen side of a checkpoint: its disks as the exporter reads them, and as read-only NBD exports.

The parent does not change while the overlay is in mode FORKED. Every read looks at that before and after:
the flag is raised in memory before the first fallback write reaches the parent (B2), so that bytes read
while it was still down are frozen ones, and no others are handed out.
"""

import errno
import itertools
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from diskd.core.overlay import Mode
from diskd.core.ports import Allocation, ChangeReport
from diskd.shell.image import Image
from diskd.shell.overlay import OverlayLayer
from diskd.shell.read_only import NoWrites

# Each takes some 120 bytes per extent; a backup asks for one point's changes, seldom for two.
_REPORTS_MAX: Final = 4


class FrozenImage:
    """ports.FrozenDisk."""

    def __init__(self, image: Image, overlay: OverlayLayer, point: str) -> None:
        self._image = image
        self._overlay = overlay
        self._point = point
        self._ended: str | None = None
        self._reports: dict[str, ChangeReport] = {}
        self._reporting = trio.Lock()

    @property
    def image(self) -> str:
        return self._image.name

    @property
    def size_bytes(self) -> int:
        return self._image.size_bytes

    @property
    def block_bytes(self) -> int:
        return self._image.block_bytes

    @property
    def points(self) -> list[str]:
        # Looked up each time: settling a pending point makes it valid while this stands.
        earlier = itertools.takewhile(lambda known: known.id != self._point, self._image.points())
        return [known.id for known in earlier if known.state == "valid"]

    def changes_since(self, point: str) -> ChangeReport:
        return self._image.changes_since(point, until=self._point)

    async def changes(self, point: str) -> ChangeReport:
        """As changes_since, for the loop: read by a thread, once for everybody who looks at this view."""
        self.check()
        async with self._reporting:
            report = self._reports.get(point)
            if report is None:
                report = await trio.to_thread.run_sync(self.changes_since, point)
                while len(self._reports) >= _REPORTS_MAX:
                    del self._reports[next(iter(self._reports))]
                self._reports[point] = report
        return report

    def read_into_nowait(self, offset: int, buffer: bytearray | memoryview) -> bool:
        """As read_into_blocking, from the loop; False where that would take long. The flag does not change
        while this step of the loop lasts, so one look at it is enough."""
        self.check()
        return self._image.raw.read_into_nowait(offset, buffer)

    def allocation_blocking(self, offset: int, length: int) -> list[Allocation]:
        self.check()
        found = self._image.raw.allocation_blocking(offset, length)
        self.check()
        return found

    def read_into_blocking(self, offset: int, buffer: memoryview) -> None:
        self.check()
        self._image.raw.read_into_blocking(offset, buffer)
        self.check()

    async def read(self, offset: int, length: int) -> bytes:
        """As read_into_blocking, from the loop."""
        self.check()
        data = self._image.raw.read_nowait(offset, length)
        if data is None:
            data = await self._image.raw.read(offset, length)
        self.check()
        return data

    async def allocation(self, offset: int, length: int) -> list[Allocation]:
        """As allocation_blocking, from the loop."""
        self.check()
        found = await self._image.raw.allocation(offset, length)
        self.check()
        return found

    def end(self, reason: str) -> None:
        """Nothing is handed out from here on."""
        self._ended = self._ended or reason

    def check(self) -> None:
        """Raises OSError (EIO) unless the frozen view still stands."""
        if self._ended is not None or self._overlay.mode is not Mode.FORKED:
            raise OSError(errno.EIO, self._ended or "the checkpoint has ended")


class FrozenDevice:
    """ports.Device over a frozen disk: read-only."""

    def __init__(self, disk: FrozenImage) -> None:
        self._disk = disk
        writing = NoWrites("a frozen view")
        self.write_in_place = writing.write_in_place
        self.write_nowait, self.write = writing.write_nowait, writing.write
        self.write_zeroes, self.trim, self.flush = writing.write_zeroes, writing.trim, writing.flush

    @property
    def size_bytes(self) -> int:
        return self._disk.size_bytes

    @property
    def is_read_only(self) -> bool:
        return True

    def begin_in_place(self) -> bool:
        self._disk.check()
        return True

    def read_in_place(self, offset: int, buffer: memoryview) -> bool:
        return self._disk.read_into_nowait(offset, buffer)

    def read_into_nowait(self, offset: int, buffer: bytearray) -> bool:
        return self._disk.read_into_nowait(offset, buffer)

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        return None

    async def read(self, offset: int, length: int) -> bytes:
        return await self._disk.read(offset, length)

    async def allocation(self, offset: int, length: int) -> list[Allocation]:
        return await self._disk.allocation(offset, length)


def contexts(disk: FrozenImage) -> dict[str, Callable[[], Awaitable[ChangeReport]]]:
    """Dirty-bitmap contexts of a frozen disk, one per valid point."""

    def report(point: str) -> Callable[[], Awaitable[ChangeReport]]:
        return lambda: disk.changes(point)

    return {point: report(point) for point in disk.points}
