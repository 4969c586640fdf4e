"""Marking ahead of sequential streams: bounded, forward only, and never more regions open than allowed."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tracker_harness import REGIONS, MiB, tracker

from diskd.core.mark_ahead import STREAMS_MAX, MarkAhead
from diskd.core.tracker import Tracker


def write(tracked: Tracker, region: int, count: int = 1) -> int:
    """One write from the first touch on; how many commits it needed. A flush makes room at the bound."""
    commits = 0
    while not tracked.admit(region * MiB, count * MiB):
        closed = tracked.closed_regions(region * MiB, count * MiB)
        tracked.want(closed)
        if not tracked.has_room(len(closed)):
            begun = tracked.begin_flush()
            assert begun is not None
            tracked.end_flush(begun, tracked.root)
        commit = tracked.begin_commit(1)
        if commit is not None:
            commits += 1
            tracked.end_commit(commit)
        assert tracked.open_bytes <= tracked._max_open_bytes
        assert commits < 4, "no progress"
    return commits


def test_a_sequential_stream_needs_few_commits_and_goes_to_the_end() -> None:
    tracked = tracker(max_open=4096, ahead=64)
    assert sum(write(tracked, region) for region in range(REGIONS)) <= 7 + REGIONS // 65 + 1
    assert tracked.open_count == REGIONS
    alone = tracker(max_open=4096, ahead=0)
    assert sum(write(alone, region) for region in range(REGIONS)) == REGIONS


def test_several_streams_at_once_are_all_seen_and_more_than_that_are_forgotten() -> None:
    tracked = tracker(max_open=4096, ahead=64)
    streams = 8
    length = REGIONS // streams
    commits = sum(
        write(tracked, stream * length + step) for step in range(length) for stream in range(streams)
    )
    assert commits <= streams * (7 + length // 65 + 1)
    crowded = MarkAhead(1 << 20, 64)
    for step in range(3):
        for stream in range(STREAMS_MAX + 1):
            assert len(crowded.touched(stream * 1000 + step, stream * 1000 + step)) == 0


def test_random_touches_open_next_to_nothing_in_vain() -> None:
    rng = Random(3)
    tracked = tracker(max_open=1 << 20, ahead=64, size_bytes=100_000 * MiB)
    touched = {rng.randrange(100_000) for _ in range(1000)}
    for region in sorted(touched, key=lambda _: rng.random()):
        write(tracked, region)
    assert len(touched) <= tracked.open_count <= len(touched) * 1.02


@pytest.mark.parametrize("max_open", [130, 160, 300])
def test_at_the_bound_streams_take_nothing_from_those_who_wait(max_open: int) -> None:
    rng = Random(max_open)
    tracked = tracker(max_open=max_open, ahead=64)
    for step in range(3 * REGIONS):
        write(tracked, step % REGIONS if step % 2 else rng.randrange(REGIONS))


@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(1, 3)), max_size=60),
    st.integers(0, 16),
    st.integers(0, 1),
)
def test_what_is_opened_ahead_lies_behind_the_touch_and_is_bounded(
    touches: list[tuple[int, int]], ahead_max: int, again: int
) -> None:
    marks = MarkAhead(100, ahead_max)
    seen: list[range] = []
    for first, count in touches:
        last = min(first + count - 1, 99)
        ahead = marks.touched(first, last)
        assert len(ahead) <= ahead_max
        assert not ahead or (ahead[0] > first and ahead[-1] < 100)
        # Only for those who follow somebody: an oracle without a memory limit.
        if ahead:
            assert any(region in earlier for region in range(first, last + 1) for earlier in seen)
        if again:
            assert marks.touched(first, last) == ahead
        seen.append(range(first, last + 2 + ahead_max))
