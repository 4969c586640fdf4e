"""The AVHD of one image: the file that takes new writes while a checkpoint stands, and its map.

Theory of operation. Each block of the image is in one of three states, and the map is the only authority
on it; it is never derived from holes (a written zero block and a block never written look the same):

    PARENT   never written since the fork: read from disk.raw
    DATA     the AVHD has it, at the same offset as in the image
    ZERO     reads as zeroes; what the AVHD holds there means nothing

The map in memory is ahead of the map on disk. FLUSH closes the gap in this order: the AVHD's data is
synced, then the map's changed sectors are written and synced, then the reply. A sector written before the
data it vouches for would, after a power loss, show a hole where an older, flushed block was.

    checkpoint/head       whose map this is; written last at the fork, removed first at the end
    checkpoint/live       which mapped copy may be ahead of the map: one sector, rewritten in place at every
                          opening, so that an image can be opened on a full disk
    checkpoint/disk.map   sectors of 512 bytes, all written at the fork, so that no later change needs space
    checkpoint/disk.avhd  sparse, as large as the image

    one sector of the map (a sector is written whole or not at all, as disks promise):
    +--------+--------+----------------+----------------------------------------------------+
    | crc32  | index  | nonce          | 1984 blocks, two bits each, lowest bits first       |
    | u32 be | u32 be | 8 bytes        | 496 bytes                                          |
    +--------+--------+----------------+----------------------------------------------------+
    the CRC covers everything after itself; the nonce is the head's, so that no stale sector is believed

A head without a readable map is Damaged and the image is not opened: falling back to the parent would
silently take back flushed writes. No head means that the fork was never completed (or already ended).
"""

import errno
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

import attrs
import numpy as np
import numpy.typing as npt

from diskd.core.sealed_line import seal, unseal
from diskd.core.steps import Read, Remove, Replace, Script, Size, Sync, Truncate, Write
from diskd.errors import Damaged

PARENT: Final = 0
DATA: Final = 1
ZERO: Final = 2

DIRECTORY: Final = "checkpoint"
HEAD_FILE: Final = "checkpoint/head"
LIVE_FILE: Final = "checkpoint/live"
MAP_FILE: Final = "checkpoint/disk.map"
DATA_FILE: Final = "checkpoint/disk.avhd"
PARENT_FILE: Final = "disk.raw"

SECTOR_BYTES: Final = 512
_HEADER: Final = struct.Struct(">II8s")
_CELL_BYTES: Final = SECTOR_BYTES - _HEADER.size
_SECTOR: Final = np.dtype(
    [("check", ">u4"), ("index", ">u4"), ("nonce", np.uint8, 8), ("cells", np.uint8, _CELL_BYTES)]
)
BLOCKS_PER_SECTOR: Final = _CELL_BYTES * 4
HEAD_BYTES_MAX: Final = 4096
LIVE_NONCE_BYTES_MAX: Final = 128
_CHUNK_SECTORS: Final = 2048  # the map is read and written 1 MiB at a time
# 2**16 sectors are 32 MiB of map for 512 GiB of image at 4 KiB blocks; far above what one daemon serves.
SECTORS_MAX: Final = 1 << 22
_VERSION: Final = 1
_SCAN_CELLS: Final = 1 << 16
_NEAR_CELLS: Final = 1 << 10

Cells = npt.NDArray[np.uint8]
Run = tuple[int, int, int]  # first block, count, state


@attrs.frozen
class Head:
    """Whose map this is. ``live_nonce`` names the mapped copy (shell/live_map.py) that may be ahead of it; a
    loaded head has the one that ``live`` names. Empty: none is to be believed."""

    checkpoint: str
    image_uuid: str
    size_bytes: int
    block_bytes: int
    nonce: str
    live_nonce: str

    @property
    def blocks(self) -> int:
        return -(-self.size_bytes // self.block_bytes)

    @property
    def sectors(self) -> int:
        return -(-self.blocks // BLOCKS_PER_SECTOR)


def cell_bytes(blocks: int) -> int:
    """How much memory the states of ``blocks`` blocks take."""
    return -(-blocks // BLOCKS_PER_SECTOR) * _CELL_BYTES


def encode_head(head: Head) -> bytes:
    """One JSON line and its CRC-32."""
    return seal(_VERSION, attrs.asdict(head))


def decode_head(data: bytes) -> Head:
    """Raises Damaged."""
    try:
        head = Head(**unseal(_VERSION, data))
        texts = (head.checkpoint, head.image_uuid, head.nonce, head.live_nonce)
        if not all(type(text) is str for text in texts) or len(bytes.fromhex(head.nonce)) != 8:
            raise ValueError("fields")
        if type(head.size_bytes) is not int or type(head.block_bytes) is not int:
            raise ValueError("fields")
        if head.block_bytes < 512 or head.size_bytes <= 0 or head.sectors > SECTORS_MAX:
            raise ValueError("sizes")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"{HEAD_FILE} is damaged ({error})") from error
    return head


def encode_live(head: Head) -> bytes:
    """The sector that names the mapped copy of this head's map."""
    body = bytes.fromhex(head.nonce) + head.live_nonce.encode().ljust(LIVE_NONCE_BYTES_MAX, b"\0")
    return (struct.pack(">I", zlib.crc32(body)) + body).ljust(SECTOR_BYTES, b"\0")


def decode_live(head: Head, sector: bytes) -> str:
    """The mapped copy's nonce, or nothing where the sector is torn: then there was a power loss, and no
    mapped copy can be of this boot."""
    body = sector[4 : 12 + LIVE_NONCE_BYTES_MAX]
    whole = len(sector) == SECTOR_BYTES and struct.unpack(">I", sector[:4])[0] == zlib.crc32(body)
    if not whole or body[:8] != bytes.fromhex(head.nonce):
        return ""
    return body[8:].rstrip(b"\0").decode(errors="replace")


def encode_sector(index: int, nonce: str, cells: bytes) -> bytes:
    """One sector of the map; ``cells`` are its 496 bytes of states."""
    body = struct.pack(">I8s", index, bytes.fromhex(nonce)) + cells
    return struct.pack(">I", zlib.crc32(body)) + body


def encode_empty(first: int, count: int, nonce: str) -> bytes:
    """So many neighbouring sectors without an entry, each as ``encode_sector`` makes it.

    CRC-32 is linear: what an index's bit changes in it is the same for all. One by one they would take a
    second for a TiB, and the interpreter's lock with it.
    """
    nothing = bytes(_CELL_BYTES)
    zero = zlib.crc32(encode_sector(0, nonce, nothing)[4:])
    indices = np.arange(first, first + count, dtype=np.uint32)
    checks = np.full(count, zero, np.uint32)
    for bit in range(SECTORS_MAX.bit_length()):
        change = zlib.crc32(encode_sector(1 << bit, nonce, nothing)[4:]) ^ zero
        checks[(indices >> bit) & 1 == 1] ^= np.uint32(change)
    sectors = np.zeros(count, _SECTOR)
    sectors["check"], sectors["index"] = checks, indices
    sectors["nonce"] = np.frombuffer(bytes.fromhex(nonce), np.uint8)
    return sectors.tobytes()


def decode_sector(index: int, nonce: str, sector: bytes) -> bytes:
    """The states of one sector. Raises Damaged."""
    if len(sector) != SECTOR_BYTES:
        raise Damaged(f"{MAP_FILE} is damaged: it ends within sector {index}")
    check, found, found_nonce = _HEADER.unpack_from(sector)
    if check != zlib.crc32(sector[4:]) or found != index or found_nonce != bytes.fromhex(nonce):
        raise Damaged(f"{MAP_FILE} is damaged in sector {index}")
    cells = sector[_HEADER.size :]
    if _has_undefined_state(cells):
        raise Damaged(f"{MAP_FILE} holds an undefined state in sector {index}")
    return cells


def _has_undefined_state(cells: bytes) -> bool:
    packed = np.frombuffer(cells, np.uint8)
    return bool((packed & (packed >> 1) & 0x55).any())


@attrs.define(eq=False)
class AvhdMap:
    """The states of all blocks, two bits each, in a buffer of the caller's (plain or shared memory).

    ``dirty`` are the sectors that differ from the file, ``entries`` how many blocks are not PARENT and
    ``data_blocks`` how many of them are DATA.
    """

    head: Head
    cells: Cells
    dirty: set[int]
    entries: int
    data_blocks: int
    # The same memory: reading one byte of it takes a third of the time that numpy takes.
    view: memoryview = attrs.field(
        init=False, default=attrs.Factory(lambda self: memoryview(self.cells.data), takes_self=True)
    )

    @classmethod
    def over(cls, head: Head, buffer: Any) -> "AvhdMap":
        """The map whose states are in ``buffer``, a writable one of ``cell_bytes`` bytes."""
        cells = np.frombuffer(buffer, np.uint8)
        if len(cells) != cell_bytes(head.blocks):
            raise Damaged("the map's memory has another size than the map")
        new = cls(head, cells, set(), 0, 0)
        for start in range(0, len(cells), 1 << 20):
            states = _unpack(cells[start : start + (1 << 20)])
            data = int(np.count_nonzero(states == DATA))
            new.data_blocks += data
            new.entries += data + int(np.count_nonzero(states == ZERO))
        return new

    @classmethod
    def empty(cls, head: Head) -> "AvhdMap":
        """All PARENT, in plain memory."""
        return cls.over(head, bytearray(cell_bytes(head.blocks)))

    def state(self, block: int) -> int:
        """PARENT, DATA or ZERO."""
        return (self.view[block >> 2] >> ((block & 3) * 2)) & 3

    def uniform(self, first: int, count: int) -> int | None:
        """The state that all of ``count`` blocks from ``first`` on have, or None where they differ."""
        state = (self.view[first >> 2] >> ((first & 3) * 2)) & 3
        if count == 1:
            return state
        end = first + count
        low, high = -(-first // 4), end >> 2  # whole cells
        if low < high and self.view[low:high].tobytes().count(state * 0x55) != high - low:
            return None
        edges = (*range(first, min(low * 4, end)), *range(max(high * 4, first), end))
        return state if all(self.state(block) == state for block in edges) else None

    def set_range(self, first: int, count: int, state: int) -> None:
        """Give ``count`` blocks from ``first`` on one state."""
        if count == 1:
            self._set_one(first, state)
            return
        end = first + count
        low, high = first >> 2, -(-end // 4)
        states = _unpack(self.cells[low:high])
        part = states[first - low * 4 : end - low * 4]
        data, entries = int(np.count_nonzero(part == DATA)), int(np.count_nonzero(part))
        part[:] = state
        self.data_blocks += (count if state == DATA else 0) - data
        self.entries += (count if state else 0) - entries
        self.cells[low:high] = _pack(states)
        self.dirty.update(range(first // BLOCKS_PER_SECTOR, (end - 1) // BLOCKS_PER_SECTOR + 1))

    def _set_one(self, block: int, state: int) -> None:
        """As ``set_range``: most writes are of one block, and numpy takes ten times as long for it."""
        place, shift = block >> 2, (block & 3) * 2
        cell = self.view[place]
        before = (cell >> shift) & 3
        self.view[place] = cell & ~(3 << shift) & 0xFF | state << shift
        self.data_blocks += (state == DATA) - (before == DATA)
        self.entries += (state != PARENT) - (before != PARENT)
        self.dirty.add(block // BLOCKS_PER_SECTOR)

    def release(self) -> None:
        """Let go of the memory; nothing but ``head`` means anything afterwards."""
        self.view.release()
        self.cells = self.cells[:0].copy()
        self.view = memoryview(self.cells.data)

    def runs(self, first: int, count: int) -> list[Run]:
        """The states of ``count`` blocks from ``first`` on, equal neighbours joined."""
        alike = self.uniform(first, count)
        if alike is not None:
            return [(first, count, alike)]
        low = first >> 2
        states = _unpack(self.cells[low : -(-(first + count) // 4)])[first - low * 4 :][:count]
        edges: list[int] = (np.flatnonzero(states[1:] != states[:-1]) + 1).tolist()
        starts, ends = [0, *edges], [*edges, count]
        return [(first + a, b - a, int(states[a])) for a, b in zip(starts, ends, strict=True)]

    def entries_from(self, block: int, limit: int) -> list[int]:
        """Up to ``limit`` blocks at or after ``block`` that are not PARENT, ascending."""
        found: list[int] = []
        start = block >> 2
        while start < len(self.cells) and len(found) < limit:
            part = self.cells[start : start + _SCAN_CELLS]
            if part.any():
                # Only what lies near the first of them is unpacked: that is eight times as large.
                start += int(np.argmax(part != 0))
                numbers = np.flatnonzero(_unpack(self.cells[start : start + _NEAR_CELLS])) + start * 4
                found += numbers[numbers >= block][: limit - len(found)].tolist()
                start += _NEAR_CELLS
            else:
                start += _SCAN_CELLS
        return found

    def take_dirty(self) -> list[tuple[int, bytes]]:
        """The sectors to write, as they are now; they count as written from here on.

        Called before the AVHD is synced: a state set later may vouch for data that this sync misses.
        """
        sectors = [(index, self.sector(index)) for index in sorted(self.dirty)]
        self.dirty.clear()
        return sectors

    def sector(self, index: int) -> bytes:
        """The encoded sector, as memory has it."""
        cells = self.cells[index * _CELL_BYTES : (index + 1) * _CELL_BYTES].tobytes()
        return encode_sector(index, self.head.nonce, cells)

    def mark_all_dirty(self) -> None:
        """Memory is ahead of the file everywhere (it was recovered from the mapped copy)."""
        self.dirty.update(range(self.head.sectors))


def _unpack(packed: Cells) -> Cells:
    states = np.empty((len(packed), 4), np.uint8)
    for place in range(4):
        np.bitwise_and(packed >> (2 * place), 3, out=states[:, place])
    return states.reshape(-1)


def _pack(states: Cells) -> Cells:
    four = states.reshape(-1, 4)
    return (four[:, 0] | (four[:, 1] << 2) | (four[:, 2] << 4) | (four[:, 3] << 6)).astype(np.uint8)


def clear_in_sector(cells: bytes, index: int, blocks: Iterable[int]) -> bytes:
    """The states of sector ``index`` with ``blocks`` (all within it) back to PARENT."""
    changed = bytearray(cells)
    for block in blocks:
        place = block - index * BLOCKS_PER_SECTOR
        changed[place >> 2] &= ~(3 << ((place & 3) * 2)) & 0xFF
    return bytes(changed)


def _write_sectors(sectors: Iterable[tuple[int, bytes]]) -> Iterator[Write]:
    """Neighbouring sectors go out in one write; each still stands for itself."""
    start, joined = -1, bytearray()
    for index, data in sectors:
        if joined and index * SECTOR_BYTES != start + len(joined):
            yield Write(MAP_FILE, start, bytes(joined))
            joined.clear()
        if not joined:
            start = index * SECTOR_BYTES
        joined += data
    if joined:
        yield Write(MAP_FILE, start, bytes(joined))


class SyncFailed(OSError):
    """A failed sync is final (Linux forgets it on retry): the image answers EIO until it is reopened."""


def final_sync(file: str) -> Script[None]:
    """Sync, so that the caller can tell its failure from that of a write, which may be tried again."""
    try:
        yield Sync(file)
    except OSError as error:
        raise SyncFailed(errno.EIO, f"{file}: a sync failed: {error.strerror}") from error


# --- scripts ---------------------------------------------------------------------------------------------


def create(head: Head) -> Script[None]:
    """Durably make an empty AVHD. The head comes last: without it nothing of this counts.

    Leftovers of an earlier one (all of it merged, its removal interrupted) go first, head before map.
    """
    yield from remove()
    yield Truncate(DATA_FILE, head.size_bytes)
    yield Truncate(MAP_FILE, head.sectors * SECTOR_BYTES)
    for start in range(0, head.sectors, _CHUNK_SECTORS):
        count = min(_CHUNK_SECTORS, head.sectors - start)
        yield Write(MAP_FILE, start * SECTOR_BYTES, encode_empty(start, count, head.nonce))
    yield Truncate(LIVE_FILE, SECTOR_BYTES)
    yield Write(LIVE_FILE, 0, encode_live(head))
    yield Sync(LIVE_FILE)
    yield Sync(MAP_FILE)
    yield Sync(DATA_FILE)
    yield Replace(HEAD_FILE, encode_head(head))


def load_head() -> Script[Head | None]:
    """The head, or None where no fork was completed. Raises Damaged."""
    size = yield Size(HEAD_FILE)
    if size is None:
        return None
    if size > HEAD_BYTES_MAX:
        raise Damaged(f"{HEAD_FILE} is damaged: {size} bytes long")
    head = decode_head((yield Read(HEAD_FILE, 0, HEAD_BYTES_MAX)))
    if (yield Size(LIVE_FILE)) is None:
        return attrs.evolve(head, live_nonce="")
    return attrs.evolve(head, live_nonce=decode_live(head, (yield Read(LIVE_FILE, 0, SECTOR_BYTES))))


def load_cells(head: Head) -> Script[bytes]:
    """The durable states, for ``AvhdMap.over``. Raises Damaged at the first sector that is not whole."""
    cells = bytearray(head.sectors * _CELL_BYTES)
    for start in range(0, head.sectors, _CHUNK_SECTORS):
        count = min(_CHUNK_SECTORS, head.sectors - start)
        data = yield Read(MAP_FILE, start * SECTOR_BYTES, count * SECTOR_BYTES)
        for index in _with_entries(data, start, count, head.nonce):
            at = (index - start) * SECTOR_BYTES
            states = decode_sector(index, head.nonce, data[at : at + SECTOR_BYTES])
            cells[index * _CELL_BYTES : (index + 1) * _CELL_BYTES] = states
    if (yield Size(DATA_FILE)) != head.size_bytes:
        raise Damaged(f"{DATA_FILE} is missing or has another size than the image")
    return bytes(cells)


def _with_entries(data: bytes, start: int, count: int, nonce: str) -> list[int]:
    """The sectors that have to be looked at: all that are not whole and empty."""
    size = count * SECTOR_BYTES
    found = np.frombuffer(data.ljust(size, b"\0"), np.uint8).reshape(count, SECTOR_BYTES)
    empty = np.frombuffer(encode_empty(start, count, nonce), np.uint8).reshape(count, SECTOR_BYTES)
    return [start + int(place) for place in np.flatnonzero((found != empty).any(axis=1))]


def renew(head: Head, live_nonce: str) -> Script[Head]:
    """Durably name another mapped copy; the former one is never believed again. Takes no new space."""
    renewed = attrs.evolve(head, live_nonce=live_nonce)
    if (yield Size(LIVE_FILE)) is None:
        yield Truncate(LIVE_FILE, SECTOR_BYTES)
    yield Write(LIVE_FILE, 0, encode_live(renewed))
    yield Sync(LIVE_FILE)
    return renewed


def flush(sectors: list[tuple[int, bytes]], *, parent: bool) -> Script[None]:
    """Make durable what was written before ``sectors`` were taken (AvhdMap.take_dirty).

    ``parent``: it holds unsynced writes too (until its first sync after the cut; always during a merge).
    """
    yield from final_sync(DATA_FILE)
    if sectors:
        yield from _write_sectors(sectors)
        yield from final_sync(MAP_FILE)
    if parent:
        yield from final_sync(PARENT_FILE)


def remove() -> Script[None]:
    """Forget the AVHD, whose map is all PARENT by now (or never was completed). The head goes first."""
    yield Remove(HEAD_FILE)
    yield Remove(LIVE_FILE)
    yield Remove(MAP_FILE)
    yield Remove(DATA_FILE)
