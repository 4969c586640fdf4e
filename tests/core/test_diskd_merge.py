"""The batches of a merge: what a write takes out of one, what it waits for, and that there is an end."""

from random import Random

import pytest

from diskd.core.avhd import DATA, PARENT, ZERO, AvhdMap, Head
from diskd.core.merge import FIRM_BLOCKS_MAX, FRUIT_SHARE, Merge

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
