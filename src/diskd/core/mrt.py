"""``disk.mrt``: the modified region table, written through: which regions' fine marks may not be durable.

    | header slot 0 | header slot 1 | record 0 | record 1 | ...

A record of 512 bytes (one sector, so it is never torn) holds the bits of 3,840 regions under a checksum; one
that does not read back means that all its regions are open. Every record also says when image data was
last written, for finding outside changes, and which root of the RCT it relies on: if that root is gone, so
are marks, and nobody may believe the bitmap.

The header says whether the image was closed cleanly (and what the raw file looked like then), or who has
it open: boot, and the nonce of the shared bitmap (two while a cut is being made).

Regions that the table does not know as open are, after a power loss, changes that nobody knows. So an MRT
put back from an older time must be noticed. The RCT's roots name a header that was durable before them; and
since whoever puts a file back can not set its ctime back, ``disk.mrt.time`` says, durably and beforehand,
until when the MRT was going to be written.

Byte layout in docs/formats/mrt.md.
"""

import struct
import zlib
from collections.abc import Iterable
from typing import Final
from uuid import UUID

import attrs
import numpy as np

from diskd.core.geometry import Identity
from diskd.core.steps import Allocate, Read, Script, Size, Sync, Write
from diskd.errors import Damaged

FILE: Final = "disk.mrt"
MAGIC: Final = b"HFMRT001"
STAMP_FILE: Final = "disk.mrt.time"
STAMP_MAGIC: Final = b"HFMTM001"
# A stamp is good for so long: then the next write of the MRT costs one sync more. Within this time (and some
# for slow writes) of its last write, an older copy that was put back is not told by the file's time.
STAMP_NS: Final = 10 * 10**9
RECORD_BYTES: Final = 512
# crc, index, tag (first bytes of the generation), root sequence, time
_RECORD: Final = struct.Struct("<II8sQq")
REGIONS_PER_RECORD: Final = 8 * (RECORD_BYTES - _RECORD.size)
# magic, crc, state, image, generation, boot, nonce, next nonce, sequence, root sequence, time,
# raw size, mtime, ctime, inode, size, block, region, page
_HEADER: Final = struct.Struct("<8sII16s16s16s16s16sQQqQqqQQIII")
_HEADER_SLOT_BYTES: Final = 4096
_RECORDS_OFFSET: Final = 2 * _HEADER_SLOT_BYTES
_CRC: Final = slice(8, 12)
_OPEN, _CLEAN = 1, 2
NO_NONCE: Final = bytes(16)


@attrs.frozen
class RawFacts:
    """What the raw file looks like from outside; inode 0 is none."""

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@attrs.frozen
class Header:
    """``raw``: at a clean close as it was then, else as it was when the image was opened."""

    clean: bool
    generation: UUID
    boot_id: UUID
    nonce: bytes
    next_nonce: bytes
    sequence: int
    root_sequence: int
    time_ns: int
    raw: RawFacts


def record_count(identity: Identity) -> int:
    """How many records the image's regions need."""
    return -(-identity.geometry.region_count // REGIONS_PER_RECORD)


def file_bytes(identity: Identity) -> int:
    """The size of the whole file, fixed at creation."""
    return _RECORDS_OFFSET + record_count(identity) * RECORD_BYTES


def encode_header(identity: Identity, header: Header) -> bytes:
    """One header slot's used bytes (512)."""
    geometry, raw = identity.geometry, header.raw
    data = bytearray(
        _HEADER.pack(
            MAGIC,
            0,
            _CLEAN if header.clean else _OPEN,
            identity.uuid.bytes,
            header.generation.bytes,
            header.boot_id.bytes,
            header.nonce,
            header.next_nonce,
            header.sequence,
            header.root_sequence,
            header.time_ns,
            raw.size_bytes,
            raw.mtime_ns,
            raw.ctime_ns,
            raw.inode,
            geometry.size_bytes,
            geometry.block_bytes,
            geometry.region_bytes,
            geometry.page_bytes,
        ).ljust(RECORD_BYTES, b"\0")
    )
    data[_CRC] = zlib.crc32(data).to_bytes(4, "little")
    return bytes(data)


def decode_header(identity: Identity, data: bytes) -> Header | None:
    """None for anything but a whole header of this image."""
    if len(data) != RECORD_BYTES or data[:8] != MAGIC:
        return None
    blank = bytearray(data)
    blank[_CRC] = bytes(4)
    if zlib.crc32(blank).to_bytes(4, "little") != data[_CRC]:
        return None
    fields = _HEADER.unpack_from(data)
    state, image, generation, boot, nonce, next_nonce, sequence, root_sequence, time_ns = fields[2:11]
    geometry = identity.geometry
    shape = (geometry.size_bytes, geometry.block_bytes, geometry.region_bytes, geometry.page_bytes)
    if image != identity.uuid.bytes or fields[15:] != shape or state not in (_OPEN, _CLEAN):
        return None
    return Header(
        state == _CLEAN,
        UUID(bytes=generation),
        UUID(bytes=boot),
        nonce,
        next_nonce,
        sequence,
        root_sequence,
        time_ns,
        RawFacts(*fields[11:15]),
    )


@attrs.frozen
class Record:
    """One record's facts; ``bits`` is packed, least significant first."""

    index: int
    root_sequence: int
    time_ns: int
    bits: bytes


def encode_record(generation: UUID, record: Record) -> bytes:
    """512 bytes."""
    body = _RECORD.pack(0, record.index, generation.bytes[:8], record.root_sequence, record.time_ns)[4:]
    body += record.bits
    return zlib.crc32(body).to_bytes(4, "little") + body


def decode_record(generation: UUID, index: int, data: bytes) -> Record | None:
    """None for anything but a whole record of this place and generation: all its regions are open."""
    if len(data) != RECORD_BYTES or zlib.crc32(data[4:]).to_bytes(4, "little") != data[:4]:
        return None
    _, number, tag, root_sequence, time_ns = _RECORD.unpack_from(data)
    if number != index or tag != generation.bytes[:8]:
        return None
    return Record(index, root_sequence, time_ns, data[_RECORD.size :])


def pack_record(index: int, open_regions: bytes | bytearray, root_sequence: int, time_ns: int) -> Record:
    """The record over its share of ``open_regions`` (one byte per region, 0 or 1)."""
    share = np.zeros(REGIONS_PER_RECORD, np.uint8)
    mine = open_regions[index * REGIONS_PER_RECORD : (index + 1) * REGIONS_PER_RECORD]
    share[: len(mine)] = np.frombuffer(bytes(mine), np.uint8)
    bits = np.packbits(share, bitorder="little").tobytes()
    return Record(index, root_sequence, time_ns, bits)


@attrs.frozen
class Table:
    """All records as read. ``bad`` counts the unreadable ones, whose regions are open."""

    open_regions: bytearray
    root_sequence: int
    time_ns: int
    bad: int


def stamp(identity: Identity, now_ns: int) -> Script[None]:
    """Let it be known, durably, that the MRT is about to be written, for STAMP_NS from now."""
    body = identity.uuid.bytes + (now_ns + STAMP_NS).to_bytes(8, "little")
    data = STAMP_MAGIC + zlib.crc32(body).to_bytes(4, "little") + bytes(4) + body
    yield Write(STAMP_FILE, 0, data.ljust(RECORD_BYTES, b"\0"))
    yield Sync(STAMP_FILE)


def has_outlived_stamp(began_ns: int, ended_ns: int) -> bool:
    """Whether a script that may have written the MRT took so long that its stamp, which is at most half of
    STAMP_NS older than the beginning, says too little: then stamp again, or the next recovery would take
    the file for one that was put back."""
    return ended_ns - began_ns > STAMP_NS


def load_stamp(identity: Identity) -> Script[int]:
    """Until when the MRT was going to be written (ns). Raises Damaged."""
    if (yield Size(STAMP_FILE)) is None:
        raise Damaged(f"{STAMP_FILE} is missing")
    data = yield Read(STAMP_FILE, 0, RECORD_BYTES)
    body = data[16:40]
    if (
        len(data) != RECORD_BYTES
        or data[:8] != STAMP_MAGIC
        or zlib.crc32(body).to_bytes(4, "little") != data[8:12]
        or body[:16] != identity.uuid.bytes
    ):
        raise Damaged(f"{STAMP_FILE}: its checksum does not match, or it belongs to another image")
    return int.from_bytes(body[16:], "little")


def write_header(identity: Identity, header: Header, now_ns: int) -> Script[None]:
    """Durable; into the slot that the previous header does not use."""
    yield from stamp(identity, now_ns)
    yield Write(FILE, header.sequence % 2 * _HEADER_SLOT_BYTES, encode_header(identity, header))
    yield Sync(FILE)


def write_records(generation: UUID, records: Iterable[Record]) -> Script[None]:
    """Durable: one sync for all of them. The stamp must be good for this moment."""
    for record in records:
        offset = _RECORDS_OFFSET + record.index * RECORD_BYTES
        yield Write(FILE, offset, encode_record(generation, record))
    yield Sync(FILE)


def write_table(generation: UUID, table: Table) -> Script[None]:
    """Every record anew, as ``load_table`` gave them; those that could not be read among them. Durable. The
    stamp must be good for this moment."""
    opened, count = table.open_regions, -(-len(table.open_regions) // REGIONS_PER_RECORD)
    yield from write_records(
        generation, (pack_record(index, opened, table.root_sequence, table.time_ns) for index in range(count))
    )


def create(identity: Identity, header: Header, now_ns: int) -> Script[None]:
    """Reserve the whole file; every region closed; ``header`` the only valid one. Idempotent."""
    yield Allocate(STAMP_FILE, RECORD_BYTES)
    yield from stamp(identity, now_ns)
    yield Allocate(FILE, file_bytes(identity))
    yield Write(FILE, (1 - header.sequence % 2) * _HEADER_SLOT_BYTES, bytes(RECORD_BYTES))
    closed = bytes(identity.geometry.region_count)
    records = [
        pack_record(index, closed, header.root_sequence, header.time_ns)
        for index in range(record_count(identity))
    ]
    yield from write_records(header.generation, records)
    yield from write_header(identity, header, now_ns)


def load_header(identity: Identity) -> Script[Header]:
    """The newest whole header. Raises Damaged where there is none."""
    if (yield Size(FILE)) is None:
        raise Damaged(f"{FILE} is missing")
    headers: list[Header] = []
    for slot in range(2):
        header = decode_header(identity, (yield Read(FILE, slot * _HEADER_SLOT_BYTES, RECORD_BYTES)))
        if header is not None and header.sequence % 2 == slot:
            headers.append(header)
    if not headers:
        raise Damaged(f"{FILE} has no readable header")
    return max(headers, key=lambda header: header.sequence)


def load_table(identity: Identity, generation: UUID) -> Script[Table]:
    """Every record; what cannot be read is open."""
    regions = identity.geometry.region_count
    opened = np.ones(record_count(identity) * REGIONS_PER_RECORD, np.uint8)
    root_sequence = time_ns = bad = 0
    for index in range(record_count(identity)):
        data = yield Read(FILE, _RECORDS_OFFSET + index * RECORD_BYTES, RECORD_BYTES)
        record = decode_record(generation, index, data)
        if record is None:
            bad += 1
            continue
        share = slice(index * REGIONS_PER_RECORD, (index + 1) * REGIONS_PER_RECORD)
        opened[share] = np.unpackbits(np.frombuffer(record.bits, np.uint8), bitorder="little")
        root_sequence = max(root_sequence, record.root_sequence)
        time_ns = max(time_ns, record.time_ns)
    return Table(bytearray(opened[:regions].tobytes()), root_sequence, time_ns, bad)
