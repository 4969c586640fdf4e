"""Reads the qcow2 files that the repository wrote, and trusts nothing in them.

Every offset is checked against the file before it is used; ``check`` goes through the whole file and
demands that each cluster is used exactly once and counted exactly once, which is what our writer makes.
Foreign qcow2 files are refused: they are QEMU's business.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from diskd.core.qcow2 import (
    CLUSTER_BYTES_MAX,
    COPIED,
    L1_BYTES_MAX,
    OFFSET_MASK,
    TABLE,
    ZERO_FLAG,
    Header,
    parse_header,
)
from diskd.errors import Damaged

ReadAt = Callable[[int, int], bytes]
MapKind: TypeAlias = Literal["data", "zero", "absent"]
# L2 tables kept: enough for a chain read in ascending order, small against a frame.
TABLES_KEPT: Final = 16


@attrs.frozen
class Mapped:
    """A guest range of one kind; ``host`` is where its data lies (0 unless data)."""

    offset: int
    length: int
    kind: MapKind
    host: int

    @property
    def end(self) -> int:
        """The first guest byte behind it."""
        return self.offset + self.length


class Qcow2Reader:
    """One file. ``read(offset, length)`` returns what is there, short only at the end of the file."""

    def __init__(self, read: ReadAt, file_bytes: int) -> None:
        """Raises Damaged."""
        self._read = read
        self._file_bytes = file_bytes
        self.header: Final[Header] = parse_header(read(0, CLUSTER_BYTES_MAX), file_bytes)
        if file_bytes % self.header.cluster_bytes:
            raise Damaged("the file does not end with a whole cluster")
        self._entries: Final = self.header.cluster_bytes // 8
        assert self.header.l1_entries * 8 <= L1_BYTES_MAX
        self._l1 = self._table(self.header.l1_offset, self.header.l1_entries)
        self._present = np.flatnonzero(self._l1)
        self._tables: OrderedDict[int, npt.NDArray[np.uint64]] = OrderedDict()

    def map(self, offset: int, length: int) -> Iterator[Mapped]:
        """The own mapping of a range within the disk, coalesced within each L2 table. Raises Damaged."""
        cluster_bytes = self.header.cluster_bytes
        span = cluster_bytes * self._entries
        end = offset + length
        while offset < end:
            index = offset // span
            stop = min(end, (index + 1) * span)
            l2 = self._l2(index)
            if l2 is None:
                # All of a large hole at once.
                following = int(np.searchsorted(self._present, index))
                if following < len(self._present):
                    stop = min(end, int(self._present[following]) * span)
                else:
                    stop = end
                yield Mapped(offset, stop - offset, "absent", 0)
                offset = stop
                continue
            while offset < stop:
                mapped = self._entry(l2, offset, stop)
                yield mapped
                offset = mapped.end

    def read_mapped(self, mapped: Mapped) -> bytes:
        """The data of a mapped range. Raises Damaged where the file is too short."""
        data = self._read(mapped.host, mapped.length)
        if len(data) != mapped.length:
            raise Damaged("the file ends inside a data cluster")
        return data

    def check(self) -> None:
        """The whole structure: every cluster used once, counted once, no reserved bit. Raises Damaged."""
        cluster_bytes = self.header.cluster_bytes
        total = self._file_bytes // cluster_bytes
        used = np.zeros(total, dtype=np.uint8)

        def use(offsets: npt.NDArray[np.uint64]) -> None:
            numbers = (offsets // cluster_bytes).astype(np.int64)
            if used[numbers].any() or len(np.unique(numbers)) != len(numbers):
                raise Damaged("a cluster is used twice")
            used[numbers] = 1

        def use_range(offset: int, clusters: int) -> None:
            use(np.arange(clusters, dtype=np.uint64) * np.uint64(cluster_bytes) + np.uint64(offset))

        use_range(0, 1)
        use_range(self.header.l1_offset, -(-self.header.l1_entries * 8 // cluster_bytes))
        for index in self._present.tolist():
            l2 = self._l2(index)
            assert l2 is not None
            use_range(int(self._l1[index]) & OFFSET_MASK, 1)
            data = l2[(l2 & np.uint64(ZERO_FLAG)) == 0]
            use(data[data != 0] & np.uint64(OFFSET_MASK))
        self._check_refcounts(use_range, total)
        if not used.all():
            raise Damaged("a cluster belongs to nothing")

    def _check_refcounts(self, use_range: Callable[[int, int], None], total: int) -> None:
        cluster_bytes = self.header.cluster_bytes
        use_range(self.header.refcount_table_offset, self.header.refcount_table_clusters)
        table = self._table(
            self.header.refcount_table_offset, self.header.refcount_table_clusters * self._entries
        )
        per_block = cluster_bytes // 2
        blocks = -(-total // per_block)
        if blocks > len(table) or table[blocks:].any():
            raise Damaged("the refcount table has the wrong size")
        for number in range(blocks):
            offset = int(table[number])
            self._check_offset(offset, cluster_bytes)
            use_range(offset, 1)
            counts = np.frombuffer(self._exactly(offset, cluster_bytes), dtype=">u2")
            here = min(per_block, total - number * per_block)
            if (counts[:here] != 1).any() or counts[here:].any():
                raise Damaged("a refcount is wrong")

    def _l2(self, index: int) -> npt.NDArray[np.uint64] | None:
        entry = int(self._l1[index])
        if entry == 0:
            return None
        if index in self._tables:
            self._tables.move_to_end(index)
            return self._tables[index]
        if entry & COPIED == 0 or entry & ~(COPIED | OFFSET_MASK):
            raise Damaged(f"L1 entry {index} has reserved bits")
        offset = entry & OFFSET_MASK
        self._check_offset(offset, self.header.cluster_bytes)
        table = self._table(offset, self._entries)
        self._check_l2(index, table)
        self._tables[index] = table
        if len(self._tables) > TABLES_KEPT:
            self._tables.popitem(last=False)
        return table

    def _check_l2(self, index: int, table: npt.NDArray[np.uint64]) -> None:
        cluster_bytes = self.header.cluster_bytes
        data = table[(table != 0) & (table != ZERO_FLAG)]
        offsets = data & np.uint64(OFFSET_MASK)
        good = (data == (offsets | np.uint64(COPIED))) & (offsets % cluster_bytes == 0)
        good &= (offsets >= cluster_bytes) & (offsets + np.uint64(cluster_bytes) <= self._file_bytes)
        if not good.all():
            raise Damaged(f"L2 table {index} points outside the file or has reserved bits")

    def _entry(self, l2: npt.NDArray[np.uint64], offset: int, stop: int) -> Mapped:
        """The stretch of one kind, and contiguous in the file, from ``offset`` on."""
        cluster_bytes = self.header.cluster_bytes
        cluster, within = divmod(offset, cluster_bytes)
        index = cluster % self._entries
        last = index + (stop - 1) // cluster_bytes - cluster
        first = int(l2[index])
        rest = l2[index : last + 1]
        if first in (0, ZERO_FLAG):
            expected = np.full(len(rest), first, dtype=np.uint64)
        else:
            expected = np.uint64(first) + np.arange(len(rest), dtype=np.uint64) * np.uint64(cluster_bytes)
        differs = rest != expected
        count = int(differs.argmax()) if differs.any() else len(rest)
        end = min(stop, (cluster + count) * cluster_bytes)
        if first == 0:
            return Mapped(offset, end - offset, "absent", 0)
        if first == ZERO_FLAG:
            return Mapped(offset, end - offset, "zero", 0)
        return Mapped(offset, end - offset, "data", (first & OFFSET_MASK) + within)

    def _check_offset(self, offset: int, length: int) -> None:
        if offset % self.header.cluster_bytes or not 0 < offset <= self._file_bytes - length:
            raise Damaged("a table lies outside the file")

    def _table(self, offset: int, entries: int) -> npt.NDArray[np.uint64]:
        data = np.frombuffer(self._exactly(offset, entries * 8), dtype=TABLE)
        return data.astype(np.uint64)

    def _exactly(self, offset: int, length: int) -> bytes:
        data = self._read(offset, length)
        if len(data) != length:
            raise Damaged("the file is shorter than its tables say")
        return data


def read_chain(layers: Sequence[Qcow2Reader], offset: int, length: int) -> bytes:
    """The guest's bytes as QEMU would read them; ``layers`` from the point itself down to its full.

    Each layer is asked for what those above it leave to it; beyond a layer's end it reads as zeroes.
    """
    if not layers:
        return bytes(length)
    top, below = layers[0], layers[1:]
    inside = max(0, min(length, top.header.size_bytes - offset))
    parts = []
    for mapped in top.map(offset, inside) if inside else ():
        if mapped.kind == "data":
            parts.append(top.read_mapped(mapped))
        elif mapped.kind == "zero":
            parts.append(bytes(mapped.length))
        else:
            parts.append(read_chain(below, mapped.offset, mapped.length))
    parts.append(bytes(length - inside))
    return b"".join(parts)
