"""A virtual disk in memory: a device in its own right (``ports.Device``), and what tests serve.

It keeps the same contract as a tracked image (tests/fakes/device_contract.py), holds memory only for the
chunks that were written, and counts what it was asked to do.
"""

import errno
from typing import Final

import attrs
import trio

from diskd.core.ports import Allocation, AllocationKind

CHUNK_BYTES: Final = 64 << 10


@attrs.define
class Statistics:
    """How often each operation was carried out."""

    reads: int = 0
    writes: int = 0
    zeroes: int = 0
    trims: int = 0
    flushes: int = 0


class MemoryDevice:
    """``size_bytes`` of zeroes at first. Read-only devices answer EPERM to whatever would change them."""

    def __init__(self, size_bytes: int, *, is_read_only: bool = False) -> None:
        self._size_bytes = size_bytes
        self._is_read_only = is_read_only
        self._chunks: dict[int, bytearray] = {}
        self._zeroed: set[int] = set()
        self.statistics = Statistics()

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def is_read_only(self) -> bool:
        return self._is_read_only

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """(chunk, begin within it, length) of a range."""
        pieces = []
        end = offset + length
        while offset < end:
            chunk, begin = divmod(offset, CHUNK_BYTES)
            count = min(CHUNK_BYTES - begin, end - offset)
            pieces.append((chunk, begin, count))
            offset += count
        return pieces

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        self.statistics.reads += 1
        parts = []
        for chunk, begin, count in self._pieces(offset, length):
            data = self._chunks.get(chunk)
            parts.append(bytes(count) if data is None else bytes(data[begin : begin + count]))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def begin_in_place(self) -> bool:
        return True

    def read_in_place(self, offset: int, buffer: memoryview) -> bool:
        data = self.read_nowait(offset, len(buffer))
        assert data is not None
        buffer[:] = data
        return True

    def write_in_place(self, offset: int, data: memoryview) -> bool:
        return self.write_nowait(offset, data)

    async def read(self, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        data = self.read_nowait(offset, length)
        assert data is not None
        return data

    def _check_writable(self) -> None:
        if self._is_read_only:
            raise OSError(errno.EPERM, "the device is read-only")

    def write_nowait(self, offset: int, data: bytes | memoryview) -> bool:
        self._check_writable()
        self.statistics.writes += 1
        view = memoryview(data)
        for chunk, begin, count in self._pieces(offset, len(view)):
            target = self._chunks.get(chunk)
            if target is None:
                target = self._chunks[chunk] = bytearray(CHUNK_BYTES)
                self._zeroed.discard(chunk)
            target[begin : begin + count] = view[:count]
            view = view[count:]
        return True

    async def write(self, offset: int, data: bytes | memoryview, *, fua: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        self.write_nowait(offset, data)
        if fua:
            await self.flush()

    def _clear(self, offset: int, length: int, *, allocated: bool) -> None:
        for chunk, begin, count in self._pieces(offset, length):
            if count == CHUNK_BYTES:
                self._chunks.pop(chunk, None)
                if allocated:
                    self._zeroed.add(chunk)
                else:
                    self._zeroed.discard(chunk)
            elif chunk in self._chunks:
                self._chunks[chunk][begin : begin + count] = bytes(count)

    async def write_zeroes(
        self, offset: int, length: int, *, may_trim: bool = True, fua: bool = False
    ) -> None:
        await trio.lowlevel.checkpoint()
        self._check_writable()
        self.statistics.zeroes += 1
        self._clear(offset, length, allocated=not may_trim)
        if fua:
            await self.flush()

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        self._check_writable()
        self.statistics.trims += 1
        self._clear(offset, length, allocated=False)
        if fua:
            await self.flush()

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        self.statistics.flushes += 1

    async def allocation(self, offset: int, length: int) -> list[Allocation]:
        await trio.lowlevel.checkpoint()
        runs: list[Allocation] = []
        for chunk, begin, count in self._pieces(offset, length):
            run = Allocation(chunk * CHUNK_BYTES + begin, count, self._kind(chunk))
            if runs and runs[-1].kind == run.kind:
                runs[-1] = Allocation(runs[-1].offset, runs[-1].length + count, run.kind)
            else:
                runs.append(run)
        return runs

    def _kind(self, chunk: int) -> AllocationKind:
        if chunk in self._chunks:
            return "data"
        return "zero" if chunk in self._zeroed else "hole"
