"""The frames of a point without their data, and which frame of a chain holds a given range.

Each committed point keeps its export stream without payloads (``export.index``). Together with the
qcow2 files that is enough to read any range of any point and to verify every byte with the digest that
the source computed when it read it (B4): find the newest frame that covers the place, read that whole
frame from that point's own file, compare, take the part that is wanted.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from diskd.core.stream import (
    ExportHeader,
    Frame,
    FrameHeader,
    FrameKind,
    StreamAborted,
    StreamDecoder,
    StreamError,
    Trailer,
)
from diskd.errors import Damaged

_PORTION: Final = 1 << 20


@attrs.frozen(eq=False)
class DiskFrames:
    """One disk's frames in one point, in order."""

    size_bytes: int
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.uint8]
    digests: list[bytes]

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
            self.digests[number],
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


class IndexReader:
    """Feed the bytes of an index file, then ``finish``."""

    def __init__(self) -> None:
        self._decoder = StreamDecoder(payloads=False)
        self._header: ExportHeader | None = None
        self._trailer: Trailer | None = None
        self._frames: list[list[FrameHeader]] = []

    def feed(self, data: bytes) -> None:
        """Raises Damaged."""
        try:
            self._decoder.feed(data)
            while (event := self._decoder.next_event()) is not None:
                if isinstance(event, Frame):
                    self._frames[event.header.disk].append(event.header)
                elif isinstance(event, ExportHeader):
                    self._header = event
                    self._frames = [[] for _ in event.disks]
                else:
                    self._trailer = event
        except (StreamError, StreamAborted) as error:
            raise Damaged(f"the index is damaged: {error}") from error

    def finish(self) -> Index:
        """Raises Damaged for an index that is not complete."""
        if self._header is None or self._trailer is None:
            raise Damaged("the index is not complete")
        disks = {
            disk.name: _arrays(disk.size_bytes, frames)
            for disk, frames in zip(self._header.disks, self._frames, strict=True)
        }
        return Index(self._header, self._trailer, disks)


def _arrays(size_bytes: int, frames: Sequence[FrameHeader]) -> DiskFrames:
    return DiskFrames(
        size_bytes,
        np.array([frame.offset for frame in frames], dtype=np.int64),
        np.array([frame.length for frame in frames], dtype=np.int64),
        np.array([frame.kind for frame in frames], dtype=np.uint8),
        [frame.digest for frame in frames],
    )


def parse_index(data: bytes) -> Index:
    """A whole index at once. Raises Damaged."""
    reader = IndexReader()
    view = memoryview(data)
    for start in range(0, len(view), _PORTION):
        reader.feed(bytes(view[start : start + _PORTION]))
    return reader.finish()


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
