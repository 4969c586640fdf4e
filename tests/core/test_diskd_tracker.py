"""The tracker's decisions one at a time, where a crash in the simulator would show a mistake only seldom."""

import attrs
from tracker_harness import MiB, tracker

from diskd.core.mrt import STAMP_NS
from diskd.core.shared import SharedArea
from diskd.core.tracker import Tracker

PAGE_BLOCKS = 8 * 4096
POINT = "rp-0000000000000001"


def opened(*regions: int) -> Tracker:
    """A tracker with these regions open."""
    tracked = tracker(max_open=100, ahead=0)
    tracked.want(list(regions))
    commit = tracked.begin_commit(1)
    assert commit is not None
    tracked.end_commit(commit)
    return tracked


def prepare(tracked: Tracker) -> None:
    """What a cut registers before its freeze."""
    size = 4096 + tracked.identity.geometry.bitmap_bytes
    tracked.prepare(SharedArea(memoryview(bytearray(size)), b"n" * 16, 2), tracked.header)


def flush(tracked: Tracker) -> set[int]:
    """One flush; the pages that it made durable."""
    begun = tracked.begin_flush()
    assert begun is not None
    slots = bytearray(begun.root.slots)
    for page in begun.pages:
        slots[page] = 0
    tracked.end_flush(begun, attrs.evolve(begun.root, sequence=begun.root.sequence + 1, slots=bytes(slots)))
    return set(begun.pages)


def test_what_was_marked_during_a_cut_that_is_taken_back_is_flushed_and_then_closed() -> None:
    tracked = opened(0, 200)
    assert tracked.admit(0, 4096)
    prepare(tracked)
    tracked.freeze(POINT)
    assert tracked.admit(200 * MiB, 4096)
    tracked.area.time_ns = 77
    tracked.unfreeze()
    assert tracked.area.time_ns == 77
    block = 200 * MiB // 4096
    assert tracked.area.bits[0] == 1
    assert tracked.area.bits[block >> 3] >> (block & 7) & 1
    assert flush(tracked) == {0, block // PAGE_BLOCKS}
    assert not tracked.admit(200 * MiB, 4096), "its page was stored: it is closed, in memory first"


def used(tracked: Tracker) -> dict[int, list[int]]:
    """The pages that an answer unites, by interval."""
    return {area.interval: pages.tolist() for area, pages in tracked.used_pages()}


def test_an_answer_lacks_no_page_whatever_its_flush_or_cut_has_come_to() -> None:
    """Written and not under a root yet, marked since, or of an interval without a file: all of it counts."""
    tracked = opened(0, 200, 400)
    pages = [block // PAGE_BLOCKS for block in (0, 200 * MiB // 4096, 400 * MiB // 4096)]
    assert len(set(pages)) == 3
    assert tracked.admit(0, 4096)
    begun = tracked.begin_flush()
    assert begun is not None
    assert used(tracked) == {1: pages[:1]}, "on its way"
    assert tracked.admit(200 * MiB, 4096)
    assert used(tracked) == {1: pages[:2]}
    prepare(tracked)
    tracked.freeze(POINT)
    assert tracked.admit(400 * MiB, 4096)
    assert used(tracked) == {1: pages[:2], 2: pages[2:]}, "frozen, and not persisted"
    tracked.end_flush(begun, attrs.evolve(begun.root, slots=bytes([0]) + begun.root.slots[1:]))
    assert used(tracked) == {1: pages[:2], 2: pages[2:]}


def test_a_region_marked_before_a_freeze_stays_open_over_the_end_of_a_flush() -> None:
    """The flush had copied its page before the mark; the interval that has the mark is not durable yet."""
    tracked = opened(0, 5)
    begun = tracked.begin_flush()
    assert begun is not None
    assert tracked.admit(0, 4096)
    prepare(tracked)
    tracked.freeze(POINT)
    tracked.end_flush(begun, begun.root)
    assert tracked.admit(0, 4096), "still open"
    assert not tracked.admit(5 * MiB, 4096), "nobody marked it: closed"
    assert tracked.begin_flush() is None, "the RCT holds the frozen interval"


def test_a_region_wanted_again_before_its_closing_was_submitted_stays_open_on_disk() -> None:
    tracked = opened(0, 5)
    assert tracked.admit(0, 4096)
    flush(tracked)
    assert not tracked.admit(0, 8192)
    tracked.want([0])
    commit = tracked.begin_commit(2)
    assert commit is not None
    assert tracked.admit(0, 8192), "at once: no record that closes it was submitted"
    assert [record.bits[0] for record in commit.records] == [1]
    tracked.end_commit(commit)


def test_times_of_writes_reach_the_disk_with_the_next_commit() -> None:
    """Or else a power loss finds the raw file changed later than anybody has said (T4)."""
    tracked = opened(0)
    flush(tracked)
    closing = tracked.begin_commit(2)
    assert closing is not None
    tracked.end_commit(closing)
    assert tracked.begin_commit(3) is None, "nothing to say"
    tracked.area.time_ns = 99
    commit = tracked.begin_commit(100)
    assert commit is not None
    assert [record.time_ns for record in commit.records] == [99]


def test_a_commit_never_relies_on_a_stamp_that_is_more_than_half_used_up() -> None:
    """Or else the next recovery takes the file for an older copy that was put back (T4)."""
    tracked = tracker(max_open=100, ahead=0)
    began = 10**18
    stamps = {}
    for region, now_ns in enumerate((0, STAMP_NS // 2, STAMP_NS // 2 + 1, STAMP_NS, -1)):
        tracked.want([region])
        commit = tracked.begin_commit(began + now_ns)
        assert commit is not None
        tracked.end_commit(commit)
        stamps[now_ns] = commit.stamp_ns
    # The last one: the clock was set back.
    expected = {0: 0, STAMP_NS // 2: None, STAMP_NS // 2 + 1: STAMP_NS // 2 + 1, STAMP_NS: None, -1: -1}
    assert stamps == {at: None if said is None else began + said for at, said in expected.items()}
