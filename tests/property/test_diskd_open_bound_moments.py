"""T3's bound on open regions, at every moment: also while records are on their way to the disk, of which a
power loss may keep any part, and when a region is wanted again whose closing has not been submitted yet."""

from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tracker_harness import MiB, tracker

from diskd.core.tracker import Commit, Flush

REGIONS = 24
LIMIT = 6

STEPS = st.lists(
    st.one_of(
        st.integers(0, REGIONS - 1),
        st.sampled_from(["begin commit", "end commit", "begin flush", "end flush"]),
    ),
    max_size=120,
)


class Disk:
    """What the MRT's records say, before and after the commit that is under way."""

    def __init__(self) -> None:
        self.before: set[int] = set()
        self.after: set[int] = set()

    def submitted(self, commit: Commit) -> None:
        """The records of a commit are written, not yet synced."""
        for record in commit.records:
            assert record.index == 0, "one record covers all regions here"
            bits = np.unpackbits(np.frombuffer(record.bits, np.uint8), bitorder="little")
            self.after = {int(region) for region in np.flatnonzero(bits)}

    def most_open(self) -> int:
        """After a power loss now, at worst: the old or the new of each region."""
        return len(self.before | self.after)


class Run:
    """A tracker, its disk and what is under way."""

    def __init__(self) -> None:
        self.tracked = tracker(max_open=LIMIT, ahead=2, size_bytes=REGIONS * MiB)
        self.disk = Disk()
        self.commit: Commit | None = None
        self.flush: Flush | None = None

    def step(self, what: int | str) -> None:
        """One of STEPS, where it is possible now."""
        if isinstance(what, int):
            if not self.tracked.admit(what * MiB, 4096):
                self.tracked.want([what])
        elif what == "begin commit" and self.commit is None:
            self.commit = self.tracked.begin_commit(1)
            if self.commit is not None:
                self.disk.submitted(self.commit)
        elif what == "end commit" and self.commit is not None:
            self.tracked.end_commit(self.commit)
            self.disk.before, self.commit = set(self.disk.after), None
        elif what == "begin flush" and self.flush is None:
            self.flush = self.tracked.begin_flush()
        elif what == "end flush" and self.flush is not None:
            self.tracked.end_flush(self.flush, self.tracked.root)
            self.flush = None
        assert self.disk.most_open() <= LIMIT
        assert self.tracked.open_count <= LIMIT


def test_never_more_regions_are_open_than_allowed() -> None:
    kinds = ["touch", "touch", "begin commit", "end commit", "begin flush", "end flush"]
    opened = 0
    for seed in range(100):
        rng = Random(seed)
        run = Run()
        for _ in range(300):
            kind = rng.choice(kinds)
            run.step(rng.randrange(REGIONS) if kind == "touch" else kind)
            opened = max(opened, run.tracked.open_count)
    assert opened == LIMIT


@given(STEPS, st.integers(0, REGIONS - 1))
def test_a_region_that_waits_at_the_bound_is_opened_in_its_turn(steps: list[int | str], waiting: int) -> None:
    run = Run()
    for what in [*steps, "end commit", "end flush"]:
        run.step(what)
    run.tracked.want([waiting])
    for _ in range(2 + REGIONS // LIMIT):
        for what in ("begin flush", "end flush", *(["begin commit", "end commit"] * 2)):
            run.step(what)
            if run.tracked.admit(waiting * MiB, 4096):
                return
    raise AssertionError("it waits for ever")
