"""How fast a merge goes: the guest first, the operator's limit, and a file system that is getting full."""

import pytest

from daemonkit.units import MILLISECOND, SECOND, MiB
from diskd.core.merge_pace import (
    BLOCKS_MIN,
    COPY_NS_GOAL,
    LATE_COPY_NS_GOAL,
    MERGE_NS_GOAL,
    REST_NS_MAX,
    Pace,
    is_late,
)

BLOCKS = 1024


def run(
    pace: Pace,
    block_ns: int,
    batches: int,
    *,
    guest: bool = False,
    tight: bool = False,
    late: bool = False,
    sync_ns: int = 0,
):
    """(blocks, took, rest) of each batch where copying a block and a batch's syncs take so long."""
    found = []
    for _ in range(batches):
        blocks = pace.blocks
        took = blocks * block_ns
        rest = pace.batch_done(blocks * 4096, took, sync_ns, guest_works=guest, is_tight=tight, is_late=late)
        found.append((blocks, took + sync_ns, rest))
    return found


def test_without_a_guest_nothing_rests_and_batches_are_full():
    *_, last = run(Pace(None, BLOCKS), 50_000, 5)
    assert last == (BLOCKS, BLOCKS * 50_000, 0)


@pytest.mark.parametrize("block_ns", [5_000, 50_000, 200_000])
def test_beside_a_guest_it_takes_a_quarter_of_the_time_in_short_steps(block_ns):
    found = run(Pace(None, BLOCKS), block_ns, 50, guest=True)[10:]
    worked, rested = sum(took for _, took, _ in found), sum(rest for _, _, rest in found)
    assert worked * 3 == rested
    assert max(took for _, took, _ in found) <= 2 * COPY_NS_GOAL


def test_a_slow_sync_makes_no_small_batches_and_takes_half_of_the_time():
    *_, last = run(Pace(None, BLOCKS), 5_000, 30, guest=True, sync_ns=SECOND // 10)
    assert last[0] == BLOCKS and last[2] == SECOND // 10 + 3 * BLOCKS * 5_000


def test_a_slow_disk_gets_the_smallest_batches_and_no_endless_rests():
    found = run(Pace(None, BLOCKS), 50 * MILLISECOND, 20, guest=True)
    assert found[-1][0] == BLOCKS_MIN and found[-1][2] == REST_NS_MAX


@pytest.mark.parametrize("guest", [False, True])
@pytest.mark.parametrize("rate", [MiB, 7 * MiB, 100 * MiB])
def test_never_faster_than_the_rate(rate, guest):
    found = run(Pace(rate, BLOCKS), 20_000, 200, guest=guest)
    moved = sum(blocks for blocks, _, _ in found) * 4096
    seconds = sum(took + rest for _, took, rest in found) / SECOND
    assert moved / seconds <= rate * 1.001


def test_a_full_disk_comes_first():
    found = run(Pace(MiB, BLOCKS), 50_000, 5, guest=True, tight=True)
    assert found[-1] == (BLOCKS, BLOCKS * 50_000, 0)


def test_a_batch_is_never_larger_than_allowed():
    assert {blocks for blocks, _, _ in run(Pace(None, 4), 1000, 10, guest=True)} == {4}


@pytest.mark.parametrize("block_ns", [5_000, 200_000, 10 * MILLISECOND])
@pytest.mark.parametrize("sync_ns", [MILLISECOND, 200 * MILLISECOND, 3 * SECOND])
def test_a_late_one_takes_half_of_the_time_however_busy_the_guest_is(block_ns, sync_ns):
    found = run(Pace(None, BLOCKS), block_ns, 50, guest=True, late=True, sync_ns=sync_ns)[10:]
    assert all(rest <= took for _, took, rest in found)
    # And so much is copied for two syncs that these do not eat up its half.
    assert all(blocks == BLOCKS or blocks * block_ns >= LATE_COPY_NS_GOAL // 2 for blocks, _, _ in found)


def test_a_late_one_keeps_to_the_rate_all_the_same():
    found = run(Pace(MiB, BLOCKS), 20_000, 200, guest=True, late=True)
    moved = sum(blocks for blocks, _, _ in found) * 4096
    assert moved / (sum(took + rest for _, took, rest in found) / SECOND) <= MiB * 1.001


@pytest.mark.parametrize("blocks", [1, 10_000, 1 << 24])
def test_it_is_late_where_the_rest_would_not_be_merged_in_time(blocks):
    half = MERGE_NS_GOAL // 2
    assert is_late(half, blocks, blocks)
    assert not is_late(half - 1, blocks // 2, blocks)
    assert is_late(half + 2, blocks - blocks // 2, blocks)
    assert not is_late(0, blocks, blocks)
