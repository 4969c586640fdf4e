"""Merging an AVHD back into its parent, in batches, resumable and idempotent (rule B6).

Theory of operation. One batch of blocks goes through four steps, and may die between any two of them:

    copy      AVHD -> parent, then fdatasync the parent     the entries still stand: reads see the AVHD
    clear     the blocks' entries, durably                  from here on the parent's copy is the block
    forget    the entries in memory                         reads and writes go to the parent
    punch     the AVHD's space                              nobody reads it any more

Doing a batch again from the start is harmless as long as its entries stand. A guest's write meets the batch
like this (``must_wait``, ``leave``):

    no entry                    to the parent; it cannot collide, since only blocks with entries are copied
    entry, not being cleared    to the AVHD, and the block leaves the batch: what was copied of it is stale
    entry, clearing submitted   waits until the entry is gone, then goes to the parent

So the set of entries only shrinks, and no order of crashes can let a stale copy win over a flushed write.

A block that the guest rewrites all the time would leave every batch. After a batch that little came of, the
next one is *firm*: small, and its writes wait from its start, as if its clearing had been submitted then.
Likewise blocks that are always busy are *claimed*: the next write to them waits until the batch has had them.
"""

from collections.abc import Iterable, Sequence

import attrs

from daemonkit.errors import InvariantBroken
from daemonkit.units import MiB
from diskd.core.avhd import (
    BLOCKS_PER_SECTOR,
    DATA,
    DATA_FILE,
    MAP_FILE,
    PARENT,
    PARENT_FILE,
    SECTOR_BYTES,
    ZERO,
    AvhdMap,
    clear_in_sector,
    decode_sector,
    encode_sector,
    final_sync,
)
from diskd.core.steps import Punch, Read, Script, Write

# One read-and-write pair of the copy: large enough for a disk, small enough for memory.
COPY_BYTES_MAX = 1 * MiB

# And one step of giving space back.
PUNCH_BYTES_MAX = 4 * MiB

# Writes to a firm batch wait for a copy and two syncs; it is kept small, so that they wait for little else.
FIRM_BLOCKS_MAX = 64

# After a batch of which less than one part in so many was left, the next one is firm.
FRUIT_SHARE = 4

# Zeroed blocks cost no copy, so a batch takes that many more of them.
ZEROES_FACTOR = 16


@attrs.define(eq=False)
class Merge:
    """The batch in hand of one AVHD. All methods are synchronous; scripts run between them.

    ``copying`` are the blocks whose copy may be under way (also those that left the batch since),
    ``batch`` those still in it, ``clearing`` those whose clearing has been submitted.
    """

    map: AvhdMap
    blocks_max: int
    cursor: int = 0
    copying: frozenset[int] = frozenset()
    batch: set[int] = attrs.field(factory=set)
    clearing: frozenset[int] = frozenset()
    claimed: frozenset[int] = frozenset()
    fruitless: bool = False

    def must_wait(self, first: int, count: int) -> bool:
        """Whether a write to some of these blocks has to wait."""
        if not self.clearing and not self.claimed:
            return False
        if count == 1:
            return first in self.clearing or first in self.claimed
        blocks = range(first, first + count)
        return not (self.clearing.isdisjoint(blocks) and self.claimed.isdisjoint(blocks))

    def leave(self, first: int, count: int) -> None:
        """These are written to the AVHD again: what was copied of them is stale, they leave the batch."""
        if self.batch:
            self.batch.difference_update(range(first, first + count))

    def start_batch(self, busy: Iterable[int] = ()) -> list[tuple[int, int, int]]:
        """Choose the next blocks, as runs with their state, or nothing where no entry can be taken now.

        ``busy`` blocks have a write of theirs under way and are left for a later batch.
        """
        if self.copying or self.clearing:
            raise InvariantBroken("a batch of the merge was started within another")
        taken = frozenset(busy)
        self.claimed = frozenset(block for block in self.claimed if self.map.state(block) != PARENT)
        blocks = sorted(self.claimed - taken) or self._next(taken)
        self.claimed -= frozenset(blocks)
        if self.fruitless:
            blocks = blocks[:FIRM_BLOCKS_MAX]
            self.clearing = frozenset(blocks)
        self.copying, self.batch = frozenset(blocks), set(blocks)
        self.cursor = blocks[-1] + 1 if blocks else 0
        return self._runs(blocks)

    def _next(self, busy: frozenset[int]) -> list[int]:
        """From the cursor on, so that a block which the guest rewrites all the time holds up no other."""
        for start in (self.cursor, 0):
            found = self.map.entries_from(start, self.blocks_max * ZEROES_FACTOR + len(busy))
            blocks: list[int] = []
            to_copy = 0
            for block in found:
                if block not in busy:
                    to_copy += self.map.state(block) == DATA
                    if to_copy > self.blocks_max:
                        break
                    blocks.append(block)
            if blocks:
                return blocks
        return []

    def claim(self) -> None:
        """Every entry is busy: let no further write begin to some of them before a batch has had them."""
        self.claimed = frozenset(self.map.entries_from(0, FIRM_BLOCKS_MAX))

    def unclaim(self) -> None:
        """No batch will come (all is merged, or merging stopped): let the writes go on."""
        self.claimed = frozenset()

    def _runs(self, blocks: Sequence[int]) -> list[tuple[int, int, int]]:
        runs: list[tuple[int, int, int]] = []
        for block in blocks:
            state = self.map.state(block)
            if runs and runs[-1][0] + runs[-1][1] == block and runs[-1][2] == state:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, state)
            else:
                runs.append((block, 1, state))
        return runs

    def copy(self, runs: Sequence[tuple[int, int, int]]) -> Script[None]:
        """The blocks' content into the parent, durably. The entries stand: dying here costs nothing."""
        head = self.map.head
        for first, count, state in runs:
            offset = first * head.block_bytes
            end = min((first + count) * head.block_bytes, head.size_bytes)
            if state == ZERO:
                yield from _punch_sliced(PARENT_FILE, offset, end)
                continue
            while offset < end:
                length = min(COPY_BYTES_MAX, end - offset)
                data = yield Read(DATA_FILE, offset, length)
                yield Write(PARENT_FILE, offset, data)
                offset += length
        yield from final_sync(PARENT_FILE)

    def submit_clear(self) -> list[int]:
        """The copy is durable: the blocks still in the batch, whose entries ``clear`` takes back now."""
        self.fruitless = len(self.batch) * FRUIT_SHARE < len(self.copying)
        self.clearing, self.copying = frozenset(self.batch), frozenset()
        self.batch = set()
        return sorted(self.clearing)

    def clear(self, blocks: Sequence[int]) -> Script[None]:
        """Durably clear the entries. Starts from what the file holds, never from memory, whose newer states
        may vouch for data that is not synced yet; no flush of the same map runs at the same time."""
        nonce = self.map.head.nonce
        by_sector: dict[int, list[int]] = {}
        for block in blocks:
            by_sector.setdefault(block // BLOCKS_PER_SECTOR, []).append(block)
        for index, members in sorted(by_sector.items()):
            sector = yield Read(MAP_FILE, index * SECTOR_BYTES, SECTOR_BYTES)
            cells = clear_in_sector(decode_sector(index, nonce, sector), index, members)
            yield Write(MAP_FILE, index * SECTOR_BYTES, encode_sector(index, nonce, cells))
        if by_sector:
            yield from final_sync(MAP_FILE)

    def settle_block(self, block: int) -> Script[None]:
        """The parent has this block (written, not yet synced): sync it, then clear the one entry."""
        yield from final_sync(PARENT_FILE)
        yield from self.clear([block])

    def forget(self) -> list[tuple[int, int]]:
        """The entries are durably gone: memory follows. Returns the (offset, length) that can be punched."""
        head = self.map.head
        ranges: list[tuple[int, int]] = []
        for first, count, state in self._runs(sorted(self.clearing)):
            self.map.set_range(first, count, PARENT)
            if state == DATA:
                start = first * head.block_bytes
                ranges.append((start, min(count * head.block_bytes, head.size_bytes - start)))
        self.clearing = frozenset()
        return ranges

    def abandon_batch(self) -> None:
        """A step failed or was cut short: the entries stand in memory, and the batch can be done again.

        The file may have lost those being cleared: their sectors count as changed, so that the next flush
        vouches for them again before anybody relies on it.
        """
        self.map.dirty.update(block // BLOCKS_PER_SECTOR for block in self.clearing)
        self.copying, self.clearing, self.batch = frozenset(), frozenset(), set()

    @property
    def is_done(self) -> bool:
        """Nothing but the parent is left."""
        return self.map.entries == 0


def punch(ranges: Sequence[tuple[int, int]]) -> Script[None]:
    """Give back the AVHD's space, after every read of it that began before ``forget`` has ended."""
    for offset, length in ranges:
        yield from _punch_sliced(DATA_FILE, offset, offset + length)


def _punch_sliced(name: str, offset: int, end: int) -> Script[None]:
    """A file's other I/O waits for each of these: a punch of many extents takes seconds."""
    while offset < end:
        length = min(PUNCH_BYTES_MAX, end - offset)
        yield Punch(name, offset, length)
        offset += length
