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

The next backup waits for the merge, so beside a guest that never pauses there is a bound: a merge that would
take longer than ``MERGE_NS_GOAL`` is *late*. It takes half of the time then, in larger batches, so that its
syncs do not eat that up. (That it ends at all is core.merge's: entries only ever become fewer.)
"""

from typing import Final

import attrs

from daemonkit.units import MILLISECOND, MINUTE, SECOND

# For so long the copy may compete with the guest for the processor and the page cache at a stretch.
COPY_NS_GOAL: Final = 8 * MILLISECOND
# Smaller ones would do little else than sync.
BLOCKS_MIN: Final = 16
# With the guest at work the merge rests so many times as long as it copied, and as long as it synced.
COPY_REST_FACTOR: Final = 3
# A merge is to be through by then, whatever the guest does.
MERGE_NS_GOAL: Final = 30 * MINUTE
LATE_COPY_NS_GOAL: Final = 100 * MILLISECOND
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
        self,
        moved_bytes: int,
        copy_ns: int,
        sync_ns: int,
        *,
        guest_works: bool,
        is_tight: bool,
        is_late: bool = False,
    ) -> int:
        """Called after each batch; how long to rest before the next one, in nanoseconds."""
        goal_ns = LATE_COPY_NS_GOAL if is_late else COPY_NS_GOAL
        if not guest_works or is_tight:
            self.blocks = self.blocks_max
        elif copy_ns > goal_ns:
            self.blocks = max(BLOCKS_MIN, self.blocks // 2)
        elif copy_ns < goal_ns // 2:
            self.blocks = self.blocks * 2
        self.blocks = min(self.blocks, self.blocks_max)
        if is_tight:
            return 0
        factor = 1 if is_late else COPY_REST_FACTOR
        rest = min(copy_ns * factor + sync_ns, REST_NS_MAX) if guest_works else 0
        if self.rate is not None:
            rest = max(rest, moved_bytes * SECOND // self.rate - copy_ns - sync_ns)
        return rest


def is_late(elapsed_ns: int, left: int, total: int) -> bool:
    """Whether a merge that had ``total`` blocks, and has ``left`` after so long, would end too late."""
    return elapsed_ns * total > (total - left) * MERGE_NS_GOAL
