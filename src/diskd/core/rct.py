"""``disk.rct``: the durable copy of the active bitmap, in pages copied on write under two alternating roots.

    | root slot 0 | root slot 1 | page 0 slot 0 | page 0 slot 1 | page 1 slot 0 | ...

A root says for every page which of its two slots counts and what its checksum is, or that the page is
zero. ``store`` writes changed pages into the slots that the current root does not use, syncs, writes the
next root into the slot of the last but one, and syncs. So at any instant one root and all its pages are
whole, a torn page or root costs nothing, and no change ever needs space that was not there at creation.

Byte layout in docs/formats/rct.md.
"""

import hashlib
import struct
import zlib
from collections.abc import Mapping
from typing import Final
from uuid import UUID

import attrs
import numpy as np

from diskd.core.extents import PageMap
from diskd.core.geometry import Identity
from diskd.core.steps import Allocate, Read, Script, Size, Sync, Write
from diskd.errors import Damaged

FILE: Final = "disk.rct"
MAGIC: Final = b"HFRCT001"
# magic, digest, image, generation, sequence, interval, over-report, size, block, region, page, page count,
# header sequence
_HEADER: Final = struct.Struct("<8s16s16s16sQQQQIIIIQ")
_HEADER_BYTES: Final = 128
_DIGEST: Final = slice(8, 24)
_ALIGN: Final = 4096
_READ_BYTES: Final = 1 << 20
ZERO: Final = 2  # the slot of a page without a set bit


@attrs.frozen(eq=False)
class Root:
    """One consistent bitmap. ``slots`` and ``checksums`` have one entry per page. ``header_sequence``: of a
    header of the MRT that was durable before this: an MRT that is older was put back."""

    generation: UUID
    sequence: int
    interval: int
    over_report_bytes: int
    slots: bytes
    checksums: bytes  # little-endian 32-bit CRCs
    header_sequence: int = 0


def empty_root(identity: Identity, generation: UUID, *, sequence: int, interval: int) -> Root:
    """All pages zero: it needs no page to be written."""
    pages = identity.geometry.page_count
    return Root(generation, sequence, interval, 0, bytes([ZERO]) * pages, bytes(4 * pages))


def _root_bytes(identity: Identity) -> int:
    return _HEADER_BYTES + 5 * identity.geometry.page_count


def _root_slot_bytes(identity: Identity) -> int:
    return -(-_root_bytes(identity) // _ALIGN) * _ALIGN


def _page_offset(identity: Identity, page: int, slot: int) -> int:
    return 2 * _root_slot_bytes(identity) + (2 * page + slot) * identity.geometry.page_bytes


def file_bytes(identity: Identity) -> int:
    """The size of the whole file, fixed at creation."""
    return _page_offset(identity, identity.geometry.page_count, 0)


def encode_root(identity: Identity, root: Root) -> bytes:
    """The bytes of one root."""
    geometry = identity.geometry
    header = _HEADER.pack(
        MAGIC,
        bytes(16),
        identity.uuid.bytes,
        root.generation.bytes,
        root.sequence,
        root.interval,
        root.over_report_bytes,
        geometry.size_bytes,
        geometry.block_bytes,
        geometry.region_bytes,
        geometry.page_bytes,
        geometry.page_count,
        root.header_sequence,
    ).ljust(_HEADER_BYTES, b"\0")
    data = bytearray(header + root.checksums + root.slots)
    data[_DIGEST] = hashlib.blake2b(data, digest_size=16).digest()
    return bytes(data)


def decode_root(identity: Identity, data: bytes) -> Root | None:
    """None for anything but a root of this image that was written as a whole."""
    geometry = identity.geometry
    if len(data) != _root_bytes(identity) or data[:8] != MAGIC:
        return None
    blank = bytearray(data)
    blank[_DIGEST] = bytes(16)
    if hashlib.blake2b(blank, digest_size=16).digest() != data[_DIGEST]:
        return None
    fields = _HEADER.unpack_from(data)
    image, generation, sequence, interval, over, size, block, region, page_bytes, pages, header = fields[2:]
    expected = (
        identity.uuid.bytes,
        geometry.size_bytes,
        geometry.block_bytes,
        geometry.region_bytes,
        geometry.page_bytes,
        geometry.page_count,
    )
    if (image, size, block, region, page_bytes, pages) != expected:
        return None
    checksums = data[_HEADER_BYTES : _HEADER_BYTES + 4 * pages]
    slots = data[_HEADER_BYTES + 4 * pages :]
    if max(slots) > ZERO:
        return None
    return Root(UUID(bytes=generation), sequence, interval, over, slots, checksums, header)


def create(identity: Identity, root: Root) -> Script[None]:
    """Reserve the whole file and make ``root``, which must be empty, its only valid root. Idempotent.

    The other slot is overwritten: a root of an earlier generation must never be picked up again.
    """
    yield Allocate(FILE, file_bytes(identity))
    slot_bytes = _root_slot_bytes(identity)
    mine = root.sequence % 2
    yield Write(FILE, (1 - mine) * slot_bytes, bytes(slot_bytes))
    yield Write(FILE, mine * slot_bytes, encode_root(identity, root))
    yield Sync(FILE)


def store(identity: Identity, root: Root, pages: Mapping[int, bytes]) -> Script[Root]:
    """Make ``root`` with ``pages`` replaced durable; ``root`` stays whole until the result is.

    ``root.sequence`` is the one on disk; interval and over-report may differ from what is there.
    """
    slots, checksums = bytearray(root.slots), np.frombuffer(bytearray(root.checksums), dtype="<u4")
    for index in sorted(pages):
        page = pages[index]
        if not any(page):
            slots[index], checksums[index] = ZERO, 0
            continue
        slot = 1 if slots[index] == 0 else 0
        yield Write(FILE, _page_offset(identity, index, slot), page)
        slots[index], checksums[index] = slot, zlib.crc32(page)
    if pages:
        yield Sync(FILE)
    stored = attrs.evolve(root, sequence=root.sequence + 1, slots=bytes(slots), checksums=checksums.tobytes())
    offset = stored.sequence % 2 * _root_slot_bytes(identity)
    yield Write(FILE, offset, encode_root(identity, stored))
    yield Sync(FILE)
    return stored


def restart(identity: Identity, root: Root, *, interval: int, header_sequence: int) -> Script[Root]:
    """Begin the next interval durably, all pages zero."""
    begun = empty_root(identity, root.generation, sequence=root.sequence, interval=interval)
    return (yield from store(identity, attrs.evolve(begun, header_sequence=header_sequence), {}))


def load(identity: Identity) -> Script[tuple[Root, PageMap]]:
    """The newest whole root and its pages. Raises Damaged; a missing or short file is damaged too."""
    size = yield Size(FILE)
    if size is None:
        raise Damaged(f"{FILE} is missing")
    if size < file_bytes(identity):
        raise Damaged(f"{FILE} is too short")
    roots: list[Root] = []
    for slot in range(2):
        data = yield Read(FILE, slot * _root_slot_bytes(identity), _root_bytes(identity))
        root = decode_root(identity, data)
        if root is not None and root.sequence % 2 == slot:
            roots.append(root)
    if not roots:
        raise Damaged(f"{FILE} has no readable root")
    newest = max(roots, key=lambda root: root.sequence)
    return newest, (yield from _load_pages(identity, newest))


def _load_pages(identity: Identity, root: Root) -> Script[PageMap]:
    geometry = identity.geometry
    checksums = np.frombuffer(root.checksums, dtype="<u4")
    pair_bytes = 2 * geometry.page_bytes
    together = max(1, _READ_BYTES // pair_bytes)
    pages: PageMap = {}
    for start in range(0, geometry.page_count, together):
        end = min(start + together, geometry.page_count)
        if root.slots.count(ZERO, start, end) == end - start:
            continue
        chunk = yield Read(FILE, _page_offset(identity, start, 0), (end - start) * pair_bytes)
        for index in range(start, end):
            slot = root.slots[index]
            if slot == ZERO:
                continue
            position = (index - start) * pair_bytes + slot * geometry.page_bytes
            page = chunk[position : position + geometry.page_bytes]
            if len(page) != geometry.page_bytes or zlib.crc32(page) != int(checksums[index]):
                raise Damaged(f"{FILE}: page {index} does not match its checksum")
            pages[index] = page
    return pages
