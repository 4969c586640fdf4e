"""When the raw file may be written without a region being opened first, that is said beforehand (T4)."""

from uuid import UUID

from diskd.core.geometry import Geometry, Identity
from diskd.core.mrt import NO_NONCE, Header, RawFacts
from diskd.core.points import empty
from diskd.core.rct import empty_root
from diskd.core.recovery import Recovered
from diskd.core.shared import SharedArea
from diskd.core.tracker import Tracker

MiB = 1 << 20
NOBODY = UUID(int=0)


def tracker() -> Tracker:
    identity = Identity(UUID(int=7), Geometry.check(8 * MiB, 4096, MiB))
    geometry = identity.geometry
    area = SharedArea(memoryview(bytearray(4096 + geometry.bitmap_bytes)), NO_NONCE, 1)
    header = Header(False, NOBODY, NOBODY, NO_NONCE, NO_NONCE, 1, 1, 100, RawFacts(8 * MiB, 0, 0, 1))
    root = empty_root(identity, NOBODY, sequence=1, interval=1)
    closed, clean = bytearray(geometry.region_count), bytearray(geometry.page_count)
    recovered = Recovered("clean", None, area, root, header, empty(NOBODY), closed, clean)
    return Tracker(identity, recovered, max_open_bytes=8 * MiB, mark_ahead_bytes_max=0)


def test_a_commit_with_nothing_to_do_announces_what_a_merge_may_write() -> None:
    tracked = tracker()
    assert tracked.begin_commit(5000) is None, "nothing was written, nothing will be"
    commit = tracked.begin_commit(5000, may_be_written=True)
    assert commit is not None
    assert [record.time_ns for record in commit.records] == [5000]
    tracked.end_commit(commit)
    assert tracked.begin_commit(5000, may_be_written=True) is None
