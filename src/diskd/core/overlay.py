"""Where each part of a guest's write goes while an AVHD lies over the parent: pure planning, and its script.

Two modes. FORKED: the checkpoint stands, the parent is frozen, everything goes to the AVHD. MERGING (the
checkpoint has ended, or was invalidated): blocks with an entry go to the AVHD, all others to the parent.

    block      |........|........|........|........|
    write           [=================]
    pieces          copy_up  avhd  copy_up             all blocks PARENT, mode FORKED

A piece that covers part of a block which the AVHD does not hold yet is copied up: the whole block is built
from what it reads as now (the parent, or zeroes) and written in one go. The caller keeps every block of its
plan to itself until ``commit``; two copy-ups of one block would otherwise lose one of the writes.
"""

import enum
from typing import Final, Literal

import attrs

from diskd.core.avhd import DATA, DATA_FILE, PARENT, PARENT_FILE, ZERO, AvhdMap, Run
from diskd.core.merge import Merge
from diskd.core.steps import Read, Script, Write

PieceKind = Literal["avhd", "copy_up", "parent"]


class Mode(enum.Enum):
    """How an overlay treats the parent."""

    FORKED = "the parent is frozen; everything goes to the AVHD"
    MERGING = "blocks with an entry go to the AVHD, all others to the parent"


@attrs.frozen
class Piece:
    """A part of a write with one destination; ``base`` is its blocks' state, a ``copy_up`` has one block."""

    kind: PieceKind
    offset: int
    length: int
    base: int = DATA


MUST_WAIT: Final = None


def block_span(map_: AvhdMap, offset: int, length: int) -> tuple[int, int]:
    """First block and count of the blocks that a range touches."""
    size = map_.head.block_bytes
    first = offset // size
    return first, (offset + length - 1) // size + 1 - first


def quick(map_: AvhdMap, merge: Merge | None, offset: int, length: int) -> Literal["parent", "avhd"] | None:
    """Where a whole write goes that has one destination, and needs nothing of what was there; None for any
    other, and where it has to wait: ``plan_write`` tells more. Its blocks have left the merge's batch then.

    The common cases of plan_write, for a tenth of its time: blocks that are all of one state.
    """
    size = map_.head.block_bytes
    end = offset + length
    first = offset // size
    count = (end - 1) // size + 1 - first
    state = map_.uniform(first, count)
    if state is None:
        return None
    if merge is not None:
        if merge.must_wait(first, count):
            return None
        if state == PARENT:
            return "parent"
        merge.leave(first, count)
    if state == DATA or (offset % size == 0 and (end % size == 0 or end == map_.head.size_bytes)):
        return "avhd"
    return None


def plan_write(map_: AvhdMap, merge: Merge | None, offset: int, length: int) -> list[Piece] | None:
    """The pieces of a write, in order; ``merge`` is None in mode FORKED.

    MUST_WAIT where a block's clearing has been submitted: plan anew when it is done. Otherwise the blocks
    that have an entry have left the merge's batch when this returns.
    """
    first, count = block_span(map_, offset, length)
    if merge is not None:
        if merge.must_wait(first, count):
            return MUST_WAIT
        merge.leave(first, count)
    pieces: list[Piece] = []
    for start, blocks, state in map_.runs(first, count):
        _plan_run(map_, pieces, (start, blocks, state), (offset, offset + length), forked=merge is None)
    return pieces


def _plan_run(
    map_: AvhdMap, pieces: list[Piece], run: tuple[int, int, int], span: tuple[int, int], *, forked: bool
) -> None:
    start, blocks, state = run
    size = map_.head.block_bytes
    low = max(span[0], start * size)
    high = min(span[1], (start + blocks) * size)
    if state == PARENT and not forked:
        pieces.append(Piece("parent", low, high - low, state))
        return
    if state == DATA:
        pieces.append(Piece("avhd", low, high - low, state))
        return
    # Whole blocks need nothing of what was there; the last block of the image may be a short one.
    end_of_image = map_.head.size_bytes
    whole_low = -(-low // size) * size
    whole_high = high if high == end_of_image else high // size * size
    if whole_low > low:
        pieces.append(Piece("copy_up", low, min(whole_low, high) - low, state))
    if whole_high > whole_low:
        pieces.append(Piece("avhd", whole_low, whole_high - whole_low, state))
    if high > max(whole_high, low) and high > whole_low:
        pieces.append(Piece("copy_up", max(whole_high, low), high - max(whole_high, low), state))


def new_data_blocks(map_: AvhdMap, pieces: list[Piece]) -> int:
    """How many more blocks the AVHD will hold: what the limit and the space are asked for."""
    return sum(
        block_span(map_, piece.offset, piece.length)[1]
        for piece in pieces
        if piece.kind != "parent" and piece.base != DATA
    )


def build_block(map_: AvhdMap, piece: Piece, data: bytes, *, source: str | None) -> Script[tuple[int, bytes]]:
    """(offset, content) of the whole block of a ``copy_up``: what ``source`` holds, or zeroes, patched."""
    start, length = block_range(map_, piece)
    content = bytearray(length) if source is None else bytearray((yield Read(source, start, length)))
    content.extend(bytes(length - len(content)))
    content[piece.offset - start : piece.offset - start + piece.length] = data
    return start, bytes(content)


def block_range(map_: AvhdMap, piece: Piece) -> tuple[int, int]:
    """Offset and length of the block of a ``copy_up``; the image's last one may be a short one."""
    size = map_.head.block_bytes
    start = piece.offset // size * size
    return start, min(size, map_.head.size_bytes - start)


def assemble(
    map_: AvhdMap, pieces: list[Piece], offset: int, data: bytes | memoryview, around: dict[int, bytes]
) -> list[tuple[int, bytes]]:
    """What is put into the AVHD, as (offset, content), neighbours joined. ``around`` has the content, by its
    offset, of each block of the parent that is copied up."""
    view = memoryview(data)
    parts: list[tuple[int, bytes]] = []
    start, joined = -1, bytearray()
    for piece in pieces:
        place, content = piece.offset, view[piece.offset - offset : piece.offset - offset + piece.length]
        if piece.kind == "copy_up":
            place, length = block_range(map_, piece)
            block = bytearray(around[place]) if piece.base == PARENT else bytearray(length)
            block[piece.offset - place : piece.offset - place + piece.length] = content
            content = memoryview(block)
        if joined and start + len(joined) != place:
            parts.append((start, bytes(joined)))
            joined.clear()
        if not joined:
            start = place
        joined += content
    parts.append((start, bytes(joined)))
    return parts


def write_avhd(map_: AvhdMap, pieces: list[Piece], offset: int, data: bytes | memoryview) -> Script[None]:
    """Submit the pieces that go to the AVHD. Their states change in ``commit``, after this has ended well."""
    view = memoryview(data)
    for piece in pieces:
        part = bytes(view[piece.offset - offset : piece.offset - offset + piece.length])
        if piece.kind == "avhd":
            yield Write(DATA_FILE, piece.offset, part)
        elif piece.kind == "copy_up":
            source = PARENT_FILE if piece.base == PARENT else None
            start, block = yield from build_block(map_, piece, part, source=source)
            yield Write(DATA_FILE, start, block)


def commit(map_: AvhdMap, pieces: list[Piece]) -> None:
    """The AVHD holds the pieces: their blocks are DATA from here on."""
    for piece in pieces:
        if piece.kind != "parent" and piece.base != DATA:
            map_.set_range(*block_span(map_, piece.offset, piece.length), DATA)


@attrs.frozen
class ZeroPlan:
    """``edges`` are parts of blocks, written as zeroes; ``whole`` and ``parent`` are (offset, length)."""

    edges: list[tuple[int, int]]
    whole: list[tuple[int, int]]
    parent: list[tuple[int, int]]


def plan_zeroes(map_: AvhdMap, merge: Merge | None, offset: int, length: int) -> ZeroPlan | None:
    """How a range is zeroed: whole blocks by their state alone. MUST_WAIT as in ``plan_write``."""
    pieces = plan_write(map_, merge, offset, length)
    if pieces is None:
        return MUST_WAIT
    size = map_.head.block_bytes
    plan = ZeroPlan([], [], [])
    for piece in pieces:
        end = piece.offset + piece.length
        if piece.kind == "parent":
            plan.parent.append((piece.offset, piece.length))
            continue
        if piece.kind == "copy_up" and piece.base == ZERO:
            continue  # zeroes in a block of zeroes
        low = -(-piece.offset // size) * size
        high = end if end == map_.head.size_bytes else end // size * size
        if high <= low:
            plan.edges.append((piece.offset, piece.length))
            continue
        if low > piece.offset:
            plan.edges.append((piece.offset, low - piece.offset))
        plan.whole.append((low, high - low))
        if end > high:
            plan.edges.append((high, end - high))
    return plan


def commit_zeroes(map_: AvhdMap, plan: ZeroPlan) -> None:
    """Whole blocks read as zeroes from here on; this needs no space and cannot fail."""
    for offset, length in plan.whole:
        map_.set_range(*block_span(map_, offset, length), ZERO)


def write_parent(pieces: list[Piece], offset: int, data: bytes | memoryview) -> Script[None]:
    """Submit the pieces that go to the parent."""
    view = memoryview(data)
    for piece in pieces:
        if piece.kind == "parent":
            part = view[piece.offset - offset : piece.offset - offset + piece.length]
            yield Write(PARENT_FILE, piece.offset, bytes(part))


def read(block_bytes: int, runs: list[Run], offset: int, length: int) -> Script[bytes]:
    """What the range reads as, given ``map.runs`` of its blocks (taken by the caller, on its own thread)."""
    parts: list[bytes] = []
    for start, count, state in runs:
        low, high = max(offset, start * block_bytes), min(offset + length, (start + count) * block_bytes)
        if state == ZERO:
            parts.append(bytes(high - low))
        else:
            part = yield Read(DATA_FILE if state == DATA else PARENT_FILE, low, high - low)
            parts.append(part + bytes(high - low - len(part)))
    return b"".join(parts)


def evict(map_: AvhdMap, merge: Merge, piece: Piece, data: bytes) -> Script[None]:
    """Write a block whose entry stands to the parent instead, since the AVHD cannot take it (B2).

    ``piece`` lies within one block, which is in no batch and which nobody else writes. The whole block goes
    to the parent durably before its entry is cleared; a piece that is the whole block needs nothing of the
    AVHD, which may not be readable either. The caller forgets the entry in memory afterwards.
    """
    size = map_.head.block_bytes
    block = piece.offset // size
    whole = piece.length == min(size, map_.head.size_bytes - block * size)
    source = None if whole or piece.base == ZERO else DATA_FILE if piece.base == DATA else PARENT_FILE
    start, content = yield from build_block(map_, piece, data, source=source)
    yield Write(PARENT_FILE, start, content)
    yield from merge.settle_block(block)


def by_block(map_: AvhdMap, pieces: list[Piece]) -> list[Piece]:
    """The pieces that go to the AVHD, cut at the blocks' borders."""
    size = map_.head.block_bytes
    cut: list[Piece] = []
    for piece in pieces:
        offset, end = piece.offset, piece.offset + piece.length
        while piece.kind != "parent" and offset < end:
            length = min(end, (offset // size + 1) * size) - offset
            cut.append(attrs.evolve(piece, offset=offset, length=length))
            offset += length
    return cut
