"""Bitmap algebra: bits in bytes (least significant first), sparse pages, and runs of blocks.

A *page map* is a bitmap with its zero pages left out: ``{page index: page bytes}``. Unions of many
intervals and the search for extents then cost what was changed, not what the image's size is.
"""

from collections.abc import Mapping
from typing import Final, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

Bits: TypeAlias = NDArray[np.uint8]
PageMap: TypeAlias = dict[int, bytes]

_ONES: Final = b"\xff" * 4096
# Empty pages are skipped this many bytes at a time: few numpy calls, and the scan stays in the cache.
_SCAN_BYTES: Final = 1 << 20
# Bounds the memory for a full bitmap: 2 million bits at a time, as 64-bit numbers, are 16 MiB.
_PAGES_AT_ONCE: Final = 64
_EXTENTS_AT_ONCE: Final = 16_384
_ONE: Final = np.uint64(1)
_TOP: Final = np.uint64(63)


def set_range(bits: memoryview, first: int, end: int) -> bool:
    """Set bits ``first`` to ``end`` (exclusive, not empty). True where any of them was clear before."""
    start, stop = first >> 3, (end - 1) >> 3
    head, tail = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - ((end - 1) & 7))
    if start == stop:
        head &= tail
        old: int = bits[start]
        if old & head == head:
            return False
        bits[start] = old | head
        return True
    changed = bits[start] & head != head or bits[stop] & tail != tail
    bits[start] |= head
    bits[stop] |= tail
    start += 1
    while start < stop:
        length = min(stop - start, len(_ONES))
        if bytes(bits[start : start + length]) != _ONES[:length]:
            bits[start : start + length] = _ONES[:length]
            changed = True
        start += length
    return changed


def as_bits(data: bytes | bytearray | memoryview) -> Bits:
    """The same memory as a numpy array of bytes."""
    return np.frombuffer(data, dtype=np.uint8)


def nonzero_pages(data: bytes | bytearray | memoryview, page_bytes: int) -> list[int]:
    """Indices of the pages of a whole bitmap that hold at least one set bit, ascending."""
    found: list[int] = []
    step = max(_SCAN_BYTES, page_bytes)
    for start in range(0, len(data), step):
        words = np.frombuffer(data[start : start + step], dtype=np.uint64).reshape(-1, page_bytes // 8)
        found.extend((np.flatnonzero(words.any(axis=1)) + start // page_bytes).tolist())
    return found


def page_map(data: bytes | bytearray | memoryview, page_bytes: int) -> PageMap:
    """The sparse copy of a whole bitmap."""
    return {
        index: bytes(data[index * page_bytes : (index + 1) * page_bytes])
        for index in nonzero_pages(data, page_bytes)
    }


def union(into: PageMap, other: Mapping[int, bytes]) -> None:
    """Add the bits of ``other``; pages are of one size."""
    for index, page in other.items():
        present = into.get(index)
        into[index] = page if present is None else np.bitwise_or(as_bits(present), as_bits(page)).tobytes()


def union_in_place(bits: memoryview, other: memoryview) -> None:
    """Add the bits of one whole bitmap to another of the same length."""
    target = np.frombuffer(bits, dtype=np.uint8)
    np.bitwise_or(target, np.frombuffer(other, dtype=np.uint8), out=target)


def count(pages: Mapping[int, bytes]) -> int:
    """How many bits are set."""
    return sum(int(np.bitwise_count(as_bits(page)).sum()) for page in pages.values())


def copy_pages(data: memoryview, page_bytes: int, indices: NDArray[np.int64]) -> PageMap:
    """A copy of some pages of a whole bitmap: views of one piece of memory."""
    copied = np.frombuffer(data, np.uint8).reshape(-1, page_bytes)[indices].reshape(-1).data
    starts = range(0, len(copied), page_bytes)
    # A page is only ever read as a buffer, and a view is one as much as bytes are.
    return {
        index: cast("bytes", copied[start : start + page_bytes])
        for index, start in zip(indices.tolist(), starts, strict=True)
    }


def runs(pages: Mapping[int, bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First blocks and ends (exclusive) of all maximal runs of set bits, ascending."""
    indices = sorted(pages)
    starts: list[NDArray[np.int64]] = []
    ends: list[NDArray[np.int64]] = []
    for position in range(0, len(indices), _PAGES_AT_ONCE):
        first, end = _edges(pages, indices[position : position + _PAGES_AT_ONCE])
        starts.append(first)
        ends.append(end)
    if not starts:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    first, end = np.concatenate(starts), np.concatenate(ends)
    if not len(first):
        return first, end
    # A run that goes on in the next group of pages came out as two.
    apart = first[1:] != end[:-1]
    return first[np.concatenate(([True], apart))], end[np.concatenate((apart, [True]))]


def _edges(pages: Mapping[int, bytes], indices: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The runs within some pages: only 64-bit words with a set bit are looked at, and in them only the bits
    at which a run begins or ends."""
    page_words = len(pages[indices[0]]) // 8
    words = np.frombuffer(b"".join(pages[index] for index in indices), dtype="<u8")
    used = np.flatnonzero(words != 0)
    bits = words[used]
    # Where the words lie in the bitmap; a run may go on from one to the next.
    where = np.asarray(indices, dtype=np.int64)[used // page_words] * page_words + used % page_words
    joined = np.flatnonzero(np.diff(where) == 1)
    before, behind = np.zeros_like(bits), np.zeros_like(bits)
    before[joined + 1] = bits[joined] >> _TOP
    behind[joined] = bits[joined + 1] << _TOP
    starts = bits & ~((bits << _ONE) | before)
    lasts = bits & ~((bits >> _ONE) | behind)
    return _positions(where, starts), _positions(where, lasts) + 1


def _positions(where: NDArray[np.int64], words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The numbers of all bits set in words that lie at ``where``, counted in words."""
    octets = words.view(np.uint8)
    used = np.flatnonzero(octets)
    bits = np.flatnonzero(np.unpackbits(octets[used], bitorder="little"))
    octet = used[bits >> 3]
    found: NDArray[np.int64] = where[octet >> 3] * 64 + ((octet & 7) << 3) + (bits & 7)
    return found


def extents(pages: Mapping[int, bytes], block_bytes: int, size_bytes: int) -> list[tuple[int, int]]:
    """(offset, length) in bytes of all runs, coalesced, cut off at the image's end."""
    first, end = runs(pages)
    offsets = first * block_bytes
    stops = np.minimum(end * block_bytes, size_bytes)
    keep = offsets < stops
    offsets, lengths = offsets[keep], (stops - offsets)[keep]
    found: list[tuple[int, int]] = []
    # In pieces: another thread, such as that of the guests, must not wait for a million of them.
    for start in range(0, len(offsets), _EXTENTS_AT_ONCE):
        part = slice(start, start + _EXTENTS_AT_ONCE)
        found.extend(zip(offsets[part].tolist(), lengths[part].tolist(), strict=True))
    return found


def region_page(page: bytes, region: int, region_bitmap_bytes: int) -> bytes:
    """``page`` with all bits of its ``region``-th region set."""
    start = region * region_bitmap_bytes
    return page[:start] + b"\xff" * region_bitmap_bytes + page[start + region_bitmap_bytes :]
