"""``disk.rct.N``: the changes of one closed interval between two points, compressed, written once.

Byte layout in docs/formats/rct.md. The whole file is under one digest, so that a damaged one is refused
and never read as "nothing changed".
"""

import hashlib
import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import Final
from uuid import UUID

from diskd.core.extents import PageMap, union
from diskd.core.geometry import Identity
from diskd.core.points import Segment
from diskd.core.steps import Read, Script, Size
from diskd.errors import Damaged

MAGIC: Final = b"HFIVL001"
# magic, image, generation, interval, last interval, size, block, page size, number of pages
_HEADER: Final = struct.Struct("<8s16s16sQQQIII")
_PAGE: Final = struct.Struct("<II")  # page index, compressed length
_DIGEST_BYTES: Final = 16
_LEVEL: Final = 1


def file_name(interval: int) -> str:
    """The file of one closed interval, beside the image."""
    return f"disk.rct.{interval}"


def parse_file_name(name: str) -> int | None:
    """The interval of such a name, or None for any other name."""
    number = name.removeprefix("disk.rct.")
    canonical = number.isascii() and number.isdigit() and str(int(number)) == number and len(number) < 20
    return int(number) if number != name and canonical else None


def size_bytes_max(identity: Identity) -> int:
    """No interval file of this image is longer: every page stored, and zlib's overhead."""
    geometry = identity.geometry
    return _HEADER.size + geometry.page_count * (_PAGE.size + geometry.page_bytes + 64) + _DIGEST_BYTES


def encode(
    identity: Identity, generation: UUID, interval: int, pages: Mapping[int, bytes], *, through: int
) -> bytes:
    """The whole file: the changes of ``interval`` and of all that were joined to it, up to ``through``."""
    geometry = identity.geometry
    parts = [
        _HEADER.pack(
            MAGIC,
            identity.uuid.bytes,
            generation.bytes,
            interval,
            through,
            geometry.size_bytes,
            geometry.block_bytes,
            geometry.page_bytes,
            len(pages),
        )
    ]
    for index in sorted(pages):
        packed = zlib.compress(pages[index], _LEVEL)
        parts += (_PAGE.pack(index, len(packed)), packed)
    body = b"".join(parts)
    return body + hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()


def decode(identity: Identity, generation: UUID, segment: Segment, data: bytes) -> PageMap:
    """Raises Damaged for anything but what ``encode`` wrote for this image, generation and segment."""
    geometry = identity.geometry
    where = file_name(segment.interval)
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if len(data) < _HEADER.size + _DIGEST_BYTES or len(data) > size_bytes_max(identity):
        raise Damaged(f"{where}: its length is impossible")
    if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != digest:
        raise Damaged(f"{where}: its checksum does not match")
    magic, image, made_in, number, through, size, block, page_bytes, count = _HEADER.unpack_from(body)
    mine = (MAGIC, identity.uuid.bytes, generation.bytes, segment.interval)
    if (magic, image, made_in, number) != mine:
        raise Damaged(f"{where}: it belongs to another image, generation or interval")
    # More than that is what a join leaves that was cut short: changes without a point between them.
    if through < segment.through:
        raise Damaged(f"{where}: it is older than the last join of intervals")
    # The size may be an earlier, smaller one; blocks beyond the image's end are cut off where they are used.
    if block != geometry.block_bytes or page_bytes != geometry.page_bytes or size <= 0:
        raise Damaged(f"{where}: its block or page size is not the image's")
    pages: PageMap = {}
    position, previous = _HEADER.size, -1
    for _ in range(count):
        if position + _PAGE.size > len(body):
            raise Damaged(f"{where}: it ends inside a page")
        index, length = _PAGE.unpack_from(body, position)
        position += _PAGE.size
        if not previous < index < geometry.page_count or position + length > len(body):
            raise Damaged(f"{where}: a page is out of order or out of bounds")
        pages[index] = _inflate(body[position : position + length], page_bytes, where)
        position, previous = position + length, index
    if position != len(body):
        raise Damaged(f"{where}: bytes are left over")
    return pages


def _inflate(packed: bytes, page_bytes: int, where: str) -> bytes:
    stream = zlib.decompressobj()
    try:
        page = stream.decompress(packed, page_bytes + 1)
    except zlib.error as error:
        raise Damaged(f"{where}: a page does not decompress") from error
    if len(page) != page_bytes or not stream.eof or stream.unused_data:
        raise Damaged(f"{where}: a page has the wrong length")
    return page


def load(identity: Identity, generation: UUID, segment: Segment) -> Script[PageMap]:
    """Read and decode one segment's file. Raises Damaged, also where it is missing or cannot be read: what
    it held is lost either way, and nothing else of the image is."""
    name = file_name(segment.interval)
    try:
        if (yield Size(name)) is None:
            raise Damaged(f"{name} is missing")
        data = yield Read(name, 0, size_bytes_max(identity) + 1)
    except OSError as error:
        raise Damaged(f"{name} cannot be read: {error.strerror}") from error
    return decode(identity, generation, segment, data)


def unite(intervals: Iterable[Mapping[int, bytes]]) -> PageMap:
    """The blocks that changed in any of them."""
    pages: PageMap = {}
    for interval in intervals:
        union(pages, interval)
    return pages
