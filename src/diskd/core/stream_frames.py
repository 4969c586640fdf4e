"""The frames of an export stream: a header's bytes, and the rules that make a sequence of them one export.

Every disk's frames are a sequence of their own (``DiskOrder``): numbered from 0, ascending, digested in
order. Frames of different disks may come in any order among each other (``FrameOrder``), since several
disks are read at once; so nothing that is computed here depends on that order.

The rules exist once in two speeds: frame by frame, and for a whole batch of headers at once, since a
differential of scattered 4 KiB blocks has tens of thousands of frames, and must not pay for each what a frame
of 1 MiB may cost. Both are tested to agree.

On the wire a data frame may be compressed (kind 4): its header, then the length of what is stored, then
that. Whoever takes it turns it into the data frame that it stands for (kind 1), which is what is digested,
indexed and counted: compression is a matter of the connection.
"""

import struct
from collections.abc import Callable, Sequence
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
# Behind the header of a compressed frame: how many bytes follow.
STORED: Final = struct.Struct(">I")
# A frame is what is read, digested, sent and verified at once; larger ones gain nothing (measured: 1 MiB).
DATA_BYTES_MAX: Final = 1 * MiB
FRAMES_MAX: Final = 1 << 32
# What the compressed frames of one batch may become: a buffer of them could stand for ten thousand times
# its size.
INFLATED_BYTES_MAX: Final = 4 * DATA_BYTES_MAX
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
# Which rows: all of them, or those at these places.
Places: TypeAlias = slice | npt.NDArray[np.intp]
# inflate(stored bytes, length of what they stand for): the data. Raises StreamError.
Inflate: TypeAlias = Callable[[memoryview, int], bytes]
# What a scan for frames looks at: kind and length.
_KIND_AND_LENGTH: Final = struct.Struct(">B15xQ")


class StreamError(ProtocolError):
    """The stream is not what this format allows; nothing of it may be kept."""


class FrameKind(IntEnum):
    """What a frame says of its range. Zero reads as zeroes and was allocated; a hole was not. ZSTD is DATA,
    compressed on its way."""

    DATA = 1
    ZERO = 2
    HOLE = 3
    ZSTD = 4
    END = 255
    ABORT = 254


@attrs.frozen
class FrameHeader:
    """``number`` counts the frames of the disk from 0."""

    kind: FrameKind
    disk: int
    number: int
    offset: int
    length: int
    digest: bytes

    def pack(self) -> bytes:
        """The 56 bytes."""
        return FRAME.pack(self.kind, 0, self.disk, self.number, self.offset, self.length, self.digest)

    @classmethod
    def unpack(cls, packed: bytes) -> "FrameHeader":
        """From 56 bytes that have been found good."""
        kind, _, *rest = FRAME.unpack(packed)
        return cls(FrameKind(kind), *rest)

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
# What the whole digest takes of each disk: frames, bytes of data, the disk's digest.
_DISK_SUMMARY: Final = struct.Struct(">QQ32s")
# For so few, numpy's dozen of calls costs more than going through them one by one.
_FEW_ROWS: Final = 12


def refuse(text: str) -> NoReturn:
    """Raises StreamError."""
    raise StreamError(text)


class DiskOrder:
    """Accounts for the frames of one disk, in order; by one thread at a time."""

    def __init__(self, number: int, size_bytes: int) -> None:
        """``number``: of the disk in the stream's header."""
        self.number: Final = number
        self.frames = 0
        self.data_bytes = 0
        self._size = size_bytes
        self._end = 0
        self._headers = blake3()

    def digest(self) -> bytes:
        """BLAKE3 over the headers of the frames so far."""
        return self._headers.digest()

    def take(self, packed: bytes | memoryview, frame: FrameHeader) -> None:
        """Account for one frame of this disk. Raises StreamError."""
        name = f"frame {frame.number} of disk {self.number}"
        if frame.number != self.frames or self.frames >= FRAMES_MAX - 1:
            refuse(f"{name} came where {self.frames} was due")
        if frame.offset < self._end or frame.length <= 0 or frame.end > self._size:
            refuse(f"{name}: its range is out of order or outside the disk")
        if frame.offset % SECTOR_BYTES or frame.length % SECTOR_BYTES:
            refuse(f"{name}: its range is not in whole sectors")
        if frame.kind is FrameKind.DATA:
            if frame.length > DATA_BYTES_MAX:
                refuse(f"{name}: {frame.length} bytes of data are too many")
            self.data_bytes += frame.length
        elif frame.digest != NO_DIGEST:
            refuse(f"{name}: a range without data has no digest")
        self._end = frame.end
        self.frames += 1
        self._headers.update(packed)

    def take_rows(self, packed: bytes) -> None:
        """As ``take`` for many headers of this disk, which follow one another in ``packed``. Raises
        StreamError, after which nothing more may be taken."""
        rows = np.frombuffer(packed, dtype=ROW)
        if len(rows) < _FEW_ROWS:
            self._take_few(packed)
            return
        if not self._is_in_order(rows):
            last = self.frames + len(rows)
            refuse(f"frames {self.frames} to {last} of disk {self.number}: out of order or out of bounds")
        self.frames += len(rows)
        self.data_bytes += int(rows["length"][rows["kind"] == FrameKind.DATA].sum())
        self._end = int(rows["offset"][-1]) + int(rows["length"][-1])
        self._headers.update(packed)

    def _take_few(self, packed: bytes) -> None:
        for start in range(0, len(packed), FRAME.size):
            one = packed[start : start + FRAME.size]
            kind, reserved, *rest = FRAME.unpack(one)
            if reserved or kind not in _RANGES:
                refuse(
                    f"frame {self.frames} of disk {self.number}: of an unknown kind, or reserved bits are set"
                )
            self.take(one, FrameHeader(FrameKind(kind), *rest))

    def _is_in_order(self, rows: Rows) -> bool:
        if max(rows["offset"].max(), rows["length"].max()) > SIZE_BYTES_MAX:
            return False
        offsets, lengths = rows["offset"].astype(np.int64), rows["length"].astype(np.int64)
        ends = offsets + lengths
        before = np.concatenate(([self._end], ends[:-1]))
        is_data = rows["kind"] == FrameKind.DATA
        good = is_data | (rows["kind"] == FrameKind.ZERO) | (rows["kind"] == FrameKind.HOLE)
        good &= (rows["reserved"] == 0) & (lengths > 0) & (ends <= self._size) & (offsets >= before)
        good &= ((offsets | lengths) % SECTOR_BYTES == 0) & (~is_data | (lengths <= DATA_BYTES_MAX))
        good &= rows["number"] == self.frames + np.arange(len(rows))
        in_bounds = self.frames + len(rows) < FRAMES_MAX
        return bool(in_bounds and good.all() and not rows["digest"][~is_data].any())


class FrameOrder:
    """Accounts for the frames of one stream; shared by every reader and writer."""

    def __init__(self, opening: bytes, sizes: Sequence[int]) -> None:
        """``opening``: prefix and header, verbatim; ``sizes``: of the disks."""
        self.disks: Final = [DiskOrder(number, size) for number, size in enumerate(sizes)]
        self._opening = opening

    @property
    def frames(self) -> int:
        """Of all disks together."""
        return sum(disk.frames for disk in self.disks)

    @property
    def data_bytes(self) -> int:
        """Of all disks together."""
        return sum(disk.data_bytes for disk in self.disks)

    def take(self, packed: bytes | memoryview, frame: FrameHeader) -> None:
        """Account for one frame. Raises StreamError."""
        self._check_disk(frame.disk)
        self.disks[frame.disk].take(packed, frame)
        self._check_count()

    def take_rows(self, packed: bytes) -> Rows:
        """As ``take`` for many headers, which follow one another in ``packed``. Raises StreamError, after
        which nothing more may be taken."""
        if len(packed) % FRAME.size:
            refuse("the headers end in the middle of one")
        rows = np.frombuffer(packed, dtype=ROW)
        if len(rows):
            # Before they are sorted by it: thousands of disks that there are not would take minutes.
            self._check_disk(int(rows["disk"].max()))
        for disk, places in by_disk(rows):
            self.disks[disk].take_rows(packed if isinstance(places, slice) else rows[places].tobytes())
        self._check_count()
        return rows

    def _check_disk(self, disk: int) -> None:
        if disk >= len(self.disks):
            refuse(f"a frame of disk {disk}, where there are {len(self.disks)}")

    def _check_count(self) -> None:
        if self.frames >= FRAMES_MAX:
            refuse("the stream has more frames than its trailer can count")

    def trailer(self) -> Trailer:
        """What the frames so far amount to."""
        self._check_count()
        digests = [disk.digest() for disk in self.disks]
        whole = blake3(self._opening)
        for disk, digest in zip(self.disks, digests, strict=True):
            whole.update(_DISK_SUMMARY.pack(disk.frames, disk.data_bytes, digest))
        return Trailer(self.frames, self.data_bytes, whole.digest(), digests)


def by_disk(rows: Rows) -> list[tuple[int, Places]]:
    """(disk, the places of its frames) for each disk that ``rows`` have frames of, in the order of disks."""
    if not len(rows):
        return []
    disks = rows["disk"]
    if (disks == disks[0]).all():
        return [(int(disks[0]), slice(None))]
    return [(disk, np.flatnonzero(disks == disk)) for disk in np.unique(disks).tolist()]


@attrs.frozen(eq=False)
class FrameBatch:
    """Whole frames as they lie in a buffer: ``starts`` are the places of their headers in ``view``.

    ``packed``: the headers alone, one after the other, compressed frames as the data that they stand for;
    ``used``: where the first byte behind them lies; ``stored``: how long the compressed ones are in the
    buffer, by their number in the batch. The data of those is there once ``check_data`` has run.
    """

    view: memoryview
    starts: list[int]
    packed: bytes
    used: int
    stored: dict[int, int] = attrs.field(factory=dict)
    _inflated: dict[int, bytes] = attrs.field(factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.starts)

    def payload(self, number: int, length: int) -> memoryview | bytes:
        """The data of the ``number``-th frame of this batch."""
        if number in self.stored:
            return self._inflated[number]
        start = self.starts[number] + FRAME.size
        return self.view[start : start + length]

    def check_data(self, rows: Rows, inflate: Inflate) -> None:
        """Raises StreamError unless every payload is what the source digested (B4); for a worker thread:
        the digest of a large frame is computed, and a frame is decompressed, without the interpreter's
        lock."""
        digests = rows["digest"].tobytes()
        kinds, lengths = rows["kind"].tolist(), rows["length"].tolist()
        for number, (kind, length) in enumerate(zip(kinds, lengths, strict=True)):
            if kind != FrameKind.DATA:
                continue
            if number in self.stored:
                start = self.starts[number] + FRAME.size + STORED.size
                self._inflated[number] = inflate(self.view[start : start + self.stored[number]], length)
            expected = digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
            if blake3(self.payload(number, length)).digest() != expected:
                raise mismatch(FrameHeader.unpack(rows[number].tobytes()))


def mismatch(frame: FrameHeader) -> StreamError:
    """A frame's data is not what the source digested."""
    return StreamError(
        f"frame {frame.number} of disk {frame.disk}: the data at {frame.offset} does not match its digest"
    )


def stored_length(data: bytes | memoryview, start: int, length: int) -> int:
    """How many bytes of a compressed frame follow, for ``length`` bytes of data. Raises StreamError: more
    than the data itself is not compressed, so this is also what bounds the memory that they take."""
    stored: int = STORED.unpack_from(data, start)[0]
    if not 0 < stored < length <= DATA_BYTES_MAX:
        refuse(f"a compressed frame of {stored} bytes for {length} bytes of data")
    return stored


def plain_header(packed: bytes | memoryview) -> bytes:
    """The header of the data frame that a compressed one stands for."""
    return bytes((FrameKind.DATA,)) + bytes(packed[1:])


def scan(view: memoryview) -> FrameBatch:
    """The whole frames at the beginning of ``view``, up to the first that is incomplete, or is none of data,
    zero or hole; and not more compressed ones than a batch may hold. Only lengths are looked at: the rest is
    ``FrameOrder.take_rows``'s. Raises StreamError for a payload that no buffer need hold."""
    starts: list[int] = []
    packed: list[bytes | memoryview] = []
    stored: dict[int, int] = {}
    position, end, inflated = 0, len(view), 0
    unpack: Any = _KIND_AND_LENGTH.unpack_from
    while (behind := position + FRAME.size) <= end:
        kind, length = unpack(view, position)
        header: bytes | memoryview = view[position:behind]
        if kind == FrameKind.DATA:
            if length > DATA_BYTES_MAX:
                refuse(f"a frame of {length} bytes of data is too long")
            behind += length
        elif kind == FrameKind.ZSTD:
            if behind + STORED.size > end:
                break
            size = stored_length(view, behind, length)
            behind += STORED.size + size
            inflated += length
            if behind > end or (starts and inflated > INFLATED_BYTES_MAX):
                break
            stored[len(starts)] = size
            header = plain_header(header)
        elif kind not in _RANGES:
            break
        if behind > end:
            break
        starts.append(position)
        packed.append(header)
        position = behind
    return FrameBatch(view, starts, b"".join(packed), position, stored)
