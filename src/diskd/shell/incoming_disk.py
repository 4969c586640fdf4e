"""One disk of a point in the making: its qcow2 file, and its part of the index.

Frames of several disks come in any order among each other, so each disk has its files open from its first
frame until the commit. The index that a point keeps holds one disk after the other: each disk's headers are
gathered in a part of their own, and put together at the end.
"""

import os
from collections.abc import Callable, Iterator
from typing import Final

import attrs
from blake3 import blake3

from daemonkit.errors import HoldfastError
from daemonkit.units import KiB, MiB
from diskd.core.partial import DiskProgress
from diskd.core.qcow2 import FULL_CLUSTER_BYTES
from diskd.core.qcow2_writer import Base, Qcow2Writer, Share
from diskd.core.stream import FRAME, DiskHeader, FrameBatch, FrameHeader, FrameKind, Places, Rows
from diskd.errors import Damaged
from diskd.shell.repository_files import RepositoryFiles

# Dirty pages go to the disk in such portions while more is received, so that the final sync is short.
WRITEBACK_BYTES: Final = 16 * MiB
# Smaller writes are gathered as long as they follow one another.
STAGED_BYTES: Final = 256 * KiB
_INDEX_BUFFER_BYTES: Final = 256 * KiB
_READ_BYTES: Final = 1 * MiB


class Unusable(HoldfastError):
    """What is left of an unfinished point is not what its record says: it begins anew."""


@attrs.frozen(eq=False)
class DiskPlan:
    """What a disk's file is made from. ``backing`` and ``base``: of a differential, or None. ``share``: what
    puts bytes into the file behind this descriptor without writing them (shell/sharing.py)."""

    number: int
    header: DiskHeader
    backing: str | None = None
    base: Base | None = None
    share: Callable[[int], Share] | None = None

    @property
    def cluster_bytes(self) -> int:
        """Of the qcow2 file."""
        return self.header.cluster_bytes if self.backing else FULL_CLUSTER_BYTES


class IncomingDisk:
    """Takes the frames of one disk in order; blocking, one thread at a time."""

    def __init__(self, files: RepositoryFiles, plan: DiskPlan, descriptor: int, index: int) -> None:
        """``descriptor`` and ``index``: of its two files, which stay the caller's to close. Raises Refused
        for impossible sizes."""
        self.plan = plan
        self.descriptor = descriptor
        self.index = index
        self.frames = 0
        self.data_bytes = 0
        # What is durable, as recorded.
        self.recorded: DiskProgress | None = None
        self._files = files
        self._index_buffer = bytearray()
        self._index_bytes = 0
        self._headers = blake3()
        self._staged = bytearray()
        self._staged_offset = 0
        self._writing_back = 0
        self._writer = Qcow2Writer(
            self._write,
            size_bytes=plan.header.size_bytes,
            cluster_bytes=plan.cluster_bytes,
            backing=plan.backing,
            base=plan.base,
            share=plan.share(descriptor) if plan.share else None,
        )

    @property
    def has_news(self) -> bool:
        """Whether there is more than what is recorded."""
        return self.frames != (self.recorded.frames if self.recorded else 0)

    def frame(self, header: FrameHeader, data: bytes) -> None:
        """One frame, verified. Raises Refused, Damaged, OSError."""
        self._range(header.kind, header.offset, header.length, data)
        self._note(header.pack(), 1)

    def batch(self, batch: FrameBatch, rows: Rows, places: Places) -> None:
        """The frames at ``places`` of the batch, which are this disk's, verified. Raises as ``frame``."""
        mine = rows[places]
        kinds, offsets, lengths = (mine[name].tolist() for name in ("kind", "offset", "length"))
        numbers = range(len(rows))[places] if isinstance(places, slice) else places.tolist()
        for number, kind, offset, length in zip(numbers, kinds, offsets, lengths, strict=True):
            data = batch.payload(number, length) if kind == FrameKind.DATA else b""
            self._range(kind, offset, length, data)
        self._note(batch.packed if isinstance(places, slice) else mine.tobytes(), len(mine))

    def _range(self, kind: int, offset: int, length: int, data: bytes | memoryview) -> None:
        if kind == FrameKind.DATA:
            self._writer.data(offset, data)
            self.data_bytes += length
        else:
            self._writer.zero(offset, length)

    def _note(self, headers: bytes, count: int) -> None:
        self._index_buffer += headers
        self.frames += count
        if len(self._index_buffer) >= _INDEX_BUFFER_BYTES:
            self._flush_index()

    def finish(self) -> int:
        """Everything has come; the size of the qcow2 file. Raises Refused, Damaged, OSError."""
        size = self._writer.finish()
        self._flush_staged()
        self._flush_index()
        self._files.set_size(self.descriptor, size)
        return size

    def headers(self, portion_bytes: int = _READ_BYTES) -> Iterator[bytes]:
        """The headers so far as they are in the file, in portions of whole ones. Raises Damaged, OSError."""
        portion_bytes -= portion_bytes % FRAME.size
        offset, end = 0, self._index_bytes
        while offset < end:
            wanted = min(portion_bytes, end - offset)
            data = os.pread(self.index, wanted, offset)
            if len(data) != wanted:
                raise Damaged(f"disk {self.plan.header.name}: its part of the index ends early")
            yield data
            offset += len(data)

    # --- what is left of it when the connection breaks ---------------------------------------------

    def progress(self) -> DiskProgress:
        """The state now: a record of it is good once both files have been synced. Raises OSError."""
        writer = self._writer.save()
        self._flush_staged()
        self._flush_index()
        number = self.plan.number
        return DiskProgress(number, self.frames, self.data_bytes, self._headers.digest(), writer)

    def restore(self, progress: DiskProgress) -> None:
        """Go on from a record, on the same files. Raises Unusable, Refused, OSError."""
        self._index_bytes = progress.frames * FRAME.size
        try:
            for data in self.headers():
                self._headers.update(data)
        except Damaged as error:
            raise Unusable(str(error)) from error
        if self._headers.digest() != progress.headers_digest:
            raise Unusable(f"disk {self.plan.header.name}: its part of the index is not what was recorded")
        self._files.set_size(self.index, self._index_bytes)
        offset, length = self._writer.l1_bytes
        l1 = os.pread(self.descriptor, length, offset).ljust(length, b"\0")
        self._files.set_size(self.descriptor, self._writer.restore(progress.writer, l1))
        self.frames, self.data_bytes, self.recorded = progress.frames, progress.data_bytes, progress

    # --- files -----------------------------------------------------------------------------------

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        # The clusters of a scattered differential follow one another in the file: written one by one they
        # would cost a system call each.
        end = self._staged_offset + len(self._staged)
        if len(data) >= STAGED_BYTES or (self._staged and offset != end):
            self._flush_staged()
        if len(data) >= STAGED_BYTES:
            self._write_now(offset, data)
            return
        if not self._staged:
            self._staged_offset = offset
        self._staged += data
        if len(self._staged) >= STAGED_BYTES:
            self._flush_staged()

    def _flush_staged(self) -> None:
        if self._staged:
            self._write_now(self._staged_offset, self._staged)
            self._staged = bytearray()

    def _write_now(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._files.write(self.descriptor, offset, memoryview(data))
        # The writer allocates in ascending order: what lies behind is not touched again, but for its header.
        end = offset + len(data)
        if end - self._writing_back >= WRITEBACK_BYTES:
            self._files.start_writeback(self.descriptor, self._writing_back, end - self._writing_back)
            self._writing_back = end

    def _flush_index(self) -> None:
        if not self._index_buffer:
            return
        self._files.write(self.index, self._index_bytes, bytes(self._index_buffer))
        self._headers.update(self._index_buffer)
        self._index_bytes += len(self._index_buffer)
        self._index_buffer.clear()
