"""The verdict on a guest's history: pure functions over the acknowledgements and the disk.

    lost      acknowledged, but not on the disk: the record's slot holds neither it nor a later lap's, or a
              block of the load area holds an older write than the newest acknowledged record counted
    overlap   an acknowledgement under an older epoch after the first one under a newer epoch
    gap       the longest time between two acknowledgements, of whichever owner

The acknowledgements must have been copied before the disk was read (or frozen): then everything in them
has to be there. Lines of equal time count in the file's order.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from holdfast.guest.acks import Line
from holdfast.guest.journal import (
    BLOCK_BYTES,
    RECORDS_PER_BLOCK,
    Layout,
    Record,
    decode_header,
    decode_ring_block,
    load_number,
    load_offset,
    load_target,
    ring_offset,
    slot_of,
)

ReadDisk = Callable[[int, int], bytes]
EXAMPLES_MAX: Final = 5  # A verdict names a few of the lost records, not all.


class Verdict(NamedTuple):
    """``owners``: one row per epoch, with the first and last sequence acknowledged under it."""

    records: int
    lost: int
    overlaps: int
    owners: list[tuple[int, str, int, int]]
    longest_gap_s: float
    refused: list[tuple[int, str, int]]
    load_blocks: int
    examples: list[str]

    @property
    def is_good(self) -> bool:
        return not self.lost and not self.overlaps

    def as_json(self) -> dict[str, object]:
        return self._asdict()


def judge(lines: Sequence[Line], read: ReadDisk, size_bytes: int) -> Verdict:
    """Compare what was acknowledged with what is there. Raises JournalError where the disk is no journal."""
    acks = sorted((line for line in lines if line.kind == "ack"), key=lambda line: line.monotonic_ns)
    lost, load_blocks = _judge_disk(acks, read, size_bytes)
    return Verdict(
        records=len({(ack.epoch, ack.sequence) for ack in acks}),
        lost=len(lost),
        overlaps=count_overlaps(acks),
        owners=list_owners(acks),
        longest_gap_s=longest_gap_ns(acks) / 1e9,
        refused=sorted({(line.epoch, line.node, line.sequence) for line in lines if line.kind == "refused"}),
        load_blocks=load_blocks,
        examples=lost[:EXAMPLES_MAX],
    )


def count_overlaps(acks: Sequence[Line]) -> int:
    """Acknowledgements, in order of time, under an epoch older than one seen before."""
    newest, overlaps = 0, 0
    for ack in acks:
        if ack.epoch < newest:
            overlaps += 1
        newest = max(newest, ack.epoch)
    return overlaps


def list_owners(acks: Sequence[Line]) -> list[tuple[int, str, int, int]]:
    """(epoch, node, first sequence, last sequence), by epoch. One epoch on two nodes gives two rows."""
    owners: dict[tuple[int, str], tuple[int, int]] = {}
    for ack in acks:
        first, last = owners.get((ack.epoch, ack.node), (ack.sequence, ack.sequence))
        owners[ack.epoch, ack.node] = (min(first, ack.sequence), max(last, ack.sequence))
    return [(epoch, node, *span) for (epoch, node), span in sorted(owners.items())]


def longest_gap_ns(acks: Sequence[Line]) -> int:
    """The longest time between neighbours, in order of time; 0 for fewer than two."""
    times = [ack.monotonic_ns for ack in acks]
    return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0)


def _judge_disk(acks: Sequence[Line], read: ReadDisk, size_bytes: int) -> tuple[list[str], int]:
    """(what is lost, how many blocks of the load area were verified)."""
    if not acks:
        return [], 0
    layout = decode_header(read(0, BLOCK_BYTES), size_bytes)
    if layout is None:
        return [f"record {ack.sequence} of epoch {ack.epoch}: the disk is empty" for ack in acks], 0
    by_block: dict[int, list[Line]] = {}
    for ack in acks:
        by_block.setdefault(slot_of(layout, ack.sequence)[0], []).append(ack)
    lost: list[str] = []
    load_writes = 0
    newest_sequence = 0
    for index, expected in sorted(by_block.items()):
        found = decode_ring_block(layout, read(ring_offset(index), BLOCK_BYTES))
        lost += _judge_block(layout, expected, found)
        acknowledged = {(ack.epoch, ack.sequence) for ack in expected}
        for record in found:
            is_acknowledged = record is not None and (record.epoch, record.sequence) in acknowledged
            if record is not None and is_acknowledged and record.sequence > newest_sequence:
                newest_sequence, load_writes = record.sequence, record.load_writes
    lost_load, load_blocks = _judge_load(layout, load_writes, read)
    return lost + lost_load, load_blocks


def _judge_block(layout: Layout, expected: Sequence[Line], found: Sequence[Record | None]) -> list[str]:
    """A block holds one lap of the ring; acknowledged records of that lap or a later one must be there."""
    present = {(record.epoch, record.node, record.sequence) for record in found if record is not None}
    lap = max(((sequence - 1) // layout.slots for _, _, sequence in present), default=-1)
    lost = []
    for ack in expected:
        if (ack.sequence - 1) // layout.slots < lap:
            continue  # overwritten, as it should be, by a later lap
        if (ack.epoch, ack.node, ack.sequence) not in present:
            there = found[(ack.sequence - 1) % RECORDS_PER_BLOCK]
            instead = f"record {there.sequence} of epoch {there.epoch}" if there else "no record"
            lost.append(f"record {ack.sequence} of epoch {ack.epoch} on {ack.node}: its slot holds {instead}")
    return lost


def _judge_load(layout: Layout, load_writes: int, read: ReadDisk) -> tuple[list[str], int]:
    """Every block of the load area holds the newest write to it up to ``load_writes``, or a later one."""
    newest: dict[int, int] = {}
    for number in range(1, load_writes + 1):
        newest[load_target(layout, number)] = number
    lost = []
    for index, number in sorted(newest.items()):
        found = load_number(layout, read(load_offset(layout, index), BLOCK_BYTES))
        if found is None or found < number or load_target(layout, found) != index:
            lost.append(f"load block {index}: write {number} expected, found {found or 'something else'}")
    return lost, len(newest)
