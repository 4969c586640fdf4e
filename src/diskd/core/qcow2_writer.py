"""Writes one qcow2 file from ascending runs, in one pass and with little memory.

Runs come in order, so at any moment at most one cluster is half filled (the *open* cluster) and at most
one L2 table is incomplete; both are written as soon as the runs have passed them. Whole clusters go
straight from the frame to the file. What a partial cluster lacks is filled from the base, or with zeroes
where there is none. Whole zero clusters are marked in the L2 table, and not even that where the base
reads zero anyway.

Whoever can put a range of the guest's bytes into the file without writing it (a reflink of another file's
extents) says so with ``share``; only what it leaves is written.

The header comes last: until ``finish`` the file is no qcow2 file at all.
"""

from collections.abc import Callable
from typing import Final, Protocol

import attrs
import numpy as np

from daemonkit.errors import InvariantBroken
from diskd.core.qcow2 import (
    COPIED,
    REFCOUNT_TABLE_BYTES_MAX,
    TABLE,
    ZERO_FLAG,
    Header,
    check_geometry,
    l1_entries_of,
    pack_header,
)
from diskd.errors import Refused

WriteAt = Callable[[int, bytes | memoryview], None]
# share(guest offset, host offset, length): the ranges (start, end) within it that are still to be written.
Share = Callable[[int, int, int], list[tuple[int, int]]]


@attrs.frozen
class WriterState:
    """Where a file stands between two runs, besides what is in the file: enough to go on in another process.

    The L1 entries below ``l2_index`` are in the file, at their place. ``buffer`` is the filled part of the
    cluster ``open``.
    """

    next: int
    l2_index: int
    l2: bytes
    open: int | None
    buffer: bytes
    position: int


class Base(Protocol):
    """What the new file's backing chain holds. Beyond its end it reads as zeroes."""

    def read(self, offset: int, length: int) -> bytes:
        """Verified bytes, exactly ``length``."""
        ...

    def nonzero_ranges(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(offset, length) of all that is not known to read as zeroes, ascending, clipped to the range."""
        ...


class NoBase:
    """The base of a full: zeroes."""

    def read(self, offset: int, length: int) -> bytes:
        """Zeroes."""
        return bytes(length)

    def nonzero_ranges(self, offset: int, length: int) -> list[tuple[int, int]]:
        """None."""
        return []


class Qcow2Writer:
    """``data`` and ``zero`` in ascending order, then ``finish``."""

    def __init__(
        self,
        write: WriteAt,
        *,
        size_bytes: int,
        cluster_bytes: int,
        backing: str | None = None,
        base: Base | None = None,
        share: Share | None = None,
    ) -> None:
        """``write(offset, data)`` stores into the new, empty file. Raises Refused for impossible sizes."""
        check_geometry(size_bytes, cluster_bytes)
        self._write = write
        self._share = share
        self._size = size_bytes
        self._cluster = cluster_bytes
        self._backing = backing
        self._base: Base = base if base is not None else NoBase()
        self._entries: Final = cluster_bytes // 8
        self._l1 = np.zeros(l1_entries_of(size_bytes, cluster_bytes), dtype=TABLE)
        self._next = 1 + -(-self._l1.nbytes // cluster_bytes)
        self._l2 = np.zeros(self._entries, dtype=TABLE)
        self._l2_index = 0
        self._open: int | None = None
        self._buffer = bytearray(cluster_bytes)
        self._filled = 0
        self._position = 0
        self._l1_saved = 0

    def save(self) -> WriterState:
        """The state now. Raises as ``write``. Good for ``restore`` once the file has been synced."""
        first, self._l1_saved = self._l1_saved, self._l2_index
        if self._l2_index > first:
            self._write(self._cluster + first * 8, self._l1[first : self._l2_index].tobytes())
        filled = bytes(self._buffer[: self._filled]) if self._open is not None else b""
        return WriterState(self._next, self._l2_index, self._l2.tobytes(), self._open, filled, self._position)

    def restore(self, state: WriterState, l1: bytes) -> int:
        """Go on from ``state``, on a new writer of the same file; ``l1``: what the file holds from its second
        cluster on. How long the file should be cut to. Raises Refused where that cannot be."""
        entries = state.l2_index
        fits = 0 <= entries <= len(self._l1) and len(state.l2) == self._l2.nbytes
        if not fits or len(l1) < entries * 8 or len(state.buffer) > self._cluster or state.next < self._next:
            raise Refused("what was kept of an unfinished file does not fit it")
        self._l1[:entries] = np.frombuffer(l1, dtype=TABLE, count=entries)
        self._l2[:] = np.frombuffer(state.l2, dtype=TABLE)
        self._next, self._l2_index, self._l1_saved = state.next, entries, entries
        self._open, self._filled, self._position = state.open, len(state.buffer), state.position
        self._buffer[: self._filled] = state.buffer
        return self._next * self._cluster

    @property
    def l1_bytes(self) -> tuple[int, int]:
        """(offset, length) of the L1 table in the file."""
        return self._cluster, self._l1.nbytes

    def data(self, offset: int, data: bytes | memoryview) -> None:
        """The guest's bytes at ``offset``. Raises Refused out of order or out of bounds, OSError as write."""
        view = memoryview(data)
        self._advance(offset, len(view))
        while view:
            cluster, start = divmod(offset, self._cluster)
            if cluster != self._open and start == 0 and len(view) >= self._cluster:
                self._close_open()
                count = min(len(view) // self._cluster, self._entries - cluster % self._entries)
                taken = count * self._cluster
                host = self._allocate(count)
                self._store(offset, host, view[:taken])
                self._map(cluster, count, host)
            else:
                taken = min(len(view), self._cluster - start)
                self._open_at(cluster, start)
                self._buffer[start : start + taken] = view[:taken]
                self._filled = start + taken
            view, offset = view[taken:], offset + taken

    def zero(self, offset: int, length: int) -> None:
        """The guest reads zeroes in this range. Raises as ``data``."""
        self._advance(offset, length)
        end = offset + length
        while offset < end:
            cluster, start = divmod(offset, self._cluster)
            whole = (end // self._cluster) - cluster
            # The image's last cluster is whole when it is zero up to the image's end.
            if end == self._size and end % self._cluster:
                whole += 1
            if cluster != self._open and start == 0 and whole > 0:
                self._close_open()
                count = min(whole, self._entries - cluster % self._entries)
                self._mark_zero(cluster, count)
                taken = min(count * self._cluster, end - offset)
            else:
                taken = min(end - offset, self._cluster - start)
                self._open_at(cluster, start)
                self._buffer[start : start + taken] = bytes(taken)
                self._filled = start + taken
            offset += taken

    def finish(self) -> int:
        """Tables, refcounts, then the header. The file's size in bytes, which it has then."""
        self._close_open()
        self._flush_l2()
        table_offset, table_clusters = self._refcounts()
        self._write(self._cluster, self._l1.tobytes())
        header = Header(
            size_bytes=self._size,
            cluster_bytes=self._cluster,
            l1_offset=self._cluster,
            l1_entries=len(self._l1),
            refcount_table_offset=table_offset,
            refcount_table_clusters=table_clusters,
            backing=self._backing,
        )
        self._write(0, pack_header(header))
        return self._next * self._cluster

    def _advance(self, offset: int, length: int) -> None:
        if offset < self._position or length < 0 or offset + length > self._size:
            raise Refused(f"range {offset}+{length} is out of order or outside a disk of {self._size} bytes")
        self._position = offset + length

    def _allocate(self, count: int) -> int:
        host = self._next * self._cluster
        self._next += count
        return host

    def _open_at(self, cluster: int, start: int) -> None:
        """Have ``cluster`` open and filled up to ``start``."""
        if cluster != self._open:
            self._close_open()
            self._open, self._filled = cluster, 0
        self._fill_from_base(start)

    def _fill_from_base(self, end: int) -> None:
        if self._open is None or end <= self._filled:
            return
        offset = self._open * self._cluster + self._filled
        length = end - self._filled
        inside = max(0, min(length, self._size - offset))
        self._buffer[self._filled : end] = self._base.read(offset, inside) + bytes(length - inside)
        self._filled = end

    def _close_open(self) -> None:
        if self._open is None:
            return
        self._fill_from_base(self._cluster)
        if self._buffer.count(0) == self._cluster:
            self._mark_zero(self._open, 1)
        else:
            host = self._allocate(1)
            self._store(self._open * self._cluster, host, memoryview(bytes(self._buffer)))
            self._map(self._open, 1, host)
        self._open = None

    def _store(self, offset: int, host: int, data: memoryview) -> None:
        if self._share is None:
            self._write(host, data)
            return
        for start, end in self._share(offset, host, len(data)):
            self._write(host + start, data[start:end])

    def _map(self, cluster: int, count: int, host: int) -> None:
        index = self._select_l2(cluster)
        hosts = host + np.arange(count, dtype=np.uint64) * np.uint64(self._cluster)
        self._l2[index : index + count] = hosts | np.uint64(COPIED)

    def _mark_zero(self, cluster: int, count: int) -> None:
        """Zero marks for those of ``count`` clusters (within one L2 table) where the base holds something."""
        offset = cluster * self._cluster
        length = min(count * self._cluster, self._size - offset)
        for start, size in self._base.nonzero_ranges(offset, length):
            index = self._select_l2(cluster)
            first = start // self._cluster - cluster
            last = (start + size - 1) // self._cluster - cluster
            if not 0 <= first <= last < count:
                raise InvariantBroken(f"the base answered {start}+{size} for {offset}+{length}")
            self._l2[index + first : index + last + 1] = ZERO_FLAG

    def _select_l2(self, cluster: int) -> int:
        table, index = divmod(cluster, self._entries)
        if table != self._l2_index:
            self._flush_l2()
            self._l2_index = table
        return index

    def _flush_l2(self) -> None:
        if self._l2.any():
            host = self._allocate(1)
            self._write(host, self._l2.tobytes())
            self._l1[self._l2_index] = host | COPIED
            self._l2[:] = 0

    def _refcounts(self) -> tuple[int, int]:
        """Every cluster of the file has the count 1, the refcount clusters themselves included."""
        per_block = self._cluster // 2
        blocks = tables = 0
        while True:
            total = self._next + blocks + tables
            needed = -(-total // per_block)
            needed_tables = -(-needed * 8 // self._cluster)
            if (needed, needed_tables) == (blocks, tables):
                break
            blocks, tables = needed, needed_tables
        if tables * self._cluster > REFCOUNT_TABLE_BYTES_MAX:
            raise Refused("the qcow2 file would be too large for its cluster size")
        table_host, block_host = self._allocate(tables), self._allocate(blocks)
        table = np.zeros(tables * self._entries, dtype=TABLE)
        table[:blocks] = block_host + np.arange(blocks, dtype=np.uint64) * np.uint64(self._cluster)
        self._write(table_host, table.tobytes())
        for number in range(blocks):
            counts = np.zeros(per_block, dtype=">u2")
            counts[: min(per_block, total - number * per_block)] = 1
            self._write(block_host + number * self._cluster, counts.tobytes())
        return table_host, tables
