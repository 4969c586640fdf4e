"""The frames of a point without their data, and which frame of a chain holds a given range.

Each committed point keeps its export stream without payloads (``export.index``). Together with the
qcow2 files that is enough to read any range of any point and to verify every byte with the digest that
the source computed when it read it (B4): find the newest frame that covers the place, read that whole
frame from that point's own file, compare, take the part that is wanted.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import attrs
import numpy as np
import numpy.typing as npt

from diskd.core.stream import (
    FRAME,
    HEADER_BYTES_MAX,
    PREFIX,
    ExportHeader,
    FrameHeader,
    FrameKind,
    StreamAborted,
    StreamDecoder,
    StreamError,
    Trailer,
)
from diskd.core.stream_frames import ROW, FrameOrder, Rows
from diskd.errors import Damaged


@attrs.frozen(eq=False)
class DiskFrames:
    """One disk's frames in one point, in order; a row of ``digests`` is a frame's digest."""

    size_bytes: int
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.uint8]
    digests: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.starts)

    def header(self, number: int) -> FrameHeader:
        """The frame, numbered within the disk."""
        return FrameHeader(
            FrameKind(int(self.kinds[number])),
            0,
            number,
            int(self.starts[number]),
            int(self.lengths[number]),
            self.digests[number].tobytes(),
        )

    def covering(self, offset: int, end: int) -> Iterator[int]:
        """The numbers of the frames that touch the range."""
        first = int(np.searchsorted(self.starts, offset, side="right")) - 1
        if first < 0 or self.starts[first] + self.lengths[first] <= offset:
            first += 1
        for number in range(first, len(self.starts)):
            if self.starts[number] >= end:
                return
            yield number


@attrs.frozen(eq=False)
class Index:
    """An index file, read and checked."""

    header: ExportHeader
    trailer: Trailer
    disks: dict[str, DiskFrames]


def parse_index(data: bytes) -> Index:
    """A whole index file. The same rules as for a stream (stream.StreamDecoder), and besides that one disk
    comes after the other. Raises Damaged."""
    decoder = StreamDecoder(payloads=False)
    try:
        decoder.feed(data[: PREFIX.size + HEADER_BYTES_MAX])
        header = decoder.next_event()
    except (StreamError, StreamAborted) as error:
        raise _damaged(str(error)) from error
    start = len(decoder.opening)
    if not isinstance(header, ExportHeader) or (len(data) - start) % FRAME.size or len(data) == start:
        raise _damaged("it is not complete")
    rows = np.frombuffer(data, dtype=ROW, offset=start)
    frames = rows[:-1]
    if (np.diff(frames["disk"].astype(np.int64)) < 0).any():
        raise _damaged("its frames are not one disk after the other")
    order = FrameOrder(decoder.opening, [disk.size_bytes for disk in header.disks])
    try:
        order.take_rows(data[start : len(data) - FRAME.size])
    except StreamError as error:
        raise _damaged(str(error)) from error
    trailer = order.trailer()
    if data[len(data) - FRAME.size :] != trailer.pack():
        raise _damaged("the whole digest does not match")
    bounds = np.searchsorted(frames["disk"], np.arange(len(header.disks) + 1))
    parts = [
        _frames_of(disk.size_bytes, frames[one:two])
        for disk, (one, two) in zip(header.disks, pairwise(bounds.tolist()), strict=True)
    ]
    return Index(header, trailer, dict(zip([disk.name for disk in header.disks], parts, strict=True)))


def _frames_of(size_bytes: int, frames: Rows) -> DiskFrames:
    return DiskFrames(
        size_bytes,
        frames["offset"].astype(np.int64),
        frames["length"].astype(np.int64),
        frames["kind"].copy(),
        frames["digest"].copy(),
    )


def _damaged(reason: str) -> Damaged:
    return Damaged(f"the index is damaged: {reason}")


@attrs.frozen
class Piece:
    """A range of the disk and what holds it: frame ``frame`` of layer ``layer``, or nothing (layer -1),
    which reads as zeroes."""

    offset: int
    length: int
    layer: int
    frame: int
    kind: FrameKind


def resolve(layers: Sequence[DiskFrames], offset: int, length: int, *, first: int = 0) -> Iterator[Piece]:
    """Which frames hold a range; ``layers`` from the point itself down to its full. In order, no gaps.

    Beyond the end of a smaller, older layer nothing is held, whatever lies below it (a disk that was
    shrunk and grown again reads zeroes there).
    """
    if length <= 0:
        return
    end = offset + length
    if first >= len(layers):
        yield Piece(offset, length, -1, -1, FrameKind.HOLE)
        return
    layer = layers[first]
    inside = max(offset, min(end, layer.size_bytes))
    for number in layer.covering(offset, inside):
        start = max(offset, int(layer.starts[number]))
        stop = min(inside, int(layer.starts[number] + layer.lengths[number]))
        if start > offset:
            yield from resolve(layers, offset, start - offset, first=first + 1)
        yield Piece(start, stop - start, first, number, FrameKind(int(layer.kinds[number])))
        offset = stop
    if offset < inside:
        yield from resolve(layers, offset, inside - offset, first=first + 1)
        offset = inside
    if offset < end:
        yield Piece(offset, end - offset, -1, -1, FrameKind.HOLE)
