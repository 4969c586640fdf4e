"""The raw file as a layer: the bottom of every image (ports.Layer).

Cached reads and buffered writes happen in place; whatever may take long is one thread hop. While a punch or
a zeroing runs on the file, its other I/O goes by thread too, since the file system makes it wait.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol, TypeVar

import trio

from diskd.core.geometry import RAW
from diskd.core.ports import Allocation
from diskd.shell import files as system

T = TypeVar("T")

DATA_THREADS_MAX: Final = 16
# Beyond this a copy into the page cache takes long enough to be felt by other connections.
IN_PLACE_BYTES_MAX: Final = 1 << 20
# A punch is sliced, so that nothing else waits for long: 64 MiB of scattered extents take about 0.1 s.
SLICE_BYTES: Final = 64 << 20
# In between the file's lock is let go, so that a write comes through: it waits for this much.
_PUNCH_BYTES: Final = 4 << 20
ALLOCATIONS_MAX: Final = 4096


class RawFiles(Protocol):
    """Where the layer gets its descriptor from, and who syncs it (files.Files)."""

    def descriptor(self, name: str) -> int: ...
    def sync(self, name: str) -> None: ...


class RawLayer:
    """``on_write`` is called at the submission and at the end of everything that changes the file; of the
    small writes in place only so often that it is never behind by more than ``slack_ns``."""

    def __init__(
        self, files: RawFiles, size_bytes: int, on_write: Callable[[], None], *, slack_ns: int = 0
    ) -> None:
        self._files = files
        self._descriptor = files.descriptor(RAW)
        self.size_bytes = size_bytes
        self._on_write = on_write
        self._slack_ns = slack_ns
        # A write at a wall clock between these two has been noted already. Both, since clocks are set back.
        self._noted_from = self._noted_until = 0
        self._threads = trio.CapacityLimiter(DATA_THREADS_MAX)
        self._sync_threads = trio.CapacityLimiter(2)
        self._slow = 0
        self._sync_turn = trio.Lock()
        self._sync_wanted = self._sync_done = 0
        self._has_nowait = self._probe()
        self._nowait = os.RWF_NOWAIT if self._has_nowait else 0
        self._scratch = bytearray()
        self.zeroes_fast = system.zeroes_fast(self._descriptor)

    def _probe(self) -> bool:
        """Whether this file system knows RWF_NOWAIT (ext4 and xfs do; tmpfs does not, and never waits)."""
        try:
            os.preadv(self._descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                return False
            raise
        return True

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        if self._slow or length > IN_PLACE_BYTES_MAX:
            return None
        if not self._has_nowait:
            data = os.pread(self._descriptor, length, offset)
            return data if len(data) == length else None
        scratch = self._scratch if length == len(self._scratch) else bytearray(length)
        self._scratch = scratch
        return bytes(scratch) if self.read_into_nowait(offset, scratch) else None

    def read_into_nowait(self, offset: int, buffer: bytearray | memoryview) -> bool:
        """Fill the buffer; False where that would block, or would take long."""
        length = len(buffer)
        if self._slow or length > IN_PLACE_BYTES_MAX:
            return False
        try:
            return os.preadv(self._descriptor, (buffer,), offset, self._nowait) == length
        except BlockingIOError:
            return False

    async def read(self, offset: int, length: int) -> bytes:
        return await self._in_thread(self._read_blocking, offset, length)

    def read_into_blocking(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer; for a worker thread. Raises OSError."""
        while buffer:
            count = os.preadv(self._descriptor, [buffer], offset)
            if count == 0:
                raise OSError(errno.EIO, "disk.raw ends early")
            buffer, offset = buffer[count:], offset + count

    def _read_blocking(self, offset: int, length: int) -> bytes:
        data = system.read_all(self._descriptor, offset, length)
        if len(data) != length:
            raise OSError(errno.EIO, "disk.raw ends early")
        return data

    def write_nowait(self, offset: int, data: bytes | memoryview) -> bool:
        if self._slow or len(data) > IN_PLACE_BYTES_MAX:
            return False
        now = time.time_ns()
        if not self._noted_from <= now < self._noted_until:
            self._on_write()
            self._noted_from, self._noted_until = now, now + self._slack_ns
        if len(data) > system.WRITE_PIECE_BYTES:
            system.write_data(self._descriptor, data, offset)
            return True
        written = os.pwrite(self._descriptor, data, offset)
        if written != len(data):
            system.write_data(self._descriptor, memoryview(data)[written:], offset + written)
        return True

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        if self.write_nowait(offset, data):
            return
        await self._change(system.write_data, self._descriptor, data, offset)

    async def write_zeroes(self, offset: int, length: int, *, may_trim: bool) -> None:
        await self._sliced(self._punch if may_trim else self._zero, offset, length)

    async def flush(self) -> None:
        """fdatasync. A call joins only a sync that has not begun; a failure is final."""
        self._sync_wanted += 1
        mine = self._sync_wanted
        async with self._sync_turn:
            if self._sync_done >= mine:
                return
            covers = self._sync_wanted
            await trio.to_thread.run_sync(self._files.sync, RAW, limiter=self._sync_threads)
            self._sync_done = covers

    async def allocation(self, offset: int, length: int) -> list[Allocation]:
        return await self._in_thread(self.allocation_blocking, offset, length)

    def allocation_blocking(self, offset: int, length: int) -> list[Allocation]:
        """As Device.allocation, for a worker thread."""
        found: list[Allocation] = []
        position, end = offset, offset + length
        while position < end and len(found) < ALLOCATIONS_MAX:
            try:
                data = min(end, os.lseek(self._descriptor, position, os.SEEK_DATA))
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                data = end
            if data > position:
                found.append(Allocation(position, data - position, "hole"))
            if data < end:
                hole = min(end, os.lseek(self._descriptor, data, os.SEEK_HOLE))
                found.append(Allocation(data, hole - data, "data"))
                position = hole
            else:
                position = end
        return found

    async def close(self) -> None:
        """The descriptor belongs to the image's files."""

    async def _sliced(self, change: Callable[[int, int], None], offset: int, length: int) -> None:
        self._slow += 1
        try:
            end = offset + length
            while offset < end:
                part = min(SLICE_BYTES, end - offset)
                await self._change(change, offset, part)
                offset += part
        finally:
            self._slow -= 1

    async def _change(self, change: Callable[..., None], *arguments: object) -> None:
        self._on_write()
        try:
            await self._in_thread(change, *arguments)
        finally:
            self._on_write()

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._threads)

    @contextlib.contextmanager
    def by_thread(self) -> Iterator[None]:
        """While somebody punches the file past this layer (a merge), nothing is done in place."""
        self._slow += 1
        try:
            yield
        finally:
            self._slow -= 1

    def note_change(self) -> None:
        """Tell tracking that somebody who writes past this layer (a merge) is about to change the file, or
        just has: or else the change would be taken for one from outside (T4). From any thread."""
        self._on_write()

    def _punch(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            part = min(_PUNCH_BYTES, end - offset)
            system.punch(self._descriptor, offset, part)
            offset += part

    def _zero(self, offset: int, length: int) -> None:
        try:
            system.fallocate(self._descriptor, system.ZERO_RANGE | system.KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            system.write_zeroes(self._descriptor, offset, length)


def now_ns() -> int:
    """The wall clock by which the kernel stamps files."""
    return time.time_ns()
