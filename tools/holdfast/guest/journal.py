"""The journal's layout on its disk: pure functions, shared by the guest that writes and the checker.

    block 0            header: magic, version, journal id, blocks of the ring, blocks of the load area
    blocks 1 .. R      the ring: 32 records of 128 bytes in each block of 4 KiB
    blocks R+1 .. R+L  the load area: whole blocks of bytes that follow from (journal id, number)

Record number s (the first is 1) lives in slot (s - 1) modulo the ring's slots. A block is always
written whole, so a second owner with an older picture of it would wipe out the first one's records:
two writers at once show as *lost* records, not only as mixed ones.

The n-th load write goes to the block, and has the bytes, that ``load_block`` says; a record carries the
number of load writes that were made before it. So a checker knows from the newest acknowledged record
what every block of the load area must hold, at least.

    record   0  4s magic "HFR1"      8  Q epoch       24  Q load writes    40  Q monotonic ns
             4  I  zero             16  Q sequence    32  Q wall clock ns  48  64s node    112  16s digest
"""

import hashlib
import struct
from collections.abc import Callable
from typing import Final, NamedTuple

BLOCK_BYTES: Final = 4096
RECORD_BYTES: Final = 128
RECORDS_PER_BLOCK: Final = BLOCK_BYTES // RECORD_BYTES
BLOCKS_MIN: Final = 16
NODE_BYTES_MAX: Final = 64

_HEADER_MAGIC: Final = b"HOLDFAST-JOURNAL"
_HEADER: Final = struct.Struct(">16sI16sQQ")
_RECORD_MAGIC: Final = b"HFR1"
_RECORD: Final = struct.Struct(">4sIQQQQQ64s")
_LOAD_MAGIC: Final = b"HFL1"
_LOAD: Final = struct.Struct(">4sIQ")
_DIGEST_BYTES: Final = 16
VERSION: Final = 1


class JournalError(Exception):
    """The disk holds no journal, or a damaged one; the message is one line."""


class Layout(NamedTuple):
    """What the header says."""

    journal_id: bytes
    ring_blocks: int
    load_blocks: int

    @property
    def slots(self) -> int:
        return self.ring_blocks * RECORDS_PER_BLOCK


class Record(NamedTuple):
    epoch: int
    sequence: int
    node: str
    load_writes: int
    wall_ns: int
    monotonic_ns: int


def _digest(journal_id: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, key=journal_id, digest_size=_DIGEST_BYTES).digest()


def plan_layout(size_bytes: int, journal_id: bytes) -> Layout:
    """Half of the disk is the ring, half is for load. Raises JournalError for a disk that is too small."""
    blocks = size_bytes // BLOCK_BYTES
    if blocks < BLOCKS_MIN:
        raise JournalError(f"a journal's disk has at least {BLOCKS_MIN * BLOCK_BYTES} bytes")
    ring_blocks = blocks // 2
    return Layout(journal_id, ring_blocks, blocks - 1 - ring_blocks)


def encode_header(layout: Layout) -> bytes:
    """The header block. What matters lies in its first sector, which is never torn."""
    head = _HEADER.pack(_HEADER_MAGIC, VERSION, layout.journal_id, layout.ring_blocks, layout.load_blocks)
    return (head + _digest(layout.journal_id, head)).ljust(BLOCK_BYTES, b"\0")


def decode_header(block: bytes, size_bytes: int) -> Layout | None:
    """The layout; None for a block of zeroes (a fresh disk). Raises JournalError for anything else."""
    if not any(block):
        return None
    magic, version, journal_id, ring_blocks, load_blocks = _HEADER.unpack_from(block)
    if magic != _HEADER_MAGIC:
        raise JournalError("the disk holds something else than a journal; it is left alone")
    if version != VERSION:
        raise JournalError(f"the journal has version {version}, known is {VERSION}")
    head, digest = block[: _HEADER.size], block[_HEADER.size : _HEADER.size + _DIGEST_BYTES]
    if _digest(journal_id, head) != digest:
        raise JournalError("the journal's header is damaged")
    if ring_blocks < 1 or (1 + ring_blocks + load_blocks) * BLOCK_BYTES > size_bytes:
        raise JournalError("the journal is larger than its disk")
    return Layout(journal_id, ring_blocks, load_blocks)


def encode_record(layout: Layout, record: Record) -> bytes:
    """The 128 bytes of one record."""
    body = _RECORD.pack(
        _RECORD_MAGIC,
        0,
        record.epoch,
        record.sequence,
        record.load_writes,
        record.wall_ns,
        record.monotonic_ns,
        record.node.encode(),
    )
    return body + _digest(layout.journal_id, body)


def decode_record(layout: Layout, data: bytes) -> Record | None:
    """The record, or None where there is none or a damaged one: for a reader both mean "not there"."""
    body, digest = data[: _RECORD.size], data[_RECORD.size : _RECORD.size + _DIGEST_BYTES]
    if body[:4] != _RECORD_MAGIC or _digest(layout.journal_id, body) != digest:
        return None
    _, _, epoch, sequence, load_writes, wall_ns, monotonic_ns, node = _RECORD.unpack(body)
    name = node.rstrip(b"\0").decode(errors="replace")
    return Record(epoch, sequence, name, load_writes, wall_ns, monotonic_ns)


def slot_of(layout: Layout, sequence: int) -> tuple[int, int]:
    """(index of the block in the ring, index of the record in the block)."""
    return divmod((sequence - 1) % layout.slots, RECORDS_PER_BLOCK)


def ring_offset(block_index: int) -> int:
    """Where on the disk a block of the ring lies."""
    return (1 + block_index) * BLOCK_BYTES


def decode_ring_block(layout: Layout, block: bytes) -> list[Record | None]:
    """The 32 records of a block."""
    return [
        decode_record(layout, block[start : start + RECORD_BYTES])
        for start in range(0, BLOCK_BYTES, RECORD_BYTES)
    ]


def find_last(layout: Layout, read_block: Callable[[int], bytes]) -> Record | None:
    """The newest record, in about log2(blocks) reads; None for an empty journal.

    Records are flushed one by one, so along the ring the sequences rise up to the newest one, and
    whatever follows is older by a lap, or empty: a sorted row with one step, searched by halving.
    """

    def first_sequence(index: int) -> int:
        record = decode_ring_block(layout, read_block(index))[0]
        return record.sequence if record else 0

    start = first_sequence(0)
    if not start:
        return None
    low, high = 0, layout.ring_blocks
    while high - low > 1:
        middle = (low + high) // 2
        if first_sequence(middle) >= start:
            low = middle
        else:
            high = middle
    records = [record for record in decode_ring_block(layout, read_block(low)) if record is not None]
    return max(records, key=lambda record: record.sequence)


def load_target(layout: Layout, number: int) -> int:
    """Which block of the load area the load write ``number`` (from 1) goes to."""
    digest = hashlib.blake2b(number.to_bytes(8, "big"), key=layout.journal_id, digest_size=8).digest()
    return int.from_bytes(digest, "big") % layout.load_blocks


def load_offset(layout: Layout, block_index: int) -> int:
    """Where on the disk a block of the load area lies."""
    return (1 + layout.ring_blocks + block_index) * BLOCK_BYTES


def load_block(layout: Layout, number: int) -> bytes:
    """The 4 KiB that the load write ``number`` writes: incompressible, and known from the number alone."""
    head = _LOAD.pack(_LOAD_MAGIC, 0, number)
    return head + hashlib.shake_128(layout.journal_id + head).digest(BLOCK_BYTES - _LOAD.size)


def load_number(layout: Layout, block: bytes) -> int | None:
    """Which load write a block holds; None for anything that is not exactly one of them."""
    magic, _, number = _LOAD.unpack_from(block)
    if magic != _LOAD_MAGIC or not number or block != load_block(layout, number):
        return None
    return int(number)
