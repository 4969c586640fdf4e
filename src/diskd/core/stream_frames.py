"""The frames of an export stream: a header's bytes, and the rules that make a sequence of them one export.

The rules exist once (``FrameOrder``) in two speeds: frame by frame, and for a whole batch of headers at once,
since a differential of scattered 4 KiB blocks has tens of thousands of frames, and must not pay for each
what a frame of 1 MiB may cost. Both are tested to agree.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final, NoReturn, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from daemonkit.errors import ProtocolError
from daemonkit.units import SIZE_BYTES_MAX, MiB

FRAME: Final = struct.Struct(">BBHIQQ32s")
DIGEST_BYTES: Final = 32
NO_DIGEST: Final = bytes(DIGEST_BYTES)
# A frame is what is read, digested, sent and verified at once; larger ones gain nothing (measured: 1 MiB).
DATA_BYTES_MAX: Final = 1 * MiB
FRAMES_MAX: Final = 1 << 32
# Sectors of QEMU's block layer: every size and every frame edge but an image's end is a multiple.
SECTOR_BYTES: Final = 512
# FRAME as numpy sees it.
ROW: Final = np.dtype(
    [
        ("kind", "u1"),
        ("reserved", "u1"),
        ("disk", ">u2"),
        ("number", ">u4"),
        ("offset", ">u8"),
        ("length", ">u8"),
        ("digest", "u1", (DIGEST_BYTES,)),
    ]
)
Rows: TypeAlias = npt.NDArray[np.void]
# What a scan for frames looks at: kind and length.
_KIND_AND_LENGTH: Final = struct.Struct(">B15xQ")


class StreamError(ProtocolError):
    """The stream is not what this format allows; nothing of it may be kept."""


class FrameKind(IntEnum):
    """What a frame says of its range. Zero reads as zeroes and was allocated; a hole was not."""

    DATA = 1
    ZERO = 2
    HOLE = 3
    END = 255
    ABORT = 254


@attrs.frozen
class FrameHeader:
    """``number`` counts all frames of the stream from 0."""

    kind: FrameKind
    disk: int
    number: int
    offset: int
    length: int
    digest: bytes

    def pack(self) -> bytes:
        """The 56 bytes."""
        return FRAME.pack(self.kind, 0, self.disk, self.number, self.offset, self.length, self.digest)

    @property
    def end(self) -> int:
        """The first byte behind the range."""
        return self.offset + self.length


@attrs.frozen
class Trailer:
    """The stream is complete: ``digest`` is the whole digest, ``disk_digests`` one per disk."""

    frames: int
    data_bytes: int
    digest: bytes
    disk_digests: list[bytes]

    def pack(self) -> bytes:
        """The 56 bytes."""
        return FRAME.pack(FrameKind.END, 0, 0, self.frames, self.data_bytes, 0, self.digest)


_RANGES: Final = frozenset((FrameKind.DATA, FrameKind.ZERO, FrameKind.HOLE))
# For so few, numpy's dozen of calls costs more than going through them one by one.
_FEW_ROWS: Final = 12


def refuse(text: str) -> NoReturn:
    """Raises StreamError."""
    raise StreamError(text)


class FrameOrder:
    """Accounts for the frames of one stream in order; shared by every reader and writer."""

    def __init__(self, opening: bytes, sizes: Sequence[int]) -> None:
        """``opening``: prefix and header, verbatim; ``sizes``: of the disks."""
        self.frames = 0
        self.data_bytes = 0
        self._sizes = sizes
        self._size_of = np.array(sizes, dtype=np.int64)
        self._disk = 0
        self._end = 0
        self._whole = blake3(opening)
        self._disks = [blake3() for _ in sizes]

    def take(self, packed: bytes | memoryview, frame: FrameHeader) -> None:
        """Account for one frame. Raises StreamError."""
        if frame.number != self.frames or self.frames >= FRAMES_MAX - 1:
            refuse(f"frame {frame.number} came where {self.frames} was due")
        if not self._disk <= frame.disk < len(self._sizes):
            refuse(f"frame {frame.number}: disk {frame.disk} is out of order")
        if frame.disk != self._disk:
            self._disk, self._end = frame.disk, 0
        size = self._sizes[frame.disk]
        if frame.offset < self._end or frame.length <= 0 or frame.end > size:
            refuse(f"frame {frame.number}: its range is out of order or outside the disk")
        if frame.offset % SECTOR_BYTES or frame.length % SECTOR_BYTES:
            refuse(f"frame {frame.number}: its range is not in whole sectors")
        if frame.kind is FrameKind.DATA:
            if frame.length > DATA_BYTES_MAX:
                refuse(f"frame {frame.number}: {frame.length} bytes of data are too many")
            self.data_bytes += frame.length
        elif frame.digest != NO_DIGEST:
            refuse(f"frame {frame.number}: a range without data has no digest")
        self._end = frame.end
        self.frames += 1
        self._whole.update(packed)
        self._disks[frame.disk].update(packed)

    def take_rows(self, packed: bytes) -> Rows:
        """As ``take`` for many headers, which follow one another in ``packed``. Raises StreamError, after
        which nothing more may be taken."""
        rows = np.frombuffer(packed, dtype=ROW)
        if len(rows) < _FEW_ROWS:
            return self._take_few(packed, rows)
        first = self.frames
        if not self._is_in_order(rows):
            refuse(f"frames {first} to {first + len(rows)}: out of order or out of bounds")
        self.frames += len(rows)
        self.data_bytes += int(rows["length"][rows["kind"] == FrameKind.DATA].sum())
        self._disk = int(rows["disk"][-1])
        self._end = int(rows["offset"][-1]) + int(rows["length"][-1])
        self._whole.update(packed)
        bounds = np.searchsorted(rows["disk"], np.arange(len(self._sizes) + 1)).tolist()
        view = memoryview(packed)
        for disk in range(int(rows["disk"][0]), self._disk + 1):
            self._disks[disk].update(view[bounds[disk] * FRAME.size : bounds[disk + 1] * FRAME.size])
        return rows

    def _take_few(self, packed: bytes, rows: Rows) -> Rows:
        for start in range(0, len(packed), FRAME.size):
            one = packed[start : start + FRAME.size]
            kind, reserved, *rest = FRAME.unpack(one)
            if reserved or kind not in _RANGES:
                refuse(f"frame {self.frames}: of an unknown kind, or reserved bits are set")
            self.take(one, FrameHeader(FrameKind(kind), *rest))
        return rows

    def _is_in_order(self, rows: Rows) -> bool:
        disks = rows["disk"].astype(np.int64)
        steps = np.diff(disks, prepend=self._disk)
        if (disks >= len(self._sizes)).any() or (steps < 0).any():
            return False
        if max(rows["offset"].max(), rows["length"].max()) > SIZE_BYTES_MAX:
            return False
        offsets, lengths = rows["offset"].astype(np.int64), rows["length"].astype(np.int64)
        ends = offsets + lengths
        before = np.concatenate(([self._end], ends[:-1]))
        is_data = rows["kind"] == FrameKind.DATA
        known = is_data | (rows["kind"] == FrameKind.ZERO) | (rows["kind"] == FrameKind.HOLE)
        good = known & (rows["reserved"] == 0) & (lengths > 0) & (ends <= self._size_of[disks])
        good &= (steps > 0) | (offsets >= before)
        good &= ((offsets | lengths) % SECTOR_BYTES == 0) & (~is_data | (lengths <= DATA_BYTES_MAX))
        good &= rows["number"] == self.frames + np.arange(len(rows))
        in_bounds = self.frames + len(rows) < FRAMES_MAX
        return bool(in_bounds and good.all() and not rows["digest"][~is_data].any())

    def trailer(self) -> Trailer:
        """What the frames so far amount to."""
        return Trailer(
            self.frames, self.data_bytes, self._whole.digest(), [disk.digest() for disk in self._disks]
        )


@attrs.frozen(eq=False)
class FrameBatch:
    """Whole frames as they lie in a buffer: ``starts`` are the places of their headers in ``view``.

    ``packed``: the headers alone, one after the other; ``used``: where the first byte behind them lies.
    """

    view: memoryview
    starts: list[int]
    packed: bytes
    used: int

    def __len__(self) -> int:
        return len(self.starts)

    def payload(self, number: int, length: int) -> memoryview:
        """The data of the ``number``-th frame of this batch."""
        start = self.starts[number] + FRAME.size
        return self.view[start : start + length]

    def check_data(self, rows: Rows) -> None:
        """Raises StreamError unless every payload is what the source digested (B4); for a worker thread:
        the digest of a large frame is computed without the interpreter's lock."""
        digests = rows["digest"].tobytes()
        kinds, lengths = rows["kind"].tolist(), rows["length"].tolist()
        for number, (kind, length) in enumerate(zip(kinds, lengths, strict=True)):
            if kind != FrameKind.DATA:
                continue
            expected = digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
            if blake3(self.payload(number, length)).digest() != expected:
                raise mismatch(int(rows["number"][number]), int(rows["offset"][number]))


def mismatch(number: int, offset: int) -> StreamError:
    """A frame's data is not what the source digested."""
    return StreamError(f"frame {number}: the data at {offset} does not match its digest")


def scan(view: memoryview) -> FrameBatch:
    """The whole frames at the beginning of ``view``, up to the first that is incomplete, or is none of data,
    zero or hole. Only lengths are looked at: the rest is ``FrameOrder.take_rows``'s. Raises StreamError for a
    payload that no buffer need hold."""
    starts: list[int] = []
    position, end = 0, len(view)
    unpack: Any = _KIND_AND_LENGTH.unpack_from
    while position + FRAME.size <= end:
        kind, length = unpack(view, position)
        if kind == FrameKind.DATA:
            if length > DATA_BYTES_MAX:
                refuse(f"a frame of {length} bytes of data is too long")
        elif kind in _RANGES:
            length = 0
        else:
            break
        behind = position + FRAME.size + length
        if behind > end:
            break
        starts.append(position)
        position = behind
    return FrameBatch(
        view, starts, b"".join([view[start : start + FRAME.size] for start in starts]), position
    )
