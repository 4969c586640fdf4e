"""What a target has made durable of an export that is not complete: the record, and what it is bound to.

    slot 0, slot 1      each 256 KiB of the file ``progress``, written in turn
    slot                magic "HFPARTL1", sequence, length, BLAKE3 of the body, then the body (msgpack)

A record is written only after everything that it speaks of has been synced, and acknowledged only after it
has been synced itself; a torn one leaves the other slot. It names the digest of the stream's opening (so of
the point and the whole plan) and of all frame headers so far: a stream with another opening cannot go on
from it, and an index that does not match it is worth nothing.
"""

import struct
from typing import Final

import attrs
from blake3 import blake3

from daemonkit.codec import decode, encode
from daemonkit.errors import OperatorError, ProtocolError
from daemonkit.schema import structure, unstructure
from daemonkit.units import KiB
from diskd.core.qcow2_writer import WriterState
from diskd.core.stream_frames import FRAME

SLOT_BYTES: Final = 256 * KiB
_SLOT: Final = struct.Struct(">8sQI32s")
_MAGIC: Final = b"HFPARTL1"


@attrs.frozen
class Progress:
    """``frames`` are in the files; ``index_bytes`` is opening and headers, whose BLAKE3 is ``index_digest``.

    ``written``: the sizes of the files of the disks that are complete; ``data_bytes``: per disk of the
    header; ``writer``: where the next disk's file stands.
    """

    opening_digest: bytes
    frames: int
    index_bytes: int
    index_digest: bytes
    written: list[int]
    data_bytes: list[int]
    writer: WriterState


def opening_digest(opening: bytes) -> bytes:
    """What binds a record to one plan of one point."""
    return blake3(opening).digest()


def pack_slot(sequence: int, progress: Progress) -> tuple[int, bytes]:
    """(offset in the file, bytes) of the record with this sequence number, which counts from 1."""
    body = encode(unstructure(progress))
    if _SLOT.size + len(body) > SLOT_BYTES:
        raise ValueError(f"a record of {len(body)} bytes does not fit")
    offset = sequence % 2 * SLOT_BYTES
    return offset, _SLOT.pack(_MAGIC, sequence, len(body), blake3(body).digest()) + body


def newest(data: bytes) -> tuple[int, Progress] | None:
    """(sequence, record) from a whole file; None where neither slot holds one."""
    found = [_unpack(data[start : start + SLOT_BYTES]) for start in (0, SLOT_BYTES)]
    return max((one for one in found if one is not None), key=lambda one: one[0], default=None)


def _unpack(slot: bytes) -> tuple[int, Progress] | None:
    if len(slot) < _SLOT.size:
        return None
    magic, sequence, length, digest = _SLOT.unpack_from(slot)
    body = slot[_SLOT.size : _SLOT.size + length]
    if magic != _MAGIC or len(body) != length or blake3(body).digest() != digest:
        return None
    try:
        return sequence, structure(Progress, decode(body), where="progress")
    except (OperatorError, ProtocolError):
        return None


def is_sound(progress: Progress, *, opening_bytes: int, disks: int) -> bool:
    """Whether its numbers fit an export of this plan."""
    return (
        progress.frames > 0
        and progress.index_bytes == opening_bytes + progress.frames * FRAME.size
        and len(progress.data_bytes) == disks
        and len(progress.written) < disks
    )
