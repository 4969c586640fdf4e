"""What a target has made durable of an export that is not complete: the record, and what it is bound to.

    head                magic "HFPARTL2", size of a slot; what else there is of 4 KiB is zero
    slot 0, slot 1      each as large as the record of all disks of the export can become, written in turn
    slot                sequence, length, BLAKE3 of these two and the body, then the body (msgpack)

A record is written only after everything that it speaks of has been synced, and acknowledged only after it
has been synced itself; a torn one leaves the other slot. It names the digest of the stream's opening (so of
the point and the whole plan) and, of every disk that has begun, that of its frame headers so far: a stream
with another opening cannot go on from it, and an index that does not match it is worth nothing.
"""

import struct
from typing import Final

import attrs
from blake3 import blake3

from daemonkit.codec import decode, encode
from daemonkit.errors import OperatorError, ProtocolError
from daemonkit.schema import structure, unstructure
from daemonkit.units import KiB
from diskd.core.inventory import DISKS_MAX
from diskd.core.qcow2 import CLUSTER_SIZES
from diskd.core.qcow2_writer import WriterState

HEAD_BYTES: Final = 4 * KiB
# Of a disk's writer: one L2 table and one cluster, each of the largest size; and the numbers.
_DISK_BYTES_MAX: Final = 2 * max(CLUSTER_SIZES) + 1 * KiB
_HEAD: Final = struct.Struct(">8sI")
_SLOT: Final = struct.Struct(">QI")
_DIGEST_BYTES: Final = 32
_BODY_OFFSET: Final = _SLOT.size + _DIGEST_BYTES
_MAGIC: Final = b"HFPARTL2"


@attrs.frozen
class DiskProgress:
    """``frames`` of the disk with this number are in its files; ``headers_digest`` is the BLAKE3 of their
    headers, in order; ``writer``: where the qcow2 file stands."""

    disk: int
    frames: int
    data_bytes: int
    headers_digest: bytes
    writer: WriterState


@attrs.frozen
class Progress:
    """``disks``: those that have begun, by number."""

    opening_digest: bytes
    disks: list[DiskProgress]

    @property
    def frames(self) -> int:
        """Of all disks together."""
        return sum(disk.frames for disk in self.disks)


def opening_digest(opening: bytes) -> bytes:
    """What binds a record to one plan of one point."""
    return blake3(opening).digest()


def slot_bytes(disks: int) -> int:
    """How much room the record of an export of so many disks needs."""
    return HEAD_BYTES + disks * _DISK_BYTES_MAX


def pack_head(disks: int) -> bytes:
    """The beginning of the file, which says where the slots are."""
    return _HEAD.pack(_MAGIC, slot_bytes(disks)).ljust(HEAD_BYTES, b"\0")


def pack_slot(sequence: int, progress: Progress, disks: int) -> tuple[int, bytes]:
    """(offset in the file, bytes) of the record with this sequence number, which counts from 1."""
    body, size = encode(unstructure(progress)), slot_bytes(disks)
    if _BODY_OFFSET + len(body) > size:
        raise ValueError(f"a record of {len(body)} bytes does not fit")
    offset = HEAD_BYTES + sequence % 2 * size
    numbers = _SLOT.pack(sequence, len(body))
    return offset, numbers + blake3(numbers + body).digest() + body


# So long a file can be at most.
FILE_BYTES_MAX: Final = HEAD_BYTES + 2 * slot_bytes(DISKS_MAX)


def newest(data: bytes) -> tuple[int, Progress] | None:
    """(sequence, record) from a whole file; None where neither slot holds one."""
    if len(data) < HEAD_BYTES:
        return None
    magic, size = _HEAD.unpack_from(data)
    if magic != _MAGIC or not HEAD_BYTES <= size <= slot_bytes(DISKS_MAX):
        return None
    found = [_unpack(data[start : start + size]) for start in (HEAD_BYTES, HEAD_BYTES + size)]
    return max((one for one in found if one is not None), key=lambda one: one[0], default=None)


def _unpack(slot: bytes) -> tuple[int, Progress] | None:
    if len(slot) < _BODY_OFFSET:
        return None
    sequence, length = _SLOT.unpack_from(slot)
    body = slot[_BODY_OFFSET : _BODY_OFFSET + length]
    digest = slot[_SLOT.size : _BODY_OFFSET]
    if len(body) != length or blake3(slot[: _SLOT.size] + body).digest() != digest:
        return None
    try:
        return sequence, structure(Progress, decode(body), where="progress")
    except (OperatorError, ProtocolError):
        return None


def is_sound(progress: Progress, *, disks: int) -> bool:
    """Whether its numbers fit an export of so many disks."""
    numbers = [one.disk for one in progress.disks]
    return (
        numbers == sorted(set(numbers))
        and all(0 <= number < disks for number in numbers)
        and all(one.frames > 0 for one in progress.disks)
        and progress.frames > 0
    )
