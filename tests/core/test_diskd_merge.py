"""The batches of a merge: what a write takes out of one, what it waits for, and that there is an end."""

from random import Random

import pytest

from diskd.core import avhd, overlay
from diskd.core.avhd import DATA, PARENT, ZERO, AvhdMap, Head
from diskd.core.merge import FIRM_BLOCKS_MAX, FRUIT_SHARE, Merge
from diskd.core.steps import Script, Sync, Truncate, Write
from diskd.sim.disk import Crashed, SimDisk

BLOCK = 4096
HEAD = Head("cp-0123456789abcdef", "uuid", 5000 * BLOCK, BLOCK, "0011223344556677", "live")


def merge_of(blocks: int, batch: int, state: int = DATA) -> Merge:
    states = AvhdMap.empty(HEAD)
    states.set_range(0, blocks, state)
    return Merge(states, batch)


def clear(running: Merge) -> int:
    """What is left of a batch is merged."""
    cleared = len(running.submit_clear())
    running.forget()
    running.abandon_batch()
    return cleared


def test_a_write_takes_its_blocks_out_of_the_batch_until_its_clearing_is_submitted():
    running = merge_of(8, 8)
    running.start_batch()
    assert not running.must_wait(0, 8)
    running.leave(2, 3)
    assert running.submit_clear() == [0, 1, 5, 6, 7]
    assert [block for block in range(10) if running.must_wait(block, 1)] == [0, 1, 5, 6, 7]
    assert running.must_wait(4, 2) and not running.must_wait(2, 3) and not running.must_wait(8, 100)
    running.forget()
    running.abandon_batch()
    assert not running.must_wait(0, 8)
    assert running.map.runs(0, 8) == [(0, 2, PARENT), (2, 3, DATA), (5, 3, PARENT)]


def test_a_batch_cut_short_is_vouched_for_again():
    """The file may have lost the entries that were being cleared."""
    running = merge_of(8, 8)
    running.map.take_dirty()
    running.start_batch()
    running.abandon_batch()
    assert not running.map.dirty
    running.start_batch()
    running.submit_clear()
    running.abandon_batch()
    assert running.map.dirty == {0} and running.map.entries == 8
    assert not running.must_wait(0, 8)


@pytest.mark.parametrize("left", [0, 1, 100 // FRUIT_SHARE - 1, 100 // FRUIT_SHARE])
def test_after_a_batch_that_little_came_of_the_next_ones_writes_wait(left):
    """Else a guest that rewrites the same blocks all the time would hold up the merge for ever."""
    running = merge_of(1000, 100)
    running.start_batch()
    running.leave(0, 100 - left)
    assert clear(running) == left
    ((first, count, _),) = running.start_batch()
    is_firm = left < 100 // FRUIT_SHARE
    assert count == (FIRM_BLOCKS_MAX if is_firm else 100)
    assert running.must_wait(first, 1) is is_firm
    assert not running.must_wait(first + count, 1)
    running.submit_clear()
    assert running.must_wait(first, 1)
    running.forget()
    running.start_batch()
    assert not running.must_wait(0, 1000), "that one bore fruit"


def test_busy_blocks_are_left_for_later_and_then_claimed():
    running = merge_of(4, 8)
    assert running.start_batch(range(4)) == []
    running.claim()
    assert all(running.must_wait(block, 1) for block in range(4))
    assert running.start_batch([1, 2]) == [(0, 1, DATA), (3, 1, DATA)]
    assert running.must_wait(1, 2), "those are waited for still"
    assert not running.must_wait(0, 1)
    assert clear(running) == 2
    running.unclaim()
    assert not running.must_wait(0, 4)


def test_zeroed_blocks_cost_no_copy_so_a_batch_takes_more_of_them():
    running = merge_of(4000, 8, ZERO)
    running.map.set_range(100, 20, DATA)
    assert running.start_batch() == [(0, 100, ZERO), (100, 8, DATA)]


@pytest.mark.parametrize("seed", range(20))
def test_a_guest_that_never_pauses_does_not_keep_it_from_its_end(seed):
    """Whatever it writes between two steps, as often as it likes: entries only become fewer, and of each two
    batches one bears fruit."""
    rng = Random(seed)
    running = merge_of(800, 40)
    running.map.set_range(300, 300, ZERO)
    hot = sorted(rng.sample(range(1000), 300))
    batches = 0
    while not running.is_done:
        before = running.map.entries
        runs = running.start_batch()
        for block in [*hot, *range(rng.randrange(0, 500), rng.randrange(500, 1000))]:
            if not running.must_wait(block, 1) and running.map.state(block) != PARENT:
                running.leave(block, 1)
                running.map.set_range(block, 1, DATA)
        clear(running)
        batches += 1
        assert running.map.entries <= before and runs
    assert batches <= 2 * -(-800 * FRUIT_SHARE // 40)


def content(disk: SimDisk, head: Head) -> bytes:
    """Of the first block, as the next start finds it."""
    states = AvhdMap.over(head, bytearray(disk.run(avhd.load_cells(head))))
    return disk.run(overlay.read(BLOCK, states.runs(0, 1), 0, BLOCK))


def prepared(parent: bytes, state: bytes | int, seed: int) -> tuple[SimDisk, AvhdMap]:
    """A parent, and over it, flushed, a first block of these bytes, or of that state."""
    disk, head = SimDisk(Random(seed)), HEAD

    def before() -> Script[None]:
        yield Truncate(avhd.PARENT_FILE, head.size_bytes)
        yield Write(avhd.PARENT_FILE, 0, parent)
        yield Sync(avhd.PARENT_FILE)
        yield from avhd.create(head)

    disk.run(before())
    states = AvhdMap.empty(head)
    if isinstance(state, bytes):
        pieces = overlay.plan_write(states, None, 0, BLOCK)
        assert pieces
        disk.run(overlay.write_avhd(states, pieces, 0, state))
        overlay.commit(states, pieces)
    else:
        states.set_range(0, 1, state)
    disk.run(avhd.flush(states.take_dirty(), parent=False))
    return disk, states


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length", [BLOCK, 100])
def test_an_evicted_block_is_whole_after_a_power_loss_at_any_step(length, seed):
    """B6 and B2: flushed in the AVHD, it is put into the parent; one of the two counts, never none."""
    old, new = b"o" * BLOCK, b"n" * length + b"o" * (BLOCK - length)
    for crash_at in range(30):
        disk, states = prepared(b"p" * BLOCK, old, seed)
        running = Merge(states, 4)
        disk.crash_in = crash_at
        try:
            disk.run(overlay.evict(states, running, overlay.Piece("avhd", 0, length), b"n" * length))
        except Crashed:
            disk.power_loss()
            assert content(disk, HEAD) in (old, new)
        else:
            disk.power_loss()
            assert content(disk, HEAD) == new
            return
    raise AssertionError("an eviction of more steps than there are")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("state", [b"d" * BLOCK, ZERO])
def test_a_merged_block_is_whole_after_a_power_loss_at_any_step(state, seed):
    expected = state if isinstance(state, bytes) else bytes(BLOCK)

    def merged(running: Merge) -> Script[None]:
        yield from running.copy(running.start_batch())
        yield from running.clear(running.submit_clear())
        running.forget()

    for crash_at in range(30):
        disk, states = prepared(b"p" * BLOCK, state, seed)
        disk.crash_in = crash_at
        try:
            disk.run(merged(Merge(states, 4)))
        except Crashed:
            disk.power_loss()
            assert content(disk, HEAD) == expected
        else:
            disk.power_loss()
            assert content(disk, HEAD) == expected and states.entries == 0
            return
    raise AssertionError("a merge of more steps than there are")


@pytest.mark.parametrize("seed", range(6))
def test_a_flush_covers_what_went_to_the_parent(seed):
    """During a merge, and until the parent's first sync after the cut."""
    disk, states = prepared(b"p" * BLOCK, ZERO, seed)
    states.set_range(0, 1, PARENT)

    def written() -> Script[None]:
        yield Write(avhd.PARENT_FILE, 0, b"n" * BLOCK)
        yield from avhd.flush(states.take_dirty(), parent=True)

    disk.run(written())
    disk.power_loss()
    assert content(disk, HEAD) == b"n" * BLOCK


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("crash_at", range(5))
def test_of_a_removal_cut_short_the_head_is_never_what_is_left(seed, crash_at):
    """A head without its map is damage, and the image would be refused."""
    disk, _ = prepared(b"p" * BLOCK, PARENT, seed)
    disk.crash_in = crash_at
    try:
        disk.run(avhd.remove())
    except Crashed:
        disk.power_loss()
    disk.crash_in = None
    head = disk.run(avhd.load_head())
    if head is not None:
        assert content(disk, head) == b"p" * BLOCK
