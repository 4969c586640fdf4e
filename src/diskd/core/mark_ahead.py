"""Which regions to open beyond those that a first touch needs: sequential streams are seen coming.

A stream that fills a disk touches one region after the other, and each first touch waits for a sync of the
MRT. So whoever goes forward gets some regions ahead in the same commit, twice as many each time:

    touched     r     r+1        (r+2 is open)    r+3
    opened      r     r+1 r+2                     r+3 r+4 r+5 r+6        ahead: 0, 1, 3, 7 ... up to a bound

A touch goes forward if it lies behind what a stream touched last, and no further than one region beyond what
was opened for it (a flush may have closed some of that again). Random touches hardly ever do. What was opened
in vain costs exactness only after a power loss, and until the next flush closes it; it counts against the
bound on open regions like any other.
"""

from typing import Final

import attrs

# More streams than this at once take turns in forgetting each other: then each region is opened by itself.
STREAMS_MAX: Final = 16


@attrs.define
class _Stream:
    """``last``: touched last; ``end``: the first region that was not opened for it."""

    last: int
    end: int
    ahead: int


class MarkAhead:
    """Pure bookkeeping; which of the regions are open already is not its business."""

    def __init__(self, region_count: int, regions_max: int) -> None:
        self._count = region_count
        self._max = regions_max
        self._streams: list[_Stream] = []

    def touched(self, first: int, last: int) -> range:
        """Regions to open with ``first`` to ``last``. Asking again for the same touch changes nothing."""
        stream = self._find(first, last)
        if first > stream.last or last > stream.last:
            grows = stream.ahead >= 0
            stream.ahead = min(2 * stream.ahead + 1, self._max) if grows else 0
            stream.last = last
            stream.end = min(last + 1 + stream.ahead, self._count)
        return range(stream.last + 1, stream.end)

    def _find(self, first: int, last: int) -> _Stream:
        """The stream that this touch continues or repeats, else a new one in place of the least recent."""
        for index in reversed(range(len(self._streams))):
            stream = self._streams[index]
            if stream.last <= first <= stream.end or first <= stream.last <= last:
                self._streams.append(self._streams.pop(index))
                return stream
        if len(self._streams) >= STREAMS_MAX:
            del self._streams[0]
        stream = _Stream(first - 1, first, -1)
        self._streams.append(stream)
        return stream
