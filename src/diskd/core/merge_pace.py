"""How fast a merge goes: how large its next batch is, and how long it rests after one.

Three wishes, in this order:

    space      where the file system is getting full the AVHD must go: no rest, full batches
    limit      never more than ``rate`` bytes per second, where the operator has set one
    the guest  while it reads or writes, copying has a quarter of the time, and syncs have half of it: a batch
               is kept so small that copying it takes some milliseconds, and is followed by a rest

Without a guest at work a batch is as large as allowed, since every batch costs two syncs, and nothing rests.
A batch's size is found by trying: halved after one whose copy took too long, doubled after one whose copy did
not. How long the syncs take has no part in that: on a slow disk small batches would cost more of them, and a
guest's write waits for a sync only where it meets a block whose entry is being cleared.
"""

from typing import Final

import attrs

from daemonkit.units import MILLISECOND, SECOND

# For so long the copy may compete with the guest for the processor and the page cache at a stretch.
COPY_NS_GOAL: Final = 8 * MILLISECOND
# Smaller ones would do little else than sync.
BLOCKS_MIN: Final = 16
# With the guest at work the merge rests so many times as long as it copied, and as long as it synced.
COPY_REST_FACTOR: Final = 3
# A disk that takes long for a sync must not turn every rest into an age.
REST_NS_MAX: Final = SECOND


@attrs.define
class Pace:
    """``rate``: bytes per second, or None. ``blocks_max``: the largest batch."""

    rate: int | None
    blocks_max: int
    blocks: int = attrs.field(
        init=False, default=attrs.Factory(lambda self: min(64, self.blocks_max), takes_self=True)
    )

    def batch_done(
        self, moved_bytes: int, copy_ns: int, sync_ns: int, *, guest_works: bool, is_tight: bool
    ) -> int:
        """Called after each batch; how long to rest before the next one, in nanoseconds."""
        if not guest_works or is_tight:
            self.blocks = self.blocks_max
        elif copy_ns > COPY_NS_GOAL:
            self.blocks = max(BLOCKS_MIN, self.blocks // 2)
        elif copy_ns < COPY_NS_GOAL // 2:
            self.blocks = self.blocks * 2
        self.blocks = min(self.blocks, self.blocks_max)
        if is_tight:
            return 0
        rest = min(copy_ns * COPY_REST_FACTOR + sync_ns, REST_NS_MAX) if guest_works else 0
        if self.rate is not None:
            rest = max(rest, moved_bytes * SECOND // self.rate - copy_ns - sync_ns)
        return rest
