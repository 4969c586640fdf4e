"""The disks of an export, read and framed: one producer per disk, each in one worker thread at a time.

Producers share nothing, so several run at once (``fill_in_turn``): while one waits for its disk, another
digests or compresses. What they fill are buffers of a common pool, which bounds the memory of all of them
together; the frames of different disks leave in the order in which buffers are full.
"""

import contextlib
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import Final

import attrs
import trio
from blake3 import blake3

from daemonkit.units import KiB
from diskd.core.copy_plan import Run, data_bytes, frames_of
from diskd.core.ports import FrozenDisk
from diskd.core.stream import (
    DATA_BYTES_MAX,
    FRAME,
    NO_DIGEST,
    STORED,
    DiskOrder,
    ExportHeader,
    FrameKind,
    Rows,
    StreamEncoder,
    StreamError,
    by_disk,
)
from diskd.core.stream_zstd import Compressor
from diskd.errors import Refused

# So many disks are read at once. More would help an array of disks, but each thread more is one more that the
# loop, which serves the guests, may find with the interpreter's lock.
DISKS_AT_ONCE: Final = 4
# Compressing takes a whole core for each: the guests keep the other half of them.
_COMPRESSING_SHARE: Final = 2
# Besides those that are being filled: one on the wire, one waiting for it.
BUFFERS_MORE: Final = 2
# Several of the largest frames: what it costs to hand a buffer from thread to thread is shared by them.
BUFFER_BYTES: Final = 4 * (DATA_BYTES_MAX + 16 * KiB)


def disks_at_once(disks: int, compress_level: int) -> int:
    """How many of so many disks are read at once."""
    cores = len(os.sched_getaffinity(0))
    most = max(1, cores // _COMPRESSING_SHARE) if compress_level else DISKS_AT_ONCE
    return min(DISKS_AT_ONCE, disks, most)


class Savings:
    """How much shorter one disk's data became on its way, by compression."""

    def __init__(self) -> None:
        self._frames = array("Q")
        self._bytes = array("Q")

    @property
    def saved_bytes(self) -> int:
        """In all frames so far."""
        return self._bytes[-1] if self._bytes else 0

    def note(self, frames: int, saved_bytes: int) -> None:
        """The disk's first ``frames`` frames are ready, the last of them with so much saved."""
        if saved_bytes:
            self._frames.append(frames)
            self._bytes.append(self.saved_bytes + saved_bytes)

    def go_back(self, frames: int) -> None:
        """Only the first ``frames`` frames have arrived. A buffer that did in part counts as not shorter."""
        count = bisect_right(self._frames, frames)
        del self._frames[count:], self._bytes[count:]


@attrs.frozen(eq=False)
class Prepared:
    """What is about to be sent. ``savings``: one per disk, over all connections that this takes."""

    header: ExportHeader
    plans: list[list[Run]]
    disks: list[FrozenDisk]
    savings: list[Savings]

    @property
    def data_bytes(self) -> int:
        """Payload bytes in total, as the guest sees them."""
        return sum(data_bytes(plan) for plan in self.plans)


@attrs.frozen(eq=False)
class Batch:
    """A buffer's filled part, with so many whole frames in it."""

    buffer: bytearray
    used: int
    frames: int


class DiskProducer:
    """Reads and frames one disk, one buffer per call."""

    def __init__(self, prepared: Prepared, order: DiskOrder) -> None:
        self._disk = prepared.disks[order.number]
        self._savings = prepared.savings[order.number]
        self._order = order
        self._compressor: Compressor | None = None
        self._runs = frames_of(prepared.plans[order.number])
        self._next = next(self._runs, None)

    @property
    def is_done(self) -> bool:
        """Behind the last frame."""
        return self._next is None

    def skip(self, rows: Rows) -> bool:
        """Go on behind these frames; False where they are not those that this disk's plan has here."""
        kinds, offsets, lengths = (rows[name].tolist() for name in ("kind", "offset", "length"))
        for run in zip(kinds, offsets, lengths, strict=True):
            if self._next is None or run != (self._next.kind, self._next.offset, self._next.length):
                return False
            self._next = next(self._runs, None)
        return True

    def begin(self, compress_level: int) -> None:
        """What comes from here on is sent, compressed unless the level is 0."""
        self._compressor = Compressor(compress_level) if compress_level else None
        self._savings.go_back(self._order.frames)

    def fill(self, buffer: bytearray) -> Batch:
        """As many frames as fit, at least one. Raises OSError from the disk."""
        view = memoryview(buffer)
        used = read = saved = 0
        first = number = self._order.frames
        packed: list[memoryview | bytes] = []
        # However well it is compressed, a call reads no more than a buffer: a thread cannot be cancelled.
        while self._next is not None and read < len(buffer):
            run = self._next
            begin = used + FRAME.size
            end = begin + run.length if run.kind is FrameKind.DATA else begin
            if end > len(buffer):
                break
            digest, data = NO_DIGEST, view[begin:end]
            if data:
                self._disk.read_into_blocking(run.offset, data)
                digest = blake3(data).digest()
                read += run.length
            disk = self._order.number
            FRAME.pack_into(view, used, run.kind, 0, disk, number, run.offset, run.length, digest)
            stored = self._compressor.compress(data) if self._compressor and data else None
            if stored is None:
                packed.append(view[used:begin])
            else:
                # Accounted for as what it stands for; on the wire it is of another kind.
                packed.append(bytes(view[used:begin]))
                end = _put_stored(view, used, stored)
                saved += run.length - len(stored) - STORED.size
            used, number = end, number + 1
            self._next = next(self._runs, None)
        if self._next is None:
            # It may have taken tens of MiB at a high level, and there may be many disks.
            self._compressor = None
        headers = b"".join(packed)
        self._order.take_rows(headers)
        self._savings.note(number, saved)
        return Batch(buffer, used, number - first)


def _put_stored(view: memoryview, start: int, stored: bytes) -> int:
    """Make the data frame at ``start`` a compressed one; where it ends."""
    view[start] = FrameKind.ZSTD
    begin = start + FRAME.size
    STORED.pack_into(view, begin, len(stored))
    end = begin + STORED.size + len(stored)
    view[begin + STORED.size : end] = stored
    return end


class Producers:
    """The producers of an export."""

    def __init__(self, prepared: Prepared, encoder: StreamEncoder) -> None:
        self._point = prepared.header.point
        self._encoder = encoder
        self.disks: Final = [DiskProducer(prepared, order) for order in encoder.disks]

    @property
    def unfinished(self) -> list[DiskProducer]:
        """Those that have something left to send."""
        return [producer for producer in self.disks if not producer.is_done]

    def skip(self, packed: bytes) -> None:
        """The receiver has these frames: go on behind them, without reading them again. Raises Refused where
        they are not the ones that the plans of their disks begin with."""
        with contextlib.suppress(StreamError):
            rows = self._encoder.take_rows(packed)
            if all(self.disks[disk].skip(rows[places]) for disk, places in by_disk(rows)):
                return
        raise Refused(
            f"what the target has of {self._point} was sent by another plan; back up again without --resume"
        )

    def begin(self, compress_level: int) -> None:
        """Everything that the receiver has is skipped: what is left is sent, compressed unless this is 0."""
        for producer in self.disks:
            producer.begin(compress_level)

    def digest_blocking(self) -> None:
        """Read what is left, for its digests alone. Raises OSError, trio.Cancelled."""
        buffer = bytearray(BUFFER_BYTES)
        for producer in self.unfinished:
            while not producer.is_done:
                producer.fill(buffer)
                trio.from_thread.check_cancelled()


async def fill_in_turn(
    waiting: Iterator[DiskProducer],
    free: trio.MemoryReceiveChannel[bytearray],
    full: trio.MemorySendChannel[Batch],
    *,
    threads: trio.CapacityLimiter,
) -> None:
    """Read one disk after the other, as long as any is left that nobody has begun with. Raises OSError."""
    async with full:
        for producer in waiting:
            while not producer.is_done:
                buffer = await free.receive()
                await full.send(await trio.to_thread.run_sync(producer.fill, buffer, limiter=threads))
